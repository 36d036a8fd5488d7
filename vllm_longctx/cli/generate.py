"""`vllm-longctx generate`: write on from a prompt, for as long as wanted, streamed."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from vllm_longctx.cli.engine import LEARNS, adapts, longctx_config, read_text, running_engine, step
from vllm_longctx.cli.options import BatchedTokens, Dtype, EnforceEager, Longctx, Model, Preset
from vllm_longctx.cli.output import console, errors_for_users
from vllm_longctx.cli.score import tokenize


def generate(
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to go on from.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 1000,
    model: Model = "booklm",
    longctx: Longctx = None,
    preset: Preset = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Write on past the end-of-text token.")] = True,
    dtype: Dtype = "auto",
    max_num_batched_tokens: BatchedTokens = 2048,
    enforce_eager: EnforceEager = False,
) -> None:
    """Write on from a prompt. The text goes to stdout, the figures to stderr."""
    with errors_for_users():
        if prompt_file is not None and prompt is None:
            prompt = read_text(prompt_file)
        elif prompt is None or prompt_file is not None:
            raise ValueError("give one of --prompt and --prompt-file")
        additional_config = longctx_config(longctx, preset)
        tokens = tokenize(model, prompt, None)
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            ignore_eos=ignore_eos,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"longctx": LEARNS} if adapts(additional_config) else None,
        )
        kwargs = {
            "dtype": dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "enforce_eager": enforce_eager,
        }
        with running_engine(model, additional_config, len(tokens) + max_tokens, **kwargs) as (engine, meter):
            engine.add_request("generate", tokens_input(tokens), params)
            written, start = 0, time.perf_counter()
            while engine.has_unfinished_requests():
                for output in step(engine):
                    written += len(output.outputs[0].token_ids)
                    sys.stdout.write(output.outputs[0].text)
                    sys.stdout.flush()
            elapsed = time.perf_counter() - start
    sys.stdout.write("\n")
    console.print(
        f"read {len(tokens):,} tokens, wrote {written:,} in {elapsed:.1f} s, at most {meter.peak} KV blocks "
        f"in use",
        highlight=False,
    )
