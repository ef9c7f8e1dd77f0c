"""Where a model is looked for: a directory, a wheel, or the hub."""

import pytest
from builders import config

from ampo_fast.assets import resolve_model
from ampo_fast.evaluate import implicit_rewards
from ampo_fast.rewards import make_reward


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)


@pytest.mark.parametrize(
    "path", ["runs/none", "runs/first/final", "no/such/final", "./none", "/no/where", "~/none", ""]
)
def test_a_path_that_is_no_directory_does_not_exist(path):
    with pytest.raises(ValueError, match=f"^model.path = '{path}' does not exist$"):
        resolve_model(path, "model.path")


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_what_may_be_a_hub_name_is_left_to_the_hub(name):
    assert resolve_model(name, "model.path") == name


def test_a_directory_without_a_model_is_named():
    with pytest.raises(ValueError, match=r"^model.path = 'runs/empty' is not a model directory"):
        resolve_model("runs/empty", "model.path")


def test_a_classifier_that_does_not_exist_is_named_by_its_field():
    with pytest.raises(ValueError, match=r"^the classifier of reward.kind = 'runs/first/final' does not exist$"):
        make_reward(config(reward={"kind": "classifier:runs/first/final"}))
    with pytest.raises(
        ValueError, match=r"^the classifier of eval.reward = 'org/name' is no directory here, and as a hub's"
    ):
        make_reward(config(), kind="classifier:org/name")


def test_models_that_are_compared_are_named_by_their_options(tiny_model):
    with pytest.raises(ValueError, match=r"^--policy = 'runs/none' does not exist"):
        implicit_rewards("runs/none", str(tiny_model), 0.1, [])
    with pytest.raises(ValueError, match=r"^--reference = 'runs/empty' is not a model directory"):
        implicit_rewards(str(tiny_model), "runs/empty", 0.1, [])


def test_a_home_directory_is_one(tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert resolve_model(f"~/{tiny_model.name}", "model.path") == str(tiny_model)
