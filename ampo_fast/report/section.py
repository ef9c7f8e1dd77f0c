"""The parts of the page: a section holds text, charts and tables, or the sentence that says why it is empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ampo_fast.report.run_data import Row

BLUE, ORANGE, GREEN, GREY, INK = "#2f6db5", "#d9772b", "#2a8f6a", "#aab4be", "#22313f"
SERIES_COLORS = (BLUE, ORANGE, GREEN, "#8e5bb5", "#c2a83e", "#5aa7b8", "#a35555", "#777f87")

MAX_POINTS = 400
"""A longer curve is drawn as means over equal bins of steps: a browser does not have to draw 100 000 of them."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    figure: dict[str, Any]
    """{"data": [...], "layout": {...}} of plotly.js."""
    note: str = ""
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    id: str
    title: str
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    maps: Sequence[dict[str, Any]] = ()
    """Steps {name, views: [{name, figure}]} to choose one map from."""
    pairs: Sequence[dict[str, Any]] = ()
    """{prompt, before, after}: answers side by side."""
    groups: Sequence[dict[str, Any]] = ()
    """{prompt, skip_reason, cost, answers}: one table each."""
    absent: str = ""
    """Why there is nothing to show."""


def figure(traces: Iterable[Row], *, y_title: str = "", x_title: str = "step", **layout: Any) -> dict[str, Any]:
    """A plotly.js figure in the page's looks; traces of {} are left out."""
    axis = {"gridcolor": "#edf0f2", "zerolinecolor": "#d5dbe0", "automargin": True}
    base = {
        "height": 290,
        "margin": {"l": 52, "r": 16, "t": 28, "b": 42},
        "font": {"family": "system-ui, sans-serif", "color": INK, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": axis | {"title": {"text": x_title}} | layout.pop("xaxis", {}),
        "yaxis": axis | {"title": {"text": y_title}} | layout.pop("yaxis", {}),
    }
    return {"data": [trace for trace in traces if trace], "layout": base | layout}


def curve(rows: Sequence[Row], key: str, name: str, color: str, **more: Any) -> Row:
    """A line trace of rows' `key` over step; {} where no row has a number."""
    steps, values = series(rows, key)
    if not any(value is not None for value in values):
        return {}
    few = sum(value is not None for value in values) < 40
    line = {"color": color, "width": 2} | more.pop("line", {})
    mode = "lines+markers" if few else "lines"
    return {"type": "scatter", "x": steps, "y": values, "name": name, "mode": mode, "line": line} | more


def smooth_curve(rows: Sequence[Row], key: str, name: str, color: str) -> list[Row]:
    """The values as a faint line, and their trailing mean over a tenth of the run as a strong one."""
    steps, values = series(rows, key)
    if not any(value is not None for value in values):
        return []
    window = max(3, len(values) // 10)
    faint = {"type": "scatter", "x": steps, "y": values, "name": name, "mode": "lines", "opacity": 0.35}
    faint |= {"line": {"color": color, "width": 1.2}}
    if len(values) < 2 * window:
        return [faint | {"opacity": 1.0, "mode": "lines+markers"}]
    means = [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    strong = {"type": "scatter", "x": steps, "y": means, "name": f"{name}, mean of {window}", "mode": "lines"}
    return [faint, strong | {"line": {"color": color, "width": 2.5}}]


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float | None]]:
    """(steps, values) with None where a row has no number; longer than MAX_POINTS: means over bins."""
    size = math.ceil(len(rows) / MAX_POINTS) or 1
    bins = [rows[i : i + size] for i in range(0, len(rows), size)]
    steps = [chunk[-1]["step"] for chunk in bins]
    return steps, [mean([row.get(key) for row in chunk]) for chunk in bins]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers among the values; None where there are none."""
    kept = [value for value in values if value is not None]
    return math.fsum(kept) / len(kept) if kept else None


def number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
