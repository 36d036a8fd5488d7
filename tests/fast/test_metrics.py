"""The scheduler's counts, vLLM's loggers with ours in front, and what `doctor` makes of a server's
/metrics.
"""

from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.metrics.loggers import LoggingStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_longctx import BOOKLM
from vllm_longctx.cli.live import live_state, state_table
from vllm_longctx.config import LongContextError
from vllm_longctx.engine import rows
from vllm_longctx.engine.layers import engine_backend
from vllm_longctx.engine.rows import StepTimes
from vllm_longctx.metrics import StepStats

STREAMING = {"longctx": {"preset": "streaming"}}
TEMP_LORA = {"longctx": {"preset": "temp-lora-quality"}}


def create(additional_config: dict[str, Any], **kwargs: Any) -> VllmConfig:
    args = EngineArgs(model=BOOKLM, additional_config=additional_config, served_model_name="books", **kwargs)
    return args.create_engine_config()


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return create(STREAMING)


def exported_by(config: VllmConfig, steps: list[StepStats]) -> str:
    """/metrics after these steps of engine 1 of two, with the logger that would fail on our part of the
    statistics.
    """
    manager = StatLoggerManager(config, [0, 1], custom_stat_loggers=[LoggingStatLogger])
    manager.log_engine_initialized()
    for step in steps:
        stats = SchedulerStats(num_running_reqs=3, kv_connector_stats={"longctx": vars(step)})
        manager.record(stats, None, engine_idx=1)
        assert stats.kv_connector_stats is None
    manager.record(None, None, engine_idx=1)
    manager.record(SchedulerStats(num_running_reqs=3), None, engine_idx=0)
    text = generate_latest(REGISTRY).decode()
    unregister_vllm_metrics()
    return text


@pytest.fixture
def exported(config: VllmConfig) -> str:
    return exported_by(
        config, [StepStats(7, 5, 100, 2, 0.25), StepStats(8, 1, 2, 2, 0.5), StepStats(0, 0, 0, 0, None)]
    )


@pytest.fixture
def adapting() -> str:
    steps = [
        StepStats(
            slots_in_use=2,
            held_requests=1,
            saving_requests=1,
            train_queue=2,
            versions_behind=3,
            idle_steps=1,
            adapted_tokens=40,
            blocks_trained=2,
            train_failures=1,
            trainer_restarts=1,
            adapters_saved=2,
            save_failures=1,
            swap_seconds=[0.002, 0.004],
            hold_seconds=[0.5],
            train_seconds=[0.25, 0.75],
            losses=[(4.0, 3.0), (2.0, 1.5)],
        ),
        StepStats(
            slots_in_use=4,
            held_requests=3,
            saving_requests=2,
            train_queue=3,
            versions_behind=5,
            adapted_tokens=2,
            blocks_trained=1,
            adapters_saved=1,
            train_seconds=[2.0],
            losses=[(6.0, 3.0)],
        ),
    ]
    return exported_by(create(TEMP_LORA), steps)


def samples(text: str) -> dict[str, str]:
    """Those of ours but buckets, by name and labels."""
    lines = [line for line in text.splitlines() if line.startswith("vllm:longctx_")]
    return dict(line.rsplit(" ", 1) for line in lines if "_bucket" not in line and "_created" not in line)


def test_each_engine_has_its_own_sums_and_last_values(exported: str) -> None:
    names = {
        "live_kv_blocks": 0,
        "num_requests_past_trained": 0,
        "freed_kv_blocks_total": 6,
        "tokens_past_trained_total": 102,
        "selection_time_seconds_count": 2,
        "selection_time_seconds_sum": 0.75,
    }
    expected = {
        f'vllm:longctx_{name}{{engine="{engine}",model_name="books"}}': str(float(value if engine else 0))
        for name, value in names.items()
        for engine in (0, 1)
    }
    for engine in (0, 1):
        labels = (
            f'distances="in_cache",engine="{engine}",method="streaming",n_global="4",n_local="508",'
            'trained_length="512"'
        )
        expected[f'vllm:longctx_config_info{{distance_ceiling="None",{labels}}}'] = "1.0"
    assert samples(exported) == expected


def test_what_adapts_is_counted_beside_it(adapting: str) -> None:
    expected = {
        "adapter_slots_in_use": 4,
        "num_requests_held": 3,
        "num_requests_saving": 2,
        "train_queue_blocks": 3,
        "versions_behind": 5,
        "idle_steps_total": 1,
        "adapted_tokens_total": 42,
        "blocks_trained_total": 3,
        "train_failures_total": 1,
        "trainer_restarts_total": 1,
        "adapters_saved_total": 3,
        "save_failures_total": 1,
        "swap_time_seconds_count": 2,
        "swap_time_seconds_sum": 0.006,
        "hold_time_seconds_count": 1,
        "hold_time_seconds_sum": 0.5,
        "train_time_seconds_count": 3,
        "train_time_seconds_sum": 3.0,
        "block_loss_before_count": 3,
        "block_loss_before_sum": 12.0,
        "block_loss_after_count": 3,
        "block_loss_after_sum": 7.5,
    }
    found = samples(adapting)
    for name, value in expected.items():
        assert float(found[f'vllm:longctx_{name}{{engine="1",model_name="books"}}']) == pytest.approx(
            value
        ), name
        assert float(found[f'vllm:longctx_{name}{{engine="0",model_name="books"}}']) == 0, name
    for bound, count in {"0.25": 1, "0.5": 1, "1.0": 2, "2.5": 3}.items():
        assert (
            f'vllm:longctx_train_time_seconds_bucket{{engine="1",le="{bound}",model_name="books"}} '
            f"{count}.0\n" in adapting
        )


