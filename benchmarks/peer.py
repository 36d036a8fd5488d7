"""One row of benchmarks/peers.py, which starts this file for each peer, in a process of its own.

    python benchmarks/peer.py NAME TASK.json ROW.json

TASK.json is `Task`; ROW.json is `Row`. Peers that run in transformers need torch and transformers alone.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_longctx.cli.engine import PeakBlocks

LAMBDA = "peers_lambda"  # the name of the reference's attention in transformers' registry
SINKS = 4  # StreamingLLM's (arXiv 2309.17453, section 3.2)
FIRST = 10  # LM-Infinite's (arXiv 2308.16137, section 4)
ANSWER_TOKENS = 10
BATCH = 8


@dataclass(frozen=True)
class Task:
    """What every peer does. Lengths in tokens.

    text: its last `scored` tokens are scored. keys: prompts of pass keys. speed: prompts of one length, of
    which `written` tokens follow. budget: KV of a request that a method may keep. chunk: tokens that are
    computed at once. recipe: of Temp-LoRA, `adaptation` of a longctx configuration. gguf: the model as a
    file of llama.cpp's.
    """

    model: str
    dtype: str
    threads: int
    trained: int
    text: list[int]
    scored: int
    keys: list[list[int]]
    speed: list[list[int]]
    written: int
    budget: int
    chunk: int
    recipe: dict[str, Any]
    gguf: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Task":
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Written:
    """prefill_s: until the last prompt's first token. decode_s: from then on. kv_bytes: of one request."""

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    kv_bytes: int


@dataclass
class Row:
    """nll: mean, in nats. answers: tokens written after each prompt of keys. Speeds in tokens/s by batch."""

    nll: float | None = None
    answers: list[list[int]] | None = None
    prefill_per_s: dict[int, float] | None = None
    decode_per_s: dict[int, float] | None = None
    kv_bytes: int | None = None


