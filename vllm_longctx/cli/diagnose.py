"""`vllm-longctx diagnose`: why a model breaks past its trained length, and what Λ attention has to mend.

What is measured stands in `vllm_longctx/diagnosis.py`.
"""

import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vllm_longctx.cli.engine import model_path, read_text, trained_tokens
from vllm_longctx.cli.options import JsonOut, Model
from vllm_longctx.cli.output import counting, errors_for_users, figure, plot, tables, write_json
from vllm_longctx.cli.score import tokenize

if TYPE_CHECKING:
    from vllm_longctx.diagnosis import Findings, Measured, Samples

SHOWN = (0, 1, 2, 4, 8, 10, 16, 32)  # first tokens; what a window loses that keeps so many is shown
APART_DRAWN = 10  # first tokens that are drawn apart


def diagnose(
    text: Annotated[Path, typer.Option(help="Text file, at least twice as long as the trained length.")],
    model: Model = "booklm",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Read only the first tokens. Default: four times the trained length.", min=2),
    ] = None,
    n_global: Annotated[int, typer.Option(help="First tokens of Λ attention.", min=1)] = 10,
    n_local: Annotated[
        int | None, typer.Option(help="Window of Λ attention. Default: the trained length.", min=1)
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Queries that are looked at, in each doubling of their position.", min=1)
    ] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    json_out: JsonOut = None,
    plot_out: Annotated[
        Path | None, typer.Option("--plot", help="Draw the figures into this directory.")
    ] = None,
) -> None:
    """Say why a model breaks past its trained length, and what Λ attention needs: first tokens, a ceiling."""
    import torch

    from vllm_longctx.diagnosis import PLAIN, Diagnosis, Samples, findings, loaded
    from vllm_longctx.geometry import Geometry

    with errors_for_users():
        trained = trained_tokens(model)
        window = n_local or trained
        if window > trained:
            raise ValueError(
                f"--n-local {n_local}: the model was trained on {trained:,} tokens; give no more"
            )
        tokens = tokenize(model, read_text(text), max_tokens or 4 * trained)
        if len(tokens) < 2 * trained:
            raise ValueError(
                f"{len(tokens)} tokens of {text} are read, but what lies past the trained length, {trained}, "
                f"is looked for; give at least {2 * trained}, or more --max-tokens"
            )
        if plot_out is not None:
            plot_out.mkdir(parents=True, exist_ok=True)
        looked = Samples.of(trained, len(tokens), samples)
        geometry = Geometry(n_global, window, trained)
        with torch.inference_mode(), counting() as progress:
            diagnosis = Diagnosis(loaded(model_path(model), dtype), looked, geometry)
            task = progress.add_task("layers, plain", total=2 * len(diagnosis.rotaries))
            plain = diagnosis.measure(tokens, PLAIN, lambda: progress.advance(task))
            progress.update(task, description="layers, Λ")
            ours = diagnosis.measure(tokens, geometry, lambda: progress.advance(task))
    found = findings(plain, ours, looked, n_global)
    output = tables()
    output.print(bucket_table(plain, ours, looked))
    output.print(first_table(found))
    output.print(words(found), highlight=False, markup=False, soft_wrap=True)
    about = {"model": model, "text": str(text), "tokens": len(tokens), "trained": trained, "dtype": dtype}
    write_json(
        json_out,
        {
            **about,
            "n_global_tried": n_global,
            "n_local": window,
            "samples": samples,
            "edges": looked.edges,
            **asdict(found),
            "plain": as_json(plain),
            "lambda": as_json(ours),
        },
    )
    if plot_out is not None:
        draw(plot_out, plain, ours, looked)


def bucket_table(plain: "Measured", ours: "Measured", samples: "Samples") -> Table:
    from vllm_longctx.diagnosis import means

    table = Table(
        *("tokens", "logit, plain", "logit, Λ", "entropy, plain", "entropy, Λ"),
        title="The largest logit by distance and the largest entropy (nats) by position, means over heads",
    )
    columns = [means(values) for values in (plain.logits, ours.logits, plain.entropies, ours.entropies)]
    for bucket, (begin, end) in enumerate(pairwise(samples.edges)):
        if bucket == samples.trained:
            table.add_section()
        cells = ["" if math.isnan(column[bucket]) else f"{column[bucket]:.2f}" for column in columns]
        table.add_row(f"{begin:,} – {end:,}", *cells)
    return table


