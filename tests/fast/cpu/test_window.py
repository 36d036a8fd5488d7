"""A pass in a batch: tables, lengths and slots are counted from the pass's first position, other rows
stay.
"""

from types import SimpleNamespace

import torch

from vllm_longctx.cpu.rows import WindowRow
from vllm_longctx.cpu.window import shifted

BLOCK = 4


def test_rows_of_a_pass_are_shifted_and_others_stay() -> None:
    """Row 0 is 9 tokens long and decodes.

    Row 1 began its pass at 6 (block 1), is 15 long and computes its last 5.
    """
    slots = torch.tensor([8 * BLOCK + 0, -1, -1, -1, -1, -1])
    m = SimpleNamespace(
        seq_lens=torch.tensor([9, 15], dtype=torch.int32),
        block_table_tensor=torch.tensor([[5, 7, 8, 0, 0], [0, 11, 12, 13, 0]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 1, 6], dtype=torch.int32),
        slot_mapping=slots,
    )
    new = shifted(m, (WindowRow(1, 6),), BLOCK)  # type: ignore[arg-type]
    assert new.seq_lens.tolist() == [9, 9]
    assert new.block_table_tensor.tolist() == [[5, 7, 8], [11, 12, 13]]
    # entries 4 .. 8 of the pass: all of block 12 and the first of block 13
    assert slots.tolist() == [32, *(12 * BLOCK + i for i in range(4)), 13 * BLOCK]
    assert m.seq_lens.tolist() == [9, 15]