class Peer:
    """nll: of the last `scored` tokens. write: prompts of one length in one batch, greedily."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def nll(self) -> list[float]:
        raise NotImplementedError

    def write(self, prompts: Sequence[list[int]], count: int) -> Written:
        raise NotImplementedError


class Transformers(Peer):
    """Plain attention with a KV cache, read in chunks: what the loops below change."""

    attention = "sdpa"

    def __init__(self, task: Task) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(task)
        torch.set_num_threads(task.threads)
        self.model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype))
        self.model.eval().set_attn_implementation(self.attention)

    def begin(self) -> None:
        from transformers import DynamicCache

        self.cache, self.read = DynamicCache(), 0

    def positions(self, count: int) -> Tensor:
        """[1, count], of the tokens that come next."""
        return torch.arange(self.read, self.read + count)[None]

    def forward(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Logits [batch, keep, vocabulary] of the last tokens. ids: [batch, tokens]."""
        output = self.model(
            input_ids=ids,
            position_ids=self.positions(ids.shape[1]).expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self.read += ids.shape[1]
        self.evict()
        return output.logits

    def evict(self) -> None: ...

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last token."""
        self.begin()
        for part in ids.split(self.task.chunk, 1):
            logits = self.forward(part)
        return logits

    def nll(self) -> list[float]:
        ids = torch.tensor([self.task.text])
        logits = self.prefill(ids[:, : -self.task.scored])
        rest, found = ids[:, -self.task.scored :], []
        for part in rest.split(self.chunk_after_prefill(), 1):
            found += nlls(logits[:, -1:], part[:, :1])
            logits = self.forward(part, part.shape[1])
            found += nlls(logits[:, :-1], part[:, 1:])
        return found

    def chunk_after_prefill(self) -> int:
        return self.task.chunk

    def write(self, prompts: Sequence[list[int]], count: int) -> Written:
        start = time.perf_counter()
        logits = self.prefill(torch.tensor(prompts))
        tokens = [logits[:, -1].argmax(-1)]
        first = time.perf_counter()
        for _ in range(count - 1):
            tokens.append(self.forward(tokens[-1][:, None])[:, -1].argmax(-1))
        end = time.perf_counter()
        return Written(
            torch.stack(tokens, 1).tolist(), first - start, end - first, self.kv_bytes() // len(prompts)
        )

    def kv_bytes(self) -> int:
        return sum(
            x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values)
        )


def nlls(logits: Tensor, targets: Tensor) -> list[float]:
    """Of targets [1, n] under logits [1, n, vocabulary], in nats."""
    return (-logits.float().log_softmax(-1).gather(-1, targets[..., None]))[0, :, 0].tolist()


class LambdaReference(Transformers):
    """LM-Infinite as its authors run it: all KV is kept, the Λ mask is dense, and the distance of the first
    tokens is capped at the trained length.
    """

    attention = LAMBDA

    def __init__(self, task: Task) -> None:
        from transformers import AttentionInterface

        from vllm_longctx.geometry import Geometry
        from vllm_longctx.rotary import Rotary

        AttentionInterface.register(LAMBDA, self.attend)
        super().__init__(task)
        self.geometry = Geometry(FIRST, task.budget - FIRST, task.trained)
        frequencies = self.model.model.rotary_emb.inv_freq.double()
        self.rotary = Rotary(2 * len(frequencies), 2 * len(frequencies), True, frequencies)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """query [batch, heads, T, d], key and value [batch, kv_heads, S, d]: rotated where they stand."""
        from vllm_longctx.geometry import branches

        group, read = query.shape[1] // key.shape[1], key.shape[2]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        positions = torch.arange(read - query.shape[2], read)
        local, first = branches(self.geometry, positions, torch.arange(read))
        scores = query @ key.transpose(2, 3) * scaling
        capped = self.rotary.turn(query, (self.geometry.distance_ceiling or 0) - positions)
        raw = self.rotary.turn(key[:, :, :FIRST], -torch.arange(min(FIRST, read)))
        at_ceiling = (positions[:, None] - torch.arange(read)[:FIRST]) > first.distance[:, :FIRST]
        scores[..., :FIRST] = torch.where(
            at_ceiling, capped @ raw.transpose(2, 3) * scaling, scores[..., :FIRST]
        )
        scores = scores.masked_fill(~(local.visible | first.visible), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


class StreamingReference(Transformers):
    """StreamingLLM: the first tokens and the last ones are kept, and positions count inside of the cache."""

    def __init__(self, task: Task) -> None:
        from vllm_longctx.rotary import Rotary

        super().__init__(task)
        frequencies = self.model.model.rotary_emb.inv_freq.double()
        self.rotary = Rotary(2 * len(frequencies), 2 * len(frequencies), True, frequencies)

    def positions(self, count: int) -> Tensor:
        held = self.cache.get_seq_length()
        return torch.arange(held, held + count)[None]

    def evict(self) -> None:
        """After each chunk, as the authors do after each token; what is left moves nearer."""
        over = self.cache.get_seq_length() - self.task.budget
        if over <= 0:
            return
        for layer in self.cache.layers:
            moved = self.rotary.turn(layer.keys[:, :, SINKS + over :], torch.tensor(-over))
            layer.keys = torch.cat((layer.keys[:, :, :SINKS], moved), 2)
            layer.values = torch.cat((layer.values[:, :, :SINKS], layer.values[:, :, SINKS + over :]), 2)


class KvPress(Transformers):
    """A press of kvpress: all of a prompt is read with plain attention, and then its KV is pruned."""

    def __init__(self, task: Task, press: str) -> None:
        import kvpress

        super().__init__(task)
        self.press: Callable[..., Any] = getattr(kvpress, press)

    def prefill(self, ids: Tensor) -> Tensor:
        self.begin()
        tokens = ids.shape[1]
        ratio = max(0.0, 1 - self.task.budget / tokens)
        with self.press(compression_ratio=ratio)(self.model):
            return self.forward(ids)

    def chunk_after_prefill(self) -> int:
        return 1  # transformers has no mask for several queries of which each sees a pruned cache


class OfficialTempLora(Peer):
    """The official loop of Temp-LoRA: score a block, train on it, go on; one stream after another."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(task)
        torch.set_num_threads(task.threads)
        self.model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype))

    def nll(self) -> list[float]:
        from temp_lora import official_reader

        return official_reader(self.model, self.task.recipe)(self.task.text)[-self.task.scored :]

    def write(self, prompts: Sequence[list[int]], count: int) -> Written:
        from temp_lora import official_writer

        write = official_writer(self.model, self.task.recipe)
        start = time.perf_counter()
        tokens = [write(prompt, count) for prompt in prompts]
        return Written(tokens, math.nan, time.perf_counter() - start, 0)


