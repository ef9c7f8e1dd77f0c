"""report.html of a run: what happened, as curves, tables and a map, in one file that needs no network.

Reads only what the run left on disk, so it can be written at any time, also of a run that is still going or was killed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io
import torch

from ampo_fast.evaluation_summary import paired_summary
from ampo_fast.metrics import METRICS_FILE, scan_metrics
from ampo_fast.stage_files import read_embeddings, read_rows

Row = dict[str, Any]

_INK, _BLUE, _ORANGE, _GREEN, _GREY = "#22313f", "#2f6db5", "#d9772b", "#3b8f5a", "#b8c0c8"
_MAP_STEPS = 3
_SHOWN_PROMPTS = 8


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    figures: Sequence[str] = ()
    tables: Sequence[dict[str, Any]] = ()


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html and returns its path. Sections whose data is absent say so; broken rows are reported."""
    run_dir = Path(run_dir)
    run = _Run(run_dir)
    sections = [build(run) for build in _SECTIONS]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        name=run.config["run"]["name"],
        headline=run.headline(),
        sections=sections,
        problems=run.problems,
        config=json.dumps(run.config, indent=2),
        versions=run.versions,
        plotly_js=plotly.offline.get_plotlyjs(),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


class _Run:
    """What a run directory holds, read leniently: problems are collected, not raised."""

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        self.config: dict[str, Any] = json.loads((run_dir / "config.json").read_text())
        versions = run_dir / "versions.json"
        self.versions = json.loads(versions.read_text()) if versions.exists() else {}
        self.problems: list[str] = []
        metrics = run_dir / METRICS_FILE
        rows, problems = scan_metrics(metrics) if metrics.exists() else ([], [])
        self.problems += problems
        self.train = [row for row in rows if "reward" in row]
        self.evals = [row for row in rows if "eval/reward" in row]
        self.before, self.after = self._rows("eval/before.jsonl"), self._rows("eval/after.jsonl")
        self.rollouts = sorted(p for p in (run_dir / "rollouts").glob("step_*.jsonl") if ".partial" not in p.name)

    def _rows(self, name: str) -> list[Row]:
        return self.read(self.dir / name) if (self.dir / name).exists() else []

    def read(self, path: Path) -> list[Row]:
        try:
            return read_rows(path)
        except ValueError as error:
            self.problems.append(str(error))
            return []

    def headline(self) -> list[tuple[str, str]]:
        """(label, value) pairs for the top of the page."""
        shown = [("steps", str(self.train[-1]["step"]) if self.train else "0")]
        if self.before and self.after:
            s = paired_summary(self.before, self.after)
            shown += [
                ("reward before", f"{s['reward_before']:.3f}"),
                ("reward after", f"{s['reward_after']:.3f}"),
                ("difference", f"{s['reward_after'] - s['reward_before']:+.3f} ± {s['reward_se']:.3f} (SE)"),
                ("win rate", f"{s['win_rate']:.2f}"),
                ("held-out prompts", str(s["num_prompts"])),
            ]
        elif self.train:
            shown.append(("last training reward", f"{self.train[-1]['reward']:.3f}"))
        return shown

    def series(self, key: str, rows: Sequence[Row] | None = None) -> tuple[list[int], list[float]]:
        kept = [(row["step"], row[key]) for row in (self.train if rows is None else rows) if row.get(key) is not None]
        return [step for step, _ in kept], [value for _, value in kept]


# --- figures ----------------------------------------------------------------------------------------------------------


def _figure(title: str, traces: Sequence[go.Scatter], y: str = "", **layout: Any) -> str:
    figure = go.Figure(list(traces))
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0.02},
        template="plotly_white",
        height=layout.pop("height", 320),
        margin={"l": 55, "r": 15, "t": 45, "b": 45},
        font={"family": "system-ui, sans-serif", "color": _INK, "size": 12},
        legend={"orientation": "h", "y": -0.22},
        xaxis_title=layout.pop("x", "step"),
        yaxis_title=y,
        **layout,
    )
    return plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})


def _line(run: _Run, key: str, name: str, color: str, rows: Sequence[Row] | None = None, **more: Any) -> go.Scatter:
    x, y = run.series(key, rows)
    mode = "lines+markers" if rows is not None or len(x) < 40 else "lines"
    return go.Scatter(x=x, y=y, name=name, mode=mode, line={"color": color, **more})


