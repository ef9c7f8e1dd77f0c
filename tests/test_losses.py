import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ampo_fast import fused_linear_group_loss, group_contrastive_loss, losses, reference
from ampo_fast.losses import AMPO, NLL, SWEPO, GroupContrastive, REFA1vsK, REFADynamic, ResponseStats, Sum
from ampo_fast.losses import stats as losses_stats
from ampo_fast.validation import nan_let_through

F64 = torch.float64


def stats(logp, length, reward, offsets, **more):
    as64 = {k: torch.tensor(v, dtype=F64) if k != "positive_M" else torch.tensor(v) for k, v in more.items()}
    return ResponseStats(
        torch.tensor(logp, dtype=F64),
        torch.tensor(length),
        torch.tensor(reward, dtype=F64),
        torch.tensor(offsets),
        **as64,
    )


def test_one_against_one_average_score_by_hand():
    # s = 10 * (-2/4, -6/3) = (-5, -20); L = log(1 + 3 e^-15)
    out = AMPO()(stats([-2.0, -6.0], [4, 3], [1.0, 0.0], [0, 2]))
    assert out.loss.item() == pytest.approx(math.log1p(3 * math.exp(-15)), abs=1e-14)


def test_printed_ampo_form_by_hand():
    # s' = logp + (r - rbar): (-2 + .5, -1 - .5)
    out = GroupContrastive(score="sum", beta=1.0, alpha=1.0)(stats([-2.0, -1.0], [4, 3], [1.0, 0.0], [0, 2]))
    assert out.loss.item() == pytest.approx(math.log(2.0), abs=1e-14)


def test_with_reference_and_sum_it_is_dpo_on_a_pair():
    beta, logp, ref = 0.1, [-10.0, -12.0], [-11.0, -11.5]
    z = (logp[0] - ref[0]) - (logp[1] - ref[1])
    out = GroupContrastive(score="sum", beta=beta)(stats(logp, [5, 5], [1.0, 0.0], [0, 2], ref_logp_M=ref))
    assert out.loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-beta * z))), abs=1e-14)


def test_average_score_with_gamma_is_simpo_with_that_margin():
    margin = 0.7
    out = GroupContrastive(beta=2.0, gamma=math.exp(margin))(stats([-4.0, -9.0], [4, 6], [1.0, 0.0], [0, 2]))
    inner = 2.0 * (-1.0 + 1.5) - margin
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-inner)), abs=1e-14)


def test_signed_weights_do_not_depend_on_the_baseline():
    base = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.1, 0.4], [0, 3])
    moved = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.1, 0.4], [0, 3], baseline_B=[17.0])
    loss = GroupContrastive(beta=2.0, alpha=0.5)
    assert loss(base).loss.item() == pytest.approx(loss(moved).loss.item(), abs=1e-12)
    absolute = GroupContrastive(beta=2.0, alpha=0.5, weight="abs")
    assert absolute(base).loss.item() != pytest.approx(absolute(moved).loss.item(), abs=1e-3)


def test_alpha_inside_is_alpha_times_beta_outside():
    data = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.1, 0.4], [0, 3])
    inside = GroupContrastive(beta=4.0, alpha=0.3, alpha_place="inside")(data)
    outside = GroupContrastive(beta=4.0, alpha=1.2)(data)
    assert inside.loss.item() == pytest.approx(outside.loss.item(), abs=1e-14)


def test_squared_weights_by_hand():
    # rbar = 0.6: weights 0.09, 0.25, 0.04; s = 2 logp + 3 w
    data = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.1, 0.8], [0, 3])
    s = [-4 + 0.27, -6 + 0.75, -2 + 0.12]
    expected = math.log(sum(map(math.exp, s))) - s[0]
    squared = GroupContrastive(score="sum", beta=2.0, alpha=3.0, weight_power=2)
    assert squared(data).loss.item() == pytest.approx(expected, abs=1e-13)


