"""Does every mode write on this card what it writes on a CPU? Whole engines, with the shipped models.

    python benchmarks/gpu/outputs.py        # writes expected/ anew, by the CPU engine; minutes

A case is a row of the mode table, with requests that cross a KV block, a window and, with Temp-LoRA, a text
block. So weights are swapped between replays of a graph, passes begin anew, and windows become memory. Each
case runs in CUDA graphs and eagerly. Log-probabilities and greedy tokens of each run are compared with those
that the CPU engine has stored in `expected/`, in float32, and the eager ones with those of the graphs.

Tokens written are compared up to the first where the expected two best are so near to each other that the
tolerance may exchange them: what follows another token is another text.
"""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from gpu.kernels import Plan

from vllm_longctx.cli.engine import Job, PremiseError, blocks_are_trained, run_jobs, running_engine

if TYPE_CHECKING:
    from gpu.report import Record
    from gpu.run_all import Setting
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

EXPECTED = Path(__file__).parent / "expected"
TEXT = Path(__file__).parents[2] / "LICENSE"
BOOKLM_MEMORY = str(Path(__file__).parents[1] / "booklm-memory")
POOL_BYTES = 1 << 31
BATCHED_TOKENS = 128  # so that prompts are read in several chunks
MAX_MODEL_LEN = 512  # the trained length, at which stock vLLM ends
LONG = 4800  # tokens: a memory of more blocks than lookups by blocks always read

WINDOW, BLOCK = 128, 32  # of attention; of a text that is learned
SLIDING = {"n_global": 10, "n_local": WINDOW}
WINDOWS = {"method": "focused", "n_local": WINDOW, "last_context_length": 64}
FOCUSED = {**WINDOWS, "mem_dtype": "float32"}
LEARNING = {
    "rank": 8,
    "dropout": 0.0,
    "learning_rate": 5e-3,
    "block_tokens": BLOCK,
    "train_context_tokens": 64,
    "slots": 2,
}
STEPPED = {**LEARNING, "window_tokens": WINDOW, "context_tokens": 64}


@dataclass(frozen=True)
class Tolerance:
    """Nats per token: of any difference, and of their mean.

    Ours, of float32, is ten times what the engines' tests allow against float64. That of bfloat16 is about
    twice what the CPU engine shows in bfloat16 (`--dtype bfloat16` prints it).
    """

    worst: float
    mean: float


TOLERANCES = {"float32": Tolerance(1e-3, 1e-4), "bfloat16": Tolerance(0.5, 0.03)}


