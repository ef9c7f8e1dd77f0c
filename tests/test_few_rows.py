"""Linear layers of a few rows give what torch's give, where they are asked to and nowhere else."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ampo_fast import _C
from ampo_fast.rollouts import few_rows
from ampo_fast.rollouts.few_rows import fast_few_rows


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=False), nn.GELU(), nn.Linear(40, 7))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (96, 1), (97, 1), (0, 1)])
def test_any_number_of_rows_gives_what_torch_gives(model, shape):
    x = torch.randn(*shape, 24)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), fast_few_rows(model):
        y = model(x)
    assert y.shape == (*shape, 7)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=1e-6)


def test_rows_in_a_view_with_strides_are_taken_as_they_are(model):
    x = torch.randn(24, 6).t()
    with torch.no_grad(), fast_few_rows(model):
        torch.testing.assert_close(model(x), model(x.contiguous()), atol=0, rtol=0)


def test_without_the_extension_torch_does_it(model, monkeypatch):
    monkeypatch.setattr(few_rows, "_C", None)
    x = torch.randn(3, 24)
    with torch.no_grad(), fast_few_rows(model):
        assert torch.equal(model(x), nn.Sequential(*model)(x))
        assert "forward" not in vars(model[0])


@pytest.mark.skipif(_C.vector_path() == "plain", reason="torch's products are used without AVX2")
def test_few_rows_go_through_the_extension_and_many_do_not(model, monkeypatch):
    called, product = [], _C.few_rows
    monkeypatch.setattr(_C, "few_rows", lambda x, w, b: called.append((x.shape, w.shape)) or product(x, w, b))
    with torch.no_grad(), fast_few_rows(model):
        model(torch.randn(16, 1, 24))
        model(torch.randn(97, 24))
    model(torch.randn(1, 24))
    assert called == [((16, 24), (40, 24)), ((16, 40), (7, 40))]


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda weight: weight.t().contiguous().t()])
def test_a_weight_that_the_extension_would_refuse_is_left_to_torch(model, change):
    for layer in (model[0], model[2]):
        layer.weight.data = change(layer.weight.data)
        layer.bias = None
    x = torch.randn(3, 24, dtype=model[0].weight.dtype)
    with torch.no_grad(), fast_few_rows(model):
        y = model(x)
    assert torch.equal(y, model(x))


def test_the_layers_are_as_before_afterwards_whatever_happened(model):
    with pytest.raises(KeyError), fast_few_rows(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_row_has_the_same_bits_beside_any_others():
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape, dtype=np.float32) for shape in ((61, 577), (83, 577)))
    whole = _C.few_rows(x, weight)
    for count in (1, 7, 8, 9, 24, 25, 33):
        np.testing.assert_array_equal(_C.few_rows(x[:count], weight), whole[:count])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        np.testing.assert_array_equal(_C.few_rows(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


PATHS = """
import numpy as np
from ampo_fast import _C
random = np.random.default_rng(0)
x, weight, bias = (random.standard_normal(shape, dtype=np.float32) for shape in ((61, 577), (83, 577), (83,)))
exact = x.astype(float) @ weight.astype(float).T + bias
assert np.abs(_C.few_rows(x, weight, bias) - exact).max() < 1e-4
print(_C.vector_path())
"""


@pytest.mark.parametrize("path", ["plain", "avx2"])
def test_every_vector_unit_gives_the_product(path):
    ran = subprocess.run(
        [sys.executable, "-c", PATHS],
        env=os.environ | {"AMPO_FAST_SIMD": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() in {path, "plain"}


def test_what_would_be_copied_or_does_not_fit_is_refused():
    x, weight = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    with pytest.raises(TypeError):
        _C.few_rows(x.astype(float), weight)
    with pytest.raises(TypeError):
        _C.few_rows(x, np.ones((3, 4), np.float32).T)
    with pytest.raises(ValueError, match=r"weight \[outputs, dim\]"):
        _C.few_rows(x, np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match="one entry an output"):
        _C.few_rows(x, weight, np.ones(3, np.float32))
