"""Listwise losses and KTO against their formulas, written out with Python floats."""

import dataclasses
import math

import pytest
import torch

from ampo_fast.losses import DPO, KTO, NCA, InfoNCA, LambdaPO, PlackettLuce, REFAInfoNCA, ResponseStats

F64 = torch.float64
LOGP = [-10.0, -12.5, -7.0, -9.25]
REF = [-11.0, -11.5, -7.5, -8.0]
LENGTH = [4, 6, 3, 5]
REWARD = [0.9, 0.1, 0.4, 0.4]
M = [0.1 * (a - b) for a, b in zip(LOGP, REF, strict=True)]


def stats(ref=True, copies=1, **more):
    def many(values, dtype=F64):
        return torch.tensor(values * copies, dtype=dtype)

    offsets = torch.arange(copies + 1) * 4
    return ResponseStats(many(LOGP), many(LENGTH), many(REWARD), offsets, many(REF) if ref else None, **more)


def ls(x):
    return -math.log1p(math.exp(-x))


def lse(values):
    return math.log(sum(math.exp(v) for v in values))


def softmax(values):
    total = lse(values)
    return [math.exp(v - total) for v in values]


def test_infonca_and_nca_by_hand():
    target = softmax([r / 0.5 for r in REWARD])
    expected = -sum(t * (m - lse(M)) for t, m in zip(target, M, strict=True))
    assert InfoNCA(beta=0.1, temperature=0.5)(stats()).loss.item() == pytest.approx(expected, abs=1e-12)
    expected = -sum(t * ls(m) for t, m in zip(target, M, strict=True)) - sum(ls(-m) for m in M) / 4
    assert NCA(beta=0.1, temperature=0.5)(stats()).loss.item() == pytest.approx(expected, abs=1e-12)


def test_infonca_of_a_pair_with_a_hard_target_is_dpo():
    pair = ResponseStats(
        torch.tensor(LOGP[:2], dtype=F64), torch.tensor(LENGTH[:2]), torch.tensor(REWARD[:2], dtype=F64),
        torch.tensor([0, 2]), torch.tensor(REF[:2], dtype=F64),
    )  # fmt: skip
    hard = InfoNCA(beta=0.1, temperature=1e-4)(pair).loss.item()
    assert hard == pytest.approx(DPO(beta=0.1)(pair).loss.item(), abs=1e-12)


def test_refa_infonca_is_of_mean_log_probs_and_rests_at_its_target():
    scores = [2.0 * a / n for a, n in zip(LOGP, LENGTH, strict=True)]
    target = softmax([3.0 * r for r in REWARD])
    expected = -sum(t * (s - lse(scores)) for t, s in zip(target, scores, strict=True))
    loss = REFAInfoNCA(beta=2.0, alpha=3.0)
    assert loss(stats()).loss.item() == pytest.approx(expected, abs=1e-12)
    assert not loss.uses_reference
    at_rest = (torch.tensor(REWARD, dtype=F64) * 3.0 / 2.0 * torch.tensor(LENGTH)).requires_grad_()
    base = stats()
    loss(ResponseStats(at_rest, base.length_M, base.reward_M, base.group_offsets)).loss.backward()
    assert at_rest.grad.abs().max() < 1e-15


def test_plackett_luce_orders_by_reward_and_ties_by_index():
    order = [0, 2, 3, 1]
    expected = sum(lse([M[j] for j in order[k:]]) - M[order[k]] for k in range(4))
    assert PlackettLuce(beta=0.1)(stats()).loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("normalized", [True, False])
def test_lambda_po_by_hand(normalized):
    rank = {i: 1 + sum(M[j] > M[i] for j in range(4)) for i in range(4)}
    gain = [2**r - 1 for r in REWARD]
    if normalized:
        best = sum(g / math.log2(1 + place) for place, g in enumerate(sorted(gain, reverse=True), 1))
        gain = [g / best for g in gain]
    pairs = [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]
    terms = [
        abs(gain[i] - gain[j])
        * abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
        * math.log1p(math.exp(M[j] - M[i]))
        for i, j in pairs
    ]
    expected = sum(terms) / 5 if normalized else sum(terms)
    got = LambdaPO(beta=0.1, normalized=normalized)(stats()).loss.item()
    assert got == pytest.approx(expected, abs=1e-12)


def test_lambda_po_without_any_gain_is_zero_not_nan():
    base = stats()
    out = LambdaPO()(ResponseStats(base.logp_M, base.length_M, torch.zeros(4, dtype=F64), base.group_offsets))
    assert out.loss == 0


