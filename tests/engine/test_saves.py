"""`save_as`, offline, with vLLM's real engine and a real trainer: answered when the adapter is on disk, or
with the reason.
"""

import json
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from tests.support.engines import metric, running_here, sidecars
from vllm_longctx import BOOKLM

BLOCK = 32
RECIPE = {"rank": 4, "dropout": 0.0, "learning_rate": 1e-3, "epochs": 1, "warmup_blocks": 0}
SIZES = {
    "block_tokens": BLOCK,
    "train_context_tokens": 32,
    "window_tokens": 128,
    "context_tokens": 64,
    "slots": 2,
    "cache_gib": 0,  # all tests read one text, and some count what is trained
}
PROMPT = AutoTokenizer.from_pretrained(BOOKLM)(pydoc_data.topics.topics["exprlists"])["input_ids"][:40]
SAVED, FAILED, SAVING = (
    "vllm:longctx_adapters_saved",
    "vllm:longctx_save_failures",
    "vllm:longctx_num_requests_saving",
)

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root") / "adapters"


@pytest.fixture(scope="module")
def llm(adapters: Path) -> Iterator[LLM]:
    adaptation = {**RECIPE, **SIZES, "adapters_root": str(adapters)}
    with running_here(BOOKLM, {"method": "none"}, adaptation=adaptation, skip_tokenizer_init=False) as llm:
        yield llm


def params(tokens: int, stop: list[str] | None = None, **options: Any) -> SamplingParams:
    asked = {"longctx": {"temp_lora": True, **options}}
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, stop=stop, extra_args=asked)


def write(llm: LLM, tokens: int, **kwargs: Any) -> RequestOutput:
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params(tokens, **kwargs), use_tqdm=False)
    return output


def position(directory: Path) -> int:
    return json.loads((directory / "longctx.json").read_text())["position"]


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_what_is_saved_can_be_started_from_at_once(llm: LLM, adapters: Path, times: int) -> None:
    saved = metric(llm, SAVED)
    for number in range(times):
        output = write(llm, number + 10, save_as=f"at-once-{number}")
        assert position(adapters / f"at-once-{number}") == len(PROMPT) + number + 10
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("length", None)
        assert len(write(llm, 3, start_from=f"at-once-{number}").outputs[0].token_ids) == 3
    assert metric(llm, SAVED) == saved + times and metric(llm, FAILED) == 0


def test_training_goes_on_where_it_was_saved(llm: LLM, adapters: Path) -> None:
    """Of a text that begins with what the adapter was trained on. Nothing else is remembered here."""
    options = {"kv_policy": "recompute", "rank": 4}
    (first,) = write(llm, 60, save_as="day-1", **options).outputs
    text = [*PROMPT, *first.token_ids, *PROMPT[:20]]

    def trained_for(text: list[int], **more: Any) -> tuple[int, RequestOutput]:
        before = metric(llm, "vllm:longctx_blocks_trained")
        asked = params(40, **options, **more)
        (output,) = llm.generate([{"prompt_token_ids": text}], asked, use_tqdm=False)
        return int(metric(llm, "vllm:longctx_blocks_trained") - before), output

    (anew, cold), (more, went_on) = trained_for(text), trained_for(text, start_from="day-1")
    assert (anew, more) == (4, 1)
    assert went_on.outputs[0].token_ids == cold.outputs[0].token_ids
    assert went_on.kv_transfer_params == {"longctx": {"blocks_remembered": 3}}
    for other, asked in ((text[1:], {}), (text, {"adapter_seed": 1}), (text, {"learning_rate": 2e-3})):
        blocks, output = trained_for(other, start_from="day-1", **asked)
        assert blocks == 4 and output.kv_transfer_params is None
    assert trained_for(text, start_from="day-1", save_as="day-2", epochs=0)[0] == 0
    assert trained_for(text, start_from="day-2")[0] == 4


