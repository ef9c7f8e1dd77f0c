"""Pairwise losses against their formulas, written out with Python floats for one pair at a time."""

import dataclasses
import math

import pytest
import torch

from ampo_fast.losses import (
    BMC,
    CDPO,
    CPO,
    DPO,
    DPOPCRM,
    IPO,
    MMDPO,
    MMPO,
    ORPO,
    RDPO,
    CaPO,
    GroupContrastive,
    Hinge,
    NCAPair,
    ResponseStats,
    RobustDPO,
    SimPO,
)
from ampo_fast.losses.token_diff import changed_tokens, divergent_similarity

F64 = torch.float64
LOGP = [-10.0, -12.5, -7.0, -9.25]
REF = [-11.0, -11.5, -7.5, -8.0]
LENGTH = [4, 6, 3, 5]
REWARD = [0.9, 0.1, 0.4, 0.4]


def stats(indices=range(4), offsets=None, ref=True, **more):
    def pick(values, dtype=F64):
        return torch.tensor([values[i] for i in indices], dtype=dtype)

    offsets = torch.tensor([0, len(list(indices))] if offsets is None else offsets)
    return ResponseStats(
        pick(LOGP), pick(LENGTH, torch.int64), pick(REWARD), offsets, ref_logp_M=pick(REF) if ref else None, **more
    )


def ls(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))


def odds(mean):
    return mean - math.log(1 - math.exp(mean))


def formula(name, w, l):  # noqa: E741
    rho = [logp - ref for logp, ref in zip(LOGP, REF, strict=True)]
    z, dr = rho[w] - rho[l], REWARD[w] - REWARD[l]
    mean = [logp / length for logp, length in zip(LOGP, LENGTH, strict=True)]
    p = 1 / (1 + math.exp(-2.2 * dr))
    sim = min(LENGTH[w], LENGTH[l]) / max(LENGTH[w], LENGTH[l])
    return {
        "dpo": lambda: -ls(0.1 * z),
        "cdpo": lambda: -0.8 * ls(0.1 * z) - 0.2 * ls(-0.1 * z),
        "robust": lambda: (-0.8 * ls(0.1 * z) + 0.2 * ls(-0.1 * z)) / 0.6,
        "hinge": lambda: max(0.0, 1 - 0.1 * z),
        "ipo": lambda: (z - 5.0) ** 2,
        "ipo_token": lambda: (rho[w] / LENGTH[w] - rho[l] / LENGTH[l] - 5.0) ** 2,
        "nca": lambda: -ls(0.1 * rho[w]) - 0.5 * ls(-0.1 * rho[w]) - 0.5 * ls(-0.1 * rho[l]),
        "rdpo": lambda: -ls(0.1 * z + 0.3 * (LENGTH[w] - LENGTH[l])),
        "simpo": lambda: -ls(2.0 * (mean[w] - mean[l]) - 0.7),
        "cpo": lambda: -ls(0.1 * (LOGP[w] - LOGP[l])) - 0.5 * mean[w],
        "orpo": lambda: -mean[w] - 0.1 * ls(odds(mean[w]) - odds(mean[l])),
        "mmpo": lambda: -p * ls(0.1 * z) - (1 - p) * ls(-0.1 * z),
        "mmdpo": lambda: -ls(0.1 * (1 + 0.5 * (1 - math.exp(-2.0 * dr))) * z),
        "pcrm": lambda: -ls(0.1 * z) - ls(6 / (sim + 1e-3) + 0.5 - 0.1 * z),
    }[name]()


