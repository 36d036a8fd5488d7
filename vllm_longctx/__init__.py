"""vLLM plugin: a stock language model reads and writes texts far longer than it was trained on."""

import os
import sys
import warnings
from pathlib import Path

__version__ = "0.1.0"

#: Directory of the small model that ships with the package (Llama architecture, trained length 512).
BOOKLM = str(Path(__file__).parent / "booklm")

# A program that uses vLLM itself. The commands of this package add the name before they import vLLM.
if "vllm" in sys.modules and "longctx" not in os.environ.get("VLLM_PLUGINS", "longctx").split(","):
    warnings.warn(
        f"longctx is not loaded: VLLM_PLUGINS = {os.environ['VLLM_PLUGINS']!r} leaves it out, and vLLM then "
        "ignores its configuration in silence; add longctx to it, or unset it",
        stacklevel=2,
    )