def test_mean_split_and_given_positives():
    data = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.8, 0.1], [0, 3])
    s = [4 * -1.0, 4 * -1.0, 4 * -0.25]
    expected = -math.log((math.exp(s[0]) + math.exp(s[1])) / (math.exp(s[0]) + math.exp(s[1]) + 4 * math.exp(s[2])))
    assert REFADynamic(beta=4.0)(data).loss.item() == pytest.approx(expected, abs=1e-13)
    given_sides = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.8, 0.1], [0, 3], positive_M=[True, True, False])
    assert REFA1vsK(beta=4.0, gamma=4.0)(given_sides).loss.item() == pytest.approx(expected, abs=1e-13)
    by_name = GroupContrastive(beta=4.0, gamma=4.0, split="given")(given_sides)
    assert by_name.loss.item() == pytest.approx(expected, abs=1e-13)


def test_the_mean_split_is_at_the_baseline_where_one_is_given():
    # The mean of the three is 0.6; that of all candidates, of which 0.8 and 0.9 were selected, may be higher.
    data = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.8, 0.1], [0, 3], baseline_B=[0.85])
    sided = stats([-2.0, -3.0, -1.0], [2, 3, 4], [0.9, 0.8, 0.1], [0, 3], positive_M=[True, False, False])
    assert REFADynamic(beta=4.0)(data).loss.item() == REFADynamic(beta=4.0)(sided).loss.item()
    at_a_reward = dataclasses.replace(data, baseline_B=torch.tensor([0.8], dtype=F64))  # which is then no positive
    assert REFADynamic(beta=4.0)(at_a_reward).loss.item() == REFADynamic(beta=4.0)(sided).loss.item()
    assert REFADynamic(beta=4.0)(dataclasses.replace(data, baseline_B=torch.tensor([1.0]))).loss.item() == 0.0


def test_equal_rewards_make_the_first_one_the_positive():
    data = stats([-2.0, -3.0], [2, 2], [0.5, 0.5], [0, 2])
    sided = stats([-2.0, -3.0], [2, 2], [0.5, 0.5], [0, 2], positive_M=[True, False])
    assert AMPO()(data).loss.item() == AMPO()(sided).loss.item()


@pytest.mark.parametrize("sides", [[True, True], [False, False]])
def test_an_empty_side_costs_nothing_and_pulls_nothing(sides):
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=F64, requires_grad=True)
    out = AMPO()(
        ResponseStats(
            logp, torch.tensor([2, 2, 2, 2]), torch.zeros(4, dtype=F64), torch.tensor([0, 2, 4]),
            positive_M=torch.tensor([*sides, True, False]),
        )
    )  # fmt: skip
    out.loss.backward()
    assert out.per_group_B[0] == 0
    assert logp.grad[:2].tolist() == [0.0, 0.0]
    assert logp.grad[2] < 0 < logp.grad[3]
    assert out.loss == out.per_group_B[1] / 2  # the mean counts the group with an empty side


def test_gradient_over_scores_is_closed_form():
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=F64, requires_grad=True)
    data = ResponseStats(logp, torch.tensor([2, 4, 5]), torch.tensor([1.0, 0.3, 0.1], dtype=F64), torch.tensor([0, 3]))
    AMPO(beta=2.0)(data).loss.backward()
    s = 2.0 * logp.detach() / torch.tensor([2, 4, 5])
    c = torch.tensor([1.0, 3.0, 3.0], dtype=F64) * s.exp()
    expected = (c / c.sum() - torch.tensor([1.0, 0.0, 0.0], dtype=F64)) * 2.0 / torch.tensor([2, 4, 5])
    torch.testing.assert_close(logp.grad, expected, atol=1e-14, rtol=0)


