"""The exported model's README.md: valid front matter, true numbers, honest where nothing was measured."""

import json

import pytest

import ampo_fast
from ampo_fast.config import build_config
from ampo_fast.model_card import _LOSS_PAPERS, versions, write_model_card

yaml = pytest.importorskip("yaml")

RESULT = {"reward_before": 0.4292, "reward_after": 0.5329, "reward_se": 0.0257, "win_rate": 0.71875, "num_prompts": 32}


def make_config(tmp_path, model="package:smollm2-135m-instruct", **sections):
    values = {
        "run": {"name": "card", "dir": str(tmp_path), "seed": 5},
        "data": {"train": "train.jsonl", "eval": "held_out.jsonl"},
        "model": {"path": model},
        "rollout": {"n": 8, "max_new_tokens": 48},
        "select": {"k": 3},
        "loss": {"name": "AMPO", "params": {"beta": 5}},
        "optim": {"prompts_per_step": 4, "lr": 5e-6},
    }
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return build_config(values)


def card_of(tmp_path, config, summary):
    path = write_model_card(tmp_path, config, {"trained_groups": 7} | summary)
    assert path == tmp_path / "README.md"
    text = path.read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_expects(tmp_path):
    front, _ = card_of(tmp_path, make_config(tmp_path, loss={"name": "SWEPO", "params": {}}), {"steps": 24} | RESULT)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["ampo", "ampo_fast", "preference-optimization", "swepo"],
    }


@pytest.mark.parametrize("model", ["/models/mine", "./mine", "mine"])
def test_a_local_directory_is_no_base_model_to_link_to(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    front, body = card_of(tmp_path, make_config(tmp_path, model=model), {"steps": 24})
    assert "base_model" not in front
    assert f"`{model}`" in body


def test_the_card_tells_how_it_was_trained_and_what_came_out(tmp_path):
    (tmp_path / "card").mkdir()
    lines = [
        {"step": 0, "eval/reward": 0.43, "eval/mean_length": 38.85, "eval/kl": 0.0},
        {"step": 12, "reward": 0.5},
        {"step": 24, "eval/reward": 0.53, "eval/mean_length": 30.24, "eval/kl": 0.0463},
        {"step": 36, "eval/reward": 0.60, "eval/mean_length": 9.0, "eval/kl": 9.0},
    ]
    (tmp_path / "card/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, body = card_of(tmp_path, make_config(tmp_path), {"steps": 24} | RESULT)
    for text in (
        "`HuggingFaceTB/SmolLM2-135M-Instruct` trained by Active Multi-Preference Optimization",
        "7 of 96 groups in 24 steps",
        "`opt_select`: 1 positive, k = 3 negatives",
        "`AMPO` with beta = 5",
        "learning rate 5e-06, 4 prompts a step",
        "| seed | 5 |",
        "| mean reward | 0.4292 | 0.5329 |",
        "| tokens per answer | 38.9 | 30.2 |",
        "| KL to the start (nats per token) | 0.0000 | 0.0463 |",
        "Change +0.1037, standard error of the paired difference 0.0257",
        "72 % of the prompts",
        "96 prompts of `train.jsonl`",
        "AutoModelForCausalLM.from_pretrained",
        "arXiv:2502.18293",
        "arXiv:2412.16378",
        f"ampo_fast {ampo_fast.__version__}",
        "Nothing was measured about truthfulness",
    ):
        assert text in body


@pytest.mark.parametrize("summary", [{"steps": 3}, {"steps": 3} | RESULT | {"reward_se": None}])
def test_without_a_measured_result_the_card_says_so(tmp_path, summary):
    _, body = card_of(tmp_path, make_config(tmp_path), summary)
    assert "Nothing was measured on held-out prompts" in body
    assert "None" not in body
    assert "win" not in body


def test_a_run_that_trained_on_nothing_is_not_called_trained(tmp_path):
    _, body = card_of(tmp_path, make_config(tmp_path), {"steps": 3, "trained_groups": 0})
    assert "not trained: none of the 12 groups of 3 steps" in body
    assert "| groups trained on | 0 of 12 |" in body
    assert "trained by" not in body


def test_offline_training_is_not_called_on_policy(tmp_path):
    config = make_config(tmp_path, rollout={"engine": "data"}, reward={"kind": "data"})
    _, body = card_of(tmp_path, config, {"steps": 3, "stopped": "eval.patience"})
    assert "given with the data" in body
    assert "its own answers" not in body
    assert "written anew" not in body
    assert "The run stopped early: eval.patience." in body


def test_rewritten_segments_several_rewards_and_a_fitted_gamma_are_told(tmp_path):
    config = make_config(tmp_path, rollout={"engine": "data", "segment_tokens": 9}, reward={"kind": "data"})
    assert "the same with at most 9 tokens written anew" in card_of(tmp_path, config, {"steps": 3})[1]
    loss = {"name": "MMPO", "params": {"beta": 0.1, "gamma": {"agreement": 0.8}}}
    config = make_config(tmp_path, reward={"kind": ["relevance", "m:f"]}, loss=loss)
    body = card_of(tmp_path, config, {"steps": 3, "gamma": 2.5})[1]
    assert "| reward | `relevance, m:f`, normalised per group: `win_rate` |" in body
    assert "with beta = 0.1, gamma = 2.5 |" in body


def test_every_loss_of_the_package_has_its_paper(tmp_path):
    from ampo_fast import losses

    exempt = {"LossOutput", "ResponseStats", "Sum", "NLL"}
    classes = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)} - exempt
    assert classes <= _LOSS_PAPERS.keys() | {"PlackettLuce"}


def test_versions_say_what_ran(monkeypatch):
    found = versions()
    assert found["ampo_fast"] == ampo_fast.__version__
    assert set(found) >= {"python", "torch", "transformers", "commit", "platform", "num_cpus"}
    monkeypatch.setattr("ampo_fast.model_card._PACKAGES", ("surely-not-installed",))
    assert versions()["surely-not-installed"] is None
    json.dumps(found)
