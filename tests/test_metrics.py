"""The scheduler's counts, vLLM's loggers with ours in front, and what `doctor` makes of a server's /metrics."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import LoggingStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_longctx import BOOKLM, engine_args
from vllm_longctx.cli.live import live_state, state_table
from vllm_longctx.config import LongContextError
from vllm_longctx.metrics import StepStats
from vllm_longctx.worker import take_selection_seconds

STREAMING = {"longctx": {"preset": "streaming"}}


def create(additional_config: dict[str, Any], **kwargs: Any) -> VllmConfig:
    args = EngineArgs(model=BOOKLM, additional_config=additional_config, served_model_name="books", **kwargs)
    return args.create_engine_config()


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return create(STREAMING)


@pytest.fixture
def exported(config: VllmConfig) -> str:
    """/metrics after a few steps of engine 1 of two, with the logger that would fail on our part of the statistics."""
    manager = StatLoggerManager(config, [0, 1], custom_stat_loggers=[LoggingStatLogger])
    manager.log_engine_initialized()
    for step in (StepStats(7, 5, 100, 2, 0.25), StepStats(8, 1, 2, 2, 0.5), StepStats(0, 0, 0, 0, None)):
        stats = SchedulerStats(num_running_reqs=3, kv_connector_stats={"longctx": vars(step)})
        manager.record(stats, None, engine_idx=1)
        assert stats.kv_connector_stats is None
    manager.record(None, None, engine_idx=1)
    manager.record(SchedulerStats(num_running_reqs=3), None, engine_idx=0)
    text = generate_latest(REGISTRY).decode()
    unregister_vllm_metrics()
    return text


def test_each_engine_has_its_own_sums_and_last_values(exported: str) -> None:
    lines = [line for line in exported.splitlines() if line.startswith("vllm:longctx_")]
    found = dict(line.rsplit(" ", 1) for line in lines if "_bucket" not in line and "_created" not in line)
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
        labels = f'distances="in_cache",engine="{engine}",method="streaming",n_global="4",n_local="508",trained_length="512"'
        expected[f'vllm:longctx_config_info{{distance_ceiling="None",{labels}}}'] = "1.0"
    assert found == expected


@pytest.mark.parametrize("additional_config", [{}, {"longctx": {"attention": {"method": "none"}}}])
def test_an_engine_without_longctx_has_vllms_loggers_only(additional_config: dict) -> None:
    manager = StatLoggerManager(vllm_config=create(additional_config), enable_default_loggers=False)
    assert [type(logger).__name__ for logger in manager.stat_loggers] == ["PrometheusStatLogger"]
    assert b"longctx" not in generate_latest(REGISTRY)
    unregister_vllm_metrics()


def test_the_scheduler_is_ours_or_refused(config: VllmConfig) -> None:
    assert config.scheduler_config.scheduler_cls == engine_args.SCHEDULER
    assert config.scheduler_config.get_scheduler_cls().__name__ == "LongContextScheduler"
    assert create({}).scheduler_config.scheduler_cls is None
    with pytest.raises(LongContextError, match=r"scheduler_cls = 'my.Scheduler', but .* leave scheduler_cls out"):
        create(STREAMING, scheduler_cls="my.Scheduler")


def test_seconds_of_all_groups_are_taken_once() -> None:
    builders = [SimpleNamespace(seconds=s) for s in (0.25, 0.5, 1.0)]
    groups = [SimpleNamespace(get_metadata_builder=lambda builder=builder: builder) for builder in builders]
    runner: Any = SimpleNamespace(attn_groups=[groups[:2], groups[2:]])
    assert (take_selection_seconds(runner), take_selection_seconds(runner)) == (1.75, 0.0)


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


def test_doctor_says_what_is_not_there(exported: str) -> None:
    stock = "\n".join(line for line in exported.splitlines() if "longctx" not in line) + "\n"
    with pytest.raises(ValueError, match=r"http://host:1 serves books without longctx; start it with `vllm serve books --pl"):
        state_table("http://host:1", stock)
    for text in ("<html>hello</html>", "", "python_info 1.0\n"):
        with pytest.raises(ValueError, match=r"it is no vLLM server, or runs with --disable-log-stats"):
            state_table("http://host:1", text)
    with pytest.raises(OSError, match=r"cannot read http://127.0.0.1:1/metrics: .*refused.*; is a server up at this address"):
        live_state("http://127.0.0.1:1/")
    with pytest.raises(OSError, match=r"cannot read localhost:1/metrics: .*unknown url type"):
        live_state("localhost:1/metrics")