def test_extreme_scores_stay_finite():
    logp = torch.tensor([-1e4, 0.0, 0.0, -1e4], requires_grad=True)
    out = GroupContrastive(score="sum", beta=1.0)(
        ResponseStats(logp, torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 2, 4]))
    )
    out.loss.backward()
    assert out.per_group_B.tolist() == [1e4, 0.0]
    assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [("simple", 0.5 + 0.25), ("target", 0.5 * 2), ("budget_independent", math.log(2) + math.log(4))],
)
def test_eos_penalties_by_hand(penalty, expected):
    data = stats(
        [-2.0, -3.0, -1.0], [2, 4, 4], [0.9, 0.1, 0.0], [0, 3], eos_logp_M=[math.log(0.5), math.log(0.25), math.nan]
    )
    plain = GroupContrastive(beta=1.0)(data).loss.item()
    assert GroupContrastive(beta=1.0, eos_penalty=penalty, eos_lambda=0.1)(data).loss.item() == pytest.approx(
        plain + 0.1 * expected, abs=1e-14
    )


@pytest.mark.parametrize("penalty", ["target", "simple", "budget_independent"])
def test_a_response_that_does_not_end_pulls_nothing_by_its_eos(penalty):
    eos = torch.tensor([math.log(0.5), math.nan, math.log(0.25)], dtype=F64, requires_grad=True)
    data = dataclasses.replace(stats([-2.0, -3.0, -1.0], [2, 4, 3], [0.9, 0.1, 0.0], [0, 3]), eos_logp_M=eos)
    GroupContrastive(beta=1.0, eos_penalty=penalty, eos_lambda=0.1)(data).loss.backward()
    assert eos.grad[1] == 0
    assert eos.grad[[0, 2]].abs().min() > 0


def test_gamma_zero_counts_no_negative():
    logp = torch.tensor([-1.0, -2.0], dtype=F64, requires_grad=True)
    data = ResponseStats(logp, torch.ones(2), torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0, 2]))
    GroupContrastive(beta=1.0, gamma=0.0)(data).loss.backward()
    assert logp.grad.tolist() == [0.0, 0.0]


def test_the_eos_penalty_of_a_group_without_negatives_is_kept():
    data = stats([-2.0], [2], [0.5], [0, 1], eos_logp_M=[math.log(0.5)])
    loss = GroupContrastive(beta=1.0, eos_penalty="simple", eos_lambda=0.1)
    assert loss(data).loss.item() == pytest.approx(0.05, abs=1e-14)


def test_budgeted_eos_penalty_by_hand():
    # |y| = 4, 2 and 3; budget 2: (1/2) P_1 - (P_3 + P_4) / 2; (1/2) P_1; the third does not end in EOS.
    p = [0.5, 0.25, 0.1, 0.8, 0.3, 0.6, 0.9, 0.9, 0.9]
    data = stats(
        [-2.0, -3.0, -1.0], [4, 2, 3], [0.9, 0.1, 0.0], [0, 3],
        eos_logp_M=[math.log(0.8), math.log(0.6), math.nan], eos_logp_R=[math.log(x) for x in p],
    )  # fmt: skip
    data = dataclasses.replace(data, response_offsets=torch.tensor([0, 4, 6, 9]))
    plain = GroupContrastive(beta=1.0)(data).loss.item()
    loss = GroupContrastive(beta=1.0, eos_penalty="budgeted", eos_lambda=0.1, eos_budget=2)
    expected = plain + 0.1 * ((0.5 / 2 - (0.1 + 0.8) / 2) + 0.3 / 2)
    assert loss(data).loss.item() == pytest.approx(expected, abs=1e-14)
    expected = plain + 0.1 * (-(0.25 + 0.1 + 0.8) / 3 - 0.6)
    assert dataclasses.replace(loss, eos_budget=1)(data).loss.item() == pytest.approx(expected, abs=1e-14)
    assert loss.needs_rows
    with pytest.raises(ValueError, match="eos_logp_R"):
        loss(dataclasses.replace(data, eos_logp_R=None))
    for budget in (None, 0, -1):
        with pytest.raises(ValueError, match="eos_budget"):
            GroupContrastive(beta=1.0, eos_penalty="budgeted", eos_budget=budget)