def first_table(found: "Findings") -> Table:
    kept = [k for k in SHOWN if k in found.lost]
    table = Table("first tokens kept", *map(str, kept), title="Attention that a window loses")
    table.add_row("lost", *(f"{found.lost[k]:.1%}" for k in kept))
    shares = ", ".join(f"{ceiling:,}: {share:.1%}" for ceiling, share in found.shares_at_ceilings.items())
    table.caption = f"What the first tokens get past the trained length, by the ceiling: {shares}"
    return table


def words(found: "Findings") -> str:
    from vllm_longctx.diagnosis import KEPT, LOST

    lines = [
        f"{number}. {factor.name}: {'holds' if factor.holds else 'does not hold'}: {factor.words}."
        for number, factor in enumerate(found.factors, 1)
    ]
    lines.append(
        f"First tokens that it needs: {found.n_global}. Those after them get at most {LOST:.0%} of the "
        "attention more than as many others.\n"
        f"The ceiling should be {found.distance_ceiling:,}: the largest within the trained length at which, "
        f"past it, the first tokens get {KEPT:.0%} of the attention that they get inside of it.\n"
        "vllm-longctx tune measures what windows and first tokens cost in loss."
    )
    return "\n".join(lines)


def as_json(measured: "Measured") -> dict[str, Any]:
    """Lists of `Measured`, but for the states; None where no key is seen."""
    return {
        "largest_logits": _finite(measured.logits.tolist()),
        "entropies": _finite(measured.entropies.tolist()),
        "first_tokens": _finite(measured.first.tolist()),
    }


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return values if math.isfinite(values) else None


def draw(directory: Path, plain: "Measured", ours: "Measured", samples: "Samples") -> None:
    """Figures like the paper's: logits.png, entropies.png, and states_K.png for each of the first layers."""
    from vllm_longctx.diagnosis import components, means

    rise = plain.logits[..., samples.trained :].amax(-1) - plain.logits[..., : samples.trained].amax(-1)
    layer, head = divmod(int(rise.argmax()), rise.shape[1])
    for name, xlabel, ylabel in (
        ("logits", "distance (tokens)", "largest logit"),
        ("entropies", "position (tokens)", "largest entropy (nats)"),
    ):
        curves = {}
        for way, measured in (("plain", plain), ("Λ", ours)):
            values = getattr(measured, name)
            for what, column in (
                ("mean over heads", means(values)),
                (f"head {head} of layer {layer}", values[layer, head].tolist()),
            ):
                points = [(x, y) for x, y in zip(samples.edges[1:], column, strict=True) if math.isfinite(y)]
                curves[f"{way}, {what}"] = ([x for x, _ in points], [y for _, y in points])
        plot(directory / f"{name}.png", curves, xlabel, ylabel)
    trained = samples.edges[samples.trained]
    first, inside, past = (
        [row for row, position in enumerate(samples.compared) if begin <= position < end]
        for begin, end in ((0, APART_DRAWN), (APART_DRAWN, trained), (trained, samples.edges[-1]))
    )
    for number, (states, our_states) in enumerate(zip(plain.states, ours.states, strict=True), 1):
        project = components(states[first + inside])
        axes_settings = {
            "title": f"hidden states after layer {number}",
            "xlabel": "first principal component",
            "ylabel": "second principal component",
        }
        with figure(directory / f"states_{number}.png", **axes_settings) as axes:
            for label, some in (
                (f"first {APART_DRAWN} tokens", states[first]),
                (f"up to {trained:,}", states[inside]),
                (f"past {trained:,}, plain", states[past]),
                (f"past {trained:,}, Λ", our_states[past]),
            ):
                axes.scatter(*project(some).T.tolist(), s=12, label=label)
