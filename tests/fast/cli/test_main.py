"""The commands' words and mistakes, without an engine."""

import importlib
import json
import os
import warnings
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_plugins_by_group

import vllm_longctx
from tests.support.commands import run
from vllm_longctx.cli.engine import load_plugin, why_left_out
from vllm_longctx.cli.score import Score, bucket_edges
from vllm_longctx.seams import SEAMS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "--text", "nowhere.txt"], "error: [Errno 2] No such file or directory: 'nowhere.txt'"),
        (
            ["score", "--text", "TEXT", "--preset", "fast"],
            "error: longctx: unknown preset 'fast'; presets: lm-infinite",
        ),
        (
            ["score", "--text", "TEXT", "--longctx", '{"attn": 1}'],
            "longctx: unknown key 'attn'; did you mean 'attention'?",
        ),
        (["score", "--text", "TEXT", "--longctx", "{"], "error: longctx: not valid JSON"),
        (["score", "--text", "EMPTY"], "holds no text"),
        (["score", "--text", "TEXT", "--max-tokens", "1"], "greater than or equal to 2"),
        (["doctor", "--url", "http://127.0.0.1:1"], "error: cannot read http://127.0.0.1:1/metrics: "),
        (["passkey", "--lengths", "1k"], "error: --lengths 1k: give numbers of tokens such as 512,1024"),
        (["passkey", "--lengths", "50,900"], "error: length 50 is too short: the task alone takes"),
        (["passkey", "--trials", "0"], "greater than or equal to 1"),
        (
            ["passkey", "--methods", "plain,fast"],
            "unknown method 'fast'; methods: lm-infinite, streaming, window, plain",
        ),
        (
            ["passkey", "--methods", "plain", "--baseline"],
            "error: --methods names all that is compared; leave out",
        ),
        (
            ["passkey", "--baseline", "--stock-tokens", "100", "--lengths", "512"],
            "error: --stock-tokens 100 leaves no length",
        ),
        (
            ["passkey", "--longctx", '{"attention": {"n_local": 513}}'],
            "attention.n_local = 513, but the model",
        ),
        (
            ["tune", "--text", "TEXT"],
            "tokens of TEXT are read, but the loss is compared past the trained length",
        ),
        (
            ["tune", "--text", "TEXT", "--n-local", "513"],
            "--n-local 513: the model was trained on 512 tokens",
        ),
        (["tune", "--text", "TEXT", "--n-local", "0"], "--n-local 0: give numbers of tokens such as 512"),
        (["tune", "--text", "TEXT", "--n-global", "-1,4"], "--n-global -1,4: give numbers of tokens"),
        (["generate"], "error: give one of --prompt and --prompt-file"),
        (
            ["generate", "--prompt", "a", "--prompt-file", "TEXT"],
            "error: give one of --prompt and --prompt-file",
        ),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words\n")
    (tmp_path / "empty.txt").write_text(" \n")
    names = {"TEXT": str(tmp_path / "text.txt"), "EMPTY": str(tmp_path / "empty.txt")}
    code, output = run(*(names.get(w, w) for w in words))
    for name, path in names.items():
        output = output.replace(path, name)
    assert code == 2 and message in output and "Traceback" not in output


def test_doctor_finds_every_seam_and_says_what_it_would_set() -> None:
    code, output = run("doctor", "--model", "booklm", "--preset", "streaming")
    assert code == 0 and "missing" not in output
    assert output.count("found") == len(SEAMS) + 1  # and the functions that are overridden
    assert "attention.n_local │ 508" in output
    assert "tcmalloc" in output and "libiomp" in output
    assert "prefix caching │ in steps of 32 tokens" in output


def test_doctor_shows_the_sizes_of_temp_lora() -> None:
    for preset, shown in (("temp-lora-quality", 512), ("lm-infinite", None)):
        adaptation = '{"adaptation": {}}' if shown is None else "{}"
        code, output = run("doctor", "--model", "booklm", "--preset", preset, "--longctx", adaptation)
        assert code == 0 and "trained length │ 512" in output
        assert "adaptation.block_tokens │ 128" in output
        for name in ("window", "plain"):
            assert (f"adaptation.{name}_tokens │ {shown}" in output) == (shown is not None)


@pytest.mark.parametrize("names", ["", "other", "other,another"])
def test_commands_load_what_vllm_plugins_leaves_out_and_doctor_says_so(
    names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", names)
    assert "longctx" not in load_plugins_by_group("vllm.general_plugins")
    code, output = run("doctor", "--model", "booklm")
    assert (
        code == 1
        and f"longctx is not loaded: VLLM_PLUGINS = {names!r} leaves it out, and vLLM then ignores its"
        in output
    )
    assert "attention.n_local │ 512" in output
    assert "longctx" in load_plugins_by_group(
        "vllm.general_plugins"
    )  # in what doctor, or any other command, starts, too
    assert set(names.split(",")) <= set(os.environ["VLLM_PLUGINS"].split(","))
    assert why_left_out() is None


@pytest.mark.parametrize("names", [None, "longctx", "other,longctx"])
def test_what_vllm_loads_stays_as_it_is(names: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if names is not None:
        monkeypatch.setenv("VLLM_PLUGINS", names)
    load_plugin()
    assert os.environ.get("VLLM_PLUGINS") == names


@pytest.mark.parametrize("words", [["doctor", "--model", "booklm"], ["score", "--text", "TEXT"]])
def test_a_plugin_that_vllm_did_not_load_is_said(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before: a KeyError, or stock vLLM's figures."""
    (tmp_path / "text.txt").write_text("some words\n" * 50)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config.__wrapped__)
    code, output = run(*(str(tmp_path / "text.txt") if w == "TEXT" else w for w in words))
    assert code == 2 and "error: longctx is not loaded: vLLM could not import it" in output


@pytest.mark.parametrize(("names", "warns"), [("other", True), ("other,longctx", False), (None, False)])
def test_a_program_of_the_users_is_warned(
    names: str | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if names is not None:
        monkeypatch.setenv("VLLM_PLUGINS", names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(vllm_longctx)
    said = [str(warning.message) for warning in caught]
    assert any(text.startswith("longctx is not loaded: VLLM_PLUGINS = 'other'") for text in said) == warns


def test_buckets_double_or_are_equal() -> None:
    assert bucket_edges(2000, None) == [0, 256, 512, 1024, 2000]
    assert bucket_edges(250, 100) == [0, 100, 200, 250]
    score = Score([1.0] * 99 + [2.0] * 100, 1.0, 1, {})
    assert [(b.start, b.end, b.nll) for b in score.buckets(100)] == [(0, 100, 1.0), (100, 200, 2.0)]


def test_the_shipped_model_fits_its_budget() -> None:
    from vllm_longctx import BOOKLM

    assert sum(f.stat().st_size for f in Path(BOOKLM).iterdir()) < 16_000_000
    assert json.loads((Path(BOOKLM) / "config.json").read_text())["max_position_embeddings"] == 512
