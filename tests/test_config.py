"""The configuration: what is refused and with which words, overrides, and how large it may grow."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from ampo_fast.config import Config, build_config, field_paths, load_config, parse_overrides, recipe_path
from ampo_fast.config.reading import _TRL
from ampo_fast.reward_model.config import RewardTrainingConfig
from ampo_fast.types import Sampling

MINIMAL = {"data": {"train": "t.jsonl"}, "model": {"path": "m"}}


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "t.jsonl"\n[model]\npath = "m"\n[optim]\nlr = 1e-5\n')
    return str(path)


def test_minimal_config_has_defaults():
    config = build_config(MINIMAL)
    assert (config.rollout.n, config.select.k, config.loss.name) == (8, 7, "AMPO")
    assert config.prompts_per_round == config.optim.prompts_per_step
    assert str(config.run_dir) == "runs/run"


def test_fewer_than_sixty_fields():
    paths = [path for path, _ in field_paths()]
    assert len(paths) == len(set(paths)) < 60


def test_config_is_frozen():
    config = build_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0


def test_importing_the_config_imports_no_torch():
    code = "import sys, ampo_fast.config; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_rollout_section_says_how_the_policy_is_sampled():
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 5}
    rollout = build_config(MINIMAL | {"rollout": asked}).rollout
    assert rollout.sampling(3) == Sampling(**asked, seed=3)
    assert rollout.sampling(3, step=4) == Sampling(**asked, seed=3, step=4)


def test_config_survives_json():
    config = build_config(MINIMAL | {"loss": {"params": {"beta": 1e-3}}, "optim": {"betas": [0.1, 0.2]}})
    assert build_config(json.loads(config.model_dump_json())) == config


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "field", "nearest"),
    [
        ("optim", "learning_rate", r"optim\.lr\?"),
        ("rollout", "num_generations", r"rollout\.n\?"),
        ("loss", "beta", r"loss\.params\.beta\?"),
        ("rollout", "max_completion_length", r"rollout\.max_new_tokens\?"),
        ("optim", "temperature", r"rollout\.temperature\?"),
        ("optim", "lrr", "optim.lr"),
        ("run", "num_train_epochs", r"run\.epochs\?"),
        ("rollout", "temprature", "rollout.temperature"),
        ("select", "stratgy", "select.strategy"),
        ("checkpoint", "keeplast", "checkpoint.keep_last"),
    ],
)
def test_unknown_key_names_the_nearest(section, field, nearest):
    with pytest.raises(ValueError, match=rf"unknown key {section}\.{field}; did you mean {nearest}"):
        build_config(MINIMAL | {section: {field: 1}})


def test_every_name_of_another_trainer_stands_for_a_field():
    names = {path for schema in (Config, RewardTrainingConfig) for path, _ in field_paths(schema, is_full=True)}
    assert {theirs for theirs in _TRL.values() if not theirs.startswith("loss.params.")} <= names


def test_unknown_section_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key optimizer; did you mean optim\?"):
        build_config(MINIMAL | {"optimizer": {}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"n": 4}, "select": {"k": 4}}, r"rollout\.n = 4 .*select\.k = 4.*at least 5"),
        ({"select": {"strategy": "best_worst", "k": 3}}, r"best_worst.*select\.k is 3.*select\.k = 1"),
        ({"rollout": {"prompts_per_round": 12}}, r"rollout\.prompts_per_round = 12 .*optim\.prompts_per_step = 8"),
        ({"rollout": {"engine": "data"}}, r"reward\.kind.*rollout\.engine.*go together"),
        ({"reward": {"kind": "data"}}, r"reward\.kind.*rollout\.engine.*go together"),
        ({"reward": {"kind": ["relevance", "data"]}}, r"reward\.kind.*rollout\.engine.*go together"),
        ({"reward": {"kind": "data:helpfulness"}}, r"reward\.kind.*rollout\.engine.*go together"),
        ({"reward": {"kind": []}}, r"reward\.kind"),
        ({"select": {"pareto": True}}, r"select\.pareto.*'relevance' is one; give a list"),
    ],
)
def test_sections_must_agree(sections, message):
    with pytest.raises(ValueError, match=message):
        build_config(MINIMAL | sections)


@pytest.mark.parametrize("kind", ["data", "data:helpfulness"])
def test_given_ratings_do_not_rate_new_answers(kind):
    with pytest.raises(ValueError, match=rf"eval\.reward = '{kind}': .*answered anew.*name a scorer: relevance"):
        build_config(MINIMAL | {"eval": {"reward": kind}})
    assert build_config(MINIMAL | {"eval": {"reward": "database:judge"}}).eval.reward == "database:judge"


def test_offline_needs_no_n_above_k():
    config = build_config(MINIMAL | {"rollout": {"engine": "data", "n": 2}, "reward": {"kind": "data"}})
    assert config.select.k == 7


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("optim", "lr", 0.0),
        ("optim", "lr", float("nan")),
        ("optim", "lr", "fast"),
        ("rollout", "n", 1),
        ("rollout", "n", 2.5),
        ("rollout", "temperature", 0),
        ("rollout", "top_p", 1.5),
        ("rollout", "engine", "vlm"),
        ("model", "dtype", "float16"),
        ("data", "max_overlong_share", 2),
        ("run", "steps", 0),
        ("run", "trackers", ["mlflow"]),
        ("run", "trackers", "mlflow"),
        ("select", "strategy", "opt_selekt"),
        ("optim", "betas", [1.5, 0.9]),
        ("eval", "samples", 1),
        ("run", "name", ""),
        ("run", "name", ".."),
        ("run", "name", "../x"),
        ("run", "name", "a/b"),
        ("reference", "every", True),
        ("rollout", "max_staleness", False),
        ("optim", "lr", True),
    ],
)
def test_wrong_values_name_the_field_and_the_value(section, field, value):
    sections = MINIMAL | {section: MINIMAL.get(section, {}) | {field: value}}
    with pytest.raises(ValueError, match=rf"{section}\.{field}") as caught:
        build_config(sections)
    shown = value[0] if isinstance(value, list) else value
    assert repr(shown) in str(caught.value)


def test_one_tracker_may_be_named_without_a_list():
    assert build_config(MINIMAL | {"run": {"trackers": "wandb"}}).run.trackers == ("wandb",)


@pytest.mark.parametrize(
    ("epochs", "sections", "steps"),
    [
        (0, {}, 100),
        (1, {}, 3),
        (0.5, {}, 2),
        (
            1,
            {"rollout": {"prompts_per_round": 8, "updates_per_round": 3}},
            8,
        ),  # 10 prompts in rounds of 8, 6 steps each
    ],
)
def test_epochs_are_passes_over_the_prompts(epochs, sections, steps):
    config = build_config(MINIMAL | {"run": {"epochs": epochs}, "optim": {"prompts_per_step": 4}} | sections)
    assert config.with_steps_for(10).run.steps == steps


def test_switches_take_true_and_false():
    assert build_config(MINIMAL | {"select": {"pareto": False}, "optim": {"activation_checkpointing": True}})


def test_missing_required_fields_are_all_named():
    with pytest.raises(ValueError, match=r"(?s)data\.train .*required.*model .*required"):
        build_config({"data": {}})


def test_all_problems_come_in_one_message():
    with pytest.raises(ValueError, match=r"(?s)optim\.lr.*run\.steps|run\.steps.*optim\.lr"):
        build_config(MINIMAL | {"optim": {"lr": -1}, "run": {"steps": -1}})


# --- files and overrides ----------------------------------------------------------------------------------------------


def test_file_and_overrides(toml):
    config = load_config(toml, ["--optim.lr", "2e-6", "--run.name=second", "--loss.params.beta", "5"])
    assert (config.optim.lr, config.run.name, config.loss.params) == (2e-6, "second", {"beta": 5})
    assert load_config(toml).optim.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-1", -1),
        ("true", True),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ('"7"', "7"),
        ("a b", "a b"),
        ("package:x", "package:x"),
        ("", ""),
        ("1 # one", 1),
    ],
)
def test_override_values_are_toml_or_text(text, value):
    assert parse_overrides(["--a.b", text]) == [("a.b", value)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr", "1"], r"expected --section\.field value, got 'optim\.lr'"),
        (["--lr", "1"], r"expected --section\.field value, got '--lr'"),
        (["--optim.lr"], r"--optim\.lr needs a value"),
        (["--optim.lr.x", "1"], r"--optim\.lr\.x: lr is a value, not a section"),
        (["--loss.params", '{"beta": 1}'], r"--loss\.params .*no TOML value .*tables \{beta = 0\.1\}"),
        (["--optim.lrr", "1"], r"did you mean optim\.lr\?"),
    ],
)
def test_wrong_overrides_are_refused(toml, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(toml, overrides)


def test_broken_toml_names_the_file(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[run\n")
    with pytest.raises(ValueError, match=r"broken\.toml: .*line 1"):
        load_config(str(path))


def test_a_context_that_the_response_alone_fills_is_refused():
    minimal = {"data": {"train": "t.jsonl"}, "model": {"path": "m"}}
    rollout = {"engine": "vllm-server", "max_new_tokens": 512, "options": {"max_model_len": 512}}
    with pytest.raises(ValueError, match=r"rollout\.options\.max_model_len = 512 .*rollout\.max_new_tokens = 512"):
        build_config(minimal | {"rollout": rollout})
    build_config(minimal | {"rollout": rollout | {"options": {"max_model_len": 513}}})
    build_config(minimal | {"rollout": rollout | {"options": {"max_model_len": 0}}})


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match=r"no config file or recipe 'nope'; recipes: .*quickstart"):
        recipe_path("nope")
    with pytest.raises(ValueError, match=r"config file nope\.toml does not exist"):
        recipe_path("nope.toml")


def test_shipped_recipes_are_valid():
    for path in recipe_path("quickstart").parent.glob("*.toml"):
        schema = RewardTrainingConfig if path.stem.startswith("reward") else Config
        assert load_config(path.stem, schema=schema).run.name


def test_another_schema_has_the_same_manners():
    minimal = {"data": {"train": "t.jsonl"}, "model": {"path": "m"}}
    config = build_config(minimal, schema=RewardTrainingConfig)
    assert (config.run.epochs, config.optim.prompts_per_step, config.loss.name) == (3, 16, "BradleyTerry")
    with pytest.raises(ValueError, match=r"unknown key eval\.patienc; did you mean eval\.patience\?"):
        build_config(minimal | {"eval": {"patienc": 1}}, schema=RewardTrainingConfig)
    with pytest.raises(ValueError, match=r"micro_batch_tokens = 256 .*data\.max_tokens = 512"):
        build_config(minimal | {"optim": {"micro_batch_tokens": 256}}, schema=RewardTrainingConfig)


def test_a_home_directory_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    assert str(build_config(MINIMAL | {"run": {"dir": "~/runs"}}).run_dir) == "/home/anna/runs/run"
