import itertools
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ampo_fast import k_center, k_medoids, pairwise_distances, select_responses
from ampo_fast.selection import STRATEGIES

MANY = [s for s in STRATEGIES if s != "best_worst"]


def random_groups(sizes, seed=0, dim=5):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    return torch.randn(n, dim, generator=g), torch.rand(n, generator=g), torch.tensor([0, *sizes]).cumsum(0)


def cost_by_definition(points, rewards, positive, chosen, everyone, coverage="candidates"):
    weight = (rewards[everyone].mean() - rewards).exp()
    clients = [i for i in everyone if coverage == "all" or i not in positive]
    return sum(float(weight[i]) * min(float((points[i] - points[j]).norm()) for j in chosen) for i in clients)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 1000), st.sampled_from(MANY)
)
def test_every_strategy_obeys_the_contract(sizes, k, seed, strategy):
    points, rewards, offsets = random_groups(sizes, seed)
    out = select_responses(points, rewards, k, strategy=strategy, group_offsets=offsets)
    for b, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        r, p = rewards[start:end], points[start:end]
        positive, negative = out.positive[b].tolist(), out.negative[b].tolist()
        assert positive == [int(r.argmax())]
        kept = [i for i in negative if i >= 0]
        assert kept == sorted(set(kept))
        assert negative == kept + [-1] * (k - len(kept))
        assert len(kept) == min(k, len(r) - 1)
        assert positive[0] not in kept
        expected = cost_by_definition(p, r, positive, kept, list(range(len(r))))
        assert out.cost[b].item() == pytest.approx(expected, rel=1e-4)
        assert out.lower_bound[b] <= out.cost[b] + 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 9), st.integers(1, 4), st.integers(0, 1000))
def test_exact_is_the_optimum_and_local_search_within_five_times(n, k, seed):
    points, rewards, _ = random_groups([n], seed)
    exact = select_responses(points, rewards, k, strategy="opt_select_exact")
    local = select_responses(points, rewards, k, strategy="opt_select")
    top = int(rewards.argmax())
    others = [i for i in range(n) if i != top]
    best = min(
        cost_by_definition(points, rewards, [top], subset, range(n))
        for subset in itertools.combinations(others, min(k, n - 1))
    )
    assert exact.proven[0]
    assert exact.cost[0].item() == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert best - 1e-5 <= local.cost[0] <= 5 * best + 1e-5


