"""report.html of made-up runs: what it says, what it leaves out and why, and that a browser really draws it."""

import html
import json
import math
import random
import re
import shutil
import subprocess

import pytest
import torch

from ampo_fast.report import write_report
from ampo_fast.report.candidate_map import principal_plane
from ampo_fast.report.run_data import load_run, scan_rows
from ampo_fast.report.section import MAX_POINTS, series
from ampo_fast.stage_files import write_embeddings, write_rows_atomic

N, K, STEPS = 6, 2, 12
NASTY = '<script>alert("x")</script> & <b>bold</b> </script><img src=x onerror=alert(1)>'


def make_config(**sections):
    config = {
        "run": {"name": "tiny & co", "seed": 3, "steps": STEPS},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "model": {"path": "some/model", "dtype": "float32"},
        "rollout": {"engine": "transformers", "n": N, "max_new_tokens": 48, "temperature": 0.8},
        "reward": {"kind": "relevance", "normalize": "auto"},
        "select": {"strategy": "opt_select", "k": K},
        "loss": {"name": "AMPO", "params": {"beta": 10.0}},
        "optim": {"lr": 1e-5, "prompts_per_step": 2},
    }
    return config | sections


def make_response(content, reward, selected=None):
    return {
        "content": content,
        "token_ids": list(range(len(content.split()))),
        "logp": [],
        "finish_reason": "length" if reward is not None and reward < 0.2 else "stop",
        "version": 0,
        "reward_raw": reward,
        "reward": reward,
        "selected": selected,
    }


def make_row(prompt_id, rewards, text="answer", selected=()):
    roles = dict(selected)
    responses = [make_response(f"{text} {i} to {prompt_id}", r, roles.get(i)) for i, r in enumerate(rewards)]
    prompt = [{"role": "user", "content": f"question {prompt_id}?"}]
    return {"id": prompt_id, "prompt": prompt, "prompt_ids": [1, 2], "responses": responses}


def make_train_line(step):
    wave = math.sin(step)
    return {
        "step": step,
        "loss": 2.0 / step,
        "reward": 0.3 + 0.02 * step + 0.02 * wave,
        "reward_std": 0.1,
        "frac_reward_zero_std": 0.0,
        "grad_norm": 5.0 + wave,
        "learning_rate": 1e-5 * step / STEPS,
        "num_tokens": 400 * step,
        "completions/mean_length": 30.0,
        "completions/min_length": 5,
        "completions/max_length": 48,
        "completions/clipped_ratio": 0.25,
        "group/unique_ratio": 0.95,
        "group/degenerate": 0.5 if step == 1 else 0.0,
        "group/trained": 1 if step == 1 else 2,
        "group/invalid": 1,
        "group/coverage_cost": 2.0 + wave,
        "selected/reward": 0.25,
        "selected/mean_length": 28.0,
        "selected/clipped_ratio": 0.3,
        "selected/distinctness": 1.1,
        "pool/distinctness": 0.9,
        "positive/reward": 0.7,
        "negative/reward": 0.2,
        "positive/logp": -1.5,
        "negative/logp": -1.7,
        "rewards/accuracies": 0.6,
        "perf/tokens_per_second": 70.0,
        "perf/peak_rss_mib": 2048.0,
        "time/generate": 6.0,
        "time/forward_backward": 3.0,
        "time/score": 1.0,
        "time/step": 10.0,
    }


def make_eval_line(step, reward, **changes):
    line = {"step": step, "eval/reward": reward, "eval/kl": 0.002 * step, "eval/entropy": 1.6, "eval/mean_length": 38.0}
    line |= {"eval/eos_rate": 0.5, "eval/distinct_2": 0.8, "eval/perplexity_start": 5.0, "eval/clipped_ratio": 0.5}
    return line | {"time/eval": 20.0} | {key.replace("__", "/"): value for key, value in changes.items()}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path):
    """A finished on-policy run: of 10 held-out prompts nine are 0.1 to 0.3 better afterwards, one is worse."""
    path = tmp_path / "run"
    (path / "rollouts").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(make_config()))
    (path / "versions.json").write_text(json.dumps({"torch": "2.13.0", "commit": "abc123"}))
    (path / "summary.json").write_text(json.dumps({"steps": STEPS, "wall_s": 445.8}))
    after = make_eval_line(STEPS, 0.46, **{"eval__mean_length": 20.0})
    lines = [make_eval_line(0, 0.3), *(make_train_line(step) for step in range(1, STEPS + 1)), after]
    write_lines(path / "metrics.jsonl", lines)
    gains = [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, -0.2]
    write_lines(path / "eval/before.jsonl", [make_row(f"p{i}", [0.2, 0.4], "old") for i in range(10)])
    write_lines(path / "eval/after.jsonl", [make_row(f"p{i}", [0.2 + g, 0.4 + g], "new") for i, g in enumerate(gains)])
    for step in range(1, STEPS + 1):
        write_rollouts(path, step)
    return path


