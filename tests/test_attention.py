"""Shared-prefix attention: loss, log-probs and every gradient as with one response at a time, on several architectures."""

import dataclasses
import itertools
import types

import pytest
import torch
from builders import group
from conftest import make_tiny_model

from ampo_fast import attention
from ampo_fast.attention import honour_softcap
from ampo_fast.config import ModelConfig
from ampo_fast.losses import AMPO
from ampo_fast.model import Policy
from ampo_fast.packing import pack_responses
from ampo_fast.types import Segment

KINDS = {
    "llama": {},
    "qwen3": {"kind": "qwen3", "head_dim": 16},
    # A soft cap that bends the scores, and a window shorter than most prompts.
    "gemma2": {
        "kind": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0, "sliding_window": 6,
    },
    "mistral": {"kind": "mistral", "sliding_window": 6},
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {name: make_tiny_model(root / name, **settings) for name, settings in KINDS.items()}


def ragged_groups():
    """G = 1 .. 16 responses a group, of 1 to 12 tokens, prompts of 2 to 17; token ids all over the vocabulary."""
    random = torch.Generator().manual_seed(3)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=random).tolist()

    groups = []
    for i, size in enumerate((1, 2, 3, 5, 8, 16)):
        made = group(["x"] * size, i, prompt_ids=(0, *draw(5, 200, 1 + 3 * i)), lengths=draw(1, 13, size))
        candidates = [dataclasses.replace(c, token_ids=tuple(draw(5, 200, len(c.token_ids)))) for c in made.candidates]
        groups.append(dataclasses.replace(made, candidates=tuple(candidates)))
    return groups


def batch_of(groups):
    reward = [[float((7 * j + i) % 5) for j in range(len(g.candidates))] for i, g in enumerate(groups)]
    kept = [range(len(g.candidates)) for g in groups]
    return pack_responses(groups, kept, reward=reward, positive=[(0,)] * len(groups))


def run(directory, mode, dtype, groups):
    """(loss, log-probs [R], gradients by name) of one forward and backward."""
    policy = Policy.load(ModelConfig(path=str(directory), attention=mode, dtype=dtype))
    assert policy.is_shared == (mode == "segments")
    batch = batch_of(groups)
    # beta 10 saturates on a random model: gradients of 1e-4 would compare nothing but rounding.
    loss, stats = policy(batch, AMPO(beta=0.5), len(groups))
    loss.backward()
    return loss.item(), stats.logp_M, {name: p.grad for name, p in policy.named_parameters()}


def truth(directory, groups):
    """The same in float64, one response at a time, by transformers' own forward with its own attention."""
    policy = Policy.load(ModelConfig(path=str(directory), attention="unshared"))
    model = policy.model.double()
    sums = []
    for g in groups:
        for c in g.candidates:
            ids = torch.tensor([[*g.prompt_ids, *c.token_ids]])
            logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
            start = len(g.prompt_ids) - 1
            sums.append(sum(logp[start + t, token] for t, token in enumerate(c.token_ids)))
    logp_M, batch = torch.stack(sums), batch_of(groups)
    length_M = batch.response_offsets.diff()
    offsets = batch.group_offsets.tolist()
    loss = 0.0
    for start, end in itertools.pairwise(offsets):
        score = 0.5 * logp_M[start:end] / length_M[start:end]
        score = score + torch.cat((torch.zeros(1), torch.full((end - start - 1,), 3.0).log())).double()  # gamma
        if end - start > 1:
            loss = loss - torch.log_softmax(score, 0)[0] / len(groups)
    loss.backward()
    return loss.item(), logp_M.detach(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_is_unshared_is_one_at_a_time(directories, kind, dtype):
    """|shared - truth| <= 2 |unshared - truth| + slack: sharing the prompt may add no error of its own."""
    groups = ragged_groups()
    exact_loss, exact_logp, exact_grads = truth(directories[kind], groups)
    shared = run(directories[kind], "segments", dtype, groups)
    alone = run(directories[kind], "unshared", dtype, groups)
    slack = 2e-6 if dtype == "float32" else 4e-3

    def check(name, got, peer, exact):
        scale = exact.abs().max() + 1e-12
        error, allowed = (((x.double() - exact).abs().max() / scale).item() for x in (got, peer))
        assert error <= 2 * allowed + slack, f"{name}: {error:.2e} against {allowed:.2e} unshared"

    for name, at in (("loss", 0), ("logp", 1)):
        check(
            name,
            *(torch.as_tensor(x, dtype=torch.float64) for x in (shared[at], alone[at], (exact_loss, exact_logp)[at])),
        )
    assert exact_grads.keys() == shared[2].keys()
    for name, exact in exact_grads.items():
        check(name, shared[2][name], alone[2][name], exact)
    scale = max(g.abs().max() for g in exact_grads.values())
    assert scale > 1e-3  # gradients of rounding would compare nothing


def test_an_unknown_keyword_is_refused_by_name():
    plan = attention.SegmentPlan.build([Segment(start=0, prompt_length=2, response_lengths=(1,))])
    q = torch.randn(1, 2, 3, 4)
    module = torch.nn.Identity()
    attention.segment_attention(module, q, q, q, None, segments=plan, position_ids=torch.arange(3), use_cache=False)
    for keyword in ({"s_aux": torch.ones(2)}, {"position_bias": q}, {"is_causal": False}, {"head_mask": q}):
        with pytest.raises(ValueError, match=rf"{next(iter(keyword))}.*unshared"):
            attention.segment_attention(module, q, q, q, None, segments=plan, **keyword)
    with pytest.raises(ValueError, match="dropout"):
        attention.segment_attention(module, q, q, q, None, dropout=0.1, segments=plan)
    with pytest.raises(ValueError, match="a mask of the model's own"):
        attention.segment_attention(module, q, q, q, torch.zeros(1, 1, 3, 3), segments=plan)
    with pytest.raises(ValueError, match="without segments"):
        attention.segment_attention(module, q, q, q, None)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [(1,), (4, 2, 2), (3, 0, 1, 9)])
