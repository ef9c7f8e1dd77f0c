"""metrics.jsonl survives kills and resumes; trackers are loaded only when asked for."""

import json
import math
import subprocess
import sys
import types

import pytest

from ampo_fast.evaluation_summary import num_unscored, paired_summary
from ampo_fast.metrics import MetricsLog, read_metrics, scan_metrics


def test_lines_are_readable_at_once_and_non_finite_numbers_are_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": math.nan, "reward": 0.1, "group/trained": 3, "grad_norm": math.inf})
        # Read before close: the line must be on disk when log returns.
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 1, "loss": None, "reward": 0.1, "group/trained": 3, "grad_norm": None}
        ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resume_leaves_the_file_of_a_run_that_was_never_stopped(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run_dir in (whole, killed):
        run_dir.mkdir()
        with MetricsLog(run_dir) as log:
            for step in range(1, 5):
                log.log(step, {"loss": 1 / step, "reward": 0.1 * step})
    with (killed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "loss": 0.\xc3')
    with MetricsLog(killed, resume_step=2) as log:
        for step in (3, 4):
            log.log(step, {"loss": 1 / step, "reward": 0.1 * step})
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in killed.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped_even_when_its_step_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "ev')
    MetricsLog(tmp_path, resume_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_broken_middle_line_is_named_and_the_rest_is_still_readable(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    rows, problems = scan_metrics(path)
    assert [row["step"] for row in rows] == [1, 3]
    assert len(problems) == 1


def test_existing_metrics_are_never_overwritten_or_appended_to_silently(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"run\.name"):
        MetricsLog(tmp_path)


def test_resuming_before_the_first_line_works(tmp_path):
    with MetricsLog(tmp_path, resume_step=0) as log:
        log.log(1, {"loss": 1.0})
    MetricsLog(tmp_path, resume_step=-1).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_an_unknown_tracker_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="mlflow"):
        MetricsLog(tmp_path, ["mlflow"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        MetricsLog(tmp_path, [name])


def test_tensorboard_events_hold_the_numbers_and_resume_purges_later_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": float(step), "reward": math.nan})
    with MetricsLog(tmp_path, ["tensorboard"], resume_step=1) as log:
        log.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert events.Tags()["scalars"] == ["loss"]


def test_wandb_gets_the_numbers_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, metrics, step):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append((options["id"], options["resume"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricsLog(tmp_path, ["wandb"]) as log:
        log.log(1, {"loss": 1.0, "reward": math.nan})
    MetricsLog(tmp_path, ["wandb"], resume_step=1).close()
    assert calls == [(None, None), (1, {"loss": 1.0}), "finish", ("abc", "allow"), "finish"]


def test_importing_metrics_loads_neither_torch_nor_wandb(run_python):
    loaded = run_python(
        "import sys, json, ampo_fast.metrics, ampo_fast.evaluation_summary;"
        "print(json.dumps(sorted({'torch', 'wandb', 'tensorboard'} & set(sys.modules))))"
    )
    assert json.loads(loaded) == []


@pytest.fixture
def run_python():
    def run(code: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


def _rows(rewards_by_id):
    return [
        {"id": key, "responses": [{"content": "", "reward_raw": r} for r in rewards]}
        for key, rewards in rewards_by_id.items()
    ]


def test_paired_summary_by_hand():
    before = _rows({"a": [0.0, 0.2], "b": [0.5, 0.5], "c": [0.4, 0.2]})
    after = _rows({"c": [0.2, 0.2], "a": [0.4, 0.4], "b": [0.5, 0.5]})
    summary = paired_summary(before, after)
    # Differences: a +0.3, b 0, c -0.1. Mean 1/15; variance (n - 1) = 13/300; SE = sqrt(13/900).
    assert summary == pytest.approx(
        {
            "reward_before": 0.9 / 3,
            "reward_after": 1.1 / 3,
            "reward_se": math.sqrt(13) / 30,
            "win_rate": 0.5,
            "num_prompts": 3,
        }
    )


def test_prompts_without_a_reward_on_both_sides_are_left_out_of_both_means():
    before = _rows({"a": [0.0, 1.0], "b": [None, math.nan], "only": [9.0, 9.0]})
    after = _rows({"a": [1.0, None], "b": [5.0, 5.0]})
    summary = paired_summary(before, after)
    assert (summary["reward_before"], summary["reward_after"]) == (0.5, 1.0)
    assert (summary["num_prompts"], summary["win_rate"]) == (1, 1.0)
    assert summary["reward_se"] is None
    assert num_unscored(before) == 2


def test_paired_summary_refuses_what_cannot_be_paired():
    with pytest.raises(ValueError, match="no prompt has"):
        paired_summary(_rows({"a": [1.0]}), _rows({"b": [1.0]}))
    with pytest.raises(ValueError, match="twice"):
        paired_summary(_rows({"a": [1.0]}) * 2, _rows({"a": [1.0]}))
