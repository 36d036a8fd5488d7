"""Table "Temp-LoRA quality": perplexity of long texts by fifths, with a temporary adapter and without.

    python benchmarks/temp_lora_quality.py --texts DIR --json OUT.json --plot OUT.png

Reads the .txt files of DIR, the Python documentation topics and the standard library's sources, the last two
unlike anything that booklm was trained on. Every text is a prompt read block by block in the real engine, in
float32 by default, and scored by its prompt log-probabilities: each token under what the blocks before its
own have taught.

- base: the same requests with `epochs` 0, so the same blocks, windows and KV policy, and nothing learned.
- Temp-LoRA: with training.
- another text's: the adapter that the text before has left (`save_as`, `start_from`), and no training. If it
  helped, the gain would be of the kind of text or the longer training, not of what this text says.

The first of `--policies` and of `--blocks` is read to `--max-tokens` and has the control. The grid, segments
by block sizes by KV policies, is read to `--grid-tokens`. `keep` runs under LM-Infinite's attention, the
other policies in windows. Beside the change in perplexity stands the paper's (arXiv 2401.11504, PG19): -3.6%
for the first 100K tokens of a book, -13.2% past 500K.
"""

import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from texts import read_all

from vllm_longctx.cli.engine import Job, blocks_are_trained, parse_lengths, run_jobs, running_engine
from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import errors_for_users, plot, write_json
from vllm_longctx.cli.score import blocks_of_prompt, scoring_params, tokenize

SEGMENTS = 5
POLICIES = ("reuse", "recompute", "keep")
PAPER = {"0 - 100K": -0.036, "500K+": -0.132}
SAVE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Setting:
    kv_policy: str
    block_tokens: int

    @property
    def attention(self) -> dict[str, Any]:
        return {"method": "lm_infinite" if self.kv_policy == "keep" else "none"}

    def __str__(self) -> str:
        return f"{self.kv_policy}, Δ = {self.block_tokens}"


@dataclass
class Reading:
    """NLL in nats of each token after the first, by text: learned, base and, if there was one, control."""

    learned: dict[str, list[float]] = field(default_factory=dict)
    base: dict[str, list[float]] = field(default_factory=dict)
    control: dict[str, list[float]] = field(default_factory=dict)

    def to(self, tokens: int) -> "Reading":
        """The same of the texts' first tokens: what comes later changes nothing before it."""
        return Reading(
            *(
                {t: nll[: tokens - 1] for t, nll in way.items()}
                for way in (self.learned, self.base, self.control)
            )
        )

    def perplexities(self, text: str, first: int = 0, end: int | None = None) -> dict[str, float]:
        """ppl, ppl_base and, where there is a control, ppl_other.

        first, end: of a part of the text, counted from its second token.
        """
        ways = {"ppl": self.learned, "ppl_base": self.base, "ppl_other": self.control}
        return {way: ppl(nll[text][first:end]) for way, nll in ways.items() if nll}


def python_sources() -> str:
    """The standard library's modules, all but its packages."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)


def scoring(tokens: list[int], options: dict[str, Any]) -> Job[list[float]]:
    """A job that returns the NLL of each token after the first. options: the request's."""
    params = scoring_params({"temp_lora": True, "train_on_prompt": True, **options})
    (output,) = yield [(tokens, params)]
    nll = [-x for x in output.prompt_logprobs.logprobs]
    assert len(nll) == len(tokens) - 1
    return nll