def test_the_output_is_contiguous_for_models_that_take_a_view_of_it(lengths, softcap):
    plan = attention.SegmentPlan.build([Segment(start=0, prompt_length=lengths[0], response_lengths=lengths[1:])])
    # As projections make them: heads are the inner dimension in memory.
    query, key, value = (torch.randn(1, sum(lengths), heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    out, _ = attention.segment_attention(torch.nn.Identity(), query, key, value, None, softcap=softcap, segments=plan)
    assert out.shape == (1, sum(lengths), 4, 8)
    assert out.is_contiguous()


def test_what_a_models_own_code_cannot_do_is_a_reason_to_train_unshared(directories, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("view size is not compatible")

    monkeypatch.setattr(attention, "_by_pieces", fail)
    assert not Policy.load(ModelConfig(path=str(directories["llama"]))).is_shared
    assert "view size is not compatible" in caplog.text


def test_a_model_whose_states_change_when_a_prompt_is_shared_is_trained_unshared(directories, monkeypatch, caplog):
    """The probe at loading catches what no list of architectures knows."""
    honest = attention.SegmentPlan.build

    def one_long_prompt(segments):
        lengths = [s.prompt_length + sum(s.response_lengths) for s in segments]
        return honest([Segment(start=0, prompt_length=length, response_lengths=()) for length in lengths])

    monkeypatch.setattr(attention.SegmentPlan, "build", one_long_prompt)
    policy = Policy.load(ModelConfig(path=str(directories["llama"])))
    assert not policy.is_shared
    assert "hidden states differ" in caplog.text
    with pytest.raises(ValueError, match=r"model\.attention = \"segments\" cannot run here.*unshared"):
        Policy.load(ModelConfig(path=str(directories["llama"]), attention="segments"))


def test_state_space_models_are_refused_by_name(tmp_path):
    settings = {"kind": "mamba2", "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2}
    directory = make_tiny_model(tmp_path / "m", **settings)
    with pytest.raises(ValueError, match=r"Mamba2ForCausalLM.*attention interface|cannot run here"):
        Policy.load(ModelConfig(path=str(directory), attention="segments"))


@pytest.mark.parametrize(
    ("softcap", "implementation", "wanted"),
    [(30.0, "sdpa", "eager"), (30.0, "flash_attention_2", None), (None, "sdpa", None)],
)
def test_soft_capped_scores_are_not_left_to_sdpa(softcap, implementation, wanted):
    config = types.SimpleNamespace(attn_logit_softcapping=softcap, _attn_implementation=implementation)
    config.get_text_config = lambda: config
    chosen = []
    honour_softcap(types.SimpleNamespace(config=config, set_attn_implementation=chosen.append))
    assert chosen == ([wanted] if wanted else [])