@dataclass(frozen=True)
class Request:
    """prompt, written: numbers of tokens. start: of the prompt in the text. is_scored: with its prompt's."""

    prompt: int
    written: int
    start: int
    is_scored: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Text blocks that must be trained for its last token."""
        return (self.prompt + self.written - 2) // BLOCK


ADAPTS = {"temp_lora": True}
READS = (
    Request(20, 130, start=0),
    Request(WINDOW - 1, 40, start=100),
    Request(WINDOW, 40, start=300),
    Request(WINDOW + 1, 40, start=500),
    Request(300, 60, start=700),
)
LEARNS = (
    Request(50, 100, start=0, options=ADAPTS),
    Request(200, 80, start=300, options=ADAPTS),
    Request(33, 60, start=700, options=ADAPTS),
)


@dataclass(frozen=True)
class Case:
    """section: of the configuration. learns: requests adapt.

    happens: metrics that are above 0 afterwards.
    """

    section: dict[str, Any]
    model: str = "booklm"
    happens: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        return "adaptation" in self.section

    @property
    def requests(self) -> tuple[Request, ...]:
        by_blocks = self.section["attention"].get("lookup") == "blocks"
        further = (Request(LONG, 24, start=0, is_scored=False),) if by_blocks else ()
        return LEARNS if self.learns else READS + further

    @property
    def max_model_len(self) -> int:
        return max(MAX_MODEL_LEN, *(r.prompt + r.written + 1 for r in self.requests))


def focused(lookup: str, **more: Any) -> Case:
    top_k = {} if lookup == "all" else {"top_k": 8}
    section = {"attention": {**FOCUSED, "lookup": lookup, **top_k, **more}}
    return Case(section, BOOKLM_MEMORY)


def learning(method: dict[str, Any], sizes: dict[str, Any], policy: str, *happens: str) -> Case:
    adaptation = {**sizes, "kv_policy": policy}
    return Case({"attention": method, "adaptation": adaptation}, happens=("blocks_trained", *happens))


FREED = "freed_kv_blocks"
CASES = {
    "plain": Case({"attention": {"method": "none"}}),
    "lm-infinite": Case({"attention": {**SLIDING, "method": "lm_infinite"}}, happens=(FREED,)),
    "streaming": Case({"attention": {**SLIDING, "method": "streaming"}}, happens=(FREED,)),
    "top-k": Case({"attention": {**SLIDING, "method": "lm_infinite", "top_k": 8}}),
    "focused-all": focused("all"),
    "focused-top-k": focused("top_k"),
    "focused-blocks": focused("blocks"),
    "focused-apart": focused("blocks", memory_limit_gib=0.05),
    "windows": Case({"attention": {**WINDOWS, "mem_layers": []}}, happens=(FREED,)),
    "temp-lora-reuse": learning({"method": "none"}, STEPPED, "reuse"),
    "temp-lora-recompute": learning({"method": "none"}, STEPPED, "recompute"),
    "temp-lora-keep": learning({**SLIDING, "method": "lm_infinite"}, LEARNING, "keep", FREED),
}


@dataclass(frozen=True)
class Written:
    """What one request wrote.

    logprobs: of the prompt's tokens after the first, if it is scored, then of those written. margins: of each
    written token, how much likelier it was than the second best.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    margins: list[float]

    @classmethod
    def of(cls, output: "RequestOutput") -> "Written":
        prompt, (completion,) = list(output.prompt_token_ids or []), output.outputs
        tokens = list(completion.token_ids)
        scored = output.prompt_logprobs
        read = [] if scored is None else zip(scored[1:], prompt[1:], strict=True)
        logprobs = [at[token].logprob for at, token in read]
        best = [sorted((p.logprob for p in at.values()), reverse=True) for at in completion.logprobs]
        logprobs += [at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)]
        return cls(prompt, tokens, [round(x, 6) for x in logprobs], [round(b[0] - b[1], 6) for b in best])


@dataclass(frozen=True)
class Difference:
    """Of what requests wrote from what was expected: log-probabilities in nats, numbers of tokens.

    written: those compared, of `of_written`. wrong: where they differ beyond the tolerance; None if nowhere.
    """

    worst: float
    mean: float
    written: int
    of_written: int
    wrong: str | None

    @classmethod
    def between(
        cls, got: Sequence[Written], expected: Sequence[Written], tolerance: Tolerance
    ) -> "Difference":
        differences: list[float] = []
        compared, wrong = 0, None
        for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            if ours.prompt != theirs.prompt or len(ours.tokens) != len(theirs.tokens):
                raise PremiseError(f"request {number} has another prompt or length than the expected one")
            pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=True))
            same = next((i for i, (a, b) in pairs if a != b), len(theirs.tokens))
            if same < len(theirs.tokens) and theirs.margins[same] > 2 * tolerance.worst:
                wrong = wrong or f"request {number} wrote another token {same}"
            compared += same
            end = len(theirs.logprobs) - len(theirs.tokens) + same
            differences += [
                abs(a - b) for a, b in zip(ours.logprobs[:end], theirs.logprobs[:end], strict=True)
            ]
        worst, mean = max(differences), statistics.fmean(differences)
        if not (worst <= tolerance.worst and mean <= tolerance.mean):  # NaN is wrong, too
            wrong = wrong or f"log-probabilities differ by {worst:.2g}, {mean:.2g} in the mean"
        return cls(worst, mean, compared, sum(len(w.tokens) for w in expected), wrong)


def outputs_plan(setting: "Setting", name: str) -> Plan:
    if not setting.cuda:
        return [{"dtype": "float32", "way": "eager"}]
    # vLLM's LoRA kernels take no float32.
    dtypes = ("bfloat16",) if CASES[name].learns else ("float32", "bfloat16")
    return [{"dtype": dtype, "way": way} for dtype in dtypes for way in ("graphs", "eager")]


