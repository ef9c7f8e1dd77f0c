"""The Triton kernels: on the GPU where there is one, else in Triton's interpreter; and compiled for three architectures.

Tolerance: |ours - float64 truth| <= 2 |torch in the same dtype - float64 truth| + a small slack.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    assert "triton" not in sys.modules, "a test file before this one imports triton: do so within its tests"
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton, and the kernels, are first imported
pytest.importorskip("triton")

from ampo_fast import fused, fused_linear_group_loss, group_contrastive_loss, linear_logprob, reference  # noqa: E402
from ampo_fast import head as heads  # noqa: E402
from ampo_fast import logprobs as ops  # noqa: E402
from ampo_fast.losses import AMPO, NLL, GroupContrastive, LossOutput  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter truncates to bfloat16 and multiplies its bit patterns: float16 stands in for it off the GPU.
DTYPES = [torch.float32, torch.bfloat16 if ON_GPU else torch.float16]
SHAPES = [(1, 64, 97), (7, 576, 1000), (130, 100, 1000), (3, 64, 50257)]  # interpreted: one row at a time
if ON_GPU:
    SHAPES = list(itertools.product((1, 7, 513, 2048), (64, 576, 1000), (97, 1000, 49152, 50257)))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def head(num_rows, num_hidden, num_tokens, dtype, seed=0, peaked=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_tokens, num_hidden, generator=generator)
    target = torch.randint(0, num_tokens, (num_rows,), generator=generator)
    hidden = torch.randn(num_rows, num_hidden, generator=generator) / num_hidden**0.5
    if peaked:  # a third of the rows are sure of their target, as real ones are
        hidden[::3] += weight[target[::3]] * 12 / num_hidden
    bias = torch.randn(num_tokens, generator=generator)
    return [t.to(DEVICE) if t.dtype == torch.int64 else t.to(DEVICE, dtype) for t in (hidden, weight, target, bias)]


def close(ours, same_dtype, truth, slack):
    ours, same_dtype, truth = (t.double() for t in (ours, same_dtype, truth))
    error, allowed = (ours - truth).abs().max().item(), (same_dtype - truth).abs().max().item()
    assert error <= 2 * allowed + slack, f"error {error:.3e}, torch's {allowed:.3e}, slack {slack:.1e}"


def logprobs(hidden, weight, target, bias, upstream, **options):
    """(logp, eos_logp, dX, dW, db) by the reference in the inputs' dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    logp, eos = reference.linear_logprob(leaves[0], leaves[1], target, bias_V=leaves[2], **options)
    (logp * upstream[0].to(logp)).sum().add((eos * upstream[1].to(eos)).sum()).backward()
    return logp.detach(), eos.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probs_and_gradients_are_as_good_as_torch_in_the_same_dtype(shape, dtype):
    hidden, weight, target, bias = head(*shape, dtype)
    options = {"temperature": 0.8, "softcap": 20.0, "eos_id": 3}
    upstream = torch.randn(2, shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    upstream[:, ::4] = 0.0
    truth = logprobs(hidden.double(), weight.double(), target, bias.double(), upstream, **options)
    plain = logprobs(hidden, weight, target, bias, upstream, **options)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    logp, eos = linear_logprob(leaves[0], leaves[1], target, bias_V=leaves[2], impl="triton", **options)
    (logp * upstream[0] + eos * upstream[1]).sum().backward()
    ours = (logp.detach(), eos.detach(), *(leaf.grad for leaf in leaves))
    slack = 1e-5 if dtype == torch.float32 else 2e-3
    for got, same, want in zip(ours, plain, truth, strict=True):
        close(got, same, want, slack * (1 + want.abs().max().item()))
    assert (logp <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_without_logits_equals_the_reference(shape, dtype):
    hidden, weight, target, bias = head(*shape, dtype)
    options = {"temperature": 0.8, "softcap": 20.0, "eos_id": 3}
    with torch.no_grad():
        ours = linear_logprob(hidden, weight, target, bias_V=bias, impl="triton", **options)
        plain = reference.linear_logprob(hidden, weight, target, bias_V=bias, **options)
        truth = reference.linear_logprob(
            hidden.double(), weight.double(), target, bias_V=bias.double(), **options
        )  # fmt: skip
    for got, same, want in zip(ours, plain, truth, strict=True):
        close(got, same, want, 1e-5 * (1 + want.abs().max().item()))
        assert (got <= 0).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_logits_far_from_zero_do_no_harm(shift, with_gradient):
    hidden, weight, target, _ = head(6, 64, 300, torch.float32, peaked=False)
    bias = torch.full((300,), shift, device=DEVICE)
    hidden.requires_grad_(with_gradient)
    logp = linear_logprob(hidden, weight, target, bias_V=bias, impl="triton")
    want = reference.linear_logprob(hidden.double(), weight.double(), target)
    torch.testing.assert_close(logp.double(), want, atol=4e-3, rtol=0)  # one digit of 1e4 in float32 is 1e-3
    assert (logp <= 0).all()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_target_far_from_zero_keeps_the_digits_of_its_log_prob(with_gradient):
    hidden, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(300, 64, device=DEVICE)
    bias = torch.full((300,), 9992.0, device=DEVICE)
    bias[7] = 1e4
    target = torch.tensor([7, 3], device=DEVICE)
    hidden.requires_grad_(with_gradient)
    logp, eos_logp = linear_logprob(hidden, weight, target, bias_V=bias, eos_id=4, impl="triton")
    exact = torch.log_softmax(bias.double(), 0)
    # Only the pass over logits that are there keeps the target out of the sum, and with it the last digits of 1 - p.
    torch.testing.assert_close(logp.double(), exact[[7, 3]], rtol=0, atol=2e-7 * (1 if with_gradient else 8))
    torch.testing.assert_close(eos_logp.double(), exact[[4, 4]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("ruled_out", [slice(0, 300), slice(1000, 1500), slice(600, 1400)], ids=str)
def test_tokens_that_the_bias_rules_out_do_no_harm_to_the_others(ruled_out, with_gradient):
    """Padding of the vocabulary, say: whole tiles of it, and whole splits, are -inf."""
    hidden, weight, _, _ = head(5, 64, 1500, torch.float32)
    bias = torch.zeros(1500, device=DEVICE)
    bias[ruled_out] = -torch.inf
    target = torch.tensor([400, 401, 500, 555, 1499 if ruled_out.stop < 1500 else 0], device=DEVICE)
    hidden.requires_grad_(with_gradient)
    logp = linear_logprob(hidden, weight, target, bias_V=bias, impl="triton")
    exact = reference.linear_logprob(hidden.double(), weight.double(), target, bias_V=bias.double())
    torch.testing.assert_close(logp.double(), exact, atol=1e-4, rtol=0)


def test_a_sure_target_keeps_the_digits_of_its_gradient():
    # p_target = 1 - 1e-4: the gradient of its logit is 1e-4, which 1 - p would round.
    weight = torch.eye(64, device=DEVICE)[:2].repeat(1, 1)
    hidden = torch.zeros(1, 64, device=DEVICE)
    hidden[0, 0] = torch.log(torch.tensor(9999.0))
    weight.requires_grad_()
    logp = linear_logprob(hidden, weight, torch.zeros(1, dtype=torch.int64, device=DEVICE), impl="triton")
    logp.sum().backward()
    expected = 1e-4 * hidden[0, 0].item()
    assert abs(weight.grad[0, 0].item() / expected - 1) < 2e-6


@pytest.mark.parametrize("mode", ["grouped", "recompute", "frozen"])
def test_the_fused_op_gives_torchs_loss_and_gradients(mode):
    responses, groups = torch.tensor([0, 5, 9, 12, 20, 22, 30, 40]), torch.tensor([0, 3, 7])
    hidden, weight, target, _ = head(40, 64, 97, torch.float32)
    reward = torch.linspace(0, 1, 7, device=DEVICE)
    results = []
    for impl in ("triton", "torch"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(mode != "frozen")]
        loss, stats = fused_linear_group_loss(
            *leaves, target, responses, groups, reward, AMPO(alpha=0.3), mode=mode, chunk_rows=25, impl=impl
        )
        loss.backward()
        results.append((loss.detach(), stats.logp_M, leaves[0].grad, leaves[1].grad))
    for ours, torchs in zip(*results, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, torchs, atol=2e-5, rtol=2e-5)


def contrast_inputs():
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([8, 1, 0, 5, 17, 2])
    total = int(sizes.sum())
    logp = -40 * torch.rand(total, generator=generator)
    length = torch.randint(1, 30, (total,), generator=generator)
    reward = torch.randn(total, generator=generator) - 1.0  # most are below the 0 of the padding
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    more = {"ref_logp_M": logp + torch.randn(total, generator=generator)}
    more["positive_M"] = torch.rand(total, generator=generator) > 0.7
    # Not the means, but near them: some rewards are above.
    more["baseline_B"] = torch.stack([part.sum() / max(len(part), 1) for part in reward.split(sizes.tolist())]) + 0.1
    on_device = [t.to(DEVICE) for t in (logp, length, reward)]
    return (*on_device, offsets, {name: value.to(DEVICE) for name, value in more.items()})


OPTIONS = list(
    itertools.product(["avg", "sum"], ["signed", "abs", "none"], ["best", "mean", "given"], [1, 2], [0.0, 3.0])
)


@pytest.mark.parametrize(("score", "weight", "split", "power", "gamma"), OPTIONS)
def test_the_group_loss_and_its_closed_form_gradient(score, weight, split, power, gamma):
    logp, length, reward, offsets, more = contrast_inputs()
    options = {"beta": 2.0, "alpha": 0.4, "gamma": gamma, "score": score, "weight": weight, "weight_power": power}
    if split != "given":
        more.pop("positive_M")
    options |= {"split": split, "reduction": "none", "alpha_place": ("outside", "inside")[power - 1]}
    upstream = torch.linspace(-1, 2, 6, device=DEVICE)
    results = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        leaf = logp.detach().to(dtype).requires_grad_()
        cast = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in more.items()}
        loss = group_contrastive_loss(leaf, length, reward.to(dtype), offsets, impl=impl, **cast, **options)
        (loss * upstream.to(dtype)).sum().backward()
        results.append((loss.detach(), leaf.grad))
    for ours, torchs, truth in zip(*results, strict=True):
        close(ours, torchs, truth, 2e-6 * (1 + truth.abs().max().item()))
    assert results[0][0][1:3].tolist() == [0.0, 0.0]  # one response, none: an empty side


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_groups_positives_do_not_depend_on_the_widest_group_beside_it(impl):
    # 0.4 three times and a mean of 0.3 or of 0.4: what a float32 sum rounds to changes with the padding.
    groups = [
        [0.4, 0.0, 0.4, 0.8],
        [0.11] * 3,
        [0.5, 0.4, 0.45],
        [0.4, 0.0, 0.4, 0.8, 0.3, 0.1, 0.1],
        [0.1 * i for i in range(8)],
    ]
    for reward in (torch.tensor(values, device=DEVICE) for values in groups):
        logp, length = -torch.arange(1.0, len(reward) + 1, device=DEVICE), torch.ones(len(reward), device=DEVICE)
        exact = [Fraction(value) for value in reward.tolist()]
        positive = torch.tensor([len(exact) * value > sum(exact) for value in exact], device=DEVICE)
        options = {"beta": 1.0, "reduction": "none", "impl": impl}
        for more in (0, 9, 30):
            offsets = torch.tensor([0, len(reward), len(reward) + more])
            both = [torch.cat([vector, vector.new_ones(more)]) for vector in (logp, length, reward)]
            given = torch.cat([positive, positive.new_zeros(more)])
            got = group_contrastive_loss(*both, offsets, split="mean", **options)
            want = group_contrastive_loss(*both, offsets, split="given", positive_M=given, **options)
            assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)


def test_extreme_scores_of_the_group_loss_stay_finite():
    logp = torch.tensor([-1e4, 0.0, 0.0, -1e4], device=DEVICE, requires_grad=True)
    loss = group_contrastive_loss(
        logp, torch.ones(4, device=DEVICE), torch.tensor([1.0, 0.0, 1.0, 0.0], device=DEVICE),
        torch.tensor([0, 2, 4]), beta=1.0, score="sum", reduction="none", impl="triton",
    )  # fmt: skip
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.0]
    assert logp.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_a_second_derivative_of_the_group_loss_is_refused_not_left_out():
    logp, length, reward, offsets, _ = contrast_inputs()
    loss = group_contrastive_loss(logp.requires_grad_(), length, reward, offsets, beta=2.0, impl="triton")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_the_same_input_gives_the_same_bits():
    hidden, weight, target, bias = head(33, 64, 1000, DTYPES[1])
    with torch.no_grad():
        first, second = (linear_logprob(hidden, weight, target, bias_V=bias, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("eos_id", [None, 3])
def test_an_upstream_gradient_that_sum_expanded_reaches_every_row(eos_id):
    """Its stride is 0: read as a dense vector it is one number and what lies behind it in memory."""
    hidden, weight, target, bias = head(9, 64, 97, torch.float32)
    results = []
    for impl in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        out = linear_logprob(*leaves[:2], target, bias_V=leaves[2], eos_id=eos_id, impl=impl)
        (out if eos_id is None else out[0] + out[1]).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("mode", ["grouped", "recompute"])
def test_a_loss_on_the_plain_sum_of_the_rows_trains_every_row(mode):
    hidden, weight, target, _ = head(12, 64, 97, torch.float32)

    def negative_sum(stats):
        total = -stats.logp_R.sum()
        return LossOutput(total, total[None])

    results = []
    for impl in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss, _ = fused_linear_group_loss(
            *leaves, target, torch.tensor([0, 5, 12]), torch.tensor([0, 2]), torch.zeros(2, device=DEVICE), negative_sum,
            mode=mode, impl=impl,
        )  # fmt: skip
        loss.backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["grouped", "recompute", "frozen"])
def test_rows_of_logits_that_are_padded_as_on_a_gpu_change_nothing(mode, impl, monkeypatch):
    """The padding holds NaN: whoever read it would show it, and whoever wrote it would wipe it out."""
    hidden, weight, target, bias = head(12, 64, 97, torch.float32)
    options = {"mode": mode, "impl": impl, "temperature": 0.8}
    if mode != "frozen":
        options |= {"softcap": 20.0, "eos_id": 3}
    buffers = []

    def buffer_of_nan(*arguments):
        buffer = heads.logit_buffer(*arguments)
        buffers.append(buffer.as_strided((buffer.shape[0], buffer.stride(0)), buffer.stride()).fill_(torch.nan))
        return buffer

    def run():
        leaves = [hidden.clone().requires_grad_()]
        leaves += [t.clone().requires_grad_(mode != "frozen") for t in (weight, bias)]
        loss, stats = fused_linear_group_loss(
            *leaves[:2], target, torch.tensor([0, 2, 5, 9, 12]), torch.tensor([0, 2, 4]), torch.rand(4).to(DEVICE),
            NLL(), positive_M=torch.ones(4, dtype=torch.bool, device=DEVICE), bias_V=leaves[2], chunk_rows=7, **options,
        )  # fmt: skip
        loss.backward()
        return [loss.detach(), stats.logp_R, *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    monkeypatch.setattr(ops, "default_chunk_rows", lambda *_: 5)
    monkeypatch.setattr(heads, "_row_stride", lambda num_tokens, _: num_tokens)
    plain = run()
    monkeypatch.setattr(heads, "_row_stride", lambda num_tokens, _: num_tokens + 15)
    for module in (fused, ops):
        monkeypatch.setattr(module, "logit_buffer", buffer_of_nan)
    padded = run()
    for got, want in zip(padded, plain, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert buffers
    assert all(rows.shape[1] == 112 and rows[:, 97:].isnan().all() for rows in buffers)


def rows_by_torch(logits, target, bias, temperature, softcap, eos_id, grad, grad_eos):
    """(logp, eos_logp, d/dlogits of sum grad logp + grad_eos eos_logp), float64."""
    leaf = logits.double().requires_grad_()
    z = leaf + bias.double()
    logp = torch.log_softmax(softcap * torch.tanh(z / softcap) / temperature, 1)
    own, eos = logp.gather(1, target[:, None])[:, 0], logp[:, eos_id]
    (grad.double() * own + grad_eos.double() * eos).sum().backward()
    return own.detach(), eos.detach(), leaf.grad


@pytest.mark.parametrize("num_tokens", [1, 5, 97, 4095, 4096, 4097, 8192, 12_300])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_and_eos_in_the_first_a_later_and_the_last_block_of_a_row(num_tokens, everything, dtype):
    """A block has 4096 numbers. The rows are padded with NaN, which nobody may read or write."""
    from ampo_fast.kernels.row_pass import row_gradient_, row_logprob

    places = sorted({0, 1, 4095, 4096, num_tokens // 2, num_tokens - 2, num_tokens - 1} & set(range(num_tokens)))
    target = torch.tensor(places, device=DEVICE)
    generator = torch.Generator().manual_seed(num_tokens)
    random = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: E731
    values = (4 * random(len(places), num_tokens)).to(dtype)
    grad, grad_eos, bias = random(len(places)), random(len(places)), random(num_tokens).to(dtype)
    temperature, softcap = (0.8, 20.0) if everything else (1.0, None)
    digit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    # A GPU's exp2 and division are good to 2^-22, a capped score, softcap (1 - 2 / (1 + exp2)), to 2.5 times softcap of that;
    # what is compared is the difference of two.
    near = 2 * 2.5 * 2**-22 * softcap / temperature if everything and ON_GPU else 2e-6
    for eos_id in places if everything else [None]:
        options = (bias if everything else None, temperature, softcap, eos_id)
        padded = torch.full((len(places), num_tokens + 19), torch.nan, dtype=dtype, device=DEVICE)
        logits = padded[:, :num_tokens].copy_(values)
        logp, eos_logp, sums = row_logprob(logits, target, *options)
        row_gradient_(logits, target, sums, grad, grad_eos if everything else None, *options)
        if everything:
            want = rows_by_torch(values, target, bias, temperature, softcap, eos_id, grad, grad_eos)
            torch.testing.assert_close(eos_logp.double(), want[1], rtol=2e-6, atol=near)
        else:
            want = rows_by_torch(values, target, torch.zeros_like(bias), 1.0, 1e9, 0, grad, torch.zeros_like(grad))
        torch.testing.assert_close(logp.double(), want[0], rtol=2e-6, atol=near)
        torch.testing.assert_close(logits.double(), want[2], rtol=digit, atol=max(near, digit * 1e-3))
        assert padded[:, num_tokens:].isnan().all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_the_gradient_keeps_its_digits_far_from_zero(shift):
    """exp(z - lse) with lse in float32 would have three of them at 1e4."""
    from ampo_fast.kernels.row_pass import row_gradient_, row_logprob

    logits = shift + torch.arange(5000, device=DEVICE).remainder(8)[None].repeat(2, 1).float()
    target, ones, options = (
        torch.tensor([7, 4999], device=DEVICE),
        torch.ones(2, device=DEVICE),
        (None, 1.0, None, None),
    )
    want = torch.zeros_like(logits, dtype=torch.float64).scatter_(1, target[:, None], 1.0)
    want -= torch.softmax(logits.double(), 1)
    sums = row_logprob(logits, target, *options)[2]
    torch.testing.assert_close(
        row_gradient_(logits, target, sums, ones, None, *options).double(), want, rtol=2e-6, atol=0
    )


def test_a_target_that_is_not_in_the_vocabulary_leaves_the_eos_log_prob_as_it_is():
    from ampo_fast.kernels.row_pass import row_logprob

    logits, target = torch.zeros(2, 100, device=DEVICE) - 50.0, torch.tensor([-100, 2**32 + 3], device=DEVICE)
    logp, eos_logp, _ = row_logprob(logits, target, None, 1.0, None, 3)
    assert logp.isnan().all()
    torch.testing.assert_close(eos_logp.exp(), torch.full_like(logp, 0.01))


def test_a_sure_target_keeps_the_digits_of_its_log_prob():
    """log(1 + 1e-6) in float32 has one digit."""
    from ampo_fast.kernels.row_pass import row_logprob

    logits = torch.zeros(1, 5000, device=DEVICE)
    logits[0, 4999] = 22.3
    logp = row_logprob(logits, torch.tensor([4999], device=DEVICE), None, 1.0, None, None)[0]
    # 1.4e-6 is what rounding 22.3 log2(e) makes of the others' weights; a GPU's exp2, logarithm and division add up to 0.6e-6.
    torch.testing.assert_close(
        logp.double(), torch.log_softmax(logits.double(), 1)[:, 4999], rtol=2.5e-6 if ON_GPU else 2e-6, atol=0
    )


@pytest.mark.parametrize("column", [3, 40, 4999])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_logit_without_a_value_makes_the_rows_log_probs_nan(column, value):
    from ampo_fast.kernels.row_pass import row_logprob

    logits = torch.zeros(2, 5000, device=DEVICE)
    logits[1, column] = value
    logp, eos_logp, _ = row_logprob(logits, torch.tensor([3, 3], device=DEVICE), None, 1.0, None, 7)
    for found in (logp, eos_logp):
        assert found.isnan().tolist() == [False, True]


def test_a_whole_block_of_minus_infinity_has_no_weight_and_does_no_harm():
    from ampo_fast.kernels.row_pass import row_gradient_, row_logprob

    logits = torch.zeros(1, 9000, device=DEVICE)
    logits[:, :8200] = -torch.inf
    target, options = torch.tensor([8500], device=DEVICE), (None, 1.0, None, None)
    logp, _, sums = row_logprob(logits, target, *options)
    torch.testing.assert_close(logp.exp(), torch.tensor([1 / 800], device=DEVICE))
    gradient = row_gradient_(logits, target, sums, torch.ones(1, device=DEVICE), None, *options)
    assert (gradient[:, :8200] == 0).all()
    torch.testing.assert_close(gradient[0, 8500], torch.tensor(799 / 800, device=DEVICE))


def strided(vector):
    """The same values, with others between them."""
    return torch.stack([vector, vector.flip(0)], 1)[:, 0]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_strided_targets_and_biases_are_read_with_their_strides(with_gradient):
    hidden, weight, target, bias = head(9, 64, 97, torch.float32)
    results = []
    for view in (strided, torch.clone):
        leaf = hidden.clone().requires_grad_(with_gradient)
        logp = linear_logprob(
            leaf, weight.requires_grad_(with_gradient), view(target), bias_V=view(bias), impl="triton"
        )
        if with_gradient:
            logp.square().sum().backward()
        results.append((logp.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert not with_gradient or torch.equal(results[0][1], results[1][1])


def test_strided_vectors_of_the_group_loss_and_the_segment_sum_are_read_with_their_strides():
    from ampo_fast.kernels.group_contrastive import group_contrastive
    from ampo_fast.kernels.segment_sum import segment_sum

    logp, length, reward, offsets, more = contrast_inputs()
    vectors = [logp, length.float(), reward, offsets.to(DEVICE), *more.values()]
    options = {"beta": 2.0, "alpha": 0.4, "log_gamma": 0.0, "is_avg": True, "weight": "signed", "is_squared": False}
    results = []
    for view in (strided, torch.clone):
        *given, group_offsets, ref_logp, positive, baseline = map(view, vectors)
        loss, grad = group_contrastive(
            *given, group_offsets, 17, ref_logp, positive.to(torch.int8), baseline, split_mean=False, **options
        )
        results.append((loss, grad, segment_sum(given[0], group_offsets)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_every_kernel_starts_with_the_device_of_its_tensors_as_the_current_one(monkeypatch):
    """With several GPUs in a process another may be current, whose kernels cannot reach the tensors."""
    from ampo_fast.kernels import row_pass, segment_sum

    guarded, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        guarded.append(tensor.device)
        yield
        guarded.pop()

    kind = type(row_pass.logprob_kernel)
    start = kind.__getitem__

    def noted(kernel, grid):
        launched.append((kernel.fn.__name__, guarded[-1:]))
        return start(kernel, grid)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kind, "__getitem__", noted)
    hidden, weight, target, _ = head(3, 64, 97, torch.float32)
    linear_logprob(hidden, weight, target, impl="triton")
    linear_logprob(hidden.requires_grad_(), weight, target, impl="triton").sum().backward()
    logp, length, reward, offsets, _ = contrast_inputs()
    group_contrastive_loss(logp, length, reward, offsets, beta=2.0, impl="triton")
    segment_sum.segment_sum(logp, offsets.to(DEVICE))
    names = {"split_kernel", "merge_kernel", "logprob_kernel", "gradient_kernel", "group_kernel", "segment_kernel"}
    assert {name for name, _ in launched} == names
    assert [on for _, on in launched] == [[hidden.device]] * len(launched)


def test_eos_penalties_ride_on_the_triton_loss():
    logp, length, reward, offsets, _ = contrast_inputs()
    eos = -torch.rand_like(logp)
    penalty = {"beta": 2.0, "eos_penalty": "target", "eos_lambda": 0.2, "eos_logp_M": eos}
    ours = group_contrastive_loss(logp, length, reward, offsets, impl="triton", **penalty)
    torch.testing.assert_close(ours, group_contrastive_loss(logp, length, reward, offsets, impl="torch", **penalty))


def test_triton_by_name_where_it_cannot_run_says_what_would_help(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = [torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)]
    with pytest.raises(ValueError, match="CUDA"):
        linear_logprob(*tensors, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(tensors[0].double(), tensors[1].double(), tensors[2], impl="triton")
    with pytest.raises(ValueError, match="impl"):
        linear_logprob(*tensors, impl="cuda")
    assert GroupContrastive(beta=1.0).per_group  # the class goes by "auto" and takes torch here


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_spills_and_uses_tensor_cores_for_its_dots(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "aot_compile.py"
    done = subprocess.run(
        [sys.executable, script, str(arch)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 22
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["local"] == 0, kernel
    core = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    dots = [k for k in kernels if k["kernel"].startswith("forward_bf16") and k["kernel"].endswith("split_kernel")]
    assert [k["tensor_cores"] for k in dots] == [core] * 3
    rows = {k["kernel"]: (k["load_bits"], k["store_bits"]) for k in kernels if k["kernel"].startswith("rows_")}
    assert len(rows) == 8
    for name, widths in rows.items():  # rows of 50257 numbers too: their stride is a multiple of 16
        assert widths == (128, 128 if "gradient" in name else 32), name


@pytest.mark.parametrize(
    ("num_hidden", "cut", "is_aligned"), [(64, 0, True), (80, 16, True), (80, 1, False), (100, 0, False)]
)
def test_rows_that_start_anywhere_take_the_tiles_that_do_not_spill_there(num_hidden, cut, is_aligned, monkeypatch):
    from ampo_fast.kernels import forward_logprob

    asked, tiles = [], forward_logprob.tiles
    monkeypatch.setattr(forward_logprob, "tiles", lambda *key: asked.append(key[2]) or tiles(*key))
    hidden, weight, target, _ = head(3, num_hidden, 97, torch.float32)
    late, early = slice(cut, None), slice(num_hidden - cut)
    for columns_h, columns_w in ((late, early), (early, late)):
        tensors = hidden[:, columns_h], weight[:, columns_w], target
        logp = linear_logprob(*tensors, impl="triton")
        torch.testing.assert_close(logp, linear_logprob(*tensors, impl="torch"), atol=1e-5, rtol=1e-5)
    assert asked == [is_aligned] * 2


@pytest.mark.parametrize("bad", [-1, 1000])
def test_a_target_outside_the_vocabulary_is_a_nan_log_prob_and_no_other_row_changes(bad):
    """On CUDA nobody waits for a check: without this the row would have the log-prob of a token with logit 0."""
    from ampo_fast.kernels.forward_logprob import forward_logprob
    from ampo_fast.kernels.row_pass import row_logprob

    hidden, weight, target, bias = head(7, 64, 1000, torch.float32)
    good = forward_logprob(hidden, weight, target, bias, 1.0, None, None)[0]
    broken = target.clone()
    broken[3] = bad
    rest = torch.arange(7, device=DEVICE) != 3
    for logp in (
        forward_logprob(hidden, weight, broken, bias, 1.0, None, None)[0],
        row_logprob(hidden @ weight.T, broken, bias, 1.0, None, None)[0],
    ):
        assert logp[3].isnan()
        torch.testing.assert_close(logp[rest], good[rest], rtol=1e-5, atol=1e-5)


def test_nan_logits_are_nan_log_probs():
    """A GPU's min(NaN, 0) is 0: a clamp written with it would turn them into certainty."""
    from ampo_fast.kernels.forward_logprob import forward_logprob
    from ampo_fast.kernels.row_pass import row_logprob

    hidden, weight, target, bias = head(7, 64, 1000, torch.float32)
    hidden[2] = float("nan")
    for logp, eos in (
        forward_logprob(hidden, weight, target, bias, 1.0, None, 3),
        row_logprob(hidden @ weight.T, target, bias, 1.0, None, 3)[:2],
    ):
        assert logp.isnan().tolist() == eos.isnan().tolist() == [row == 2 for row in range(7)]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: 7 GB of logits")
def test_more_than_65536_rows_and_more_than_2_to_31_logits_in_one_chunk():
    num_rows = 70_000
    hidden, weight, target, _ = head(num_rows, 64, 50_257, torch.bfloat16)
    responses, groups = torch.arange(0, num_rows + 1, 70), torch.arange(0, 1001, 8)
    reward = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(chunk_rows):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss, stats = fused_linear_group_loss(*leaves, target, responses, groups, reward, AMPO(), chunk_rows=chunk_rows)
        loss.backward()
        return stats.logp_R, leaves[0].grad, leaves[1].grad

    whole, chunked = run(num_rows), run(4096)
    last = slice(-512, None)
    truth = reference.linear_logprob(hidden[last].double(), weight.double(), target[last])
    close(whole[0][last], reference.linear_logprob(hidden[last], weight, target[last]), truth, 1e-3)
    for got, want in zip(whole, chunked, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    with torch.no_grad():
        no_logits = linear_logprob(hidden, weight, target, impl="triton")
    close(no_logits[last], reference.linear_logprob(hidden[last], weight, target[last]), truth, 1e-3)
