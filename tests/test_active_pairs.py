"""D-optimal choice of pairs against determinants computed one by one, and in a run."""

import json

import pytest
import torch
from builders import prompt
from runs import two_ranks, write_run

from ampo_fast.active_pairs import choose_pairs, d_optimal
from ampo_fast.config import ModelConfig, load_config
from ampo_fast.model import Policy
from ampo_fast.trainer import train
from ampo_fast.types import GivenResponse, Prompt


def brute_force(v, count, ridge):
    chosen, h = [], ridge * torch.eye(v.shape[1], dtype=torch.float64)
    for _ in range(count):
        gains = [-torch.inf if i in chosen else torch.logdet(h + torch.outer(x, x)).item() for i, x in enumerate(v)]
        chosen.append(max(range(len(v)), key=gains.__getitem__))
        h = h + torch.outer(v[chosen[-1]], v[chosen[-1]])
    return chosen


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_picks_are_those_of_the_determinant(ridge):
    v = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert d_optimal(v, 20, ridge) == brute_force(v, 20, ridge)


def test_what_is_known_already_comes_last_and_ties_go_to_the_lowest_index():
    basis = torch.eye(3)
    v = torch.cat((basis[[0, 0, 0]], 0.9 * basis[[1]], 0.8 * basis[[2]]))
    assert d_optimal(v, 5) == [0, 3, 4, 1, 2]
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"count = {count} must be from 1 to the number of pairs, 5"):
            d_optimal(v, count)


def pair(i, first, second):
    given = (GivenResponse(content=first, reward=1.0), GivenResponse(content=second, reward=0.0))
    return Prompt(id=f"p{i}", messages=prompt(i, "q").messages, responses=given)


def test_pairs_that_differ_are_chosen_before_those_that_hardly_do(tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    pairs = [pair(0, "same", "same"), pair(1, "aaaa", "zzzz"), pair(2, "same", "same"), pair(3, "bcd", "xyxyxy")]
    assert [p.id for p in choose_pairs(policy, pairs, 2, 32)] == ["p1", "p3"]
    assert choose_pairs(policy, pairs, 9, 32) == pairs
    with pytest.raises(ValueError, match="prompt p9 has not two responses"):
        choose_pairs(policy, [prompt(9)], 1, 32)


CHOICE = """
import sys
import torch
from ampo_fast import distributed
from ampo_fast.active_pairs import choose_pairs
from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from test_active_pairs import pair

with distributed.process_group(60):
    policy = Policy.load(ModelConfig(path=sys.argv[1])).shard()
    pairs = [pair(i, "abc" * (i + 1), "xyz" + chr(97 + i)) for i in range(7)]
    chosen = choose_pairs(policy, pairs, 3, 32)
    torch.save([p.id for p in chosen], f"{sys.argv[2]}/rank{distributed.rank()}.pt")
"""


def test_two_ranks_choose_what_one_chooses(tiny_model, tmp_path):
    for status, err in two_ranks(CHOICE, tiny_model, tmp_path):
        assert status == 0, err[-3000:]
    pairs = [pair(i, "abc" * (i + 1), "xyz" + chr(97 + i)) for i in range(7)]
    alone = [p.id for p in choose_pairs(Policy.load(ModelConfig(path=str(tiny_model))), pairs, 3, 32)]
    assert [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)] == [alone, alone]


def test_a_run_trains_on_the_chosen_pairs_only(tiny_model, tmp_path):
    rows = [{"id": str(i), "prompt": f"q{i}", "chosen": "aei" * (i + 1), "rejected": "xyz"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_run(
        tmp_path, tiny_model, run={"steps": 2}, data={"train": str(tmp_path / "pairs.jsonl"), "active_pairs": 2},
        rollout={"engine": "data", "prompts_per_round": 0}, reward={"kind": "data"}, eval={"prompts": 0},
        select={"k": 1}, loss={"name": "DPO"},
    )  # fmt: skip
    train(load_config(str(path)))
    files = sorted((tmp_path / "runs/r/rollouts").glob("*.jsonl"))
    used = {json.loads(line)["id"] for file in files for line in file.read_text().splitlines()}
    assert len(used) == 2
    with pytest.raises(ValueError, match=r"data\.active_pairs .*rollout\.engine"):
        load_config(str(path), ["--rollout.engine", "transformers", "--reward.kind", "relevance"])
