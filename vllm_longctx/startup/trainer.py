"""Whether the trainer can train where it is to: checked before it starts."""

import importlib.util
import os
from pathlib import Path

import torch
import zmq

from vllm_longctx.config import LongContextError, TrainerSection
from vllm_longctx.settings import TrainerSettings


def check_trainer(trainer: TrainerSection) -> None:
    """Raises LongContextError if the trainer's device, CPUs or attention are not there, or nobody could be at
    its address.
    """
    check_cpus(trainer)
    if trainer.address is not None:
        check_address(trainer.address)
    device = torch.device(TrainerSettings.of(trainer).device)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if device.index >= found:
            there = f"torch sees {found} GPUs, cuda:0 to cuda:{found - 1}" if found else "torch sees no GPU"
            raise LongContextError(
                f"adaptation.trainer.device = {trainer.device!r}, but {there}; name another, or leave it out"
            )
        if trainer.dtype is not None:
            raise LongContextError(
                f"adaptation.trainer.dtype = {trainer.dtype!r} is for a trainer on the CPU, but "
                f"adaptation.trainer.device is {device}, where it has the engine's; leave dtype out"
            )
    if trainer.attention == "xformers":
        if device.type != "cuda":
            raise LongContextError(
                f"adaptation.trainer.attention = 'xformers' needs a GPU, but adaptation.trainer.device is "
                f"{device}; leave "
                "attention out, or set device"
            )
        if importlib.util.find_spec("xformers") is None:
            raise LongContextError(
                "adaptation.trainer.attention = 'xformers', but xformers is not installed here; install it "
                "(pip install "
                "xformers), or leave attention out"
            )


def check_cpus(trainer: TrainerSection) -> None:
    """Raises LongContextError for CPUs that this process may not use, and for more threads than CPUs."""
    allowed = sorted(os.sched_getaffinity(0))
    there = f"this process may use {', '.join(map(str, allowed))}"
    cpus = allowed if trainer.cpus is None else trainer.cpus
    if not set(cpus) <= set(allowed) or not cpus:
        raise LongContextError(
            f"adaptation.trainer.cpus = {cpus}, but {there}; give some of these, or leave cpus out"
        )
    if trainer.threads > len(set(cpus)):
        raise LongContextError(
            f"adaptation.trainer.threads = {trainer.threads}, but the trainer would have {len(set(cpus))} "
            f"CPUs ({there}); "
            "lower threads, or give it more CPUs"
        )


def check_address(address: str) -> None:
    """Raises LongContextError for an address at which no trainer can be.

    One may still be about to start there.
    """
    scheme, _, path = address.partition("://")
    problem = None if scheme in ("ipc", "tcp") else "only a trainer on this machine can be joined"
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        try:
            socket.connect(address)
        except zmq.ZMQError as e:
            problem = problem or zmq.strerror(e.errno or 0).lower()
    if scheme == "ipc" and not path.startswith("@") and not Path(path).parent.is_dir():
        problem = problem or f"there is no directory {Path(path).parent}"
    if problem is not None:
        raise LongContextError(
            f"adaptation.trainer.address = {address!r}: {problem}; give what the trainer was started with, "
            f"as "
            "ipc:///run/user/1000/trainer (at most 107 bytes after ipc://) or tcp://127.0.0.1:5555"
        )
