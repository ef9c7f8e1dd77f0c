"""The loop on a tiny model, with real processes, real kills and real signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import config, group
from runs import command, comparable, of_other_modes, reached, write_run
from transformers import GPT2Config, GPT2LMHeadModel

from ampo_fast import preview
from ampo_fast.config import load_config
from ampo_fast.embeddings import PolicyEmbedder
from ampo_fast.evaluation import response_logp
from ampo_fast.margins_fit import gamma_for_agreement
from ampo_fast.metrics import read_metrics
from ampo_fast.model import Policy
from ampo_fast.preview import dry_run
from ampo_fast.trainer import Trainer, train
from ampo_fast.update import Updater

WHOLE = [
    "config.json",
    "versions.json",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "final/config.json",
    "final/model.safetensors",
    "final/README.md",
    "eval/before.jsonl",
    "eval/after.jsonl",
    "eval/step_000003.jsonl",
    "rollouts/step_000001.jsonl",
    "rollouts/step_000001.safetensors",
    "checkpoints/step_000006/state.json",
]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """One uninterrupted run through the command line."""
    config = write_run(tmp_path_factory.mktemp("run"), tiny_model)
    argv, env = command(config)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return config, Path(config).parent / "runs" / "r", done


def test_the_last_line_is_the_summary_and_the_run_directory_is_whole(finished):
    _, run_dir, done = finished
    summary = json.loads(done.stdout.splitlines()[-1])
    wanted = {"run_dir", "steps", "reward_before", "reward_after", "reward_se", "win_rate", "wall_s", "peak_rss_mib"}
    assert wanted <= summary.keys()
    assert (summary["steps"], summary["trained_groups"]) == (6, 12)
    for name in WHOLE:
        assert (run_dir / name).is_file(), name
    assert not list((run_dir / "rollouts").glob("*partial*"))
    steps = [row["step"] for row in comparable(run_dir) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    first = next(row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] == 1)
    rate = first["perf/trained_tokens_per_second"]
    assert rate * first["time/step"] == pytest.approx(first["num_tokens"])
    assert first["perf/wasted_tokens_per_second"] == 0


def test_whoever_the_umask_lets_read_can_read_every_file_of_a_run(finished):
    assert not of_other_modes(finished[1])


def test_the_reward_rises(finished):
    rewards = [row["eval/reward"] for row in comparable(finished[1]) if "eval/reward" in row]
    assert rewards[-1] > rewards[0]


def test_fresh_samples_equal_the_trainers_log_probs(finished):
    rows = [row for row in comparable(finished[1]) if "sampling/sampling_logp_difference/max" in row]
    assert [row["step"] for row in rows] == [1, 3, 5]  # the first update of each round is on-policy
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3


def test_an_existing_run_is_not_overwritten_and_another_config_not_resumed(finished):
    config, run_dir, _ = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    argv, env = command(config)
    again = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    argv, env = command(config, "--resume", "auto", "--optim.lr", "0.5")
    other = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "optim.lr" in other.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kill_at", ["step_000003.partial", '"step": 4, "loss"', "step_000004"])
def test_kill_9_and_resume_give_the_same_metrics_bit_for_bit(finished, tiny_model, tmp_path, kill_at):
    """Killed while sampling, between an update and its checkpoint, and right after a checkpoint."""
    config = write_run(tmp_path, tiny_model)
    run_dir = tmp_path / "runs" / "r"
    argv, env = command(config)
    running = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline and not reached(run_dir, kill_at):
        time.sleep(0.002)
    assert running.poll() is None, "the run ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    argv, env = command(config, "--resume", "auto")
    resumed = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(run_dir) == comparable(finished[1])
    for name in ("rollouts/step_000005.jsonl", "eval/after.jsonl"):
        assert (run_dir / name).read_bytes() == (finished[1] / name).read_bytes()


def test_a_run_is_not_resumed_on_changed_data(tiny_model, tmp_path):
    path = write_run(tmp_path, tiny_model, run={"steps": 2}, eval={"prompts": 0})
    train(load_config(str(path)))
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().replace("say sun", "say soon"))
    before = (tmp_path / "runs/r/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"data\.train gives other prompts"):
        train(load_config(str(path)), resume=True)
    assert (tmp_path / "runs/r/metrics.jsonl").read_bytes() == before


def test_sigterm_saves_and_leaves_cleanly(finished, tiny_model, tmp_path):
    config = write_run(tmp_path, tiny_model)
    run_dir = tmp_path / "runs" / "r"
    argv, env = command(config)
    running = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not reached(run_dir, '"step": 1'):
        time.sleep(0.002)
    running.terminate()
    out, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    assert json.loads(out.splitlines()[-1])["stopped"] == "SIGTERM"
    argv, env = command(config, "--resume", "auto")
    assert subprocess.run(argv, env=env, capture_output=True, check=False).returncode == 0
    assert comparable(run_dir) == comparable(finished[1])


def test_an_evaluation_that_a_signal_left_out_is_made_up_for(finished, tiny_model, tmp_path, monkeypatch):
    config = load_config(str(write_run(tmp_path, tiny_model)))
    train_step = Updater.step

    def signalled(self, selected, step, *more):
        if step == 2:  # an evaluation is due after it
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, selected, step, *more)

    def killed(*_):
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "step", signalled)
        assert train(config) == {"run_dir": str(config.run_dir), "steps": 3, "stopped": "SIGTERM"}
    with monkeypatch.context() as patched:
        patched.setattr(Updater, "step", killed)  # after it was made up for, before a checkpoint knows of it
        with pytest.raises(InterruptedError):
            train(config, resume=True)
    train(config, resume=True)
    made, wanted = (
        {row["step"]: row["eval/reward"] for row in comparable(run_dir) if "eval/reward" in row}
        for run_dir in (config.run_dir, finished[1])
    )
    assert made == pytest.approx(wanted, rel=1e-3)  # this process may have more threads
    assert (config.run_dir / "eval/step_000003.jsonl").is_file()
    kept = json.loads((config.run_dir / "checkpoints/step_000006/state.json").read_text())["state"]
    assert kept["best_reward"] == pytest.approx(max(made[0], made[3]), rel=1e-6)


@pytest.mark.parametrize("rewards", [(0.5, 0.4, 0.6), (0.5, 0.6, 0.4), (0.5, 0.4, 0.3)], ids=["last", "middle", "none"])
def test_best_is_the_policy_of_the_best_evaluation_the_first_and_the_last_included(
    tiny_model, tmp_path, monkeypatch, rewards
):
    found = iter(rewards)

    def measured(*_):
        return SimpleNamespace(scored=[], metrics={"eval/reward": next(found), "eval/kl": 0.0})

    monkeypatch.setattr(Trainer, "_measure", measured)
    monkeypatch.setattr(Trainer, "_summarise", lambda *_: {"steps": 6, "trained_groups": 1})
    path = write_run(tmp_path, tiny_model, checkpoint={"every": 3, "save_best": True})
    train(load_config(str(path)))
    best, weights = rewards.index(max(rewards)), "model.safetensors"
    assert (tmp_path / "runs/r/best" / weights).is_file() is (best > 0)
    if best:
        same = (tmp_path / "runs/r/best" / weights).read_bytes() == (tmp_path / "runs/r/final" / weights).read_bytes()
        assert same is (best == 2)


@pytest.mark.parametrize(
    ("sections", "is_kept"),
    [({"loss": {"name": "DPO"}}, True), ({"loss": {"name": "DPO"}, "reference": {"every": 1}}, False), ({}, False)],
    ids=["frozen", "moves", "none"],
)
def test_evaluations_use_the_frozen_reference_as_the_start(tiny_model, sections, is_kept):
    made = config(model={"path": str(tiny_model)}, **sections)
    policy = Policy.load(made.model)
    trainer = SimpleNamespace(config=made, policy=policy, updater=Updater(made, policy))
    with Trainer._start(trainer) as start:
        assert (trainer.updater.reference is not None and start is trainer.updater.reference.model) is is_kept
        for ours, theirs in zip(start.parameters(), Policy.load(made.model).parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_an_adapters_start_is_its_base_and_takes_no_memory_of_its_own(tiny_model):
    plain, lora = {"path": str(tiny_model)}, {"rank": 2}
    policy = Policy.load(config(model=plain | {"lora": lora}).model)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trainer = SimpleNamespace(policy=policy, updater=SimpleNamespace(reference=None))
    groups = [group(["a", "b"], 0, (0, 3, 10, 11))]
    wanted = response_logp(Policy.load(config(model=plain).model), groups, 1000)
    with Trainer._start(trainer) as start:
        assert start is policy
        assert torch.equal(response_logp(start, groups, 1000), wanted)
    assert not torch.equal(response_logp(policy, groups, 1000), wanted)


@pytest.mark.parametrize(
    ("stop", "lr", "said", "steps"),
    [({"patience": 2}, 1e-9, r"eval\.patience", 2), ({"max_kl": 1e-9}, 3e-3, r"eval\.max_kl", 1)],
)
def test_an_early_stop_ends_whole_and_stays_the_end_after_a_kill(
    tiny_model, tmp_path, monkeypatch, stop, lr, said, steps
):
    path = write_run(tmp_path, tiny_model, eval={"every": 1, "prompts": 2} | stop, optim={"lr": lr})
    config, run_dir = load_config(str(path)), tmp_path / "runs/r"

    def kill(*_):
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_finish", kill)
        with pytest.raises(InterruptedError):
            train(config)
    before = comparable(run_dir)
    for _ in range(2):  # also a run that has come to its end may be resumed
        summary = train(config, resume=True)
        assert summary["steps"] == steps
        assert re.search(said, summary["stopped"])
        assert comparable(run_dir) == before
    for name in ("final/model.safetensors", "report.html", "summary.json"):
        assert (run_dir / name).is_file(), name
    last = run_dir / f"eval/step_{steps:06d}.jsonl"
    assert (run_dir / "eval/after.jsonl").read_bytes() == last.read_bytes()


def losses(tmp_path, tiny_model, name, **sections):
    path = write_run(tmp_path, tiny_model, **sections)
    config = load_config(str(path), ["--run.name", name, "--data.eval", str(tmp_path / "eval.jsonl")])
    train(config)
    rows = comparable(tmp_path / "runs" / name)
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


def test_micro_batches_do_not_change_the_step(tiny_model, tmp_path):
    one = losses(tmp_path, tiny_model, "one", run={"steps": 3}, eval={"prompts": 0})
    many = losses(
        tmp_path, tiny_model, "many", run={"steps": 3}, eval={"prompts": 0}, optim={"micro_batch_tokens": 130}
    )
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-4)


def test_degenerate_groups_are_skipped_and_counted(tiny_model, tmp_path, capsys):
    path = write_run(
        tmp_path, tiny_model, run={"steps": 2}, reward={"kind": "toy_rewards:constant"}, eval={"prompts": 0}
    )
    summary = train(load_config(str(path)))
    rows = comparable(tmp_path / "runs" / "r")
    assert [row["group/trained"] for row in rows] == [0, 0]
    assert summary["trained_groups"] == 0
    shown = capsys.readouterr().err
    assert shown.count("warning: step") == 1
    assert "step 1 trains on no group: rewards equal within the tolerance (2 of 2); see reward.kind" in shown
    assert "trained 0/2" in shown
    assert "not trained: none of the 4 groups" in (tmp_path / "runs/r/final/README.md").read_text()
    assert [row["group/degenerate"] for row in rows] == [1.0, 1.0]
    assert all("loss" not in row for row in rows)
    from safetensors.torch import load_file

    start, end = (
        load_file(Path(tiny_model) / "model.safetensors"),
        load_file(tmp_path / "runs/r/final/model.safetensors"),
    )
    assert all(torch.equal(start[name], end[name]) for name in end)


def test_missing_rewards_stop_the_run_and_keep_the_samples(tiny_model, tmp_path):
    path = write_run(tmp_path, tiny_model, reward={"kind": "toy_rewards:broken"}, eval={"prompts": 0})
    with pytest.raises(ValueError, match="missing or not finite"):
        train(load_config(str(path)))
    assert (tmp_path / "runs/r/rollouts/step_000001.partial.jsonl").stat().st_size > 0


@pytest.mark.parametrize(("kind", "num_prompts"), [("missing_tea", 3), ("broken", None)])
def test_unscored_held_out_answers_do_not_end_a_trained_run(tiny_model, tmp_path, capsys, kind, num_prompts):
    reward = {"kind": f"toy_rewards:{kind}", "max_missing_share": 1.0}
    path = write_run(tmp_path, tiny_model, run={"steps": 1}, reward=reward, eval={"every": 0})
    summary = train(load_config(str(path)))
    assert summary.get("num_prompts") == num_prompts
    assert "[none]" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/r/summary.json").read_text()) == summary
    assert (tmp_path / "runs/r/final/README.md").is_file()


def test_the_model_is_exported_before_anything_is_said_of_it(tiny_model, tmp_path, monkeypatch):
    path = write_run(tmp_path, tiny_model, run={"steps": 1}, eval={"every": 0})
    monkeypatch.setattr("ampo_fast.trainer.paired_summary", lambda before, after: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(load_config(str(path)))
    assert (tmp_path / "runs/r/final/model.safetensors").is_file()


def test_what_the_data_lacks_is_said_before_the_run_begins(tiny_model, tmp_path):
    path = write_pairs(tmp_path, tiny_model, pair_rows(), reward={"kind": "data:help"})
    with pytest.raises(ValueError, match=r"'data:help'.*pairs\.jsonl:1 have no scores by name"):
        train(load_config(str(path)))
    with pytest.raises(ValueError, match=r"^data\.eval = '.*none\.jsonl' does not exist"):
        train(load_config(str(path), ["--data.eval", str(tmp_path / "none.jsonl")]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--loss.name", "AMPOO"], "known: AMPO"),
        (["--run.trackers", '["wandb"]'], "pip install wandb"),
        (["--reward.kind", "nowhere:judge"], "'nowhere:judge' cannot be imported"),
        (["--eval.reward", "classifier:./nowhere"], r"the classifier of eval\.reward = './nowhere' does not exist"),
        (["--data.train", "none.jsonl"], r"none\.jsonl' does not exist"),
        (["--run.name", "taken"], "already holds a run"),
    ],
)
def test_what_takes_no_model_to_see_is_said_before_one_is_loaded(tiny_model, tmp_path, monkeypatch, override, message):
    taken = tmp_path / "runs/taken"
    taken.mkdir(parents=True)
    (taken / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(Policy, "load", lambda config: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, ImportError), match=message):
        train(load_config(str(write_run(tmp_path, tiny_model)), override))
    assert list((tmp_path / "runs").iterdir()) == [taken]


def test_offline_training_from_multi_response_data(tiny_model, tmp_path):
    rows = [
        {
            "id": str(i),
            "prompt": f"q{i}",
            "responses": [{"content": "aeiou"[: j + 1] * 2, "reward": j / 4} for j in range(5)],
        }
        for i in range(6)
    ]
    rows[2]["responses"][1]["reward"] = None
    rows[3]["responses"][0]["content"] = ""
    data = tmp_path / "offline.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_run(
        tmp_path, tiny_model, run={"steps": 3}, data={"train": str(data)}, rollout={"engine": "data"},
        reward={"kind": "data"}, eval={"reward": "toy_rewards:vowels"},
    )  # fmt: skip
    summary = train(load_config(str(path)))
    assert summary["steps"] == 3
    rows = [row for row in comparable(tmp_path / "runs/r") if "loss" in row]
    assert len(rows) == 3
    assert sum(row["group/invalid"] for row in rows) == 2


def test_a_resumed_run_goes_on_counting_steps_without_a_finite_loss(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ampo_fast.update.guarded_step", lambda *_: (float("nan"), False))
    path = write_run(tmp_path, tiny_model, eval={"every": 0, "prompts": 0})
    for resume in (False, True):
        with pytest.raises(ValueError, match="3 steps in a row"):
            train(load_config(str(path)), resume=resume)
    noted = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "update left out" in line]
    assert noted == ["step 1", "step 2", "step 3", "step 3"]  # saved at step 2, with two in a row


def test_texts_beyond_the_embedders_window_are_counted_in_the_summary(tiny_model, tmp_path, monkeypatch):
    embed = PolicyEmbedder.embed

    def windowed(self, texts):
        self.num_windowed += len(texts)
        return embed(self, texts)

    monkeypatch.setattr(PolicyEmbedder, "embed", windowed)
    path = write_run(tmp_path, tiny_model, run={"steps": 1}, eval={"prompts": 0})
    assert train(load_config(str(path)))["num_windowed"] == 4 * 6


def test_a_run_of_epochs_ends_with_the_data_and_is_resumed_as_one(tiny_model, tmp_path):
    path = write_run(tmp_path, tiny_model, run={"epochs": 0.5}, eval={"every": 0}, rollout={"prompts_per_round": 0})
    config = load_config(str(path))
    assert train(config)["steps"] == 3  # of 10 prompts, 2 a step
    assert read_metrics(tmp_path / "runs/r/metrics.jsonl")[-2]["epoch"] == pytest.approx(0.6)
    assert json.loads((tmp_path / "runs/r/config.json").read_text())["run"]["steps"] == 3
    assert train(config, resume=True)["steps"] == 3


def test_an_unknown_loss_and_a_wrong_field_are_named(tiny_model, tmp_path):
    path = write_run(tmp_path, tiny_model)
    with pytest.raises(ValueError, match=r"loss\.name.*AMPO"):
        train(load_config(str(path), ["--loss.name", "AMPOO"]))
    with pytest.raises(ValueError, match=r"loss\.params = .*AMPO has no field betta; its fields: .*beta, .*gamma"):
        train(load_config(str(path), ["--loss.params.betta", "3"]))


def test_dry_run_shows_groups_and_cost_and_writes_nothing(tiny_model, tmp_path):
    config = write_run(tmp_path, tiny_model)
    argv, env = command(config, "--dry-run")
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("context (no target)") == 3
    for text in ("TFLOP per step", "1 + 3", "all 6", "memory, estimated", "BOS", "over the limit"):
        assert text in done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_memory_estimate_counts_the_reference_and_needs_no_field_that_gpt_2_lacks(tiny_model, tmp_path, capsys):
    plain = shutil.copytree(tiny_model, tmp_path / "gpt2")
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "vocab_size": 261}
    GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=1)).save_pretrained(plain)
    for model, loss, counted in ((plain, "AMPO", False), (tiny_model, "SWEPO", True)):
        dry_run(load_config(str(write_run(tmp_path, model, loss={"name": loss}))))
        memory = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory, estimated"))
        assert ("the reference" in memory) == counted


def test_a_dry_run_counts_no_start_of_an_engine_as_sampling(monkeypatch):
    clock = SimpleNamespace(now=0.0, events=[])

    def passing(event, seconds, answer=None):
        def run(*arguments):
            clock.events.append(event)
            clock.now += seconds
            return answer

        return run

    engine = SimpleNamespace(
        start=passing("start", 100.0), generate=passing("generate", 3.0, ["group"]), close=passing("close", 0.0)
    )
    monkeypatch.setattr(preview, "make_engine", lambda config, policy: engine)
    monkeypatch.setattr(preview, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert preview._sampled([], None, config()) == (["group"], 3.0)
    assert clock.events == ["start", "generate", "close"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--loss.name", "Nonsense"], r"loss\.name = 'Nonsense'; known: AMPO"),
        (["--loss.params.bogus", "1"], r"loss\.params = .*bogus"),
        (["--optim.micro_batch_tokens", "8"], r"optim\.micro_batch_tokens = 8 cannot hold"),
        (["--optim.prompts_per_step", "40", "--rollout.prompts_per_round", "0"], "a round needs 40 prompts"),
        (["--eval.reward", "nowhere:judge"], "'nowhere:judge' cannot be imported"),
    ],
)
def test_a_dry_run_refuses_what_training_refuses(tiny_model, tmp_path, override, message):
    config = load_config(str(write_run(tmp_path, tiny_model)), override)
    for start in (dry_run, train):
        with pytest.raises(ValueError, match=message):
            start(config)


# --- pairs ------------------------------------------------------------------------------------------------------------


def write_pairs(tmp_path, tiny_model, rows, **sections):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    offline = {
        "run": {"steps": 4}, "data": {"train": str(data)}, "rollout": {"engine": "data", "prompts_per_round": 0},
        "reward": {"kind": "data"}, "eval": {"reward": "toy_rewards:vowels", "every": 0}, "select": {"k": 1},
    }  # fmt: skip
    return write_run(tmp_path, tiny_model, **(offline | sections))


def pair_rows(margins=(0.5, 0.1, 0.0, 0.9)):
    return [
        {"id": str(i), "prompt": f"q{i}", "chosen": "aei" * (i + 1), "rejected": "xyz" * (i + 1),
         "chosen_score": 0.05 + m, "rejected_score": 0.05}
        for i, m in enumerate(margins)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "DPO"},
        {"name": "MMPO", "params": {"beta": 0.5, "gamma": 2.2}},
        {"name": "MMPO", "params": {"beta": 0.5, "gamma": {"agreement": 0.7}}},
        {"name": "SimPO", "params": {"beta": 2.0, "gamma": 0.5}},
        {"name": "MMDPO"},
    ],
)
def test_pairs_train_every_pairwise_loss(tiny_model, tmp_path, loss):
    path = write_pairs(tmp_path, tiny_model, pair_rows(), loss=loss, optim={"prompts_per_step": 4, "lr": 3e-4})
    train(load_config(str(path)))
    rows = [row for row in comparable(tmp_path / "runs/r") if "loss" in row]
    # The tie has a target of 1/2 with MMPO; a hard label has none to give.
    assert {row["group/trained"] for row in rows} == {4 if loss["name"] == "MMPO" else 3}
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(("name", "params"), [("MMPO", {"gamma": {"agreement": 0.7}}), ("BMC", {})])
def test_the_first_loss_is_that_of_an_untrained_policy(tiny_model, tmp_path, name, params):
    # Policy and reference are equal at first, so beta z = 0 and every pair's loss is log 2, whatever target or weights.
    path = write_pairs(
        tmp_path,
        tiny_model,
        pair_rows(),
        loss={"name": name, "params": params},
        optim={"prompts_per_step": 4},
    )
    summary = train(load_config(str(path), ["--run.steps", "1"]))
    assert summary.get("gamma") == (pytest.approx(gamma_for_agreement([0.5, 0.1, 0.0, 0.9], 0.7)) if params else None)
    (row,) = [row for row in comparable(tmp_path / "runs/r") if "loss" in row]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-4)


def test_a_gamma_that_cannot_be_fitted_is_named(tiny_model, tmp_path):
    fit = {"name": "MMPO", "params": {"gamma": {"fit": "labels"}}}
    path = write_pairs(tmp_path, tiny_model, pair_rows(), loss=fit)
    with pytest.raises(ValueError, match=r"loss\.params.*sign of the margin"):
        train(load_config(str(path)))
    with pytest.raises(ValueError, match=r"raw rewards.*minmax"):
        train(load_config(str(path), ["--reward.normalize", "minmax"]))


def test_labels_against_scores_are_refused_or_counted_and_the_scores_trusted(tiny_model, tmp_path, caplog):
    rows = pair_rows((0.5, 0.1, -0.02, 0.9))
    path = write_pairs(tmp_path, tiny_model, rows, loss={"name": "DPO"}, optim={"prompts_per_step": 4})
    with pytest.raises(
        ValueError, match=r"scores below the rejected one in 1 of 4 pairs \(2\); set data\.disagreement"
    ):
        train(load_config(str(path)))
    with caplog.at_level("WARNING"):
        train(load_config(str(path), ["--run.steps", "1", "--data.disagreement", "scores"]))
    assert "disagree in 1 of 4 pairs" in caplog.text
    row = next(
        json.loads(line) for line in (tmp_path / "runs/r/rollouts/step_000001.jsonl").open() if '"id": "2"' in line
    )
    assert [r["selected"] for r in row["responses"]] == ["negative", "positive"]
