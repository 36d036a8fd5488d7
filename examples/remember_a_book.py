"""Learn a book and write on: the adapter that a request trains is saved under a name, and another request
begins with it.

    python examples/remember_a_book.py BOOK.txt --name my-book [--url http://localhost:8000/v1]

The server needs an `adaptation` section with `adapters_root`, as in examples/serve.yaml.
"""

import argparse
import json
import sys
from pathlib import Path

from openai import OpenAI
from openai.types import Completion

LAST_CHARACTERS = 1000  # of the book: where the second request goes on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("book", type=Path)
    parser.add_argument("--name", default="book", help="of the saved adapter")
    parser.add_argument("--max-tokens", type=int, default=300, help="to write")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none", timeout=3600)
    model = client.models.list().data[0].id
    book = args.book.read_text(encoding="utf-8")

    def complete(prompt: str, max_tokens: int, **options: object) -> Completion:
        extra = {"vllm_xargs": {"longctx": json.dumps({"temp_lora": True, **options})}}
        return client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, extra_body=extra)

    print("reading and learning; for a long book this takes a while ...", file=sys.stderr)
    read = complete(book, 1, save_as=args.name)  # answered once the adapter is on disk
    refusal = (read.model_extra or {}).get("kv_transfer_params") or {}
    if "longctx" in refusal:
        raise SystemExit(f"the adapter was not saved: {refusal['longctx']['save_error']}")
    assert read.usage is not None
    print(f"[learned {read.usage.prompt_tokens:,} tokens; the adapter is saved as {args.name!r}]")
    written = complete(book[-LAST_CHARACTERS:], args.max_tokens, start_from=args.name)
    print(written.choices[0].text)


if __name__ == "__main__":
    main()
