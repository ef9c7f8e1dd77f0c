"""Linear layers that put the weight first give what torch's give, where they are asked to and nowhere else."""

import copy

import pytest
import torch
from torch import nn

from ampo_fast.rollouts.few_rows import weight_first


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=False), nn.GELU(), nn.Linear(40, 7))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (64, 1), (65, 1)])
def test_any_number_of_rows_gives_what_torch_gives(model, shape):
    x = torch.randn(*shape, 24)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), weight_first(model):
        y = model(x)
    assert y.shape == (*shape, 7)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=1e-6)


def test_few_rows_are_the_columns_of_a_product_with_the_weight(model, monkeypatch):
    called = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: called.append((tuple(a.shape), tuple(b.shape))) or mm(a, b))
    with torch.no_grad(), weight_first(model):
        model(torch.randn(16, 1, 24))
        model(torch.randn(65, 24))
        model(torch.randn(1, 24))
    assert called == [((40, 24), (24, 16)), ((7, 40), (40, 16))]


def test_the_layers_are_as_before_afterwards_whatever_happened(model):
    with pytest.raises(KeyError), weight_first(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
