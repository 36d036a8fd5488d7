"""Readers of vLLM's shared memory that sleep between two looks, and what ends an engine core's wait."""

import queue
import select
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from vllm_longctx.engine.waiting import limit_reader_sleep, listen_to_inputs


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = getattr(
        SpinCondition.wait, "__wrapped__", SpinCondition.wait
    )  # an engine in this process may have wrapped it
    monkeypatch.setattr(SpinCondition, "wait", stock)
    limit_reader_sleep(busy_loop_s=0.0)


def test_a_message_arrives_whose_notification_was_dropped(
    limited: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    monkeypatch.setattr(writer._spin_condition, "notify", lambda: None)
    late = threading.Timer(0.05, lambda: writer.enqueue("late"))
    late.start()
    begin = time.monotonic()
    assert reader.dequeue(timeout=20) == "late"
    assert time.monotonic() - begin < 10
    late.join()


def test_a_reader_that_waits_uses_no_processor(limited: None, tmp_path: Path) -> None:
    with zmq.Context() as context:
        condition = SpinCondition(is_reader=True, context=context, notify_address=f"ipc://{tmp_path}/s")
        condition.record_read()  # vLLM would poll for a second from here on
        begin, used = time.monotonic(), time.thread_time()
        while time.monotonic() - begin < 0.2:
            condition.wait()
        assert time.thread_time() - used < 0.1
        for socket in (
            condition.local_notify_socket,
            condition.read_cancel_socket,
            condition.write_cancel_socket,
        ):
            socket.close()


def test_wrapped_once(limited: None) -> None:
    wait = SpinCondition.wait
    limit_reader_sleep()
    assert SpinCondition.wait is wait


def test_what_comes_to_an_engine_core_ends_its_wait() -> None:
    engine: Any = SimpleNamespace(input_queue=queue.Queue())
    engine.input_queue.put("a worker failed")
    inputs = listen_to_inputs(engine)
    assert inputs is engine.input_queue

    def arrives(seconds: float = 0.0) -> bool:
        return bool(select.select([inputs.arrivals], [], [], seconds)[0])

    assert not inputs.forget_arrivals() and inputs.get_nowait() == "a worker failed"
    assert inputs.forget_arrivals() and not arrives()
    late = threading.Timer(0.05, lambda: inputs.put("late"))
    late.start()
    assert arrives(20) and not inputs.forget_arrivals()
    late.join()
    assert inputs.get() == "late" and inputs.forget_arrivals()
    assert listen_to_inputs(SimpleNamespace()) is None  # type: ignore[arg-type]  # an engine without a process
