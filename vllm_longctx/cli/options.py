"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(help="Model directory or name. `booklm` ships with longctx, `get-model` fetches `smollm2`."),
]
Longctx = Annotated[str | None, typer.Option(help="Configuration as JSON, see docs/configuration.md.")]
Preset = Annotated[
    str | None,
    typer.Option(help="lm-infinite (the default), streaming, temp-lora-quality or temp-lora-economic."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchedTokens = Annotated[
    int, typer.Option(help="Tokens computed in one step: a long prompt is read in such chunks.")
]
EnforceEager = Annotated[bool, typer.Option(help="Skip compilation. It starts sooner and runs slower.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
