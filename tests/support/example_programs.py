"""The programs of examples/, as a user runs them against a server."""

import re
import subprocess
import sys

from tests.support.documentation import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, address: str, *words: str, text: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), *words, "--url", f"{address}/v1"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_that_a_chat_goes_on(address: str, text: str, trained: int) -> None:
    """Of a model that was trained on so many tokens: its history is read far past them, from the cache."""
    words = text.split()
    questions = [" ".join(words[k : k + 200]) for k in range(0, 1200, 200)]
    shown = run("endless_chat.py", address, "--max-tokens", "20", text="\n".join(questions))
    read, cached = zip(*re.findall(r"\[read ([\d,]+) tokens, ([\d,]+) of them cached\]", shown), strict=True)
    read, cached = ([int(number.replace(",", "")) for number in numbers] for numbers in (read, cached))
    assert len(read) == len(questions) and read == sorted(read) and read[-1] > 4 * trained
    assert cached[-1] > trained