def write_rollouts(path, step, num_prompts=3):
    generator = torch.Generator().manual_seed(step)
    rewards = random.Random(step)
    rows = []
    for i in range(num_prompts):
        marks = [(0, "positive"), (1, "negative"), (2, "negative")]
        rows.append(make_row(f"s{step}-{i}", [0.9] + [rewards.uniform(0.1, 0.8) for _ in range(N - 1)], "try", marks))
    rows[0]["prompt"][0]["content"] = rows[0]["responses"][1]["content"] = NASTY
    rows[1]["skip_reason"] = "rewards equal within the tolerance"
    file = path / f"rollouts/step_{step:06d}.jsonl"
    blocks = [torch.nn.functional.normalize(torch.randn(N, 16, generator=generator), dim=1) for _ in rows]
    write_rows_atomic(file, rows)
    write_embeddings(file, blocks)


def report_of(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def text_of(page):
    """What a person reads: scripts and tags taken out."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def figures_of(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.S)
    return [json.loads(text) for text in found]


def maps_of(page):
    return json.loads(re.search(r'<script type="application/json" id="map-data">(.*?)</script>', page, flags=re.S)[1])


def test_the_story_tells_the_paired_result_in_words(run_dir):
    text = text_of(report_of(run_dir))
    # By hand: the gains' squared deviations from their mean 0.16 sum to 0.204, so SE = sqrt(0.204 / 9 / 10) = 0.0476.
    assert "On 10 held-out prompts (2 answers each) the mean reward went from 0.300 to 0.460" in text
    assert "a change of +0.160 with a paired standard error of 0.048" in text
    assert "score higher on 90% of the prompts" in text
    assert "The gain is 3.4 standard errors" in text
    assert "0.300 → 0.460" in text
    assert "Answers became 47% shorter (38.00 → 20.00)" in text
    assert "23 groups were trained on; 4% of the groups taught nothing" in text
    assert "A step took 10.0 s (median): generate 60%, forward_backward 30%, score 10%." in text


def test_no_gain_and_a_loss_are_said_as_plainly_as_a_gain(run_dir):
    noise = [0.1, -0.1] * 5
    write_lines(run_dir / "eval/after.jsonl", [make_row(f"p{i}", [0.2 + g, 0.4 + g]) for i, g in enumerate(noise)])
    assert "chance alone can explain it" in text_of(report_of(run_dir))
    write_lines(run_dir / "eval/after.jsonl", [make_row(f"p{i}", [0.1 - g / 9, 0.2]) for i, g in enumerate(noise)])
    assert "The policy got worse" in text_of(report_of(run_dir))


def test_one_held_out_prompt_has_no_standard_error(run_dir):
    for name, reward in (("before", 0.2), ("after", 0.4)):
        write_lines(run_dir / f"eval/{name}.jsonl", [make_row("p0", [reward, reward])])
    text = text_of(report_of(run_dir))
    assert "a change of +0.200 with a paired standard error of n/a" in text
    assert "chance alone" not in text


def test_every_section_is_there_and_holds_its_numbers(run_dir):
    page = report_of(run_dir)
    text = text_of(page)
    for title in (
        "Reward and loss",
        "Answers before and after",
        "Drift from the start",
        "Lengths",
        "Selected against pool",
        "Map of candidates",
        "Group health",
        "Time",
        "Groups of the last round",
        "Configuration and versions",
    ):
        assert f"<h2>{title}</h2>" in page
    assert 'class="absent"' not in page
    assert "What could not be read" not in text
    assert "distinctness (mean distance of embeddings) 0.900 1.100" in text
    assert "generate 6.00 60.0% 72.0" in text
    assert "rewards equal within the tolerance 12 33%" in text
    assert "2 evaluations took 40.0 s beside the steps" in text
    assert "12 answers were empty, repeated or without a reward" in text
    assert "torch 2.13.0" in text
    names = {trace["name"] for figure in figures_of(page) for trace in figure["data"]}
    assert {"held-out prompts", "positives", "selected negatives", "coverage cost", "forward_backward"} <= names


def test_answers_stand_side_by_side_in_file_order(run_dir):
    text = text_of(report_of(run_dir))
    assert "The first 8 of 10 held-out prompts" in text
    pair = "question p0? before reward 0.200 5 tokens old 0 to p0 after reward 0.300 4 tokens"
    assert pair.replace("5 tokens", "4 tokens") in text
    assert "new 0 to p7" in text
    assert "new 0 to p8" not in text


def test_texts_of_the_run_cannot_become_markup(run_dir):
    rows = [make_row("p0", [0.2, 0.4])]
    rows[0]["responses"][0]["content"] = rows[0]["prompt"][0]["content"] = NASTY
    write_lines(run_dir / "eval/before.jsonl", rows)
    write_lines(run_dir / "eval/after.jsonl", rows)
    page = report_of(run_dir)
    assert "<script>alert" not in page
    assert "<img" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert html.escape(NASTY, quote=False).split(">")[0][:12] in page
    # plotly reads hover texts as HTML once more, so there they are escaped before they become JSON.
    hovers = [
        t
        for step in maps_of(page)
        for view in step["views"]
        for tr in view["figure"]["data"]
        for t in tr.get("text", [])
    ]
    assert any("&lt;script&gt;alert" in hover for hover in hovers)
    assert not any("<script" in hover or "<img" in hover for hover in hovers)


def test_the_map_shows_a_few_steps_and_marks_what_was_selected(run_dir):
    steps = maps_of(report_of(run_dir))
    assert [step["name"] for step in steps] == ["step 1", "step 5", "step 8", "step 12"]
    assert steps[-1]["views"][0]["name"] == "all prompts"
    assert len(steps[-1]["views"]) == 1 + 3
    every, one = (steps[-1]["views"][i]["figure"]["data"] for i in (0, 2))
    counts = {trace["name"]: len(trace["x"]) for trace in every}
    assert counts == {"not selected": 9, "selected negative": 6, "positive": 3}
    counts = {trace["name"]: len(trace["x"]) for trace in one}
    # Three points (from, to, pen up) for each candidate that was not selected.
    assert counts == {"nearest selected": 9, "not selected": 3, "selected negative": 2, "positive": 1}


def test_the_plane_is_that_of_a_principal_component_analysis():
    generator = torch.Generator().manual_seed(0)
    point_nE = torch.randn(40, 5, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    xy_n2, share_2 = principal_plane(point_nE + 7.0)
    variance_E = torch.linalg.eigvalsh(torch.cov(point_nE.T)).flip(0)
    torch.testing.assert_close(xy_n2.var(0), variance_E[:2])
    torch.testing.assert_close(share_2, variance_E[:2] / variance_E.sum())
    # The same points the other way round lie at the same places: signs are fixed.
    torch.testing.assert_close(principal_plane(point_nE.flip(0) + 7.0)[0], xy_n2.flip(0))


@pytest.mark.parametrize("point_nE", [torch.ones(4, 3), torch.randn(1, 3), torch.tensor([[0.0], [1.0], [2.0]])])
def test_points_without_a_plane_still_get_places(point_nE):
    xy_n2, share_2 = principal_plane(point_nE.double())
    assert xy_n2.shape == (len(point_nE), 2)
    assert torch.isfinite(xy_n2).all()
    assert torch.isfinite(share_2).all()


def test_an_offline_run_without_evaluation_says_what_is_missing(tmp_path):
    config = make_config(data={"train": "pairs.jsonl", "eval": None})
    config["rollout"] |= {"engine": "data"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = make_train_line(1)
    line = {key: value for key, value in line.items() if not key.startswith(("selected/", "pool/", "time/"))}
    write_lines(tmp_path / "metrics.jsonl", [line])
    text = text_of(report_of(tmp_path))
    for sentence in (
        "Each prompt's responses were given with the data",
        "whether it got better is not known",
        "drift was not measured",
        "The run has no held-out answers from before and after",
        "No step has logged both the pool and what was selected",
        "The run has kept no rollouts",
        "No phase times were logged",
        "still going, or was stopped before its end",
    ):
        assert sentence in text
    assert "held-out prompts ±" not in text


def test_drift_needs_two_evaluations(run_dir):
    write_lines(run_dir / "metrics.jsonl", [make_eval_line(0, 0.3), make_train_line(1)])
    assert "Only one evaluation so far, at step 0" in text_of(report_of(run_dir))


def test_a_run_killed_before_its_first_step_still_gets_a_report(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/rew')
    text = text_of(report_of(tmp_path))
    assert "No training step has been logged" in text


def test_broken_lines_are_named_and_the_rest_is_shown(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("not json\n")
    after = run_dir / "eval/after.jsonl"
    lines = after.read_text().splitlines()
    lines[2], lines[4] = lines[2][:40], '{"id": "p4", "prompt": []}'
    after.write_text("\n".join([*lines, lines[0]]) + "\n")
    last = run_dir / f"rollouts/step_{STEPS:06d}.jsonl"
    last.write_text("torn\n" + "\n".join(last.read_text().splitlines()[1:]) + "\n")
    (run_dir / "versions.json").write_text("{")
    text = text_of(report_of(run_dir))
    assert "What could not be read" in text
    for place in ("metrics.jsonl:15:", "after.jsonl:3: not JSON", "after.jsonl:5: not a row", "after.jsonl:11: id 'p0'",
                  f"step_{STEPS:06d}.jsonl:1: not JSON", "No map of step 12", "versions.json: not JSON"):  # fmt: skip
        assert place in text
    assert "On 8 held-out prompts" in text
    assert "2 of 2 groups of the round that began with step 12" in text


def test_missing_embeddings_cost_only_the_map(run_dir):
    for file in (run_dir / "rollouts").glob("*.safetensors"):
        file.unlink()
    text = text_of(report_of(run_dir))
    assert "No rollouts with embeddings could be read" in text
    assert "Groups of the last round 3 of 3 groups" in text


def test_a_round_that_is_being_sampled_is_not_read(run_dir):
    (run_dir / f"rollouts/step_{STEPS + 1:06d}.partial.jsonl").write_text("{")
    run = load_run(run_dir)
    assert list(run.rollouts) == list(range(1, STEPS + 1))


def test_numbers_that_are_null_leave_gaps(run_dir):
    lines = [make_train_line(step) for step in range(1, 6)]
    lines[2] |= {"loss": None, "grad_norm": None, "selected/reward": None}
    write_lines(run_dir / "metrics.jsonl", lines)
    page = report_of(run_dir)
    loss = next(trace for f in figures_of(page) for trace in f["data"] if trace["name"] == "loss")
    assert loss["y"] == [2.0, 1.0, None, 0.5, 0.4]


def test_long_runs_are_drawn_as_means_over_bins():
    rows = [{"step": i + 1, "loss": float(i % 10)} for i in range(10 * MAX_POINTS)]
    steps, values = series(rows, "loss")
    assert len(steps) == MAX_POINTS
    assert steps[-1] == 10 * MAX_POINTS
    assert set(values) == {4.5}


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path)


def test_scan_rows_keeps_a_row_whose_text_has_line_separators(tmp_path):
    row = make_row("a", [0.5])
    row["responses"][0]["content"] = "one\u2028two\x85three"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert scan_rows(tmp_path / "rows.jsonl") == ([row], [])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_draws_every_chart_without_an_error_or_the_network(run_dir, tmp_path):
    page = report_of(run_dir)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (run_dir / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "data-errors" not in done.stdout[:2000]
    drawn = re.findall(r'<svg class="main-svg"', done.stdout)
    num_charts = len(figures_of(page)) + 1  # and the map
    # plotly lays two or three main-svg over each other for one chart.
    assert len(drawn) >= 2 * num_charts
    assert done.stdout.count('class="scatterlayer') >= num_charts
    assert 'class="barlayer' in done.stdout
    # The map: 18 candidates as points, and the pickers filled by the page's script.
    drawn_map = done.stdout[done.stdout.index('id="map-plot"') : done.stdout.index('id="map-data"')]
    assert drawn_map.count('class="point"') >= 18
    assert '<option value="3">step 12</option>' in done.stdout
