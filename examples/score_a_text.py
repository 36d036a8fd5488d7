"""The loss of a text by position, with and without learning: how well the model predicts it, far past its
trained length.

    python examples/score_a_text.py TEXT.txt [--url http://localhost:8000/v1]

Each token is scored before anything was trained on it. The server needs an `adaptation` section, as in
examples/serve.yaml.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from openai import OpenAI

PARTS = 5


def losses(client: OpenAI, model: str, text: str, learns: bool) -> list[float]:
    """Negative log-likelihood of each token after the first, in nats."""
    extra = {"prompt_logprobs": 0, "vllm_xargs": {"longctx": json.dumps({"temp_lora": learns})}}
    answer = client.completions.create(model=model, prompt=text, max_tokens=1, extra_body=extra)
    scored = (answer.choices[0].model_extra or {})["prompt_logprobs"]
    return [-next(iter(position.values()))["logprob"] for position in scored[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none", timeout=3600)
    model = client.models.list().data[0].id
    text = args.text.read_text(encoding="utf-8")
    print("reading twice, the second time learning; this takes a while ...", file=sys.stderr)
    plain, learned = (losses(client, model, text, learns) for learns in (False, True))
    print(f"{'tokens':>20} {'as it is':>10} {'Temp-LoRA':>10}   (nats per token)")
    for part in range(PARTS):
        start, end = (k * len(plain) // PARTS for k in (part, part + 1))
        print(f"{start:>9,} - {end:>8,} {fmean(plain[start:end]):>10.3f} {fmean(learned[start:end]):>10.3f}")


if __name__ == "__main__":
    main()
