"""One chunk of the language-model head: logits -> log-probs -> gradients, in one buffer. Shared by logprobs and fused.

R rows of the chunk, D hidden, V vocab. z = hidden W^T + bias; softcap * tanh(z / softcap); / temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class HeadOptions:
    temperature: float = 1.0
    softcap: float | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature!r}; it must be a positive number")
        if self.softcap is not None and (not isinstance(self.softcap, Real) or not self.softcap > 0):
            raise ValueError(f"softcap = {self.softcap!r}; it must be a positive number, or None")


_TILE_ROWS = 256
"""A GPU's GEMM gives its rows out in tiles of 128 or 256: what a chunk holds beyond a multiple makes a tile that idles."""


def default_chunk_rows(num_tokens: int, device: torch.device) -> int:
    """Rows per chunk: about 64 MiB of float32 logits on a CPU; on a GPU 2 GiB of bfloat16 ones, but 4096 to 8192 rows.

    There the weight's gradient is read and written once a chunk, in float32: with a chunk of T rows that is 735 / T of the
    time of its GEMM (4.3 TB/s, 790 TFLOP/s), 18% at 4096 rows.
    """
    if device.type == "cuda":
        return min(8192, max(4096, _whole_tiles(2**30 // num_tokens)))
    return max(64, 2**24 // num_tokens)


def forward_chunk_rows(num_tokens: int, device: torch.device) -> int:
    """Rows per chunk where only log-probs are wanted: nothing is added up over chunks. On a GPU 512 MiB of bfloat16 logits,
    about 2,048 rows at a vocabulary of 128k: the row pass is a program a row, and an H100 holds 1,056 of them at a time."""
    if device.type == "cuda":
        return max(512, _whole_tiles(2**28 // num_tokens))
    return default_chunk_rows(num_tokens, device)


def _whole_tiles(num_rows: int) -> int:
    return num_rows // _TILE_ROWS * _TILE_ROWS


_WHOLE_GROUP_BYTES = {"cuda": 4 * 2**30, "cpu": 2**30}
"""Logits of one group that may exist at once: beside a step's activations they are little, and they save a fourth of the
head's FLOPs. 8 responses of 2,048 tokens in bfloat16 at a vocabulary of 128k; of 682 tokens in float32 at 49k."""


def whole_group_rows(weight_VD: torch.Tensor) -> int:
    """The longest group, in rows, whose logits are held at once rather than computed twice."""
    limit = _WHOLE_GROUP_BYTES["cuda" if weight_VD.is_cuda else "cpu"]
    return limit // (weight_VD.shape[0] * weight_VD.element_size())


class HeadChunk(Protocol):
    """The logits of some rows; log-probs first, then the gradient of the logits in the same buffer."""

    logp_R: torch.Tensor
    eos_logp_R: torch.Tensor | None

    def logit_gradient(self, grad_R: torch.Tensor, grad_eos_R: torch.Tensor | None) -> torch.Tensor:
        """d/dlogits of sum_r g_r logp_r + g_eos_r eos_logp_r, [R, V]; called once at most."""
        ...


def head_chunk(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    bias_V: torch.Tensor | None,
    options: HeadOptions,
    impl: str,
    buffer: torch.Tensor | None = None,
) -> HeadChunk:
    """buffer: from logit_buffer, overwritten; the chunk before, if it used the same one, is then no more."""
    logits_RV = None if buffer is None else buffer[: hidden_RD.shape[0]]
    logits_RV = torch.mm(hidden_RD, weight_VD.t(), out=logits_RV)
    kind = _TritonChunk if impl == "triton" else _TorchChunk
    return kind(logits_RV, target_R, bias_V, options)


def logit_buffer(hidden_RD: torch.Tensor, weight_VD: torch.Tensor, chunk_rows: int) -> torch.Tensor:
    """Room for one chunk's logits, reused by all of them: on a CPU every fresh page of it would be faulted in again."""
    num_tokens = weight_VD.shape[0]
    rows = hidden_RD.new_empty(min(chunk_rows, hidden_RD.shape[0]), _row_stride(num_tokens, hidden_RD.device))
    return rows[:, :num_tokens]


def _row_stride(num_tokens: int, device: torch.device) -> int:
    """From one row of logits to the next. A GPU's fast GEMMs want every row to start at 16 bytes; Triton, which loads 16 bytes
    at once only where it knows that, knows of a stride whether 16 divides it, and nothing else."""
    return -(-num_tokens // 16) * 16 if device.type == "cuda" else num_tokens


class _TritonChunk:
    """cuBLAS makes the logits, in the weight's dtype; one Triton pass reads them, a second one overwrites them."""

    def __init__(self, logits_RV, target_R, bias_V, options: HeadOptions) -> None:
        from ampo_fast.kernels import row_pass

        self._row_pass, self.target_R, self.options = row_pass, target_R, options
        self._bias_V = bias_V
        self.logits_RV = logits_RV
        self.logp_R, self.eos_logp_R, self._sums = row_pass.row_logprob(
            self.logits_RV, target_R, bias_V, options.temperature, options.softcap, options.eos_id
        )

    def logit_gradient(self, grad_R: torch.Tensor, grad_eos_R: torch.Tensor | None) -> torch.Tensor:
        options = self.options
        if options.eos_id is not None and grad_eos_R is None:
            grad_eos_R = torch.zeros_like(grad_R)
        return self._row_pass.row_gradient_(
            self.logits_RV, self.target_R, self._sums, grad_R, grad_eos_R,
            self._bias_V, options.temperature, options.softcap, options.eos_id,
        )  # fmt: skip


class _TorchChunk:
    """Logits in float32 (float64), turned in place into exp(z - max), the target's own left out, then into the gradient.

    The row passes run over a few rows at a time, so that on a CPU all but the first read come from the cache.
    """

    def __init__(
        self, logits_RV: torch.Tensor, target_R: torch.Tensor, bias_V: torch.Tensor | None, options: HeadOptions
    ) -> None:
        self.target_R1 = target_R[:, None]
        self.options = options
        work = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
        self.values_RV = logits_RV.to(work)
        self.slope_RV = None if options.softcap is None else torch.empty_like(self.values_RV)
        num_rows = logits_RV.shape[0]
        self.logp_R, self._others_R, self._own_R = (self.values_RV.new_empty(num_rows) for _ in range(3))
        self.eos_logp_R = None if options.eos_id is None else self.values_RV.new_empty(num_rows)
        for rows in self._row_blocks():
            self._logprobs(rows, bias_V)

    def _row_blocks(self) -> list[slice]:
        num_rows, num_tokens = self.values_RV.shape
        size = max(1, 2**19 // num_tokens) if self.values_RV.device.type == "cpu" else max(num_rows, 1)
        return [slice(start, start + size) for start in range(0, num_rows, size)]

    def _logprobs(self, rows: slice, bias_V: torch.Tensor | None) -> None:
        """Scores -> exp(z - max) with the target's entry 0, its own mass and the others' kept beside."""
        options, values_RV, target_R1 = self.options, self.values_RV[rows], self.target_R1[rows]
        if bias_V is not None:
            values_RV += bias_V.to(values_RV.dtype)
        if options.softcap is not None:
            values_RV.div_(options.softcap).tanh_()
            torch.addcmul(values_RV.new_ones(()), values_RV, values_RV, value=-1.0, out=self.slope_RV[rows])
            values_RV.mul_(options.softcap)
        if options.temperature != 1.0:
            values_RV.div_(options.temperature)
        z_R1 = values_RV.gather(1, target_R1)
        top_R1 = values_RV.amax(1, keepdim=True)
        eos_R = None if options.eos_id is None else values_RV[:, options.eos_id].clone()
        values_RV.sub_(top_R1).exp_()
        own_R1 = values_RV.gather(1, target_R1)
        values_RV.scatter_(1, target_R1, 0.0)
        # 1 - p_y summed, not subtracted: 1 - p would lose every digit where the model is sure.
        others_R = values_RV.sum(1)
        self._own_R[rows], self._others_R[rows] = own_R1[:, 0], others_R
        below_R, log_sum_R = (z_R1 - top_R1)[:, 0], (others_R + own_R1[:, 0]).log()
        # Differences to the top, not to top + log sum, which rounds to the digits of the top; <= 0 whatever the rounding.
        self.logp_R[rows] = torch.where(below_R == 0, -others_R.log1p(), below_R - log_sum_R).clamp_(max=0.0)
        if eos_R is not None:
            self.eos_logp_R[rows] = (eos_R - top_R1[:, 0] - log_sum_R).clamp_(max=0.0)

    def logit_gradient(self, grad_R: torch.Tensor, grad_eos_R: torch.Tensor | None) -> torch.Tensor:
        """-(g + g_eos) p + g 1_y + g_eos 1_eos, times the slope of softcap and temperature."""
        sum_R = self._others_R + self._own_R
        total_R = grad_R if grad_eos_R is None else grad_R + grad_eos_R
        at_target_R = grad_R * (self._others_R / sum_R)
        if grad_eos_R is not None:
            at_target_R = at_target_R - grad_eos_R * self.logp_R.exp()
        factor_R1 = -(total_R / sum_R)[:, None]
        for rows in self._row_blocks():
            self.values_RV[rows].mul_(factor_R1[rows])
            self.values_RV[rows].scatter_(1, self.target_R1[rows], at_target_R[rows, None])
            if grad_eos_R is not None:
                self._write_eos(rows, grad_R[rows], grad_eos_R[rows])
            if self.slope_RV is not None:
                self.values_RV[rows].mul_(self.slope_RV[rows])
            if self.options.temperature != 1.0:
                self.values_RV[rows].div_(self.options.temperature)
        return self.values_RV

    def _write_eos(self, rows: slice, grad_R: torch.Tensor, grad_eos_R: torch.Tensor) -> None:
        is_target_R = self.target_R1[rows, 0] == self.options.eos_id
        eos_logp_R = self.eos_logp_R[rows]
        alone_R = -grad_eos_R * torch.expm1(eos_logp_R) - grad_R * eos_logp_R.exp()
        rest_R = self._others_R[rows] / (self._others_R[rows] + self._own_R[rows])
        both_R = (grad_R + grad_eos_R) * rest_R
        self.values_RV[rows, self.options.eos_id] = torch.where(is_target_R, both_R, alone_R)
