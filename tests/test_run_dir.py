"""The run directory: whose it is, which settings and data may change, and what a start that was killed leaves."""

import fcntl
import os
from dataclasses import replace

import pytest
from builders import config, prompt

from ampo_fast.config import Config, field_paths
from ampo_fast.reward_model.config import RewardTrainingConfig
from ampo_fast.run_dir import _FREE, _ROUNDING, keep_data, open_run_dir, run_closed
from ampo_fast.types import GivenResponse

GIVEN = (GivenResponse(content="yes", reward=1.0, scores={"help": 4.0}), GivenResponse(content="no", reward=0.0))


def begun(tmp_path):
    prompts = [replace(prompt(i), responses=GIVEN) for i in range(3)]
    keep_data(tmp_path, {"data.train": prompts, "data.eval": prompts[:1]})
    return prompts


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [rows[1], rows[0], rows[2]],
        lambda rows: [*rows, prompt(3)],
        lambda rows: [rows[0], prompt(1, "goodbye?"), rows[2]],
        lambda rows: [replace(rows[0], id="other"), *rows[1:]],
        lambda rows: [replace(rows[0], responses=(replace(GIVEN[0], reward=0.0), GIVEN[1])), *rows[1:]],
        lambda rows: [replace(rows[0], responses=(replace(GIVEN[0], content="yes!"), GIVEN[1])), *rows[1:]],
        lambda rows: [replace(rows[0], responses=(replace(GIVEN[0], scores={"help": 1.0}), GIVEN[1])), *rows[1:]],
    ],
    ids=["order", "more", "text", "id", "reward", "response", "score"],
)
def test_other_data_is_refused_on_resume_by_its_field(tmp_path, change):
    prompts = begun(tmp_path)
    with pytest.raises(ValueError, match=r"data\.train gives other .*--run\.name"):
        keep_data(tmp_path, {"data.train": change(prompts), "data.eval": prompts[:1]})
    with pytest.raises(ValueError, match=r"data\.eval gives other"):
        keep_data(tmp_path, {"data.train": prompts, "data.eval": change(prompts)})
    begun(tmp_path)


def test_how_many_prompts_there_were_is_said(tmp_path):
    prompts = begun(tmp_path)
    with pytest.raises(ValueError, match=r"\(3 prompts then, 2 now\)"):
        keep_data(tmp_path, {"data.train": prompts[:2], "data.eval": prompts[:1]})


def settings(tmp_path, **sections):
    return config(run={"dir": str(tmp_path), "name": "r"}, **sections)


def test_the_fields_that_may_change_are_fields():
    schemas = (Config, RewardTrainingConfig)
    names = {name for schema in schemas for name, _ in field_paths(schema, is_full=True)} | set(Config.model_fields)
    assert set(_FREE) | set(_ROUNDING) <= names
    assert not set(_FREE) & set(_ROUNDING)


def test_what_changes_rounding_at_most_may_change_on_resume_and_is_said(tmp_path, caplog):
    open_run_dir(settings(tmp_path), resume=False)
    other = settings(
        tmp_path,
        optim={"micro_batch_tokens": 512, "activation_checkpointing": True},
        rollout={"options": {"replicas": 2}, "batch_rows": 8},
    )
    assert open_run_dir(other, resume=True) == tmp_path / "r"
    (record,) = caplog.records
    for said in ("micro_batch_tokens: 4096 -> 512", "rollout.options.replicas: None -> 2", "within rounding"):
        assert said in record.getMessage()


def test_who_watches_and_how_long_changes_without_a_word(tmp_path, caplog):
    open_run_dir(settings(tmp_path), resume=False)
    open_run_dir(settings(tmp_path, checkpoint={"keep_last": 5}, eval={"patience": 3, "every": 5}), resume=True)
    assert not caplog.records


@pytest.mark.parametrize("field", ["optim.lr", "rollout.n", "eval.prompts", "model.dtype", "loss.name"])
def test_what_is_computed_may_not_change(tmp_path, field):
    open_run_dir(settings(tmp_path), resume=False)
    section, name = field.split(".")
    value = {"optim.lr": 0.5, "rollout.n": 16, "model.dtype": "bfloat16", "loss.name": "DPO"}.get(field, 3)
    changed = settings(tmp_path, **{section: {name: value}}, checkpoint={"every": 7})
    with pytest.raises(ValueError, match=rf"{field}: .*another --run.name"):
        open_run_dir(changed, resume=True)


def test_a_run_that_is_open_is_not_resumed_and_its_holder_named(tmp_path):
    with run_closed(settings(tmp_path)):
        path = open_run_dir(settings(tmp_path), resume=False)
        assert (path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with (path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.write("process 7 on there")
        other.flush()
        with pytest.raises(ValueError, match=r"r is in use by process 7 on there.*--run\.name"):
            open_run_dir(settings(tmp_path), resume=True)
    open_run_dir(settings(tmp_path), resume=True)


def test_a_start_that_was_killed_strands_nothing_and_other_files_are_left_alone(tmp_path):
    path = tmp_path / "r"
    (path / "rollouts").mkdir(parents=True)
    for name in (".lock", ".config.json.tmp", "config.json.tmp"):
        (path / name).touch()
    assert open_run_dir(settings(tmp_path), resume=True) == path
    assert (path / "config.json").stat().st_size
    (path / "config.json").unlink()
    (path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not a run directory"):
        open_run_dir(settings(tmp_path), resume=False)


def test_an_empty_config_is_named(tmp_path):
    path = open_run_dir(settings(tmp_path), resume=False)
    (path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"r/config\.json cannot be read.*--run\.name"):
        open_run_dir(settings(tmp_path), resume=True)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    if os.geteuid():
        tmp_path.chmod(0o500)
    else:  # nothing is refused to root
        monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(PermissionError, match=f"{tmp_path}/r"):
        open_run_dir(settings(tmp_path), resume=False)