@pytest.mark.parametrize(
    ("score", "weight", "split"), list(itertools.product(["avg", "sum"], ["signed", "abs", "none"], ["best", "mean"]))
)
@pytest.mark.parametrize("has_baseline", [False, True])
def test_it_is_the_reference_group_by_group(score, weight, split, has_baseline):
    generator = torch.Generator().manual_seed(5)
    logp = (-30 * torch.rand(40, generator=generator, dtype=F64)).requires_grad_()
    length = torch.randint(1, 20, (40,), generator=generator)
    reward = torch.randn(40, generator=generator, dtype=F64) - 1.0  # most are below the 0 of the padding
    offsets = torch.tensor([0, 8, 9, 9, 11, 40])
    options = {"beta": 2.0, "alpha": 0.4, "gamma": 3.0, "score": score, "weight": weight, "split": split}
    options["baseline_B"] = torch.rand(5, generator=generator, dtype=F64) if has_baseline else None
    ours = group_contrastive_loss(logp, length, reward, offsets, reduction="none", **options)
    want = reference.group_contrastive_loss(logp, length, reward, offsets, **options)
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)
    got_grad, want_grad = (torch.autograd.grad(x.sum(), logp)[0] for x in (ours, want))
    torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=0)


def test_sum_and_nll():
    data = stats([-2.0, -3.0], [4, 3], [1.0, 0.0], [0, 2], positive_M=[True, False])
    assert NLL()(data).loss.item() == 0.5
    both = Sum([(1.0, AMPO()), (0.2, NLL())])(data)
    assert both.loss.item() == pytest.approx(AMPO()(data).loss.item() + 0.1, abs=1e-14)
    assert Sum([(1.0, SWEPO())]).uses_reference


def test_nll_without_given_positives_is_of_the_highest_reward_ties_to_the_first():
    data = stats([-2.0, -3.0, -8.0, -5.0, -6.0], [4, 3, 2, 5, 3], [0.1, 0.7, 0.7, 0.2, 0.9], [0, 3, 3, 5])
    assert NLL()(data).per_group_B.tolist() == [1.0, 0.0, 2.0]


