"""Ask about a long document: a model with a memory finds what no window holds.

    python examples/ask_a_document.py DOCUMENT.txt "QUESTION" [--url http://localhost:8000/v1]

The server runs a model with memory layers, such as LongLLaMA or benchmarks/booklm-memory.
"""

import argparse
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("question", help="the prompt's last words; a base model goes on from them")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none", timeout=3600)
    answer = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=f"{args.document.read_text(encoding='utf-8').strip()} {args.question}",
        max_tokens=args.max_tokens,
        temperature=0,
    )
    assert answer.usage is not None
    print(f"[read {answer.usage.prompt_tokens:,} tokens]")
    print(answer.choices[0].text.strip())


if __name__ == "__main__":
    main()
