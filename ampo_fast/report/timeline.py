"""Who did what when: the trainer's phases above the rounds that were sampled ahead, on one axis of time."""

from __future__ import annotations

from ampo_fast.report.run_data import Row, RunData
from ampo_fast.report.section import GREY, SERIES_COLORS, Chart, figure
from ampo_fast.trace import TRACE_FILE, Span, overlap, read_spans

_NUM_ROUNDS = 6
"""The newest rounds that are drawn: more would be too thin to see."""


def timeline_charts(run: RunData) -> list[Chart]:
    """The picture of the newest rounds; none where nothing was sampled ahead."""
    spans = read_spans(run.dir / TRACE_FILE)
    measured = overlap(spans)
    if measured is None:
        return []
    note = (
        f"Over {measured.num_rounds} rounds, sampling one took {measured.generate_s:.1f} s, training on one "
        f"{measured.train_s:.1f} s (mean), and both together {measured.wall_s:.1f} s: "
        f"{measured.wall_s / measured.bound_s:.2f} times the longer of the two. Grey: the trainer waits for answers."
    )
    shown = _newest(spans)
    return [Chart(title="Sampling beside training", figure=_figure(shown), note=note, is_wide=True)]


def _newest(spans: list[Span]) -> list[Span]:
    begins = [span["start"] for span in spans if span["lane"] == "rollouts"][-_NUM_ROUNDS:]
    return [span for span in spans if span["end"] > begins[0]]


def _figure(spans: list[Span]) -> Row:
    zero = min(span["start"] for span in spans)
    names = list(dict.fromkeys(_phase(span) for span in spans))
    colors = dict(zip(names, SERIES_COLORS * len(names), strict=False)) | {"wait": GREY}
    bars = []
    for name in names:
        own = [span for span in spans if _phase(span) == name]
        bars.append(
            {
                "type": "bar", "orientation": "h", "name": name, "marker": {"color": colors[name]},
                "y": [span["lane"] for span in own],
                "base": [round(span["start"] - zero, 3) for span in own],
                "x": [round(span["end"] - span["start"], 3) for span in own],
                "text": [span["name"] for span in own], "textposition": "none", "hovertemplate": "%{text}: %{x:.2f} s",
            }
        )  # fmt: skip
    return figure(bars, x_title="seconds", barmode="overlay", hovermode="closest", height=220)


def _phase(span: Span) -> str:
    if span["lane"] == "rollouts":
        return "generate"
    return "wait" if span["name"] == "generate" else span["name"]
