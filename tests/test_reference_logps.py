"""The reference's log-probs of given responses: computed once, the same as a forward of their own, checked on resume."""

import json

import pytest
import torch
from builders import config, prompt, scored

from ampo_fast.packing import pack
from ampo_fast.reference_logps import ReferenceLogps, reference_hash
from ampo_fast.types import SelectedGroup

PROMPTS = [prompt(i, f"why {i}?") for i in range(3)]


def selected(i, positive=2, negative=(0, 1)):
    return SelectedGroup(scored=scored([0.0, 1.0, 2.0], i), positive=(positive,), negative=negative, cost=0.0)


def make(tiny_model, prompts=PROMPTS, **rollout):
    sections = {"model": {"path": str(tiny_model)}, "optim": {"micro_batch_tokens": 20}}
    if rollout.pop("given", True):
        sections |= {"rollout": {"engine": "data"} | rollout, "reward": {"kind": "data"}}
    return ReferenceLogps(config(**sections), prompts)


def count_forwards(references, monkeypatch):
    calls, forward = [], references.model.token_logp
    monkeypatch.setattr(references.model, "token_logp", lambda batch: calls.append(1) or forward(batch))
    return calls


def test_they_are_those_of_a_forward_of_the_batch_and_each_is_computed_once(tiny_model, tmp_path, monkeypatch):
    references = make(tiny_model)
    references.keep_in(tmp_path)
    calls = count_forwards(references, monkeypatch)
    groups = [selected(0), selected(1)]
    references.prepare(groups)
    done = len(calls)
    assert done == 2  # 20 tokens hold one group
    references.prepare(groups[::-1])
    batch = pack(groups)
    given = references.of(batch, groups)
    assert len(calls) == done
    fresh = make(tiny_model, given=False)
    torch.testing.assert_close(given, fresh.of(batch, groups), atol=1e-4, rtol=1e-5)
    references.prepare([selected(0), selected(2, positive=1, negative=(0,))])
    assert len(calls) == done + 1


def test_a_resumed_run_reads_what_was_computed_and_mends_a_torn_line(tiny_model, tmp_path, monkeypatch):
    first = make(tiny_model)
    first.keep_in(tmp_path)
    first.prepare([selected(0), selected(1)])
    path = next((tmp_path / "reference").glob("*.jsonl"))
    path.write_text(path.read_text() + '{"id": "p2", "ind')
    second = make(tiny_model)
    second.keep_in(tmp_path)
    calls = count_forwards(second, monkeypatch)
    second.prepare([selected(0), selected(1)])
    batch = pack([selected(1)])
    assert not calls
    assert torch.equal(first.of(batch, [selected(1)]), second.of(batch, [selected(1)]))
    second.prepare([selected(2)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 9 and len({(row["id"], row["index"]) for row in rows}) == 9


def test_another_model_template_length_or_data_is_refused(tiny_model, tmp_path):
    make(tiny_model).keep_in(tmp_path)
    make(tiny_model).keep_in(tmp_path)
    with pytest.raises(ValueError, match="another reference, template or data"):
        make(tiny_model, max_new_tokens=7).keep_in(tmp_path)
    with pytest.raises(ValueError, match="another reference, template or data"):
        make(tiny_model, prompts=PROMPTS[:2]).keep_in(tmp_path)
    reference = make(tiny_model).model
    before = reference_hash(reference, PROMPTS, 8)
    with torch.no_grad():
        reference.head.weight[0, 0] += 1e-3
    changed = reference_hash(reference, PROMPTS, 8)
    reference.tokenizer.chat_template += " "
    assert len({before, changed, reference_hash(reference, PROMPTS, 8)}) == 3


def test_sampled_responses_are_not_kept(tiny_model, tmp_path, monkeypatch):
    references = make(tiny_model, given=False)
    references.keep_in(tmp_path)
    calls = count_forwards(references, monkeypatch)
    for _ in range(2):
        references.prepare([selected(0)])
        references.of(pack([selected(0)]), [selected(0)])
    assert len(calls) == 2 and not (tmp_path / "reference").exists()
