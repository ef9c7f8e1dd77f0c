import errno
import json
import os

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ampo_fast import export as module
from ampo_fast.config import ModelConfig
from ampo_fast.export import export
from ampo_fast.model import Policy

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def moved(directory):
    policy = Policy.load(ModelConfig(path=str(directory)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    return policy


def assert_same_model(policy, directory):
    again = Policy.load(ModelConfig(path=str(directory)))
    for (name, a), (_, b) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_export_reads_back_bit_for_bit(tiny_model, tmp_path):
    policy = moved(tiny_model)
    export(policy, tmp_path / "out")
    assert_same_model(policy, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")  # tied: it is the embedding


@pytest.mark.parametrize(("kind", "overrides"), [("llama", {"tie_word_embeddings": False}), ("qwen3_moe", EXPERTS)])
def test_it_has_the_tensors_that_transformers_would_write(kind, overrides, tmp_path):
    policy = moved(make_tiny_model(tmp_path / "m", kind, **overrides))
    export(policy, tmp_path / "ours")
    policy.model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / whose / "model.safetensors") for whose in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same_model(policy, tmp_path / "ours")


def test_a_model_larger_than_a_file_is_several_and_an_index(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FILE_BYTES", 20_000)
    policy, out = moved(tiny_model), tmp_path / "out"
    export(policy, out)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in policy.parameters())
    assert {name: file for file in files for name in load_file(out / file)} == index["weight_map"]
    assert_same_model(policy, out)


@pytest.mark.parametrize(("first", "second"), [(1 << 30, 20_000), (20_000, 1 << 30), (10_000, 40_000)])
def test_nothing_of_an_export_in_other_files_remains(first, second, tiny_model, tmp_path, monkeypatch):
    policy, out = moved(tiny_model), tmp_path / "out"
    for max_bytes in (first, second):
        monkeypatch.setattr(module, "_FILE_BYTES", max_bytes)
        export(policy, out)
        with torch.no_grad():
            policy.head.weight.mul_(2)
    policy.head.weight.data.mul_(0.5)
    assert_same_model(policy, out)
    monkeypatch.setattr(module, "_FILE_BYTES", second)
    export(policy, tmp_path / "fresh")
    assert set(os.listdir(out)) == set(os.listdir(tmp_path / "fresh"))


def test_a_full_disk_leaves_the_export_of_before_whole(tiny_model, tmp_path, monkeypatch):
    before, out = moved(tiny_model), tmp_path / "out"
    export(before, out)
    files, save, written = set(os.listdir(out)), module.save_tensors, []

    def save_one(path, tensors, **kwargs):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        save(path, tensors, **kwargs)

    monkeypatch.setattr(module, "_FILE_BYTES", 20_000)
    monkeypatch.setattr(module, "save_tensors", save_one)
    with pytest.raises(OSError, match="No space left on device"):
        export(moved(out), out)
    assert written
    assert set(os.listdir(out)) == files
    assert_same_model(before, out)


def test_an_export_that_reads_back_different_is_an_error(tiny_model, tmp_path, monkeypatch):
    load, name = AutoModelForCausalLM.from_pretrained, "model.norm.weight"

    def load_another(*args, **kwargs):
        model = load(*args, **kwargs)
        weight = model.get_parameter(name)
        weight.data = weight.data.nextafter(torch.tensor(2.0))
        return model

    policy = moved(tiny_model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_another)
    with pytest.raises(RuntimeError, match=rf"{tmp_path}/out reads back different: model\.norm\.weight$"):
        export(policy, tmp_path / "out")
