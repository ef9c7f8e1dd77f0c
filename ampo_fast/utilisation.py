"""Model FLOPs utilisation (Chowdhery et al. 2022, 2204.02311): what a step had to compute over what the device could have."""

from __future__ import annotations

import torch

from ampo_fast import distributed
from ampo_fast.model import Policy

# Dense bfloat16, from NVIDIA's data sheets; the first name that the device's contains.
_PEAK_FLOPS = (("H100 PCIe", 756e12), ("H200", 989e12), ("H100", 989e12), ("A100", 312e12))


def step_flops(policy: Policy, num_tokens: int, num_targets: int) -> float:
    """Of one forward and backward: 6 per backbone weight and token, 6 per head weight and target; 4 where frozen.

    Tokens are counted once, however often they run: no recomputation, no first forward of a split group. The two products
    of attention are left out, and so is the lookup in the embedding.
    """
    head, embedding = policy.head.weight, policy.model.get_input_embeddings().weight
    per_token = sum(
        _per_use(parameter) for parameter in policy.parameters() if parameter is not head and parameter is not embedding
    )
    return per_token * num_tokens + head_flops(policy, num_targets)


def head_flops(policy: Policy, num_targets: int) -> float:
    """The head's part of step_flops."""
    return _per_use(policy.head.weight) * num_targets


def _per_use(weight: torch.nn.Parameter) -> int:
    return (6 if weight.requires_grad else 4) * weight.numel()


def peak_flops(device_name: str) -> float | None:
    """Of one device, dense in bfloat16; None for one that is not listed."""
    return next((peak for name, peak in _PEAK_FLOPS if name in device_name), None)


def utilisation(policy: Policy, num_tokens: int, num_targets: int, seconds: float) -> dict[str, float]:
    """perf/head_share of a step's FLOPs and, on listed CUDA devices, perf/mfu. Counts and seconds are of all ranks."""
    flops = step_flops(policy, num_tokens, num_targets)
    found = {"perf/head_share": head_flops(policy, num_targets) / flops}
    peak = peak_flops(torch.cuda.get_device_name(policy.device)) if policy.device.type == "cuda" else None
    return found | ({"perf/mfu": flops / (seconds * peak * distributed.world_size())} if peak else {})
