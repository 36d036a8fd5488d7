"""Temp-LoRA's training: adapters of one frozen model, each trained on the blocks of one text as they come.

Only torch and peft are used here. `sidecar` gets the tokens and hands on the weights. Source: Temp-LoRA
(arXiv 2401.11504).
"""

import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict, replace
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from vllm_longctx.files import whole_directory
from vllm_longctx.models.recompute import recompute_layers
from vllm_longctx.temp_lora.linear_layers import linear_layers, target_modules
from vllm_longctx.temp_lora.messages import ABOUT_NAME, Chain, Recipe, chain_of
from vllm_longctx.temp_lora.peft_adapter import (
    SAVING_PREFIX,
    WEIGHTS_NAME,
    Pair,
    about_model,
    check_replaceable,
    pairs_of,
    read_directory_config,
    saved_key,
)
from vllm_longctx.temp_lora.slots import Weights

RANDOM_SHARE = 0.15  # size of a random adapter's outputs beside its layers'
STATE_NAME = "longctx_state.safetensors"  # beside peft's files in a saved adapter
WEIGHT = "weight"  # beside AdamW's names of its state


class NotFinite(Exception):
    """A loss, a weight or an optimizer's state became infinite or NaN."""


@dataclass
class Adapter:
    """One owner's adapter.

    name: peft's name for it.
    recipe: How it is trained.
    pairs: Per module A [rank, in] and B [out, rank], float32.
    optimizer: AdamW over all pairs.
    rng: State of the random numbers that its dropout draws next, uint8.
    """

    name: str
    recipe: Recipe
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]
    optimizer: torch.optim.AdamW
    rng: Tensor


