import torch
from builders import group

from ampo_fast.packing import pack_responses
from ampo_fast.utilisation import peak_flops, step_flops, utilisation


def test_the_flops_are_those_of_the_matrix_products(tiny_policy):
    """Against torch's own count of a forward: a third of forward and backward, but for attention's two products."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = pack_responses([group(["a", "b"], lengths=[5, 9])], [range(2)])
    with FlopCounterMode(display=False) as counter:
        tiny_policy.token_logp(batch)
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    ours = step_flops(tiny_policy, batch.token_T.numel(), batch.target_R.numel()) / 3
    norms = 2 * 5 * 32 * batch.token_T.numel()  # five norms' 32 weights, counted by us though they are no product
    assert ours - norms == products


def test_a_frozen_head_costs_two_thirds(tiny_policy):
    whole = step_flops(tiny_policy, 0, 10)
    tiny_policy.head.weight.requires_grad_(False)
    try:
        assert step_flops(tiny_policy, 0, 10) == whole * 4 / 6
    finally:
        tiny_policy.head.weight.requires_grad_(True)


def test_peaks_go_by_the_devices_name_and_a_cpu_has_none(tiny_policy):
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
    assert tiny_policy.device == torch.device("cpu")
    head, step = 6 * tiny_policy.head.weight.numel() * 4, step_flops(tiny_policy, 10, 4)
    assert utilisation(tiny_policy, 10, 4, 1.0) == {"perf/head_share": head / step}
    assert 0 < head < step
