"""Puts the sections on one page."""

from __future__ import annotations

import json
from pathlib import Path

from plotly.offline import get_plotlyjs

from ampo_fast.files import write_atomic
from ampo_fast.report.candidate_map import file_map_section, map_section
from ampo_fast.report.curves import (
    drift_section,
    health_section,
    lengths_section,
    reward_section,
    selected_section,
    time_section,
)
from ampo_fast.report.run_data import RunData, load_run
from ampo_fast.report.section import MAX_POINTS, mean, number
from ampo_fast.report.story import story, tiles
from ampo_fast.report.texts import completions_section, file_groups_section, groups_section
from ampo_fast.templating import render

_SECTIONS = (
    story,
    reward_section,
    completions_section,
    drift_section,
    lengths_section,
    selected_section,
    map_section,
    health_section,
    time_section,
    groups_section,
)


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html, whole or not at all, and returns its path.

    A section whose data is absent says so; a line that cannot be read is named on the page. Raises ValueError when
    run_dir is not a run directory.
    """
    run = load_run(run_dir)
    sections = [build(run) for build in _SECTIONS]
    page = render(
        "report.html.j2",
        name=run.setting("run.name") or run.dir.name,
        run_dir=str(run.dir),
        tiles=tiles(run),
        facts=_facts(run),
        sections=sections,
        problems=run.problems,
        config=json.dumps(run.config, indent=2),
        versions=run.versions,
        binned=f"Curves show means over bins of steps: there are more than {MAX_POINTS}."
        if len(run.train) > MAX_POINTS
        else "",
        plotly_js=get_plotlyjs(),
    )
    path = run.dir / "report.html"
    write_atomic(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    return path


def write_stage_page(path: Path) -> Path:
    """Writes FILE.html beside a stage file, with the map of its candidates and its first groups; returns its path.

    Raises ValueError where no line of the file is a row of a stage file.
    """
    run = RunData(
        dir=path.parent, config={}, versions={}, summary={}, train=[], evals=[], before=[], after=[], rollouts={}
    )
    rows = run.rows(path)
    if not rows:
        raise ValueError(f"{path} has no row of a stage file; make one with `ampo-fast select`")
    costs = [row["cost"] for row in rows if row.get("cost") is not None]
    page = render(
        "report.html.j2",
        name=path.name,
        run_dir=str(path),
        tiles=[
            ("groups", str(len(rows))),
            ("answers", str(sum(len(row["responses"]) for row in rows))),
            ("groups with a selection", str(len(costs))),
            ("mean coverage cost", number(mean(costs))),
        ],
        facts=[],
        sections=[file_map_section(run, path), file_groups_section(run, path)],
        problems=run.problems,
        config="",
        versions={},
        binned="",
        plotly_js=get_plotlyjs(),
    )
    target = path.with_suffix(".html")
    write_atomic(target, lambda aside: aside.write_text(page, encoding="utf-8"))
    return target


def _facts(run: RunData) -> list[tuple[str, str]]:
    """(what, value) pairs: the settings that one asks for first."""
    if not run.config:
        return []
    setting = run.setting
    params = ", ".join(f"{key} {value}" for key, value in (setting("loss.params") or {}).items())
    limit = setting("rollout.max_new_tokens")
    given = setting("rollout.engine") == "data"
    reward = setting("reward.kind")
    return [
        ("model", f"{setting('model.path')} ({setting('model.dtype')})"),
        ("prompts", f"{setting('data.train')}; held out: {setting('data.eval') or 'none'}"),
        ("answers", "given with the data" if given else f"{setting('rollout.n')} a prompt, up to {limit} tokens, "
         f"temperature {setting('rollout.temperature')}"),
        ("reward", f"{', '.join(reward) if isinstance(reward, list) else reward}, normalised: {setting('reward.normalize')}"),
        ("selection", f"1 + {setting('select.k')} by {setting('select.strategy')}"),
        ("loss", f"{setting('loss.name')}{f' ({params})' if params else ''}"),
        ("optimizer", f"AdamW, lr {setting('optim.lr')}, {setting('optim.prompts_per_step')} prompts a step"),
        ("seed", str(setting("run.seed"))),
    ]  # fmt: skip