class Engine(Peer):
    """vLLM's engine.

    config: `additional_config["longctx"]`, None for stock vLLM. options: of each request.
    """

    def __init__(self, task: Task, config: dict[str, Any] | None, options: dict[str, Any] | None) -> None:
        from vllm_longctx.cli.engine import method_engine

        super().__init__(task)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.options = options
        longest = max(len(task.text), *(len(p) for p in [*task.keys, *task.speed])) + task.written + 16
        self.kv_cache_bytes = 4 << 30
        context: AbstractContextManager[tuple[LLMEngine, PeakBlocks]] = method_engine(
            task.model,
            config,
            longest,
            dtype=task.dtype,
            max_num_seqs=2 * BATCH,  # those that learn, and places for others
            max_num_batched_tokens=task.chunk,
            enforce_eager=True,
            kv_cache_memory_bytes=self.kv_cache_bytes,
        )
        self.closing = ExitStack()
        self.engine, self.meter = self.closing.enter_context(context)

    def nll(self) -> list[float]:
        from vllm_longctx.cli.engine import blocks_are_trained
        from vllm_longctx.cli.score import blocks_of_prompt, score_in

        with ExitStack() as stack:
            if self.options is not None:
                blocks = blocks_of_prompt(self.engine, len(self.task.text))
                stack.enter_context(blocks_are_trained(self.engine, *blocks))
            score = score_in(self.engine, self.meter, self.task.text, "text", options=self.options)
        return score.nll[-self.task.scored :]

    def write(self, prompts: Sequence[list[int]], count: int) -> Written:
        from load import greedy
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        extra = None if self.options is None else {"longctx": {**self.options, "train_on_prompt": False}}
        params = greedy(count, output_kind=RequestOutputKind.DELTA, extra_args=extra)
        tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        start, first, held = time.perf_counter(), 0.0, 0
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), tokens_input(prompt), params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                tokens[output.request_id] += output.outputs[0].token_ids
            if not first and all(tokens.values()):
                first = time.perf_counter()
            held = max(held, self.meter.held) if first else 0
        end = time.perf_counter()
        block_bytes = self.kv_cache_bytes / self.meter.num_blocks
        return Written(
            list(tokens.values()), first - start, end - first, round(held * block_bytes / len(prompts))
        )


