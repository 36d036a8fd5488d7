"""Temp-LoRA on the GPU, Llama-2-7B's shape: many streams that learn while they write, and what their trainer
costs.

Each stream writes WRITTEN tokens after a random prompt, in blocks much shorter than the paper's (1,024), so
that four of them take seconds. Training is on what is written; the last block is not trained, nobody would
use it. `no training` is the same with `epochs` 0: blocks, versions and passes as ever, and an idle trainer.

The engines' weights are random and on no disk: a trainer that did not use the engine's own would not find
any.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu.engines import check_plugin
from gpu.kernels import Plan, shapes
from gpu.models import RANDOM_WEIGHTS, Shape, write_model
from gpu.report import QUICK
from load import random_tokens
from temp_lora import engine_speed, learning_speed, official_writer, writing

from vllm_longctx.cli.engine import STOCK, PremiseError, running_engine

if TYPE_CHECKING:
    from gpu.report import Record
    from gpu.run_all import Setting
    from vllm.v1.engine.llm_engine import LLMEngine

RANK = 64  # the official code's
SIZES = {"block_tokens": 256, "train_context_tokens": 256}
TINY_SIZES = {"block_tokens": 32, "train_context_tokens": 32}
BLOCKS, PROMPT = 4, 64  # written by each stream; tokens
LEARNING = {"temp_lora": True, "train_on_prompt": False}


def sizes(setting: "Setting") -> dict[str, int]:
    return SIZES if setting.cuda else TINY_SIZES


def text_tokens(setting: "Setting") -> int:
    """The longest text that a stream may have."""
    return PROMPT + 2 * BLOCKS * sizes(setting)["block_tokens"]


def rank_for(setting: "Setting", streams: int) -> int:
    return shapes(setting)[0].rank_that_fits(streams, text_tokens(setting), setting.memory)


def learning_plan(setting: "Setting", most: int) -> Plan:
    """Up to 8 streams at the official rank, a quick run the 8 alone; 16 at the one that fits."""
    rank = rank_for(setting, most)
    counts = [1, 2, 4, 8] if most == 8 and setting.size != QUICK else [most]
    plan = [{"what": "learning", "streams": n, "rank": rank} for n in counts]
    return plan + [{"what": "no training", "streams": n, "rank": rank} for n in sorted({counts[0], most})]


def learning(record: "Record", plan: Plan, setting: "Setting", most: int) -> None:
    """Tokens/s of all streams together; the mean time of a swap, from the engine's metrics; the step of one
    stream alone.

    A row is void if its blocks were not trained, or if any were without training. The mean of the swaps and
    the step are noted only where no row is.
    """
    check_plugin()
    shape, rank = shapes(setting)[0], plan[0]["rank"]
    block = sizes(setting)["block_tokens"]
    written = BLOCKS * block
    record.note(model=shape.name, rank=rank, **sizes(setting), written=written)
    with engine(shape, setting, learns(setting, rank, most), most) as llm:
        prompts = [random_tokens(llm, PROMPT, number) for number in range(most)]
        learning_speed(llm, prompts[:2], 2 * block, block, LEARNING, 2)  # warms up
        for row in plan:
            options = LEARNING if row["what"] == "learning" else {**LEARNING, "epochs": 0}
            n = row["streams"]
            try:
                speed = learning_speed(llm, prompts[:n], written, block, options, n)
            except PremiseError as e:
                record.add(**row, void=str(e))
            else:
                record.add(**row, tokens_per_s=speed)
        swaps = {m.name: m for m in llm.get_metrics()}["vllm:longctx_swap_time_seconds"]
        if not record.void_rows:
            alone = [
                r["tokens_per_s"] for r in record.rows if (r["what"], r["streams"]) == ("no training", 1)
            ]
            steps = {"decode_step_ms": 1000 / alone[0]} if alone else {}
            record.note(swap_ms=1000 * swaps.sum / swaps.count, swaps=swaps.count, **steps)


def trainer_memory_plan(setting: "Setting") -> Plan:
    return [{"engine": name} for name in ("LoRA alone", "Temp-LoRA, one slot")]


def trainer_memory(record: "Record", plan: Plan, setting: "Setting") -> None:
    """Device memory in use, of an engine with room for one adapter, and of one whose trainer has trained one
    stream.

    The second has the trainer's process, its copy of the weights if it has one, the adapter in the slot's
    banks, and what training took, which the trainer's allocator keeps. Weights, pool and everything else of
    the engine are in both. Raises PremiseError if the trainer did not train.
    """
    check_plugin()
    shape, block = shapes(setting)[0], sizes(setting)["block_tokens"]
    plain = {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": RANK,
        "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }
    ways = [(STOCK, plain, None), (learns(setting, RANK, 1), {}, LEARNING)]
    for row, (config, more, options) in zip(plan, ways, strict=True):
        with engine(shape, setting, config, 1, enforce_eager=True, **more) as llm:
            prompts = [random_tokens(llm, PROMPT, 0)]
            if options is None:
                engine_speed(llm, prompts, writing(2 * block, None), 1)
            else:
                learning_speed(llm, prompts, 2 * block, block, options, 1)
            free, total = torch.cuda.mem_get_info() if setting.cuda else (0, 0)
            record.add(**row, used_bytes=total - free)
    first, second = (row["used_bytes"] for row in record.rows)
    record.note(rank=RANK, trainer_bytes=second - first, weight_bytes=shape.weight_bytes)


def sequential_plan(setting: "Setting") -> Plan:
    return [{"streams": 1, "rank": RANK}]


def sequential(record: "Record", plan: Plan, setting: "Setting") -> None:
    """The official code's loop: transformers and peft, one stream after another; one stream is measured."""
    import random

    shape, block = shapes(setting)[0], sizes(setting)["block_tokens"]
    recipe = {**sizes(setting), "context_tokens": 2 * block, "rank": RANK, "dropout": 0.05, "epochs": 2}
    recipe |= {"learning_rate": 5e-5, "adam_eps": 1e-7, "weight_decay": 0.0}
    write = official_writer(random_model(shape, setting), recipe)
    prompt = random.Random(0).choices(range(3, shape.vocab), k=PROMPT)
    write(prompt, 2 * block)  # warms up
    start = time.perf_counter()
    count = len(write(prompt, BLOCKS * block))
    seconds = time.perf_counter() - start
    if count != BLOCKS * block:
        raise PremiseError(f"the loop wrote {count} tokens of {BLOCKS * block}")
    record.note(tokens_per_s=count / seconds, written=count)


