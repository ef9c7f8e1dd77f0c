"""Sections drawn from metrics.jsonl: reward, loss, drift, lengths, group health, selected against pool, time."""

from __future__ import annotations

from collections import Counter

from ampo_fast.report.run_data import Row, RunData
from ampo_fast.report.section import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SERIES_COLORS,
    Chart,
    Section,
    Table,
    curve,
    figure,
    mean,
    number,
    series,
    smooth_curve,
)
from ampo_fast.report.story import phase_seconds
from ampo_fast.report.timeline import timeline_charts

_NO_STEPS = "No training step has been logged."
_SHARE = {"yaxis": {"range": [-0.03, 1.03], "tickformat": ".0%"}}
_MAX_FILES = 20
"""Rollout files read to count why groups were left out."""


def reward_section(run: RunData) -> Section:
    head = {"id": "reward", "title": "Reward and loss"}
    if not run.train:
        return Section(**head, absent=_NO_STEPS)
    held_out = _held_out(run, "eval/reward", "held-out prompts")
    reward = figure([*smooth_curve(run.train, "reward", "training prompts", BLUE), held_out], y_title="raw reward")
    sides = figure(
        [
            curve(run.train, "positive/reward", "positives", GREEN),
            curve(run.train, "negative/reward", "selected negatives", ORANGE),
        ],
        y_title="raw reward",
    )
    loss = figure(smooth_curve(run.train, "loss", "loss", BLUE), y_title="loss")
    note = "" if held_out else "The run has no evaluation on held-out prompts."
    return Section(
        **head,
        charts=[
            Chart(title="Reward", figure=reward, note=note, is_wide=True),
            Chart(title="Loss", figure=loss),
            Chart(title="Reward of what was trained on", figure=sides),
            *_policy_charts(run),
        ],
    )


def _held_out(run: RunData, key: str, name: str) -> Row:
    """Dots that stand out; the dotted line between them says that nothing was measured there."""
    return curve(run.evals, key, name, INK, line={"dash": "dot"}, marker={"size": 9})


def _policy_charts(run: RunData) -> list[Chart]:
    logp = [
        curve(run.train, "positive/logp", "positives", GREEN),
        curve(run.train, "negative/logp", "negatives", ORANGE),
    ]
    accuracy = curve(run.train, "rewards/accuracies", "negatives below the positive", BLUE)
    norm = curve(run.train, "grad_norm", "gradient norm", BLUE)
    rate = curve(run.train, "learning_rate", "learning rate", GREY, yaxis="y2")
    right = {"overlaying": "y", "side": "right", "showgrid": False, "automargin": True}
    right |= {"exponentformat": "e", "tickmode": "auto", "nticks": 4}
    charts = []
    if any(logp):
        note = (
            "Both falling together is likelihood displacement: the ranking is learnt by making everything less likely."
        )
        charts.append(Chart(title="Log-probability per token", figure=figure(logp, y_title="nats"), note=note))
    if accuracy:
        title = "How often the policy already ranks the pair right"
        charts.append(Chart(title=title, figure=figure([accuracy], showlegend=False, **_SHARE)))
    if norm:
        both = figure([norm, rate], y_title="norm before clipping", **({"yaxis2": right} if rate else {}))
        charts.append(Chart(title="Gradient norm and learning rate", figure=both))
    return charts


def drift_section(run: RunData) -> Section:
    head = {"id": "drift", "title": "Drift from the start"}
    if not run.evals:
        return Section(**head, absent="The run has no evaluation on held-out prompts, so drift was not measured.")
    if len(run.evals) == 1:
        return Section(
            **head, absent=f"Only one evaluation so far, at step {run.evals[0]['step']}: nothing to compare."
        )
    measures = (
        ("eval/kl", "KL to the start", "nats per token"),
        ("eval/entropy", "Entropy", "nats per token"),
        ("eval/eos_rate", "Answers that end by themselves", "share"),
        ("eval/perplexity_start", "Perplexity of the answers under the start model", "perplexity"),
        ("eval/distinct_2", "Distinct word pairs (distinct-2)", "share"),
        ("eval/mean_length", "Length of an answer", "tokens"),
    )
    charts = [
        Chart(
            title=title,
            figure=figure([trace], y_title=unit, height=230, showlegend=False, yaxis={"rangemode": "tozero"}),
        )
        for key, title, unit in measures
        if (trace := _held_out(run, key, title))
    ]
    text = (
        "Measured on held-out prompts; nothing trains on these. A rising reward with a falling distinct-2 or a soaring "
        "perplexity is a collapse."
    )
    return Section(**head, sentences=[text], charts=charts)


def lengths_section(run: RunData) -> Section:
    head = {"id": "lengths", "title": "Lengths"}
    if not run.train:
        return Section(**head, absent=_NO_STEPS)
    band = {"line": {"color": BLUE, "width": 0}, "hoverinfo": "skip", "showlegend": False, "mode": "lines"}
    longest = curve(run.train, "completions/max_length", "longest", BLUE)
    shortest = curve(run.train, "completions/min_length", "shortest to longest", BLUE)
    if longest and shortest:
        longest |= band
        shortest |= band | {"fill": "tonexty", "fillcolor": "rgba(47,109,181,0.14)", "showlegend": True}
    lengths = figure(
        [
            longest,
            shortest,
            curve(run.train, "completions/mean_length", "mean", BLUE),
            curve(run.train, "selected/mean_length", "mean of the selected", ORANGE),
            _held_out(run, "eval/mean_length", "held-out mean"),
        ],
        y_title="tokens",
        yaxis={"rangemode": "tozero"},
    )
    clipped = figure(
        [
            curve(run.train, "completions/clipped_ratio", "all candidates", BLUE),
            curve(run.train, "selected/clipped_ratio", "selected", ORANGE),
            _held_out(run, "eval/clipped_ratio", "held-out"),
        ],
        **_SHARE,
    )
    return Section(
        **head,
        charts=[
            Chart(title="Tokens per answer", figure=lengths),
            Chart(title="Cut by the length limit", figure=clipped),
        ],
    )