class LlamaCpp(Peer):
    """llama.cpp, whose context shifts when it is full: half of what stands behind the first tokens goes, and
    the rest moves nearer. As its server does it. Its weights are the file's, in 4 bits.
    """

    def __init__(self, task: Task) -> None:
        from llama_cpp import Llama

        super().__init__(task)
        if task.gguf is None:
            raise ValueError("there is no --gguf file of the model")
        self.llama = Llama(
            task.gguf,
            n_ctx=task.budget,
            n_batch=task.chunk,
            n_threads=task.threads,
            logits_all=True,
            verbose=False,
        )

    def feed(self, tokens: Sequence[int]) -> list[Any]:
        """Logits after each token."""
        found: list[Any] = []
        size = min(self.task.chunk, self.task.budget // 4)
        for begin in range(0, len(tokens), size):
            part = tokens[begin : begin + size]
            if self.llama.n_tokens + len(part) > self.task.budget:
                self.shift()
            before = self.llama.n_tokens
            self.llama.eval(part)
            found += list(self.llama.scores[before : before + len(part)])
        return found

    def shift(self) -> None:
        context, held = self.llama._ctx, self.llama.n_tokens
        gone = (held - FIRST) // 2
        context.kv_cache_seq_rm(0, FIRST, FIRST + gone)
        context.kv_cache_seq_shift(0, FIRST + gone, held, -gone)
        self.llama.input_ids[FIRST : held - gone] = self.llama.input_ids[FIRST + gone : held]
        self.llama.n_tokens = held - gone

    def nll(self) -> list[float]:
        self.llama.reset()
        text = self.task.text
        logits = torch.tensor(self.feed(text[:-1])[-self.task.scored :])
        return nlls(logits[None], torch.tensor([text[-self.task.scored :]]))

    def write(self, prompts: Sequence[list[int]], count: int) -> Written:
        prefill = decode = 0.0
        written = []
        for prompt in prompts:  # its Python class has one sequence
            self.llama.reset()
            start = time.perf_counter()
            logits = self.feed(prompt)[-1]
            prefill += time.perf_counter() - start
            start, tokens = time.perf_counter(), [int(logits.argmax())]
            for _ in range(count - 1):
                tokens.append(int(self.feed(tokens[-1:])[-1].argmax()))
            decode += time.perf_counter() - start
            written.append(tokens)
        return Written(written, prefill, decode, 0)


def longctx(preset: str, **more: Any) -> Callable[[Task], Engine]:
    def make(task: Task) -> Engine:
        first = SINKS if preset == "streaming" else FIRST
        attention = {"n_global": first, "n_local": task.budget - first}
        return Engine(task, {"preset": preset, "attention": attention, **more}, None)

    return make


def temp_lora(task: Task) -> Engine:
    adaptation = {**task.recipe, "slots": BATCH, "cache_gib": 0}
    return Engine(task, {"preset": "temp-lora-quality", "adaptation": adaptation}, {"temp_lora": True})


PEERS: dict[str, Callable[[Task], Peer]] = {
    "longctx, lm-infinite": longctx("lm-infinite"),
    "longctx, streaming": longctx("streaming"),
    "stock vLLM": lambda task: Engine(task, None, None),
    "LM-Infinite in transformers": LambdaReference,
    "StreamingLLM in transformers": StreamingReference,
    "kvpress, StreamingLLM": lambda task: KvPress(task, "StreamingLLMPress"),
    "kvpress, SnapKV": lambda task: KvPress(task, "SnapKVPress"),
    "kvpress, Expected Attention": lambda task: KvPress(task, "ExpectedAttentionPress"),
    "llama.cpp, context shift": LlamaCpp,
    "longctx, Temp-LoRA": temp_lora,
    "Temp-LoRA, official loop": OfficialTempLora,
}


def run(name: str, task: Task, report: Callable[[Row], None]) -> None:
    """All that a row has, told as far as it is known after each part."""
    with torch.no_grad() if not name.startswith("Temp-LoRA") else ExitStack():
        peer, row = PEERS[name](task), Row(prefill_per_s={}, decode_per_s={})
        for count in (1, BATCH):
            prompts = task.speed[:count]
            peer.write([prompt[: task.chunk] for prompt in prompts], 2)  # warms up
            written = peer.write(prompts, task.written)
            assert row.prefill_per_s is not None and row.decode_per_s is not None
            if math.isfinite(written.prefill_s):
                row.prefill_per_s[count] = sum(map(len, prompts)) / written.prefill_s
            row.decode_per_s[count] = count * (task.written - 1) / written.decode_s
            if count == 1:
                row.kv_bytes = written.kv_bytes or None
            report(row)
        row.answers = [peer.write([prompt], ANSWER_TOKENS).tokens[0] for prompt in task.keys]
        report(row)
        row.nll = statistics.fmean(peer.nll())
        report(row)
        if isinstance(peer, Engine):
            peer.closing.close()


def missing(*packages: str) -> list[str]:
    """Those that this interpreter does not have."""
    absent = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(package)
    return absent


NEEDED = {"kvpress": "kvpress", "llama.cpp": "llama_cpp_python", "longctx": "vllm", "stock": "vllm"}


def main() -> None:
    name, task, out = sys.argv[1], Task.read(Path(sys.argv[2])), Path(sys.argv[3])
    for beginning, package in NEEDED.items():
        if name.startswith(beginning) and missing(package):
            raise SystemExit(f"{package} is not installed for {sys.executable}")
    run(name, task, lambda row: out.write_text(json.dumps(asdict(row)) + "\n"))


if __name__ == "__main__":
    main()
