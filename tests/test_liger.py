"""Liger's kernels: asked of Liger with its losses off, and refused where they cannot run. The kernels need a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from ampo_fast import distributed
from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy


@pytest.fixture
def liger(monkeypatch):
    """A stand-in that knows Llama alone, and keeps what it was asked for; the device says that it is a GPU."""
    asked = []
    patch = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda model, **options: asked.append((model, options)),
    )
    transformers = SimpleNamespace(monkey_patch=patch)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=transformers))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr(distributed, "device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    return SimpleNamespace(asked=asked, patch=patch)


def test_the_layers_are_ligers_and_its_losses_stay_off(liger, tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model), liger=True))
    losses_off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger.asked == [(policy.model, {"rope": True} | losses_off)]
    Policy.load(ModelConfig(path=str(tiny_model)))
    assert len(liger.asked) == 1


def test_several_ranks_keep_the_rotary_embedding_that_the_host_can_run(liger, tiny_policy, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    from ampo_fast import liger as ours

    ours.apply(tiny_policy.model)
    assert liger.asked[0][1]["rope"] is False


def test_an_unknown_model_and_a_cpu_are_refused_by_name(liger, tiny_model, monkeypatch):
    liger.patch.MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(ValueError, match=r"model\.liger.*no kernels for model type 'llama'"):
        Policy.load(ModelConfig(path=str(tiny_model), liger=True))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"model\.liger = true needs a GPU"):
        Policy.load(ModelConfig(path=str(tiny_model), liger=True))


def test_without_liger_the_way_to_install_it_is_named(liger, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'ampo_fast\[liger\]'"):
        Policy.load(ModelConfig(path=str(tiny_model), liger=True))
