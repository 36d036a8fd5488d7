"""Saved adapters on disk: put, listed and deleted, without a trainer.

What is put is checked before it is written: its shapes, whether it is finite, its size. Nothing of it is run.
Names are as in `adapter_path`: those of a tenant begin with `@TENANT/`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from vllm.config import VllmConfig

from vllm_longctx.config import ADAPTER_NAME, LongContextError
from vllm_longctx.files import remove_directory, whole_directory
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora.base_model import trained_model
from vllm_longctx.temp_lora.linear_layers import linear_layers
from vllm_longctx.temp_lora.messages import ABOUT_NAME, adapter_path, chain_of
from vllm_longctx.temp_lora.peft_adapter import (
    CONFIG_NAME,
    SAVING_PREFIX,
    WEIGHTS_NAME,
    about_model,
    check_replaceable,
    pairs_of,
    rank_of,
    read_config,
)

OTHER_BYTES = 1 << 20  # of a file of weights beside its tensors, and of a config, at most


@dataclass(frozen=True)
class SavedAdapter:
    """What is on disk under a name.

    name: Without its tenant.
    rank: The largest of its layers.
    nbytes: Of its files.
    saved_at: In seconds since 1970.
    blocks: On how many it was trained, if its training can go on.
    """

    name: str
    rank: int
    nbytes: int
    saved_at: float
    blocks: int | None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is none that can be read."""
        try:
            rank = rank_of(read_config((path / CONFIG_NAME).read_bytes()))
            files = [file.stat() for file in path.iterdir()]
        except (OSError, ValueError):
            return None
        chain = chain_of(path)
        newest = max(file.st_mtime for file in files)
        blocks = None if chain is None else chain.version
        return cls(path.name, rank, sum(file.st_size for file in files), newest, blocks)


def saved_adapters(root: str, tenant: str | None = None) -> list[SavedAdapter]:
    """Those of a tenant, or of nobody, by name."""
    directory = Path(root) if tenant is None else Path(root, f"@{tenant}")
    if not directory.is_dir():
        return []
    paths = sorted(path for path in directory.iterdir() if re.fullmatch(ADAPTER_NAME, path.name))
    return [found for path in paths if (found := SavedAdapter.read(path)) is not None]


class Adapters:
    """The saved adapters of an engine, for programs.

    Raises LongContextError if the engine keeps none.

    root: Its `adaptation.adapters_root`.
    """

    def __init__(self, vllm_config: VllmConfig):
        settings = active_settings(vllm_config)
        root = settings.temp_lora.adapters_root if settings.mode.adapts else None
        if root is None:
            raise LongContextError("this engine keeps no adapters; start it with adaptation.adapters_root")
        self._vllm_config, self._max_rank, self.root = vllm_config, settings.temp_lora.max_rank, root

    @classmethod
    def of(cls, llm: Any) -> Self:
        """llm: vLLM's `LLM`."""
        return cls(llm.llm_engine.vllm_config)

    @cached_property
    def _model(self) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
        """Its linear layers, see `linear_layers`, and what a saved adapter says of it."""
        model = trained_model(self._vllm_config)
        return linear_layers(model), about_model(model.config)

    @property
    def max_bytes(self) -> int:
        """Of the weights of one that is put: all layers, at the largest rank."""
        return self._weight_bytes(self._max_rank) + OTHER_BYTES

    def saved_bytes(self, rank: int) -> int:
        """What one takes that a request saves, at most: its weights, and twice that for AdamW's moments."""
        return 3 * self._weight_bytes(rank) + OTHER_BYTES

    def _weight_bytes(self, rank: int) -> int:
        modules, _ = self._model
        return 4 * rank * sum(sum(features) for features in modules.values())

    def put(
        self, name: str, config: bytes | str | Mapping[str, Any], weights: bytes | Mapping[str, Tensor]
    ) -> SavedAdapter:
        """Write an adapter, as a whole or not at all, in place of what was saved under its name.

        Raises LongContextError for what requests could not begin with, OSError if it cannot be written.

        config: peft's, or its JSON.
        weights: By peft's names, or as safetensors.
        """
        if not isinstance(weights, bytes):
            weights = save({key: w.detach().to("cpu", copy=True).contiguous() for key, w in weights.items()})
        written = config if isinstance(config, bytes | str) else json.dumps(config)
        try:
            path = adapter_path(self.root, name)
            if len(weights) > self.max_bytes or len(written) > OTHER_BYTES:
                most = f"adaptation.max_rank = {self._max_rank} takes {self.max_bytes}"
                raise ValueError(
                    f"it has {len(weights)} bytes of weights, where an adapter of {most} at most"
                )
            modules, model = self._model
            pairs_of(read_config(written), _tensors(weights), modules, self._max_rank)
            check_replaceable(path)
            with whole_directory(path, SAVING_PREFIX) as new:
                (new / CONFIG_NAME).write_bytes(written.encode() if isinstance(written, str) else written)
                (new / WEIGHTS_NAME).write_bytes(weights)
                (new / ABOUT_NAME).write_text(json.dumps({"position": 0, "model": model}, indent=2) + "\n")
                found = SavedAdapter.read(new)
        except ValueError as e:
            raise LongContextError(f"adapter {name!r}: {e}") from None
        assert found is not None
        return replace(found, name=path.name)

    def list(self, tenant: str | None = None) -> list[SavedAdapter]:
        """Those of a tenant, or of nobody, by name."""
        return saved_adapters(self.root, tenant)

    def delete(self, name: str) -> bool:
        """Delete an adapter. False if there is none.

        Requests that have begun with it go on. Raises LongContextError for a directory that was not saved or
        put, OSError if it cannot be removed.
        """
        try:
            path = adapter_path(self.root, name)
            if not path.is_dir():
                return False
            check_replaceable(path)
        except ValueError as e:
            raise LongContextError(f"adapter {name!r}: {e}") from None
        remove_directory(path, SAVING_PREFIX)
        return True


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError) as e:
        raise ValueError(f"its weights are not safetensors: {e}") from None
