"""One chunk of the language-model head: logits -> log-probs -> gradients, in one buffer. Shared by logprobs and fused.

R rows of the chunk, D hidden, V vocab. z = hidden W^T + bias; softcap * tanh(z / softcap); / temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HeadOptions:
    temperature: float = 1.0
    softcap: float | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}; it must be positive")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap = {self.softcap}; it must be positive, or None")


def default_chunk_rows(num_tokens: int, device: torch.device) -> int:
    """Rows per chunk: about 64 MiB of float32 logits on a CPU; at least 4096 rows on a GPU, where the weight's gradient
    is read and written once a chunk (research: below 4096 rows that traffic costs more than the GEMM)."""
    return 4096 if device.type == "cuda" else max(64, 2**24 // num_tokens)


class HeadChunk:
    """The logits of some rows, turned in place into probabilities and then into the gradient of the logits."""

    def __init__(
        self,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_R: torch.Tensor,
        bias_V: torch.Tensor | None,
        options: HeadOptions,
    ) -> None:
        self.target_R1 = target_R[:, None]
        self.options = options
        work = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
        logits_RV = (hidden_RD @ weight_VD.t()).to(work)
        if bias_V is not None:
            logits_RV += bias_V.to(work)
        if options.softcap is not None:
            logits_RV.div_(options.softcap).tanh_().mul_(options.softcap)
        if options.temperature != 1.0:
            logits_RV.div_(options.temperature)
        self.values_RV = logits_RV
        self.lse_R1 = torch.logsumexp(logits_RV, dim=1, keepdim=True)
        # <= 0 whatever the rounding: the target's own term is part of the sum.
        self.logp_R = (logits_RV.gather(1, self.target_R1) - self.lse_R1)[:, 0].clamp_(max=0.0)
        self.eos_logp_R = None
        if options.eos_id is not None:
            self.eos_logp_R = (logits_RV[:, options.eos_id] - self.lse_R1[:, 0]).clamp_(max=0.0)

    def probabilities(self) -> torch.Tensor:
        """softmax of the logits, in their own buffer [R, V]."""
        return self.values_RV.sub_(self.lse_R1).exp_()

    def logit_gradient(self, grad_R: torch.Tensor, grad_eos_R: torch.Tensor | None) -> torch.Tensor:
        """d/dz of sum_r g_r logp_r + g_eos_r eos_logp_r, in the logits' buffer: -(g + g_eos) p + g 1_y + g_eos 1_eos.

        The target's entry is g times the sum of all other probabilities: 1 - p would lose every digit where the model
        is sure, and expm1(logp) those that z_y - lse has already lost.
        """
        slope_RV = None
        if self.options.softcap is not None:
            capped_RV = self.values_RV * (self.options.temperature / self.options.softcap)
            slope_RV = 1.0 - capped_RV.square_()
        total_R = grad_R if grad_eos_R is None else grad_R + grad_eos_R
        gradient_RV = self.probabilities().scatter_(1, self.target_R1, 0.0)
        rest_R = gradient_RV.sum(1)
        gradient_RV.mul_(-total_R[:, None])
        own_R = grad_R * rest_R
        if grad_eos_R is not None:
            own_R = own_R - grad_eos_R * self.logp_R.exp()
        gradient_RV.scatter_(1, self.target_R1, own_R[:, None])
        if grad_eos_R is not None:
            self._add_eos(gradient_RV, grad_R, grad_eos_R)
        if slope_RV is not None:
            gradient_RV.mul_(slope_RV)
        return gradient_RV.div_(self.options.temperature) if self.options.temperature != 1.0 else gradient_RV

    def _add_eos(self, gradient_RV: torch.Tensor, grad_R: torch.Tensor, grad_eos_R: torch.Tensor) -> None:
        is_target_R = self.target_R1[:, 0] == self.options.eos_id
        alone_R = -grad_eos_R * torch.expm1(self.eos_logp_R) - grad_R * self.eos_logp_R.exp()
        both_R = -(grad_R + grad_eos_R) * torch.expm1(self.eos_logp_R)
        gradient_RV[:, self.options.eos_id] = torch.where(is_target_R, both_R, alone_R)
