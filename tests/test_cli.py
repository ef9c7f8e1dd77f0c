"""The command line: what it answers, how it fails, and that help costs no heavy import."""

import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from ampo_fast import __version__, cli
from ampo_fast.config import field_paths, load_config
from ampo_fast.stage_files import row_from_selected, write_rows_atomic
from ampo_fast.types import Candidate, CandidateGroup, Prompt, ScoredGroup, SelectedGroup

HEAVY = ("torch", "transformers", "numpy", "pydantic", "rich", "datasets", "pyarrow")


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "t.jsonl"\n[model]\npath = "m"\n[loss.params]\nbeta = 10.0\n')
    return str(path)


@pytest.fixture
def trained(monkeypatch):
    """ampo_fast.trainer and ampo_fast.preview replaced; what they were called with."""
    calls = []

    def train(config, resume):
        calls.append(("train", config, resume))
        print("chatter of a library")
        return {"run_dir": "runs/x", "reward_after": 0.5}

    trainer = types.ModuleType("ampo_fast.trainer")
    trainer.train = train
    preview = types.ModuleType("ampo_fast.preview")
    preview.dry_run = lambda config: calls.append(("dry_run", config))
    monkeypatch.setitem(sys.modules, "ampo_fast.trainer", trainer)
    monkeypatch.setitem(sys.modules, "ampo_fast.preview", preview)
    monkeypatch.delenv("AMPO_FAST_DEBUG", raising=False)
    return calls


