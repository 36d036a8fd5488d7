"""The command line, in this process."""

from typer.testing import CliRunner

from vllm_longctx.cli.main import app


def run(*words: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": None}).invoke(app, list(words))  # or a table is folded
    return result.exit_code, " ".join((result.stdout + result.stderr).split())
