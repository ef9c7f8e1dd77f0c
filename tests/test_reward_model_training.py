"""Reward models that learn what small data holds, stop, and come back as they left."""

import json
import random
import shutil
import sys

import pytest
import torch
from builders import config as policy_config
from builders import group as candidate_group
from runs import of_other_modes

from ampo_fast import cli
from ampo_fast.config import BaseModelConfig, BaseOptimConfig, build_config
from ampo_fast.metrics import read_metrics
from ampo_fast.reward_model import training
from ampo_fast.reward_model.config import RewardLossConfig, RewardTrainingConfig
from ampo_fast.reward_model.data import conversation_key
from ampo_fast.reward_model.model import EncodedGroup
from ampo_fast.reward_model.training import (
    Item,
    RewardTrainer,
    fit_length_weight,
    make_reward_loss,
    train_reward,
)
from ampo_fast.rewards import make_reward
from ampo_fast.types import GivenResponse, Prompt


def write_pairs(path, count=48, seed=0, fewer=True, **more):
    """Answers of one length; those with fewer "z" score higher (an untrained model ranks them the other way)."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        low, high = sorted(rng.sample(range(9), 2))
        texts = ["".join(rng.sample("z" * n + "abcdefgh"[: 8 - n], 8)) for n in ((low, high) if fewer else (high, low))]
        scores = {"chosen_score": high / 8, "rejected_score": low / 8}
        rows.append({"prompt": f"q{i % 24}", "chosen": texts[0], "rejected": texts[1], **scores, **more})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path, tiny_model, **sections):
    values = {
        "run": {"dir": str(tmp_path / "runs"), "epochs": 6},
        "data": {"train": str(write_pairs(tmp_path / "pairs.jsonl")), "eval_share": 0.25, "max_tokens": 64},
        "model": {"path": str(tiny_model)},
        "optim": {"prompts_per_step": 8, "lr": 3e-3, "micro_batch_tokens": 256},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build_config(values, schema=RewardTrainingConfig)


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "BradleyTerry"},
        {"name": "MMPOReward", "params": {"gamma": {"agreement": 0.9}}},
        {"name": "MarginBT"},
        {"name": "PCRM"},
        {"name": "Listwise"},
        {"name": "InfoNCA", "params": {"temperature": 0.2}},
    ],
)
def test_every_loss_learns_the_order(tiny_model, tmp_path, loss):
    summary = train_reward(settings(tmp_path, tiny_model, loss=loss))
    rows = read_metrics(tmp_path / "runs/reward/metrics.jsonl")
    start = next(row["eval/accuracy"] for row in rows if row["step"] == 0)
    assert start < 0.5
    assert summary["accuracy"] > 0.8
    assert summary["num_pairs"] == 12
    assert summary["padding_factor"] == 1.0
    assert summary["sharing_factor"] > 1.2
    assert summary["export_difference"] < 1e-3
    assert (summary.get("gamma") is not None) == (loss["name"] == "MMPOReward")


def test_the_run_directory_is_whole_and_the_model_is_a_reward(tiny_model, tmp_path, capsys):
    import tomli_w

    config = settings(tmp_path, tiny_model, run={"epochs": 2})
    path = tmp_path / "reward.toml"
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    assert cli.main(["train-reward", str(path), "--run.name", "second"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = tmp_path / "runs/second"
    assert summary["run_dir"] == str(run)
    for name in ("config.json", "versions.json", "metrics.jsonl", "evaluation.json", "summary.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert not of_other_modes(run)
    assert "Reliability" in (run / "report.html").read_text()
    from transformers import AutoModelForSequenceClassification

    assert AutoModelForSequenceClassification.from_pretrained(run / "final").config.num_labels == 1
    scored = make_reward(policy_config(reward={"kind": f"classifier:{run / 'final'}"}))([candidate_group(["zz", "ab"])])
    assert len(scored[0]) == 2
    assert cli.main(["train-reward", str(path), "--run.name", "second"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["train-reward", str(path), "--optim.lrr", "1"]) == 2
    assert "did you mean optim.lr?" in capsys.readouterr().err


def test_the_best_weights_are_exported_and_training_stops_early(tiny_model, tmp_path):
    # Held-out pairs of the opposite taste: every step makes them worse, and two worse evaluations end the run.
    opposite = write_pairs(tmp_path / "opposite.jsonl", fewer=False)
    summary = train_reward(settings(tmp_path, tiny_model, data={"eval": str(opposite)}, eval={"patience": 2}))
    assert (summary["best_step"], summary["steps"]) == (0, 12)
    assert "without a better held-out loss" in summary["stopped"]
    rows = read_metrics(tmp_path / "runs/reward/metrics.jsonl")
    assert summary["accuracy"] == pytest.approx(rows[0]["eval/accuracy"])
    assert summary["log_loss"] == pytest.approx(rows[0]["eval/log_loss"], rel=1e-5)


def test_micro_batches_do_not_change_the_step(tiny_model, tmp_path):
    weights = []
    for name, tokens in (("a", 64), ("b", 4096)):
        config = settings(tmp_path, tiny_model, run={"name": name, "epochs": 1}, optim={"micro_batch_tokens": tokens})
        trainer = RewardTrainer(config)
        trainer.run()
        weights.append(trainer.model.model.score.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


def test_held_out_prompts_are_not_trained_on(tiny_model, tmp_path):
    trainer = RewardTrainer(settings(tmp_path, tiny_model))
    train, held = ({conversation_key(i.group) for i in items} for items in (trainer.train_items, trainer.held_items))
    assert train.isdisjoint(held)
    assert (len(train), len(held)) == (18, 6)


def test_ties_are_half_for_mmpo_and_too_long_ones_are_dropped(tiny_model, tmp_path):
    path = write_pairs(tmp_path / "ties.jsonl", chosen_score=0.5, rejected_score=0.5)
    tied = {"train": str(path), "eval": str(write_pairs(tmp_path / "eval.jsonl", 8, 1)), "max_tokens": 64}
    with pytest.raises(ValueError, match="equal scores"):
        RewardTrainer(settings(tmp_path, tiny_model, data=tied))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["chosen_score"], rows[1]["chosen"] = 0.9, "z" * 99
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = {"name": "MMPOReward", "params": {"gamma": 2.0}}
    trainer = RewardTrainer(settings(tmp_path, tiny_model, data=tied | {"overlong": "drop"}, loss=loss))
    assert len(trainer.train_items) == 47
    (item,) = [i for i in trainer.train_items if i.rewards == [0.5, 0.5]][:1]
    pulled = trainer._loss(torch.tensor([1.0, 0.0]), [item]).loss
    assert pulled > trainer._loss(torch.tensor([0.0, 0.0]), [item]).loss


def test_length_is_fitted_and_dropped(tiny_model, tmp_path):
    rows = []
    for i in range(40):
        long, short = "z" * 12 + "ab", "ab"
        first_wins = i % 4 > 0  # the longer one wins in three of four: w = log 3 / log(length ratio)
        pair = (long, short) if first_wins else (short, long)
        scores = {"chosen_score": 1.0, "rejected_score": 0.1 * (i % 7)}
        rows.append({"prompt": f"q{i % 20}", "chosen": pair[0], "rejected": pair[1], **scores})
    path = tmp_path / "length.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    free, controlled = (
        RewardTrainer(
            settings(tmp_path, tiny_model, run={"name": f"r{flag}", "epochs": 4}, data={"train": str(path)},
                     loss={"length_control": flag})
        )
        for flag in (False, True)
    )  # fmt: skip
    assert controlled.length_weight > 0.3
    assert free.length_weight == 0.0
    probe = Prompt(id="p", messages=({"role": "user", "content": "q1"},), responses=(
        GivenResponse(content="z" * 12 + "ab"), GivenResponse(content="ab")))  # fmt: skip
    gaps = []
    for trainer in (free, controlled):
        trainer.run()
        scores = trainer.model([trainer.model.encode(probe)])
        gaps.append((scores[0] - scores[1]).item())
    assert gaps[0] > 0.3
    assert abs(gaps[1]) < 0.5 * gaps[0]


def test_the_length_weight_is_the_log_odds_by_hand(tiny_model):

    def item(first, second, rewards):
        given = tuple(GivenResponse(content="x", reward=r) for r in rewards)
        ids = (tuple(range(first)), tuple(range(second)))
        return Item(Prompt(id="i", messages=(), responses=given), EncodedGroup("i", ids, 0), (first, second))

    import math

    items = [item(4, 2, (1.0, 0.0))] * 3 + [item(4, 2, (0.0, 1.0))]
    assert fit_length_weight(items) == pytest.approx(math.log(3) / math.log(2))
    with pytest.raises(ValueError, match="length decides every pair"):
        fit_length_weight(items[:3])


@pytest.mark.parametrize("name", ["BradleyTerry", "InfoNCA"])
def test_wrong_params_are_named(name):
    with pytest.raises(ValueError, match=r"loss\.params = \{'betta': 1\}: .* has no field betta; its fields: "):
        make_reward_loss(RewardLossConfig(name=name, params={"betta": 1}), [])


def test_the_trained_model_is_the_reward_of_a_policy(tiny_model, tmp_path):
    from test_trainer import write_run

    from ampo_fast.config import load_config
    from ampo_fast.reward_model.config import RewardModelConfig
    from ampo_fast.reward_model.model import RewardModel
    from ampo_fast.trainer import train

    summary = train_reward(settings(tmp_path, tiny_model, run={"epochs": 1}))
    kind = f"classifier:{summary['model']}"
    path = write_run(tmp_path, tiny_model, run={"steps": 2}, reward={"kind": kind}, eval={"every": 0})
    assert train(load_config(str(path)))["steps"] == 2
    row = json.loads((tmp_path / "runs/r/rollouts/step_000001.jsonl").read_text().splitlines()[0])
    given = tuple(GivenResponse(content=response["content"]) for response in row["responses"])
    model = RewardModel.load(RewardModelConfig(path=summary["model"]))
    scores = model([model.encode(Prompt(id="p", messages=tuple(row["prompt"]), responses=given))]).tolist()
    assert [response["reward_raw"] for response in row["responses"]] == pytest.approx(scores, abs=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny_model, tmp_path, monkeypatch):
    whole = train_reward(settings(tmp_path, tiny_model, run={"name": "whole", "epochs": 3}))
    config = settings(tmp_path, tiny_model, run={"name": "stopped", "epochs": 3})
    update = RewardTrainer._update

    def fall_over(self, step, items):
        if step == 8:
            raise RuntimeError("the machine went away")
        update(self, step, items)

    monkeypatch.setattr(RewardTrainer, "_update", fall_over)
    with pytest.raises(RuntimeError, match="went away"):
        train_reward(config)
    monkeypatch.setattr(RewardTrainer, "_update", update)
    with pytest.raises(ValueError, match="already holds a run"):
        train_reward(config)
    resumed = train_reward(config, resume=True)
    rows = []
    for name in ("whole", "stopped"):
        found = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        rows.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in found])
    assert rows[0] == rows[1]
    assert resumed["log_loss"] == whole["log_loss"]
    assert train_reward(config, resume=True)["log_loss"] == whole["log_loss"]
    with pytest.raises(ValueError, match=r"optim\.lr"):
        train_reward(
            settings(tmp_path, tiny_model, run={"name": "stopped", "epochs": 3}, optim={"lr": 1.0}), resume=True
        )
    before = (tmp_path / "pairs.jsonl").read_text()
    write_pairs(tmp_path / "pairs.jsonl", seed=1)
    with pytest.raises(ValueError, match=r"data\.train gives other prompts, responses or rewards than .* began with"):
        train_reward(config, resume=True)
    (tmp_path / "pairs.jsonl").write_text(before)
    (tmp_path / "runs/stopped/checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors cannot be read"):
        train_reward(config, resume=True)


def test_a_step_without_a_finite_loss_is_noted_and_the_third_ends_the_run(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "guarded_step", lambda *_: (float("nan"), False))
    with pytest.raises(ValueError, match=r"3 steps in a row.*Lower optim\.lr"):
        train_reward(settings(tmp_path, tiny_model))
    noted = [line for line in capsys.readouterr().err.splitlines() if "gradient norm nan: update left out" in line]
    assert [line.split(":")[0] for line in noted] == ["step 1", "step 2", "step 3"]


def test_held_out_ties_alone_are_refused_before_the_run_directory_is_made(tiny_model, tmp_path):
    ties = write_pairs(tmp_path / "ties.jsonl")
    rows = [json.loads(line) | {"chosen_score": 1.0, "rejected_score": 1.0} for line in ties.read_text().splitlines()]
    ties.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"data\.eval: every pair has equal scores"):
        train_reward(settings(tmp_path, tiny_model, data={"eval": str(ties)}))
    assert not (tmp_path / "runs").exists()


def test_rated_groups_with_ties_train_and_are_measured(tiny_model, tmp_path):
    rng = random.Random(0)
    rows = []
    for i in range(16):
        ratings = [rng.choice([1.0, 7 / 3, 10 / 3]) for _ in range(4)]
        ratings[:3] = [1.0, 1.0, 10 / 3]
        texts = ["z" * n + "abcdefgh"[: 8 - n] for n in rng.sample(range(8), 4)]
        responses = [{"content": t, "reward": r} for t, r in zip(texts, ratings, strict=True)]
        rows.append({"prompt": f"q{i}", "responses": responses})
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = {"name": "MMPOReward", "params": {"gamma": 1.0}}
    summary = train_reward(settings(tmp_path, tiny_model, data={"train": str(path)}, loss=loss, run={"epochs": 1}))
    assert summary["num_ties"] > 0
    assert summary["num_pairs"] + summary["num_ties"] == 4 * 6  # a quarter of the prompts is held out
    evaluation = json.loads((tmp_path / "runs/reward/evaluation.json").read_text())
    assert evaluation["num_groups"] == 4
    assert 0.5 <= evaluation["tie_confidence"] < 1.0


# --- the sections shared with `ampo-fast train` -----------------------------------------------------------------------

SHARED = {
    "model.dtype": "bfloat16",
    "model.attention": "unshared",
    "optim.prompts_per_step": 4,
    "optim.micro_batch_tokens": 64,
    "optim.lr": 1e-3,
    "optim.min_lr_ratio": 0.5,
    "optim.warmup_ratio": 0.9,
    "optim.betas": (0.5, 0.5),
    "optim.weight_decay": 1.0,
    "optim.max_grad_norm": 1e-3,
}
"""Another value than the tests' own of each shared field; the other two have tests of their own."""