def learns(setting: "Setting", rank: int, slots: int) -> dict[str, Any]:
    """Temp-LoRA under Λ attention, whose window lets go of old KV by itself: nothing is computed twice."""
    adaptation = {"method": "temp_lora", **sizes(setting), "rank": rank, "slots": slots, "cache_gib": 0}
    return {"longctx": {"preset": "lm-infinite", "adaptation": adaptation}}


@contextmanager
def engine(
    shape: Shape, setting: "Setting", additional_config: dict[str, Any], streams: int, **more: Any
) -> Iterator["LLMEngine"]:
    longest = text_tokens(setting)
    kwargs = {
        **RANDOM_WEIGHTS,
        "max_num_seqs": 2 * streams,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": (streams + 2) * longest * shape.kv_bytes,
        **more,
        **setting.engine_kwargs,
    }
    with (
        tempfile.TemporaryDirectory() as directory,
        running_engine(write_model(shape, Path(directory)), additional_config, longest, **kwargs) as (llm, _),
    ):
        yield llm


def random_model(shape: Shape, setting: "Setting") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        config = AutoConfig.from_pretrained(write_model(shape, Path(directory)))
    with torch.device("cuda" if setting.cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if setting.cuda else torch.float32
        )
    model.generation_config.eos_token_id = None  # blocks are whole
    return model
