"""What a trace says of two lanes of work, and what it makes of a torn one."""

import pytest

from ampo_fast.report.timeline import timeline_charts
from ampo_fast.trace import TRACE_FILE, Trace, overlap, read_spans


def write(path, spans):
    trace = Trace(path)
    for lane, name, start, end in spans:
        trace.add(lane, name, start, end)


ROUNDS = [
    ("rollouts", "generate round 2", 0.0, 6.0), ("trainer", "forward_backward", 0.0, 4.0), ("trainer", "generate", 4.0, 6.0),
    ("trainer", "sync", 6.0, 7.0), ("rollouts", "generate round 3", 7.0, 9.0), ("trainer", "forward_backward", 7.0, 15.0),
    ("trainer", "sync", 15.0, 16.0), ("rollouts", "generate round 4", 16.0, 18.0),
]  # fmt: skip


def test_a_round_lasts_from_one_begin_of_sampling_to_the_next(tmp_path):
    write(tmp_path / "t", ROUNDS)
    found = overlap(read_spans(tmp_path / "t"))
    assert (found.num_rounds, found.wall_s, found.generate_s, found.train_s) == (2, 8.0, 4.0, 7.0)
    assert found.bound_s == (6 + 9) / 2


def test_one_round_tells_nothing_and_neither_does_no_trace(tmp_path):
    write(tmp_path / "t", ROUNDS[:4])
    assert overlap(read_spans(tmp_path / "t")) is None
    assert read_spans(tmp_path / "none") == []
    Trace(None).add("trainer", "sync", 0.0, 1.0)


def test_a_torn_line_costs_only_itself(tmp_path):
    write(tmp_path / "t", ROUNDS)
    with (tmp_path / "t").open("a") as file:
        file.write('[1]\n{"lane": "trainer", "na')
    assert len(read_spans(tmp_path / "t")) == len(ROUNDS)


class Run:
    def __init__(self, folder):
        self.dir = folder


def test_the_picture_has_both_lanes_and_says_how_long_a_round_took(tmp_path):
    assert timeline_charts(Run(tmp_path)) == []
    write(tmp_path / TRACE_FILE, ROUNDS)
    (chart,) = timeline_charts(Run(tmp_path))
    assert "8.0 s: 1.07 times the longer" in chart.note
    bars = {bar["name"]: bar for bar in chart.figure["data"]}
    assert bars["generate"]["y"] == ["rollouts"] * 3
    assert bars["generate"]["base"] == [0.0, 7.0, 16.0]
    assert bars["wait"]["x"] == [pytest.approx(2.0)]
    assert set(bars["sync"]["y"]) == {"trainer"}
