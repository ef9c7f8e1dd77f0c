"""Sum of each segment of a vector, one program per segment, in a fixed order (an atomic index_add has none)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ampo_fast.kernels.launch import launch


@triton.jit
def segment_kernel(values_R, offsets_M, sum_M, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    first = tl.load(offsets_M + segment)
    last = tl.load(offsets_M + segment + 1)
    lanes = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lanes += tl.load(values_R + at, mask=at < last, other=0.0)
    tl.store(sum_M + segment, tl.sum(lanes, 0))


def segment_sum(values_R: torch.Tensor, offsets_M: torch.Tensor) -> torch.Tensor:
    """float32 [M]; values float32 [R], offsets int64 [M + 1] on the device."""
    sum_M = values_R.new_zeros(offsets_M.numel() - 1)
    if sum_M.numel():
        launch(segment_kernel, sum_M.numel(), values_R, offsets_M, sum_M, BLOCK=256, num_warps=1)
    return sum_M
