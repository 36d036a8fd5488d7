"""Continued pre-training: from a checkpoint to one with memory layers.

Sources of the objectives: `crossbatch`.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from vllm_longctx.files import sync
from vllm_longctx.models.longllama import ARCHITECTURE, MODEL_TYPE, LongLlamaConfig
from vllm_longctx.models.recompute import recompute_layers
from vllm_longctx.training.crossbatch import MemoryModel, scheduled
from vllm_longctx.training.data import Batch

FAMILIES = ("llama", "mistral", MODEL_TYPE)  # of which LongLLaMA's checkpoint format can hold the weights
# weights and optimizer's moments in float32; what they belong to is in its metadata
STATE_NAME = "training.safetensors"
LOSSES_NAME = "losses.jsonl"
OBJECTIVES = ("crossbatch", "memorizing")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUP_SHARE, LAST_RATE = 0.05, 0.1  # of the steps; of the learning rate, at the end of its cosine
BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Recipe:
    """What the result depends on beside model and texts. Lengths in tokens.

    objective: one of `OBJECTIVES`. schedule: the paper's d in equal shares of the steps. contexts: of a batch
    row, the first without memory.
    bf16: products of matrices in bfloat16 (autocast), fast on a CPU with AVX512-BF16 or AMX and several times
    slower on others.
    """

    mem_layers: Sequence[int]
    context_tokens: int
    steps: int
    mem_positionals: bool = True
    contexts: int = 2
    rows: int = 16
    schedule: Sequence[int] = (1, 2, 4, 8)
    learning_rate: float = 3e-4
    bf16: bool = False
    seed: int = 0
    objective: str = "crossbatch"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective = {self.objective!r}: give one of {', '.join(OBJECTIVES)}")
        if self.contexts < 2:
            raise ValueError(
                f"contexts = {self.contexts}: give at least 2, the first of which is a memory for the second"
            )
        if not self.schedule or min(self.schedule) < 1:
            raise ValueError(f"schedule of d = {list(self.schedule)}: give numbers from 1 up")
        if self.objective == "memorizing" and set(self.schedule) != {1}:
            raise ValueError(
                f"schedule of d = {list(self.schedule)}: with the objective memorizing a context sees its "
                "own document only, which is d = 1; leave the schedule out"
            )
        if max(self.schedule) > self.rows:
            raise ValueError(
                f"schedule of d = {list(self.schedule)}: a batch of {self.rows} documents has no "
                f"{max(self.schedule)}"
            )

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then a cosine."""
        done = step / self.steps
        cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * min((step + 1) / (WARMUP_SHARE * self.steps), cosine)


