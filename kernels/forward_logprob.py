"""Log-probs of given targets without logits: a GEMM whose epilogue is an online softmax. For scoring and reference passes.

R rows, D hidden, V vocab, S splits of the vocabulary. A program holds BLOCK_R rows and walks one split of the vocabulary,
tile by tile; its running maximum and sum are merged with those of the other splits, in order, by a second kernel. No
atomics: the same input gives the same bits.

It is bound by the L2: a 128 x 128 tile asks for a byte every 64 FLOPs, 15 TB/s at an H100's peak. cuBLAS with a buffer of
logits is faster; this one needs no buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ampo_fast.kernels.launch import launch
from ampo_fast.kernels.row_pass import at_most_zero


@triton.jit
def split_kernel(
    hidden_RD, weight_VD, bias_V, target_R, top_SR, sum_SR, target_SR, eos_SR,
    num_rows, num_tokens, num_splits, hidden_stride, weight_stride, tokens_per_split, eos_id, softcap, inv_temperature,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_EOS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(max, sum of exp, target's z, EOS's z) of BLOCK_R rows over one split of the vocabulary."""
    # The splits of one block of rows run side by side: few rows are in flight at a time and stay in the L2.
    split = tl.program_id(0) % num_splits
    rows = tl.program_id(0) // num_splits * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    target = tl.load(target_R + rows, mask=is_row, other=-1)
    # A finite number, so that a tile of nothing but -inf, ruled out by the bias, has a sum of 0, not NaN.
    top = tl.full((BLOCK_R,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    # NaN where the target is no token: nobody waits for the device to say so, and the log-prob must not look sound.
    z_target = tl.where((target >= 0) & (target < num_tokens), 0.0, float("nan"))
    z_eos = tl.zeros((BLOCK_R,), tl.float32)
    row_offset = rows.to(tl.int64)[:, None] * hidden_stride
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    for start in range(first, last, BLOCK_V):
        tokens = start + tl.arange(0, BLOCK_V)
        is_token = tokens < last
        token_offset = tokens.to(tl.int64)[:, None] * weight_stride
        z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            inner = d + tl.arange(0, BLOCK_D)
            is_inner = (inner < D)[None, :]
            h = tl.load(hidden_RD + row_offset + inner[None, :], mask=is_row[:, None] & is_inner, other=0.0)
            w = tl.load(weight_VD + token_offset + inner[None, :], mask=is_token[:, None] & is_inner, other=0.0)
            z = tl.dot(h, tl.trans(w), z, input_precision="ieee" if EXACT else "tf32")
        if HAS_BIAS:
            z += tl.load(bias_V + tokens, mask=is_token, other=0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            z = (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0) * softcap
        # Lanes beyond the vocabulary are -inf before the maximum: padded with 0 they would raise every sum.
        z = tl.where(is_token[None, :], z * inv_temperature, float("-inf"))
        z_target += tl.sum(tl.where(tokens[None, :] == target[:, None], z, 0.0), 1)
        if HAS_EOS:
            z_eos += tl.sum(tl.where(tokens[None, :] == eos_id, z, 0.0), 1)
        new_top = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        top = new_top
    out = split.to(tl.int64) * num_rows + rows
    tl.store(top_SR + out, top, mask=is_row)
    tl.store(sum_SR + out, total, mask=is_row)
    tl.store(target_SR + out, z_target, mask=is_row)
    if HAS_EOS:
        tl.store(eos_SR + out, z_eos, mask=is_row)


@triton.jit
def merge_kernel(
    top_SR, sum_SR, target_SR, eos_SR, logp_R, eos_logp_R, num_rows, num_splits,
    HAS_EOS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Joins the splits of each row in rising order."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    z_target = tl.zeros((BLOCK_R,), tl.float32)
    z_eos = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(0, num_splits):
        at = split * num_rows + rows
        part_top = tl.load(top_SR + at, mask=is_row, other=0.0)
        new_top = tl.maximum(top, part_top)
        part = tl.load(sum_SR + at, mask=is_row, other=1.0) * tl.exp(part_top - new_top)
        total = total * tl.exp(top - new_top) + part
        top = new_top
        z_target += tl.load(target_SR + at, mask=is_row, other=0.0)
        if HAS_EOS:
            z_eos += tl.load(eos_SR + at, mask=is_row, other=0.0)
    # Differences to the top, not to top + log total, which rounds to the digits of the top.
    log_total = tl.log(total)
    tl.store(logp_R + rows, at_most_zero(z_target - top - log_total), mask=is_row)
    if HAS_EOS:
        tl.store(eos_logp_R + rows, at_most_zero(z_eos - top - log_total), mask=is_row)


def tiles(dtype: torch.dtype, major: int, is_aligned: bool) -> dict[str, int]:
    """Tile sizes that compile without spills for compute capability 8.0, 9.0 and 10.0 (major), by Triton 3.6 to 3.9.

    Unaligned matrices, whose rows do not start at a multiple of 16 numbers, are loaded number by number, through registers.
    """
    if dtype == torch.float32:
        return {"BLOCK_R": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4 if is_aligned else 8, "num_stages": 2}
    sizes = {"BLOCK_V": 64 if major >= 10 else 128, "BLOCK_D": 64} if is_aligned else {"BLOCK_V": 64, "BLOCK_D": 32}
    return {"BLOCK_R": 128, **sizes, "num_warps": 8, "num_stages": 3}


def is_aligned(matrix: torch.Tensor) -> bool:
    """Whether Triton knows that every row starts at a multiple of 16: of its address in bytes, of the stride in numbers."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0


def forward_logprob(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    eos_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(logp, eos_logp or None), float32 [R]; nothing of size V is written. float32 inputs are multiplied in full precision."""
    num_rows, num_hidden = hidden_RD.shape
    num_tokens = weight_VD.shape[0]
    logp_R = hidden_RD.new_empty(num_rows, dtype=torch.float32)
    eos_logp_R = None if eos_id is None else torch.empty_like(logp_R)
    if num_rows == 0:
        return logp_R, eos_logp_R
    hidden_RD, weight_VD = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden_RD, weight_VD))
    major = torch.cuda.get_device_capability(hidden_RD.device)[0] if hidden_RD.is_cuda else 0
    tile = tiles(hidden_RD.dtype, major, is_aligned(hidden_RD) and is_aligned(weight_VD))
    row_blocks = triton.cdiv(num_rows, tile["BLOCK_R"])
    # Enough programs to fill a GPU with few rows; the split depends on the shape alone, so the bits do not change.
    wanted_splits = max(16, triton.cdiv(528, row_blocks))
    num_splits = max(1, min(triton.cdiv(num_tokens, 8 * tile["BLOCK_V"]), wanted_splits))
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, num_splits), tile["BLOCK_V"]) * tile["BLOCK_V"]
    num_splits = triton.cdiv(num_tokens, tokens_per_split)
    top_SR, sum_SR, target_SR = (logp_R.new_empty(num_splits, num_rows) for _ in range(3))
    eos_SR = None if eos_id is None else torch.empty_like(top_SR)
    has = {"HAS_EOS": eos_id is not None}
    launch(
        split_kernel, row_blocks * num_splits,
        hidden_RD, weight_VD, bias_V, target_R, top_SR, sum_SR, target_SR, eos_SR,
        num_rows, num_tokens, num_splits, hidden_RD.stride(0), weight_VD.stride(0), tokens_per_split, eos_id or 0,
        softcap or 1.0, 1.0 / temperature,
        D=num_hidden, HAS_BIAS=bias_V is not None, HAS_SOFTCAP=softcap is not None,
        EXACT=hidden_RD.dtype == torch.float32, **has, **tile,
    )  # fmt: skip
    launch(
        merge_kernel, triton.cdiv(num_rows, 128),
        top_SR, sum_SR, target_SR, eos_SR, logp_R, eos_logp_R, num_rows, num_splits, BLOCK_R=128, **has, num_warps=4,
    )  # fmt: skip
    return logp_R, eos_logp_R