@settings(max_examples=60, deadline=None)
@example([8], 4, 5, 0, "coreset", "candidates", None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 1000),
    st.sampled_from(MANY),
    st.sampled_from(["candidates", "all"]),
    st.sampled_from([None, 0.0, 0.25]),
)
def test_compiled_and_torch_choose_the_same(sizes, dim, k, seed, strategy, coverage, tie_tol):
    # Points on a grid and rewards in quarters: distances are the same bits in both, and full of ties.
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    arguments = {
        "embeddings": torch.randint(-2, 3, (n, dim), generator=g).float(),
        "rewards": torch.randint(0, 5, (n,), generator=g) / 4,
        "k": k,
        "strategy": strategy,
        "group_offsets": torch.tensor([0, *sizes]).cumsum(0),
        "positives": 1 + seed % 2,
        "coverage": coverage,
        "valid": torch.rand(n, generator=g) < 0.9,
        "positive_ok": torch.rand(n, generator=g) < 0.8,
        "tie_tol": tie_tol,
        "seed": seed,
    }
    torch_out, cpp_out = (select_responses(**arguments, impl=impl) for impl in ("torch", "cpp"))
    assert torch.equal(torch_out.positive, cpp_out.positive)
    if strategy != "opt_select_exact":  # among equal optima any one
        assert torch.equal(torch_out.negative, cpp_out.negative)
    torch.testing.assert_close(torch_out.cost, cpp_out.cost, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert torch.equal(torch_out.proven | torch_out.cost.isnan(), cpp_out.proven | cpp_out.cost.isnan())


def test_exact_proves_real_sized_groups_and_local_search_is_near():
    # 31 choose 4 and 31 choose 5 subsets, tried one by one in float64.
    points, rewards, offsets = random_groups([32, 32], seed=3, dim=16)
    for k in (3, 4):
        exact = select_responses(points, rewards, k, strategy="opt_select_exact", group_offsets=offsets)
        local = select_responses(points, rewards, k, strategy="opt_select", group_offsets=offsets)
        assert exact.proven.all()
        for b in range(2):
            p, r = points[32 * b : 32 * b + 32].double(), rewards[32 * b : 32 * b + 32].double()
            others = [i for i in range(32) if i != int(r.argmax())]
            cost = (r.mean() - r).exp()[others, None] * torch.cdist(p, p)[others]
            subsets = torch.tensor(list(itertools.combinations(others, k)))
            best = min(cost[:, part].amin(2).sum(0).min() for part in subsets.split(4000))
            assert exact.cost[b].item() == pytest.approx(best.item(), rel=1e-6)
            assert exact.lower_bound[b] == exact.cost[b]
            assert best - 1e-6 <= local.cost[b] <= 1.1 * best


def test_out_of_time_is_the_best_known_with_a_bound_that_holds():
    points, rewards, _ = random_groups([300], seed=5, dim=8)
    known = select_responses(points, rewards, 15, strategy="opt_select_exact")
    assert known.proven[0]
    for limit in (0.0, 0.005):  # before the search, and in the middle of it: it takes a hundred times longer
        late = select_responses(points, rewards, 15, strategy="opt_select_exact", time_limit=limit)
        assert not late.proven[0]
        assert 0 < late.lower_bound[0] < late.cost[0]
        assert late.lower_bound[0] <= known.cost[0] <= late.cost[0]


def test_too_little_memory_is_a_memory_error():
    # Of each call at least 200 MB are asked for inside its parallel region.
    code = """
        import resource, numpy as np, torch, ampo_fast as a
        from ampo_fast import _C
        points, rewards, offsets = torch.randn(10000, 2), torch.rand(10000), torch.tensor([0, 5000, 10000])
        wide, line = np.zeros((4, 1 << 25), np.float32), np.zeros((1 << 24, 1), np.float32)
        calls = (
            lambda: a.select_responses(points, rewards, 4, strategy="opt_select"),
            lambda: a.select_responses(points, rewards, 4, strategy="coreset", group_offsets=offsets),
            lambda: _C.pairwise(wide, np.array([0, 2, 4]), 2),
            lambda: _C.k_center(line, 2, []),
        )
        a.pairwise_distances(points[:9])  # the threads and what they need
        a.select_responses(points[:8], rewards[:8], 2, strategy="coreset", group_offsets=torch.arange(0, 9, 4))
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (128 << 20), resource.RLIM_INFINITY))
        for call in calls:
            try:
                call()
            except MemoryError:
                print("MemoryError")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "MemoryError\n" * 4), done.stderr


def test_thread_count_changes_nothing(tmp_path):
    code = (
        "import torch, hashlib, ampo_fast as a; g = torch.Generator().manual_seed(0); x = torch.randn(320, 24, generator=g);"
        "r = torch.rand(320, generator=g); o = torch.arange(0, 321, 16);"
        f"out = [a.select_responses(x, r, 4, strategy=s, group_offsets=o) for s in {MANY!r}];"
        "parts = [t.numpy().tobytes() for s in out for t in s] + [a.k_center(x, 90).numpy().tobytes()];"
        "parts += [a.pairwise_distances(x).numpy().tobytes(), a.k_medoids(torch.cdist(x, x), 9)[0].numpy().tobytes()];"
        "grid = torch.cartesian_prod(*[torch.arange(7.0)] * 3);"  # the farthest point is almost always a tie
        "parts += [a.k_center(grid, 60).numpy().tobytes()];"
        "print(hashlib.sha256(b''.join(parts)).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3", "8")
    }
    assert len(found) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.integers(1, 9), st.integers(0, 1000))
def test_k_center_is_the_plain_loop(n, dim, seed):
    g = torch.Generator().manual_seed(seed)
    points = torch.randint(-3, 4, (n, dim), generator=g).float()
    k = int(torch.randint(1, n + 1, (1,), generator=g))
    for seeds in (None, [n - 1, 0][:k]):
        torch_out, cpp_out = (k_center(points, k, seeds=seeds, impl=impl) for impl in ("torch", "cpp"))
        assert torch.equal(torch_out, cpp_out)
        assert len(set(cpp_out.tolist())) == k


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [1, 7, 40])
def test_compiled_distances_match_float64(metric, dtype, dim):
    points = torch.randn(21, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    points[3] = 0.0
    truth = pairwise_distances(points.double(), metric=metric, impl="torch")
    out = pairwise_distances(points, metric=metric, impl="cpp")
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-6)
    assert torch.equal(out, out.T)
    assert out.diagonal().tolist() == [0.0] * 21


def test_k_medoids_compiled_and_torch_agree_with_fixed_members_and_weights():
    g = torch.Generator().manual_seed(1)
    points = torch.randint(-4, 5, (25, 2), generator=g).float()
    weights = torch.rand(25, generator=g)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    for k, fixed in ((1, None), (1, [4]), (4, None), (5, [7, 2]), (25, [3])):
        torch_out, cpp_out = (k_medoids(distance, k, weights=weights, fixed=fixed, impl=i) for i in ("torch", "cpp"))
        assert torch.equal(torch_out[0], cpp_out[0])
        assert torch_out[1] == cpp_out[1]
        assert set(fixed or ()) <= set(cpp_out[0].tolist())


def test_ties_validity_and_sides():
    points, _, _ = random_groups([6])
    rewards = torch.tensor([0.5, 0.9, 0.9, math.nan, 0.1, 0.2])
    valid = torch.tensor([True, True, True, False, True, True])
    out = select_responses(points, rewards, 5, strategy="bottom_k", valid=valid, tie_tol=0.0)
    assert out.positive.tolist() == [[1]]  # the lowest index of equal rewards
    assert out.negative.tolist() == [[0, 4, 5, -1, -1]]  # 2 ties with the positive, 3 is invalid
    blocked = select_responses(points, rewards, 2, strategy="bottom_k", valid=valid, positive_ok=rewards < 0.3)
    assert blocked.positive.tolist() == [[5]]
    none = select_responses(
        points, rewards, 2, strategy="bottom_k", valid=valid, positive_ok=torch.zeros(6, dtype=torch.bool)
    )
    assert none.positive.tolist() == [[-1]]
    assert none.negative.tolist() == [[-1, -1]]
    assert math.isnan(none.cost[0])


def test_coverage_all_counts_the_positive_too():
    points, rewards, _ = random_groups([5])
    top = int(rewards.argmax())
    for coverage in ("candidates", "all"):
        out = select_responses(points, rewards, 2, strategy="k_center", coverage=coverage)
        expected = cost_by_definition(points, rewards, [top], out.negative[0].tolist(), range(5), coverage)
        assert out.cost[0].item() == pytest.approx(expected, rel=1e-5)


def test_several_positives_by_falling_reward():
    points, _, _ = random_groups([5])
    out = select_responses(points, torch.tensor([0.1, 0.8, 0.9, 0.3, 0.2]), 2, strategy="bottom_k", positives=2)
    assert out.positive.tolist() == [[2, 1]]
    assert out.negative.tolist() == [[0, 4]]


@pytest.mark.parametrize("strategy", ["random", "coreset"])
def test_keys_make_seeded_strategies_independent_of_order(strategy):
    points, rewards, offsets = random_groups([9, 9, 9])
    keys = torch.tensor([11, 22, 33])
    whole = select_responses(points, rewards, 3, strategy=strategy, group_offsets=offsets, keys=keys).negative
    for b in range(3):
        part = slice(9 * b, 9 * b + 9)
        alone = select_responses(points[part], rewards[part], 3, strategy=strategy, keys=keys[b : b + 1]).negative
        assert torch.equal(alone[0], whole[b])


def test_all_points_equal_still_gives_k_different_ones():
    points, rewards = torch.ones(6, 4), torch.arange(6.0)
    for strategy in MANY:
        out = select_responses(points, rewards, 3, strategy=strategy)
        assert len(set(out.negative[0].tolist()) - {-1, 5}) == 3
        assert out.cost[0] == 0


def test_near_duplicates_far_from_the_origin_keep_their_distance():
    base = torch.full((1, 384), 100.0 / 384**0.5)
    points = torch.cat((base, base)).double()
    points[1, 0] += 1e-4
    for impl in ("torch", "cpp"):
        distance = pairwise_distances(points.float(), impl=impl)
        true = (points.float().double()[0] - points.float().double()[1]).norm().item()
        assert distance[0, 1].item() == pytest.approx(true, rel=1e-5)
        assert distance.diagonal().tolist() == [0.0, 0.0]
        assert torch.equal(distance, distance.T)


def test_metrics_and_ragged_blocks():
    points, _, offsets = random_groups([3, 2])
    blocks = pairwise_distances(points, group_offsets=offsets)
    assert blocks.shape == (13,)
    torch.testing.assert_close(blocks[:9].view(3, 3), torch.cdist(points[:3], points[:3]), atol=1e-5, rtol=0)
    cosine = 1 - torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=-1)
    torch.testing.assert_close(pairwise_distances(points, metric="cosine"), cosine, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        pairwise_distances(points, metric="sqeuclidean"), torch.cdist(points, points) ** 2, atol=1e-4, rtol=0
    )


def test_k_center_by_hand():
    line = torch.tensor([[0.0], [10.0], [4.0], [10.0], [6.0]])
    assert k_center(line, 3).tolist() == [0, 1, 2]  # 0; then 10 (lowest index); then 4, 4 away from 0 like 6 from 10
    assert k_center(line, 3, seeds=[4]).tolist() == [4, 0, 1]
    assert sorted(k_center(line, 5).tolist()) == [0, 1, 2, 3, 4]


def test_k_medoids_by_hand_with_weights_and_fixed_members():
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    distance = torch.cdist(line, line)
    indices, cost = k_medoids(distance, 2)
    assert indices.tolist() in ([1, 3], [1, 4])
    assert cost == 3.0
    indices, cost = k_medoids(distance, 2, fixed=[0])
    assert indices.tolist() in ([0, 3], [0, 4])
    assert cost == 4.0
    indices, _ = k_medoids(distance, 1, weights=torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0]))
    assert indices.tolist() == [4]


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_k_medoids_of_a_one_way_dissimilarity_reads_it_from_point_to_medoid(impl):
    pays = torch.tensor([[1.0, 9.0, 2.0], [9.0, 0.0, 3.0], [9.0, 9.0, 4.0]])
    indices, cost = k_medoids(pays, 1, impl=impl)
    assert indices.tolist() == [2]
    assert cost == 9.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k = 0"),
        ({"strategy": "best"}, "strategy"),
        ({"strategy": "best_worst", "k": 2}, "best_worst"),
        ({"rewards": torch.zeros(4)}, "rewards"),
        ({"rewards": torch.tensor([1.0, math.nan, 0.0])}, "rewards"),
        ({"embeddings": torch.full((3, 2), math.inf)}, "embeddings"),
        ({"group_offsets": torch.tensor([0, 2])}, "group_offsets"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, "valid"),
        ({"impl": "gpu"}, "impl"),
        ({"k": 1.5}, "k = 1.5"),
        ({"embeddings": torch.ones(3, 2, dtype=torch.int64)}, "embeddings must hold floats, got torch.int64"),
        ({"embeddings": torch.ones(3, 2).numpy()}, "embeddings must be a torch tensor, got ndarray; torch.from_numpy"),
        ({"rewards": torch.ones(3).numpy()}, "rewards must be a torch tensor"),
        ({"valid": torch.ones(3)}, r"valid must be bool \[3\], got torch.float32"),
        ({"positive_ok": [True, True, False]}, "positive_ok must be a torch tensor, got list"),
        ({"tie_tol": -0.5}, "tie_tol = -0.5"),
        ({"tie_tol": math.nan}, "tie_tol = nan"),
        ({"time_limit": -1.0}, "time_limit = -1.0"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {
        "embeddings": torch.randn(3, 2),
        "rewards": torch.tensor([1.0, 0.5, 0.0]),
        "k": 1,
        "strategy": "opt_select",
    }
    with pytest.raises(ValueError, match=match):
        select_responses(**(arguments | change))
    with pytest.raises(ValueError, match="k = 9"):
        k_center(torch.randn(3, 2), 9)
    with pytest.raises(ValueError, match="fixed"):
        k_medoids(torch.zeros(3, 3), 2, fixed=[7])
    with pytest.raises(ValueError, match="distances must be"):
        k_medoids(torch.tensor(1.0), 1)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("strategy", ["opt_select", "opt_select_exact", "k_center"])
def test_distances_beyond_float32_end_in_an_error(strategy, impl):
    points, rewards, _ = random_groups([6])
    with pytest.raises(ValueError, match="overflow"):
        select_responses(points * 2e19, rewards, 2, strategy=strategy, impl=impl)
    huge = torch.cdist(points, points).double() * 1e300
    with pytest.raises(ValueError, match="overflow"):
        k_medoids(huge, 2, weights=torch.full((6,), 1e100, dtype=torch.float64), impl=impl)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_embeddings_whose_distances_have_no_squares_are_refused_not_proven_to_cost_nothing(impl):
    points, rewards = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 8)
    options = {"k": 2, "strategy": "opt_select_exact", "impl": impl}
    with pytest.raises(ValueError, match=r"embeddings has coordinates of up to .*; scale the points"):
        select_responses(points * 1e-30, rewards, **options)
    points[3], valid = torch.nan, torch.arange(8) != 3
    with pytest.raises(ValueError, match="embeddings has coordinates"):
        select_responses(points * 1e-30, rewards, valid=valid, **options)
    assert select_responses(points * 1e-12, rewards, valid=valid, **options).cost > 0
    assert select_responses(torch.zeros(8, 4), rewards, **options).cost == 0  # copies of one answer
