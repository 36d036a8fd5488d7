"""The loops of benchmarks/peer.py are their papers'; a peer that fails is a row with its reason."""

import json
import sys
from pathlib import Path
from typing import Any

import peer
import peers
import pytest
import torch
from peer import FIRST, SINKS, LambdaReference, StreamingReference, Task
from peers import cells, measured, peer_table, recipe
from temp_lora import official_reader
from transformers import AutoModelForCausalLM

from tests.support.reference_model import ReferenceLlama
from vllm_longctx.geometry import Geometry

TRAINED, BUDGET = 40, 30


def task(path: Path, chunk: int) -> Task:
    torch.manual_seed(3)
    text = torch.randint(3, 512, (90,)).tolist()
    return Task(
        model=str(path),
        dtype="float32",
        threads=1,
        trained=TRAINED,
        text=text,
        scored=25,
        keys=[],
        speed=[text[:50], text[1:51]],
        written=4,
        budget=BUDGET,
        chunk=chunk,
        recipe=recipe(16, 48),
    )


@pytest.mark.parametrize(
    ("loop", "chunk", "geometry"),
    [
        (LambdaReference, 16, Geometry(FIRST, BUDGET - FIRST, TRAINED)),
        (StreamingReference, 1, Geometry(SINKS, BUDGET - SINKS + 1, None, "in_cache")),
    ],
)
def test_the_loops_are_their_methods(
    loop: Any, chunk: int, geometry: Geometry, tiny_llama: Path, one_thread: None
) -> None:
    given = task(tiny_llama, chunk)
    reference = ReferenceLlama(tiny_llama)
    with torch.no_grad():
        reader = loop(given)
        wanted = -reference.token_logprobs(given.text, geometry)[-given.scored :]
        torch.testing.assert_close(torch.tensor(reader.nll()).double(), wanted, rtol=1e-4, atol=1e-4)
        written = reader.write(given.speed, 3)
    assert written.prefill_s > 0 and written.decode_s > 0
    held = BUDGET if loop is StreamingReference else 50 + 2
    assert written.kv_bytes == held * 3 * 2 * 2 * 32 * 4  # layers, keys and values, KV heads, elements, bytes
    for prompt, tokens in zip(given.speed, written.tokens, strict=True):
        logprobs = reference.logprobs([*prompt, *tokens[:-1]], geometry)[-3:]
        assert logprobs.argmax(-1).tolist() == tokens


def test_the_official_reader_scores_before_it_trains(tiny_llama: Path, one_thread: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    given = task(tiny_llama, 1)
    plain = official_reader(model, {**given.recipe, "epochs": 0})(given.text)
    reference = ReferenceLlama(tiny_llama)
    wanted = [
        -reference.token_logprobs(given.text[max(0, first - 32) : min(first + 16, 90)])[
            -min(16, 90 - first) :
        ]
        for first in range(1, 90, 16)
    ]
    torch.testing.assert_close(torch.tensor(plain).double(), torch.cat(wanted), rtol=1e-4, atol=1e-4)
    learnt = official_reader(model, {**given.recipe, "learning_rate": 1e-2})(given.text)
    assert learnt[:16] == pytest.approx(plain[:16]) and learnt[16:] != pytest.approx(plain[16:], abs=1e-2)


def test_a_peer_that_fails_is_a_row_with_its_reason(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interpreter(does: str) -> Path:
        path = tmp_path / does.split()[0]
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
        return path

    given = task(tiny_llama, 16)
    rows = {
        "fails": measured("fails", given, interpreter("echo 'ValueError: no' >&2; exit 1"), 60),
        "is ended": measured("is ended", given, interpreter("exit 3"), 60),
        "is slow": measured("is slow", given, interpreter("exec sleep 60"), 0.05),
        "is nowhere": measured("is nowhere", given, tmp_path / "python", 60),
        "stops": measured("stops", given, interpreter("""printf '{"kv_bytes": 5}' > "$4"; exit 1"""), 60),
    }
    reasons = [row["reason"] for row in rows.values()]
    assert reasons[:2] == ["ValueError: no", "it ended with 3"]
    assert "it was ended after" in reasons[2] and "No such file" in reasons[3]
    assert rows["stops"]["kv_bytes"] == 5 and reasons[4] == "it ended with 1"
    assert "fails: ValueError: no" in str(peer_table(rows).caption)
    assert cells(rows["fails"]) == [""] * 8


def test_a_peer_that_is_not_installed_says_so(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps(vars(task(tiny_llama, 16))))
    assert Task.read(path) == task(tiny_llama, 16)
    monkeypatch.setattr(peer, "NEEDED", {"kvpress": "no-such-package"})
    monkeypatch.setattr(sys, "argv", ["peer.py", "kvpress, SnapKV", str(path), str(tmp_path / "row.json")])
    with pytest.raises(SystemExit, match="no-such-package is not installed for"):
        peer.main()


def test_cells_show_what_there_is() -> None:
    row = {
        "nll": 3.14159,
        "keys": {"inside": 1.0, "outside": 0.0},
        "prefill_per_s": {"1": 1234.5},
        "decode_per_s": {"1": 9.87, "8": 70.0},
        "kv_bytes": 3 << 20,
        "reason": None,
    }
    assert cells(row) == ["3.142", "100%", "0%", "1,234.5", "", "9.9", "70.0", "3"]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("A few words.")
    for options, message in (
        ({"peers": "stock"}, "--peers: there is no peer 'stock'; peers: longctx, lm-infinite; longctx"),
        ({"budget": 1000}, "--budget 1000: the model was trained on 512 tokens"),
        ({"quick": True}, "tokens, but 640 are read; give a longer one"),
    ):
        with pytest.raises(peers.typer.Exit):
            peers.main(tmp_path / "text.txt", "booklm", **options)
        assert message in " ".join(capsys.readouterr().err.split())
