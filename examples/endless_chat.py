"""A chat without end: the whole history is sent with every question, far past the length that the model was
trained on.

    python examples/endless_chat.py [--url http://localhost:8000/v1]

Questions are lines of the standard input. The server forgets what has left its window, and its KV memory does
not grow.
"""

import argparse
import sys

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--max-tokens", type=int, help="of an answer; by default the server's limit")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none", timeout=3600)
    model = client.models.list().data[0].id
    history: list[dict[str, str]] = []
    limit = {} if args.max_tokens is None else {"max_tokens": args.max_tokens}
    if sys.stdin.isatty():
        print("Ask something; end with Ctrl-D.")
    for question in sys.stdin:
        history.append({"role": "user", "content": question.strip()})
        stream = client.chat.completions.create(
            model=model, messages=history, stream=True, stream_options={"include_usage": True}, **limit
        )
        answer = ""
        for chunk in stream:
            for choice in chunk.choices:
                answer += choice.delta.content or ""
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage is not None:
                details = chunk.usage.prompt_tokens_details
                cached = 0 if details is None else details.cached_tokens
                print(f"\n[read {chunk.usage.prompt_tokens:,} tokens, {cached:,} of them cached]")
        history.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
