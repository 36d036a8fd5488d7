"""The hooks of `.pre-commit-config.yaml` run what `make lint` runs."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_hooks_run_what_make_lint_runs() -> None:
    rule = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule.splitlines()[1:]]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == commands
