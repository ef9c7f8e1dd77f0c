"""Soft-capped shared-prefix attention: on the CPU, where torch has no backward of it, its mask and cap; on a GPU all of it."""

import pytest
import torch
from test_attention_varlen import SEGMENTS, attend, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from ampo_fast import attention, attention_flex
from ampo_fast.attention_flex import FlexPlan

BATCHES = [((350, 1, 20, 300, 70, 81), (1, 3)), ((40, 30, 71, 0, 66), (3, 0)), ((9, 200, 5), (2,)), ((131, 40), (1,))]
"""(piece lengths, responses per group). Of several blocks each, and the first of another number than there are heads: torch
compiles anew for a size of 1, and takes sizes that are equal at first to be equal always."""


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


@pytest.mark.parametrize("window", [None, 5])
def test_the_mask_is_built_without_a_number_for_every_pair_of_tokens(window):
    """At 64k packed tokens 8 bytes a pair were 34 GB."""

    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.num_bytes = max(self.num_bytes, out.nbytes)
            return out

    plan = FlexPlan.build((128,) * 8, (3, 3), torch.device("cpu"))
    with Largest() as largest:
        plan.block_mask(window)
    assert largest.num_bytes == 1024 * 1024


@pytest.fixture
def programs(monkeypatch):
    """Has the CPU compile, as a GPU does; -> what counts the programs."""
    from torch._dynamo.utils import counters
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile finds no C++ compiler")
    torch._dynamo.reset()
    counters.clear()
    kernel = attention_flex._kernel
    monkeypatch.setattr(attention_flex, "_kernel", lambda is_compiled: kernel(True))
    monkeypatch.setattr(attention_flex, "can_run", lambda query, softcap: True)
    # The kernel's buffers are for as many threads as compile it, which its name in the cache on disk leaves out unless told:
    # a run with more threads would take it from there and write past them.
    with torch._inductor.config.patch({"cpp.threads": torch.get_num_threads()}):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_one_program_serves_all_batches_windows_and_caps(programs, monkeypatch):
    """A Python number where a tensor should be fails to compile, or is a program for every value of it."""

    def attended(pieces, dtype, **options):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn((1, h, sum(pieces[0]), 64), generator=generator).to(dtype) for h in (4, 2, 2)]
        plan = attention.SegmentPlan(*pieces)
        return attention.segment_attention(torch.nn.Identity(), *tensors, None, segments=plan, **options)[0]

    cases = [
        (pieces, {"softcap": softcap, "sliding_window": window, "scaling": 0.3})
        for pieces in BATCHES
        for softcap, window in ((0.5, None), (0.5, 50), (3.0, 60))
    ]
    compiled = [attended(pieces, torch.float32, **options) for pieces, options in cases]
    assert programs() == 1
    monkeypatch.setattr(attention_flex, "can_run", lambda query, softcap: False)
    for ours, (pieces, options) in zip(compiled, cases, strict=True):
        by_pieces = attended(pieces, torch.float64, **options)
        torch.testing.assert_close(ours.double(), by_pieces, rtol=0, atol=2e-6)


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
