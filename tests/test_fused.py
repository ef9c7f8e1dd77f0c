import dataclasses
import itertools

import pytest
import torch

from ampo_fast import fused, fused_linear_group_loss, head, linear_logprob, logprobs, losses
from ampo_fast.losses import AMPO, NLL, GroupContrastive, ResponseStats, Sum, stats

D, V = 8, 97
RESPONSES = torch.tensor([0, 5, 9, 12, 20, 22, 30, 40])
GROUPS = torch.tensor([0, 3, 7])


def inputs(dtype=torch.float64, rows=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, V, (rows,), generator=g), torch.rand(7, generator=g, dtype=dtype)


def naive(
    hidden, weight, bias, target, reward, loss_fn, temperature=1.0, softcap=None, eos_id=None, ref=None, ref_row=None,
    compare_tokens=False, positive=None, baseline=None,
):  # fmt: skip
    logits = hidden @ weight.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    all_logp = torch.log_softmax(logits / temperature, dim=-1)
    row = all_logp.gather(1, target[:, None])[:, 0]
    logp = torch.stack([row[a:b].sum() for a, b in itertools.pairwise(RESPONSES)])
    eos = None
    if eos_id is not None:
        last = RESPONSES[1:] - 1
        eos = all_logp[last, eos_id].masked_fill(target[last] != eos_id, torch.nan)
    stats = ResponseStats(
        logp, RESPONSES.diff(), reward, GROUPS, ref, eos, positive, baseline, response_offsets=RESPONSES, logp_R=row,
        eos_logp_R=None if eos_id is None else all_logp[:, eos_id], target_R=target if compare_tokens else None,
        ref_logp_R=ref_row,
    )  # fmt: skip
    return loss_fn(stats).per_group_B.sum() / 2