def test_function_equals_class_and_normalizer_divides():
    data = stats([-2.0, -3.0, -1.0, -5.0], [2, 3, 4, 5], [0.9, 0.1, 0.4, 0.2], [0, 2, 4])
    args = (data.logp_M, data.length_M, data.reward_M, data.group_offsets)
    one = group_contrastive_loss(*args, beta=10.0, gamma=3.0)
    assert one.item() == AMPO()(data).loss.item()
    assert group_contrastive_loss(*args, beta=10.0, gamma=3.0, normalizer=4).item() == pytest.approx(one.item() / 2)
    assert group_contrastive_loss(*args, beta=10.0, gamma=3.0, normalizer=torch.tensor(4.0)).item() == pytest.approx(
        one.item() / 2
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score": "mean"}, "score"),
        ({"split": "given"}, "positive_M"),
        ({"weight_power": 3}, "weight_power = 3; use one of 1, 2"),
        ({"eos_penalty": "foo"}, "eos_penalty = 'foo'; use one of None, 'target'"),
        ({"beta": 0.0}, "beta"),
        ({"group_offsets": torch.tensor([0, 3])}, "group_offsets"),
        ({"group_offsets": torch.tensor([0, 2, 1, 2])}, "group_offsets"),
        ({"length_M": torch.ones(3)}, "length_M"),
        ({"reward_M": torch.tensor([math.nan, 0.0])}, "reward_M"),
        ({"eos_penalty": "simple"}, "eos_logp_M"),
        ({"length_M": torch.tensor([3, 0])}, r"length_M\[1\]"),
        ({"impl": "cuda"}, "impl"),
        ({"normalizer": torch.ones(1)}, "0-d tensor"),
        ({"normalizer": -1.0}, "normalizer = -1.0"),
        ({"reward_M": torch.zeros(2).numpy()}, "reward_M must be a torch tensor, got ndarray; torch.from_numpy"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {
        "logp_M": torch.tensor([-1.0, -2.0]), "length_M": torch.ones(2), "reward_M": torch.tensor([1.0, 0.0]),
        "group_offsets": torch.tensor([0, 2]), "beta": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        group_contrastive_loss(**(arguments | change))


EVERY_LOSS = [
    getattr(losses, name)()
    for name in losses.__all__
    if name not in ("ResponseStats", "LossOutput", "GroupContrastive", "Sum", "group_contrastive_loss")
] + [Sum([(1.0, AMPO()), (0.5, NLL())])]


def four_responses(**changes):
    """Two groups of two, with all that any loss reads."""
    logp_R = torch.tensor([-1.0, -2.0, -0.5, -1.5, -3.0, -0.25, -2.0, -1.0])
    whole = ResponseStats(
        logp_R.view(4, 2).sum(1), torch.full((4,), 2), torch.tensor([0.9, 0.1, 0.4, 0.6]), torch.tensor([0, 2, 4]),
        ref_logp_M=torch.full((4,), -3.0), positive_M=torch.tensor([True, False, False, True]),
        baseline_B=torch.tensor([0.5, 0.5]), response_offsets=torch.arange(0, 9, 2), logp_R=logp_R,
        target_R=torch.arange(8), ref_logp_R=torch.full((8,), -1.5),
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"group_offsets": torch.tensor([1, 3, 5])}, "group_offsets must rise from 0 to 4"),
        ({"group_offsets": torch.tensor([0.0, 2.0, 4.0])}, "group_offsets must be a 1-D int64"),
        ({"group_offsets": [0, 2, 4]}, "group_offsets must be a 1-D int64"),
        ({"logp_M": torch.arange(4)}, "logp_M must be .* floats.*int64"),
        ({"logp_M": torch.zeros(4, 1)}, "logp_M must be a 1-D"),
        ({"logp_M": [0.0] * 4}, "logp_M must be a 1-D"),
        ({"logp_M": torch.tensor([0.0, -math.inf, 0.0, 0.0])}, "logp_M holds NaN or infinity"),
        ({"length_M": torch.tensor([2, 2, 0, 2])}, r"length_M\[2\] = 0"),
        ({"length_M": torch.tensor([2, math.nan, 2, 2])}, "length_M holds NaN"),
        ({"reward_M": torch.zeros(3)}, r"reward_M must have shape \[4\]"),
        ({"reward_M": None}, "reward_M"),
        ({"reward_M": torch.zeros(4, device="meta")}, "reward_M is on meta"),
        ({"reward_M": torch.tensor([math.nan, 0.0, 0.0, 0.0])}, "reward_M holds NaN"),
        ({"ref_logp_M": torch.zeros(5)}, "ref_logp_M"),
        ({"positive_M": torch.ones(2, dtype=torch.bool)}, "positive_M"),
        ({"baseline_B": torch.tensor([0.0, math.nan])}, "baseline_B holds NaN"),
        ({"eos_logp_M": torch.zeros(5)}, "eos_logp_M"),
        ({"response_offsets": torch.tensor([0, 8])}, "response_offsets has 2 entries"),
        ({"response_offsets": torch.tensor([0, 2, 4, 6, 9])}, "response_offsets must rise from 0 to 8"),
        ({"ref_logp_R": torch.zeros(7)}, "ref_logp_R"),
    ],
)
def test_what_a_loss_is_called_on_is_checked(loss, change, match):
    assert loss(four_responses()).loss.isfinite()
    with pytest.raises(ValueError, match=match):
        loss(four_responses(**change))


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_log_probs_give_the_loss_of_their_values_in_float32(loss, dtype):
    whole = four_responses()
    half = {
        name: getattr(whole, name).to(dtype) for name in ("logp_M", "ref_logp_M", "logp_R", "ref_logp_R", "reward_M")
    }
    exact = dataclasses.replace(whole, **{name: vector.double() for name, vector in half.items()})
    half["logp_M"].requires_grad_()
    out = loss(dataclasses.replace(whole, **half))
    assert out.loss.dtype == out.per_group_B.dtype == torch.float32
    torch.testing.assert_close(out.per_group_B.double(), loss(exact).per_group_B, rtol=1e-5, atol=1e-6)
    if out.loss.requires_grad:  # BMC reads the rows
        out.loss.backward()
        assert half["logp_M"].grad.dtype == dtype


