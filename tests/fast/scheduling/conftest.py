from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig

from tests.support.cuda_engine import BLOCK_SIZE
from tests.support.engine_args import create

NUM_BLOCKS = {"stepped": 12, "keep": 10}  # so few that requests which do not adapt are preempted
SIZES, WINDOW = (
    {"block_tokens": 16, "rank": 4, "slots": 2},
    {"window_tokens": 48, "context_tokens": 20, "keep_first": 3},
)
SETTINGS = {
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
}


@pytest.fixture(params=["stepped", "keep"])
def configs(request: pytest.FixtureRequest, gpu: type, small_llama: Path, tmp_path: Path) -> list[VllmConfig]:
    """Without and with a step ahead."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text('{"r": 4}')
    adaptation: dict[str, Any] = {**SIZES, "trainer": {"device": "cpu"}, "adapters_root": str(tmp_path)}
    section = {"attention": {"n_local": 24, "n_global": 5, "distance_ceiling": 30}, "adaptation": adaptation}
    if request.param == "stepped":
        section = {"attention": {"method": "none"}, "adaptation": {**adaptation, **WINDOW}}
    settings = {**SETTINGS, "num_gpu_blocks_override": NUM_BLOCKS[request.param]}
    made = [
        create(small_llama, {"longctx": section}, **settings, async_scheduling=ahead)
        for ahead in (False, True)
    ]
    for config in made:
        config.cache_config.num_gpu_blocks = NUM_BLOCKS[request.param]
    return made