@pytest.mark.parametrize("mode", ["grouped", "recompute"])
@pytest.mark.parametrize("chunk_rows", [1, 13, 1000])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 4.0)])
def test_loss_and_every_gradient_equal_the_naive_ones(mode, chunk_rows, temperature, softcap):
    hidden, weight, bias, target, reward = inputs()
    loss_fn = AMPO(alpha=0.3)
    expected = naive(hidden, weight, bias, target, reward, loss_fn, temperature, softcap)
    expected_grads = torch.autograd.grad(expected, (hidden, weight, bias))
    loss, stats = fused_linear_group_loss(
        hidden, weight, target, RESPONSES, GROUPS, reward, loss_fn,
        bias_V=bias, temperature=temperature, softcap=softcap, mode=mode, chunk_rows=chunk_rows,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert abs((loss - expected).item()) < 1e-13
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert not stats.logp_M.requires_grad
    assert stats.length_M.tolist() == RESPONSES.diff().tolist()


@pytest.mark.parametrize("mode", ["grouped", "recompute"])
@pytest.mark.parametrize("chunk_rows", [1, 1000])
def test_the_loss_sees_the_given_sides_and_baselines_of_its_own_groups(mode, chunk_rows):
    hidden, weight, bias, target, reward = inputs()
    given = {
        "positive_M": torch.tensor([False, True, False, True, False, True, False]),
        "baseline_B": torch.tensor([0.2, 0.7], dtype=torch.float64),
    }
    loss_fn = GroupContrastive(beta=2.0, alpha=0.7, weight="abs")
    expected = naive(
        hidden, weight, bias, target, reward, loss_fn, positive=given["positive_M"], baseline=given["baseline_B"]
    )
    assert expected.item() != pytest.approx(naive(hidden, weight, bias, target, reward, loss_fn).item(), rel=1e-3)
    loss, stats = fused_linear_group_loss(
        hidden,
        weight,
        target,
        RESPONSES,
        GROUPS,
        reward,
        loss_fn,
        bias_V=bias,
        mode=mode,
        chunk_rows=chunk_rows,
        **given,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    want = torch.autograd.grad(expected, weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], want, atol=1e-12, rtol=0)
    assert all(torch.equal(getattr(stats, name), vector) for name, vector in given.items())


@pytest.mark.parametrize(
    ("chunk_rows", "chunks"), [(12, [12, 10, 8, 10]), (11, [9, 11, 10, 10]), (1, [5, 4, 3, 8, 2, 8, 10]), (40, [40])]
)
def test_a_chunk_holds_as_many_whole_groups_as_fit(chunk_rows, chunks, monkeypatch):
    seen, head_chunk = [], fused.head_chunk
    monkeypatch.setattr(fused, "head_chunk", lambda h_RD, *more: seen.append(len(h_RD)) or head_chunk(h_RD, *more))
    hidden, weight, _, target, reward = inputs()
    fused_linear_group_loss(
        hidden, weight, target, RESPONSES, torch.arange(8), reward, NLL(), mode="grouped", chunk_rows=chunk_rows
    )
    assert seen == chunks


def test_the_default_normalizer_is_the_number_of_groups():
    hidden, weight, _, target, reward = inputs()
    for groups in (torch.tensor([0, 7]), GROUPS, torch.tensor([0, 0, 3, 7])):
        given, default = (
            fused_linear_group_loss(hidden, weight, target, RESPONSES, groups, reward, AMPO(), normalizer=count)[0]
            for count in (len(groups) - 1, None)
        )
        assert given.item() == default.item()
    none = torch.zeros(1, dtype=torch.int64)
    empty, _ = fused_linear_group_loss(hidden[:0], weight, target[:0], none, none, reward[:0], AMPO())
    assert empty.item() == 0.0
    assert torch.autograd.grad(empty, weight)[0].abs().max() == 0.0


@pytest.mark.parametrize(("longest", "chunk_rows", "products"), [(20, None, 6), (19, None, 8), (1, 20, 6), (40, 19, 8)])
def test_a_long_groups_logits_are_computed_once_where_they_may_be_held(longest, chunk_rows, products, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which test_kernels must be the first to do

    monkeypatch.setattr(fused, "default_chunk_rows", lambda *_: 4)
    monkeypatch.setattr(logprobs, "default_chunk_rows", lambda *_: 4)
    monkeypatch.setattr(head, "_WHOLE_GROUP_BYTES", {"cpu": longest * V * 8})
    hidden, weight, _, target, reward = inputs()
    with FlopCounterMode(display=False) as counter:
        loss, _ = fused_linear_group_loss(
            hidden, weight, target, torch.tensor([0, 9, 20, 30, 40]), torch.tensor([0, 2, 3, 4]), reward[:4], NLL(),
            chunk_rows=chunk_rows,
        )  # fmt: skip
        loss.backward()
    assert counter.get_total_flops() == products * 40 * D * V


EVERY_LOSS = [
    getattr(losses, name)()
    for name in losses.__all__
    if name not in ("ResponseStats", "LossOutput", "GroupContrastive", "Sum", "NLL", "group_contrastive_loss")
] + [
    GroupContrastive(beta=2.0, eos_penalty="budgeted", eos_lambda=0.3, eos_budget=3),
    GroupContrastive(beta=2.0, eos_penalty="target", eos_lambda=0.3),
    Sum([(1.0, losses.MMPO()), (0.5, losses.PlackettLuce())]),
]


@pytest.mark.parametrize("mode", ["grouped", "recompute"])
@pytest.mark.parametrize("compare_tokens", [False, True])
@pytest.mark.parametrize("loss_fn", EVERY_LOSS, ids=lambda loss: type(loss).__name__)
def test_every_loss_is_a_loss_of_the_fused_op(loss_fn, compare_tokens, mode):
    hidden, weight, bias, target, reward = inputs(seed=3)
    target[RESPONSES[1:-2] - 1] = 5  # all but two responses end in the id taken for EOS
    eos = 5 if loss_fn.needs_eos else None
    target[6:8] = target[:2]  # so that some tokens of a pair are the same
    ref, ref_row = (torch.linspace(-30.0, -10.0, count, dtype=torch.float64) for count in (7, 40))
    ref_row = ref_row if loss_fn.needs_reference_rows else None
    expected = naive(
        hidden,
        weight,
        bias,
        target,
        reward,
        loss_fn,
        eos_id=eos,
        ref=ref,
        ref_row=ref_row,
        compare_tokens=compare_tokens,
    )
    loss, _ = fused_linear_group_loss(
        hidden, weight, target, RESPONSES, GROUPS, reward, loss_fn, bias_V=bias, eos_id=eos, ref_logp_M=ref,
        ref_logp_R=ref_row, mode=mode, chunk_rows=25, **({"compare_tokens": True} if compare_tokens else {}),
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    for got, want in zip(
        torch.autograd.grad(loss, (hidden, weight, bias)),
        torch.autograd.grad(expected, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("mode", ["grouped", "recompute"])
def test_eos_column_gradient(mode):
    hidden, weight, bias, target, reward = inputs()
    target[RESPONSES[1:3] - 1] = 5
    loss_fn = GroupContrastive(beta=1.0, eos_penalty="simple", eos_lambda=0.5)
    expected = naive(hidden, weight, bias, target, reward, loss_fn, eos_id=5)
    loss, _ = fused_linear_group_loss(
        hidden, weight, target, RESPONSES, GROUPS, reward, loss_fn, bias_V=bias, eos_id=5, mode=mode
    )
    assert abs((loss - expected).item()) < 1e-13
    for got, want in zip(
        torch.autograd.grad(loss, (hidden, weight, bias)),
        torch.autograd.grad(expected, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_backward_repeats_and_scales():
    hidden, weight, _, target, reward = inputs()
    loss, _ = fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO(), mode="grouped")
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 3.0, weight, retain_graph=True)[0]
    torch.testing.assert_close(second, 3.0 * first)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], first)


@pytest.mark.parametrize("mode", ["grouped", "recompute", "frozen"])
def test_a_second_derivative_is_refused_not_left_out(mode):
    hidden, weight, _, target, reward = inputs()
    weight = weight.detach() if mode == "frozen" else weight
    loss, _ = fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO(), mode=mode)
    with pytest.raises(RuntimeError, match="no second derivative"):  # beside a path of its own to the inputs, too
        torch.autograd.grad(loss + hidden.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        torch.autograd.grad(linear_logprob(hidden, weight, target).sum(), hidden, create_graph=True)


def test_frozen_weight_keeps_the_hidden_gradient_and_refuses_a_trainable_one():
    hidden, weight, bias, target, reward = inputs()
    frozen = weight.detach()
    loss, _ = fused_linear_group_loss(hidden, frozen, target, RESPONSES, GROUPS, reward, AMPO())
    full, _ = fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO())
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(full, hidden)[0], atol=1e-12, rtol=0
    )
    with pytest.raises(ValueError, match="frozen"):
        fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO(), mode="frozen")
    with pytest.raises(ValueError, match="bias_V requires one"):
        fused_linear_group_loss(hidden, frozen, target, RESPONSES, GROUPS, reward, AMPO(), bias_V=bias, mode="frozen")


