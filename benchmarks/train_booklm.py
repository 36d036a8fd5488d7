"""The recipe of the shipped model `booklm`: a small Llama trained on books, 512 tokens at a time.

    python benchmarks/train_booklm.py TRAIN_DIR VALIDATION_DIR OUT_DIR --minutes 70            # from nothing
    python benchmarks/train_booklm.py TRAIN_DIR VALIDATION_DIR OUT_DIR --minutes 30 --init DIR # go on from a
    checkpoint

The directories hold one book per `.txt` file. Without `--init` a byte-level BPE tokenizer is trained on
TRAIN_DIR first. On a CPU with bf16 instructions (AMX, AVX512-BF16) add `--bf16`; on others autocast is
several times slower than float32.

Every training sequence begins with BOS. During the second half of the run an auxiliary loss, ramped in
linearly,

    sink_weight * mean(relu(-log p(BOS) - 0.1))        over all heads and queries of layers 1 and up,

teaches the heads to rest on BOS: large models grow such an attention sink by themselves, a model of this size
    does not.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from texts import read_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
BATCH = 8
BOS, EOS = "<s>", "</s>"
SINK_MARGIN = 0.1  # no push once p(BOS) > exp(-0.1)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4096 tokens that puts BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    pieces = (text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def new_model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def batches(books: list[torch.Tensor], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless epochs of [BATCH, CONTEXT + 1] token ids: BOS, then a piece of one book; pieces are
    shuffled.
    """
    while True:
        shift = int(torch.randint(CONTEXT, (), generator=generator))
        pieces = [(b, o) for b, book in enumerate(books) for o in range(shift, len(book) - CONTEXT, CONTEXT)]
        order = torch.randperm(len(pieces), generator=generator).tolist()
        for k in range(0, len(order) - BATCH + 1, BATCH):
            rows = [books[b][o : o + CONTEXT] for b, o in (pieces[i] for i in order[k : k + BATCH])]
            yield F.pad(torch.stack(rows), (1, 0), value=0)


def losses(model: LlamaForCausalLM, ids: torch.Tensor, with_sink: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(next-token NLL, sink loss), both scalars in nats; ids [BATCH, CONTEXT + 1]."""
    model.set_attn_implementation(
        "eager" if with_sink else "sdpa"
    )  # only eager returns the attention weights
    out = model(ids[:, :-1], output_attentions=with_sink)
    nll = F.cross_entropy(out.logits.float().flatten(0, 1), ids[:, 1:].flatten())
    if not with_sink:
        return nll, torch.zeros(())
    to_bos = [a[..., 1:, 0].float().clamp_min(1e-9).log() for a in out.attentions[1:]]
    return nll, torch.stack([F.relu(-p - SINK_MARGIN).mean() for p in to_bos]).mean()


@torch.no_grad()
def validate(model: LlamaForCausalLM, books: list[torch.Tensor]) -> float:
    """Mean NLL per token, in nats, over four places of every book."""
    rows = [
        book[o : o + CONTEXT]
        for book in books
        for o in torch.linspace(5000, len(book) - 5000, 4).long().tolist()
    ]
    ids = F.pad(torch.stack(rows), (1, 0), value=0)
    parts = [losses(model, part, with_sink=False)[0] * len(part) for part in ids.split(BATCH)]
    return float(sum(parts) / len(ids))


def main(
    train_dir: Path,
    validation_dir: Path,
    out_dir: Path,
    minutes: Annotated[float, typer.Option(help="Training time.")] = 70.0,
    init: Annotated[Path | None, typer.Option(help="Checkpoint (and tokenizer) to start from.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW; Muon takes 10/3 of it.")] = 3e-3,
    sink_weight: Annotated[
        float, typer.Option(help="Weight of the sink loss at the end of its ramp.")
    ] = 0.05,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    threads: Annotated[
        int, typer.Option(help="No more than there are free cores, or all wait for the slowest.")
    ] = 2,
    seed: int = 1234,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    texts = [*read_directory(train_dir).values()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(init) if init else train_tokenizer(texts)

    def encode(texts: list[str]) -> list[torch.Tensor]:
        return [torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]

    train_books, validation_books = encode(texts), encode([*read_directory(validation_dir).values()])

    model = LlamaForCausalLM.from_pretrained(init, dtype=torch.float32) if init else new_model(len(tokenizer))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate * 10 / 3, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, 0.95),
        ),
    ]
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    print(
        f"{sum(map(len, train_books)):,} training tokens, validation NLL "
        f"{validate(model, validation_books):.4f}"
    )

    start, seen = time.monotonic(), 0
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=1.0)
        for step, ids in enumerate(batches(train_books, generator)):
            done = (time.monotonic() - start) / (60 * minutes)
            if done >= 1:
                break
            scale = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
                group["lr"] = peak * scale
            ramp = max(0.0, 2 * done - 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                nll, sink = losses(model, ids, with_sink=ramp > 0)
            (nll + sink_weight * ramp * sink).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seen += ids[:, 1:].numel()
            speed = seen / (time.monotonic() - start)
            label = f"step {step} NLL {nll.item():.3f} sink {sink.item():.3f} {speed:.0f} tok/s"
            progress.update(task, completed=done, description=label)

    print(f"{seen:,} tokens, validation NLL {validate(model, validation_books):.4f}")
    model.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


if __name__ == "__main__":
    typer.run(main)
