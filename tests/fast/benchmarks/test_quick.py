"""The table of all measures of speed: what it runs, and when a goal is met."""

import json
import multiprocessing
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import quick
import typer

from tests.support import program_options
from tests.support.documentation import ROOT


def test_every_benchmark_takes_its_options() -> None:
    asked = [[f"benchmarks/{name}", *options] for name, *options in map(str.split, quick.STAGES)]
    with multiprocessing.get_context("fork").Pool(1, os.chdir, (ROOT,)) as pool:
        said = pool.map(program_options.complaint, [[*words, "--json", "OUT.json"] for words in asked])
    assert said == [None] * len(asked)


def test_a_row_is_void_where_its_benchmark_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        quick.Row("fast", lambda r: r["ratio"], 0.9),
        quick.Row("slow", lambda r: r["ratio"], 1.0, " %", True),
    ]
    monkeypatch.setattr(quick, "STAGES", {"good.py --rounds 1": rows, "bad.py": rows})

    def run(words: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        name, out = Path(words[1]).name, Path(words[-1])
        if name == "bad.py":
            return subprocess.CompletedProcess(words, 1, "", "Traceback\nPremiseError: no request decoded\n")
        out.write_text(json.dumps({"ratio": 1.5}))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(quick.subprocess, "run", run)
    with pytest.raises(typer.Exit):
        quick.main(only="", json_out=tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(row["value"], row["met"]) for row in written["rows"]] == [
        (1.5, True),
        (1.5, False),
        (None, False),
        (None, False),
    ]
    assert written["void"] == ["bad.py ended with code 1: PremiseError: no request decoded"]
    assert "void" in capsys.readouterr().out
    quick.main(only="good", json_out=tmp_path / "out.json")