def test_frozen_hidden_skips_its_gradient():
    hidden, weight, _, target, reward = inputs()
    loss, _ = fused_linear_group_loss(hidden.detach(), weight, target, RESPONSES, GROUPS, reward, AMPO())
    full, _ = fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO())
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(full, weight)[0])


def test_no_grad_gives_the_same_loss_and_no_graph():
    hidden, weight, _, target, reward = inputs()
    loss, _ = fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO())
    with torch.no_grad():
        quiet, _ = fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO())
    assert not quiet.requires_grad
    assert quiet.item() == pytest.approx(loss.item(), abs=1e-13)


def test_accumulated_micro_batches_equal_one_batch():
    hidden, weight, _, target, reward = inputs()
    loss_fn = Sum([(1.0, AMPO()), (0.5, NLL())])
    positive = torch.tensor([True, False, False, True, False, False, False])
    whole, _ = fused_linear_group_loss(
        hidden, weight, target, RESPONSES, GROUPS, reward, loss_fn, positive_M=positive, normalizer=2
    )
    parts = []
    for first, last, m0, m1 in ((0, 12, 0, 3), (12, 40, 3, 7)):
        part, _ = fused_linear_group_loss(
            hidden[first:last], weight, target[first:last], RESPONSES[m0 : m1 + 1] - first, torch.tensor([0, m1 - m0]),
            reward[m0:m1], loss_fn, positive_M=positive[m0:m1], normalizer=2,
        )  # fmt: skip
        parts.append(part)
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(sum(parts), weight)[0], torch.autograd.grad(whole, weight)[0], atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_torch_in_the_same_dtype(dtype):
    hidden, weight, bias, target, reward = inputs()
    truth = torch.autograd.grad(naive(hidden, weight, bias, target, reward, AMPO()), (hidden, weight))
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    same = torch.autograd.grad(naive(*low, target, reward.to(dtype), AMPO()), low[:2])
    loss, _ = fused_linear_group_loss(*low[:2], target, RESPONSES, GROUPS, reward.float(), AMPO(), bias_V=low[2])
    ours = torch.autograd.grad(loss, low[:2])
    slack = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype] * max(t.abs().max() for t in truth).item()
    for mine, theirs, exact in zip(ours, same, truth, strict=True):
        assert (mine.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + slack


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_logp_is_never_positive_whatever_the_shift(shift):
    hidden, weight, _, target, _ = inputs(torch.float32)
    logp = linear_logprob(hidden, weight, target, bias_V=torch.full((V,), shift))
    assert (logp <= 0).all()
    here = linear_logprob(hidden, weight, target)
    torch.testing.assert_close(logp, here, atol=4e-3, rtol=0)  # one digit of 1e4 in float32 is 1e-3


def test_a_loss_scale_keeps_the_small_gradients_of_float16():
    """Of 4,096 groups a row's gradient is below 6e-8, float16's smallest number, unless it is scaled as it is made."""
    hidden, weight, _, target, reward = (t.detach() for t in inputs())
    grads = []
    for dtype, scale in ((torch.float64, 1.0), (torch.float16, 2.0**16)):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        loss, _ = fused_linear_group_loss(
            *leaves, target, RESPONSES, GROUPS, reward.to(torch.float32), AMPO(beta=0.1), normalizer=4096
        )
        grads.append([grad.double() / scale for grad in torch.autograd.grad(loss * scale, leaves)])
    for exact, half in zip(*grads, strict=True):
        assert (half - exact).norm() <= 0.01 * exact.norm()


def test_the_log_sum_exp_of_bfloat16_logits_is_not_rounded_again():
    hidden, weight, _, target, _ = (t.detach() for t in inputs(torch.bfloat16))
    truth = torch.log_softmax((hidden @ weight.T).double(), 1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(linear_logprob(hidden, weight, target).double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["grouped", "recompute"])
def test_the_weights_gradient_is_rounded_once_however_many_chunks(mode, monkeypatch):
    """Terms of one sign: added up in bfloat16, the small ones would be lost on the large sum."""
    monkeypatch.setattr(logprobs, "default_chunk_rows", lambda *_: 8)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(2048, D, generator=generator).bfloat16()
    target = torch.zeros(2048, dtype=torch.int64)
    weight = torch.randn(V, D, generator=generator).bfloat16().requires_grad_()
    offsets, groups = torch.arange(0, 2049, 8), torch.arange(0, 257)
    loss, _ = fused_linear_group_loss(
        hidden, weight, target, offsets, groups, torch.zeros(256), NLL(), positive_M=torch.ones(256, dtype=torch.bool),
        mode=mode, chunk_rows=8,
    )  # fmt: skip
    loss.backward()
    exact = weight.detach().double().requires_grad_()
    (-torch.log_softmax(hidden.double() @ exact.T, 1)[:, 0].mean()).backward()
    assert (weight.grad[0].double() - exact.grad[0]).abs().max() <= 0.006 * exact.grad[0].abs().max()


def test_the_upstream_gradient_is_applied_to_the_float32_sum_and_rounded_once(monkeypatch):
    walk, kept = fused._walk_groups, []

    def noted(*arguments):
        loss, gradients = walk(*arguments)
        kept.extend(gradients.sums())
        return loss, gradients

    monkeypatch.setattr(fused, "_walk_groups", noted)
    leaves = [t.detach().bfloat16().requires_grad_() for t in inputs()[:3]]
    _, _, _, target, reward = inputs()
    loss, _ = fused_linear_group_loss(
        *leaves[:2], target, RESPONSES, GROUPS, reward.float(), AMPO(), bias_V=leaves[2], mode="grouped", chunk_rows=13,
    )  # fmt: skip
    (loss / 3).backward()
    assert [total.dtype for total in kept] == [torch.bfloat16, torch.float32, torch.float32]
    for leaf, total in zip(leaves, kept, strict=True):
        assert torch.equal(leaf.grad, (total.float() * (torch.ones(()) / 3)).bfloat16())


def test_the_backward_of_a_segments_sum_copies_nothing_from_the_host(monkeypatch):
    copied, on_device = [], stats.on_device
    monkeypatch.setattr(stats, "on_device", lambda plan, device: copied.append(plan) or on_device(plan, device))
    values, offsets = torch.rand(40, requires_grad=True), torch.tensor([0, 0, 5, 40])
    total = stats.segment_sum(values, offsets)
    (total * torch.tensor([7.0, 2.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [2.0] * 5 + [3.0] * 35
    assert [plan.numel() for plan in copied] == [4]


@pytest.mark.parametrize(
    ("frozen", "products"), [((), 6), (("weight",), 4), (("hidden",), 4), (("hidden", "weight"), 2)], ids=str
)
def test_no_product_is_made_for_a_gradient_that_nobody_wants(frozen, products):
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which test_kernels must be the first to do

    hidden, weight, _, target, reward = inputs()
    leaves = [t.detach() if name in frozen else t for name, t in (("hidden", hidden), ("weight", weight))]
    with FlopCounterMode(display=False) as counter:
        loss, _ = fused_linear_group_loss(*leaves, target, RESPONSES, GROUPS, reward, AMPO())
        if loss.requires_grad:
            loss.backward()
    assert counter.get_total_flops() == products * 40 * D * V


@pytest.mark.parametrize(("options", "products"), [({}, 4), ({"softcap": 4.0}, 4), ({"eos_id": 3}, 6)], ids=str)
def test_a_frozen_head_keeps_the_hidden_gradient_of_a_unit_upstream(options, products):
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which test_kernels must be the first to do

    hidden, weight, _, target, _ = inputs()
    frozen = weight.detach()
    with FlopCounterMode(display=False) as counter:
        out = linear_logprob(hidden, frozen, target, temperature=0.8, **options)
        sum(part.sum() for part in (out if "eos_id" in options else (out,))).backward()
    assert counter.get_total_flops() == products * 40 * D * V
    run = lambda h: linear_logprob(h, frozen, target[:6], temperature=0.8, **options)  # noqa: E731
    assert torch.autograd.gradcheck(run, (hidden[:6].detach().requires_grad_(),))


@pytest.mark.parametrize(("chunk_rows", "products"), [(None, 4), (1, 6)])
def test_a_frozen_heads_logits_are_made_once_for_two_log_probs_too(chunk_rows, products):
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, _, target, reward = inputs()
    target[RESPONSES[1:3] - 1] = 5
    loss_fn = GroupContrastive(beta=1.0, eos_penalty="simple", eos_lambda=0.5)
    grads = []
    for head_weight in (weight, weight.detach()):
        with FlopCounterMode(display=False) as counter:
            loss, _ = fused_linear_group_loss(
                hidden, head_weight, target, RESPONSES, GROUPS, reward, loss_fn, eos_id=5, chunk_rows=chunk_rows
            )
            grads += torch.autograd.grad(loss, hidden)
    assert counter.get_total_flops() == products * 40 * D * V
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_without_gradient_only_the_logits_are_made():
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, _, target, reward = inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fused_linear_group_loss(hidden, weight, target, RESPONSES, GROUPS, reward, AMPO())
    assert counter.get_total_flops() == 2 * 40 * D * V


def test_linear_logprob_gradcheck_for_signed_upstream():
    hidden, weight, bias, target, _ = inputs()
    hidden, target = hidden[:6].detach().requires_grad_(), target[:6]
    run = lambda h, w, b: linear_logprob(h, w, target, bias_V=b, eos_id=3, temperature=0.8, softcap=4.0)  # noqa: E731
    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_sure_target_keeps_its_gradient_digits():
    # p_target = 1 - 1e-4: computed as 1 - p in float32 the gradient would lose four digits.
    logits = torch.zeros(4)
    logits[0] = torch.log(torch.tensor(3 * (1 - 1e-4) / 1e-4, dtype=torch.float64)).float()
    hidden = torch.ones(1, 1).requires_grad_()
    weight = logits[:, None].clone().requires_grad_()
    logp = linear_logprob(hidden, weight, torch.tensor([0]))
    logp.sum().backward()
    exact = 1 - torch.softmax(weight.detach().double()[:, 0], 0)[0]
    assert weight.grad[0, 0].item() == pytest.approx(exact.item(), rel=2e-5)


def test_a_sure_target_far_from_zero_keeps_the_digits_of_its_log_prob():
    # z - (top + log sum) would round to the digits of the top: 1e-3 at 1e4.
    hidden, weight, bias = torch.zeros(2, 2), torch.zeros(50, 2), torch.full((50,), 9986.0)
    bias[7] = 1e4
    logp, eos_logp = linear_logprob(hidden, weight, torch.tensor([7, 3]), bias_V=bias, eos_id=4)
    exact = torch.log_softmax(bias.double(), 0)
    torch.testing.assert_close(logp.double(), exact[[7, 3]], rtol=1e-6, atol=0)
    torch.testing.assert_close(eos_logp.double(), exact[[4, 4]], rtol=1e-6, atol=0)


def test_a_frozen_head_has_the_trained_ones_gradient_under_autocast_and_one_backward():
    hidden, weight, _, target, _ = inputs(torch.float32)
    grads = []
    for leaf in (weight, weight.detach()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_logprob(hidden, leaf, target).sum()
        grads += torch.autograd.grad(loss, hidden)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)


def test_a_group_without_responses_is_no_hindrance_to_an_eos_penalty():
    hidden, weight, _, target, reward = inputs()
    groups = torch.tensor([0, 0, 3, 3, 7])
    loss_fn = losses.REFA1vsK(eos_penalty="simple", eos_lambda=0.5)
    found = [
        fused_linear_group_loss(
            hidden, weight, target, RESPONSES, groups, reward, loss_fn, eos_id=3, mode=mode, chunk_rows=1
        )[0].item()
        for mode in ("grouped", "recompute")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target_R": torch.full((40,), V)}, r"target_R\[0\] = 97 is outside .* 0 .. 96"),
        (
            {"target_R": torch.zeros(40, dtype=torch.int64).index_fill_(0, torch.tensor([3, 5]), -100)},
            r"target_R\[3\] = -100",
        ),
        ({"weight_VD": torch.zeros(V, D, dtype=torch.bfloat16)}, r"hidden_RD.to\(weight_VD.dtype\)"),
        ({"target_R": torch.zeros(39, dtype=torch.int64)}, "target_R"),
        ({"weight_VD": torch.zeros(V, D, dtype=torch.float64, device="meta")}, "weight_VD is on meta"),
        (
            {"weight_VD": torch.zeros(V, D, dtype=torch.float64).as_subclass(type("DTensor", (torch.Tensor,), {}))},
            "FSDP",
        ),
        ({"reward_M": torch.zeros(7, device="meta")}, "reward_M is on meta"),
        ({"reward_M": torch.full((7,), torch.nan)}, "reward_M holds NaN"),
        ({"ref_logp_M": torch.full((7,), -torch.inf)}, "ref_logp_M holds NaN or infinity"),
        ({"response_offsets": torch.tensor([0, 5, 4, 12, 20, 22, 30, 40])}, "response_offsets must rise"),
        ({"chunk_rows": 0}, "chunk_rows = 0"),
        ({"chunk_rows": -1}, "chunk_rows = -1"),
        ({"normalizer": 0}, "normalizer = 0"),
        ({"normalizer": torch.tensor(0.0)}, "normalizer = 0"),
        ({"normalizer": torch.ones(2)}, r"0-d tensor, got one of shape \(2,\)"),
        ({"normalizer": "4"}, "normalizer = '4'"),
        ({"loss_fn": None}, "loss_fn = None"),
        ({"loss_fn": AMPO}, "loss_fn = <class"),
        ({"weight_VD": torch.zeros(V, D).numpy()}, "weight_VD must be a torch tensor, got ndarray; torch.from_numpy"),
        ({"response_offsets": torch.tensor([0, 5, 5, 40])}, "empty"),
        ({"group_offsets": torch.tensor([0, 8])}, "group_offsets"),
        ({"reward_M": torch.zeros(6)}, "reward_M"),
        ({"mode": "fast"}, "mode"),
        ({"impl": "triton"}, "impl"),
        ({"response_offsets": torch.tensor([0, 5, 9, 12, 20, 22, 21, 40])}, "entry 6 is 21 after 22"),
        ({"chunk_rows": "4"}, "chunk_rows = '4'"),
        ({"eos_id": 97}, "eos_id"),
        ({"eos_id": [3, 4]}, r"eos_id = \[3, 4\]; it must be one token id"),
        ({"eos_id": True}, "eos_id = True"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": None}, "temperature = None"),
        ({"softcap": 0.0}, r"softcap = 0\.0"),
        ({"softcap": "30"}, "softcap = '30'"),
        (
            {"loss_fn": lambda stats: stats.logp_M.sum()},
            r"loss_fn returned torch.float64 \(\); it must return .*LossOutput",
        ),
        ({"reward_M": torch.zeros(7).as_subclass(type("DTensor", (torch.Tensor,), {}))}, r"reward_M\.full_tensor"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    hidden, weight, _, target, reward = inputs()
    arguments = {
        "hidden_RD": hidden, "weight_VD": weight, "target_R": target, "response_offsets": RESPONSES,
        "group_offsets": GROUPS, "reward_M": reward, "loss_fn": AMPO(),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=match):
        fused_linear_group_loss(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_logits_are_named_by_row(value):
    hidden, weight, _, target, reward = (t.detach() for t in inputs())
    hidden[11, 2] = value
    with pytest.raises(ValueError, match="row 11"):
        linear_logprob(hidden, weight, target)
    with pytest.raises(ValueError, match="row 11"):
        fused_linear_group_loss(hidden, weight.requires_grad_(), target, RESPONSES, GROUPS, reward, AMPO())


@pytest.mark.parametrize("num_tokens", [97, 49152, 50257, 128256, 128257, 151936, 262144, 1_000_000])
def test_a_gpus_chunks_are_whole_tiles_and_its_rows_of_logits_are_multiples_of_16(num_tokens):
    gpu = torch.device("cuda")
    with_gradient, without = head.default_chunk_rows(num_tokens, gpu), head.forward_chunk_rows(num_tokens, gpu)
    assert with_gradient % 256 == without % 256 == 0
    assert 4096 <= with_gradient <= 8192
    assert without >= 512
    assert without == 512 or 2**29 - 512 * num_tokens < 2 * without * num_tokens <= 2**29  # bytes of bfloat16
    assert with_gradient == 4096 or 2**31 - 512 * num_tokens < 2 * with_gradient * num_tokens or with_gradient == 8192
    stride = head._row_stride(num_tokens, gpu)
    assert stride % 16 == 0
    assert 0 <= stride - num_tokens < 16


def test_a_cpus_chunks_and_rows_are_not_rounded():
    cpu = torch.device("cpu")
    assert head.default_chunk_rows(49152, cpu) == head.forward_chunk_rows(49152, cpu) == 2**24 // 49152
    assert head.default_chunk_rows(1_000_000, cpu) == 64
    assert head.whole_group_rows(torch.empty(49152, 1)) == 8 * 682 + 5  # 1 GiB of float32
    assert head.logit_buffer(torch.zeros(2, 3), torch.zeros(97, 3), 8).stride() == (97, 1)


def test_stats_fields_stand_in_the_promised_order():
    names = [field.name for field in dataclasses.fields(ResponseStats)]
    assert names == [
        "logp_M", "length_M", "reward_M", "group_offsets", "ref_logp_M", "eos_logp_M", "positive_M", "baseline_B",
        "response_offsets", "logp_R", "eos_logp_R", "target_R", "ref_logp_R",
    ]  # fmt: skip