@dataclass(frozen=True)
class State:
    """A version of an adapter, and all that its training goes on from: copies, in host memory.

    weights: A and B of each module, in turn.
    optimizer: AdamW's state of each of them, by its names.
    rng: See `Adapter.rng`.
    """

    weights: list[Tensor]
    optimizer: list[dict[str, Tensor]]
    rng: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.weights, *self.moments.values()))

    @property
    def moments(self) -> dict[str, Tensor]:
        """All but the weights, by name."""
        numbered = enumerate(self.optimizer)
        moments = {f"{n}.{name}": state[name] for n, state in numbered for name in sorted(state)}
        return moments | {"rng": self.rng}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All, by name."""
        return {f"{n}.{WEIGHT}": weight for n, weight in enumerate(self.weights)} | self.moments

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "State":
        """The inverse of `tensors`. Raises ValueError, KeyError or IndexError for any others."""
        tensors = dict(tensors)
        rng = tensors.pop("rng")
        weights = [tensors.pop(f"{n}.{WEIGHT}") for n in range(sum(key.endswith(WEIGHT) for key in tensors))]
        optimizer: list[dict[str, Tensor]] = [{} for _ in weights]
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            optimizer[int(number)][name] = tensor
        return cls(weights, optimizer, rng)

    @property
    def digest(self) -> str:
        """Names what it holds, hexadecimal."""
        return _digest((*self.weights, *self.moments.values())).hex()


@dataclass(frozen=True)
class Initial:
    """What an adapter of a rank and a seed begins with.

    key: Rank and seed.
    weights: Per module A [rank, in] on the CPU; B is 0.
    rng: As of `Adapter`.
    """

    key: tuple[int, int]
    weights: dict[str, Tensor]
    rng: Tensor


class Trainer:
    """Trains adapters of one model.

    model: On its device, in its dtype. Its layers are wrapped in place; its weights never change. Its own
        dropout stays off.
    recompute: Whether to keep only the inputs of decoder layers for the backward pass, and compute the layers
        again there. The same numbers, about a third more work, a small part of the memory.

    linear: Of every linear layer that may have adapters, under the model's name for it, the (in, out)
        features.
    modules: Those that have adapters, likewise; at first all.
    device: The model's.
    """

    modules: dict[str, tuple[int, int]]
    _model: Any  # peft's wrapper, which finds methods of what it wraps when they are called

    def __init__(self, model: PreTrainedModel, recompute: bool = False):
        model.eval()
        self._base, self.device = model, model.device
        # GPUs whose random numbers dropout draws.
        self._gpus = [model.device] if model.device.type == "cuda" else []
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._adapters: dict[int, Adapter] = {}
        self._keeps_initial = bool(self._gpus)
        self._initial: Initial | None = None
        self.linear = linear_layers(model)
        self.adapt(self.linear)
        if recompute:
            recompute_layers(model)

    def adapt(self, names: Collection[str]) -> None:
        """Give these linear layers adapters from now on, and no others. There must be no adapter.

        Raises ValueError for a layer that is not in `linear`, and for none at all.
        """
        if unknown := sorted(set(names) - self.linear.keys()):
            raise ValueError(f"the trainer's model has no linear layer {', '.join(unknown[:3])}")
        if not names:
            raise ValueError("no linear layer is to be adapted")
        modules = {name: sizes for name, sizes in self.linear.items() if name in names}
        if getattr(self, "modules", None) == modules:
            return
        assert not self._adapters
        self._initial = None
        if hasattr(self, "_model"):
            self._model.unload()
        self.modules, self._targets = modules, target_modules(self._base, set(names))
        # This adapter is never trained. It is active while others are deleted.
        none = LoraConfig(r=1, target_modules=self._targets, task_type="CAUSAL_LM")
        self._model = get_peft_model(self._base, none, "none")
        self._layers = {
            name: layer for name, layer in self._base.named_modules() if isinstance(layer, LoraLayer)
        }
        assert self._layers.keys() == modules.keys()

    def begin(self, owner: int, recipe: Recipe) -> None:
        """Make the adapter that peft makes right after `torch.manual_seed(adapter_seed)`.

        Its output is 0. float32.
        """
        if owner in self._adapters:
            raise ValueError(f"owner {owner} has an adapter already")
        name = f"owner-{owner}"
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft divides it by r, whatever number it is
            lora_dropout=recipe.dropout,
            target_modules=self._targets,
            task_type="CAUSAL_LM",
            base_model_name_or_path=self._base.name_or_path,
        )
        pairs, rng = self._add_adapter(name, config, recipe)
        optimizer = torch.optim.AdamW(
            [parameter for pair in pairs.values() for parameter in pair],
            lr=recipe.learning_rate,
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
            fused=bool(self._gpus),  # on a GPU the default makes temporary copies of all weights
        )
        self._adapters[owner] = Adapter(name, recipe, pairs, optimizer, rng)

    def _add_adapter(
        self, name: str, config: LoraConfig, recipe: Recipe
    ) -> tuple[dict[str, tuple[nn.Parameter, nn.Parameter]], Tensor]:
        """The weights of a new adapter, and the state of the random numbers behind theirs.

        peft draws them on the CPU, by one thread. On a GPU, where others wait for it, the last ones drawn are
        kept in host memory.
        """
        key = recipe.rank, recipe.adapter_seed
        initial = self._initial if self._initial is not None and self._initial.key == key else None
        with torch.random.fork_rng(devices=self._gpus):
            torch.manual_seed(recipe.adapter_seed)
            self._model.add_adapter(name, config, low_cpu_mem_usage=initial is not None)
            rng = self._get_rng_state() if initial is None else initial.rng
        pairs = {}
        for module, layer in self._layers.items():
            a, b = layer.lora_A[name], layer.lora_B[name]
            if initial is not None:  # they have shapes only
                for linear in (a, b):
                    linear.to_empty(device=self.device)
                with torch.no_grad():
                    a.get_parameter("weight").copy_(initial.weights[module])
                    b.get_parameter("weight").zero_()
            pairs[module] = a.get_parameter("weight"), b.get_parameter("weight")
        if self._keeps_initial and initial is None:
            weights = {module: a.detach().cpu().clone() for module, (a, _) in pairs.items()}
            self._initial = Initial(key, weights, rng)
        return pairs, rng

    def train(self, owner: int, version: int, tokens: list[int], num_targets: int) -> list[float]:
        """Take `epochs` AdamW steps on the mean cross-entropy of the last tokens.

        Returns the losses before each, in nats per token.

        If it raises, NotFinite or anything else, the adapter, its optimizer and its dropout are as they were
        before.

        version: Number of the block, from 1. It sets the learning rate.
        tokens: The example, see `blocks.example`.
        num_targets: How many of the last tokens are targets, each given all tokens before it.
        """
        adapter = self._adapter(owner)
        if not 0 < num_targets < len(tokens):
            needed = "at least one of each, and one token before them"
            raise ValueError(f"{num_targets} targets in {len(tokens)} tokens: {needed}")
        self._check_vocabulary(tokens)
        self._model.set_adapter(adapter.name)
        ids = torch.tensor([tokens], device=self.device)
        for group in adapter.optimizer.param_groups:
            group["lr"] = adapter.recipe.learning_rate_of(version)
        parameters = [p for pair in adapter.pairs.values() for p in pair]
        weights_before = [p.detach().clone() for p in parameters]
        optimizer_before = deepcopy(adapter.optimizer.state_dict())
        try:
            with torch.random.fork_rng(devices=self._gpus):
                self._set_rng_state(adapter.rng)
                epochs = range(adapter.recipe.epochs)
                losses = [self._step(adapter, parameters, ids, num_targets) for _ in epochs]
                rng = self._get_rng_state()
            moments = [value for state in adapter.optimizer.state.values() for value in state.values()]
            largest = nn.utils.get_total_norm([p.detach() for p in parameters] + moments, torch.inf)
            if not torch.isfinite(largest):
                raise NotFinite("the trained weights are not finite")
        except BaseException:
            with torch.no_grad():
                for parameter, before in zip(parameters, weights_before, strict=True):
                    parameter.copy_(before)
            adapter.optimizer.load_state_dict(optimizer_before)
            raise
        finally:
            adapter.optimizer.zero_grad()
        adapter.rng = rng
        return losses

    def state(self, owner: int) -> State:
        """Of an adapter that has been trained."""
        adapter = self._adapter(owner)
        states = adapter.optimizer.state_dict()["state"]
        return State(
            [_host_copy(p) for pair in adapter.pairs.values() for p in pair],
            [{name: _host_copy(value) for name, value in states[i].items()} for i in sorted(states)],
            adapter.rng,
        )

    def restore(self, owner: int, state: State) -> None:
        """Make an adapter what another one with its recipe was, see `state`.

        Raises ValueError for an adapter of other shapes, and for a state that is not one of AdamW's.
        """
        adapter = self._adapter(owner)
        parameters = [p for pair in adapter.pairs.values() for p in pair]
        shapes = [p.shape for p in parameters]
        needed = [{"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape} for shape in shapes]
        found = [{name: value.shape for name, value in each.items()} for each in state.optimizer]
        if shapes != [p.shape for p in state.weights] or found != needed or state.rng.dtype != torch.uint8:
            raise ValueError("a remembered version has other shapes than the adapter")
        optimizer = {
            "state": dict(enumerate({k: v.clone() for k, v in each.items()} for each in state.optimizer)),
            "param_groups": adapter.optimizer.state_dict()["param_groups"],
        }
        with torch.no_grad():
            for parameter, weight in zip(parameters, state.weights, strict=True):
                parameter.copy_(weight)
        adapter.optimizer.load_state_dict(optimizer)
        adapter.rng = state.rng

    def randomize(self, owner: int) -> None:
        """Give an adapter random weights, whose outputs are about a seventh as large as those of its layers.

        So a comparison with another implementation shows a layer that is adapted otherwise. Measured for
        booklm, SmolLM2 and random models of 4 and 48 layers: with the adapters of two kinds of layers
        exchanged, log-probabilities differ by 0.3 to 1.5 of what the adapter changes, and in bfloat16 by at
        most 0.04. An adapter of half its layers' size leaves SmolLM2 nothing but noise, a quarter of it
        bfloat16's.
        """
        adapter = self._adapter(owner)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, (a, b) in adapter.pairs.items():
                weight = self._layers[name].get_base_layer().get_parameter("weight")
                # peft draws A uniformly up to in ** -0.5, so the variance of its elements is 1 / (3 in).
                scale = RANDOM_SHARE * weight.float().std() * (3 * a.shape[1] / a.shape[0]) ** 0.5
                scale *= adapter.recipe.rank / adapter.recipe.alpha
                b.copy_(torch.randn(b.shape, generator=generator).to(b.device) * scale)

    def logprobs(self, tokens: list[int], owner: int | None = None) -> list[float]:
        """Log-probabilities of every token after the first, in nats.

        By the model with an owner's adapter, without its dropout, or without any. Raises ValueError for a
        token that the model does not have.
        """
        if not tokens:
            return []
        self._check_vocabulary(tokens)
        name = "none" if owner is None else self._adapter(owner).name
        self._model.set_adapter(name)
        dropouts = [layer.lora_dropout[name] for layer in self._layers.values()]
        try:
            for dropout in dropouts:
                dropout.eval()
            with torch.no_grad():
                ids = torch.tensor([tokens], device=self.device)
                logits = self._base(input_ids=ids, use_cache=False).logits[0, :-1]
                targets = torch.tensor(tokens[1:], device=self.device)
                return (-cross_entropy(logits.float(), targets, reduction="none")).tolist()
        finally:
            for dropout in dropouts:
                dropout.train()

    def weights(self, owner: int) -> Weights:
        """Per module A [rank, in], a view, and B [out, rank] times alpha / rank, a copy."""
        adapter = self._adapter(owner)
        scaling = adapter.recipe.alpha / adapter.recipe.rank
        return {name: (a.detach(), b.detach() * scaling) for name, (a, b) in adapter.pairs.items()}

    def load(self, owner: int, weights: Weights) -> None:
        """Replace an adapter's weights by some as from `weights`. Raises ValueError where they do not fit."""
        adapter = self._adapter(owner)
        if weights.keys() != adapter.pairs.keys():
            layers = len(adapter.pairs)
            raise ValueError(f"it does not have weights for exactly this model's {layers} linear layers")
        for name, pair in adapter.pairs.items():
            for own, new in zip(pair, weights[name], strict=True):
                if own.shape != new.shape:
                    found, needed = tuple(new.shape), tuple(own.shape)
                    raise ValueError(f"its {name} has shape {found}; this model and rank need {needed}")
                if not torch.isfinite(new).all():
                    raise ValueError(f"its {name} is not finite")
        with torch.no_grad():
            for name, (a, b) in adapter.pairs.items():
                a.copy_(weights[name][0])
                b.copy_(weights[name][1] * (adapter.recipe.rank / adapter.recipe.alpha))

    def content(self, owner: int) -> bytes:
        """Names an adapter's weights: equal ones have the same."""
        return _digest(p for pair in self._adapter(owner).pairs.values() for p in pair)

    def load_directory(self, owner: int, directory: Path, goes_on: bytes | None = None) -> bool:
        """Replace the weights of an adapter that has just begun by those of a PEFT directory.

        It must have plain LoRA of linear layers, of ranks up to the recipe's, see `peft_adapter`. What it
        does not have stays as it began, which adds nothing. Returns whether it is the version with the
        address `goes_on` and its training goes on. Else that begins anew.

        All files are read from one directory, though another trainer may replace the directory in between.
        Raises ValueError where the adapter does not fit.
        """
        while True:
            opened = _identity(directory)
            try:
                pairs = self._read_directory(directory, self._adapter(owner).recipe.rank)
                state = None if goes_on is None else self._saved_state(directory, goes_on)
            except Exception:
                if _identity(directory) == opened:
                    raise
            else:
                if _identity(directory) == opened:
                    break
        if state is None:
            self._begin_with(owner, pairs)
        else:
            self.restore(owner, state)
        return state is not None

    def _saved_state(self, directory: Path, address: bytes) -> State | None:
        """None if it is another version, or its files are not what was saved."""
        chain = chain_of(directory)
        if chain is None or chain.address != address.hex():
            return None
        try:
            weights = load_file(directory / WEIGHTS_NAME)
            pairs = [weights[saved_key(name, matrix)] for name in self.modules for matrix in "AB"]
            named = {f"{n}.{WEIGHT}": tensor for n, tensor in enumerate(pairs)}
            state = State.of(named | load_file(directory / STATE_NAME))
        except (OSError, SafetensorError, KeyError, ValueError, IndexError):
            return None
        return state if state.digest == chain.digest else None

    def _read_directory(self, directory: Path, max_rank: int) -> dict[str, Pair]:
        named, config = f"adapter {directory.name!r}", read_directory_config(directory)
        if (directory / ABOUT_NAME).is_file():
            theirs, ours = (
                json.loads((directory / ABOUT_NAME).read_text())["model"],
                about_model(self._base.config),
            )
            if theirs != ours:
                raise ValueError(f"{named} was made for {theirs}, but this model is {ours}")
        try:
            return pairs_of(config, load_file(directory / WEIGHTS_NAME), self.modules, max_rank)
        except (OSError, SafetensorError, ValueError) as e:
            raise ValueError(f"{named}: {e}") from None

    def _begin_with(self, owner: int, pairs: Mapping[str, Pair]) -> None:
        """pairs: By module, of ranks up to the adapter's."""
        adapter = self._adapter(owner)
        scale = adapter.recipe.alpha / adapter.recipe.rank
        with torch.no_grad():
            for name, pair in pairs.items():
                a, b = adapter.pairs[name]
                rank = len(pair.a)
                a[:rank].copy_(pair.a)
                b[:, :rank].copy_(pair.b.double() * (pair.scale / scale))

    def save(self, owner: int, directory: Path, position: int, chain: Chain | None = None) -> None:
        """Write a PEFT directory, complete or not at all. It is on disk when this returns.

        Replaces a directory that `save` wrote. Raises ValueError if there is any other one, OSError if it
        cannot be written.

        position: Length of the text so far, in tokens; for information.
        chain: Its digest is added. None where the training is not to go on.
        """
        adapter = self._adapter(owner)
        check_replaceable(directory)
        tensors = {}
        for name, (a, b) in adapter.pairs.items():
            tensors[saved_key(name, "A")], tensors[saved_key(name, "B")] = a.detach(), b.detach()
        with whole_directory(directory, SAVING_PREFIX) as new:
            self._model.peft_config[adapter.name].save_pretrained(str(new))
            save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
            about = {
                "position": position,
                "model": about_model(self._base.config),
                "recipe": asdict(adapter.recipe),
            }
            if chain is not None:
                state = self.state(owner)
                save_file(state.moments, new / STATE_NAME)
                about["chain"] = asdict(replace(chain, digest=state.digest))
            (new / ABOUT_NAME).write_text(json.dumps(about, indent=2) + "\n")

    def drop(self, owner: int) -> None:
        """Delete an adapter, if there is one."""
        adapter = self._adapters.pop(owner, None)
        if adapter is not None:
            self._model.set_adapter("none")
            self._model.delete_adapter(adapter.name)

    def drop_all(self) -> None:
        for owner in list(self._adapters):
            self.drop(owner)

    def _check_vocabulary(self, tokens: list[int]) -> None:
        vocabulary = self._base.config.get_text_config().vocab_size
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:  # on a GPU such an index ends the process
            raise ValueError(f"a token is out of range: the model has 0 to {vocabulary - 1}")

    def _get_rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self._gpus else torch.get_rng_state()

    def _set_rng_state(self, state: Tensor) -> None:
        if self._gpus:
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def _adapter(self, owner: int) -> Adapter:
        if owner not in self._adapters:
            raise ValueError(f"owner {owner} has no adapter")
        return self._adapters[owner]

    def _step(self, adapter: Adapter, parameters: list[nn.Parameter], ids: Tensor, num_targets: int) -> float:
        """One optimizer step. ids: int64 [1, tokens]. Returns the loss before it, in nats per token."""
        keep = {"logits_to_keep": num_targets + 1} if self._keeps_logits else {}
        logits = self._base(input_ids=ids, use_cache=False, **keep).logits[0, -num_targets - 1 : -1]
        loss = cross_entropy(logits.float(), ids[0, -num_targets:])
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss is {loss.item()}")
        adapter.optimizer.zero_grad()
        loss.backward()
        if adapter.recipe.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, adapter.recipe.grad_clip)
        adapter.optimizer.step()
        return loss.item()


def _identity(directory: Path) -> tuple[int, int] | None:
    """Device and inode of the directory that has this name now. None if there is none."""
    try:
        stat = directory.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _digest(tensors: Iterable[Tensor]) -> bytes:
    found = blake2b(digest_size=32)
    for tensor in tensors:
        found.update(tensor.detach().cpu().numpy().tobytes())
    return found.digest()


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