def read(
    engine: Any, texts: dict[str, list[int]], setting: Setting, at_once: int, saved: Path | None
) -> Reading:
    """Every text, learned and base; with the control if there is a directory where adapters are saved.

    Raises PremiseError if blocks were not trained.
    """
    chosen = asdict(setting)
    names = {text: f"text-{number}" for number, text in enumerate(texts)}
    learned = [
        scoring(ids, chosen if saved is None else {**chosen, "save_as": names[text]})
        for text, ids in texts.items()
    ]
    base = [scoring(ids, {**chosen, "epochs": 0}) for ids in texts.values()]
    bounds = [blocks_of_prompt(engine, len(ids), setting.block_tokens) for ids in texts.values()]
    with blocks_are_trained(engine, *(sum(bound) for bound in zip(*bounds, strict=True))):
        results = run_jobs(engine, learned + base, str(setting), at_once)
    reading = Reading(
        dict(zip(texts, results, strict=False)), dict(zip(texts, results[len(texts) :], strict=True))
    )
    if saved is not None:
        deadline = time.monotonic() + SAVE_TIMEOUT_S
        while missing := [n for n in names.values() if not (saved / n / "adapter_config.json").exists()]:
            if time.monotonic() > deadline:
                raise SystemExit(f"{', '.join(missing)} was not saved within {SAVE_TIMEOUT_S} s")
            time.sleep(0.5)
        others = dict(zip(texts, [*names.values()][-1:] + [*names.values()][:-1], strict=True))
        control = [
            scoring(ids, {**chosen, "epochs": 0, "start_from": others[text]}) for text, ids in texts.items()
        ]
        with blocks_are_trained(engine, 0):
            results = run_jobs(engine, control, f"{setting}, another text's", at_once)
        reading.control = dict(zip(texts, results, strict=True))
    return reading


def ppl(nll: Sequence[float]) -> float:
    return math.exp(sum(nll) / len(nll))


