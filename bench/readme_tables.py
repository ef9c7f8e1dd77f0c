"""Writes the README's tables from bench/results/*.csv, where the newest row of each variant counts.

    python bench/readme_tables.py [--check]        --check: changes nothing, fails where the README says something else

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, str]


def newest(file: str, *keys: str, **wanted: str) -> list[Row]:
    """The last row of each combination of `keys` among the rows whose fields start with what is wanted, in first order."""
    with (RESULTS / file).open(newline="") as source:
        rows = [row for row in csv.DictReader(source) if all(row[f].startswith(v) for f, v in wanted.items())]
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def by_variant(file: str, **wanted: str) -> dict[str, Row]:
    return {row["variant"]: row for row in newest(file, "variant", **wanted)}


def duration(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def seconds_of(row: Row) -> str:
    return duration(float(row["median_ms"]))


def mib(row: Row) -> str:
    return f"{float(row['peak_mib']):,.0f} MiB"


def ratio(peer: Row, ours: Row) -> str:
    return f"{float(peer['median_ms']) / float(ours['median_ms']):.3g}x"


def quickstart() -> list[Sequence[str]]:
    table = [("seed", "reward before", "after", "reward_se", "win rate", "perplexity", "distinct-2", "ends by itself",
              "mean tokens", "seconds")]  # fmt: skip
    for row in newest("quickstart.csv", "seed", variant="default"):
        value = {name: float(text) for name, text in row.items() if re.fullmatch(r"[\d.]+", text)}

        def change(name: str, form: str, value: dict[str, float] = value) -> str:
            return " → ".join(format(value[f"{name}_{when}"], form) for when in ("before", "after"))

        table.append((
            row["seed"], f"{value['reward_before']:.3f}", f"{value['reward_after']:.3f}", f"{value['reward_se']:.3f}",
            f"{value['win_rate']:.2f}", change("perplexity_start", ".2f"), change("distinct_2", ".2f"),
            change("eos_rate", ".0%"), change("mean_length", ".0f"), f"{value['wall_s']:.0f}",
        ))  # fmt: skip
    return table


def selector_cost() -> list[Sequence[str]]:
    rows = sorted(newest("selector.csv", "variant", op="strategy"), key=lambda row: -float(row["mean_cost"]))
    table = [("strategy", "mean cost", "above the optimum", "groups at the optimum")]
    for row in rows:
        at_optimum = row["note"].partition(" at the optimum")[0]
        table.append((row["variant"], f"{float(row['mean_cost']):.3f}", f"{float(row['gap_pct']):.3g}%", at_optimum))
    return table


def selector_speed() -> list[Sequence[str]]:
    table = [("", "ours", "peer", "ratio")]
    search = by_variant("selector.csv", op="opt_select", mode="cpu")
    for name, label in (
        ("fasterpam", "sklearn + kmedoids.fasterpam"),
        ("fasterpam init=build", "the same, started by BUILD"),
    ):
        table.append(_against(f"opt_select, {search[name]['shape']}", search["ampo_fast"], label, search[name]))
    exact = by_variant("selector.csv", op="exact", shape="B=72 N=32") | by_variant(
        "selector.csv", op="exact", variant="HiGHS"
    )
    # The means stand in the notes: "mean 0.541 ms".
    ours, peer = (_mean_ms(exact[name]) for name in ("ampo_fast", "HiGHS p-median MIP"))
    table.append(
        ("opt_select_exact, N=32 k=7, mean a group", duration(ours), f"HiGHS p-median MIP: {duration(peer)} (24 of the groups)",
         f"{peer / ours:.3g}x")
    )  # fmt: skip
    pool = by_variant("selector.csv", op="k_center", mode="cpu", note="prompts")
    for name in ("numpy loop", "torch loop", "torch gemv loop"):
        table.append(_against(f"k_center, {pool[name]['shape']}", pool["ampo_fast"], name, pool[name]))
    return table


def _against(what: str, ours: Row, label: str, peer: Row) -> tuple[str, str, str, str]:
    return what, seconds_of(ours), f"{label}: {seconds_of(peer)}", ratio(peer, ours)


def _mean_ms(row: Row) -> float:
    return float(re.search(r"mean ([\d.]+) ms", row["note"])[1])


def head() -> list[Sequence[str]]:
    names = {
        "ours_grouped": "ours, trained head (6 x rows x hidden x vocabulary FLOPs)", "ours_frozen": "ours, frozen head (4 x)",
        "bare_gemms": "the three matrix products alone", "naive": "whole logits and log_softmax",
        "torch_linear_cross_entropy": "torch `linear_cross_entropy`, chunked", "trl": "TRL 1.16's head, its own tiles",
    }  # fmt: skip
    rows = by_variant("linear_logprob.csv", shape="2048x576x49152", dtype="float32")
    return [("", "time", "extra memory"), *((names[n], seconds_of(rows[n]), mib(rows[n])) for n in names)]


def group_loss() -> list[Sequence[str]]:
    rows = by_variant("group_loss.csv", shape="4096x8", dtype="float32")
    peers = {"reference": "eager, group by group", "eager_dense": "eager, for groups of one size, no checks"}
    table = [
        _against("4,096 groups of 8", rows["ours_torch"], peers[name], rows[name]) for name in peers if name in rows
    ]
    return [("", "ours", "peer", "ratio"), *table]


def step() -> list[Sequence[str]]:
    table = [("", "ours", "peer", "ratio")]
    for shape in ("512_128", "180_350"):
        rows = by_variant("step.csv", op="step", shape=shape, dtype="float32")
        prompt, response = shape.split("_")
        what = f"forward + backward, prompt {prompt}, 8 responses of {response}"
        for variant, label in (("shared", what), ("compiled", "the same, `model.compile`")):
            if variant in rows:
                table.append(_against(label, rows[variant], "transformers, our head", rows["stock"]))
    whole = by_variant("step.csv", op="on_policy_step")
    for name, label in (("ours_1_3", "1 + 3 of 8"), ("ours_all", "all 8")):
        table.append(_against(f"on-policy step, trained on {label}", whole[name], "TRL GRPOTrainer", whole["trl"]))
    return table


TABLES: dict[str, Callable[[], list[Sequence[str]]]] = {
    "quickstart": quickstart,
    "selector_cost": selector_cost,
    "selector_speed": selector_speed,
    "head": head,
    "group_loss": group_loss,
    "step": step,
}


def markdown(table: list[Sequence[str]]) -> str:
    header, *body = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([header, "|" + " --- |" * len(table[0]), *body])


def with_tables(text: str) -> str:
    """The README's text with each marked table made anew. KeyError for a name that TABLES lacks."""
    pattern = re.compile(r"(<!-- rows: (\w+) -->\n).*?(\n<!-- end of rows -->)", flags=re.S)
    return pattern.sub(lambda found: found[1] + markdown(TABLES[found[2]]()) + found[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = with_tables(before)
    if options.check and after != before:
        sys.exit("README.md does not say what bench/results says; run python bench/readme_tables.py")
    readme.write_text(after)


if __name__ == "__main__":
    main()
