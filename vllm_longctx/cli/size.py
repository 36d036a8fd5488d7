"""`vllm-longctx size`: what a load of sessions needs, before a machine is rented."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from vllm_longctx.cli.engine import load_plugin, longctx_config, model_path
from vllm_longctx.cli.options import BatchedTokens, Dtype, JsonOut, Longctx, Model, Preset
from vllm_longctx.cli.output import errors_for_users, tables, write_json

if TYPE_CHECKING:
    from vllm_longctx.startup.sizing import Engine, Load, Part

GIB = 1 << 30
ANY_POOL = 1 << 60  # bytes; so no window is made to fit the machine that this runs on
LEARNS = "temp-lora-quality"  # the preset, if sessions learn and nothing else is asked for


class Device(StrEnum):
    CUDA = "cuda"
    CPU = "cpu"


def size(
    memory_gib: Annotated[float, typer.Option(help="GiB of the device's memory.", min=0.001)],
    sessions: Annotated[int, typer.Option(help="Sessions that are open.", min=1)],
    model: Model = "booklm",
    longctx: Longctx = None,
    preset: Preset = None,
    device: Annotated[Device, typer.Option(help="Of an engine. It need not be here.")] = Device.CUDA,
    turn_tokens: Annotated[int, typer.Option(help="Tokens of a turn, read and written.", min=1)] = 300,
    turn_every: Annotated[
        float, typer.Option(help="Seconds from one turn of a session to its next.", min=0.001)
    ] = 60.0,
    history_tokens: Annotated[int, typer.Option(help="Tokens of a session's text, at most.", min=1)] = 32768,
    learn: Annotated[float, typer.Option(help="The share of sessions that learns.", min=0.0, max=1.0)] = 0.0,
    step_ms: Annotated[
        float, typer.Option(help="Milliseconds of a step, in which a session gets a token.", min=0.001)
    ] = 30.0,
    block_s: Annotated[
        float | None,
        typer.Option(help="Seconds to train a block, measured. Default: by --tflops.", min=0.0),
    ] = None,
    tflops: Annotated[
        float, typer.Option(help="TFLOP/s that training reaches, as a guess.", min=0.001)
    ] = 100.0,
    host_gib: Annotated[
        float | None, typer.Option(help="GiB of the host's memory for one engine.", min=0.001)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that an engine computes at once.", min=1)] = 256,
    max_num_batched_tokens: BatchedTokens = 2048,
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
) -> None:
    """Print what a load of sessions needs: KV, adapters, training, host memory, and how many engines.

    Nothing is loaded and no device is asked. Each line has its formula.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with errors_for_users():
        load_plugin()
        from vllm.engine.arg_utils import EngineArgs

        from vllm_longctx.config import KEY, LongContextConfig
        from vllm_longctx.startup import platform, sizing

        if learn and preset is None and longctx is None:
            preset = LEARNS
        additional_config = longctx_config(longctx, preset)
        config = EngineArgs(
            model=model_path(model),
            additional_config=additional_config,
            dtype=dtype,  # type: ignore[arg-type]  # vLLM says which there are
            max_model_len=history_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=ANY_POOL,
        ).create_engine_config()
        facts = platform.CPU if device is Device.CPU else platform.CUDA
        adaptation = sizing.adaptation_on(config, facts)
        load = sizing.Load(sessions, learn, turn_tokens, turn_every, step_ms / 1000)
        training = "nobody learns"
        if adaptation is not None and learn:
            seconds, training = sizing.training_s(config, adaptation, tflops)
            if block_s is not None:
                seconds, training = block_s, "--block-s"
            load = replace(load, block_tokens=adaptation.block_tokens, block_s=seconds)
        elif learn:
            raise ValueError(
                f"--learn {learn:g}, but no request can learn with this configuration; leave --preset and "
                f"--longctx out, or add an adaptation"
            )
        limits = {sizing.Place.DEVICE: int(memory_gib * GIB * config.cache_config.gpu_memory_utilization)}
        if host_gib is not None:
            limits[sizing.Place.HOST] = int(host_gib * GIB)
        given = LongContextConfig.parse(additional_config[KEY]).adaptation
        engine = sizing.engine_of(config, facts, limits, None if given is None else given.slots)
        engines, stock = engine.engines(load), engine.stock().engines(replace(load, learn=0.0))
        part = sizing.Part.of(load, engines or sessions)
    output = tables()
    output.print(size_table(load, engine, part, training))
    output.print(advice(load, engine, part, engines, stock), highlight=False, markup=False, soft_wrap=True)
    write_json(
        json_out,
        {
            "model": model,
            "load": asdict(load),
            "engines": engines,
            "engines_of_stock_vllm": stock,
            "of_one": asdict(part),
            "kv_bytes_per_request": engine.kv,
            "kv_bytes_per_request_of_stock_vllm": engine.kv_stock,
            "bytes": {item.name: item.bytes_of(part) for item in engine.items},
            "uses": engine.uses(part, load.block_s),
        },
    )


