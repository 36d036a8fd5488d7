"""Tables of the commands where there is no terminal."""

import re

import pytest
from typer.testing import CliRunner

from vllm_longctx.cli.main import app
from vllm_longctx.seams import SEAMS


@pytest.mark.parametrize("columns", [None, "80"])
def test_doctor_cuts_nothing(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert "…" not in shown
    assert {len(line) for line in shown.splitlines()} <= set(range(int(columns or 200) + 1))
    cells = [line.split("│")[1] for line in shown.splitlines() if line.count("│") == 5]
    words = re.sub(r"\s", "", "".join(cells))
    assert all(re.sub(r"\s", "", seam.what) in words for seam in SEAMS)
