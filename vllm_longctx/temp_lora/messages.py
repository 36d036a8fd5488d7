"""What the engine and the trainer process say to each other: small structs as MessagePack. Weights go through `slots`.

Every Begin, Resume, Train and Save is answered once, in the order sent: Began, Trained, Saved, Failed or SaveFailed.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel

from vllm_longctx.config import ADAPTER_NAME


class Recipe(msgspec.Struct, frozen=True):
    """How one request's adapter is made and trained. Defaults: the official Temp-LoRA code's.

    alpha / rank scales the adapter's output. learning_rate is reached after warmup_blocks blocks. adapter_seed: of the
    initial weights and of dropout.
    """

    rank: int = 64
    alpha: int | float = 64
    dropout: float = 0.05
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_eps: float = 1e-7
    grad_clip: float | None = None
    warmup_blocks: int = 2
    epochs: int = 2
    adapter_seed: int = 0

    def learning_rate_of(self, block: int) -> float:
        """Of the blocks 1, 2, ...: the first trains at 0 where there is a warm-up, as in the official code."""
        return self.learning_rate * (min(1.0, (block - 1) / self.warmup_blocks) if self.warmup_blocks else 1.0)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer process is started with.

    address: ZeroMQ's, of the socket to bind. model: a checkpoint directory or a name in Hugging Face's cache. revision: of that
    name. config, weights: from an engine, a complete Hugging Face config and the files of the weights, in place of what the
    model's name stands for. dtype, device: torch's names for them. attention, recompute, duty_cycle: see
    `config.TrainerSection`. shares: the first message is Share, and there is no checkpoint to load. cpus: logical CPUs to run
    on; None: all those inherited. adapters_root: where adapters are saved to and started from. parent: process id; when that
    process ends, this one removes the directory of its socket and ends too.
    """

    address: str
    model: str
    dtype: str
    revision: str | None = None
    config: dict[str, Any] | None = None
    weights: list[str] = []
    device: str = "cpu"
    attention: str = "sdpa"
    recompute: bool = False
    duty_cycle: float = 1.0
    shares: bool = False
    threads: int = 1
    cpus: list[int] | None = None
    adapters_root: str | None = None
    parent: int | None = None


class SharedTensor(msgspec.Struct, frozen=True):
    """A tensor in another process's GPU memory, by CUDA IPC; the names of `torch.multiprocessing.reductions`.

    shape, stride, offset: of the tensor in its storage, in elements. storage_bytes, storage_offset: of that storage in what
    CUDA allocated and the handle names, in bytes. counter_*: counts who uses it. event_*: of what wrote it.
    """

    shape: list[int]
    stride: list[int]
    offset: int
    dtype: str
    handle: bytes
    storage_bytes: int
    storage_offset: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    wait_for_event: bool


class Message(msgspec.Struct, frozen=True, tag=True):
    """owner: one adapter's number, never used again. slot, bank: see `slots`. version: 0 is before any training."""


class Join(Message, frozen=True):
    """An engine's first message, answered by Ready. Whatever the trainer did for another engine ends.

    probe: token ids of the text of which Ready has the log-probabilities. adapters_root: the engine's, if it has one.
    """

    probe: list[int] = []
    adapters_root: str | None = None


class Share(Message, frozen=True):
    """Before Join, if Options say so: the engine's weights under vLLM's names, and its slots' device memory."""

    weights: dict[str, SharedTensor]
    slots: SharedTensor


class Leave(Message, frozen=True):
    """The engine's last: forget all its adapters."""


class OpenSlots(Message, frozen=True):
    path: str
    max_rank: int
    num_slots: int


class Begin(Message, frozen=True):
    """A new adapter, or the saved one named start_from, whose weights are then in bank 0 as version 0. Answer: Began."""

    owner: int
    slot: int
    recipe: Recipe
    start_from: str | None = None


class Resume(Message, frozen=True):
    """After a restart: an adapter whose weights are in the slot; its optimizer and dropout start anew. Answer: Began."""

    owner: int
    slot: int
    bank: int
    version: int
    recipe: Recipe


class Train(Message, frozen=True):
    """Make `version` by training on one block: the last num_targets of tokens. Answers: Started, then Trained or Failed."""

    owner: int
    slot: int
    bank: int
    version: int
    tokens: list[int]
    num_targets: int


class Save(Message, frozen=True):
    """Write the newest weights to adapters_root/name. position: tokens of the text read so far. Answer: Saved or SaveFailed."""

    owner: int
    name: str
    position: int


class Drop(Message, frozen=True):
    owner: int


class Ready(Message, frozen=True):
    """A trainer can begin.

    modules: Of every adapted linear layer, under Hugging Face's name, its (in, out) features.
    logprobs: Of every token of the probe after its first, in nats.
    about: What the trainer loaded, in words.
    """

    modules: dict[str, tuple[int, int]]
    logprobs: list[float] = []
    about: str = ""


class Unable(Message, frozen=True):
    """In place of Ready, and the last there will be: the trainer has no model."""

    reason: str


class Began(Message, frozen=True):
    owner: int


class Started(Message, frozen=True):
    owner: int
    version: int


class Trained(Message, frozen=True):
    """The slot's bank holds the version. losses: one per epoch, each before its step; nats per token."""

    owner: int
    slot: int
    bank: int
    version: int
    losses: list[float]
    seconds: float


class Failed(Message, frozen=True):
    """version: the one that was not made, 0 for Begin. The adapter is as it was before."""

    owner: int
    version: int
    reason: str


class Saved(Message, frozen=True):
    owner: int
    name: str


class SaveFailed(Message, frozen=True):
    owner: int
    name: str
    reason: str


class Lost(Message, frozen=True):
    """The trainer works for another engine now."""

    reason: str


class Restarted(Message, frozen=True):
    """From the client: everything sent so far and not yet answered is lost, and so are all adapters but for the slots.

    owner: of the job that the trainer was at, None if it was at none.
    """

    owner: int | None = None


class Dead(Message, frozen=True):
    """From the client: there is no trainer any more and there will be none."""

    reason: str


Job = Share | Join | Leave | OpenSlots | Begin | Resume | Train | Save | Drop
Report = Ready | Unable | Began | Started | Trained | Failed | Saved | SaveFailed | Lost | Restarted | Dead
ANSWERED = (Begin, Resume, Train, Save)
ANSWERS = (Began, Trained, Failed, Saved, SaveFailed)

encode = msgspec.msgpack.Encoder().encode
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def not_saved(name: str, reason: str) -> str:
    """What the answer to a request says whose adapter could not be saved."""
    return f"longctx: adapter {name!r} was not saved: {reason}"


def adapter_path(adapters_root: str | None, name: str) -> Path:
    """The directory of a saved adapter. Raises ValueError for a name that is not a plain one."""
    if adapters_root is None:
        raise ValueError(f"adapter {name!r}: the server has no adapters_root; set it to save adapters or to start from one")
    if not re.fullmatch(ADAPTER_NAME, name):
        raise ValueError(
            f"adapter name {name!r}: use up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
        )
    return Path(adapters_root) / name


def taken(struct: type[msgspec.Struct], settings: BaseModel) -> dict[str, Any]:
    """Those fields of a struct that settings have under the same names."""
    names = type(settings).model_fields.keys() & set(struct.__struct_fields__)
    return {name: getattr(settings, name) for name in names}
