"""A 2-D map of a step's candidates: the first two principal directions of their embeddings, what was selected marked.

Shapes: N candidates of a prompt, n candidates on one map, E embedding.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ampo_fast.report.run_data import Row, RunData
from ampo_fast.report.section import GREEN, GREY, ORANGE, Section, figure, number
from ampo_fast.stage_files import read_embeddings

_NUM_STEPS, _NUM_PROMPTS, _MAX_POINTS, _MAX_HOVER = 4, 8, 600, 420
# selected flag -> (legend, marker)
_ROLES: dict[str | None, tuple[str, Row]] = {
    None: ("not selected", {"color": GREY, "size": 8, "symbol": "circle-open", "line": {"width": 1.6}}),
    "negative": ("selected negative", {"color": ORANGE, "size": 10, "symbol": "circle"}),
    "positive": ("positive", {"color": GREEN, "size": 15, "symbol": "star"}),
}


def map_section(run: RunData) -> Section:
    """A few steps from first to last; in each, all prompts on one map and each prompt on its own."""
    head = {"id": "map", "title": "Map of candidates"}
    if not run.rollouts:
        return Section(**head, absent="The run has kept no rollouts.")
    shown = [(f"step {step}", run.rollouts[step]) for step in _spread(list(run.rollouts))]
    return _maps_of(run, head, shown)


def file_map_section(run: RunData, path: Path) -> Section:
    """The maps of one stage file: all prompts on one, and each of the first prompts on its own."""
    return _maps_of(run, {"id": "map", "title": "Map of candidates"}, [(path.name, path)])


def _maps_of(run: RunData, head: dict[str, str], files: Sequence[tuple[str, Path]]) -> Section:
    steps = [found for name, path in files if (found := _file_maps(run, name, path))]
    if not steps:
        return Section(**head, absent="No rollouts with embeddings could be read.")
    text = (
        "Each point is an answer, placed by the two main directions of its embedding. On the map of one prompt a line "
        "leads from each answer that was not selected to the nearest selected negative, the one that stands in for it. "
        "Hover or tap for the text."
    )
    return Section(**head, sentences=[text], maps=steps)


def _spread(steps: Sequence[int]) -> list[int]:
    """Up to _NUM_STEPS of the steps, evenly spaced, the first and the last among them."""
    count = min(_NUM_STEPS, len(steps))
    return [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]


def _file_maps(run: RunData, name: str, path: Path) -> dict[str, Any] | None:
    rows = [row for row in run.rows(path) if row["responses"]]
    try:
        blocks = read_embeddings(path, [len(row["responses"]) for row in rows])
    except ValueError as error:
        run.problems.append(f"No map of {name}: {error}")
        return None
    if not rows:
        return None
    num_shown = _num_within(_MAX_POINTS, [len(block) for block in blocks])
    left_out = f" (the first {num_shown} of {len(rows)})" if num_shown < len(rows) else ""
    views = [{"name": f"all prompts{left_out}", "figure": _map(rows[:num_shown], blocks[:num_shown])}]
    views += [
        {"name": _short(row["prompt"][-1]["content"], 70), "figure": _map([row], [block], lines=True)}
        for row, block in zip(rows[:_NUM_PROMPTS], blocks, strict=False)
    ]
    return {"name": name, "views": views if len(rows) > 1 else views[1:]}


def _num_within(limit: int, sizes: Sequence[int]) -> int:
    used, count = 0, 0
    for size in sizes:
        used += size
        if used > limit and count:
            break
        count += 1
    return count


def _map(rows: Sequence[Row], blocks: Sequence[torch.Tensor], lines: bool = False) -> dict[str, Any]:
    point_nE = torch.cat(list(blocks)).double()
    xy_n2, share_2 = principal_plane(point_nE)
    places = [[round(x, 5), round(y, 5)] for x, y in xy_n2.tolist()]
    answers = [(row, response) for row in rows for response in row["responses"]]
    traces = _coverage_lines(point_nE, places, [response.get("selected") for _, response in answers]) if lines else []
    for role, (name, marker) in _ROLES.items():
        members = [i for i, (_, response) in enumerate(answers) if response.get("selected") == role]
        trace = {"type": "scatter", "mode": "markers", "name": name, "marker": marker, "hoverinfo": "text"}
        trace |= {"x": [places[i][0] for i in members], "y": [places[i][1] for i in members]}
        traces.append(trace | {"text": [_hover(*answers[i], with_prompt=not lines) for i in members]})
    first, second = (f"{share:.0%} of the variance" for share in share_2.tolist())
    square = {"scaleanchor": "x", "zeroline": False}
    return figure(
        traces,
        x_title=first,
        y_title=second,
        height=520,
        hovermode="closest",
        hoverlabel={"align": "left", "bgcolor": "#ffffff"},
        xaxis={"zeroline": False},
        yaxis=square,
    )


def principal_plane(point_nE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PCA: ([n, 2] coordinates, [2] shares of the variance). Signs are fixed: the largest loading is positive.

    Fewer than two directions with any variance: the missing coordinates are 0.
    """
    centered_nE = point_nE - point_nE.mean(0)
    _, scale, direction = torch.linalg.svd(centered_nE, full_matrices=False)
    direction_2E, scale_2 = direction[:2], scale[:2]
    if len(direction_2E) < 2:
        missing = 2 - len(direction_2E)
        direction_2E = torch.cat([direction_2E, direction_2E.new_zeros(missing, point_nE.shape[1])])
        scale_2 = torch.cat([scale_2, scale_2.new_zeros(missing)])
    largest_2 = direction_2E.gather(1, direction_2E.abs().argmax(1, keepdim=True))
    direction_2E = direction_2E * torch.where(largest_2 < 0, -1.0, 1.0)
    total = scale.square().sum().clamp_min(torch.finfo(scale.dtype).tiny)
    return centered_nE @ direction_2E.T, scale_2.square() / total


def _coverage_lines(point_nE: torch.Tensor, places: list[list[float]], roles: Sequence[str | None]) -> list[Row]:
    covering = [i for i, role in enumerate(roles) if role == "negative"]
    covered = [i for i, role in enumerate(roles) if role is None]
    if not covering or not covered:
        return []
    nearest = torch.cdist(point_nE[covered], point_nE[covering]).argmin(1).tolist()
    xs: list[float | None] = []
    ys: list[float | None] = []
    for i, j in zip(covered, nearest, strict=True):
        (x0, y0), (x1, y1) = places[i], places[covering[j]]
        xs += [x0, x1, None]  # None lifts the pen
        ys += [y0, y1, None]
    line = {"color": "#d9a27a", "width": 1}
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "line": line,
        "hoverinfo": "skip",
        "name": "nearest selected",
    }
    return [trace]


def _hover(row: Row, response: Row, with_prompt: bool) -> str:
    # plotly reads hover text as a small HTML: everything from the run is escaped.
    lines = [f"<b>reward {number(response.get('reward_raw'))}</b>"]
    if with_prompt:
        lines.append(f"<i>{html.escape(_short(row['prompt'][-1]['content'], 80))}</i>")
    wrapped = textwrap.wrap(_short(response["content"], _MAX_HOVER), 70) or ["(empty)"]
    return "<br>".join(lines + [html.escape(line) for line in wrapped])


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