def test_memory_of_its_own_is_shown(exported: str) -> None:
    attention = {"method": "focused", "mem_layers": [3], "memory_limit_gib": 0.5}
    text = exported_by(
        create({"longctx": {"attention": attention}}),
        [StepStats(memory_usage=0.5), StepStats(memory_usage=0.25)],
    )
    found = samples(text)
    assert [found[f'vllm:longctx_memory_usage_perc{{engine="{e}",model_name="books"}}'] for e in (0, 1)] == [
        "0.0",
        "0.25",
    ]
    rows = {label: values for label, *values in shown("http://host:1", text)}
    assert rows["memory of memory layers used"] == ["0.0%", "25.0%"]
    assert "memory_usage" not in exported


@pytest.mark.parametrize("additional_config", [{}, {"longctx": {"attention": {"method": "none"}}}])
def test_an_engine_without_longctx_has_vllms_loggers_only(additional_config: dict) -> None:
    manager = StatLoggerManager(vllm_config=create(additional_config), enable_default_loggers=False)
    assert [type(logger).__name__ for logger in manager.stat_loggers] == ["PrometheusStatLogger"]
    assert [line for line in generate_latest(REGISTRY).splitlines() if b"longctx" in line] == []
    unregister_vllm_metrics()


def test_the_scheduler_is_ours_or_refused(config: VllmConfig) -> None:
    assert config.scheduler_config.scheduler_cls == "vllm_longctx.scheduling.scheduler.LongContextScheduler"
    assert config.scheduler_config.get_scheduler_cls().__name__ == "LongContextScheduler"
    assert create({}).scheduler_config.scheduler_cls is None
    with pytest.raises(
        LongContextError, match=r"scheduler_cls = 'my.Scheduler', but .* leave scheduler_cls out"
    ):
        create(STREAMING, scheduler_cls="my.Scheduler")


def test_seconds_of_all_groups_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a group's role is: each builder of an engine is timed, also one that fails."""
    clock = iter([1.0, 1.25, 2.0, 2.5, 3.0, 4.0])
    monkeypatch.setattr(rows.time, "perf_counter", lambda: next(clock))
    step_rows = StepTimes()

    class Stock(AttentionMetadataBuilder):
        def __init__(self, outcome: Any):
            self.outcome = outcome

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            return self.outcome["metadata"]

    class Backend(CPUAttentionBackend):
        @staticmethod
        def get_builder_cls() -> Any:
            return Stock

    builder = engine_backend(Backend, step_rows, lambda spec: spec, 0).get_builder_cls()
    assert issubclass(builder, Stock) and builder.__name__ == "Stock"
    assert [builder({"metadata": n}).build(0, None) for n in (1, 2)] == [1, 2]
    with pytest.raises(KeyError):
        builder({}).build(0, None)
    assert (step_rows.take_selection_seconds(), step_rows.take_selection_seconds()) == (1.75, 0.0)


def shown(url: str, text: str) -> list[list[str]]:
    table = state_table(url, text)
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_doctor_shows_the_engines_of_a_server_beside_each_other(exported: str) -> None:
    rows = {label: values for label, *values in shown("http://host:1", exported)}
    assert rows["method"] == ["streaming", "streaming"]
    assert rows["requests running"] == ["3", "3"]
    assert rows["KV blocks freed so far"] == ["0", "6"]
    assert rows["tokens past the trained length so far"] == ["0", "102"]
    assert rows["selection time per step"] == ["no step yet", "375.00 ms"]


def test_doctor_shows_what_adapts(adapting: str, exported: str) -> None:
    rows = {label: values for label, *values in shown("http://host:1", adapting)}
    assert rows["method"] == ["none", "none"]
    assert rows["adapter slots in use"] == ["0", "4"]
    assert rows["requests held"] == ["0", "3"]
    assert rows["blocks in training or waiting for it"] == ["0", "3"]
    assert rows["blocks read or written but not trained yet"] == ["0", "5"]
    assert rows["blocks trained so far"] == ["0", "3"]
    assert rows["blocks that could not be trained so far"] == ["0", "1"]
    assert rows["restarts of the trainer so far"] == ["0", "1"]
    assert rows["requests waiting for their save"] == ["0", "2"]
    assert rows["adapters saved so far"] == ["0", "3"]
    assert rows["adapters that could not be saved so far"] == ["0", "1"]
    assert rows["time per swap"] == ["no swap yet", "3.00 ms"]
    assert rows["time per hold"] == ["no hold yet", "500.00 ms"]
    assert rows["training time per block"] == ["no block yet", "1000.00 ms"]
    assert rows["loss per token before training"] == ["no block yet", "4.000"]
    assert rows["loss per token after training"] == ["no block yet", "2.500"]
    assert "adapter slots in use" not in {label for label, *_ in shown("http://host:1", exported)}


def test_doctor_says_what_is_not_there(exported: str) -> None:
    stock = "\n".join(line for line in exported.splitlines() if "longctx" not in line) + "\n"
    with pytest.raises(
        ValueError, match=r"http://host:1 serves books without longctx; start it with `vllm serve books --pl"
    ):
        state_table("http://host:1", stock)
    for text in ("<html>hello</html>", "", "python_info 1.0\n"):
        with pytest.raises(ValueError, match=r"it is no vLLM server, or runs with --disable-log-stats"):
            state_table("http://host:1", text)
    with pytest.raises(
        OSError, match=r"cannot read http://127.0.0.1:1/metrics: .*refused.*; is a server up at this address"
    ):
        live_state("http://127.0.0.1:1/")
    with pytest.raises(OSError, match=r"cannot read localhost:1/metrics: .*unknown url type"):
        live_state("localhost:1/metrics")