def selected_section(run: RunData) -> Section:
    head = {"id": "selected", "title": "Selected against pool"}
    measures = (
        ("reward", "raw reward", "reward", "selected/reward", 3),
        ("length", "tokens", "completions/mean_length", "selected/mean_length", 1),
        ("distinctness", "mean distance of embeddings", "pool/distinctness", "selected/distinctness", 3),
        ("cut by the length limit", "share", "completions/clipped_ratio", "selected/clipped_ratio", 3),
    )
    rows, charts = [], []
    for name, unit, pool, kept, digits in measures:
        means = [mean(row.get(key) for row in run.train) for key in (pool, kept)]
        if None in means:
            continue
        rows.append([f"{name} ({unit})", number(means[0], digits), number(means[1], digits)])
        traces = [curve(run.train, pool, "all candidates", GREY), curve(run.train, kept, "selected", ORANGE)]
        charts.append(Chart(title=name.capitalize(), figure=figure(traces, y_title=unit, height=240)))
    if not rows:
        return Section(**head, absent="No step has logged both the pool and what was selected from it.")
    text = "What training saw, against everything that was sampled. Means over the run:"
    table = Table(head=["", "all candidates", "selected"], rows=rows)
    return Section(**head, sentences=[text], tables=[table], charts=charts)


def health_section(run: RunData) -> Section:
    head = {"id": "health", "title": "Group health"}
    if not run.train:
        return Section(**head, absent=_NO_STEPS)
    shares = figure(
        [
            curve(run.train, "group/unique_ratio", "distinct answers / N", BLUE),
            curve(run.train, "group/degenerate", "groups left out", ORANGE),
            curve(run.train, "frac_reward_zero_std", "groups without reward spread", GREY),
        ],
        **_SHARE,
    )
    cost = curve(run.train, "group/coverage_cost", "coverage cost", BLUE)
    spread = curve(run.train, "reward_std", "reward spread", GREEN)
    charts = [Chart(title="Shares", figure=shares)]
    if cost:
        note = "Reward-weighted distance of every candidate to the nearest selected one; lower covers better."
        charts.append(Chart(title="Coverage cost", figure=figure([cost], showlegend=False), note=note))
    if spread:
        title = "Spread of the rewards within a group"
        charts.append(Chart(title=title, figure=figure([spread], y_title="standard deviation", showlegend=False)))
    invalid = sum(row.get("group/invalid") or 0 for row in run.train)
    verb = "answer was" if invalid == 1 else "answers were"
    text = f"{invalid:,.0f} {verb} empty, repeated or without a reward, and kept out of everything."
    sentences = [text if invalid else "No answer was empty, repeated or without a reward."]
    return Section(**head, sentences=sentences, charts=charts, tables=_why_left_out(run))


def _why_left_out(run: RunData) -> list[Table]:
    stride = -(-len(run.rollouts) // _MAX_FILES) or 1
    steps = list(run.rollouts)[::stride]
    reasons = Counter(row.get("skip_reason") for step in steps for row in run.rows(run.rollouts[step]))
    total, reasons[None] = sum(reasons.values()), 0
    rows = [[reason, str(count), f"{count / total:.0%}"] for reason, count in reasons.most_common() if count]
    caption = f"Why groups were left out ({total} groups of {len(steps)} rollout files)"
    return [Table(head=["reason", "groups", "share"], rows=rows, caption=caption)] if rows else []


def time_section(run: RunData) -> Section:
    head = {"id": "time", "title": "Time"}
    totals = phase_seconds(run)
    if not totals:
        return Section(**head, absent="No phase times were logged.")
    bars: list[Row] = []
    for i, name in enumerate(totals):
        steps, seconds = series(run.train, f"time/{name}")
        color = SERIES_COLORS[i % len(SERIES_COLORS)]
        bars.append({"type": "bar", "x": steps, "y": seconds, "name": name, "marker": {"color": color}})
    chart = Chart(
        title="Seconds per step", figure=figure(bars, y_title="s", barmode="stack", bargap=0.15), is_wide=True
    )
    total, count = sum(totals.values()), len(run.train)
    rows = [[name, number(s / count, 2), f"{s / total:.1%}", number(s, 1)] for name, s in totals.items()]
    rows.append(["step", number(total / count, 2), "100%", number(total, 1)])
    evals = [row["time/eval"] for row in run.evals if row.get("time/eval") is not None]
    sentences = []
    if evals:
        sentences.append(f"{len(evals)} evaluations took {sum(evals):,.1f} s beside the steps.")
    speed = mean(row.get("perf/tokens_per_second") for row in run.train)
    if speed is not None:
        sentences.append(f"On average {speed:,.0f} tokens were sampled per second of a step.")
    table = Table(head=["phase", "seconds per step", "share", "seconds in all"], rows=rows)
    return Section(**head, sentences=sentences, charts=[chart, *timeline_charts(run)], tables=[table])
