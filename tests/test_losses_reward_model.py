import math

import pytest
import torch

from ampo_fast.losses.reward_model import PCRM, BradleyTerry, InfoNCA, Listwise, MarginBT, MMPOReward

F64 = torch.float64
SCORE = [1.2, -0.3, 0.4]
REWARD = [0.9, 0.1, 0.4]
PAIRS = [(0, 1), (0, 2), (2, 1)]


def call(loss, score=SCORE, reward=REWARD, offsets=(0, 3), **more):
    return loss(torch.tensor(score, dtype=F64), torch.tensor(reward, dtype=F64), torch.tensor(offsets), **more)


def ls(x):
    return -math.log1p(math.exp(-x))


def mean_over(term):
    return sum(term(SCORE[w] - SCORE[r], REWARD[w] - REWARD[r]) for w, r in PAIRS) / 3


def test_bradley_terry_margin_and_mmpo_by_hand():
    assert call(BradleyTerry()).loss.item() == pytest.approx(mean_over(lambda d, _: -ls(d)), abs=1e-13)
    assert call(MarginBT()).loss.item() == pytest.approx(mean_over(lambda d, m: -ls(d - m)), abs=1e-13)

    def soft(d, m):
        p = 1 / (1 + math.exp(-1.5 * m))
        return -p * ls(d) - (1 - p) * ls(-d)

    assert call(MMPOReward(gamma=1.5)).loss.item() == pytest.approx(mean_over(soft), abs=1e-13)


def test_equal_rewards_are_half_a_win_for_mmpo_and_no_pair_for_bradley_terry():
    tied = call(MMPOReward(gamma=1.0), [0.7, 0.2], [1.0, 1.0], (0, 2))
    assert tied.loss.item() == pytest.approx(-0.5 * ls(0.5) - 0.5 * ls(-0.5), abs=1e-13)
    hard = call(BradleyTerry(), [0.7, 0.2], [1.0, 1.0], (0, 2))
    assert hard.loss == 0
    assert hard.metrics["pairs_equal"] == 1


def test_pcrm_bounds_the_gap_by_similarity_or_lengths():
    loss = PCRM(beta1=6.0, beta2=1e-3, beta3=0.5)
    bound = 6.0 / (0.8 + 1e-3) + 0.5
    expected = -ls(1.5) - ls(bound - 1.5)
    got = call(loss, SCORE[:2], REWARD[:2], (0, 2), similarity=torch.tensor([0.8], dtype=F64))
    assert got.loss.item() == pytest.approx(expected, abs=1e-13)
    by_length = call(loss, SCORE[:2], REWARD[:2], (0, 2), length_M=torch.tensor([8, 10]))
    assert by_length.loss.item() == pytest.approx(expected, abs=1e-13)
    with pytest.raises(ValueError, match="length_M"):
        call(loss)


def test_listwise_is_plackett_luce():
    order = [SCORE[0], SCORE[2], SCORE[1]]
    expected = sum(math.log(sum(math.exp(s) for s in order[k:])) - order[k] for k in range(3))
    assert call(Listwise()).loss.item() == pytest.approx(expected, abs=1e-13)


def test_infonca_is_the_cross_entropy_to_the_rewards_softmax():
    target = torch.softmax(torch.tensor(REWARD, dtype=F64) / 0.5, 0)
    expected = -(target * torch.log_softmax(torch.tensor(SCORE, dtype=F64), 0)).sum()
    assert call(InfoNCA(temperature=0.5)).loss.item() == pytest.approx(expected.item(), abs=1e-13)
    with pytest.raises(ValueError, match="temperature = 0"):
        InfoNCA(temperature=0)


@pytest.mark.parametrize("loss", [BradleyTerry(), MMPOReward(gamma=1.0), MarginBT(), Listwise(), InfoNCA(), PCRM()])
def test_gradients_are_exact_over_ragged_groups(loss):
    reward, offsets = torch.tensor([0.3, 0.9, 0.5, 0.1, 0.7, 0.2], dtype=F64), torch.tensor([0, 2, 2, 5, 6])
    score = torch.tensor([0.1, -0.4, 1.3, 0.8, -0.2, 0.5], dtype=F64, requires_grad=True)
    length_M = torch.tensor([3, 4, 5, 6, 7, 8])

    def per_group(score_M):
        return loss(score_M, reward, offsets, length_M=length_M).per_group_B

    assert torch.autograd.gradcheck(per_group, (score,))
    assert per_group(score)[1] == 0


@pytest.mark.parametrize(
    ("score", "reward", "offsets", "word"),
    [
        ([1.0, 2.0], [1.0], (0, 2), "reward_M"),
        ([1.0, math.nan], [1.0, 0.0], (0, 2), "score_M"),
        ([1.0, 2.0], [1.0, math.inf], (0, 2), "reward_M"),
        ([1.0, 2.0], [1.0, 0.0], (0, 1), "group_offsets"),
    ],
)
def test_bad_input_is_named(score, reward, offsets, word):
    with pytest.raises(ValueError, match=word):
        call(BradleyTerry(), score, reward, offsets)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"length_M": torch.tensor([3, 0])}, r"length_M\[1\] = 0"),
        ({"length_M": torch.tensor([-1, 3])}, r"length_M\[0\] = -1"),
        ({"similarity": torch.tensor([1.5])}, "similarity must be in"),
        ({"similarity": torch.tensor([-0.5])}, "similarity must be in"),
        ({"similarity": torch.tensor([math.nan])}, "similarity holds NaN"),
    ],
)
def test_pcrm_refuses_what_is_no_length_and_no_similarity(more, word):
    with pytest.raises(ValueError, match=word):
        call(PCRM(), [1.0, 2.0], [1.0, 0.0], (0, 2), **more)


def test_mean_human_ratings_with_ties_by_hand():
    # Means of three raters: of six pairs two are ties, each a target of 1/2, none dropped, whichever comes first.
    score, rating = [0.3, -0.2, 0.5, 1.1], [10 / 3, 10 / 3, 1.0, 1.0]
    total = 0.0
    for i, j in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        p = 1 / (1 + math.exp(-1.5 * (rating[i] - rating[j])))
        total += -p * ls(score[i] - score[j]) - (1 - p) * ls(score[j] - score[i])
    got = call(MMPOReward(gamma=1.5), score, rating, (0, 4))
    assert got.loss.item() == pytest.approx(total / 6, abs=1e-13)
    assert (got.metrics["pairs"], got.metrics["pairs_equal"]) == (6, 2)
    turned = call(MMPOReward(gamma=1.5), score[::-1], rating[::-1], (0, 4))
    assert turned.loss.item() == pytest.approx(total / 6, abs=1e-13)
    hard = call(BradleyTerry(), score, rating, (0, 4))
    assert (hard.metrics["pairs"], hard.metrics["pairs_equal"]) == (4, 2)
