"""Without a longctx configuration the plugin changes nothing: vLLM with it and without it agree bit for
bit.
"""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.support.engines import generate, logprobs_of, prompt, running, tokens_of
if __name__ == "__main__":
    import json
    with running(sys.argv[2], None, max_model_len=128) as llm:
        outputs = generate(llm, [prompt(n) for n in (1, 33, 90)], 20, prompt_logprobs=0)
    print("RESULT", json.dumps([[tokens_of(o), logprobs_of(o).tolist()] for o in outputs]))
"""


def run(model: Path, tmp_path: Path, plugins: str) -> list:
    import os

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(Path(__file__).parents[2]), str(model)]
    done = subprocess.run(
        command,
        env={**os.environ, "VLLM_PLUGINS": plugins},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_outputs_equal_those_of_vllm_without_the_plugin(tiny_llama: Path, tmp_path: Path) -> None:
    assert run(tiny_llama, tmp_path, "longctx") == run(tiny_llama, tmp_path, "")