LOSSES = {
    "dpo": DPO(beta=0.1),
    "cdpo": CDPO(beta=0.1, label_smoothing=0.2),
    "robust": RobustDPO(beta=0.1, label_smoothing=0.2),
    "hinge": Hinge(beta=0.1),
    "ipo": IPO(beta=0.1),
    "ipo_token": IPO(beta=0.1, per_token=True),
    "nca": NCAPair(beta=0.1),
    "rdpo": RDPO(beta=0.1, alpha=0.3),
    "simpo": SimPO(beta=2.0, gamma=0.7),
    "cpo": CPO(beta=0.1, nll_weight=0.5),
    "orpo": ORPO(beta=0.1),
    "mmpo": MMPO(beta=0.1, gamma=2.2),
    "mmdpo": MMDPO(beta=0.1, w=0.5, k=2.0),
    "pcrm": DPOPCRM(beta=0.1, beta3=0.5),
}
HARD = [name for name in LOSSES if name != "mmpo"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_of_two_is_one_pair_the_higher_reward_chosen(name):
    for order in ([0, 1], [1, 0]):
        out = LOSSES[name](stats(order))
        assert out.loss.item() == pytest.approx(formula(name, 0, 1), abs=1e-12)
        assert out.metrics["pairs"] == 1


@pytest.mark.parametrize("name", HARD)
def test_all_pairs_of_a_group_are_averaged_and_equal_rewards_left_out(name):
    out = LOSSES[name](stats())
    pairs = [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]
    assert out.loss.item() == pytest.approx(sum(formula(name, *pair) for pair in pairs) / 5, abs=1e-12)
    assert out.metrics["pairs"] == 5
    assert out.metrics["pairs_equal"] == 1


@pytest.mark.parametrize("name", LOSSES)
def test_best_against_each_other_response(name):
    out = dataclasses.replace(LOSSES[name], pairs="best_vs_rest")(stats())
    expected = sum(formula(name, 0, other) for other in (1, 2, 3)) / 3
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)


