"""`vllm-longctx score` and `generate` as a user runs them."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm.utils.math_utils import cdiv

from tests.support import commands
from tests.support.engines import engines_in_this_process
from vllm_longctx import BOOKLM
from vllm_longctx.cli.passkey import CHOICES, Task
from vllm_longctx.geometry import Geometry

COMMAND = Path(sys.executable).parent / "vllm-longctx"
QUICK = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "512"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *words, *QUICK],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "COLUMNS": "150"},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    topics = pydoc_data.topics.topics
    path.write_text("\n".join(topics[name] for name in sorted(topics)))
    return path


def test_score_is_flat_where_stock_vllm_falls_apart(topics: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "score.json", tmp_path / "score.png"
    words = [
        "--max-tokens",
        "6000",
        "--bucket-tokens",
        "1500",
        "--baseline",
        "--json",
        str(out),
        "--plot",
        str(figure),
    ]
    with engines_in_this_process():
        code, shown = commands.run("score", "--text", str(topics), *words, *QUICK)
    assert code == 0, shown
    result = json.loads(out.read_text())
    assert [(b["start"], b["end"]) for b in result["buckets"]] == [
        (0, 1500),
        (1500, 3000),
        (3000, 4500),
        (4500, 6000),
    ]
    assert result["tokens"] == 6000 and result["tokens_per_s"] > 0
    assert result["config"]["attention"]["n_local"] == 512
    ours, stock = ([b["nll"] for b in r["buckets"]] for r in (result, result["baseline"]))
    assert max(ours) - ours[0] < 1
    assert all(s > o + 1 for s, o in zip(stock[1:], ours[1:], strict=True))
    # 10 first tokens, a window of 512 and 512 tokens in flight, in blocks of 32
    assert result["kv_blocks_peak"] <= 1 + cdiv(511 + 512, 32) + 1
    assert f"{ours[0]:.3f}" in shown and figure.stat().st_size > 10_000


def test_tune_shows_what_windows_and_first_tokens_cost(topics: Path, tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    words = ["--n-local", "256,512", "--n-global", "0,10", "--max-tokens", "1500", "--tolerance", "0.2"]
    with engines_in_this_process():
        code, shown = commands.run("tune", "--text", str(topics), *words, "--json", str(out), *QUICK)
    assert code == 0, shown
    result = json.loads(out.read_text())
    assert (result["tokens"], result["trained"]) == (1500, 512)
    runs = {(r["n_global"], r["n_local"]): r for r in result["runs"]}
    large, small = runs[10, 512], runs[10, 256]
    block = 32 * 6 * 2 * 4 * 32 * 4  # tokens, layers, keys and values, heads, their size, bytes
    for run in (large, small):  # one block of first tokens, and a window that may cross blocks
        held = round(run["kv_bytes"] / block)
        assert run["n_local"] // 32 <= held <= run["n_local"] // 32 + 2
        # With the tokens of a step of 512, before those that left the window are given back.
        assert run["n_local"] // 32 + 16 <= round(run["kv_bytes_peak"] / block) <= held + 16
        assert run["read_per_s"] > 0 and run["written_per_s"] > 0
    assert abs(large["nll"] - small["nll"]) < 0.2 and min(large["extra"], small["extra"]) == 0
    (without,) = (run for (first, _), run in runs.items() if first == 0)
    assert without["extra"] > 0.3  # the model leans on its first token
    chosen = result["recommended"]
    assert chosen["n_global"] == 10 and without["n_local"] == chosen["n_local"]
    assert f'"n_local": {chosen["n_local"]}}}' in shown


def test_generate_writes_far_past_the_trained_length(topics: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(topics.read_text()[:10_000])
    done = run("generate", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "64", "--seed", "3")
    assert len(done.stdout) > 100
    assert "wrote 64 in" in done.stderr


@pytest.mark.slow
def test_vllm_bench_throughput_takes_the_flags(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = [
        "--model",
        BOOKLM,
        "--plugin",
        "longctx",
        "--max-num-seqs",
        "4",
        "--kv-cache-memory-bytes",
        "100000000",
    ]
    words += [
        "--dataset-name",
        "random",
        "--random-input-len",
        "1500",
        "--random-output-len",
        "20",
        "--num-prompts",
        "4",
    ]
    command = [COMMAND.parent / "vllm", "bench", "throughput", *words, *QUICK, "--output-json", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "method lm_infinite, n_global 10, n_local 512" in done.stdout + done.stderr
    assert json.loads(out.read_text())["total_num_tokens"] > 4 * 1400


@pytest.mark.slow
def test_passkey_knows_nothing_of_a_key_beyond_all_windows(tmp_path: Path) -> None:
    """booklm retrieves hardly anything, but a key it sees changes what it says, and one that cannot reach it
    does not.
    """
    out, figure, window, layers = tmp_path / "passkey.json", tmp_path / "passkey.png", 96, 6
    trials = Task(AutoTokenizer.from_pretrained(BOOKLM)).trials(4000, [Geometry(10, window)], 4, seed=0)
    reach = layers * window  # what a token was told by those before it, it tells on to the next layer
    assert all(t.key_end <= 4000 - reach for t in trials if t.place == "outside")

    config = json.dumps({"attention": {"n_local": window}})
    words = ["--longctx", config, "--lengths", "250,4000", "--trials", "4"]
    done = run("passkey", *words, "--json", str(out), "--plot", str(figure))
    result = json.loads(out.read_text())
    assert (result["trials"], result["seed"], result["choices"]) == (4, 0, CHOICES)
    assert result["methods"]["longctx"]["config"]["attention"]["n_local"] == window
    rows = {(r["length"], r["place"]): r for r in result["methods"]["longctx"]["rows"]}
    assert set(rows) == {(250, "inside"), (250, "outside"), (4000, "inside"), (4000, "outside")}
    assert all(r["trials"] == 4 and 0 <= r["exact"] <= 1 and 0 <= r["choice"] <= 1 for r in rows.values())
    beyond = rows[4000, "outside"]
    assert (
        beyond["choice"] == pytest.approx(1 / CHOICES) and abs(beyond["gain"]) < 1e-3 and beyond["exact"] == 0
    )
    assert all(rows[length, "inside"]["gain_error"] > 0.01 for length in (250, 4000))
    assert f"{rows[250, 'inside']['gain']:+.2f}" in done.stdout and figure.stat().st_size > 10_000
