"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Model directory or name; `booklm` is the small one that ships with longctx.")
]
Longctx = Annotated[str | None, typer.Option(help="Configuration as JSON.")]
Preset = Annotated[
    str | None, typer.Option(help="lm-infinite (the default), streaming, temp-lora-quality or -economic.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchedTokens = Annotated[int, typer.Option(help="Tokens computed in one step (a chunk of a long prompt).")]
EnforceEager = Annotated[bool, typer.Option(help="Skip compilation: starts sooner, runs slower.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
