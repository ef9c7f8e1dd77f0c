"""linear_logprob: hidden states and the head's weight in, log-probs of the targets out; the logits never exist whole."""

from __future__ import annotations

import torch

from ampo_fast.dispatch import resolve_impl
from ampo_fast.head import HeadOptions, default_chunk_rows, forward_chunk_rows, head_chunk, logit_buffer
from ampo_fast.opaque import opaque
from ampo_fast.validation import check_first_order, check_head, check_logprobs


@opaque
def linear_logprob(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    eos_id: int | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each row's target under the head: log softmax(z)_target, z = cap(hidden W^T + bias) / temperature.

    Differentiable for any per-row upstream gradient: 8 R D V FLOPs with a trainable weight (the backward recomputes the
    logits, chunk by chunk), 4 R D V with a frozen one (J = w_y - sum_v p_v w_v is kept, [R, D]), or 6 there with
    eos_id, which wants two of them. A frozen hidden or weight skips its GEMM; the weight's gradient accumulates in float32
    and is cast once.

    Args:
        hidden_RD, weight_VD: same float dtype and device. target_R: int64 ids in 0 .. V - 1.
        eos_id: also return every row's log-prob of this id.
        impl: "torch", "triton" or "auto" (triton for CUDA tensors): logits by cuBLAS, chunk by chunk, rows by Triton. Asked
            for by its name where no gradient is wanted, "triton" is a kernel that writes no logits: no memory beside the
            answer, slower than cuBLAS.
    Returns:
        logp_R in nats, float32 (float64 for float64 input), never above 0; with eos_id the pair (logp_R, eos_logp_R).
    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also targets out of range and NaN logits.
    """
    check_head(hidden_RD, weight_VD, target_R, bias_V, eos_id)
    options = HeadOptions(temperature, softcap, eos_id)
    chosen = resolve_impl("linear_logprob", impl, hidden_RD)
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_RD, weight_VD, bias_V)
    )
    if impl == "triton" and not wants_gradient:
        from ampo_fast.kernels.forward_logprob import forward_logprob

        logp_R, eos_logp_R = forward_logprob(hidden_RD, weight_VD, target_R, bias_V, temperature, softcap, eos_id)
    else:
        chunk_rows = (default_chunk_rows if wants_gradient else forward_chunk_rows)(
            weight_VD.shape[0], hidden_RD.device
        )
        logp_R, eos_logp_R = _LinearLogprob.apply(hidden_RD, weight_VD, bias_V, target_R, options, chosen, chunk_rows)
    check_logprobs(logp_R.detach())
    return logp_R if eos_id is None else (logp_R, eos_logp_R)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, target_R, options, impl, chunk_rows):
        num_rows = hidden_RD.shape[0]
        # float64 in, float64 out: the mathematics can be checked to 1e-10.
        work = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
        logp_R = hidden_RD.new_empty(num_rows, dtype=work)
        eos_logp_R = None if options.eos_id is None else torch.empty_like(logp_R)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        keep_jacobian = need_hidden and not need_weight and not need_bias and options.eos_id is None
        jacobian_RD = torch.empty_like(hidden_RD) if keep_jacobian else None
        buffer = logit_buffer(hidden_RD, weight_VD, chunk_rows)
        for rows in _chunks(num_rows, chunk_rows):
            chunk = head_chunk(hidden_RD[rows], weight_VD, target_R[rows], bias_V, options, impl, buffer)
            logp_R[rows] = chunk.logp_R
            if eos_logp_R is not None:
                eos_logp_R[rows] = chunk.eos_logp_R
            if keep_jacobian:
                gradient_RV = chunk.logit_gradient(torch.ones_like(chunk.logp_R), None)
                torch.mm(gradient_RV.to(weight_VD.dtype), weight_VD, out=jacobian_RD[rows])
        ctx.options, ctx.impl, ctx.chunk_rows, ctx.has_jacobian = options, impl, chunk_rows, keep_jacobian
        ctx.save_for_backward(*([jacobian_RD] if keep_jacobian else [hidden_RD, weight_VD, bias_V, target_R]))
        return logp_R, eos_logp_R

    @staticmethod
    def backward(ctx, grad_R, grad_eos_R):
        check_first_order("linear_logprob")
        if ctx.has_jacobian:
            (jacobian_RD,) = ctx.saved_tensors
            return jacobian_RD * grad_R[:, None].to(jacobian_RD.dtype), *(None,) * 6
        gradients = _recomputed_gradients(ctx, grad_R, grad_eos_R)
        return (*gradients.result(), *(None,) * 4)


def _recomputed_gradients(ctx, grad_R: torch.Tensor, grad_eos_R: torch.Tensor) -> HeadGradients:
    """The logits once more, chunk by chunk, and their gradients. The last chunk's logits are freed when this returns."""
    hidden_RD, weight_VD, bias_V, target_R = ctx.saved_tensors
    spans = _chunks(hidden_RD.shape[0], ctx.chunk_rows)
    gradients = HeadGradients(hidden_RD, weight_VD, bias_V, ctx.needs_input_grad[:3], len(spans))
    buffer = logit_buffer(hidden_RD, weight_VD, ctx.chunk_rows)
    for rows in spans:
        chunk = head_chunk(hidden_RD[rows], weight_VD, target_R[rows], bias_V, ctx.options, ctx.impl, buffer)
        eos_rows = None if ctx.options.eos_id is None else grad_eos_R[rows]
        gradients.add(rows, chunk.logit_gradient(grad_R[rows], eos_rows))
    return gradients


class HeadGradients:
    """dX, dW and db gathered chunk by chunk; dW and db in float32 (float64), cast to the parameters' dtype once.

    The first chunk writes dW, the others add to it; a chunk that is alone writes it in the parameter's dtype, since the
    GEMM itself adds in float32.
    """

    def __init__(self, hidden_RD, weight_VD, bias_V, needed: tuple[bool, bool, bool], num_chunks: int) -> None:
        self.hidden_RD, self.weight_VD, self.bias_V = hidden_RD, weight_VD, bias_V
        work = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        self.hidden_grad = torch.empty_like(hidden_RD) if needed[0] else None
        self.weight_grad = None
        if needed[1]:
            sum_dtype = weight_VD.dtype if num_chunks == 1 else work
            make = torch.zeros_like if num_chunks == 0 else torch.empty_like
            self.weight_grad = make(weight_VD, dtype=sum_dtype, memory_format=torch.contiguous_format)
        self.bias_grad = torch.zeros_like(bias_V, dtype=work) if needed[2] else None
        self._is_first = True

    def add(self, rows: slice, gradient_RV: torch.Tensor) -> None:
        """gradient_RV is d/dlogits of these rows (float32 or float64); the GEMMs run in the parameters' dtype."""
        if self.bias_grad is not None:
            self.bias_grad += gradient_RV.sum(0, dtype=self.bias_grad.dtype)
        gradient_RV = gradient_RV.to(self.weight_VD.dtype)
        if self.hidden_grad is not None:
            torch.mm(gradient_RV, self.weight_VD, out=self.hidden_grad[rows])
        if self.weight_grad is not None:
            self._add_to_weight_grad(gradient_RV.t(), self.hidden_RD[rows])

    def _add_to_weight_grad(self, gradient_VR: torch.Tensor, hidden_RD: torch.Tensor) -> None:
        sum_VD, is_first = self.weight_grad, self._is_first
        self._is_first = False
        if sum_VD.dtype == gradient_VR.dtype:
            torch.addmm(sum_VD, gradient_VR, hidden_RD, beta=0.0 if is_first else 1.0, out=sum_VD)
        elif sum_VD.is_cuda:
            # One GEMM that reads bf16 and adds to float32 in its epilogue: no rounding between chunks, no second [V, D].
            beta = 0.0 if is_first else 1.0
            torch.addmm(sum_VD, gradient_VR, hidden_RD, out_dtype=sum_VD.dtype, beta=beta, out=sum_VD)
        elif is_first:
            sum_VD.copy_(gradient_VR @ hidden_RD)
        else:
            sum_VD += gradient_VR @ hidden_RD

    def sums(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dX, dW and db as they were added up."""
        return self.hidden_grad, self.weight_grad, self.bias_grad

    def result(self) -> tuple[torch.Tensor | None, ...]:
        """dX, dW and db in their parameters' dtypes."""
        parameters = (self.hidden_RD, self.weight_VD, self.bias_V)
        return tuple(
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(self.sums(), parameters, strict=True)
        )


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