def test_nan_passes_where_it_is_let_through():
    with nan_let_through():
        assert AMPO()(four_responses(logp_M=torch.full((4,), math.nan))).loss.isnan()


def test_a_sum_and_the_fused_op_check_once(monkeypatch):
    seen = []
    monkeypatch.setattr(losses_stats, "check_lengths", lambda *_: seen.append(1))
    Sum([(1.0, AMPO()), (0.5, Sum([(1.0, NLL())]))])(four_responses())
    assert len(seen) == 1
    hidden, weight = torch.zeros(8, 3), torch.zeros(5, 3, requires_grad=True)
    whole = four_responses()
    for mode in ("grouped", "recompute"):
        _, out = fused_linear_group_loss(
            hidden,
            weight,
            whole.target_R % 5,
            whole.response_offsets,
            whole.group_offsets,
            whole.reward_M,
            AMPO(),
            mode=mode,
        )
        assert len(seen) == 1
        assert type(out) is ResponseStats  # what the caller gets may be changed, and is then checked


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 10_000))
def test_groups_are_independent(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    logp = -torch.rand(total, generator=generator, dtype=F64) * 20
    length = torch.randint(1, 9, (total,), generator=generator)
    reward = torch.rand(total, generator=generator, dtype=F64) - 1.5
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    for loss in (AMPO(alpha=0.3), REFADynamic(), NLL(), losses.KTO(), losses.DPO(pairs="best_vs_rest")):
        together = loss(ResponseStats(logp, length, reward, offsets)).per_group_B
        for b, (start, end) in enumerate(itertools.pairwise(offsets)):
            alone = loss(
                ResponseStats(logp[start:end], length[start:end], reward[start:end], torch.tensor([0, end - start]))
            ).per_group_B[0]
            assert alone.item() == pytest.approx(together[b].item(), abs=1e-12)


@pytest.mark.parametrize(
    ("option", "value"), [("beta", math.inf), ("beta", "1"), ("alpha", math.nan), ("gamma", math.inf), ("gamma", -1.0)]
)
def test_options_that_are_no_numbers_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} = "):
        GroupContrastive(**({"beta": 1.0} | {option: value}))


SHIFTED = [loss for loss in EVERY_LOSS if not isinstance(loss, losses.LambdaPO)] + [
    GroupContrastive(beta=1.0, alpha=1.0), GroupContrastive(beta=1.0, alpha=1.0, weight="abs", weight_power=2),
    losses.DPO(pairs="best_vs_rest"), losses.CaPO(calibrated=True),
]  # fmt: skip


