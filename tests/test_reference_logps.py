"""The reference's log-probs of given responses: computed once, the same as a forward of their own, checked on resume."""

import json
import shutil
import weakref

import pytest
import torch
from builders import config, prompt, scored
from runs import comparable, of_other_modes, write_run

from ampo_fast import distributed
from ampo_fast.config import ModelConfig, load_config
from ampo_fast.model import Policy
from ampo_fast.packing import MicroBatch, pack
from ampo_fast.reference_logps import ReferenceLogps, reference_hash
from ampo_fast.trainer import train
from ampo_fast.types import SelectedGroup

PROMPTS = [prompt(i, f"why {i}?") for i in range(3)]


def selected(i, positive=2, negative=(0, 1)):
    return SelectedGroup(scored=scored([0.0, 1.0, 2.0], i), positive=(positive,), negative=negative, cost=0.0)


def make(tiny_model, prompts=PROMPTS, **rollout):
    sections = {"model": {"path": str(tiny_model)}, "optim": {"micro_batch_tokens": 20}}
    by_token = rollout.pop("by_token", False)
    if rollout.pop("given", True):
        sections |= {"rollout": {"engine": "data"} | rollout, "reward": {"kind": "data"}}
    made = config(**sections)
    return ReferenceLogps(made, Policy.load(made.model), prompts, by_token)


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
    given = references.of(batch, MicroBatch(tuple(groups))).ref_logp_M
    assert len(calls) == done
    fresh = make(tiny_model, given=False)
    torch.testing.assert_close(given, fresh.of(batch, MicroBatch(tuple(groups))).ref_logp_M, atol=1e-4, rtol=1e-5)
    references.prepare([selected(0), selected(2, positive=1, negative=(0,))])
    assert len(calls) == done + 1


@pytest.mark.parametrize("torn", [b'{"id": "p2", "ind', '{"id": "\u00e9'.encode()[:-1]], ids=["key", "character"])
def test_a_resumed_run_reads_what_was_computed_and_mends_a_torn_line(tiny_model, tmp_path, monkeypatch, torn):
    first = make(tiny_model)
    first.keep_in(tmp_path)
    first.prepare([selected(0), selected(1)])
    path = next((tmp_path / "reference").glob("*.jsonl"))
    kept = path.read_bytes()
    # A file of another prompt whose id holds what str.splitlines takes for the end of a line.
    path.write_bytes(kept + '{"id": "a\u2028b", "index": 0, "logp": -1.0}\n'.encode() + torn)
    second = make(tiny_model)
    second.keep_in(tmp_path)
    calls = count_forwards(second, monkeypatch)
    second.prepare([selected(0), selected(1)])
    micro = MicroBatch((selected(1),))
    batch = pack(micro.groups)
    assert not calls
    assert torch.equal(first.of(batch, micro).ref_logp_M, second.of(batch, micro).ref_logp_M)
    second.prepare([selected(2)])
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert len(rows) == 10
    assert len({(row["id"], row["index"]) for row in rows}) == 10


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


def test_part_of_a_group_has_its_own_and_an_adapters_reference_is_its_base(tiny_model, tmp_path):
    pytest.importorskip("peft")
    references = make(tiny_model)
    made = config(
        model={"path": str(tiny_model), "lora": {"rank": 2}}, rollout={"engine": "data"}, reward={"kind": "data"}
    )
    adapted = Policy.load(made.model)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    of_base = ReferenceLogps(made, adapted, PROMPTS)
    assert of_base.model is adapted
    group, part = selected(0), MicroBatch((selected(0),), part=(0, 1))
    for each, folder in ((references, "a"), (of_base, "b")):
        (tmp_path / folder).mkdir()
        each.keep_in(tmp_path / folder)
        each.prepare([group])
    whole = references.of(pack([group]), MicroBatch((group,))).ref_logp_M
    assert torch.equal(references.of(pack([group]), part).ref_logp_M, whole[1:])  # kept: the positive 2, then 0 and 1
    torch.testing.assert_close(of_base.of(pack([group]), MicroBatch((group,))).ref_logp_M, whole)


def test_the_hash_of_an_adapters_base_is_that_of_the_model_and_holds_one_tensor_at_a_time(tiny_model, monkeypatch):
    """A sharded base is gathered for it: all of its tensors at once would be a whole model on every rank."""
    pytest.importorskip("peft")
    gathered, most = [], []

    def gather(tensor):
        whole = tensor.clone()
        gathered.append(weakref.ref(whole))
        most.append(sum(ref() is not None for ref in gathered))
        return whole

    adapted = Policy.load(ModelConfig(path=str(tiny_model), lora={"rank": 2}))
    monkeypatch.setattr(distributed, "whole", gather)
    found = reference_hash(adapted, PROMPTS, 8)
    assert max(most) <= 2  # the one in hand while the next is gathered
    assert found == reference_hash(Policy.load(ModelConfig(path=str(tiny_model))), PROMPTS, 8)


