"""Hand-computed values for every measure."""

import math

import numpy as np
import pytest

from ampo_fast.reward_model.calibration import (
    best_of_n_regret,
    brier_score,
    clustered_standard_error,
    expected_calibration_error,
    log_loss,
    ranks,
    reliability,
    sigmoid,
    spearman,
    wilson_interval,
)


def test_wilson_by_hand():
    # Brown, Cai & DasGupta's setting: 8 of 10; (0.8 + 0.19207) / 1.38415 -+ 1.95996 sqrt(0.016 + 0.0096036) / 1.38415
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="hits = 6"):
        wilson_interval(6, 5)


def test_brier_and_log_loss_by_hand():
    assert brier_score(np.array([1.0, 0.5, 0.2])) == pytest.approx((0 + 0.25 + 0.64) / 3)
    assert log_loss(np.array([0.0, math.log(3)])) == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    assert log_loss(np.array([-1000.0])) == 1000.0
    assert sigmoid(np.array([0.0, math.log(3), -1000.0])) == pytest.approx([0.5, 0.75, 0.0])


def test_calibration_error_by_hand():
    # Bins of width 1/15: 0.72 and 0.28 -> conf 0.72 in bin 10 (one hit of two); 0.95 -> bin 14 (a hit).
    p = np.array([0.72, 0.28, 0.95])
    bins = reliability(p)
    assert [(b.count, b.accuracy) for b in bins if b.count] == [(2, 0.5), (1, 1.0)]
    assert bins[10].confidence == pytest.approx(0.72)
    assert expected_calibration_error(p) == pytest.approx((2 * 0.22 + 1 * 0.05) / 3)


def test_confidence_one_is_in_the_last_bin_and_one_half_is_no_hit():
    bins = reliability(np.array([1.0, 0.0, 0.5]))
    assert (bins[14].count, bins[14].accuracy) == (2, 0.5)
    assert (bins[7].count, bins[7].accuracy) == (1, 0.0)
    assert expected_calibration_error(np.array([1.0, 1.0])) == 0.0
    assert sum(b.count for b in bins) == 3


@pytest.mark.parametrize("p", [[], [1.2], [math.nan]])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=r"pairs|probabilities"):
        brier_score(np.array(p))


def test_clusters_widen_the_error_by_hand():
    # Two prompts of two equal pairs: mean 1/2, cluster sums +1 and -1 -> sqrt(2/1 * 2) / 4 = 1/2.
    assert clustered_standard_error(np.array([1, 1, 0, 0]), ["a", "a", "b", "b"]) == pytest.approx(0.5)
    # Each pair its own cluster: the ordinary sqrt(s^2 / n) = sqrt((1/3) / 4).
    assert clustered_standard_error(np.array([1, 1, 0, 0]), range(4)) == pytest.approx(math.sqrt(1 / 12))
    assert math.isnan(clustered_standard_error(np.array([1, 0]), ["a", "a"]))


def test_spearman_and_ranks_by_hand():
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1.0)
    # Ties: ranks (1.5, 1.5, 3) against (1, 2, 3): 1.5 / sqrt(1.5 * 2).
    assert spearman([0, 0, 1], [0, 1, 2]) == pytest.approx(1.5 / math.sqrt(3.0))
    assert math.isnan(spearman([1, 1], [1, 2]))
    with pytest.raises(ValueError, match="1 scores but 2 rewards"):
        spearman([1], [1, 2])


def test_regret_is_what_the_pick_loses():
    assert best_of_n_regret([0.1, 0.9, 0.3], [5.0, 3.0, 4.0]) == 2.0
    assert best_of_n_regret([0.9, 0.9], [1.0, 2.0]) == 1.0
    assert best_of_n_regret([0.0, 1.0], [1.0, 2.0]) == 0.0