@pytest.mark.parametrize("loss", SHIFTED, ids=lambda loss: type(loss).__name__)
def test_rewards_of_float64_are_compared_as_such_beside_log_probs_of_float32(loss):
    """None of these changes when the same number is added to every reward; in float32 the four would be one number."""
    reward = torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=F64) / 2**10
    near = four_responses(positive_M=None, baseline_B=None, reward_M=reward)
    far = dataclasses.replace(near, reward_M=reward + 2.0**20)
    assert (far.reward_M.float() == 2.0**20).all()
    got = loss(far).per_group_B
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(near).per_group_B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        (GroupContrastive(beta=1.0), {"alpha": 0.0, "gamma": 1.0, "score": "avg", "weight": "signed", "split": "best"}),
        (
            GroupContrastive(beta=1.0),
            {"alpha_place": "outside", "weight_power": 1, "eos_penalty": None, "eos_lambda": 0.0},
        ),
        (AMPO(), {"beta": 10.0, "gamma": 3.0, "alpha": 0.0, "score": "avg", "split": "best"}),
        (REFA1vsK(), {"beta": 10.0, "gamma": 3.0, "alpha": 0.0, "score": "avg", "split": "best"}),
        (REFADynamic(), {"beta": 10.0, "gamma": 4.0, "alpha": 0.0, "score": "avg", "split": "mean"}),
        (SWEPO(), {"beta": 0.1, "alpha": 0.5, "gamma": 1.0, "score": "sum", "weight": "abs", "split": "mean"}),
        (losses.REFAInfoNCA(), {"beta": 10.0, "alpha": 1.0}),
        (losses.InfoNCA(), {"beta": 0.01, "temperature": 1e-4}),
        (losses.NCA(), {"beta": 0.01, "temperature": 1e-4}),
        (losses.LambdaPO(), {"beta": 0.1, "normalized": True}),
        (losses.DPO(), {"beta": 0.1, "pairs": "all"}),
        (losses.CDPO(), {"label_smoothing": 0.1}),
        (losses.IPO(), {"per_token": False}),
        (losses.SimPO(), {"beta": 2.0, "gamma": 1.0}),
        (losses.CPO(), {"nll_weight": 0.0}),
        (losses.KTO(), {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "kl": 0.0}),
        (losses.MMPO(), {"beta": 0.01, "gamma": 2.2}),
        (losses.MMDPO(), {"beta": 0.1, "w": 0.5, "k": 0.5}),
        (losses.CaPO(), {"calibrated": False}),
        (losses.DPOPCRM(), {"beta1": 6.0, "beta2": 1e-3, "beta3": 0.0}),
        (losses.BMC(), {"beta": 0.05, "delta": 2.0}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_defaults_are_the_published_ones(loss, fields):
    assert {name: getattr(loss, name) for name in fields} == fields


def test_who_divides_by_a_reference_and_who_reads_rows():
    """The trainer loads a reference, and asks for rows and EOS log-probs, by these alone."""
    free = {"AMPO", "REFA1vsK", "REFADynamic", "REFAInfoNCA", "SimPO", "CPO", "ORPO", "NLL", "Sum"}
    assert {type(loss).__name__ for loss in EVERY_LOSS if not loss.uses_reference} == free
    assert {type(loss).__name__ for loss in EVERY_LOSS if loss.needs_rows} == {"BMC"}
    assert {type(loss).__name__ for loss in EVERY_LOSS if loss.needs_reference_rows} == {"BMC"}
    assert {type(loss).__name__ for loss in EVERY_LOSS if loss.soft_labels} == {"MMPO", "CaPO"}
    assert not any(loss.needs_eos for loss in EVERY_LOSS)
    budgeted = REFADynamic(eos_penalty="budgeted", eos_lambda=0.1, eos_budget=2)
    assert (budgeted.needs_eos, budgeted.needs_rows) == (True, True)
    every_need = Sum([(1.0, losses.BMC()), (1.0, budgeted)])
    assert every_need.needs_eos
    assert every_need.needs_rows
    assert every_need.needs_reference_rows
    assert every_need.uses_reference


PENALTIES = ("target", "simple", "budget_independent", "budgeted")


@pytest.mark.parametrize(
    "loss",
    [*EVERY_LOSS, *(REFADynamic(eos_penalty=name, eos_lambda=0.1, eos_budget=2) for name in PENALTIES)],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("num_groups", [0, 2])
def test_groups_without_responses_cost_nothing(loss, num_groups):
    none, ids, offsets = torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    data = ResponseStats(
        none, ids, none, torch.zeros(num_groups + 1, dtype=torch.int64), none, none, response_offsets=offsets,
        logp_R=none, eos_logp_R=none, target_R=ids, ref_logp_R=none,
    )  # fmt: skip
    out = loss(data)
    assert out.loss.item() == 0.0
    assert out.per_group_B.tolist() == [0.0] * num_groups


def test_a_loss_of_ones_own_is_found_by_its_module_and_what_is_none_is_refused(tmp_path, monkeypatch):
    own = "from ampo_fast.losses import Loss\nclass Mine(Loss): pass\ndef function(stats): pass\n"
    (tmp_path / "my_losses.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert losses.loss_class("my_losses:Mine").__name__ == "Mine"
    for name, message in (
        ("my_losses:function", "is no loss"), ("my_losses:Loss", "is no loss"), ("my_losses:Our", "cannot be imported"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"loss\.name = '{name}' {message}"):
            losses.loss_class(name)