def test_groups_are_averaged_each_by_its_own_pairs():
    out = DPO(beta=0.1)(stats([0, 1, 0, 1, 2, 3], [0, 2, 2, 6]))
    first = formula("dpo", 0, 1)
    second = sum(formula("dpo", *pair) for pair in [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]) / 5
    assert out.per_group_B.tolist() == pytest.approx([first, 0.0, second], abs=1e-12)
    assert out.loss.item() == pytest.approx((first + second) / 3, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_exact_also_beside_empty_groups_and_single_responses(name):
    base = stats([0, 1, 2, 3, 0], [0, 0, 4, 5])

    def loss(logp_M):
        return LOSSES[name](
            ResponseStats(logp_M, base.length_M, base.reward_M, base.group_offsets, base.ref_logp_M)
        ).per_group_B

    assert torch.autograd.gradcheck(loss, (base.logp_M.clone().requires_grad_(),))
    assert loss(base.logp_M)[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", HARD)
def test_a_group_of_equal_rewards_costs_nothing_and_pulls_nothing(name):
    base = stats([2, 3])
    logp = base.logp_M.clone().requires_grad_()
    out = LOSSES[name](ResponseStats(logp, base.length_M, base.reward_M, base.group_offsets, base.ref_logp_M))
    out.loss.backward()
    assert out.loss == 0
    assert logp.grad.tolist() == [0.0, 0.0]
    assert out.metrics["pairs_equal"] == 1


def test_mmpo_gives_equal_rewards_a_target_of_one_half():
    z = (LOGP[2] - REF[2]) - (LOGP[3] - REF[3])
    out = MMPO(beta=0.1, gamma=2.2)(stats([2, 3]))
    assert out.loss.item() == pytest.approx(-0.5 * ls(0.1 * z) - 0.5 * ls(-0.1 * z), abs=1e-12)


def test_mmpo_rests_where_the_implicit_margin_is_the_given_one():
    # beta z = gamma (r_w - r_l): 0.1 z = 2 * 0.5
    logp = torch.tensor([-5.0, -15.0], dtype=F64, requires_grad=True)
    out = MMPO(beta=0.1, gamma=2.0)(
        ResponseStats(logp, torch.tensor([3, 3]), torch.tensor([0.75, 0.25], dtype=F64), torch.tensor([0, 2]))
    )
    out.loss.backward()
    assert logp.grad.abs().max() < 1e-15


def test_capo_matches_win_rates_against_the_others():
    def s(x):
        return 1 / (1 + math.exp(-x))

    wins = [sum(s(REWARD[i] - REWARD[j]) for j in (0, 1, 2) if j != i) / 2 for i in (0, 1, 2)]
    rho = [LOGP[i] - REF[i] for i in range(3)]
    expected = sum((wins[w] - wins[r] - 0.1 * (rho[w] - rho[r])) ** 2 for w, r in [(0, 1), (0, 2), (2, 1)]) / 3
    assert CaPO(beta=0.1)(stats([0, 1, 2])).loss.item() == pytest.approx(expected, abs=1e-12)
    z = (LOGP[2] - REF[2]) - (LOGP[3] - REF[3])
    assert CaPO(beta=0.1)(stats([2, 3])).loss.item() == pytest.approx((0.1 * z) ** 2, abs=1e-12)


def test_capos_win_rates_are_against_the_responses_of_the_own_group_alone():
    loss = CaPO(beta=0.1)
    together = loss(stats([0, 1, 0, 1, 2, 3, 2], [0, 2, 6, 7])).per_group_B.tolist()
    alone = [loss(stats(indices)).loss.item() for indices in ([0, 1], range(4), [2])]
    assert together == pytest.approx(alone, abs=1e-13)
    win = 1 / (1 + math.exp(REWARD[1] - REWARD[0]))  # of two responses: one win rate is what the other lacks
    z = (LOGP[0] - REF[0]) - (LOGP[1] - REF[1])
    assert together[0] == pytest.approx((2 * win - 1 - 0.1 * z) ** 2, abs=1e-13)


def test_mmdpos_slope_is_never_below_beta():
    given = stats([0, 1], positive_M=torch.tensor([False, True]))  # of the lower reward
    z = (LOGP[1] - REF[1]) - (LOGP[0] - REF[0])
    assert MMDPO(beta=0.1, pairs="best_vs_rest")(given).loss.item() == pytest.approx(-ls(0.1 * z), abs=1e-13)


def test_bmc_weights_each_token_by_its_detached_inverse_probability():
    logp_R = torch.tensor([-0.1, -3.0, -0.5, -2.0], dtype=F64, requires_grad=True)
    lengths, offsets = torch.tensor([2, 2]), torch.tensor([0, 2, 4])
    out = BMC(beta=0.5, delta=2.0)(
        ResponseStats(
            torch.stack([logp_R[:2].sum(), logp_R[2:].sum()]), lengths, torch.tensor([1.0, 0.0], dtype=F64),
            torch.tensor([0, 2]), torch.tensor([-1.0, -2.0], dtype=F64), response_offsets=offsets, logp_R=logp_R,
        )
    )  # fmt: skip
    weights = [1 + min(math.exp(-x), 2.0) for x in logp_R.tolist()]
    x = [weights[0] * -0.1 + weights[1] * -3.0 + 1.0, weights[2] * -0.5 + weights[3] * -2.0 + 2.0]
    assert out.loss.item() == pytest.approx(-ls(0.5 * (x[0] - x[1])), abs=1e-12)
    out.loss.backward()
    assert logp_R.grad[0] / logp_R.grad[1] == pytest.approx(weights[0] / weights[1])


def test_capo_takes_given_win_rates_as_they_are():
    rho = [LOGP[i] - REF[i] for i in range(2)]
    expected = (REWARD[0] - REWARD[1] - 0.1 * (rho[0] - rho[1])) ** 2
    assert CaPO(beta=0.1, calibrated=True)(stats([0, 1])).loss.item() == pytest.approx(expected, abs=1e-12)


def test_changed_tokens_are_those_that_no_matching_block_holds():
    rejected, chosen = [1, 2, 3, 4, 9], [1, 7, 8, 3, 9]
    assert changed_tokens(rejected, chosen) == ([False, True, False, True, False], [False, True, True, False, False])
    assert changed_tokens([1, 2], [1, 2]) == ([False] * 2, [False] * 2)
    long = [5, 6] * 200  # frequent tokens are no junk
    assert changed_tokens(long, [*long, 7]) == ([False] * 400, [False] * 400 + [True])


IDS = [[1, 2, 9], [1, 3, 9], [4, 2, 9, 9]]
ROWS = [[-0.1, -3.0, -0.2], [-0.4, -0.5, -0.3], [-2.0, -1.0, -0.1, -0.6]]
REF_ROWS = [[-0.2, -2.0, -0.2], [-0.3, -0.9, -0.1], [-1.0, -1.5, -0.4, -0.2]]


def with_rows():
    logp_R, ref_logp_R = (torch.tensor([v for row in rows for v in row], dtype=F64) for rows in (ROWS, REF_ROWS))
    return ResponseStats(
        torch.tensor([sum(row) for row in ROWS], dtype=F64), torch.tensor([3, 3, 4]),
        torch.tensor([0.4, 0.9, 0.1], dtype=F64), torch.tensor([0, 3]), torch.tensor([sum(row) for row in REF_ROWS], dtype=F64),
        response_offsets=torch.tensor([0, 3, 6, 10]), logp_R=logp_R, ref_logp_R=ref_logp_R,
        target_R=torch.tensor([token for row in IDS for token in row]),
    )  # fmt: skip


def test_bmc_weights_the_tokens_that_the_pair_does_not_share():
    def x(own, changed):
        ratios = [p - r for p, r in zip(ROWS[own], REF_ROWS[own], strict=True)]
        return sum(
            (1 + min(math.exp(-p), 2.0) * (t in changed)) * ratio
            for t, (p, ratio) in enumerate(zip(ROWS[own], ratios, strict=True))
        )

    # (preferred, its changed tokens, other, its changed tokens), by hand from IDS
    pairs = [(1, {1}, 0, {1}), (0, {0}, 2, {0, 3}), (1, {0, 1}, 2, {0, 1, 3})]
    expected = sum(-ls(0.5 * (x(w, a) - x(r, b))) for w, a, r, b in pairs) / 3
    out = BMC(beta=0.5, delta=2.0)(with_rows())
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)
    best = BMC(beta=0.5, delta=2.0, pairs="best_vs_rest")(with_rows())
    expected = sum(-ls(0.5 * (x(w, a) - x(r, b))) for w, a, r, b in (pairs[0], pairs[2])) / 2
    assert best.loss.item() == pytest.approx(expected, abs=1e-12)


def test_bmc_without_a_reference_is_of_the_weighted_log_probs():
    free = dataclasses.replace(with_rows(), ref_logp_M=None, ref_logp_R=None, target_R=None)
    zero = dataclasses.replace(free, ref_logp_M=torch.zeros(3, dtype=F64))
    assert BMC()(free).loss.item() == BMC()(zero).loss.item() > 0


def test_bmc_of_empty_groups_is_zero():
    empty, none = torch.zeros(0, dtype=F64), torch.zeros(2, dtype=torch.int64)
    stats = ResponseStats(empty, empty, empty, none, response_offsets=none[:1], logp_R=empty)
    assert BMC()(stats).per_group_B.tolist() == [0.0]


def test_pcrm_takes_its_bound_from_the_parts_that_diverge():
    ids = [1, 2, 9, 1, 3, 9, 1, 3, 9, 9]  # of 3, 3 and 4 tokens
    base = dataclasses.replace(with_rows(), target_R=torch.tensor(ids))
    rho = [sum(a) - sum(b) for a, b in zip(ROWS, REF_ROWS, strict=True)]
    similar = {(1, 0): 1.0, (0, 2): 2 / 3, (1, 2): 0.0}
    expected = 0.0
    for (w, r), similarity in similar.items():
        z = 0.1 * (rho[w] - rho[r])
        expected += -ls(z) - ls(6 / (similarity + 1e-3) - z)
    assert DPOPCRM(beta=0.1)(base).loss.item() == pytest.approx(expected / 3, abs=1e-12)


def test_pcrms_similarity_is_that_of_the_parts_that_diverge():
    ids = ((1, 2, 3, 4, 9), (1, 2, 5, 9), (1, 2, 3, 4, 9), (7, 9))
    found = divergent_similarity([ids, ids[:2]])
    assert found.shape == (2, 4, 4)
    expected = [[1, 2 / 3, 1, 2 / 5], [2 / 3, 1, 2 / 3, 2 / 4], [1, 2 / 3, 1, 2 / 5], [2 / 5, 2 / 4, 2 / 5, 1]]
    assert torch.allclose(found[0], torch.tensor(expected, dtype=F64))
    assert torch.allclose(found[1, :2, :2], torch.tensor([[1, 2 / 3], [2 / 3, 1]], dtype=F64))
    assert divergent_similarity([[(1, 2), (1, 2, 3)]])[0, 0, 1] == 0  # nothing is left of the shorter one


def test_bmc_without_rows_says_what_it_needs():
    with pytest.raises(ValueError, match="logp_R"):
        BMC()(stats([0, 1]))


def test_without_a_reference_sums_are_reference_free():
    z = LOGP[0] - LOGP[1]
    assert DPO(beta=0.1)(stats([0, 1], ref=False)).loss.item() == pytest.approx(-ls(0.1 * z), abs=1e-12)


@pytest.mark.parametrize("loss", [SimPO(), CPO(), ORPO()])
def test_reference_free_losses_do_not_read_the_reference(loss):
    assert not loss.uses_reference
    assert loss(stats()).loss.item() == loss(stats(ref=False)).loss.item()


def test_dpo_is_the_group_contrastive_loss_on_a_pair():
    contrast = GroupContrastive(beta=0.1, score="sum")(stats([0, 1])).loss.item()
    assert DPO(beta=0.1)(stats([0, 1])).loss.item() == pytest.approx(contrast, abs=1e-14)


def test_orpo_at_probability_one_stays_finite():
    logp = torch.tensor([0.0, -1.0], requires_grad=True)
    out = ORPO()(ResponseStats(logp, torch.ones(2), torch.tensor([0.0, 1.0]), torch.tensor([0, 2])))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize(("name", "loss"), [item for item in LOSSES.items() if not item[0].startswith("ipo")])
def test_extreme_log_probs_stay_finite_in_float32(name, loss):
    logp = torch.tensor([-1e4, -1.0, -1.0, -1e4], requires_grad=True)
    out = loss(ResponseStats(logp, torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 2, 4])))
    out.loss.backward()
    assert torch.isfinite(out.per_group_B).all()
    assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: DPO(beta=0.0), "beta"),
        (lambda: DPO(pairs="some"), "pairs"),
        (lambda: MMPO(gamma=-1.0), "gamma"),
        (lambda: RobustDPO(label_smoothing=0.5), "label_smoothing"),
        (lambda: CDPO(beta=-1.0), "beta"),
    ],
)
def test_options_out_of_range_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_a_given_positive_is_in_no_pair_with_its_equal_but_for_a_soft_label():
    positive = torch.tensor([False, False, True, False])  # of reward 0.4, as the fourth
    hard = DPO(pairs="best_vs_rest")(stats(positive_M=positive))
    expected = sum(formula("dpo", 2, other) for other in (0, 1)) / 2
    assert hard.loss.item() == pytest.approx(expected, rel=1e-12)
    assert (hard.metrics["pairs"], hard.metrics["pairs_equal"]) == (2, 1)
    soft = MMPO(pairs="best_vs_rest", beta=0.1)(stats(positive_M=positive))
    expected = sum(formula("mmpo", 2, other) for other in (0, 1, 3)) / 3
    assert soft.loss.item() == pytest.approx(expected, rel=1e-12)
    assert (soft.metrics["pairs"], soft.metrics["pairs_equal"]) == (3, 1)


def test_pairs_that_the_policy_ranks_right_are_counted_without_the_equal_ones():
    rho = [logp - ref for logp, ref in zip(LOGP, REF, strict=True)]
    ordered = [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]  # the pair (2, 3) has no order
    by_ratio = sum(rho[w] > rho[r] for w, r in ordered)
    by_logp = sum(LOGP[w] > LOGP[r] for w, r in ordered)
    assert by_ratio != by_logp
    for loss, right in ((DPO(), by_ratio), (MMPO(), by_ratio), (SimPO(), by_logp)):
        assert loss(stats()).metrics["pairs_right"] == right


def test_a_given_positive_is_preferred_whatever_the_rewards():
    positive = torch.tensor([False, True, False, False])  # of the lowest reward
    out = DPO(pairs="best_vs_rest")(stats(positive_M=positive))
    rho = [logp - ref for logp, ref in zip(LOGP, REF, strict=True)]
    assert out.loss.item() == pytest.approx(sum(-ls(0.1 * (rho[1] - rho[j])) for j in (0, 2, 3)) / 3, rel=1e-12)
    assert int(out.metrics["pairs"]) == 3
