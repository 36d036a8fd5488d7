"""Readers of vLLM's shared memory that sleep between two looks."""

import threading
import time
from pathlib import Path

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from vllm_longctx.engine.waiting import limit_reader_sleep


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
