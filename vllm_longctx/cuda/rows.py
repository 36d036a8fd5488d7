"""What metadata builders are told of a step, by row of its batch."""

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_longctx.engine.rows import StepTimes


class StepRows(StepTimes):
    """Of the step to come. The runner writes it before vLLM builds attention metadata.

    Sliding layers need nothing of it.

    starts: int32 [max_num_seqs] on the device, where each row's window or pass begins, 0 behind the last row;
        written in place, since CUDA graphs hold it.
    starts_on_host: The same.
    middle_ends: int64 [rows], where the middle of each request ends for its top-k branch, at most 0 of one
        that does not write; None in steps that vLLM makes up.
    """

    def __init__(self, max_num_seqs: int, device: torch.device):
        self.starts = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.starts_on_host: NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)
        self.middle_ends: NDArray[np.int64] | None = None

    def begin_windows(self, starts: NDArray[np.int32]) -> None:
        """starts: int32 [rows]."""
        self.starts_on_host = np.zeros(len(self.starts), np.int32)
        self.starts_on_host[: len(starts)] = starts
        async_tensor_h2d(self.starts_on_host, out=self.starts)
