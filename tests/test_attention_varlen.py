"""The one-kernel path of shared-prefix attention: plan, gather and its backward; the kernels themselves on a GPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint

from ampo_fast import attention, attention_varlen
from ampo_fast.attention_varlen import VarlenPlan
from ampo_fast.types import Segment

SEGMENTS = [
    Segment(start=0, prompt_length=3, response_lengths=(2, 0, 4)),
    Segment(start=9, prompt_length=5, response_lengths=(0,)),
    Segment(start=14, prompt_length=1, response_lengths=(1, 1, 6, 2)),
    Segment(start=25, prompt_length=3, response_lengths=()),  # a text alone
]
TOKENS = 28


def inputs(device="cpu", dtype=torch.float64, heads=(4, 2), size=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads[0], TOKENS, size), (1, heads[1], TOKENS, size), (1, heads[1], TOKENS, size))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def eager_kernel(query, key, value, plan, scale, window, softcap):
    """What flash-attn documents: causal, the last query aligned with the last key; window[0] keys to the left."""
    out = []
    bounds = (itertools.pairwise(x.tolist()) for x in (plan.query_offsets, plan.key_offsets))
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        assert q1 - q0 <= plan.max_query
        assert k1 - k0 <= plan.max_key
        repeats = query.shape[1] // key.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        scores = q @ k.repeat_interleave(repeats, 0).transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        at = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        distance = at - torch.arange(k1 - k0)[None]
        seen = (distance >= -window[1]) & ((distance <= window[0]) | (window[0] < 0))
        out.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v.repeat_interleave(repeats, 0))
    return torch.cat(out, 1).transpose(0, 1)


def attend(tensors, **options):
    plan = attention.SegmentPlan.build(SEGMENTS)
    out, _ = attention.segment_attention(torch.nn.Identity(), *tensors, None, segments=plan, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}, {"softcap": 0.5}, {"scaling": 2.0}], ids=str)
def test_one_kernel_call_equals_the_pieces(monkeypatch, options):
    by_pieces = attend(inputs(), **options)
    monkeypatch.setattr(attention_varlen, "can_run", lambda query, softcap: True)
    monkeypatch.setattr(attention_varlen, "kernel", lambda softcap: eager_kernel)
    for ours, theirs in zip(attend(inputs(), **options), by_pieces, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_token_is_named_once_per_copy_so_that_no_sum_depends_on_an_order():
    plan = VarlenPlan.build(*_pieces(), torch.device("cpu"))
    assert plan.key_index_S[plan.own_T].tolist() == list(range(TOKENS))
    for token, at in plan.copies:
        assert len(set(token.tolist())) == len(token)
        assert torch.equal(plan.key_index_S[at], token)
    covered = torch.cat([plan.own_T, *(at for _, at in plan.copies)])
    assert covered.sort().values.tolist() == list(range(len(plan.key_index_S)))


def _pieces():
    plan = attention.SegmentPlan.build(SEGMENTS)
    return plan.piece_lengths, plan.responses_per_group


def test_the_gathers_backward_sums_in_float32():
    """1 + 3 x 2^-8 copies: bfloat16 additions, one by one, would round every one of them away."""
    plan = VarlenPlan.build((1, 1, 1, 1), (3,), torch.device("cpu"))
    x = torch.zeros(4, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.full((7, 1, 1), 2.0**-8, dtype=torch.bfloat16)
    grad[plan.own_T] = 1.0
    attention_varlen._Gather.apply(x, plan).backward(grad)
    assert x.grad[0].item() == torch.tensor(1 + 3 * 2.0**-8).bfloat16().item() > 1.0


def test_what_no_kernel_takes_runs_piece_by_piece(monkeypatch):
    def query(dtype=torch.bfloat16, size=64, is_cuda=True):
        device = SimpleNamespace(type="cuda" if is_cuda else "cpu")
        return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(1, 2, 3, size), device=device)

    monkeypatch.setattr(attention_varlen, "kernel", lambda softcap: None if softcap else eager_kernel)
    assert attention_varlen.can_run(query(), None)
    assert not attention_varlen.can_run(query(dtype=torch.float32), None)
    assert not attention_varlen.can_run(query(size=512), None)
    assert not attention_varlen.can_run(query(size=60), None)
    assert not attention_varlen.can_run(query(is_cuda=False), None)
    assert not attention_varlen.can_run(query(), 30.0)


def test_under_autocast_its_type_counts_and_not_the_querys():
    query = torch.zeros(1, 1, 1, 1)
    assert attention_varlen.compute_dtype(query) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_varlen.compute_dtype(query) == torch.bfloat16


def torch_kernel(seen, shape_heads=lambda key, repeats: key):
    """A stand-in for varlen_attn, of today's signature; notes the number of key heads that it is given."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        plan = SimpleNamespace(query_offsets=cu_seq_q, key_offsets=cu_seq_k, max_query=max_q, max_key=max_k)
        seen.append(key.shape[1])
        key, value = (shape_heads(x, query.shape[1] // key.shape[1]) for x in (key, value))
        return eager_kernel(query, key, value, plan, scale, window_size, None)

    return varlen_attn


def refuses(x, repeats):
    if repeats > 1:
        raise RuntimeError("Expect query and key/value to have the same number of heads")
    return x


@pytest.mark.parametrize(
    ("shape_heads", "taken"),
    [(lambda x, repeats: x, 2), (refuses, 4), (lambda x, repeats: x.repeat(1, repeats, 1), 4)],
    ids=["takes fewer heads", "refuses", "takes the wrong head"],
)
def test_keys_are_repeated_only_for_a_kernel_that_needs_it(monkeypatch, shape_heads, taken):
    """Asked inside a checkpoint too, which counts what is kept: a probe that it saw would make its second forward another."""
    seen = []
    function = torch_kernel(seen, shape_heads)

    def kernel(*args):
        return attention_varlen._torch_varlen(function, False, *args)

    by_pieces = attend(inputs())
    monkeypatch.setattr(attention_varlen, "can_run", lambda query, softcap: True)
    monkeypatch.setattr(attention_varlen, "kernel", lambda softcap: kernel)
    tensors = inputs()
    plan = attention.SegmentPlan.build(SEGMENTS)

    def attended(*qkv):
        return attention.segment_attention(torch.nn.Identity(), *qkv, None, segments=plan)[0]

    out = torch.utils.checkpoint.checkpoint(attended, *tensors, use_reentrant=False)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight).sum().backward()
    for ours, theirs in zip([out.detach(), *(x.grad for x in tensors)], by_pieces, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert seen == [4, 2, taken, taken]  # asked twice, once in all; then both forwards of the checkpoint


def test_torchs_kernel_is_called_with_its_own_signature():
    """A misspelt keyword would show on a GPU only."""
    import inspect

    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)
    seen = {}
    stand_in = torch_kernel([])

    def varlen_attn(*args, **kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)
        kwargs.pop("enable_gqa", None)
        return stand_in(*args, **kwargs)

    query, key, value = (x[0].transpose(0, 1) for x in inputs())
    plan = VarlenPlan.build(*_pieces(), query.device)
    for knows_gqa in {"enable_gqa" in signature.parameters, False}:  # torch 2.11 has no such keyword
        gathered = key[plan.key_index_S], value[plan.key_index_S]
        attention_varlen._torch_varlen(varlen_attn, knows_gqa, query, *gathered, plan, 0.5, (-1, 0), None)
        assert seen["key"].shape[1] == 2
        assert (seen["window_size"], seen["max_k"], seen["cu_seq_k"].dtype) == ((-1, 0), 7, torch.int32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_kernel_on_a_gpu(options, heads):
    """|kernel - float64| <= 2 |pieces in bfloat16 - float64| + slack, output and gradients; the same bits when asked for."""
    truth = attend(inputs(heads=heads, size=64), **options)
    kernel = attend(inputs("cuda", torch.bfloat16, heads, 64), **options)
    pieces = attend(inputs("cpu", torch.bfloat16, heads, 64), **options)
    for exact, ours, theirs in zip(truth, kernel, pieces, strict=True):
        error, allowed = ((x.cpu().double() - exact).abs().max() for x in (ours, theirs))
        assert error <= 2 * allowed + 2e-3
