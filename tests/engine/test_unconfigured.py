"""Without a longctx configuration the plugin changes nothing: vLLM with it and without it agree bit for
bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.documentation import ROOT
from tests.support.engines import generate, logprobs_of, prompt, running, running_here, tokens_of


def written(model: str | Path, in_processes: bool) -> list[Any]:
    with (running if in_processes else running_here)(model, None, max_model_len=128) as llm:
        outputs = generate(llm, [prompt(n) for n in (1, 33, 90)], 20, prompt_logprobs=0)
    return [[tokens_of(output), logprobs_of(output).tolist()] for output in outputs]


@pytest.mark.parametrize("in_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_outputs_equal_those_of_vllm_without_the_plugin(tiny_llama: Path, in_processes: bool) -> None:
    command = [sys.executable, "-m", "tests.engine.test_unconfigured", str(tiny_llama), str(in_processes)]
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert written(tiny_llama, in_processes) == json.loads(line.removeprefix("RESULT "))


if __name__ == "__main__":
    print("RESULT", json.dumps(written(sys.argv[1], sys.argv[2] == "True")))
