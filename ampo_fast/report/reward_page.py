"""The page of a reward model: reliability diagram, accuracy by margin and by length, ranks, and its training curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from ampo_fast.files import write_atomic
from ampo_fast.metrics import METRICS_FILE, scan_metrics
from ampo_fast.report.section import BLUE, GREY, INK, ORANGE, Chart, Section, Table, curve, figure, number
from ampo_fast.templating import render

Evaluation = dict[str, Any]
_PERCENT = {"tickformat": ".0%"}


def write_reward_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html of a `train-reward` run from its metrics, evaluation and config; returns its path."""
    config = json.loads((run_dir / "config.json").read_text())
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    versions = json.loads((run_dir / "versions.json").read_text())
    rows, problems = scan_metrics(run_dir / METRICS_FILE)
    sections = [*_evaluation_sections(evaluation), _training_section(rows)]
    facts = [
        ("backbone", config["model"]["path"]),
        ("pairs", f"{config['data']['train']}; held out: {config['data']['eval'] or 'prompts split off'}"),
        ("loss", config["loss"]["name"] + "".join(f", {k} {v}" for k, v in config["loss"]["params"].items())),
        ("optimizer", f"AdamW, lr {config['optim']['lr']}, {config['optim']['prompts_per_step']} groups a step"),
        ("seed", str(config["run"]["seed"])),
    ]
    page = _page(config["run"]["name"], str(run_dir), evaluation, sections, facts, problems, config, versions)
    path = run_dir / "report.html"
    write_atomic(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    return path


def write_evaluation_page(path: Path, evaluation: Evaluation, facts: Sequence[tuple[str, str]], versions: dict) -> Path:
    """Writes the page of one `ampo-fast evaluate`."""
    page = _page("Evaluation", dict(facts)["scored by"], evaluation, _evaluation_sections(evaluation), facts, [],
                 dict(facts), versions)  # fmt: skip
    write_atomic(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    return path


def _page(
    name: str,
    where: str,
    evaluation: Evaluation,
    sections: Sequence[Section],
    facts: Sequence[tuple[str, str]],
    problems: Sequence[str],
    config: dict,
    versions: dict,
) -> str:
    low, high = evaluation["accuracy_interval"]
    tiles = [
        (f"held-out accuracy (95%: {low:.1%} to {high:.1%})", f"{evaluation['accuracy']:.1%}"),
        ('"the longer answer wins"', f"{evaluation['accuracy_longer_wins']:.1%}"),
        ("Brier score", number(evaluation["brier"])),
        ("calibration error (ECE)", number(evaluation["ece"])),
        ("pairs", str(evaluation["num_pairs"])),
    ]
    return render(
        "report.html.j2", name=name, run_dir=where, tiles=tiles, facts=facts, sections=sections, problems=problems,
        config=json.dumps(config, indent=2), versions=versions, binned="", plotly_js=get_plotlyjs(),
    )  # fmt: skip


def _evaluation_sections(evaluation: Evaluation) -> list[Section]:
    return [_accuracy_section(evaluation), _calibration_section(evaluation), _groups_section(evaluation)]


def _accuracy_section(evaluation: Evaluation) -> Section:
    se, prompts = evaluation["accuracy_se_by_prompt"], evaluation["num_prompts"]
    text = (
        f"{evaluation['accuracy']:.1%} of {evaluation['num_pairs']} pairs over {prompts} prompts are ranked right; the "
        f"standard error is {number(se)} when the pairs of a prompt count as dependent. "
        f"{evaluation['num_ties']} pairs of equal reward are left out."
    )
    charts = [
        Chart(title="By margin", figure=_bars(evaluation["by_margin"], "difference of the rewards"), note=_INTERVALS),
        Chart(
            title="By length", figure=_bars(evaluation["by_length"], "length of the preferred answer"), note=_INTERVALS
        ),
    ]
    head = ("bucket", "pairs", "accuracy", "95% interval")
    tables = [
        Table(head=head, rows=[_bucket_row(b) for b in evaluation[key]], caption=caption)
        for key, caption in (("by_margin", "By margin"), ("by_length", "By length"), ("by_subset", "By subset"))
        if key in evaluation
    ]
    return Section(id="accuracy", title="Which answer is better", sentences=[text], charts=charts, tables=tables)


_INTERVALS = "Bars: share of pairs ranked right, with Wilson's 95% interval. The dotted line is a coin."


def _bucket_row(bucket: dict[str, Any]) -> tuple[str, ...]:
    low, high = bucket["interval"]
    return bucket["bucket"], str(bucket["count"]), f"{bucket['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"


def _bars(buckets: Sequence[dict[str, Any]], x_title: str) -> dict[str, Any]:
    names = [f"{b['bucket']}<br>n = {b['count']}" for b in buckets]
    values = [b["accuracy"] for b in buckets]
    bars = {"type": "bar", "x": names, "y": values, "marker": {"color": BLUE}, "error_y": _errors(buckets, values)}
    coin = {"type": "scatter", "x": names, "y": [0.5] * len(names), "mode": "lines"}
    coin |= {"line": {"color": GREY, "dash": "dot"}, "hoverinfo": "skip"}
    axis = _PERCENT | {"range": [0, 1.03]}
    return figure([bars, coin], x_title=x_title, y_title="accuracy", yaxis=axis, showlegend=False, height=340)


def _errors(buckets: Sequence[dict[str, Any]], values: Sequence[float]) -> dict[str, Any]:
    above = [b["interval"][1] - value for b, value in zip(buckets, values, strict=True)]
    below = [value - b["interval"][0] for b, value in zip(buckets, values, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": INK, "thickness": 1.2}


def _calibration_section(evaluation: Evaluation) -> Section:
    bins = evaluation["reliability"]
    x = [b["confidence"] for b in bins]
    y = [b["accuracy"] for b in bins]
    counts = [f"{b['count']} pairs" for b in bins]
    perfect = {"type": "scatter", "x": [0.5, 1], "y": [0.5, 1], "mode": "lines", "name": "calibrated"}
    perfect |= {"line": {"color": GREY, "dash": "dot"}, "hoverinfo": "skip"}
    points = {"type": "scatter", "x": x, "y": y, "mode": "lines+markers", "name": "this model", "text": counts}
    points |= {"line": {"color": BLUE}, "marker": {"size": 9}, "error_y": _errors(bins, y)}
    axis = _PERCENT | {"range": [-0.03, 1.03]}
    across = _PERCENT | {"range": [0.48, 1.02]}
    diagram = figure([perfect, points], x_title="confidence", y_title="accuracy", yaxis=axis, xaxis=across, height=360)
    held = {"type": "bar", "x": x, "y": [b["count"] for b in bins], "marker": {"color": ORANGE}, "name": "pairs"}
    spread = figure([held], x_title="confidence", y_title="pairs", xaxis=across, showlegend=False, height=360)
    text = (
        "Confidence is max(p, 1 - p) with p = sigmoid(score gap), in 15 bins of equal width on [0, 1]; a hit is p > 1/2. "
        f"ECE {number(evaluation['ece'])}, Brier {number(evaluation['brier'])}, "
        f"log loss {number(evaluation['log_loss'])} nats."
    )
    charts = [Chart(title="Reliability", figure=diagram, note="Below the dotted line: too sure of itself.")]
    charts.append(Chart(title="Pairs by confidence", figure=spread))
    return Section(id="calibration", title="How sure, and how rightly", sentences=[text], charts=charts)


def _groups_section(evaluation: Evaluation) -> Section:
    head = {"id": "groups", "title": "Larger groups"}
    if "num_groups" not in evaluation:
        return Section(**head, absent="The data has no group of three or more responses.")
    rows = [
        ("Spearman of scores and rewards", number(evaluation["spearman"]), number(evaluation["spearman_se"])),
        ("reward lost by taking the best score", number(evaluation["best_of_n_regret"]),
         number(evaluation["best_of_n_regret_se"])),
        ("reward lost by a random pick", number(evaluation["random_pick_regret"]), ""),
    ]  # fmt: skip
    text = f"{evaluation['num_groups']} groups, {number(evaluation['mean_group_size'], 1)} responses on average."
    return Section(
        **head, sentences=[text], tables=[Table(head=("mean over groups", "value", "standard error"), rows=rows)]
    )


def _training_section(rows: Sequence[dict[str, Any]]) -> Section:
    head = {"id": "training", "title": "Training"}
    train = [row for row in rows if "loss" in row]
    held = [row for row in rows if "eval/loss" in row]
    if not train:
        return Section(**head, absent="No training step has been logged.")
    loss = [curve(train, "loss", "training", GREY), curve(held, "eval/loss", "held out", INK)]
    accuracy = [curve(train, "accuracy", "training", GREY), curve(held, "eval/accuracy", "held out", INK)]
    calibration = [curve(held, "eval/ece", "ECE", BLUE), curve(held, "eval/brier", "Brier", ORANGE)]
    note = "Training numbers are of the groups before they are trained on. Where the two part, the model overfits."
    charts = [
        Chart(title="Loss", figure=figure(loss, y_title="nats"), note=note),
        Chart(title="Accuracy", figure=figure(accuracy, yaxis=_PERCENT)),
        Chart(title="Calibration on held-out pairs", figure=figure(calibration)),
    ]
    return Section(**head, charts=charts)