def observed(tiny_model, folder, field=None):
    """The metrics of a short run, and how much was fed in how many forwards."""
    folder.mkdir()
    section, _, name = (field or "").partition(".")
    changed = {section: {name: SHARED[field]}} if field else {}
    trainer = RewardTrainer(settings(folder, tiny_model, **{"run": {"epochs": 1}} | changed))
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.run()
    rows = read_metrics(folder / "runs/reward/metrics.jsonl")
    untimed = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return untimed, trainer.model.num_fed, len(calls)


@pytest.fixture(scope="module")
def unchanged(tiny_model, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("shared") / "run" for _ in range(2)]
    first, second = (observed(tiny_model, folder) for folder in folders)
    assert first == second
    return first


def test_every_shared_field_has_its_case():
    shared = {f"model.{name}" for name in BaseModelConfig.model_fields}
    shared |= {f"optim.{name}" for name in BaseOptimConfig.model_fields}
    assert shared == SHARED.keys() | {"model.path", "model.trust_remote_code"}


@pytest.mark.parametrize("field", SHARED)
def test_a_shared_field_changes_the_run(unchanged, tiny_model, tmp_path, field):
    assert observed(tiny_model, tmp_path / "run", field) != unchanged


@pytest.mark.parametrize(
    "field",
    ["model.lora", "model.lora.rank", "model.compile", "model.liger", "optim.activation_checkpointing", "rollout.n"],
)
def test_what_only_a_policy_has_is_refused_by_name(tiny_model, tmp_path, capsys, field):
    path = tmp_path / "reward.toml"
    path.write_text(f'[data]\ntrain = "pairs.jsonl"\n[model]\npath = "{tiny_model}"\n')
    assert cli.main(["train-reward", str(path), f"--{field}", "1"]) == 2
    named = field.removesuffix(".rank").removesuffix(".n")
    assert f"unknown key {named}: `ampo-fast train` alone reads it; leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train-reward", "--help"])
    assert f"--{field}" not in capsys.readouterr().out


JUDGE = """
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel

class JudgeConfig(LlamaConfig):
    model_type = "judge"

class JudgeForSequenceClassification(LlamaPreTrainedModel):
    config_class = JudgeConfig
    forward = LlamaForSequenceClassification.forward

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
"""


def test_a_model_with_code_of_its_own_is_trained_and_exported(tiny_model, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    judge = tmp_path / "judge"
    shutil.copytree(tiny_model, judge)
    (judge / "judge_code.py").write_text(JUDGE)
    config = json.loads((judge / "config.json").read_text())
    names = {"AutoConfig": "JudgeConfig", "AutoModelForSequenceClassification": "JudgeForSequenceClassification"}
    config |= {"model_type": "judge", "auto_map": {auto: f"judge_code.{name}" for auto, name in names.items()}}
    (judge / "config.json").write_text(json.dumps(config))
    run = {"epochs": 1}
    with pytest.raises(ValueError, match="custom code"):
        train_reward(settings(tmp_path, judge, run=run))
    summary = train_reward(settings(tmp_path, judge, run=run, model={"path": str(judge), "trust_remote_code": True}))
    assert summary["export_difference"] < 1e-3