def segments(reading: Reading, text: str) -> list[dict[str, float]]:
    """Perplexities by fifths of the text; positions in tokens."""
    count = len(reading.base[text])
    edges = [count * k // SEGMENTS for k in range(SEGMENTS + 1)]
    # The first token is not scored: the NLL at index i is of the token at position i + 1.
    return [{"start": a + 1, "end": b + 1, **reading.perplexities(text, a, b)} for a, b in pairwise(edges)]


def as_row(setting: Setting, text: str, reading: Reading) -> dict[str, Any]:
    return {
        "text": text,
        **asdict(setting),
        "tokens": len(reading.base[text]) + 1,
        **reading.perplexities(text),
        "segments": segments(reading, text),
    }


def change(row: dict[str, Any], way: str = "ppl") -> float:
    """Of perplexity against base; -0.1 is 10% lower."""
    return row[way] / row["ppl_base"] - 1


def main(
    texts: Annotated[
        Path | None, typer.Option(help="Directory of .txt files to read beside the texts on every machine.")
    ] = None,
    model: str = "booklm",
    preset: str = "temp-lora-quality",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text, in the first setting.")] = 102_400,
    grid_tokens: Annotated[
        int, typer.Option(help="Tokens of each text in the other settings; 0 leaves them out.")
    ] = 30_720,
    policies: Annotated[str, typer.Option(help="KV policies.")] = "reuse,recompute,keep",
    blocks: Annotated[
        str, typer.Option(help="Block sizes in tokens; the first one is the main one's.")
    ] = "128,64,256",
    adaptation: Annotated[str, typer.Option(help="Keys of adaptation beside the preset's, as JSON.")] = "{}",
    at_once: Annotated[int, typer.Option(help="Texts read at once.")] = 4,
    builtin_texts: Annotated[
        bool, typer.Option(help="Read the Python documentation and sources too.")
    ] = True,
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot")] = None,
    dtype: str = "float32",
    enforce_eager: bool = True,
) -> None:
    with errors_for_users():
        settings = parse_settings(policies, blocks)
        recipe = json.loads(adaptation)
    sources = {**read_all(texts), "python sources": python_sources()}
    if not builtin_texts:
        sources = {name: text for name, text in sources.items() if not name.startswith("python ")}
    tokens = {name: tokenize(model, text, max_tokens) for name, text in sources.items()}
    if grid_tokens == 0:
        settings = settings[:1]
    result: dict[str, Any] = {"model": model, "preset": preset, "paper": PAPER, "texts": [], "grid": []}
    with tempfile.TemporaryDirectory() as root:
        for attention in ({"method": "none"}, {"method": "lm_infinite"}):
            here = [s for s in settings if s.attention == attention]
            if not here:
                continue
            sliding = here[0].kv_policy == "keep"
            sizes = {
                k: v for k, v in recipe.items() if not (sliding and k in ("window_tokens", "context_tokens"))
            }
            own = {"slots": at_once, "adapters_root": root, "cache_gib": 0, **asdict(here[0])}
            config = {"longctx": {"preset": preset, "attention": attention, "adaptation": {**sizes, **own}}}
            kwargs: dict[str, Any] = {
                "dtype": dtype,
                "enforce_eager": enforce_eager,
                "max_num_seqs": at_once + 1,
            }
            with running_engine(model, config, max_tokens + 2, **kwargs) as (engine, _):
                for setting in here:
                    first = setting == settings[0]
                    limit = max_tokens if first else grid_tokens
                    shortened = {name: ids[:limit] for name, ids in tokens.items()}
                    reading = read(engine, shortened, setting, at_once, Path(root) if first else None)
                    if first:
                        resolved = engine.vllm_config.additional_config["longctx"]["adaptation"]
                        result["adaptation"] = {**resolved, "adapters_root": None}
                        result["texts"] = [as_row(setting, text, reading) for text in tokens]
                    if grid_tokens:
                        result["grid"] += [as_row(setting, text, reading.to(grid_tokens)) for text in tokens]
                    write_json(json_out, result)  # after every setting: the whole grid takes hours
    print_texts(settings[0], result["texts"])
    if grid_tokens:
        print_grid(settings, result["grid"])
    if plot_out is not None:
        plot(plot_out, curves(result["texts"]), "position (tokens)", "change in perplexity (%)")


def parse_settings(policies: str, blocks: str) -> list[Setting]:
    """Every policy with every block size, in the order given. Raises ValueError for an unknown policy."""
    names = policies.split(",")
    for name in names:
        if name not in POLICIES:
            raise ValueError(
                f"--policies {policies}: unknown policy {name!r}; policies: {', '.join(POLICIES)}"
            )
    sizes = parse_lengths(blocks)
    first = int(blocks.split(",")[0])
    return [Setting(name, size) for name in names for size in [first, *(s for s in sizes if s != first)]]


def curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Change against the end of each segment, by text; and the paper's, where its segments end or begin."""
    by_text = {
        r["text"]: ([s["end"] for s in r["segments"]], [100 * change(s) for s in r["segments"]]) for r in rows
    }
    return {**by_text, "paper, PG19": ([100_000, 500_000], [100 * x for x in PAPER.values()])}


def print_texts(setting: Setting, rows: list[dict[str, Any]]) -> None:
    fifths = [f"fifth {k + 1}" for k in range(SEGMENTS)]
    table = Table(
        "text",
        "tokens",
        "base",
        "Temp-LoRA",
        "change",
        *fifths,
        "another text's",
        title=f"perplexity, {setting}",
    )
    for row in rows:
        changes = [f"{change(s):+.1%}" for s in row["segments"]]
        figures = f"{row['tokens']:,}", f"{row['ppl_base']:.2f}", f"{row['ppl']:.2f}", f"{change(row):+.1%}"
        table.add_row(row["text"], *figures, *changes, f"{change(row, 'ppl_other'):+.1%}")
    table.caption = "paper, PG19: " + ", ".join(f"{x:+.1%} at {where}" for where, x in PAPER.items())
    Console(width=140).print(table)


def print_grid(settings: list[Setting], rows: list[dict[str, Any]]) -> None:
    """Geometric means of perplexities over the texts; the last column compares Temp-LoRA's with its own under
    `recompute`.
    """
    headers = [
        "policy",
        "Δ",
        "base",
        "Temp-LoRA",
        "change",
        *(f"fifth {k + 1}" for k in range(SEGMENTS)),
        "against recompute",
    ]
    table = Table(*headers, title=f"all texts, first {max(r['tokens'] for r in rows):,} tokens")
    of_setting = {s: [r for r in rows if Setting(r["kv_policy"], r["block_tokens"]) == s] for s in settings}
    for setting, here in of_setting.items():
        whole = together(here)
        changes = [f"{change(together([r['segments'][k] for r in here])):+.1%}" for k in range(SEGMENTS)]
        recomputed = of_setting.get(Setting("recompute", setting.block_tokens))
        against = f"{whole['ppl'] / together(recomputed)['ppl'] - 1:+.2%}" if recomputed else ""
        figures = f"{whole['ppl_base']:.2f}", f"{whole['ppl']:.2f}", f"{change(whole):+.1%}"
        table.add_row(setting.kv_policy, str(setting.block_tokens), *figures, *changes, against)
    Console(width=140).print(table)


def together(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {way: math.exp(sum(math.log(r[way]) for r in rows) / len(rows)) for way in ("ppl", "ppl_base")}


if __name__ == "__main__":
    typer.run(main)
