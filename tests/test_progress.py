"""Progress: phase seconds are right, plain output is plain, the terminal shows everything."""

import io
import sys

import pytest

from ampo_fast.progress import TrainingProgress


class Clock:
    """A clock that moves only when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _step(progress, clock, **seconds):
    for name, s in seconds.items():
        with progress.phase(name):
            clock.now += s


def test_phase_seconds_add_up_within_a_step_and_start_anew_after_it():
    clock, stream = Clock(), io.StringIO()
    with TrainingProgress(3, stream=stream, clock=clock) as progress:
        _step(progress, clock, generate=3.0, score=1.0)
        _step(progress, clock, generate=2.0)
        assert progress.phase_s == pytest.approx({"generate": 5.0, "score": 1.0})
        progress.step_done(1, {})
        assert progress.phase_s == {}
        _step(progress, clock, score=4.0)
        assert progress.phase_s == pytest.approx({"score": 4.0})
        assert progress.shares() == pytest.approx({"generate": 0.5, "score": 0.5})


def test_seconds_are_counted_when_a_phase_fails_and_the_error_is_not_swallowed():
    clock = Clock()
    progress = TrainingProgress(1, stream=io.StringIO(), clock=clock)

    def fail():
        with progress, progress.phase("score"):
            clock.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert progress.phase_s == pytest.approx({"score": 2.0})


def test_an_inner_phase_belongs_to_the_outer_one():
    clock = Clock()
    with TrainingProgress(1, stream=io.StringIO(), clock=clock) as progress:
        with progress.phase("eval"):
            _step(progress, clock, generate=2.0)
            clock.now += 1.0
        assert progress.phase_s == pytest.approx({"eval": 3.0})


def test_plain_output_is_one_line_per_step_without_control_characters(capsys):
    clock = Clock()
    with TrainingProgress(4, start_step=1, clock=clock) as progress:
        _step(progress, clock, generate=3.0, score=1.0)
        progress.step_done(
            2, {"reward": 0.25, "loss": 0.5, "group/trained": 0, "group/count": 2, "perf/tokens_per_second": 1234.4}
        )
        progress.note("saved checkpoint")
        _step(progress, clock, generate=2.0)
        progress.step_done(3, {"reward": 0.5})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 2/4  reward 0.2500  loss 0.5000  trained 0/2  1,234 tokens/s  4.0 s (generate 75%, score 25%)  eta 0:08",
        "saved checkpoint",
        "step 3/4  reward 0.5000  2.0 s (generate 100%)  eta 0:03",
    ]
    assert captured.err.replace("\n", "").isprintable()


def test_force_color_does_not_bring_control_characters_into_a_log(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with TrainingProgress(1) as progress:
        progress.step_done(1, {"reward": 1.0})
    assert "\x1b" not in capsys.readouterr().err


def test_evaluation_time_is_not_part_of_the_time_left():
    clock = Clock()
    with TrainingProgress(3, stream=io.StringIO(), clock=clock) as progress:
        assert progress.eta_s() is None
        _step(progress, clock, eval=60.0, generate=2.0)
        progress.step_done(1, {})
        assert progress.eta_s() == pytest.approx(4.0)


def test_other_work_names_its_unit_and_prints_at_most_once_per_interval():
    clock, stream = Clock(), io.StringIO()
    with TrainingProgress(5, unit="prompt", plain_interval_s=10.0, stream=stream, clock=clock) as progress:
        for done in range(1, 6):
            clock.now += 4.0
            progress.step_done(done, {})
    assert stream.getvalue().splitlines() == ["prompt 1/5", "prompt 4/5", "prompt 5/5"]


def test_the_terminal_shows_phase_with_count_shares_numbers_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    clock, stream = Clock(), Terminal()
    with TrainingProgress(10, stream=stream, clock=clock) as progress:
        _step(progress, clock, generate=3.0, score=1.0)
        progress.step_done(1, {"reward": 0.25, "loss": 0.5, "perf/tokens_per_second": 99.0})
        progress.note("[brackets] stay")
        with progress.phase("pack", total=8):
            progress.advance(3)
            progress._live.refresh()
    shown = stream.getvalue()
    wanted = ("step 1/10", "pack 3/8", "generate 75%", "score 25%", "reward 0.2500", "loss 0.5000")
    for text in (*wanted, "99 tokens/s", "eta 0:36", "[brackets] stay", "\x1b["):
        assert text in shown
