"""How many kernels a layer launches."""

import pytest
from gpu import launches


@pytest.mark.parametrize("kind", launches.LAYERS.values())
def test_a_decode_in_graphs_launches_a_handful_of_kernels(kind: str) -> None:
    """All of them are ours; where a graph cannot hold the lookup, several are PyTorch's."""
    in_graphs, eager = (launches.launched(kind, way) for way in (True, False))
    of_lookup = ["_best_blocks_kernel", "_highest_kernel", "_key_scores_kernel", "_highest_kernel"]
    if kind == "blocks":
        of_lookup.insert(2, "_in_turn_kernel")
    if kind == "branch":
        of_lookup.insert(0, "_turn_kernel")
    assert in_graphs == [*of_lookup, "_attend_kernel", "_decode", "_merge"]
    assert {"topk", "_block_scores_kernel"} <= set(eager) and len(eager) > len(in_graphs)
