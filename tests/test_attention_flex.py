"""Soft-capped shared-prefix attention: on the CPU, where torch has no backward of it, its mask and cap; on a GPU all of it."""

import pytest
import torch
from test_attention_varlen import SEGMENTS, attend, inputs

from ampo_fast import attention, attention_flex


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}, {"scaling": 2.0}], ids=str)
def test_it_equals_the_pieces(monkeypatch, options):
    tensors = [tensor.detach() for tensor in inputs()]

    def attended():
        plan = attention.SegmentPlan.build(SEGMENTS)
        return attention.segment_attention(torch.nn.Identity(), *tensors, None, segments=plan, softcap=0.5, **options)[
            0
        ]

    by_pieces = attended()
    monkeypatch.setattr(attention_flex, "can_run", lambda query, softcap: True)
    monkeypatch.setattr(attention, "_by_pieces", None)
    torch.testing.assert_close(attended(), by_pieces, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sliding_window", [None, 2])
def test_compiled_on_a_gpu(sliding_window):
    """|ours - float64| <= 2 |pieces in bfloat16 - float64| + slack, output and gradients."""
    options = {"softcap": 0.5, "sliding_window": sliding_window}
    truth = attend(inputs(size=64), **options)
    ours = attend(inputs("cuda", torch.bfloat16, size=64), **options)
    pieces = attend(inputs("cpu", torch.bfloat16, size=64), **options)
    for got, same, want in zip(ours, pieces, truth, strict=True):
        allowed = 2 * (same.double() - want).abs().max() + 1e-3
        assert (got.cpu().double() - want).abs().max() <= allowed
