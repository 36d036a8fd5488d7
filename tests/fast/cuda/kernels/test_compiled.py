"""Kernels compiled for cards that are not there: the interpreter takes what compilers and chips refuse."""

import os
import subprocess
import sys

import pytest

from tests.support import compile_kernels
from tests.support.compile_kernels import CARDS, CASES, EVERY_KERNEL

SMALL = [
    "lambda decode, head 32 float16",
    "lookup, 8B bfloat16 by blocks",
    "windows, 8B bfloat16, decode",
    "swap, bfloat16",
]


@pytest.mark.parametrize(
    "words",
    [SMALL, pytest.param(["--all", *EVERY_KERNEL], marks=pytest.mark.slow)],
    ids=["an H100", "every kernel, every card"],
)
def test_kernels_compile_and_take_what_is_stored(words: list[str]) -> None:
    """Registers, spilled bytes and shared memory. The command has more cases for an H100.

    After a change that is meant, `compile_kernels.py --write` stores what kernels take now.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, compile_kernels.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    cards = CARDS if "--all" in words else [90]
    names = [word for word in words if word != "--all"]
    assert all(f"sm_{card}: " in done.stdout for card in cards)
    assert all(f"{name}: _" in done.stdout for name in names)


def test_another_registers_or_too_much_shared_memory_is_wrong() -> None:
    if not compile_kernels.stored():
        pytest.skip("what is stored is another Triton's")
    name, card = EVERY_KERNEL[0], 90
    expected = compile_kernels.stored()[str(card)][name]
    assert compile_kernels.differences(name, card, expected) == []
    kernel, (registers, spilled, shared) = next(iter(expected.items()))
    for change in (
        [registers + 1, spilled, shared],
        [registers, 8, shared],
        [registers, spilled, shared + 1],
    ):
        (wrong,) = compile_kernels.differences(name, card, {**expected, kernel: change})
        assert "kernel_resources.json has" in wrong
    too_much = {kernel: [registers, spilled, CARDS[card] + 1]}
    assert "takes 232449 bytes of shared memory" in compile_kernels.differences(name, card, too_much)[0]


def test_every_kernel_is_stored_for_every_card() -> None:
    table = compile_kernels.stored()
    if not table:
        pytest.skip("what is stored is another Triton's")
    every = {kernel for rows in table["90"].values() for kernel in rows}
    assert set(table["90"]) == set(CASES)
    for card in CARDS:
        assert {kernel for name in EVERY_KERNEL for kernel in table[str(card)][name]} == every
