"""A request that has something to save is answered once, whatever its trainer does.

With the adapter on disk or with the reason why not; on the CPU, over both of vLLM's schedulers, with the
worker and the trainer of `tests.support.temp_lora_crowd`.
"""

import random
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.request import Request, RequestStatus

from tests.support.temp_lora_crowd import STOP, VOCABULARY, Crowd, Trainer
from vllm_longctx import BOOKLM
from vllm_longctx.serving import stop_strings
from vllm_longctx.settings import active_settings
from vllm_longctx.temp_lora.messages import ANSWERED, Dead, Failed, Report, Restarted, Save, Train, not_saved

SEEDS = 3
GONE = "the trainer ended with code -9"
pytestmark = pytest.mark.parametrize("steps_ahead", [pytest.param(0, marks=pytest.mark.slow), 1])


class Savers(Crowd):
    """All requests adapt and are to be saved; half of them have stop strings, so that an abort may mean that
    one was found.

    at_answer: by request, what was saved under its name when it was answered.
    """

    abort_rate = 0.02
    faults: Mapping[int, Restarted | Dead] = MappingProxyType({})
    unsaved: frozenset[str] = frozenset()
    on_failure = "continue"

    def __init__(
        self,
        config: VllmConfig,
        seed: int,
        steps_ahead: int,
        monkeypatch: pytest.MonkeyPatch,
        number: int = 5,
        **kwargs: Any,
    ):
        vars(self).update(kwargs, number=number)
        super().__init__(config, seed, steps_ahead, monkeypatch)
        self.scheduler.jobs.settings = self.scheduler.temp_lora.model_copy(
            update={"on_failure": self.on_failure}
        )
        self.at_answer: dict[str, tuple[int, int] | None] = {}

    def make_trainer(self) -> Trainer:
        return Trainer(self.timing, self.faults, self.unsaved)

    def add_requests(self, rng: random.Random) -> None:
        for number in range(self.number):
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 60))]
            options = {
                "update_mode": rng.choice(["cascaded", "parallel"]),
                "epochs": rng.choice([0, 1, 1, 1]),
            }
            self.add_saver(
                f"{number}",
                prompt,
                rng.randrange(1, 50),
                stop=["x"] if rng.random() < 0.5 else None,
                **options,
            )

    def add_saver(
        self,
        name: str,
        prompt: list[int],
        tokens: int,
        stop: list[str] | None = None,
        ignore_stop: bool = False,
        **options: Any,
    ) -> Request:
        has_passes = active_settings(self.scheduler.vllm_config).temp_lora.has_passes
        asked = {
            "temp_lora": True,
            "save_as": f"book-{name}",
            "kv_policy": "reuse" if has_passes else "keep",
            **options,
        }
        params = {
            "max_tokens": tokens,
            "stop_token_ids": [] if ignore_stop else [STOP],
            "stop": stop,
            "logprobs": None,
            "prompt_logprobs": None,
        }
        return self.add(name, prompt, {"longctx": asked}, **params)

    def look_at_outputs(self) -> None:
        super().look_at_outputs()
        for name, outputs in self.outputs.items():
            if outputs and outputs[-1].finished and name not in self.at_answer:
                self.at_answer[name] = self.trainer.saved.get(f"book-{name}")

    def error(self, name: str) -> str | None:
        """Of a request that has been answered; checked: the answer, against what is saved."""
        request, outputs = self.requests[name], self.outputs[name]
        *_, last = outputs
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True], (
            "answered once, at the end"
        )
        assert [t for o in outputs for t in o.new_token_ids] == list(request.output_token_ids)
        reason = request.get_finished_reason()
        assert last.finish_reason == (FinishReason.STOP if reason == FinishReason.ABORT else reason)
        if last.finish_reason == FinishReason.ERROR:
            return last.stop_reason
        if last.kv_transfer_params is None:
            assert self.at_answer[name] == self.trainer.saved[f"book-{name}"]
            assert self.at_answer[name][0] == request.num_tokens
            return None
        assert last.stop_reason.startswith(f"longctx: adapter 'book-{name}' was not saved: ")
        assert last.kv_transfer_params == {"longctx": {"save_error": last.stop_reason}}
        return last.stop_reason

    def errors(self) -> dict[str, str]:
        """Of all requests but those that their clients have left."""
        found = {}
        for name, request in self.requests.items():
            found_stop = bool(request.sampling_params.stop) and request.num_output_tokens > 0
            if request.status == RequestStatus.FINISHED_ABORTED and not found_stop:
                assert not any(o.finished for o in self.outputs[name])
                assert f"book-{name}" not in self.trainer.saved
            elif (error := self.error(name)) is not None:
                found[name] = error
        return found


