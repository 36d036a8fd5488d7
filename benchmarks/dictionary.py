"""The dictionary lookup of the Focused Transformer (arXiv 2307.03170, section 4): train small, look up far.

    python benchmarks/dictionary.py OUT_DIR --json OUT.json --plot OUT.png

A dictionary is a list of facts, a key of two tokens and a value of one; then it is asked for: keys again, in
another order, whose values are to be told. In training it fills one context, its questions the next. Two
models are trained from nothing by
`vllm_longctx.training`, alike but for the schedule of d: CrossBatch's rises, the other's is 1 throughout, so
that its memory only ever holds its own document. Both are saved as LongLLaMA checkpoints, OUT_DIR/dictionary
and OUT_DIR/dictionary-plain, and asked with dictionaries of up to 256 training contexts in memory, the answer
being the likeliest token (chance is 1 in 64).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_longctx.cli.options import JsonOut
from vllm_longctx.cli.output import plot, write_json
from vllm_longctx.cli.train_focused import numbers
from vllm_longctx.geometry import SteppedWindows
from vllm_longctx.models.longllama import LongLlamaConfig
from vllm_longctx.training.crossbatch import MemoryModel, scheduled
from vllm_longctx.training.data import IGNORED, Batch
from vllm_longctx.training.trainer import Recipe, Trainer, load, save

CONTEXT = 48
KEY_TOKENS, FACT_TOKENS = 2, 3
LETTERS, VALUES = 256, 64  # letters by default
FACTS = CONTEXT // FACT_TOKENS
TOKENS = 1536  # of a batch, where d asks for no more
MEM_LAYERS = (1,)
HEADS, HEAD_DIM, ROPE_THETA = 4, 32, 100.0
FAST_PAIRS, BIAS = 4, 5.0  # of the rotated pairs, those that turn fastest tell neighbours apart
TIMES = (1, 4, 16, 64, 256)
SIZES, SCHEDULE, LEARNING_RATE = "4,8,16,16", "1,4,64,64", 2e-3  # of training


@dataclass(frozen=True)
class Language:
    """Tokens: a key's first letters, then its second ones, then values.

    letters: That each token of a key may be.
    """

    letters: int = LETTERS

    @classmethod
    def of(cls, vocab_size: int) -> "Language":
        """Of a model that was trained here."""
        return cls((vocab_size - VALUES) // KEY_TOKENS)

    @property
    def first_value(self) -> int:
        return KEY_TOKENS * self.letters

    def facts(self, rows: int, count: int, generator: torch.Generator) -> Tensor:
        """[rows, count, FACT_TOKENS]: no key twice in a row. Raises ValueError for more facts than keys."""
        letters, keys = self.letters, self.letters**KEY_TOKENS
        if count > keys:
            raise ValueError(f"{count:,} facts, but {letters} letters make {keys:,} keys; give more letters")
        codes = torch.stack([torch.randperm(keys, generator=generator)[:count] for _ in range(rows)])
        key = torch.stack([codes // letters**k % letters + k * letters for k in range(KEY_TOKENS)], -1)
        value = torch.randint(VALUES, (rows, count, 1), generator=generator) + self.first_value
        return torch.cat([key, value], -1)

    def task(self, rows: int, count: int, asks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Dictionaries of `count` facts, and `asks` questions with their answers for each: [rows, tokens]
        both.
        """
        known = self.facts(rows, count, generator)
        asked = torch.stack([torch.randperm(count, generator=generator)[:asks] for _ in range(rows)])
        return known.flatten(1), known[torch.arange(rows)[:, None], asked].flatten(1)

    def answers(self, questions: Tensor) -> Tensor:
        """Of the next tokens [rows, tokens] those that are values; `IGNORED` elsewhere."""
        following = questions.roll(-1, 1)
        return following.where(following >= self.first_value, IGNORED)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """a0 .. a255 b0 .. b255 v0 .. v63, with blanks between."""
        names = [f"{place}{n}" for place in "ab" for n in range(self.letters)]
        vocabulary = {name: n for n, name in enumerate([*names, *(f"v{n}" for n in range(VALUES))])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def new_model(language: Language) -> LlamaForCausalLM:
    """A local layer and a memory layer, random, but for a start without which the first answers take
    thousands of steps.

    The local layer's heads begin on the one or the two tokens before (a rotated bias), MLPs at zero. The
    memory layer begins as an induction head (arXiv 2209.11895) of a key's second letter: its keys read what
    the heads on the token before have written, and its output is what its values have read. The rest, a key's
    first letter above all, is left to training.
    """
    model = LlamaForCausalLM(
        LongLlamaConfig(
            vocab_size=language.first_value + VALUES,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            attention_bias=True,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    local, memory = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        turns = ROPE_THETA ** (-torch.arange(FAST_PAIRS) * 2 / HEAD_DIM)
        for head in range(HEADS):
            before = 1 + head % 2
            query, key = (
                p.bias[head * HEAD_DIM : (head + 1) * HEAD_DIM].unflatten(0, (2, -1))
                for p in (local.q_proj, local.k_proj)
            )
            key[0, :FAST_PAIRS] = BIAS
            query[:, :FAST_PAIRS] = BIAS * torch.stack([(before * turns).cos(), -(before * turns).sin()])
        for projection in (local.v_proj, local.o_proj, memory.q_proj, memory.v_proj):
            torch.nn.init.orthogonal_(projection.weight)
        one_before = torch.arange(HEADS * HEAD_DIM).unflatten(0, (HEADS, HEAD_DIM))[::2].flatten()
        written = local.o_proj.weight[:, one_before] @ local.v_proj.weight[one_before]
        local.o_proj.weight *= 0.05
        memory.q_proj.weight *= 1.6
        memory.k_proj.weight.copy_(memory.q_proj.weight @ written.T)
        memory.o_proj.weight.copy_(0.1 * memory.v_proj.weight.T)
    return model


def train(recipe: Recipe, sizes: Sequence[int], label: str, language: Language = Language()) -> Trainer:
    """sizes: facts of a dictionary, each for an equal share of the steps: few to choose from are learnt
    sooner.
    """
    torch.manual_seed(recipe.seed)
    trainer = Trainer(new_model(language), recipe)
    learn(trainer, sizes, label)
    return trainer


def learn(trainer: Trainer, sizes: Sequence[int], label: str, tokens: int = TOKENS) -> None:
    """All steps. A dictionary fills all contexts of a row but the last, its questions the last.

    tokens: of a batch, where d asks for no more.
    """
    recipe, language = trainer.recipe, Language.of(trainer.model.config.vocab_size)
    generator, contexts = torch.Generator().manual_seed(recipe.seed), recipe.contexts
    for step in track(range(recipe.steps), label):
        size = scheduled(step, recipe.steps, sizes)
        asks = size // (contexts - 1)
        rows = max(tokens // (contexts * asks * FACT_TOKENS), scheduled(step, recipe.steps, recipe.schedule))
        known, questions = language.task(rows, size, asks, generator)
        targets = torch.cat([torch.full_like(known, IGNORED), language.answers(questions)], 1)
        both = torch.cat([known, questions], 1), targets
        trainer.train(Batch(*(x.unflatten(1, (contexts, -1)) for x in both)))


@torch.no_grad()
def accuracy(memory: MemoryModel, times: int, texts: int, seed: int) -> float:
    """Share of right answers with a dictionary of `times` contexts in memory."""
    language, generator = Language.of(memory.config.vocab_size), torch.Generator().manual_seed(seed)
    known, questions = language.task(texts, times * FACTS, FACTS, generator)
    for _, logits in memory.read(torch.cat([known, questions], 1), SteppedWindows(CONTEXT, CONTEXT)):
        last = logits
    targets = language.answers(questions)
    right = last.argmax(-1) == targets
    return float(right[targets >= 0].float().mean())


def main(
    out_dir: Path,
    steps: int = 160,
    sizes: Annotated[str, typer.Option(help="Facts of a dictionary over training, at most 16.")] = SIZES,
    schedule: Annotated[str, typer.Option(help="CrossBatch's d over training.")] = SCHEDULE,
    learning_rate: float = LEARNING_RATE,
    letters: Annotated[
        int,
        typer.Option(help="That a token of a key may be; a dictionary has at most their square of facts."),
    ] = LETTERS,
    texts: Annotated[
        int, typer.Option(help="Dictionaries of each size to ask about, 16 questions each.")
    ] = 32,
    seed: int = 0,
    json_out: JsonOut = None,
    plot_out: Annotated[
        Path | None, typer.Option("--plot", help="Accuracy against the memory's length.")
    ] = None,
) -> None:
    rising, language = numbers("--schedule", schedule), Language(letters)
    result: dict[str, dict[int, float]] = {}
    for name, documents in {"dictionary": rising, "dictionary-plain": [1]}.items():
        recipe = Recipe(
            MEM_LAYERS, CONTEXT, steps, False, 2, max(rising), documents, learning_rate, seed=seed
        )
        trainer = train(recipe, numbers("--sizes", sizes), name, language)
        save(trainer.model, language.tokenizer(), recipe, out_dir / name, CONTEXT, "float32", torch.float32)
        memory = MemoryModel(load(out_dir / name), MEM_LAYERS, mem_positionals=False)
        result[name] = {times: accuracy(memory, times, texts, seed + 1) for times in TIMES}
    print_table(result)
    rows = [
        {"model": m, "times": t, "tokens": t * CONTEXT, "accuracy": a}
        for m, r in result.items()
        for t, a in r.items()
    ]
    about = {
        "context": CONTEXT,
        "steps": steps,
        "sizes": sizes,
        "schedule": schedule,
        "letters": letters,
        "questions": texts * FACTS,
        "seed": seed,
    }
    write_json(json_out, {**about, "learning_rate": learning_rate, "rows": rows})
    if plot_out is not None:
        curves = {name: ([t * CONTEXT for t in r], list(r.values())) for name, r in result.items()}
        plot(plot_out, curves, "memory (tokens)", "accuracy")


def print_table(result: dict[str, dict[int, float]]) -> None:
    table = Table("memory / training context", *result, title="right answers, %")
    for times in TIMES:
        table.add_row(
            f"{times} × {CONTEXT}", *(f"{100 * by_times[times]:.1f}" for by_times in result.values())
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