def _reward(run: _Run) -> Section:
    if not run.train:
        return Section("Reward and loss", "No training step was logged.")
    reward = _figure(
        "Raw reward",
        [
            _line(run, "reward", "all candidates", _BLUE),
            _line(run, "positive/reward", "positives", _GREEN, dash="dot"),
            _line(run, "negative/reward", "negatives", _ORANGE, dash="dot"),
            _line(run, "eval/reward", "held-out prompts", _INK, run.evals, width=3),
        ],
    )
    loss = _figure("Loss", [_line(run, "loss", "loss", _BLUE)])
    margins = _figure(
        "How often the policy ranks the positive first",
        [_line(run, "rewards/accuracies", "accuracy", _GREEN)],
        yaxis_range=[0, 1],
    )
    norm = _figure("Gradient norm (before clipping) and learning rate", [
        _line(run, "grad_norm", "gradient norm", _BLUE),
        _secondary(_line(run, "learning_rate", "learning rate", _ORANGE)),
    ], yaxis2={"overlaying": "y", "side": "right", "showgrid": False, "exponentformat": "e"})  # fmt: skip
    return Section("Reward and loss", figures=[reward, loss, margins, norm])


def _secondary(trace: go.Scatter) -> go.Scatter:
    trace.update(yaxis="y2")
    return trace


def _lengths(run: _Run) -> Section:
    if not run.train:
        return Section("Lengths", "No training step was logged.")
    lengths = _figure("Tokens per response", [
        _line(run, "completions/max_length", "longest", _GREY),
        _line(run, "completions/mean_length", "mean", _BLUE),
        _line(run, "completions/min_length", "shortest", _GREY),
        _line(run, "eval/mean_length", "held-out mean", _INK, run.evals, width=3),
    ])  # fmt: skip
    clipped = _figure(
        "Share cut by the length limit",
        [
            _line(run, "completions/clipped_ratio", "all candidates", _BLUE),
            _line(run, "selected/clipped_ratio", "selected", _ORANGE),
            _line(run, "eval/clipped_ratio", "held-out", _INK, run.evals, width=3),
        ],
        yaxis_range=[0, 1],
    )
    return Section("Lengths", figures=[lengths, clipped])


def _drift(run: _Run) -> Section:
    if not run.evals:
        return Section("Drift from the start", "The run had no held-out evaluation.")
    keys = (
        ("eval/kl", "KL to the start (nats per token)"),
        ("eval/entropy", "Entropy (nats per token)"),
        ("eval/eos_rate", "Answers that end by themselves"),
        ("eval/distinct_2", "Distinct word pairs (distinct-2)"),
        ("eval/perplexity_start", "Perplexity of the answers under the start model"),
    )
    figures = [_figure(title, [_line(run, key, "held-out", _BLUE, run.evals)], height=260) for key, title in keys]
    text = "Measures that nothing trains on. A rising reward with a falling distinct-2 or a soaring perplexity is a collapse."
    return Section("Drift from the start", text, figures)


def _phases(run: _Run) -> Section:
    names = [key.removeprefix("time/") for key in (run.train[-1] if run.train else {}) if key.startswith("time/")]
    names = [name for name in names if name != "step"]
    if not names:
        return Section("Time", "No phase times were logged.")
    colors = ["#2f6db5", "#d9772b", "#3b8f5a", "#8e5bb5", "#c2a83e", "#5aa7b8", "#a35555", "#777f87"]
    bars = [
        go.Bar(x=[r["step"] for r in run.train], y=[r.get(f"time/{name}", 0.0) for r in run.train], name=name,
               marker_color=colors[i % len(colors)])
        for i, name in enumerate(names)
    ]  # fmt: skip
    total = sum(row.get("time/step", 0.0) for row in run.train)
    seconds = {name: sum(row.get(f"time/{name}", 0.0) for row in run.train) for name in names}
    rows = [[name, f"{s / len(run.train):.2f}", f"{s / total:.1%}"] for name, s in sorted(seconds.items(), key=lambda i: -i[1])]
    rows.append(["step", f"{total / len(run.train):.2f}", "100%"])
    table = {"head": ["phase", "seconds per step", "share"], "rows": rows}
    return Section("Time", figures=[_figure("Seconds per step", bars, "s", barmode="stack")], tables=[table])


def _health(run: _Run) -> Section:
    if not run.train:
        return Section("Group health", "No training step was logged.")
    shares = _figure(
        "Shares",
        [
            _line(run, "group/unique_ratio", "unique responses", _BLUE),
            _line(run, "group/degenerate", "degenerate groups (left out)", _ORANGE),
            _line(run, "frac_reward_zero_std", "groups without reward spread", _GREY),
        ],
        yaxis_range=[0, 1.05],
    )
    cost = _figure("Coverage cost of the selection", [_line(run, "group/coverage_cost", "cost", _BLUE)])
    return Section("Group health", figures=[shares, cost])


