"""Each stage alone, from file to file: what it writes, that it resumes byte for byte, and what it refuses."""

import hashlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ampo_fast import stages
from ampo_fast.config import build_config
from ampo_fast.report import write_stage_page
from ampo_fast.rollouts.protocol import IncompleteBatch
from ampo_fast.stage_files import embeddings_path, read_embeddings, read_rows, scored_from_row, write_rows_atomic
from ampo_fast.types import Candidate, CandidateGroup
from ampo_fast.vllm import process

HERE = Path(__file__).parent
N = 4


def make_config(**sections):
    values = {"data": {"train": "unused.jsonl"}, "model": {"path": "tiny"}, "run": {"seed": 3}}
    values |= {"rollout": {"n": N, "batch_rows": 2 * N}, "select": {"k": 2}}
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return build_config(values)


def encode_prompt(messages):
    return tuple(range(len(messages[-1]["content"])))


class FakeEngine:
    """Answers that betray which prompts were answered together: only whole batches redone give the same bytes."""

    answers_singly = answers_for_all = False

    def __init__(self):
        self.batches, self.is_closed = [], False

    def generate(self, prompts, n, sampling, keep):
        self.batches.append([prompt.id for prompt in prompts])
        together = "+".join(prompt.id for prompt in prompts)
        keep([
            CandidateGroup(
                prompt=prompt,
                prompt_ids=encode_prompt(prompt.messages),
                candidates=tuple(
                    Candidate(
                        content=f"{prompt.id}.{i} ({together}, {sampling.seed})", token_ids=(i, 2), logp=(-0.1, -i)
                    )
                    for i in range(n)
                ),
            )
            for prompt in prompts
        ])  # fmt: skip

    def close(self):
        self.is_closed = True


class FakeEmbedder:
    def __init__(self):
        self.texts = []

    def embed(self, texts):
        self.texts.append(list(texts))
        raw = [list(hashlib.sha256(text.encode()).digest()[:3]) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(raw).float() + 1, dim=1)


def fake_reward(groups):
    """Longer ids and later candidates are worth more; one answer has no reward."""
    return [[None if (g.prompt.id, i) == ("p1", 0) else i / 3 for i in range(len(g.candidates))] for g in groups]


def use_policy(monkeypatch, policy):
    monkeypatch.setattr(stages, "Policy", SimpleNamespace(load=lambda config: policy))


