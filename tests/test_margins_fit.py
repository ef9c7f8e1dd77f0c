"""MMPO's gamma against closed forms."""

import logging
import math
from dataclasses import replace

import pytest
from builders import prompt

from ampo_fast.margins_fit import (
    fit_gamma,
    fitted_params,
    gamma_for_agreement,
    margins_and_labels,
    mean_target,
    resolve_gamma,
)
from ampo_fast.types import GivenResponse


def group(rewards, chosen):
    given = zip(rewards, chosen, strict=True)
    return replace(prompt(), responses=tuple(GivenResponse(content="x", reward=r, is_chosen=c) for r, c in given))


def test_fit_of_one_margin_is_its_log_odds():
    # Equal margins m: the maximum is where sigmoid(gamma m) is the share of ones.
    assert fit_gamma([0.5] * 4, [1, 1, 1, 0]) == pytest.approx(math.log(3) / 0.5, rel=1e-12)
    assert fit_gamma([2.0, -2.0], [0.8, 0.2]) == pytest.approx(math.log(4) / 2.0, rel=1e-12)


def test_fit_is_a_maximum_of_the_likelihood():
    margins, labels = [0.1, 0.4, 0.9, -0.3, 0.7, 0.0], [1, 0, 1, 0, 1, 1]
    best = fit_gamma(margins, labels)

    def likelihood(gamma):
        return sum(
            math.log(1 / (1 + math.exp(-gamma * m))) * y + math.log(1 / (1 + math.exp(gamma * m))) * (1 - y)
            for m, y in zip(margins, labels, strict=True)
        )

    assert likelihood(best) > max(likelihood(best * 0.99), likelihood(best * 1.01))


def test_labels_that_are_the_sign_have_no_maximum():
    with pytest.raises(ValueError, match=r"sign of the margin.*independent"):
        fit_gamma([0.3, -0.2, 0.0], [1, 0, 1])


@pytest.mark.parametrize(
    ("margins", "labels", "match"),
    [
        ([], [], "margins is empty"),
        ([0.1], [1, 0], "1 margins but 2 labels"),
        ([math.nan], [1], "not finite"),
        ([0.1], [2], r"\[0, 1\], got 2"),
        ([0.0, 0.0], [1, 0], "every margin is 0"),
        ([0.5, 0.5, 0.5], [0, 0, 1], "do not agree"),
    ],
)
def test_what_cannot_be_fitted_is_named(margins, labels, match):
    with pytest.raises(ValueError, match=match):
        fit_gamma(margins, labels)


def test_agreement_by_hand():
    assert gamma_for_agreement([0.5, -0.5], 0.75) == pytest.approx(math.log(3) / 0.5, rel=1e-12)
    # One tie of two counts 1/2: (sigmoid(g) + 1/2) / 2 = 0.7 -> sigmoid(g) = 0.9.
    assert gamma_for_agreement([1.0, 0.0], 0.7) == pytest.approx(math.log(9), rel=1e-12)
    assert mean_target(gamma_for_agreement([0.1, 0.4, 0.9], 0.8), [0.1, 0.4, 0.9]) == pytest.approx(0.8, abs=1e-12)
    for rate in (0.5, 0.75, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"agreement = {rate}"):
            gamma_for_agreement([1.0, 0.0], rate)


def test_params_name_the_way(caplog):
    assert resolve_gamma({"gamma": 2.2, "beta": 0.1}, [0.5], []) == {"gamma": 2.2, "beta": 0.1}
    assert resolve_gamma({"beta": 0.1}, [0.5], []) == {"beta": 0.1}
    assert resolve_gamma({"gamma": {"agreement": 0.75}}, [1.0], [])["gamma"] == pytest.approx(math.log(3))
    assert resolve_gamma({"gamma": {"fit": "labels"}}, [1.0] * 4, [1, 1, 1, 0])["gamma"] == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match="no chosen and rejected"):
        resolve_gamma({"gamma": {"fit": "labels"}}, [1.0], [])
    with pytest.raises(ValueError, match=r"'fit': 'scores'.*use a number"):
        resolve_gamma({"gamma": {"fit": "scores"}}, [1.0], [])


def test_labels_count_only_where_every_pair_has_one():
    labelled = group([0.9, 0.2], [True, False])
    assert margins_and_labels([labelled]) == ([pytest.approx(0.7)], [1.0])
    assert margins_and_labels([labelled, group([1.0, 0.0], [None, None])])[1] == []


def test_a_policys_gamma_is_fitted_on_the_given_rewards_and_on_raw_ones_alone():
    groups = [group([1.0, None, 0.0], [None] * 3)]
    fit = {"gamma": {"agreement": 0.75}, "beta": 0.1}
    assert fitted_params(fit, "auto", groups) == {"gamma": pytest.approx(math.log(3)), "beta": 0.1}
    with pytest.raises(ValueError, match=r"reward\.normalize = 'minmax'; set it to \"none\""):
        fitted_params(fit, "minmax", groups)
    with pytest.raises(ValueError, match=r'needs data with responses \(rollout\.engine = "data"\)'):
        fitted_params(fit, "auto", [prompt()])
    assert fitted_params({"gamma": 2.0}, "minmax", [prompt()]) == {"gamma": 2.0}


@pytest.mark.parametrize(("gamma", "words"), [(100.0, "hard labels"), (1e-3, "coin tosses")])
def test_a_gamma_of_another_scale_is_warned_about(gamma, words, caplog):
    with caplog.at_level(logging.WARNING):
        resolve_gamma({"gamma": gamma}, [1.0, 2.0], [])
    assert words in caplog.text
    assert "would make it 0.75" in caplog.text


def test_a_warning_about_the_scale_does_not_end_a_run_whose_gamma_is_given(caplog):
    margins = [3.0] * 9 + [1e12]  # a score of -1e12 where a judge said nothing
    assert resolve_gamma({"gamma": 2.2}, margins, []) == {"gamma": 2.2}
    assert "all but hard labels; no gamma suits the largest, 1e+12, beside the rest" in caplog.text
