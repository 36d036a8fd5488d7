"""The command `vllm-longctx`."""

import typer

from vllm_longctx.cli.diagnose import diagnose
from vllm_longctx.cli.doctor import doctor
from vllm_longctx.cli.generate import generate
from vllm_longctx.cli.get_model import get_model
from vllm_longctx.cli.passkey import passkey
from vllm_longctx.cli.score import score
from vllm_longctx.cli.size import size
from vllm_longctx.cli.train_focused import train_focused
from vllm_longctx.cli.tune import tune

app = typer.Typer(
    help="Texts far longer than a model was trained on, in vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(get_model)
app.command()(score)
app.command()(generate)
app.command()(passkey)
app.command()(tune)
app.command()(size)
app.command()(diagnose)
app.command()(train_focused)

if __name__ == "__main__":
    app()