ALL = [InfoNCA(beta=0.1, temperature=0.5), NCA(beta=0.1, temperature=0.5), REFAInfoNCA(beta=2.0), PlackettLuce(),
       LambdaPO(), LambdaPO(normalized=False), KTO()]  # fmt: skip


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradients_are_exact_beside_groups_of_other_sizes(loss):
    base = stats(copies=2)
    offsets = torch.tensor([0, 0, 3, 7, 8])

    def per_group(logp_M):
        return loss(ResponseStats(logp_M, base.length_M, base.reward_M, offsets, base.ref_logp_M)).per_group_B

    assert torch.autograd.gradcheck(per_group, (base.logp_M.clone().requires_grad_(),))
    assert per_group(base.logp_M)[0] == 0


def test_a_group_of_one_response_has_nothing_to_order_and_a_mean_of_its_own():
    one = ResponseStats(
        *(vector[:1] for vector in (stats().logp_M, stats().length_M, stats().reward_M)), torch.tensor([0, 1])
    )
    one = dataclasses.replace(one, ref_logp_M=stats().ref_logp_M[:1])
    for loss in ALL:
        if not isinstance(loss, (NCA, KTO)):
            assert loss(one).loss.item() == 0.0
    assert NCA(beta=0.1)(one).loss.item() == pytest.approx(-ls(M[0]) - ls(-M[0]), abs=1e-14)
    assert KTO(beta=0.1)(one).loss.item() == pytest.approx(
        1 / (1 + math.exp(-M[0])), abs=1e-14
    )  # not above its own mean


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_padding_changes_nothing(loss):
    wide = stats(copies=2)
    ragged = ResponseStats(
        wide.logp_M, wide.length_M, wide.reward_M, torch.tensor([0, 4, 5, 8]), wide.ref_logp_M
    )  # fmt: skip
    assert loss(ragged).per_group_B[0].item() == pytest.approx(loss(stats()).per_group_B[0].item(), abs=1e-13)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_no_groups_give_zero(loss):
    empty = torch.zeros(0, dtype=F64)
    assert loss(ResponseStats(empty, empty, empty, torch.tensor([0]))).loss == 0


def test_kto_by_hand():
    loss = KTO(beta=0.1, desirable_weight=2.0, undesirable_weight=0.5, kl=0.3)
    rho = [a - b for a, b in zip(LOGP, REF, strict=True)]

    def s(x):
        return 1 / (1 + math.exp(-x))

    def expected(desirable):
        terms = [
            2.0 * (1 - s(0.1 * (r - 0.3))) if good else 0.5 * (1 - s(0.1 * (0.3 - r)))
            for r, good in zip(rho, desirable, strict=True)
        ]
        return sum(terms) / 4

    assert loss(stats()).loss.item() == pytest.approx(expected([True, False, False, False]), abs=1e-12)
    given = loss(stats(positive_M=torch.tensor([False, True, True, False])))
    assert given.loss.item() == pytest.approx(expected([False, True, True, False]), abs=1e-12)


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="kl"):
        KTO(kl=-0.1)
    with pytest.raises(ValueError, match="temperature = 0"):
        NCA(temperature=0.0)
    for kind in (KTO, PlackettLuce, InfoNCA):
        with pytest.raises(ValueError, match="beta = 0"):
            kind(beta=0.0)


def test_kto_finds_nothing_desirable_where_all_rewards_are_equal():
    base = stats()
    equal = ResponseStats(base.logp_M, base.length_M, torch.full((4,), 0.11), base.group_offsets, base.ref_logp_M)
    none = ResponseStats(
        base.logp_M, base.length_M, base.reward_M, base.group_offsets, base.ref_logp_M, None, torch.zeros(4) > 0
    )
    assert KTO()(equal).loss.item() == pytest.approx(KTO()(none).loss.item(), rel=1e-12)


def test_gains_that_overflow_are_refused_with_the_way_out():
    base = stats()
    with pytest.raises(ValueError, match=r"reward_M reaches 200: .* overflows; .*reward\.normalize"):
        LambdaPO()(
            ResponseStats(base.logp_M.float(), base.length_M, torch.tensor([200.0, 1, 2, 3]), base.group_offsets)
        )


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_the_order_losss_gradient_keeps_its_digits_with_the_scores_size(size):
    # Two responses: Plackett-Luce is DPO, whose gradient is exact.
    logp = torch.tensor([size, -size, -size, size, 3.0, 3.5])
    grads = []
    for loss, dtype in ((PlackettLuce(beta=0.5), torch.float32), (DPO(beta=0.5), F64)):
        leaf = logp.to(dtype, copy=True).requires_grad_()
        reward = torch.tensor([1.0, 0.0] * 3)
        loss(ResponseStats(leaf, torch.ones(6), reward, torch.tensor([0, 2, 4, 6]))).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=3e-7 * max(1.0, size / 100), atol=1e-38)
