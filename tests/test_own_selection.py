"""A user's own selection: what it is given, what it may return, and what its choice costs."""

import pytest
from builders import config, scored

from ampo_fast.select import select_groups

STRATEGIES = """
def lowest(embeddings, rewards, k):
    assert len(embeddings) == len(rewards) and rewards[0] == rewards.max()
    return rewards[1:].argsort()[:k] + 1

def positive(embeddings, rewards, k): return [0]
def twice(embeddings, rewards, k): return [1, 1]
def many(embeddings, rewards, k): return range(1, len(rewards))
def none(embeddings, rewards, k): return []
def beyond(embeddings, rewards, k): return [len(rewards)]
def fails(embeddings, rewards, k): return rewards.nothing
constant = 3
"""


@pytest.fixture(autouse=True)
def strategies(tmp_path, monkeypatch):
    (tmp_path / "my_strategies.py").write_text(STRATEGIES)
    monkeypatch.syspath_prepend(str(tmp_path))


def settings(strategy, k=3, **more):
    return config(select={"strategy": strategy, "k": k} | more)


@pytest.mark.parametrize("coverage", ["candidates", "all"])
def test_the_choice_of_a_strategy_of_ours_costs_what_it_costs_there(coverage):
    groups = [
        scored([0.1, 0.9, 0.4, 0.9, 0.3, 0.5]),  # a tie with the positive is no negative
        scored([0.1, 0.2, 0.4, 0.9, 0.3, 0.5], 1, valid=[True, False, True, True, True, True]),
        scored([0.5, 0.5], 2),
    ]
    own, ours = (
        select_groups(groups, settings(name, coverage=coverage), 1e-6) for name in ("my_strategies:lowest", "bottom_k")
    )
    for mine, theirs in zip(own, ours, strict=True):
        assert (mine.positive, mine.negative, mine.skip_reason) == (
            theirs.positive,
            theirs.negative,
            theirs.skip_reason,
        )
        assert mine.cost == pytest.approx(theirs.cost, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("positive", r"returned \[0\] for 4 rows and k = 2; .*from 1 to k different rows of 1 \.\. 3"),
        ("twice", r"returned \[1, 1\]"),
        ("many", r"returned \[1, 2, 3\]"),
        ("none", r"returned \[\]"),
        ("beyond", r"returned \[4\]"),
        ("fails", r"failed: AttributeError.*my_strategies\.py:11"),
        ("constant", r"is no function: it is int"),
        ("nowhere", r"cannot be imported"),
    ],
)
def test_what_it_may_not_do_is_named(name, message):
    with pytest.raises(ValueError, match=rf"select\.strategy = 'my_strategies:{name}' {message}"):
        select_groups([scored([0.1, 0.9, 0.4, 0.3])], settings(f"my_strategies:{name}", k=2), 1e-6)
