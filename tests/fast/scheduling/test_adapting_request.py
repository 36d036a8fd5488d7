"""The states of a request that adapts: what it waits for, which version is where, when a pass begins."""

from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput

from vllm_longctx.engine.step import Pass, Weights
from vllm_longctx.scheduling.adapting_request import AdaptingRequest, PendingSave, Versions, WaitsFor
from vllm_longctx.temp_lora.blocks import Blocks, Window


def adapting(start_from: str | None = None) -> AdaptingRequest:
    """Blocks of 8 tokens from position 0, windows of 32 tokens of which 8 are computed again."""
    request: Any = SimpleNamespace(request_id="a", block_hashes=[])
    settings: Any = SimpleNamespace(epochs=1, learn="all")
    window = Window("reuse", window_tokens=32, context_tokens=8, keep_first=2, kv_block=4)
    return AdaptingRequest(
        request, settings, "book", start_from, Blocks(0, 8, "cascaded"), window, 9, owner=1
    )


def test_what_a_request_waits_for() -> None:
    request = adapting(start_from="old")
    assert request.waits_for is WaitsFor.SLOT
    request.admitted, request.slot = True, 0
    assert request.waits_for is WaitsFor.BEGAN and request.allowance(0) == 0
    request.loaded = True
    request.versions.load(Weights(version=0, bank=0))
    assert request.waits_for is None and request.allowance(0) == 8
    request.frontier = request.checked = 8  # the second block, which version 1 computes
    assert request.waits_for is WaitsFor.VERSION and request.allowance(8) == 0
    request.versions.sent = 1
    request.versions.add(Weights(version=1, bank=1))
    assert request.waits_for is None and request.allowance(8) == 0  # trained, but not approved
    request.versions.approve()
    assert request.allowance(8) == 8
    request.save = PendingSave(EngineCoreOutput("a", []), last_step=3)
    assert request.waits_for is WaitsFor.SAVE


def test_a_version_takes_the_bank_that_is_not_read() -> None:
    versions = Versions()
    assert versions.can_send and versions.free_bank == 0
    versions.sent = 1
    assert versions.in_training and not versions.can_send
    versions.add(Weights(version=1, bank=0))
    assert versions.can_send is False and not versions.in_training  # bank 0 is not read yet, bank 1 may be
    versions.approve()
    assert versions.can_send and versions.free_bank == 1
    versions.sent = 2
    versions.skip()
    versions.approve()
    assert (versions.approved, versions.approved_weights) == (2, Weights(version=1, bank=0))
    assert versions.can_send and versions.free_bank == 1


def test_a_full_window_begins_one_pass() -> None:
    request = adapting()
    request.frontier = 24
    assert not request.begin_pass() and request.pass_of_step(first=24) is None
    request.frontier = 32
    assert request.begin_pass() and request.current_pass.sends_table
    assert request.pass_of_step(first=22) == Pass(first=22, start=24, frontier=32)
    assert not request.begin_pass()
