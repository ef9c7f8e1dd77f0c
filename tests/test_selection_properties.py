"""The selector against brute force over all subsets of small groups, for every strategy and both paths, and bad input.

Points lie on a small grid and rewards are quarters, so that ties, duplicates and zero costs come up all the time.
"""

import itertools
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ampo_fast import k_center, k_medoids, pairwise_distances, select_responses
from ampo_fast.selection import STRATEGIES

IMPLS = ("torch", "cpp")
MANY = [s for s in STRATEGIES if s != "best_worst"]


class BruteForce:
    """The contract of select_responses for one group with one positive, written again from its text, in float64."""

    def __init__(self, points, rewards, k, covers_positive):
        self.points, self.rewards = points, rewards
        n = len(rewards)
        self.positive = max(range(n), key=lambda i: (rewards[i], -i))
        self.eligible = [i for i in range(n) if i != self.positive]
        self.k = min(k, len(self.eligible))
        self.clients = range(n) if covers_positive else self.eligible
        mean = sum(rewards) / n
        self.weight = [math.exp(mean - r) for r in rewards]
        self.subsets = list(itertools.combinations(self.eligible, self.k))
        self.optimum = min(map(self.cost, self.subsets))

    def cost(self, chosen):
        return sum(
            self.weight[i] * min(math.dist(self.points[i], self.points[j]) for j in chosen) for i in self.clients
        )

    def bottom_k(self):
        return sorted(sorted(self.eligible, key=lambda i: (self.rewards[i], i))[: self.k])

    def k_center(self):
        covered, chosen = [self.positive], []
        while len(chosen) < self.k:
            left = [i for i in self.eligible if i not in chosen]
            gap = {i: min(math.dist(self.points[i], self.points[j]) ** 2 for j in covered) for i in left}
            pick = max(left, key=lambda i: (round(gap[i]), -i))  # squared distances on the grid are integers
            covered.append(pick)
            chosen.append(pick)
        return sorted(chosen)

    def neighbours(self, chosen):
        """Every choice one swap away."""
        others = [i for i in self.eligible if i not in chosen]
        return [[*(j for j in chosen if j != out), into] for out in chosen for into in others]


QUARTERS = st.integers(0, 6).map(lambda q: q / 4)


@st.composite
def small_groups(draw, reward=QUARTERS):
    n, dim = draw(st.integers(2, 10)), draw(st.integers(1, 3))
    coordinate = st.integers(-2, 2).map(float)
    points = draw(st.lists(st.lists(coordinate, min_size=dim, max_size=dim), min_size=n, max_size=n))
    rewards = draw(st.lists(reward, min_size=n, max_size=n))
    return points, rewards


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=40, deadline=None)
@given(group=small_groups(), k=st.integers(1, 5), covers_positive=st.booleans(), seed=st.integers(0, 99))
def test_every_strategy_against_brute_force(impl, strategy, group, k, covers_positive, seed):
    points, rewards = group
    k = 1 if strategy == "best_worst" else k
    truth = BruteForce(points, rewards, k, covers_positive)
    out = select_responses(
        torch.tensor(points),
        torch.tensor(rewards),
        k,
        strategy=strategy,
        coverage="all" if covers_positive else "candidates",
        seed=seed,
        impl=impl,
    )
    chosen = [i for i in out.negative[0].tolist() if i >= 0]
    cost, bound = out.cost[0].item(), out.lower_bound[0].item()
    near = {"rel": 1e-6, "abs": 1e-9}
    assert out.positive.tolist() == [[truth.positive]]
    assert out.negative[0].tolist() == sorted(chosen) + [-1] * (k - truth.k)
    assert tuple(chosen) in truth.subsets
    assert cost == pytest.approx(truth.cost(chosen), **near)
    assert bound <= truth.optimum * (1 + 1e-6) + 1e-9
    assert out.proven[0].item() == (bound >= cost)
    if strategy in ("bottom_k", "best_worst"):
        assert chosen == truth.bottom_k()
    if strategy == "k_center":
        assert chosen == truth.k_center()
    if strategy == "coreset":
        # The lowest reward of all is the lowest of its cluster, and k-means of k distinct points puts each on its own.
        assert min(rewards[i] for i in chosen) == min(rewards[i] for i in truth.eligible)
        distinct = {tuple(points[i]) for i in truth.eligible}
        if len(distinct) <= truth.k:
            assert {tuple(points[i]) for i in chosen} == distinct
    if strategy == "opt_select":
        assert cost <= 5 * truth.optimum + 1e-6
        for swapped in truth.neighbours(chosen):
            assert truth.cost(swapped) >= cost * (1 - 1e-6) - 1e-9
    if strategy == "opt_select_exact":
        assert cost == pytest.approx(truth.optimum, **near)
        assert out.proven[0]