def test_one_name_for_many_is_the_last_ones(llm: LLM, adapters: Path) -> None:
    write(llm, 5, save_as="shared")
    prompts = [{"prompt_token_ids": PROMPT}] * 4
    mixed = [
        params(5 + n, save_as="shared") if n % 2 else params(5 + n, start_from="shared") for n in range(4)
    ]
    outputs = llm.generate(prompts, mixed, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [5, 6, 7, 8]
    assert position(adapters / "shared") in (46, 48)


def test_without_training_it_is_saved_as_it_was_made(llm: LLM, adapters: Path) -> None:
    output = write(llm, 50, save_as="untrained", epochs=0)
    assert (adapters / "untrained" / "adapter_model.safetensors").is_file()
    assert (
        write(llm, 50, start_from="untrained", epochs=0).outputs[0].token_ids == output.outputs[0].token_ids
    )


def test_a_stop_string_waits_too(llm: LLM, adapters: Path) -> None:
    full = write(llm, 60).outputs[0]
    stop = full.text[len(full.text) * 2 // 3 :][:4]
    stock = write(llm, 60, stop=[stop]).outputs[0]
    for number in range(5):
        (output,) = write(llm, 60, stop=[stop], save_as=f"stopped-{number}").outputs
        assert (adapters / f"stopped-{number}" / "longctx.json").is_file()
        assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == (
            stock.text,
            stock.token_ids,
            "stop",
            stop,
        )
    (adapters / "taken").mkdir()
    (output,) = write(llm, 60, stop=[stop], save_as="taken").outputs
    assert (output.text, output.finish_reason) == (stock.text, "stop")
    assert output.stop_reason == f"longctx: adapter 'taken' was not saved: ValueError: {TAKEN}"


TAKEN = "'taken' exists in adapters_root and was not saved by longctx; choose another name"


def test_what_cannot_be_saved_is_answered_with_its_tokens(llm: LLM, adapters: Path) -> None:
    expected, failed = write(llm, 30).outputs[0], metric(llm, FAILED)
    away = adapters.rename(adapters.with_name("away"))
    adapters.write_text("in the way")
    output = write(llm, 30, save_as="lost")
    adapters.unlink()
    away.rename(adapters)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (expected.token_ids, "length")
    assert output.outputs[0].stop_reason.startswith("longctx: adapter 'lost' was not saved: ")
    assert output.kv_transfer_params == {"longctx": {"save_error": output.outputs[0].stop_reason}}
    assert metric(llm, FAILED) == failed + 1
    assert write(llm, 30, save_as="lost").outputs[0].stop_reason is None


@pytest.mark.parametrize(
    "tokens", [10, 2 * BLOCK + 1 - len(PROMPT)], ids=["over the save", "over the last block"]
)
def test_a_trainer_that_is_killed_behind_the_last_token_costs_no_adapter(
    llm: LLM, adapters: Path, tokens: int
) -> None:
    name, trained = f"killed-{tokens}", metric(llm, "vllm:longctx_blocks_trained")
    expected = write(llm, tokens, save_as="expected")
    llm.llm_engine.add_request(name, {"prompt_token_ids": PROMPT}, params(tokens, save_as=name))
    (sidecar,) = sidecars()
    seen: list[RequestOutput] = []
    deadline = time.monotonic() + 300

    def step_until(done: Any) -> None:
        while not done():
            seen.extend(llm.llm_engine.step())
            assert time.monotonic() < deadline

    blocks = (len(PROMPT) + tokens - 1) // BLOCK
    step_until(lambda: metric(llm, "vllm:longctx_blocks_trained") == trained + blocks + 1)
    sidecar.suspend()
    step_until(lambda: metric(llm, SAVING) == 1)
    assert not any(o.finished for o in seen) and not (adapters / name).exists()
    sidecar.send_signal(signal.SIGKILL)
    step_until(lambda: not llm.llm_engine.has_unfinished_requests())
    (output,) = (o for o in seen if o.finished)
    assert (
        output.outputs[0].token_ids == expected.outputs[0].token_ids and output.outputs[0].stop_reason is None
    )
    assert position(adapters / name) == len(PROMPT) + tokens
    assert metric(llm, "vllm:longctx_blocks_trained") == trained + 2 * blocks
    if blocks == 1:  # else the last one was trained without the optimizer's state, which is lost
        saved, same = (load_file(adapters / n / "adapter_model.safetensors") for n in (name, "expected"))
        assert all(torch.equal(saved[key], same[key]) for key in same) and saved.keys() == same.keys()
    assert metric(llm, SAVING) == metric(llm, "vllm:longctx_adapter_slots_in_use") == 0


SCRIPT = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    adaptation = {recipe}
    llm = LLM({model!r}, dtype="float32", enforce_eager=True, max_model_len=2048,
        kv_cache_memory_bytes=1 << 28, max_num_seqs=2,
        additional_config={{"longctx": {{"attention": {{"method": "none"}}, "adaptation": adaptation}}}})
    asked = {{"longctx": {{"temp_lora": True, "save_as": "script"}}}}
    params = SamplingParams(max_tokens=60, extra_args=asked)
    llm.generate({{"prompt_token_ids": list(range(100, 140))}}, params)
"""


def test_a_script_that_ends_behind_generate_has_its_adapter(tmp_path: Path) -> None:
    recipe = {**RECIPE, **SIZES, "adapters_root": str(tmp_path / "adapters")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(recipe=recipe, model=str(BOOKLM)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["script"]
    assert (tmp_path / "adapters" / "script" / "adapter_model.safetensors").is_file()
