"""The messages between the engine and the trainer process: small structs as MessagePack.

Weights go through `slots`.

A job is a message to the trainer, a report one to the engine. Every Probe, Begin, Recall, Resume, Train and
Save is answered once, in the order sent: by Probed, Began, Recalled, Trained, Saved, Failed or SaveFailed.
"""

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
from pydantic import BaseModel

from vllm_longctx.config import OWNED_NAME

ABOUT_NAME = "longctx.json"  # beside peft's files in a saved adapter


class Recipe(msgspec.Struct, frozen=True):
    """How one request's adapter is made and trained. Defaults: the official Temp-LoRA code's.

    rank: Of the adapter's matrices.
    alpha: alpha / rank scales the adapter's output.
    dropout: Share of an adapter's inputs that training drops.
    learning_rate: AdamW's, after `warmup_blocks` blocks.
    weight_decay, adam_eps: AdamW's.
    grad_clip: Largest norm of the gradients; None for no limit.
    warmup_blocks: Blocks over which the learning rate rises from 0.
    epochs: Steps on each block. 0 for no training.
    adapter_seed: Of the initial weights and of dropout.
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
        """The learning rate of a block, from 1 on.

        With a warm-up the first trains at 0, as in the official code.
        """
        warmed_up = min(1.0, (block - 1) / self.warmup_blocks) if self.warmup_blocks else 1.0
        return self.learning_rate * warmed_up


class Chain(msgspec.Struct, frozen=True):
    """What a saved adapter is, beside its weights.

    version: The number of blocks that it was trained on.
    address: Of that version, hexadecimal.
    began_with: Names the weights of the saved adapter that its training began with, hexadecimal. Empty for a
        new one.
    digest: Of the weights and all that their training goes on from, hexadecimal.
    """

    version: int
    address: str
    began_with: str = ""
    digest: str = ""


class CacheFiles(msgspec.Struct, frozen=True):
    """Where trained versions are on disk.

    directory: A path.
    max_bytes: Of all files in it together.
    """

    directory: str
    max_bytes: int


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer process is started with.

    address: Of the socket to bind, as ZeroMQ writes it.
    model: A checkpoint directory, or a name in Hugging Face's cache.
    dtype: torch's name for it.
    revision: Of a name in Hugging Face's cache.
    config: From an engine: a complete Hugging Face config in place of the checkpoint's.
    weights: From an engine: the files of the weights in place of the checkpoint's.
    device: torch's name for it.
    attention, recompute, duty_cycle: See `config.TrainerSection`.
    shares: Whether the first message is Share, so that there is no checkpoint to load.
    threads: CPU threads of torch.
    cpus: Logical CPUs to run on. None for all those inherited.
    adapters_root: Directory of saved adapters.
    parent: Process id. When that process ends, this one removes the directory of its socket and ends, too.
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
    """A tensor in another process's GPU memory, by CUDA IPC. Fields as in `torch.multiprocessing.reductions`.

    shape, stride, offset: Of the tensor in its storage, in elements.
    dtype: torch's name for it.
    handle: CUDA's, for the allocation.
    storage_bytes, storage_offset: Of the storage in the allocation, in bytes.
    counter_handle, counter_offset: Of the counter of processes that use it.
    event_handle, wait_for_event: The CUDA event of the last write, and whether to wait for it.
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
    """Any message.

    Fields that several have:

    owner: Number of one request's adapter, never used again.
    slot, bank: Where its weights are, see `slots`.
    version: Number of the block that it was trained on last; 0 is untrained.
    address: Of a version, see `address`.
    reason: Why something failed, for the log and the user.
    """


class Join(Message, frozen=True):
    """An engine's first message, answered by Ready or Unable. What the trainer did for another engine ends.

    probe: Token ids of the text of which Ready has the log-probabilities.
    adapters_root: The engine's, if it has one.
    cache_bytes: Host memory for trained versions that may be needed again.
    cache_files: Their place on disk, if they have one.
    """

    probe: list[int] = []
    adapters_root: str | None = None
    cache_bytes: int = 0
    cache_files: CacheFiles | None = None


class Share(Message, frozen=True):
    """Sent before Join, if Options say so.

    weights: The engine's, under vLLM's names.
    slots: GPU memory of its adapter slots.
    """

    weights: dict[str, SharedTensor]
    slots: SharedTensor


class Leave(Message, frozen=True):
    """The engine's last message: drop all its adapters."""


class OpenSlots(Message, frozen=True):
    """Where the slots are: arguments of `Slots.open`.

    modules: Names of the linear layers that adapters adapt from now on. None for all of `Ready.modules`.
    """

    path: str
    max_rank: int
    num_slots: int
    modules: list[str] | None = None


class Probe(Message, frozen=True):
    """Make an adapter of random weights in the slot's bank 0, as version 0, and forget it.

    Answer: Probed or Failed.

    tokens: Token ids of the text of which Probed has the log-probabilities.
    """

    owner: int
    slot: int
    recipe: Recipe
    tokens: list[int]


class Begin(Message, frozen=True):
    """Make an adapter. Answer: Began or Failed.

    start_from: Name of a saved adapter to load. Its weights are then in bank 0.
    goes_on: The version with its address if that saved adapter's training is to go on. If it is another one
        now, it is version 0.
    """

    owner: int
    slot: int
    recipe: Recipe
    start_from: str | None = None
    goes_on: tuple[int, bytes] | None = None


class Recall(Message, frozen=True):
    """Make an adapter that has just begun a version of it which is remembered. Answer: Recalled or Failed.

    bank: For its weights.
    versions: Versions with their addresses. The first that is remembered is taken.
    """

    owner: int
    slot: int
    bank: int
    versions: list[tuple[int, bytes]]