@settings(max_examples=150, deadline=None)
@given(group=small_groups(reward=QUARTERS | st.floats(-150, 0)), k=st.integers(1, 5), covers_positive=st.booleans())
def test_rewards_far_apart_are_searched_proven_and_agreed_upon(group, k, covers_positive):
    """exp(-150) is 2^-216 of the largest weight: rounded beside it, every other client would cost nothing."""
    points, rewards = group
    truth = BruteForce(points, rewards, k, covers_positive)
    for strategy, factor in (("opt_select", 5), ("opt_select_exact", 1)):
        outs = [
            select_responses(
                torch.tensor(points),
                torch.tensor(rewards, dtype=torch.float64),
                k,
                strategy=strategy,
                coverage="all" if covers_positive else "candidates",
                impl=impl,
            )
            for impl in IMPLS
        ]
        for out in outs:
            chosen = [i for i in out.negative[0].tolist() if i >= 0]
            assert truth.cost(chosen) <= factor * truth.optimum * (1 + 1e-6)
            assert out.lower_bound[0].item() <= truth.optimum * (1 + 1e-6)
            assert out.lower_bound[0].item() >= out.cost[0].item() / factor * (1 - 1e-6)
            assert out.proven[0] or factor == 5
        if factor == 5:  # among equal optima any one
            assert torch.equal(outs[0].negative, outs[1].negative)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("strategy", ["opt_select", "opt_select_exact"])
def test_costs_that_vanish_beside_the_largest_prove_nothing(strategy, impl):
    # The weights of 0.0 and -20.0 beside that of -3000.0 are no doubles: which of them to cover cannot be told.
    rewards = torch.tensor([0.0, -3000.0, 3000.0, 10.0, -20.0])
    apart, equal = (
        select_responses(p, rewards, 2, strategy=strategy, impl=impl) for p in (torch.eye(5), torch.ones(5, 2))
    )
    assert apart.lower_bound.tolist() == [0.0]
    assert apart.proven.tolist() == [False]
    assert equal.proven.tolist() == [True]


@pytest.mark.parametrize("impl", IMPLS)
def test_k_medoids_covers_light_points_beside_a_heavy_one(impl):
    line = torch.tensor([[0.0], [100.0], [100.5], [7.0], [8.0], [9.0]])
    weights = torch.tensor([1.0, 1e-30, 1e-30, 1e-60, 1e-60, 1e-60], dtype=torch.float64)
    indices, cost = k_medoids(torch.cdist(line, line).double(), 3, weights=weights, impl=impl)
    assert indices.tolist() == [0, 1, 2]
    assert cost == pytest.approx(24e-60)
    indices, cost = k_medoids(torch.cdist(line, line).double(), 4, weights=weights, impl=impl)
    assert indices.tolist() == [0, 1, 2, 4]
    assert cost == pytest.approx(2e-60)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=40, deadline=None)
@given(group=small_groups(), data=st.data())
def test_k_medoids_against_brute_force(impl, group, data):
    points, weights = group
    n = len(points)
    k = data.draw(st.integers(1, n))
    fixed = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=min(k, 2)))
    distance = torch.tensor([[math.dist(p, q) for q in points] for p in points])
    indices, cost = k_medoids(distance, k, weights=torch.tensor(weights), fixed=fixed, impl=impl)
    chosen = indices.tolist()

    def by_definition(subset):
        return sum(w * min(math.dist(p, points[j]) for j in subset) for p, w in zip(points, weights, strict=True))

    optimum = min(by_definition(s) for s in itertools.combinations(range(n), k) if set(fixed) <= set(s))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == k
    assert set(fixed) <= set(chosen)
    assert cost == pytest.approx(by_definition(chosen), rel=1e-6, abs=1e-6)
    assert optimum - 1e-5 <= cost <= 5 * optimum + 1e-5
    for out, into in itertools.product(set(chosen) - set(fixed), set(range(n)) - set(chosen)):
        assert by_definition({*chosen, into} - {out}) >= cost * (1 - 1e-6) - 1e-6