def _selected(run: _Run) -> Section:
    pairs = (
        ("raw reward", "reward", "selected/reward"),
        ("tokens", "completions/mean_length", "selected/mean_length"),
        ("mean distance between embeddings", "pool/distinctness", "selected/distinctness"),
        ("share cut by the length limit", "completions/clipped_ratio", "selected/clipped_ratio"),
    )
    rows = []
    for label, pool, kept in pairs:
        a, b = run.series(pool)[1], run.series(kept)[1]
        if a and b:
            rows.append([label, f"{statistics.fmean(a):.3f}", f"{statistics.fmean(b):.3f}"])
    if not rows:
        return Section("Selected against pool", "Nothing was selected.")
    text = f"Means over the run; {run.config['select']['strategy']} keeps the best and {run.config['select']['k']} of the rest."
    return Section("Selected against pool", text, tables=[{"head": ["", "all candidates", "selected"], "rows": rows}])


def _map(run: _Run) -> Section:
    title = "Map of candidates"
    if not run.rollouts:
        return Section(title, "No rollouts were kept.")
    count = min(_MAP_STEPS, len(run.rollouts))
    picks = sorted({round(i * (len(run.rollouts) - 1) / max(count - 1, 1)) for i in range(count)})
    figures = [figure for i in picks if (figure := _map_figure(run, run.rollouts[i]))]
    text = (
        "Each point is a response, placed by the two main directions of its embedding; one colour a prompt. "
        "Filled star: the positive. Filled circle: a selected negative. Open circle: left out. Hover for the text."
    )
    return Section(title, text, figures)


def _map_figure(run: _Run, path: Path) -> str | None:
    rows = run.read(path)
    try:
        point_NE = torch.cat(read_embeddings(path, [len(row["responses"]) for row in rows]))
    except ValueError as error:
        run.problems.append(str(error))
        return None
    if len(point_NE) < 3:
        return None
    centered_NE = point_NE - point_NE.mean(0)
    xy = centered_NE @ torch.linalg.svd(centered_NE, full_matrices=False).Vh[:2].T
    colors = ["#2f6db5", "#d9772b", "#3b8f5a", "#8e5bb5", "#c2a83e", "#5aa7b8", "#a35555", "#777f87"]
    symbol = {"positive": "star", "negative": "circle", None: "circle-open"}
    traces, at = [], 0
    for i, row in enumerate(rows):
        responses = row["responses"]
        block = xy[at : at + len(responses)]
        at += len(responses)
        marks = [response["selected"] for response in responses]
        traces.append(
            go.Scatter(
                x=block[:, 0].tolist(),
                y=block[:, 1].tolist(),
                mode="markers",
                name=_short(row["prompt"][-1]["content"], 40),
                marker={
                    "color": colors[i % len(colors)],
                    "symbol": [symbol[m] for m in marks],
                    "size": [15 if m == "positive" else 10 for m in marks],
                },
                hovertext=[_hover(response) for response in responses],
                hoverinfo="text",
            )
        )
    return _figure(f"Step {int(path.stem.removeprefix('step_'))}", traces, height=480, x="", showlegend=len(rows) <= 8)


def _hover(response: Row) -> str:
    reward = response["reward_raw"]
    words = response["content"].replace("<", "&lt;").split()
    lines = [" ".join(words[i : i + 12]) for i in range(0, min(len(words), 96), 12)]
    return f"reward {'none' if reward is None else f'{reward:.3f}'}<br>" + "<br>".join(lines)


# --- texts ------------------------------------------------------------------------------------------------------------


def _completions(run: _Run) -> Section:
    title = "Before and after, on held-out prompts"
    if not (run.before and run.after):
        return Section(title, "The run had no held-out evaluation.")
    after = {row["id"]: row for row in run.after}
    rows = [
        [row["prompt"][-1]["content"], _told(row["responses"][0]), _told(after[row["id"]]["responses"][0])]
        for row in run.before[:_SHOWN_PROMPTS]
        if row["id"] in after
    ]
    return Section(title, tables=[{"head": ["prompt", "before", "after"], "rows": rows}])


def _told(response: Row) -> str:
    reward = response["reward_raw"]
    return f"[{'–' if reward is None else f'{reward:.2f}'}] {response['content']}"


def _last_groups(run: _Run) -> Section:
    title = "Groups of the last round"
    if not run.rollouts:
        return Section(title, "No rollouts were kept.")
    sign = {"positive": "+", "negative": "−", None: ""}
    tables = []
    for row in run.read(run.rollouts[-1])[:4]:
        ordered = sorted(row["responses"], key=lambda r: math.inf if r["reward_raw"] is None else -r["reward_raw"])
        body = [
            [sign[r["selected"]], "–" if r["reward_raw"] is None else f"{r['reward_raw']:.3f}", r["finish_reason"], r["content"]]
            for r in ordered
        ]
        tables.append(
            {"caption": row["prompt"][-1]["content"], "head": ["", "reward", "end", "response"], "rows": body}
        )
    return Section(title, "+ the positive, − a selected negative.", tables=tables)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


_SECTIONS: tuple[Callable[[_Run], Section], ...] = (
    _reward,
    _completions,
    _drift,
    _lengths,
    _selected,
    _health,
    _map,
    _phases,
    _last_groups,
)
