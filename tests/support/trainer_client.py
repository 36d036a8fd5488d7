"""What a trainer process reports."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from vllm_longctx.config import TrainerSection
from vllm_longctx.settings import TrainerSettings
from vllm_longctx.temp_lora import messages as m
from vllm_longctx.temp_lora.client import TrainerClient, TrainingNeed

TIMEOUT_S = 120  # a start takes a few seconds on an idle machine


def client_of(
    model: Path | str,
    dtype: str = "float32",
    *,
    max_rank: int = 8,
    num_slots: int = 3,
    adapters_root: Path | None = None,
    probe: Sequence[int] = (),
    share: Callable[[], m.Share] | None = None,
    cache_files: m.CacheFiles | None = None,
    **given: object,
) -> TrainerClient:
    """As the scheduler makes it, with a cache of 1 GiB where that has a place on disk.

    given: of a TrainerSection.
    """
    trainer = TrainerSettings.of(TrainerSection(**given))
    options = m.Options(
        **{**m.shared_fields(m.Options, trainer), "address": trainer.address or "", "dtype": dtype},
        model=str(model),
        shares=share is not None,
        adapters_root=None if adapters_root is None else str(adapters_root),
        parent=os.getpid(),
    )
    return TrainerClient(
        options,
        trainer,
        max_rank=max_rank,
        num_slots=num_slots,
        probe=probe,
        training=TrainingNeed(0, "", cache_bytes=0 if cache_files is None else 1 << 30),
        cache_files=cache_files,
        share=share,
    )


# What `hear` has polled and not returned.
_unheard: WeakKeyDictionary[TrainerClient, deque[m.Report]] = WeakKeyDictionary()


def hear(client: TrainerClient, *kinds: type) -> list[m.Report]:
    """All reports since the last call, up to the first of one of the kinds."""
    reports, unheard, end = [], _unheard.setdefault(client, deque()), time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if not unheard:
            client.wait(max(end - time.monotonic(), 0.0))
            unheard.extend(client.poll())
        while unheard:
            reports.append(unheard.popleft())
            if isinstance(reports[-1], kinds):
                return reports
    raise AssertionError(f"none of {kinds} in {reports}")
