"""The clients that people use, each with its ordinary options, against one server (`make clients` installs
them).
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import running_server

from tests.support.engines import CHAT_TEMPLATE
from vllm_longctx import BOOKLM

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for path in (ROOT / "tests" / "clients").iterdir() if path.name.endswith(("_sdk.py", "_sdk.mjs"))
)
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
MODULES = ROOT / "tests" / "clients" / "node_modules"
# Requests that do not adapt live within the trained length here, which is a twentieth of what they ask for.
FLAGS = [
    "--longctx-preset",
    "temp-lora-quality",
    "--max-model-len",
    "8192",
    "--max-num-seqs",
    "4",
    "--dtype",
    "float32",
]
FLAGS += ["--enforce-eager", "--kv-cache-memory-bytes", "100000000", "--served-model-name", "booklm"]
FLAGS += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    # Without the first token that it was trained with, booklm may write nothing that can be read.
    (directory / "chat.jinja").write_text("{{ bos_token }}" + CHAT_TEMPLATE)
    with running_server(
        BOOKLM, directory / "log", *FLAGS, "--chat-template", str(directory / "chat.jinja")
    ) as address:
        yield address


def command(script: Path) -> list[str]:
    if script.suffix == ".py":
        if not PYTHON.exists():
            pytest.skip(f"the clients are not installed in {PYTHON.parents[1]}: make clients")
        return [str(PYTHON), str(script)]
    node = shutil.which("node")
    if node is None or not MODULES.is_dir():
        pytest.skip(f"Node is not there, or the clients are not installed in {MODULES}: make clients")
    return [node, str(script)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_client_with_its_ordinary_options(script: Path, request: pytest.FixtureRequest) -> None:
    words = command(script)
    address = request.getfixturevalue("address")  # after what may skip
    offline = {
        "AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "AI_SDK_LOG_WARNINGS": "false",
    }
    done = subprocess.run(
        [*words, address], capture_output=True, text=True, timeout=300, env={**os.environ, **offline}
    )
    assert done.returncode == 0, json.dumps(words) + done.stdout[-2000:] + done.stderr[-4000:]