def outputs(record: "Record", plan: Plan, setting: "Setting", name: str) -> None:
    """A row for each run, with its largest and mean difference from the stored ones.

    A row is void if what is to be compared did not happen. Raises RuntimeError at the end if a run differs.
    """
    expected, wrong = stored(name), []
    of_graphs: dict[str, list[Written]] = {}
    for row in plan:
        try:
            got, steps = run(CASES[name], row["way"] == "eager", row["dtype"], **setting.engine_kwargs)
        except PremiseError as e:
            record.add(**row, void=str(e))
            continue
        tolerance = TOLERANCES[row["dtype"]]
        others = {"cpu": expected}
        if row["dtype"] in of_graphs:
            others["graphs"] = of_graphs[row["dtype"]]
        if row["way"] == "graphs":
            of_graphs[row["dtype"]] = got
        found = {other: Difference.between(got, theirs, tolerance) for other, theirs in others.items()}
        figures = {
            f"{figure}_from_{other}": getattr(difference, figure)
            for other, difference in found.items()
            for figure in ("worst", "mean", "written")
        }
        record.add(**row, tolerance=tolerance.worst, **figures, steps=steps)
        run_of = f"{row['dtype']}, {row['way']}"
        wrong += [f"{run_of} against {other}: {d.wrong}" for other, d in found.items() if d.wrong]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def run(case: Case, eager: bool, dtype: str, **engine_kwargs: Any) -> tuple[list[Written], str]:
    """What the requests of a case write, all at once, and in how many steps of each kind.

    Raises PremiseError where blocks were not trained, nothing was freed that should be, or no step of decodes
    was in a FULL graph.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process starts sooner than three
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "enforce_eager": eager,
        "max_num_seqs": 8,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "kv_cache_memory_bytes": POOL_BYTES,
        "gpu_memory_utilization": 0.05,  # must be free, although the pool is given; others run beside
        "skip_tokenizer_init": True,
        "cudagraph_metrics": True,
        **engine_kwargs,
    }
    # No compiler: it is vLLM's, and takes longer than all that is checked here.
    kwargs |= {} if eager else {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    with running_engine(case.model, {"longctx": case.section}, case.max_model_len, **kwargs) as (
        engine,
        meter,
    ):
        meter.reset()
        if case.learns:
            blocks = sum(r.blocks for r in case.requests)
            with blocks_are_trained(engine, blocks, blocks + len(case.requests)):
                found = written_together(engine, case.requests)
        else:
            found = written_together(engine, case.requests)
        values = {m.name: getattr(m, "value", 0) for m in engine.get_metrics()}
        computed = values.get("vllm:longctx_adapted_tokens", 0)
    for name in case.happens:
        if not values[f"vllm:longctx_{name}"]:
            raise PremiseError(f"{name} is 0")
    known = sum(r.prompt + r.written - 1 for r in case.requests)
    if case.section.get("adaptation", {}).get("kv_policy") in ("reuse", "recompute") and computed <= known:
        raise PremiseError("no window was computed again")
    steps = meter.graph_modes
    if not eager and not steps["FULL"]:
        raise PremiseError("no step was in a FULL graph")
    return found, ", ".join(f"{count} {mode}" for mode, count in sorted(steps.items()))


def written_together(engine: "LLMEngine", requests: Sequence[Request]) -> list[Written]:
    tokens = text_tokens()

    def job() -> Job[list["RequestOutput"]]:
        return (yield [(tokens[r.start : r.start + r.prompt], sampling(r)) for r in requests])

    (found,) = run_jobs(engine, [job()], "writing", 1)
    return [Written.of(output) for output in found]


def sampling(request: Request) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=request.written,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=2,
        prompt_logprobs=0 if request.is_scored else None,
        extra_args={"longctx": request.options} if request.options else None,
    )


def text_tokens() -> list[int]:
    """Of a text that is in every checkout; booklm-memory has booklm's tokenizer."""
    from vllm_longctx.cli.score import tokenize

    return tokenize("booklm", 2 * TEXT.read_text(), None)


def stored(name: str) -> list[Written]:
    return [Written(**row) for row in json.loads((EXPECTED / f"{name}.json").read_text())]


def main(only: str = ",".join(CASES), dtype: str = "float32") -> None:
    """Write what the CPU engine writes. In another dtype only say how far it is from what is stored."""
    EXPECTED.mkdir(exist_ok=True)
    for name in only.split(","):
        found, _ = run(CASES[name], eager=True, dtype=dtype)
        if dtype == "float32":
            lines = ",\n".join(json.dumps(asdict(written)) for written in found)
            (EXPECTED / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        difference = Difference.between(found, stored(name), TOLERANCES[dtype])
        print(f"{name}: {asdict(difference)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