class Resume(Message, frozen=True):
    """After a restart: make an adapter from the weights in its slot. Its optimizer and dropout start anew.

    Answer: Began or Failed.
    """

    owner: int
    slot: int
    bank: int
    version: int
    recipe: Recipe


class Train(Message, frozen=True):
    """Make `version` by training on one block, or by its address.

    Reports: Started, then the answer, Trained or Failed, then Kept if the version is kept.

    bank: For the trained weights.
    tokens: The example, see `blocks.example`.
    num_targets: How many of its last tokens are targets.
    address: None for a version that is neither kept nor looked up.
    uses: Addresses of versions that are worth keeping, this one among them; the most useful last.
    """

    owner: int
    slot: int
    bank: int
    version: int
    tokens: list[int]
    num_targets: int
    address: bytes | None = None
    uses: list[bytes] = []


class Save(Message, frozen=True):
    """Write the newest weights to adapters_root/name. Answer: Saved or SaveFailed.

    position: Length of the text so far, in tokens.
    chain: Where its training can go on; None if it cannot.
    """

    owner: int
    name: str
    position: int
    chain: "Chain | None" = None


class Drop(Message, frozen=True):
    """Forget an adapter."""

    owner: int


class Ready(Message, frozen=True):
    """The trainer has its model.

    modules: Of every linear layer that may have adapters, under Hugging Face's name, the (in, out) features.
    logprobs: Of every token of the probe after its first, in nats.
    about: What the trainer loaded, in words.
    """

    modules: dict[str, tuple[int, int]]
    logprobs: list[float] = []
    about: str = ""


class Unable(Message, frozen=True):
    """In place of Ready, and the last report: the trainer has no model."""

    reason: str


class Probed(Message, frozen=True):
    """The slot's bank 0 holds the random adapter as version 0.

    logprobs: Of every token after the first, with this adapter, in nats.
    """

    owner: int
    logprobs: list[float]


class Began(Message, frozen=True):
    """The adapter is made.

    content: Names the weights of the saved adapter that it was made from. Empty for any other.
    version: Which it is. Not 0 if the training of a saved adapter goes on.
    """

    owner: int
    content: bytes = b""
    version: int = 0


class Recalled(Message, frozen=True):
    """The adapter is the version; 0 if none was remembered, and it is as it was."""

    owner: int
    version: int


class Started(Message, frozen=True):
    """The training of a version has started. Not an answer."""

    owner: int
    version: int


class Trained(Message, frozen=True):
    """The slot's bank holds the version.

    losses: One per epoch, before its step, in nats per token. Empty for a version that was remembered.
    seconds: What the training took.
    """

    owner: int
    slot: int
    bank: int
    version: int
    losses: list[float]
    seconds: float


class Kept(Message, frozen=True):
    """A version is remembered: it was trained, or another trainer has written it to disk. Not an answer.

    gone: Addresses of versions that are not remembered any more. It may be among them.
    """

    address: bytes
    gone: list[bytes]


class Failed(Message, frozen=True):
    """A Probe, Begin, Recall, Resume or Train failed. The adapter is as it was before.

    version: The version that was not made; 0 for Probe, Begin and Recall.
    """

    owner: int
    version: int
    reason: str


class Saved(Message, frozen=True):
    """The adapter is on disk."""

    owner: int
    name: str


class SaveFailed(Message, frozen=True):
    """The adapter is not saved. What had its name before is unchanged."""

    owner: int
    name: str
    reason: str


class Lost(Message, frozen=True):
    """The trainer does not work for this engine any more."""

    reason: str


class Restarted(Message, frozen=True):
    """From the client, not the trainer: a new trainer process starts.

    Adapters are lost, except what is in the slots.

    So are all jobs that are not answered yet.

    owner: Of the job that the trainer worked on when it ended. None if it had none.
    """

    owner: int | None = None


class Dead(Message, frozen=True):
    """From the client, not the trainer: there is no trainer any more, and no other one is started."""

    reason: str


Job = Share | Join | Leave | OpenSlots | Probe | Begin | Recall | Resume | Train | Save | Drop
Answer = Probed | Began | Recalled | Trained | Failed | Saved | SaveFailed
Report = Ready | Unable | Started | Kept | Answer | Lost | Restarted | Dead
ANSWERED = (Probe, Begin, Recall, Resume, Train, Save)
ANSWERS = get_args(Answer)

encode = msgspec.msgpack.Encoder().encode
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def not_saved(name: str, reason: str) -> str:
    """Stop reason of a request whose adapter could not be saved."""
    return f"longctx: adapter {name!r} was not saved: {reason}"


def chain_of(directory: Path) -> Chain | None:
    """None where the training of a saved adapter cannot go on, or that is not known."""
    try:
        about = json.loads((directory / ABOUT_NAME).read_text())
        chain = msgspec.convert(about["chain"], Chain)
        bytes.fromhex(chain.began_with)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chain


def adapter_path(adapters_root: str | None, name: str) -> Path:
    """The directory of a saved adapter.

    name: A plain one, or a tenant's: `@TENANT/NAME`. Raises ValueError for any other.
    """
    if adapters_root is None:
        remedy = "set it to save adapters or to start from one"
        raise ValueError(f"adapter {name!r}: the server has no adapters_root; {remedy}")
    if not re.fullmatch(OWNED_NAME, name):
        allowed = "up to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"
        raise ValueError(f"adapter name {name!r}: use {allowed}")
    return Path(adapters_root) / name


def shared_fields(struct: type[msgspec.Struct], settings: BaseModel) -> dict[str, Any]:
    """By name, the values of the settings that are fields of a struct, too."""
    names = type(settings).model_fields.keys() & set(struct.__struct_fields__)
    return {name: getattr(settings, name) for name in names}