@pytest.fixture
def fakes(monkeypatch):
    made = SimpleNamespace(engines=[], embedders=[], scored=[])
    use_policy(monkeypatch, SimpleNamespace(encode_prompt=encode_prompt, rope_limit=None, context_length=None))

    def make_engine(config, policy):
        made.engines.append(FakeEngine())
        return made.engines[-1]

    def make_embedder(config, policy):
        made.embedders.append(FakeEmbedder())
        return made.embedders[-1]

    def reward_fn(groups):
        made.scored.append([group.prompt.id for group in groups])
        return fake_reward(groups)

    monkeypatch.setattr(stages, "make_engine", make_engine)
    monkeypatch.setattr(stages, "make_embedder", make_embedder)
    monkeypatch.setattr(stages, "make_reward", lambda config: reward_fn)
    monkeypatch.setattr(stages, "_BATCH_PROMPTS", 2)
    return made


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    # Lengths out of order, so that batches are not neighbours in the file.
    lengths = [5, 1, 4, 2, 3]
    rows = [{"id": f"p{i}", "prompt": "x" * length} for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pipeline(tmp_path, prompts, fakes):
    """All four stages run once: the paths of their outputs."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("generate", "score", "embed", "select")}
    config, source = make_config(), prompts
    for name, path in paths.items():
        assert getattr(stages, name)(config, source, path) == 5
        source = path
    return paths


# --- what is written --------------------------------------------------------------------------------------------------


def test_generate_writes_one_row_per_prompt_in_the_inputs_order(pipeline, fakes):
    rows = read_rows(pipeline["generate"])
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert fakes.engines[0].batches == [["p1", "p3"], ["p4", "p2"], ["p0"]]
    assert fakes.engines[0].is_closed
    assert [len(row["responses"]) for row in rows] == [N] * 5
    assert rows[3]["responses"][1]["content"] == "p3.1 (p1+p3, 3)"
    assert rows[3]["responses"][1]["logp"] == [-0.1, -1]
    assert rows[3]["responses"][1]["reward"] is None


def test_servers_are_asked_for_many_prompts_at_a_time(tmp_path, prompts, fakes, monkeypatch):
    monkeypatch.setattr(FakeEngine, "answers_for_all", True)
    stages.generate(make_config(), prompts, tmp_path / "g.jsonl")
    assert fakes.engines[0].batches == [["p0", "p1", "p2", "p3", "p4"]]


def test_generate_reads_data_train_without_an_input(tmp_path, prompts, fakes):
    config = make_config(data={"train": str(prompts)})
    assert stages.generate(config, None, tmp_path / "g.jsonl") == 5


def test_score_adds_raw_and_normalised_rewards_without_embeddings(pipeline, fakes):
    rows = read_rows(pipeline["score"])
    assert [r["reward_raw"] for r in rows[0]["responses"]] == [0.0, 1 / 3, 2 / 3, 1.0]
    assert [r["reward_raw"] for r in rows[1]["responses"]] == [None, 1 / 3, 2 / 3, 1.0]
    assert [r["reward"] for r in rows[1]["responses"]] == [None, 0.0, pytest.approx(0.5), 1.0]
    assert not embeddings_path(pipeline["score"]).exists()


def test_embed_stacks_rows_in_file_order(pipeline):
    rows = read_rows(pipeline["embed"])
    assert rows == read_rows(pipeline["score"])
    blocks = read_embeddings(pipeline["embed"], [N] * 5)
    expected = FakeEmbedder().embed([response["content"] for row in rows for response in row["responses"]])
    assert torch.equal(torch.cat(blocks), expected)
    assert not list(pipeline["embed"].parent.glob("*.parts"))


def test_select_marks_one_positive_and_k_negatives_and_keeps_the_embeddings(pipeline):
    rows = read_rows(pipeline["select"])
    for row in rows:
        marks = [response["selected"] for response in row["responses"]]
        assert marks[3] == "positive"
        assert marks.count("negative") == 2
        assert row["skip_reason"] is None
        assert row["cost"] >= 0.0
    assert rows[1]["responses"][0]["selected"] is None  # without a reward
    assert embeddings_path(pipeline["select"]).read_bytes() == embeddings_path(pipeline["embed"]).read_bytes()


def test_select_is_what_the_trainer_would_select(pipeline):
    from ampo_fast.select import RewardTolerance, select_groups

    rows, config = read_rows(pipeline["embed"]), make_config()
    blocks = read_embeddings(pipeline["embed"], [N] * 5)
    scored = [scored_from_row(row, block) for row, block in zip(rows, blocks, strict=True)]
    expected = select_groups(scored, config, RewardTolerance(None).update(scored))
    for row, group in zip(read_rows(pipeline["select"]), expected, strict=True):
        marks = [response["selected"] for response in row["responses"]]
        assert [i for i, mark in enumerate(marks) if mark == "positive"] == list(group.positive)
        assert [i for i, mark in enumerate(marks) if mark == "negative"] == sorted(group.negative)


def test_degenerate_group_carries_its_reason(tmp_path, pipeline):
    rows = read_rows(pipeline["embed"])
    for response in rows[2]["responses"]:
        response |= {"reward_raw": 0.5, "reward": 0.5}
    equal = tmp_path / "equal.jsonl"
    write_rows_atomic(equal, rows, read_embeddings(pipeline["embed"], [N] * 5))
    stages.select(make_config(), equal, tmp_path / "out.jsonl")
    row = read_rows(tmp_path / "out.jsonl")[2]
    assert row["skip_reason"] == "rewards equal within the tolerance"
    assert row["cost"] is None
    assert all(response["selected"] is None for response in row["responses"])


def test_embedding_before_scoring_gives_the_same(tmp_path, pipeline):
    config = make_config()
    stages.embed(config, pipeline["generate"], tmp_path / "e.jsonl")
    stages.score(config, tmp_path / "e.jsonl", tmp_path / "es.jsonl")
    stages.select(config, tmp_path / "es.jsonl", tmp_path / "ess.jsonl")
    assert (tmp_path / "ess.jsonl").read_bytes() == pipeline["select"].read_bytes()


def test_offline_data_keeps_its_rewards_from_file_to_file(tmp_path, monkeypatch):
    encode = {"encode_prompt": encode_prompt, "encode_response": lambda text: (*range(len(text)), 9)}
    policy = SimpleNamespace(**encode, rope_limit=None, context_length=None)
    use_policy(monkeypatch, policy)  # the engine and the reward are the real ones
    rewards = {"good": 7.0, "bad": -1.5, "?": None}
    scores = [{"help": 4.0, "humour": None}, {"help": 2.0}, {"help": 1.0}]
    responses = [
        {"content": content, "reward": reward, "scores": by_name}
        for (content, reward), by_name in zip(rewards.items(), scores, strict=True)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"id": "a", "prompt": "Why?", "responses": responses}) + "\n")
    config = make_config(rollout={"engine": "data"}, reward={"kind": "data", "max_missing_share": 0.5})
    stages.generate(config, data, tmp_path / "g.jsonl")
    stages.score(config, tmp_path / "g.jsonl", tmp_path / "s.jsonl")
    (row,) = read_rows(tmp_path / "s.jsonl")
    assert [r["reward_raw"] for r in row["responses"]] == [7.0, -1.5, None]
    assert [r["reward"] for r in row["responses"]] == [1.0, 0.0, None]
    assert [r["scores"] for r in row["responses"]] == scores
    one_score = make_config(rollout={"engine": "data"}, reward={"kind": "data:help"})
    stages.score(one_score, tmp_path / "g.jsonl", tmp_path / "h.jsonl")
    assert [r["reward_raw"] for r in read_rows(tmp_path / "h.jsonl")[0]["responses"]] == [4.0, 2.0, 1.0]


def test_a_data_file_is_scored_embedded_selected_and_drawn_without_a_model(tmp_path, monkeypatch):
    """Answers that no engine sampled have no tokens, and need none before training."""
    use_policy(monkeypatch, None)
    monkeypatch.setattr(stages, "make_embedder", lambda config, policy: FakeEmbedder())
    answers = [{"content": f"answer {i} " + "ab" * i, "reward": i / 7} for i in range(6)]
    data = tmp_path / "data.jsonl"
    row = {"prompt": [{"role": "user", "content": "Why?"}], "responses": answers}
    data.write_text("".join(json.dumps({"id": name} | row) + "\n" for name in "ab"))
    config = make_config(rollout={"engine": "data"}, reward={"kind": "data"}, select={"k": 2})
    stages.score(config, data, tmp_path / "s.jsonl")
    stages.embed(config, tmp_path / "s.jsonl", tmp_path / "e.jsonl")
    stages.select(config, tmp_path / "e.jsonl", tmp_path / "chosen.jsonl")
    for chosen in read_rows(tmp_path / "chosen.jsonl"):
        marks = [response["selected"] for response in chosen["responses"]]
        assert marks[5] == "positive"
        assert marks.count("negative") == 2
        assert chosen["responses"][3]["reward_raw"] == 3 / 7
    page = write_stage_page(tmp_path / "chosen.jsonl")
    assert page == tmp_path / "chosen.html"
    assert "Map of candidates" in page.read_text()
    with pytest.raises(ValueError, match="no row of a stage file"):
        write_stage_page(tmp_path / "s.jsonl.config.json")


@pytest.mark.parametrize(
    ("row", "texts", "rewards"),
    [
        ({"prompt": "Why?", "responses": [{"content": "a", "reward": 0.5}, {"content": "b", "reward": 2.0}]}, "ab", [0.5, 2.0]),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "ab", [1.0, 0.0]),
        (
            {"instruction": "Why?", "completions": [
                {"response": text, "annotations": {"help": {"Rating": help}, "truth": {"Rating": "1"}}}
                for text, help in (("a", "5"), ("b", "2"))
            ]},
            "ab",
            [3.0, 1.5],
        ),
    ],
    ids=["text prompt", "TRL pair", "UltraFeedback"],
)  # fmt: skip
def test_scoring_begins_at_a_data_file_of_any_format(tmp_path, row, texts, rewards):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    config = make_config(rollout={"engine": "data"}, reward={"kind": "data"})
    assert stages.score(config, data, tmp_path / "s.jsonl") == 2
    first, second = read_rows(tmp_path / "s.jsonl")
    assert (first["id"], second["id"]) == ("1", "2")
    assert first["prompt"] == [{"role": "user", "content": "Why?"}]
    assert [r["content"] for r in first["responses"]] == list(texts)
    assert [r["reward_raw"] for r in first["responses"]] == rewards
    if "completions" in row:
        one_score = make_config(rollout={"engine": "data"}, reward={"kind": "data:help"})
        stages.score(one_score, data, tmp_path / "h.jsonl")
        assert [r["reward_raw"] for r in read_rows(tmp_path / "h.jsonl")[0]["responses"]] == [5.0, 2.0]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: no responses"):
        stages.score(config, tmp_path / "prompts.jsonl", tmp_path / "p.jsonl")


# --- resuming ---------------------------------------------------------------------------------------------------------


def snapshot(path):
    beside = embeddings_path(path)
    return path.read_bytes(), beside.read_bytes() if beside.exists() else None


def sources(pipeline, prompts):
    return {"generate": prompts, "score": pipeline["generate"], "embed": pipeline["score"], "select": pipeline["embed"]}


@pytest.mark.parametrize("stage", ["generate", "score", "embed", "select"])
def test_second_run_computes_nothing_and_changes_nothing(stage, pipeline, prompts, fakes):
    before = snapshot(pipeline[stage])
    fakes.scored.clear()
    assert getattr(stages, stage)(make_config(), sources(pipeline, prompts)[stage], pipeline[stage]) == 0
    assert snapshot(pipeline[stage]) == before
    assert fakes.engines[-1].batches == [] or stage != "generate"
    assert fakes.scored == []
    assert len(fakes.embedders) == 1


@pytest.mark.parametrize("stage", ["generate", "score", "select"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.61, 0.999])
def test_output_cut_anywhere_is_completed_byte_for_byte(stage, share, pipeline, prompts):
    path = pipeline[stage]
    whole = snapshot(path)
    path.write_bytes(whole[0][: int(share * len(whole[0]))])
    added = getattr(stages, stage)(make_config(), sources(pipeline, prompts)[stage], path)
    assert added >= 1
    assert snapshot(path) == whole


def test_interrupted_embedding_keeps_its_finished_batches(tmp_path, pipeline, fakes, monkeypatch):
    whole = snapshot(pipeline["embed"])
    path = tmp_path / "again.jsonl"
    real = FakeEmbedder.embed

    def interrupted(self, texts):
        if len(self.texts) == 2:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(FakeEmbedder, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.embed(make_config(), pipeline["score"], path)
    assert not path.exists()
    monkeypatch.setattr(FakeEmbedder, "embed", real)
    assert stages.embed(make_config(), pipeline["score"], path) == 1  # two batches of two were kept
    assert len(fakes.embedders[-1].texts) == 1
    assert snapshot(path) == whole


def test_what_a_server_answered_before_it_died_is_on_disk_and_not_asked_for_again(
    tmp_path, tiny_model, prompts, monkeypatch
):
    monkeypatch.setenv("FAKE_VLLM_DIR", str(tmp_path))
    fake = [sys.executable, str(HERE / "fake_vllm.py"), "--model", str(tiny_model), "--port"]
    monkeypatch.setattr(process, "serve_command", lambda *a: lambda port: [*fake, str(port)])
    rollout = {"engine": "vllm-server", "max_new_tokens": 6, "batch_rows": 5 * N, "options": {"restarts": 0}}
    config = make_config(model={"path": str(tiny_model)}, rollout=rollout)
    undisturbed, broken, log = tmp_path / "undisturbed.jsonl", tmp_path / "broken.jsonl", tmp_path / "answered.log"
    stages.generate(config, prompts, undisturbed)

    canary, *_, last = [line.split()[1] for line in log.read_text().splitlines()]  # seeds, in the order of the answers
    log.unlink()
    (tmp_path / f"fault.hang.{last}").touch()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stages.generate, config, prompts, broken)
        deadline = time.monotonic() + 60
        while not broken.exists() or broken.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline
            assert not running.done()
            time.sleep(0.02)
        os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
        with pytest.raises(IncompleteBatch, match="4 of 5 prompts were answered, then: no server is left"):
            running.result(timeout=60)
    log.unlink()
    assert stages.generate(config, prompts, broken) == 1
    assert [line.split()[1] for line in log.read_text().splitlines()] == [canary, last]
    assert broken.read_bytes() == undisturbed.read_bytes()


def test_grown_input_computes_only_what_is_new(pipeline, prompts, fakes):
    before = {row["id"]: row for row in read_rows(pipeline["generate"])}
    prompts.write_text('{"id": "new", "prompt": "xxxxxxxxxxxx"}\n' + prompts.read_text())
    assert stages.generate(make_config(), prompts, pipeline["generate"]) == 1
    rows = read_rows(pipeline["generate"])
    assert [row["id"] for row in rows] == ["new", "p0", "p1", "p2", "p3", "p4"]
    assert {row["id"]: row for row in rows[1:]} == before


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("generate", {"rollout": {"top_p": 0.5}}, r"rollout\.top_p = 1\.0, now 0\.5; choose another --output"),
        ("generate", {"run": {"seed": 4}}, r"run\.seed = 3, now 4"),
        ("score", {"reward": {"normalize": "zscore"}}, r"reward\.normalize = 'auto', now 'zscore'"),
        ("score", {"loss": {"name": "DPO"}}, r"loss\.name = 'AMPO', now 'DPO'"),
        ("embed", {"embed": {"model": "policy"}}, r"embed\.model = .* now 'policy'"),
        ("select", {"select": {"k": 3}}, r"select\.k = 2, now 3"),
        ("select", {"loss": {"name": "MMPO"}}, r"loss\.name = 'AMPO', now 'MMPO'"),  # which trains on ties
    ],
)
def test_other_settings_are_refused_by_field(stage, change, message, pipeline, prompts):
    before = snapshot(pipeline[stage])
    with pytest.raises(ValueError, match=rf"{stage}\.jsonl was begun with .*{message}"):
        getattr(stages, stage)(make_config(**change), sources(pipeline, prompts)[stage], pipeline[stage])
    assert snapshot(pipeline[stage]) == before


@pytest.mark.parametrize(("stage", "field"), [("select", "reward"), ("select", "finish_reason"), ("score", "scores")])
def test_an_input_that_was_judged_anew_is_refused(stage, field, pipeline, prompts):
    source = sources(pipeline, prompts)[stage]
    rows = read_rows(source)
    rows[1]["responses"][0][field] = {"reward": 0.875, "finish_reason": "length", "scores": {"help": 1.0}}[field]
    write_rows_atomic(source, rows)
    before = snapshot(pipeline[stage])
    with pytest.raises(ValueError, match=rf"row '{rows[1]['id']}' has other rewards than the input"):
        getattr(stages, stage)(make_config(), source, pipeline[stage])
    assert snapshot(pipeline[stage]) == before


def test_given_ratings_that_changed_are_refused(tmp_path):
    source, output = tmp_path / "rated.jsonl", tmp_path / "scored.jsonl"
    offline = make_config(rollout={"engine": "data"}, reward={"kind": "data"})

    def rate(best):
        answers = [{"content": "a", "reward": best}, {"content": "b", "reward": 0.5}]
        source.write_text(json.dumps({"id": "q", "prompt": "why?", "responses": answers}) + "\n")

    rate(1.0)
    assert stages.score(offline, source, output) == 1
    assert stages.score(offline, source, output) == 0
    rate(9.0)
    with pytest.raises(ValueError, match=r"row 'q' has other rewards than the input"):
        stages.score(offline, source, output)


def test_an_input_that_was_embedded_anew_is_refused(pipeline):
    beside = embeddings_path(pipeline["embed"])
    save_file({"embeddings": load_file(beside)["embeddings"] + 1.0}, beside)
    before = snapshot(pipeline["select"])
    with pytest.raises(ValueError, match=r"select\.safetensors holds other embeddings than the input"):
        stages.select(make_config(), pipeline["embed"], pipeline["select"])
    assert snapshot(pipeline["select"]) == before


def test_an_output_that_would_be_read_as_another_format_is_refused_before_any_work(tmp_path, prompts, fakes):
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz: a stage file is plain JSON Lines"):
        stages.generate(make_config(), prompts, tmp_path / "x.jsonl.gz")
    assert not fakes.engines


@pytest.mark.parametrize("stage", ["generate", "score", "embed", "select"])
def test_settings_of_other_stages_do_not_matter(stage, pipeline, prompts):
    config = make_config(optim={"lr": 0.5, "prompts_per_step": 4}, checkpoint={"every": 1})
    assert getattr(stages, stage)(config, sources(pipeline, prompts)[stage], pipeline[stage]) == 0


def test_foreign_output_is_refused(tmp_path, pipeline, prompts):
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text("precious\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl exists and was not begun by `ampo-fast generate`"):
        stages.generate(make_config(), prompts, foreign)
    assert foreign.read_text() == "precious\n"
    with pytest.raises(ValueError, match="stage = 'generate', now 'score'"):
        stages.score(make_config(), pipeline["score"], pipeline["generate"])


@pytest.mark.parametrize("stage", ["score", "embed", "select"])
def test_input_is_not_overwritten(stage, pipeline):
    with pytest.raises(ValueError, match="--input and --output are both"):
        getattr(stages, stage)(make_config(), pipeline["embed"], pipeline["embed"])


def test_rows_of_another_input_are_refused(pipeline, prompts):
    prompts.write_text(prompts.read_text().replace("xxxxx", "another question"))
    with pytest.raises(ValueError, match=r"row 'p0' has other texts than the input"):
        stages.generate(make_config(), prompts, pipeline["generate"])
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"has a row 'p0' that the input lacks"):
        stages.generate(make_config(), prompts, pipeline["generate"])


def test_select_names_the_stage_that_is_missing(tmp_path, pipeline):
    with pytest.raises(ValueError, match=r"generate\.jsonl has no rewards: run `ampo-fast score`"):
        stages.select(make_config(), pipeline["generate"], tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="run `ampo-fast embed`"):
        stages.select(make_config(), pipeline["score"], tmp_path / "y.jsonl")


def test_failing_scorer_stops_and_keeps_what_was_scored(tmp_path, pipeline, monkeypatch):
    calls = []

    def dying(groups):
        calls.append(groups)
        return [[math.nan if len(calls) > 1 else 1.0 for _ in group.candidates] for group in groups]

    monkeypatch.setattr(stages, "make_reward", lambda config: dying)
    out = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match=r"8 of 8 rewards are missing .*p2\[0\]"):
        stages.score(make_config(), pipeline["generate"], out)
    assert [row["id"] for row in read_rows(out)] == ["p0", "p1"]


def test_prompts_without_responses_are_refused_offline(tmp_path, prompts, fakes):
    config = make_config(rollout={"engine": "data"}, reward={"kind": "data"})
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: no responses"):
        stages.generate(config, prompts, tmp_path / "g.jsonl")
