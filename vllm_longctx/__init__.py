"""vLLM plugin: a stock language model reads and writes texts far longer than it was trained on."""

from pathlib import Path

__version__ = "0.1.0"

#: Directory of the small model that ships with the package (Llama architecture, trained length 512).
BOOKLM = str(Path(__file__).parent / "booklm")
