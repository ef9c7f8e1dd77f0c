"""What happened, in words and a few numbers, computed from the run's files and nothing else."""

from __future__ import annotations

import statistics

from ampo_fast.evaluation_summary import num_unscored, paired_summary
from ampo_fast.report.run_data import Row, RunData
from ampo_fast.report.section import Section, Table, duration, mean, number

# (key, name, digits, what the number is)
_UNTRAINED = (
    ("eval/mean_length", "length of an answer", 1, "tokens"),
    ("eval/eos_rate", "answers that end by themselves", 3, "share"),
    ("eval/distinct_2", "distinct-2", 3, "distinct word pairs among all"),
    ("eval/perplexity_start", "perplexity under the start model", 2, "of the policy's own answers"),
    ("eval/entropy", "entropy", 3, "nats per token"),
    ("eval/kl", "KL to the start", 4, "nats per token"),
)
# A change beyond these deserves a sentence of its own: the reward must then be read with it in mind.
_LENGTH_CHANGE, _DISTINCT_DROP, _PERPLEXITY_RISE = 0.25, 0.2, 0.5
_NUM_SE = 2.0
_SMALL_PHASE = 0.02


def evaluation(run: RunData) -> dict[str, float | None] | None:
    """paired_summary of the run's evaluation files; None without both, or where they share no scored prompt."""
    if not (run.before and run.after):
        return None
    try:
        return paired_summary(run.before, run.after)
    except ValueError as error:
        if str(error) not in run.problems:
            run.problems.append(str(error))
        return None


def tiles(run: RunData) -> list[tuple[str, str]]:
    """(label, value) pairs for the top of the page."""
    steps = str(run.train[-1]["step"]) if run.train else "0"
    planned = run.setting("run.steps")
    shown = [("steps", steps if planned is None or str(planned) == steps else f"{steps} of {planned}")]
    result = evaluation(run)
    if result:
        change = result["reward_after"] - result["reward_before"]
        shown += [
            ("reward, held-out prompts", f"{result['reward_before']:.3f} → {result['reward_after']:.3f}"),
            ("change ± SE", f"{change:+.3f} ± {number(result['reward_se'])}"),
            ("win rate against before", f"{result['win_rate']:.0%}"),
        ]
    elif run.train:
        shown.append(("last training reward", number(run.train[-1].get("reward"))))
    if "wall_s" in run.summary:
        shown.append(("wall time", duration(run.summary["wall_s"])))
    peaks = [row["perf/peak_rss_mib"] for row in run.train if row.get("perf/peak_rss_mib") is not None]
    if peaks:
        shown.append(("peak memory", f"{max(peaks) / 1024:.1f} GiB"))
    if run.train and run.train[-1].get("num_tokens"):
        shown.append(("trained tokens", f"{run.train[-1]['num_tokens']:,.0f}"))
    return shown


def story(run: RunData) -> Section:
    """The section that opens the page."""
    sentences = [_what_was_done(run), *_outcome(run), *_side_effects(run), *_groups(run), *_time(run)]
    table = _untrained_table(run)
    return Section(
        id="story",
        title="What happened",
        sentences=[sentence for sentence in sentences if sentence],
        tables=[table] if table else [],
    )


def _what_was_done(run: RunData) -> str:
    if not run.config:
        return "The configuration is missing, so this page cannot say how the policy was trained."
    k, strategy = run.setting("select.k"), run.setting("select.strategy")
    per_step = run.setting("optim.prompts_per_step")
    if run.setting("rollout.engine") == "data":
        source = "Each prompt's responses were given with the data"
    else:
        source = f"The policy wrote {run.setting('rollout.n')} answers to each prompt"
    text = (
        f"{run.setting('model.path')} was trained with the loss {run.setting('loss.name')}, {per_step} prompts a step. "
        f"{source}; {strategy} kept the best one and {k} of the others to train on."
    )
    if run.summary.get("stopped"):
        text += f" The run stopped early: {run.summary['stopped']}."
    elif not run.summary:
        text += " There is no summary.json: the run is still going, or was stopped before its end."
    return text


