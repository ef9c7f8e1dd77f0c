"""LoRA: only the adapter is trained, saved and compared; what leaves the run is an ordinary model."""

import sys
from pathlib import Path

import pytest
import torch
from builders import config, group
from runs import comparable, of_other_modes, write_run
from safetensors.torch import load_file

from ampo_fast.checkpoint import load_checkpoint, save_checkpoint
from ampo_fast.config import ModelConfig, OptimConfig, build_config, load_config
from ampo_fast.evaluation import response_logp
from ampo_fast.export import export
from ampo_fast.lora import base_hash, is_adapter
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights
from ampo_fast.optimizer import make_optimizer
from ampo_fast.packing import MicroBatch, pack_responses
from ampo_fast.trainer import train
from ampo_fast.update import Updater

pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 8.0}
GROUPS = [group(["a", "b", "c"], 0, lengths=[3, 7, 4])]


def adapted(path, moved=True, **lora):
    """The policy with an adapter; moved: one that changes something."""
    policy = Policy.load(ModelConfig(path=str(path), lora=LORA | lora))
    if moved:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.named_parameters():
            if is_adapter(name):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def test_only_the_adapter_is_trained_and_the_head_is_frozen(tiny_model):
    policy = adapted(tiny_model, moved=False)
    base = {name: p.clone() for name, p in policy.model.named_parameters() if not is_adapter(name)}
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of the seven linear layers of two blocks
    assert all(map(is_adapter, trained))
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-2))
    batch = pack_responses(GROUPS, [range(3)], reward=[[1.0, 0.0, 0.5]], positive=[(0,)])
    before = response_logp(policy, GROUPS, 1000)
    torch.testing.assert_close(before, response_logp(Policy.load(ModelConfig(path=str(tiny_model))), GROUPS, 1000))
    for _ in range(2):
        policy(batch, Updater(config(), policy).loss_fn, 1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(before, response_logp(policy, GROUPS, 1000), atol=1e-4)
    now = dict(policy.model.named_parameters())
    assert all(torch.equal(base[name], now[name]) for name in base)


def test_the_adapter_starts_the_same_whatever_was_drawn_before(tiny_model):
    torch.manual_seed(1)
    a = adapted(tiny_model, moved=False)
    torch.manual_seed(2)
    b = adapted(tiny_model, moved=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_reference_is_the_base_without_a_second_copy(tiny_model):
    policy = adapted(tiny_model)
    updater = Updater(config(loss={"name": "DPO"}, model={"path": str(tiny_model), "lora": LORA}), policy)
    assert updater.reference.model is policy
    batch = pack_responses(GROUPS, [range(3)])
    own = policy.token_logp(batch)
    ref_logp_M = updater._with_reference(batch, MicroBatch()).ref_logp_M
    base_R = Policy.load(ModelConfig(path=str(tiny_model))).token_logp(batch)
    torch.testing.assert_close(ref_logp_M, torch.stack([base_R[:3].sum(), base_R[3:10].sum(), base_R[10:].sum()]))
    torch.testing.assert_close(own, policy.token_logp(batch), atol=0, rtol=0)  # switched on again
    assert (own - base_R).abs().max() > 1e-3


def test_weights_leave_merged_under_the_names_of_the_base(tiny_model):
    policy, plain = adapted(tiny_model), Policy.load(ModelConfig(path=str(tiny_model)))
    weights = dict(NamedWeights(policy))
    assert list(weights) == list(plain.model.state_dict())
    plain.model.load_state_dict(weights)
    torch.testing.assert_close(
        response_logp(plain, GROUPS, 1000), response_logp(policy, GROUPS, 1000), atol=1e-5, rtol=0
    )


def test_the_export_is_a_merged_model_and_a_peft_adapter(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_model)
    export(policy, tmp_path / "final")
    assert not of_other_modes(tmp_path / "final")
    expected = response_logp(policy, GROUPS, 1000)
    merged = Policy.load(ModelConfig(path=str(tmp_path / "final")))
    torch.testing.assert_close(response_logp(merged, GROUPS, 1000), expected, atol=1e-5, rtol=0)
    assert not [
        name for name in load_file(tmp_path / "final/model.safetensors") if "lora" in name or "base_layer" in name
    ]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "final/adapter").eval()
    ids = torch.tensor([[0, 3, 10, 11, 20, 21]])
    torch.testing.assert_close(with_adapter(ids).logits, merged.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_is_the_adapter_and_refuses_another_base_or_rank(tiny_model, tmp_path):
    policy = adapted(tiny_model)
    optimizer = make_optimizer(policy.parameters(), OptimConfig())
    path = save_checkpoint(tmp_path / "c", 1, policy, optimizer, {"a": 1})
    names = [name for shard in path.glob("*.safetensors") for name in load_file(shard)]
    assert names
    assert all(map(is_adapter, names))
    again = adapted(tiny_model, moved=False)
    assert load_checkpoint(path, again, make_optimizer(again.parameters(), OptimConfig())) == {"a": 1}
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), again.parameters(), strict=True))
    assert base_hash(again.model) == base_hash(policy.model)

    def refused(other, message):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, other, make_optimizer(other.parameters(), OptimConfig()))

    other_base = adapted(tiny_model)
    other_base.model.model.norm.weight.data[0] += 1e-6
    refused(other_base, r"adapter of another base: .* set model\.path to the base")
    refused(adapted(tiny_model, rank=2), "rank is 4 there, 2 here")
    refused(adapted(tiny_model, alpha=16.0), r"alpha is 8\.0 there, 16\.0 here")
    refused(Policy.load(ModelConfig(path=str(tiny_model))), "rank is 4 there, not set here")


def test_a_run_that_stops_goes_on_bit_for_bit_and_exports_what_it_trained(tiny_model, tmp_path, monkeypatch):
    sections = {"model": {"lora": LORA}, "loss": {"name": "SWEPO"}, "run": {"steps": 4}, "eval": {"prompts": 2}}
    sections["checkpoint"] = {"every": 1}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, tiny_model, **sections)
    train(load_config(str(tmp_path / "whole/config.toml")))
    step = Updater.step

    def stopping(self, selected, at, *more):
        if at == 2:
            raise KeyboardInterrupt
        return step(self, selected, at, *more)

    monkeypatch.setattr(Updater, "step", stopping)
    stopped = load_config(str(tmp_path / "stopped/config.toml"))
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    train(stopped, resume=True)
    ends = [tmp_path / name / "runs/r" for name in ("whole", "stopped")]
    assert comparable(ends[0]) == comparable(ends[1])
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (ends[0] / "final" / name).read_bytes() == (ends[1] / "final" / name).read_bytes()
    start, end = (load_file(Path(d) / "model.safetensors") for d in (tiny_model, ends[0] / "final"))
    changed = [name for name in end if not torch.equal(start[name], end[name])]
    assert len(changed) == 14


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["lm_head"]}, r"names .*lm_head.*only linear layers other than the head"),
        ({"target_modules": ["embed_tokens"]}, "only linear layers"),
        ({"target_modules": ["nothing"]}, r"model\.lora\.target_modules = \('nothing',\)"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(tiny_model, lora, message):
    with pytest.raises(ValueError, match=message):
        adapted(tiny_model, **lora)


def test_dropout_and_a_missing_peft_are_refused_by_name(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.lora\.dropout = 0\.1.*set it to 0"):
        build_config({"data": {"train": "x"}, "model": {"path": "m", "lora": {"dropout": 0.1}}})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'ampo_fast\[lora\]'"):
        adapted(tiny_model)