def exit_status(*arguments):
    """main's status, also where argparse exits itself."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


# --- help -------------------------------------------------------------------------------------------------------------


def imported_by(*arguments):
    code = (
        "import sys\nfrom ampo_fast import cli\n"
        f"try: cli.main({list(arguments)!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("score", "--help"), ("inspect", "--help")])
def test_help_imports_nothing_heavy(arguments):
    assert imported_by(*arguments)[-1] == "[]"


def test_train_help_lists_every_field_without_torch():
    lines = imported_by("train", "--help")
    assert lines[-1] == "['pydantic']"
    text = "\n".join(lines)
    common = dict(field_paths())
    listed = [*common, *(path for path, _ in field_paths(is_full=True) if path not in common)]
    assert [line.split()[0] for line in lines if line.startswith("  --") and "." in line.split()[0]] == [
        f"--{path}" for path in listed
    ]
    assert {"select.pareto", "model.lora.rank", "rollout.segment_tokens"} <= set(listed[len(common) :])
    for path, info in field_paths(is_full=True):
        (line,) = [line for line in lines if line.startswith(f"  --{path} ")]
        assert (info.description or "") in line
    assert "[required] JSONL, JSON, Parquet, CSV or TSV file" in text
    assert "--optim.lr                   [1e-06]" in text
    assert "One of bottom_k, coreset, k_center" in text


def test_version(capsys):
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"ampo-fast {__version__}\n"


def test_no_command_is_an_error(capsys):
    assert exit_status() == 2
    assert "COMMAND" in capsys.readouterr().err


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "own", "overrides"),
    [
        (["train", "c", "--optim.lr", "1e-6"], ["train", "c"], ["--optim.lr", "1e-6"]),
        (["train", "--optim.lr", "1e-6", "c", "--dry-run"], ["train", "c", "--dry-run"], ["--optim.lr", "1e-6"]),
        (["train", "c", "--run.name=a b", "--resume", "auto"], ["train", "c", "--resume", "auto"], ["--run.name=a b"]),
        (["train", "c", "--run.seed", "-1"], ["train", "c"], ["--run.seed", "-1"]),
        (["score", "c.toml", "--input=a.jsonl", "--output", "b.jsonl"], None, []),
        (["train", "c", "--run.seed"], ["train", "c"], ["--run.seed"]),
    ],
)
def test_overrides_are_told_from_options(arguments, own, overrides):
    assert cli.split_overrides(arguments) == (own or arguments, overrides)


def test_overrides_reach_the_config_from_anywhere(toml, trained):
    arguments = ["train", "--run.seed", "-1", toml, "--loss.params.gamma=2.5", "--select.k", "3"]
    assert cli.main(arguments) == 0
    config = trained[0][1]
    assert (config.run.seed, config.select.k, config.loss.params) == (-1, 3, {"beta": 10.0, "gamma": 2.5})


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--learning_rate", "1e-5"], "did you mean --optim.lr?"),
        (["--steps=3"], "did you mean --run.steps?"),
    ],
)
def test_an_option_without_a_section_names_the_field(toml, trained, capsys, arguments, hint):
    assert exit_status("train", str(toml), *arguments) == 2
    assert hint in capsys.readouterr().err


def test_override_where_no_config_is_read_is_an_error(tmp_path, capsys):
    assert exit_status("inspect", "x.jsonl", "--select.k", "3") == 2
    assert "unrecognized arguments: --select.k 3" in capsys.readouterr().err


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "resume"), [([], False), (["--resume", "auto"], True), (["--resume", "never"], False)]
)
def test_train_prints_the_summary_as_the_last_line(toml, trained, capsys, extra, resume):
    assert cli.main(["train", toml, *extra]) == 0
    (name, config, got) = trained[0]
    assert (name, config, got) == ("train", load_config(toml), resume)
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"run_dir": "runs/x", "reward_after": 0.5}


def test_dry_run_does_not_train(toml, trained):
    assert cli.main(["train", toml, "--dry-run"]) == 0
    assert [call[0] for call in trained] == ["dry_run"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--optim.lr", "3e-7", "--optim.betas", "[0.8, 0.99]", "--run.dir", 'a/"b" ü', "--run.trackers", "[]"],
        ["--eval.max_kl", "0.25", "--data.eval", "e.jsonl", "--loss.params.split", "best"],
    ],
)
def test_printed_config_reads_back_equal(toml, tmp_path, capsys, overrides):
    assert cli.main(["train", toml, "--print-config", *overrides]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(printed)
    assert load_config(str(again)) == load_config(toml, overrides)
    assert set(tomllib.loads(printed)) >= {"run", "data", "model", "rollout", "select", "loss", "optim"}


def test_every_recipe_that_ships_prints_its_config(capsys):
    recipes = sorted(path.stem for path in (Path(cli.__file__).parent / "recipes").glob("*.toml"))
    assert "quickstart" in recipes
    for name in recipes:
        command = "train-reward" if name.startswith("reward") else "train"
        assert cli.main([command, name, "--print-config"]) == 0
        assert name in exit_help(capsys, command)


def exit_help(capsys, command="train"):
    capsys.readouterr()
    exit_status(command, "--help")
    return capsys.readouterr().out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no.toml"], "error: config file no.toml does not exist"),
        (["train", "quikstart"], "error: no config file or recipe 'quikstart'; recipes: "),
        (["train", "quickstart", "--optim.lrr", "1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["train", "quickstart", "--run.seed"], "error: --run.seed needs a value"),
        (["inspect", "no.jsonl"], "error: no.jsonl does not exist"),
        (["report", "."], "error: . is not a run directory"),
    ],
)
def test_users_mistakes_are_one_line_and_status_2(arguments, message, capsys, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert trained == []


def test_a_reward_model_is_not_trained_by_several_processes_at_once(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train-reward", "reward"]) == 2
    assert capsys.readouterr().err == "error: train-reward runs in one process: start it without torchrun\n"


def test_several_mistakes_are_all_named(toml, capsys):
    assert cli.main(["train", toml, "--optim.lr", "-1", "--run.steps", "0"]) == 2
    error = capsys.readouterr().err
    assert "optim.lr = -1" in error
    assert "run.steps = 0" in error


@pytest.mark.parametrize("kind", [ValueError, ImportError, FileNotFoundError, OSError])
def test_errors_of_a_run_are_one_line_unless_debugging(toml, trained, capsys, monkeypatch, kind):
    def train(config, resume):
        raise kind("no space left")

    sys.modules["ampo_fast.trainer"].train = train
    assert cli.main(["train", toml]) == 2
    assert capsys.readouterr().err == "error: no space left\n"
    monkeypatch.setenv("AMPO_FAST_DEBUG", "1")
    with pytest.raises(kind, match="no space left"):
        cli.main(["train", toml])


def test_a_bug_of_ours_is_not_hidden(toml, trained):
    def train(config, resume):
        raise KeyError("ours")

    sys.modules["ampo_fast.trainer"].train = train
    with pytest.raises(KeyError, match="ours"):
        cli.main(["train", toml])


def test_ctrl_c_says_how_to_go_on(toml, trained, capsys):
    def train(config, resume):
        raise KeyboardInterrupt

    sys.modules["ampo_fast.trainer"].train = train
    assert cli.main(["train", toml]) == 130
    assert capsys.readouterr().err == "interrupted; --resume auto goes on\n"


# --- stages and report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["generate", "score", "embed", "select"])
def test_stage_gets_config_input_and_output(stage, toml, capsys, monkeypatch):
    calls = []
    fake = types.ModuleType("ampo_fast.stages")
    setattr(fake, stage, lambda *arguments: calls.append(arguments) or 7)
    monkeypatch.setitem(sys.modules, "ampo_fast.stages", fake)
    monkeypatch.setattr("ampo_fast.stages", fake, raising=False)
    assert cli.main([stage, toml, "--input", "a.jsonl", "--output", "out/b.jsonl", "--select.k", "2"]) == 0
    ((config, source, output),) = calls
    assert config.select.k == 2
    assert (str(source), output) == ("a.jsonl", Path("out/b.jsonl"))
    assert json.loads(capsys.readouterr().out) == {"output": "out/b.jsonl", "rows_added": 7}


def test_only_generate_may_leave_the_input_out(toml, capsys):
    assert exit_status("score", toml, "--output", "b.jsonl") == 2
    assert "--input" in capsys.readouterr().err


def test_report_prints_the_path(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    fake = types.ModuleType("ampo_fast.report")
    fake.write_report = lambda run_dir: run_dir / "report.html"
    monkeypatch.setitem(sys.modules, "ampo_fast.report", fake)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage_file(tmp_path):
    import torch

    nan = float("nan")
    texts = ["low", "best\x1b[2J [bold]of[/bold] all", "low", "", "middle"]
    candidates = tuple(
        Candidate(content=text, token_ids=(1,) * (i + 1), finish_reason="length" if i == 4 else "stop")
        for i, text in enumerate(texts)
    )
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    rows = []
    for prompt_id in ("one", "two"):
        group = CandidateGroup(prompt=Prompt(id=prompt_id, messages=messages), prompt_ids=(1,), candidates=candidates)
        raw = (0.25, 0.75, 0.25, nan, 0.5)
        scored = ScoredGroup(
            group=group, reward_raw=raw, reward=raw, valid=(True, True, False, False, True), embedding=torch.eye(5)
        )
        rows.append(row_from_selected(SelectedGroup(scored=scored, positive=(1,), negative=(0,), cost=1.5)))
    path = tmp_path / "rows.jsonl"
    write_rows_atomic(path, rows)
    return path


def test_inspect_shows_candidates_by_falling_reward(stage_file, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["inspect", str(stage_file), "--limit", "1"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        "one",
        "system: Be brief.",
        "user: Why?",
        "5 candidates, 4 distinct, 1 cut by the length limit, reward 0.2500 to 0.7500, coverage cost 1.5000",
    ]
    assert lines[4] == "reward tokens end note response"
    assert lines[5:10] == [
        "+ 0.7500 2 stop best\\x1b[2J [bold]of[/bold] all",
        "0.5000 5 length middle",
        "- 0.2500 1 stop low",
        "0.2500 3 stop duplicate low",
        "4 stop empty",
    ]
    assert lines[-1] == "(1 more prompts; --limit 2 shows all)"


def test_inspect_counts_no_tokens_of_answers_that_were_not_tokenized(tmp_path, capsys):
    path = tmp_path / "given.jsonl"
    response = {"content": "Four.", "token_ids": [], "finish_reason": "stop", "reward_raw": 1.0}
    path.write_text(json.dumps({"id": "a", "prompt": [{"role": "user", "content": "2+2?"}], "responses": [response]}))
    assert cli.main(["inspect", str(path)]) == 0
    assert " ".join(capsys.readouterr().out.splitlines()[4].split()) == "1.0000 stop Four."


def test_inspect_one_id(stage_file, capsys):
    assert cli.main(["inspect", str(stage_file), "--id", "two"]) == 0
    assert capsys.readouterr().out.splitlines()[0].strip() == "two"
    assert cli.main(["inspect", str(stage_file), "--id", "three"]) == 2
    assert "has no prompt with id 'three'" in capsys.readouterr().err


def test_inspect_refuses_a_negative_limit(stage_file, capsys):
    assert exit_status("inspect", str(stage_file), "--limit", "-1") == 2


def test_closed_pipe_is_silent(stage_file):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ampo_fast.cli", "inspect", str(stage_file)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