class Trainer:
    """The model is trained in place, in its own dtype; float32 is meant. step: how many are done.

    recompute: computes layers again in the backward pass, which changes nothing but time and memory.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, recompute: bool = False):
        self.recipe, self.step = recipe, 0
        self.model = model.eval()  # no dropout: nothing random but the data
        self.memory = MemoryModel(model, recipe.mem_layers, recipe.mem_positionals)
        self.memory.check_length(recipe.context_tokens)
        if recompute:
            recompute_layers(model)
        self._parameters = dict(model.named_parameters())
        groups = [
            {
                "params": [p for p in self._parameters.values() if (p.dim() > 1) == matrices],
                "weight_decay": decay,
            }
            for matrices, decay in ((True, WEIGHT_DECAY), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS)

    def losses(self, batch: Batch, documents: int) -> Iterator[Tensor]:
        """Summed cross-entropy in nats of each context of a row: [contexts], in one tensor or several.

        Each is to be back-propagated before the next is asked for. documents: the paper's d.
        """
        logits_of_contexts, done = self._logits(batch, documents), 0
        while done < batch.targets.shape[1]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
                logits = next(logits_of_contexts).float()
            targets = batch.targets[:, done : done + logits.shape[1]]
            done += logits.shape[1]
            by_token = cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
            yield by_token.view_as(targets).sum((0, 2))

    def _logits(self, batch: Batch, documents: int) -> Iterator[Tensor]:
        """[rows, contexts, tokens, vocab]: of all contexts of a row, or of one after the other."""
        if self.recipe.objective == "memorizing":
            yield from self.memory.memorizing(batch.inputs)
        else:
            yield self.memory.crossbatch(batch.inputs, documents, batch.lengths)

    def train(self, batch: Batch) -> dict[str, float]:
        """One step, on the mean over all targets.

        Returns what is to be kept of it; losses are means over a kind of context.
        """
        recipe, counts = self.recipe, batch.counts
        documents, rate = scheduled(self.step, recipe.steps, recipe.schedule), recipe.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sums = []
        for of_contexts in self.losses(batch, documents):
            (of_contexts.sum() / counts.sum()).backward()
            sums.append(of_contexts.detach())
        loss = torch.cat(sums).sum() / counts.sum()
        if not torch.isfinite(loss):
            raise ValueError(
                f"step {self.step + 1}: the loss is {loss.item()}; lower the learning rate = "
                f"{recipe.learning_rate}"
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        means = by_kind(torch.cat(sums), counts)
        return {"step": self.step, "d": documents, "learning_rate": rate, **means}

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch], documents: int) -> dict[str, float]:
        """Mean losses by kind of context."""
        sums = [torch.cat([*self.losses(batch, documents)]) for batch in batches]
        return by_kind(torch.stack(sums).sum(0), torch.stack([batch.counts for batch in batches]).sum(0))

    def save_state(self, path: Path, **about: str) -> None:
        """Everything that `load_state` needs to go on exactly: complete, or the file of before."""
        tensors = {f"weight.{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self._optimizer.state.get(p, {}).items()}
        temporary = path.with_suffix(".new")
        save_file(
            tensors,
            temporary,
            metadata={**about, "step": str(self.step), "recipe": json.dumps(asdict(self.recipe))},
        )
        sync(temporary)
        os.replace(temporary, path)

    def load_state(self, path: Path, **about: str) -> None:
        """Raises ValueError where the state was not made by this recipe and with `about`, naming what
        differs.
        """
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
            self.step = int(metadata.pop("step"))
            theirs: dict[str, Any] = {**json.loads(metadata.pop("recipe")), **metadata}
            ours: dict[str, Any] = {**json.loads(json.dumps(asdict(self.recipe))), **about}
            for name, value in ours.items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"{path} was made with {name} = {theirs.get(name)}, not {value}: resume it with that"
                    )
            with torch.no_grad():
                for key, _, name in (key.partition(".") for key in file.keys()):  # noqa: SIM118
                    tensor, p = file.get_tensor(f"{key}.{name}"), self._parameters[name]
                    if key == "weight":
                        p.copy_(tensor)
                    else:
                        self._optimizer.state[p][key] = tensor


def by_kind(sums: Tensor, counts: Tensor) -> dict[str, float]:
    """Mean losses of the first contexts, which have no memory, and of the others; NaN without targets."""
    parts = {"first": slice(0, 1), "memory": slice(1, None)}
    return {kind: float(sums[part].sum() / counts[part].sum()) for kind, part in parts.items()}


@dataclass(frozen=True)
class CheckpointMemory:
    """What a checkpoint says of its memory, as `save` has written it. Lengths in tokens.

    layers: Empty for a model without a memory; then the rest is what one gets by default.
    """

    context_tokens: int
    layers: Sequence[int] = ()
    positionals: bool = True
    dtype: str = "bfloat16"
    last_context_tokens: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CheckpointMemory":
        config = model.config.get_text_config()
        trained, layers = config.max_position_embeddings, getattr(config, "mem_layers", ())
        if not layers:
            return cls(trained)
        return cls(
            getattr(config, "n_local", trained),
            layers,
            config.mem_positionals,
            config.mem_dtype,
            config.last_context_length,
        )


def load(path: str | Path) -> PreTrainedModel:
    """A checkpoint directory in float32; of FAMILIES, a Llama whose config is a `LongLlamaConfig`."""
    settings = json.loads(Path(path, "config.json").read_text())
    if settings.get("model_type") not in FAMILIES:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model
    del settings["model_type"]
    settings.pop("sliding_window", None)  # Mistral's; no window of ours is longer
    return LlamaForCausalLM.from_pretrained(path, config=LongLlamaConfig(**settings), dtype=torch.float32)


def save(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    path: Path,
    last_context_tokens: int,
    mem_dtype: str,
    dtype: torch.dtype,
) -> None:
    """A checkpoint directory: of a Llama in the official code's format, of others in the model's own.

    dtype: of the weights as written, which other models have afterwards.
    """
    path.mkdir(parents=True, exist_ok=True)
    memory = {
        "mem_layers": sorted(recipe.mem_layers),
        "mem_positionals": recipe.mem_positionals,
        "mem_dtype": mem_dtype,
        "last_context_length": last_context_tokens,
    }
    if isinstance(model, LlamaForCausalLM):
        config = LongLlamaConfig(
            **{
                k: v
                for k, v in model.config.to_dict().items()
                if k not in ("model_type", "architectures", "dtype")
            }
            | memory
            | {"max_position_embeddings": recipe.context_tokens},
            architectures=[ARCHITECTURE],
            dtype=dtype,
        )
        weights = {
            name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()
        }  # tied ones once
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(path)
    else:
        # max_position_embeddings stays: some scalings of RoPE are computed from it
        model.config.get_text_config().update(memory | {"n_local": recipe.context_tokens})
        model.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.model_max_length = recipe.context_tokens
        tokenizer.save_pretrained(path)