def size_table(load: "Load", engine: "Engine", part: "Part", training: str) -> Table:
    """training: The formula of a block's training."""
    columns = Column("", justify="right"), Column("formula", overflow="fold")
    table = Table("what", *columns, title="Of all engines; of a request; of one engine")
    for rows in (load_rows(load, training), kv_rows(engine), engine_rows(load, engine, part)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    for name, share in engine.uses(part, load.block_s).items():
        table.add_row(name, f"{share:.0%}", limit_text(name, engine, load, part))
    return table


def load_rows(load: "Load", training: str) -> Iterator[tuple[str, str, str]]:
    sessions, every = f"{load.sessions:,} sessions", f"{load.every_s:g} s"
    turn = f"{load.turn_tokens:,} tokens × {load.token_s * 1000:g} ms"
    yield "a turn", f"{load.turn_s:,.1f} s", turn
    if load.block_tokens:
        blocks = f"{load.turn_tokens:,} tokens / block_tokens {load.block_tokens:,}"
        yield "a block's training", f"{load.block_s:.3g} s", training
        yield "a turn that learns", f"{load.learning_turn_s:,.1f} s", f"{turn} + {blocks} × training"
        given = f"{1 / load.block_s:,.2f} /s" if load.block_s else "any number"
        needed = f"{sessions} × {load.learn:g} × {blocks} / {every}"
        yield "blocks to train", f"{load.blocks_per_s:,.2f} /s", needed
        yield "one trainer trains", given, "1 / training"
        formula = f"{sessions} × {load.learn:g} × turn that learns / {every}"
        yield "turns that learn at once", f"{load.learning_at_once:,.1f}", formula
    of_others = f"{sessions} × {1 - load.learn:g} × turn / {every}"
    formula = f"turns that learn + {of_others}" if load.block_tokens else of_others
    yield "turns at once", f"{load.at_once:,.1f}", formula


def kv_rows(engine: "Engine") -> Iterator[tuple[str, str, str]]:
    ours = " + ".join(kind.formula(kind.blocks) for kind in engine.layers)
    stock = " + ".join(kind.formula(kind.stock) for kind in engine.layers)
    yield "KV of a request", size_text(engine.kv), ours
    yield "in stock vLLM", size_text(engine.kv_stock), stock


def engine_rows(load: "Load", engine: "Engine", part: "Part") -> Iterator[tuple[str, str, str]]:
    learning = f", {part.slots:,} slots, {part.versions:,} sessions that learn" if load.block_tokens else ""
    yield "one engine", f"{part.requests:,}", f"requests{learning}"
    for item in engine.items:
        place = "" if item.place == "device memory" else " (host)"
        yield f"  {item.name}{place}", size_text(item.bytes_of(part)), item.formula
    kept = f"{engine.idle_sessions(part):,}"
    yield "  idle sessions", kept, "whose KV the rest keeps for the next turn (prefix caching)"


def limit_text(name: str, engine: "Engine", load: "Load", part: "Part") -> str:
    """How much of a resource is used, of how much."""
    from vllm_longctx.startup.sizing import Place

    if name in list(Place):
        place = Place(name)
        return f"{size_text(engine.used(part, place))} of {size_text(engine.limits[place])}"
    return {
        "requests at once": f"{part.requests:,} of max_num_seqs {engine.sequences:,}",
        "training": f"{part.blocks_per_s:.2f} blocks/s × {load.block_s:.3g} s",
        "adaptation.slots": f"{part.slots:,} of {engine.slots}",
    }[name]


def advice(load: "Load", engine: "Engine", part: "Part", engines: int | None, stock: int | None) -> str:
    uses = engine.uses(part, load.block_s)
    first = max(uses, key=lambda name: uses[name])
    if engines is None:
        return (
            f"No number of engines holds this load: {first} is {uses[first]:.0%} used by one session alone."
        )
    of_stock = "none can hold it" if stock is None else f"{stock:,}"
    wanted = {"attention.memory_limit_gib": part.requests * engine.kv_host}
    wanted["adaptation.cache_gib"] = part.versions * max(item.per_version for item in engine.items)
    settings = [f"{name} {math.ceil(100 * size / GIB) / 100:g}" for name, size in wanted.items() if size]
    settings += [f"adaptation.slots {part.slots:,}"] * bool(part.slots)
    return (
        f"Engines: {engines:,} (stock vLLM, which does not learn: {of_stock}). What runs out first: {first}."
        + f"\nEach with {', '.join(settings)}." * bool(settings)
    )


def size_text(size: int) -> str:
    """Bytes, in GiB, MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"