def test_a_restart_costs_no_save(
    steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it falls, all is saved, and it is what a trainer saves that never fails."""
    retried = 0
    for seed in range(SEEDS):
        calm = Savers(configs[steps_ahead], seed, steps_ahead, monkeypatch, abort_rate=0.0)
        calm.run()
        assert calm.errors() == {} and len(calm.trainer.saved) == 5
        saves = [poll + 1 for poll, job in calm.trainer.sent if isinstance(job, Save)]
        for at in {*saves, *random.Random(seed).sample(range(2, calm.trainer.polls), 3)}:
            crowd = Savers(
                configs[steps_ahead], seed, steps_ahead, monkeypatch, abort_rate=0.0, faults={at: Restarted()}
            )
            crowd.run()
            assert crowd.errors() == {}
            assert crowd.trainer.saved == calm.trainer.saved
            retried += sum(isinstance(job, Save) for _, job in crowd.trainer.sent) - 5
    assert retried >= 5 * SEEDS


class Poisoned(Trainer):
    """Dies over every block with a token that no other text has, and over a name."""

    def send(self, job: Any) -> None:
        self.unanswered += [job.owner] * isinstance(job, ANSWERED)
        self.jobs.append((self.polls + 1, job))

    def poll(self) -> list[Report]:
        if self.jobs and self.dies_over(self.jobs[0][1]):
            self.faults = {self.polls + 1: Restarted()}
        return super().poll()

    def _do(self, job: Any) -> list[Report]:
        if self.dies_over(job):
            self.jobs.appendleft((self.polls + 1, job))
            return []
        return super()._do(job)

    def dies_over(self, job: Any) -> bool:
        return (
            VOCABULARY in job.tokens
            if isinstance(job, Train)
            else isinstance(job, Save) and job.name == "book-fatal"
        )


def test_what_ends_the_trainer_is_nobody_elses_loss(
    steps_ahead: int,
    configs: list[VllmConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(SEEDS):
        crowds = [
            Savers(configs[steps_ahead], seed, steps_ahead, monkeypatch, abort_rate=0.0) for _ in range(2)
        ]
        crowds[1].scheduler.jobs.trainer = crowds[1].trainer = Poisoned(crowds[1].timing, {})
        for crowd in crowds:
            crowd.add_saver("bad", [VOCABULARY] * 40, 20)
            crowd.add_saver("fatal", [1, 2, 3], 20)
            crowd.run()
        assert crowds[0].errors() == {}
        assert crowds[1].errors() == {"fatal": not_saved("book-fatal", "the trainer died over it again")}
        calm, poisoned = (crowd.trainer.saved for crowd in crowds)
        assert calm.pop("book-bad") != poisoned.pop("book-bad") and calm.pop("book-fatal")
        assert calm == poisoned and len(calm) == 5


def test_faults_at_any_time_are_answered(
    steps_ahead: int,
    configs: list[VllmConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors, saved = [], 0
    for seed in range(6 * SEEDS):
        rng = random.Random(seed)
        faults: dict[int, Restarted | Dead] = {}
        for at in rng.sample(range(1, 150), rng.randrange(9)):
            faults |= {at: Restarted(), at + rng.randrange(1, 4): Restarted()}
        if rng.random() < 0.4:
            faults[rng.randrange(1, 150)] = Dead(GONE)
        settings = {
            "faults": faults,
            "unsaved": frozenset(["book-1"]),
            "on_failure": rng.choice(["continue", "fail"]),
        }
        crowd = Savers(configs[steps_ahead], seed, steps_ahead, monkeypatch, **settings)
        crowd.run()
        errors += crowd.errors().values()
        saved += len(crowd.trainer.saved)
        assert "book-1" not in crowd.trainer.saved
        stats = crowd.scheduler.step_stats
        assert (
            not crowd.scheduler.jobs.by_owner
            and not crowd.scheduler.saves.waiting
            and stats.saving_requests == 0
        )
    for reason in (GONE, "no space left", "Temp-LoRA: it so happens"):
        assert any(reason in error for error in errors), reason
    assert saved > SEEDS


def test_a_lost_trainer_is_told_at_every_place_in_a_block(
    steps_ahead: int,
    configs: list[VllmConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = set()
    for tokens in range(1, 19):
        for at in (2, tokens + 4):
            crowd = Savers(
                configs[steps_ahead], 0, steps_ahead, monkeypatch, 0, abort_rate=0.0, faults={at: Dead(GONE)}
            )
            request = crowd.add_saver("late", [1, 2, 3], tokens, ignore_stop=True)
            crowd.run()
            assert request.num_output_tokens == tokens
            told.add(crowd.error("late"))
    assert not_saved("book-late", GONE) in told


def test_a_last_block_that_is_lost_is_told_where_blocks_must_not_be_lost(
    steps_ahead: int,
    configs: list[VllmConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for on_failure, error in (("continue", None), ("fail", "block 1 was not trained: it diverged")):
        crowd = Savers(
            configs[steps_ahead], 0, steps_ahead, monkeypatch, 0, abort_rate=0.0, on_failure=on_failure
        )
        do = crowd.trainer._do

        def diverge(job: Any, do: Any = do) -> Any:
            return [Failed(job.owner, job.version, "it diverged")] if isinstance(job, Train) else do(job)

        monkeypatch.setattr(crowd.trainer, "_do", diverge)
        crowd.add_saver("late", [1, 2, 3], 14, ignore_stop=True)
        crowd.run()
        assert crowd.error("late") == (error and not_saved("book-late", error))
        assert crowd.outputs["late"][-1].finish_reason == FinishReason.LENGTH


class FrontEnd(Savers):
    """With vLLM's front end before it: `LLMEngine.step`, and one request."""

    def write(self, stop: list[str] | None) -> CompletionOutput:
        self.processor = OutputProcessor(AutoTokenizer.from_pretrained(BOOKLM), log_stats=False)
        self.told: list[RequestOutput] = []
        params = SamplingParams(stop=stop, max_tokens=40, output_kind=RequestOutputKind.FINAL_ONLY)
        empty = dict.fromkeys(
            ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
        )
        request = EngineCoreRequest(
            "late", [1, 2, 3], sampling_params=params, arrival_time=0.0, external_req_id="1", **empty
        )
        stop_strings.mark_for_save(request, "book-late")
        self.processor.add_request(request, None)
        self.add_saver("late", [1, 2, 3], 40, stop=stop, ignore_stop=True)
        steps = 0
        while self.processor.has_unfinished_requests():
            self.step()
            steps += 1
            assert steps < 1000, "no answer comes"
        (output,) = self.told
        return output.outputs[0]

    def look_at_outputs(self) -> None:
        known = len(self.outputs["late"])
        super().look_at_outputs()
        processed = self.processor.process_outputs(self.outputs["late"][known:])
        self.told += processed.request_outputs
        if processed.request_outputs:
            self.at_answer["late"] = self.trainer.saved.get("book-late")
        if processed.reqs_to_abort:
            self.scheduler.finish_requests(processed.reqs_to_abort, RequestStatus.FINISHED_ABORTED)


def test_a_stop_string_is_answered_once_the_adapter_is_saved(
    steps_ahead: int,
    configs: list[VllmConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_strings.wait_for_saves()
    front_ends = [
        FrontEnd(configs[steps_ahead], 0, steps_ahead, monkeypatch, 0, unsaved=u)
        for u in ([], [], ["book-late"])
    ]
    full = front_ends[0].write(None)
    stop = full.text[20:23]
    for front_end, reason in (
        (front_ends[1], stop),
        (front_ends[2], not_saved("book-late", "no space left on device")),
    ):
        output = front_end.write([stop])
        assert (output.text, output.finish_reason, output.stop_reason) == (
            full.text[: full.text.index(stop)],
            "stop",
            reason,
        )
        assert len(output.token_ids) < len(full.token_ids) == 40
        assert (front_end.at_answer["late"] is None) == (front_end is front_ends[2])


@pytest.fixture
def ended(steps_ahead: int, configs: list[VllmConfig], monkeypatch: pytest.MonkeyPatch) -> Savers:
    """With one request that has written all it is to write. For some steps its trainer said nothing.

    Something came to the engine core meanwhile, or it would have waited.
    """
    crowd = Savers(configs[steps_ahead], 0, steps_ahead, monkeypatch, 0)
    crowd.add_saver("late", list(range(20)), 20, ignore_stop=True)
    while "late" not in crowd.scheduler.saves.waiting:
        crowd.step()
    poll = crowd.trainer.poll
    monkeypatch.setattr(crowd.trainer, "poll", list)
    monkeypatch.setattr(crowd.scheduler, "inputs", SimpleNamespace(arrivals=0, forget_arrivals=lambda: False))
    for _ in range(5):
        crowd.step()
    assert len(crowd.outputs["late"]) == 19 and not crowd.outputs["late"][-1].finished
    monkeypatch.setattr(crowd.trainer, "poll", poll)
    monkeypatch.setattr(crowd.scheduler, "inputs", None)
    return crowd


def test_a_request_that_waits_for_its_save_has_a_slot_and_no_blocks(ended: Savers) -> None:
    scheduler, pool = ended.scheduler, ended.managers[0].block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 and scheduler.reserved_blocks == 0
    assert scheduler.has_requests() and not scheduler.has_unfinished_requests()
    assert len(scheduler.free_slots) == 1
    beside = ended.add_saver("beside", [1, 2, 3], 30, ignore_stop=True)
    ended.run()
    assert (ended.error("late"), ended.error("beside"), beside.num_output_tokens) == (None, None, 30)


def test_a_client_that_leaves_while_it_waits_loses_nothing(ended: Savers) -> None:
    ended.abort("late")
    ended.run()
    assert ended.error("late") is None and "book-late" in ended.trainer.saved


def test_an_engine_that_ends_answers_at_once(ended: Savers, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's engine core does when it shuts down, and when it is paused; what still writes is not
    saved.
    """
    monkeypatch.setattr(ended.trainer, "poll", list)
    writing = ended.add_saver("writing", [1, 2, 3], 90, stop=["x"], ignore_stop=True)
    while writing.num_output_tokens < 5:
        ended.step()
    assert ended.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED) == [writing]
    ended.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(4):
        if ended.scheduler.has_requests() or ended.under_way:
            ended.step()
    assert not ended.scheduler.has_requests() and sorted(ended.scheduler.free_slots) == [0, 1]
    assert "the engine was paused or shut down" in ended.error("late")
    assert not any(o.finished for o in ended.outputs["writing"])


def test_statistics_come_with_the_answer(ended: Savers, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    make_stats = ended.scheduler.make_stats

    def kept(*args: Any, **kwargs: Any) -> Any:
        stats = make_stats(*args, **kwargs)
        made.append(stats.kv_connector_stats["longctx"])
        return stats

    monkeypatch.setattr(ended.scheduler, "make_stats", kept)
    while "late" not in ended.at_answer:
        ended.step()
    assert [s["saving_requests"] for s in made] == [1] * (len(made) - 1) + [0]
    assert made[-1]["slots_in_use"] == 0
    assert [s["adapters_saved"] for s in made] == [0] * (len(made) - 1) + [1]