@settings(max_examples=40, deadline=None)
@given(group=small_groups(), seed=st.integers(0, 99))
def test_random_and_coreset_are_functions_of_seed_and_key(group, seed):
    points, rewards = torch.tensor(group[0]), torch.tensor(group[1])
    offsets = torch.tensor([0, len(rewards), 2 * len(rewards)])
    for strategy in ("random", "coreset"):
        out = select_responses(
            points.repeat(2, 1), rewards.repeat(2), 2, strategy=strategy, group_offsets=offsets,
            keys=torch.tensor([7, 7]), seed=seed,
        )  # fmt: skip
        assert torch.equal(out.negative[0], out.negative[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("impl", IMPLS)
def test_degenerate_groups_are_answered_as_documented(strategy, impl):
    # Sizes 0, 1, 2 and 4 with all points equal; k >= the candidates in all but the last.
    k = 1 if strategy == "best_worst" else 3
    offsets = torch.tensor([0, 0, 1, 3, 7, 7])
    points, rewards = torch.ones(7, 3), torch.tensor([0.5, 0.1, 0.9, 0.3, 0.4, 0.1, 0.2])
    out = select_responses(points, rewards, k, strategy=strategy, group_offsets=offsets, impl=impl)
    none = [-1] * k
    assert out.positive[:, 0].tolist() == [-1, -1, 1, 1, -1]
    assert out.negative[[0, 1, 4]].tolist() == [none] * 3
    assert out.negative[2].tolist() == [0, *none[1:]]
    assert out.cost.isnan().tolist() == [True, True, False, False, True]
    assert out.cost[2:4].tolist() == [0.0, 0.0]
    assert not out.proven[[0, 1, 4]].any()


@pytest.mark.parametrize("strategy", MANY)
@pytest.mark.parametrize("impl", IMPLS)
def test_rewards_too_far_apart_for_exp_are_free_or_cost_infinity_and_never_nan(strategy, impl):
    # Weights relative to the largest: those below 1e-308 of it count as 0.
    rewards = torch.tensor([0.0, -3000.0, 3000.0, 10.0, -20.0])
    for points in (torch.eye(5), torch.ones(5, 2)):
        out = select_responses(points, rewards, 2, strategy=strategy, impl=impl)
        leaves_lowest_out = strategy == "random" and points.shape[1] == 5
        assert out.cost[0].item() == (math.inf if leaves_lowest_out else 0.0)
        assert not (leaves_lowest_out and out.proven[0])
        assert not out.lower_bound.isnan().any()
        assert out.lower_bound[0] <= out.cost[0]
        assert out.positive.tolist() == [[2]]


@pytest.mark.parametrize("strategy", MANY)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_high_reward_does_not_end_the_other_groups_selection(strategy, impl):
    points = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    rewards = torch.tensor([1e4, 0, 1, 2, 3, 4, 0.5, 0, 1, 2, 3, 4])
    offsets = torch.tensor([0, 6, 12])
    out = select_responses(points, rewards, 2, strategy=strategy, group_offsets=offsets, impl=impl)
    alone = select_responses(points[6:], rewards[6:], 2, strategy=strategy, keys=torch.tensor([1]), impl=impl)
    assert out.positive[:, 0].tolist() == [0, 5]
    assert out.cost[0].item() == math.inf
    assert torch.equal(out.negative[1], alone.negative[0])
    assert out.cost[1] == alone.cost[0]


@pytest.mark.parametrize("repeat", [4, 5, 6])
def test_symmetric_points_are_proven_in_a_moment(repeat):
    cube = torch.tensor(list(itertools.product([0.0, 1.0], repeat=repeat)))
    out = select_responses(cube, torch.zeros(len(cube)), 4, strategy="opt_select_exact", time_limit=20.0)
    assert out.proven[0]
    assert out.lower_bound[0] == pytest.approx(out.cost[0].item(), rel=1e-7)


@pytest.mark.parametrize("groups", [1, 3])
def test_an_endless_search_ends_with_control_c(groups):
    # The corners of a cube in seven dimensions: five of them in thousands of equally good ways.
    code = f"""
import itertools, torch
from ampo_fast import select_responses
points = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7))).repeat({groups}, 1)
offsets = torch.arange({groups} + 1) * 128
print("begun", flush=True)
select_responses(points, torch.zeros({groups} * 128), 5, strategy="opt_select_exact", group_offsets=offsets)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begun\n"
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert err.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-30, 1e-13, 1.0, 1e30])
def test_cosine_distances_do_not_depend_on_the_points_length(impl, size):
    points = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    expected = pairwise_distances(points.double(), metric="cosine")
    for scaled in (points * size, points.double() * size**6):
        found = pairwise_distances(scaled, metric="cosine", impl=impl).double()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_group_has_no_distances(impl):
    assert pairwise_distances(torch.zeros(0, 3), group_offsets=torch.tensor([0]), impl=impl).shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_fixed_members_and_seeds_may_be_any_sequence(impl, kind):
    points = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    distances = pairwise_distances(points)
    assert k_medoids(distances, 1, fixed=kind([0]), impl=impl)[0].tolist() == [0]
    assert {0, 3} <= set(k_medoids(distances, np.int64(3), fixed=kind([3, 0]), impl=impl)[0].tolist())
    assert k_center(points, np.int64(3), seeds=kind([4, 1]), impl=impl)[:2].tolist() == [4, 1]


HUGE = torch.zeros(1, 1).expand(70_000, 1)  # 70,000^2 distances do not fit


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, r: select_responses(p, r, 10**30, strategy="bottom_k"), "k = 1000"),
        (lambda p, r: select_responses(p, r, 1, strategy="bottom_k", positives=1 << 40), "positives"),
        (lambda p, r: select_responses(p, r, 1, strategy="bottom_k", time_limit=math.nan), "time_limit"),
        (lambda p, r: select_responses(p, r, 1, strategy="bottom_k", keys=torch.tensor([1, 2])), "keys"),
        (
            lambda p, r: select_responses(p, r, 1, strategy="random", group_offsets=torch.tensor([0, 3, 2, 4])),
            "offsets",
        ),
        (lambda p, r: select_responses(p, r, 1, strategy="random", group_offsets=torch.tensor([1, 4])), "offsets"),
        (lambda p, r: select_responses(p, r, 1, strategy="random", group_offsets=torch.tensor([0.0, 4.0])), "offsets"),
        (lambda p, r: select_responses(p, r * math.inf, 1, strategy="random"), "rewards"),
        (lambda p, r: select_responses(p / 0, r, 1, strategy="random"), "embeddings"),
        (lambda p, r: select_responses(HUGE, torch.zeros(70_000), 1, strategy="opt_select"), "too large"),
        (lambda p, r: pairwise_distances(HUGE), "would not fit"),
        (lambda p, r: pairwise_distances(p, group_offsets=torch.tensor([0, 3])), "group_offsets"),
        (lambda p, r: pairwise_distances(p, metric="hamming"), "metric"),
        (lambda p, r: pairwise_distances(p.long()), "points must hold floats, got torch.int64"),
        (lambda p, r: k_center(p.numpy(), 2), "points must be a torch tensor"),
        (lambda p, r: k_center(p, 0), "k = 0"),
        (lambda p, r: k_center(p, 2, seeds=[4]), "seeds"),
        (lambda p, r: k_center(p, 2, seeds=[-1]), "seeds"),
        (lambda p, r: k_center(p, 2, seeds=[1, 1]), "seeds"),
        (lambda p, r: k_center(p * math.nan, 2), "points"),
        (lambda p, r: k_center(p * 1e20, 2), r"up to 1e\+20: .*; scale the points"),
        (lambda p, r: k_center(p * 1e-30, 2), "up to 1e-30"),
        (lambda p, r: pairwise_distances(p * 1e20), r"up to 1e\+20"),
        (lambda p, r: k_center(p, 2.5), r"k = 2\.5; it must be a whole number"),
        (lambda p, r: k_center(p, 2, seeds=[1.7]), r"seeds\[0\] = 1\.7"),
        (lambda p, r: k_medoids(torch.zeros(3, 3), 2.5), r"k = 2\.5"),
        (lambda p, r: k_medoids(torch.zeros(3, 3), 2, fixed=0), "fixed must be a list of indices, got 0"),
        (lambda p, r: select_responses(p, r, 1, strategy="random", seed=None), "seed = None"),
        (lambda p, r: select_responses(p, r, 1, strategy="random", time_limit="1"), "time_limit = '1'"),
        (lambda p, r: select_responses(p, r, 1, strategy="random", tie_tol="0"), "tie_tol = '0'"),
        (lambda p, r: k_medoids(torch.zeros(3, 3), 0), "k = 0"),
        (lambda p, r: k_medoids(torch.zeros(3, 3), 2, fixed=[-1]), "fixed"),
        (lambda p, r: k_medoids(torch.zeros(3, 3), 1, fixed=[0, 1]), "fixed"),
        (lambda p, r: k_medoids(torch.zeros(3, 4), 1), "distances"),
        (lambda p, r: k_medoids(-torch.ones(3, 3), 1), "negative"),
        (lambda p, r: k_medoids(torch.zeros(3, 3), 1, weights=torch.tensor([1.0, -1.0, 0.0])), r"weights\[1\] = -1"),
        (
            lambda p, r: k_medoids(torch.zeros(3, 3), 1, weights=torch.ones(4)),
            r"weights must have shape \[3\], got \(4,\)",
        ),
    ],
)
def test_bad_input_is_named(call, match):
    points, rewards = torch.eye(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=match):
        call(points, rewards)