@pytest.mark.parametrize("given", [True, False])
def test_by_token_they_are_those_whose_sums_are_kept_else(tiny_model, tmp_path, given):
    groups = [selected(0), selected(1)]
    batch, micro = pack(groups), MicroBatch(tuple(groups))
    whole, by_token = make(tiny_model, given=given), make(tiny_model, given=given, by_token=True)
    for references, name in ((whole, "a"), (by_token, "b")):
        (tmp_path / name).mkdir()
        references.keep_in(tmp_path / name)
        references.prepare(groups)
    found = by_token.of(batch, micro)
    torch.testing.assert_close(found.ref_logp_R, by_token.model.token_logp(batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.ref_logp_M, whole.of(batch, micro).ref_logp_M, atol=1e-5, rtol=1e-6)


def test_sampled_responses_are_not_kept(tiny_model, tmp_path, monkeypatch):
    references = make(tiny_model, given=False)
    references.keep_in(tmp_path)
    calls = count_forwards(references, monkeypatch)
    for _ in range(2):
        references.prepare([selected(0)])
        references.of(pack([selected(0)]), MicroBatch((selected(0),)))
    assert len(calls) == 2
    assert not (tmp_path / "reference").exists()


# --- a reference that moves -------------------------------------------------------------------------------------------


def moving(tiny_model, **reference):
    made = config(model={"path": str(tiny_model)}, reference=reference, loss={"name": "DPO"})
    return ReferenceLogps(made, Policy.load(made.model), PROMPTS)


@pytest.mark.parametrize(("every", "decay"), [(1, 0.5), (2, 0.0)])
def test_it_follows_the_policy_when_due(tiny_model, every, decay):
    references, policy = moving(tiny_model, every=every, decay=decay), Policy.load(ModelConfig(path=str(tiny_model)))
    start = [p.detach().double() for p in policy.parameters()]
    expected = start
    for step in range(1, 5):
        with torch.no_grad():
            for p in policy.parameters():
                p += 0.01 * step
        references.follow(policy, step)
        if step % every == 0:
            expected = [
                decay * e + (1 - decay) * p.double() for e, p in zip(expected, policy.parameters(), strict=True)
            ]
    for own, wanted in zip(references.model.parameters(), expected, strict=True):
        assert torch.allclose(own.double(), wanted, atol=1e-6)
    assert not references.is_kept


def test_its_weights_come_back_and_missing_ones_are_named(tiny_model, tmp_path):
    references = moving(tiny_model, every=1, decay=0.5)
    references.keep_in(tmp_path)
    with torch.no_grad():
        references.model.head.weight += 0.1
    for step in range(1, 6):
        references.save(step)
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    shutil.rmtree(tmp_path / "checkpoints/step_000001")
    references.save(6)
    again = moving(tiny_model, every=1, decay=0.5)
    again.keep_in(tmp_path)
    again.restore(5)
    pairs = zip(references.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(list((tmp_path / "reference").iterdir())) == 5
    assert not of_other_modes(tmp_path / "reference")
    with pytest.raises(ValueError, match=r"step_000001\.safetensors is missing"):
        again.restore(1)


def test_each_checkpoint_and_the_one_in_flight_keep_their_reference(tiny_model, tmp_path):
    """checkpoint.asynchronous with keep_last 1 and keep_every 4: step 4 is kept for good, 6 complete, 8 not yet, 10 new."""
    references = moving(tiny_model, every=1)
    references.keep_in(tmp_path)
    for step in (2, 4, 6):
        references.save(step)
    for step in (4, 6):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    references.save(8)
    (tmp_path / "checkpoints/step_000008.partial").mkdir()
    references.save(10)
    assert kept_steps(tmp_path) == [4, 6, 8, 10]
    references.save(9)  # as after a resume: what follows it is of no checkpoint
    assert kept_steps(tmp_path) == [4, 6, 8, 9]


def kept_steps(run_dir):
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / "reference").iterdir())


@pytest.mark.parametrize(("loss", "reference"), [("DPO", {}), ("DPO", {"every": 1, "decay": 0.5}), ("BMC", {})])
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(tiny_model, tmp_path, loss, reference):
    rows = [{"id": str(i), "prompt": f"q{i}", "chosen": "aei" * (i + 1), "rejected": "xyz"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    offline = {"data": {"train": str(tmp_path / "pairs.jsonl")}, "rollout": {"engine": "data", "prompts_per_round": 0}}
    more = {"reward": {"kind": "data"}, "eval": {"prompts": 0}, "select": {"k": 1}, "run": {"steps": 4}}
    more |= {"loss": {"name": loss}, "checkpoint": {"every": 2, "keep_last": 3}, "reference": reference}
    path = write_run(tmp_path, tiny_model, **offline, **more)
    train(load_config(str(path)))
    run = tmp_path / "runs/r"
    whole = comparable(run)
    kept = list((run / "reference").glob("*.jsonl"))
    assert len(kept) == (0 if reference else 1)
    assert not kept or len(kept[0].read_text().splitlines()) == 8
    shutil.rmtree(run / "checkpoints/step_000004")
    train(load_config(str(path)), resume=True)
    assert comparable(run) == whole