def _outcome(run: RunData) -> list[str]:
    result = evaluation(run)
    if result is None:
        return [
            "Nothing was measured on held-out prompts both before and after, so whether it got better is not known."
        ]
    change, se = result["reward_after"] - result["reward_before"], result["reward_se"]
    samples = max(len(row["responses"]) for row in run.after)
    sentences = [
        f"On {result['num_prompts']} held-out prompts ({samples} answers each) the mean reward went from "
        f"{result['reward_before']:.3f} to {result['reward_after']:.3f}, a change of {change:+.3f} with a paired "
        f"standard error of {number(se)}. The answers after training score higher on {result['win_rate']:.0%} of the "
        f"prompts (ties count half)."
    ]
    if se:
        size = f"{abs(change) / se:.1f} standard errors"
        if change > _NUM_SE * se:
            sentences.append(f"The gain is {size}: chance alone is an unlikely explanation.")
        elif change < -_NUM_SE * se:
            sentences.append(f"The policy got worse, by {size}.")
        else:
            sentences.append(f"That is {size}: chance alone can explain it.")
    missing = num_unscored(run.before) + num_unscored(run.after)
    if missing:
        sentences.append(f"{missing} held-out answers have no reward and are left out of these numbers.")
    return sentences


def _side_effects(run: RunData) -> list[str]:
    start, end = _first_and_last(run)
    sentences = []
    for key, name, grew, shrank, limits in (
        ("eval/mean_length", "Answers became", "longer", "shorter", (-_LENGTH_CHANGE, _LENGTH_CHANGE)),
        ("eval/distinct_2", "Word pairs became", "more varied", "less varied", (-_DISTINCT_DROP, 9.0)),
        ("eval/perplexity_start", "Answers became", "stranger to the start model", "plainer", (-9.0, _PERPLEXITY_RISE)),
    ):
        old, new = start.get(key), end.get(key)
        if not old or new is None:
            continue
        share = new / old - 1.0
        if not limits[0] <= share <= limits[1]:
            way = grew if share > 0 else shrank
            sentences.append(
                f"{name} {abs(share):.0%} {way} ({old:.2f} → {new:.2f}); read the reward with that in mind."
            )
    return sentences


def _first_and_last(run: RunData) -> tuple[Row, Row]:
    return (run.evals[0], run.evals[-1]) if len(run.evals) > 1 else ({}, {})


def _untrained_table(run: RunData) -> Table | None:
    start, end = _first_and_last(run)
    rows = [
        [name, number(start[key], digits), number(end[key], digits), what]
        for key, name, digits, what in _UNTRAINED
        if start.get(key) is not None and end.get(key) is not None
    ]
    if not rows:
        return None
    head = ["not trained on", f"step {start['step']}", f"step {end['step']}", ""]
    return Table(head=head, rows=rows)


def _groups(run: RunData) -> list[str]:
    trained = [row["group/trained"] for row in run.train if row.get("group/trained") is not None]
    left_out = mean([row.get("group/degenerate") for row in run.train])
    if not trained or left_out is None:
        return []
    text = f"{sum(trained):,.0f} groups were trained on"
    return [
        f"{text}; {left_out:.0%} of the groups taught nothing and were left out."
        if left_out
        else f"{text}, all there were."
    ]


def _time(run: RunData) -> list[str]:
    seconds = [row["time/step"] for row in run.train if row.get("time/step") is not None]
    if not seconds:
        return []
    phases = phase_seconds(run)
    total = sum(phases.values())
    split = ", ".join(f"{name} {s / total:.0%}" for name, s in phases.items() if s > _SMALL_PHASE * total)
    return [f"A step took {statistics.median(seconds):.1f} s (median): {split}." if split else ""]


def phase_seconds(run: RunData) -> dict[str, float]:
    """Seconds per phase over all steps, largest first; evaluations are not part of a step."""
    totals: dict[str, float] = {}
    for row in run.train:
        for key, value in row.items():
            name = key.removeprefix("time/")
            if key.startswith("time/") and name != "step" and value is not None:
                totals[name] = totals.get(name, 0.0) + value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
