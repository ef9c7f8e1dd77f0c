import warnings

import pytest
import torch
from builders import config, prompt
from conftest import make_tiny_model

from ampo_fast import distributed
from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.rollouts import decoding, engines
from ampo_fast.rollouts.batches import generation_batches
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.rollouts.given import DataEngine
from ampo_fast.rollouts.sampling import sample_tokens
from ampo_fast.types import GivenResponse, Prompt, Sampling
from ampo_fast.weight_sync import push_weights

PROMPTS = [prompt(0, "hi"), prompt(1, "a longer one"), prompt(2, "why?")]


def test_candidates_carry_the_trainers_own_log_probs(tiny_policy):
    groups = TransformersEngine(tiny_policy, 64).generate(PROMPTS, 3, Sampling(max_new_tokens=12))
    engine = torch.tensor([v for g in groups for c in g.candidates for v in c.logp])
    torch.testing.assert_close(response_logp(tiny_policy, groups, 1000), engine, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "mistral", "sliding_window": 9},
        {
            "kind": "gemma2",
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "sliding_window": 9,
        },
    ],
)
def test_a_sliding_window_shorter_than_a_padded_prompt_samples_what_is_trained(tmp_path, settings):
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path / "m", **settings))))
    assert policy.is_shared
    assert all(len(policy.encode_prompt(p.messages)) > 3 for p in PROMPTS)
    groups = TransformersEngine(policy, 64).generate(PROMPTS, 3, Sampling(max_new_tokens=12))
    engine = torch.tensor([v for g in groups for c in g.candidates for v in c.logp])
    torch.testing.assert_close(response_logp(policy, groups, 1000), engine, atol=2e-4, rtol=0)


def test_streams_are_keyed_by_prompt_and_candidate_not_by_batch(tiny_policy):
    sampling = Sampling(max_new_tokens=10, seed=3)
    together = TransformersEngine(tiny_policy, 64).generate(PROMPTS, 4, sampling)
    alone = TransformersEngine(tiny_policy, 4).generate([PROMPTS[1]], 4, sampling)
    assert [c.token_ids for c in alone[0].candidates] == [c.token_ids for c in together[1].candidates]
    other = TransformersEngine(tiny_policy, 64).generate(PROMPTS, 4, Sampling(max_new_tokens=10, seed=4))
    assert [c.token_ids for c in other[0].candidates] != [c.token_ids for c in together[0].candidates]
    assert len({c.token_ids for c in together[0].candidates}) > 1


def test_generation_repeats_bit_for_bit(tiny_policy):
    runs = [TransformersEngine(tiny_policy, 64).generate(PROMPTS, 3, Sampling(max_new_tokens=8)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_decoding_uses_nothing_that_transformers_has_deprecated(tiny_policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        TransformersEngine(tiny_policy, 64).generate(PROMPTS, 2, Sampling(max_new_tokens=3))


def test_under_autocast_keys_are_kept_in_the_type_that_attention_computes_in(tiny_model, monkeypatch):
    made = []
    new_buffer = decoding._buffer
    monkeypatch.setattr(decoding, "_buffer", lambda *args: made.append(new_buffer(*args)) or made[-1])
    for dtype in ("bfloat16", "float32"):
        made.clear()
        policy = Policy.load(ModelConfig(path=str(tiny_model), dtype=dtype))
        groups = TransformersEngine(policy, 64).generate(PROMPTS, 3, Sampling(max_new_tokens=12))
        assert [buffer.dtype for buffer in made] == [getattr(torch, dtype)] * 4  # K and V of two layers
        engine = torch.tensor([v for g in groups for c in g.candidates for v in c.logp])
        atol = 0.1 if dtype == "bfloat16" else 2e-4
        torch.testing.assert_close(response_logp(policy, groups, 1000), engine, atol=atol, rtol=0)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["even", "padded"])
def test_the_device_is_not_asked_at_every_token_whether_rows_are_padded(tiny_policy, monkeypatch, prompts):
    asked, masks = [], []
    any_of, layer_masks = torch.Tensor.any, decoding._layer_masks
    monkeypatch.setattr(torch.Tensor, "any", lambda *a, **k: asked.append(1) or any_of(*a, **k))
    monkeypatch.setattr(decoding, "_layer_masks", lambda *a: masks.append(1) or layer_masks(*a))
    TransformersEngine(tiny_policy, 64).generate(prompts, 1, Sampling(max_new_tokens=8))
    assert len(asked) < 8
    assert bool(masks) == (len(prompts) > 1)


def test_groups_are_handed_over_once_and_returned(tiny_policy):
    kept = []
    assert TransformersEngine(tiny_policy, 3).generate(PROMPTS, 3, Sampling(max_new_tokens=4), kept.extend) == kept
    assert [group.prompt for group in kept] == PROMPTS


def test_a_response_ends_with_its_stop_token_or_is_marked_cut(tiny_policy):
    groups = TransformersEngine(tiny_policy, 64).generate(PROMPTS, 8, Sampling(max_new_tokens=30))
    for candidate in (c for g in groups for c in g.candidates):
        stops = [t in tiny_policy.stop_ids for t in candidate.token_ids]
        assert stops[-1] == (candidate.finish_reason == "stop")
        assert not any(stops[:-1])
        assert len(candidate.token_ids) == len(candidate.logp) <= 30
        if candidate.finish_reason == "length":
            assert len(candidate.token_ids) == 30


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]])
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    token, logp = sample_tokens(logits.expand(len(u), -1), u, Sampling(temperature=0.7))
    p = torch.softmax(logits[0] / 0.7, 0)
    frequency = torch.bincount(token, minlength=5) / len(u)
    torch.testing.assert_close(frequency, p, atol=1e-4, rtol=0)
    torch.testing.assert_close(logp, p.log()[token])
    assert frequency[3] == 0


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_give_tokens_of_positive_mass(u):
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 700]] = 0.0
    token, _ = sample_tokens(logits, torch.tensor([u], dtype=torch.float64), Sampling())
    assert token.item() == (300 if u == 0.0 else 700)


def test_logits_that_are_nan_end_the_sampling_with_their_cause(tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    with torch.no_grad():
        policy.head.weight[5, 0] = torch.nan
    with pytest.raises(ValueError, match=r"logits are NaN.*model\.dtype"):
        TransformersEngine(policy, 8).generate([prompt()], 2, Sampling(max_new_tokens=4))


def test_top_k_and_top_p_keep_the_head_of_the_distribution():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(1000, -1)
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert set(sample_tokens(logits, u, Sampling(top_k=2))[0].tolist()) == {0, 1}
    assert set(sample_tokens(logits, u, Sampling(top_p=0.6))[0].tolist()) == {0}
    assert set(sample_tokens(logits, u, Sampling(top_p=0.7))[0].tolist()) == {0, 1}


def test_batches_are_neighbours_in_length_and_cover_everything():
    batches = generation_batches([5, 9, 5, 1], n=8, batch_rows=16)
    assert batches == [[3, 0], [2, 1]]
    assert generation_batches([4, 4], n=100, batch_rows=16) == [[0], [1]]
    assert len(generation_batches([4] * 6, n=2, batch_rows=64, num_ranks=3)) == 3  # no rank left without a batch


@pytest.mark.parametrize(("device", "rows"), [("cpu", 64), ("cuda", 512)])
def test_more_candidates_are_decoded_together_on_a_gpu(monkeypatch, device, rows):
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    batches = generation_batches([4] * 200, n=8, batch_rows=config().rollout.batch_rows)
    assert len(batches[0]) * 8 == rows
    assert generation_batches([4] * 200, n=8, batch_rows=16)[0] == [0, 1]


def test_too_many_candidates_for_the_memory_name_the_field(tiny_policy, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(decoding._Decoding, "advance", full)
    with pytest.raises(
        MemoryError, match=r"while 9 candidates .* rollout\.batch_rows .*resume auto.*Tried to allocate"
    ):
        TransformersEngine(tiny_policy, 64).generate(PROMPTS, 3, Sampling(max_new_tokens=4))


def test_given_responses_are_tokenised_once_and_cut_ones_have_no_eos(tiny_policy):
    given = Prompt(
        id="g", messages=PROMPTS[0].messages,
        responses=(
            GivenResponse(content="ok", reward=1.0),
            GivenResponse(content="x" * 50, reward=0.0),
            GivenResponse(content="ok", reward=1.0, finish_reason="length"),
        ),
    )  # fmt: skip
    (made,) = DataEngine(tiny_policy).generate([given], 8, Sampling(max_new_tokens=10))
    short, long, cut = made.candidates
    assert (cut.finish_reason, cut.token_ids) == ("length", short.token_ids[:-1])
    assert short.finish_reason == "stop"
    assert short.token_ids[-1] in tiny_policy.stop_ids
    assert long.finish_reason == "length"
    assert len(long.token_ids) == 10
    assert long.token_ids[-1] not in tiny_policy.stop_ids
    with pytest.raises(ValueError, match="no responses"):
        DataEngine(tiny_policy).generate([PROMPTS[0]], 8, Sampling())


def test_a_replica_takes_the_weights_it_is_sent(tiny_model):
    trained = Policy.load(ModelConfig(path=str(tiny_model)))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    replica = Policy.load_replica(ModelConfig(path=str(tiny_model), dtype="bfloat16"))
    assert {p.dtype for p in replica.parameters()} == {torch.bfloat16}
    engine = TransformersEngine(replica, 64)
    assert push_weights(trained, engine, 5) == engine.version == 5
    for (name, a), b in zip(trained.named_parameters(), replica.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name
    assert replica.head.weight is replica.model.get_input_embeddings().weight  # still tied
    assert engine.generate(PROMPTS, 2, Sampling(max_new_tokens=4))[0].candidates[0].version == 5


# --- whether the model can be decoded here ----------------------------------------------------------------------------


def engine_config(directory, dtype="float32", **rollout):
    sections = {"reward": {"kind": "data"}, "select": {"k": 1}} if rollout.get("engine") == "data" else {}
    return config(model={"path": str(directory), "dtype": dtype}, rollout=rollout, **sections)


CANNOT = {
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_cannot_be_decoded_is_refused_as_the_engine_is_made(tmp_path, kind):
    settings = engine_config(make_tiny_model(tmp_path / "m", kind, **CANNOT[kind]))
    policy = Policy.load(settings.model)
    said = rf'rollout\.engine = "transformers" cannot decode a {type(policy.model).__name__}.*"vllm-server" or "data"'
    with pytest.raises(ValueError, match=said):
        engines.make_engine(settings, policy)
    offline = engine_config(settings.model.path, engine="data")
    given = engines.make_engine(offline, policy)
    assert isinstance(given, DataEngine)
    engines.make_actor_engine(offline, given, policy, answers_held_out=False)
    with pytest.raises(ValueError, match=r"data\.eval beside .*cannot decode .*set eval\.prompts = 0"):
        engines.make_actor_engine(offline, given, policy, answers_held_out=True)
    segments = engine_config(settings.model.path, engine="data", segment_tokens=4)
    with pytest.raises(ValueError, match=r"rollout\.segment_tokens = 4 cannot decode .*set it to 0"):
        engines.make_engine(segments, policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", ["padding", "positions", "nan"])
def test_decoding_that_says_something_else_is_refused(tiny_model, monkeypatch, mistake, dtype):
    settings = engine_config(tiny_model, dtype)
    policy = Policy.load(settings.model)
    assert isinstance(engines.make_engine(settings, policy), TransformersEngine)
    if mistake == "padding":
        monkeypatch.setattr(decoding, "_layer_masks", lambda *args: None)
    elif mistake == "positions":
        advance = decoding._Decoding.advance

        def shifted(state, token_A):
            state.position_A = state.position_A + 1
            advance(state, token_A)

        monkeypatch.setattr(decoding._Decoding, "advance", shifted)
    else:
        with torch.no_grad():
            policy.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"cannot decode a LlamaForCausalLM.*nats from those of a plain forward"):
        engines.make_engine(settings, policy)


def test_a_replica_in_half_precision_is_checked_as_it_runs(tiny_model, monkeypatch):
    settings, ran = engine_config(tiny_model, "bfloat16"), []
    replica = Policy.load_replica(settings.model)
    forward = decoding._Decoding._forward
    monkeypatch.setattr(
        decoding._Decoding, "_forward", lambda *a: ran.append(torch.is_autocast_enabled("cpu")) or forward(*a)
    )
    assert isinstance(engines.make_engine(settings, replica), TransformersEngine)
    assert ran == [True, True]


def test_the_check_draws_no_random_number_and_leaves_out_of_memory_alone(tiny_policy, tiny_model, monkeypatch):
    before = torch.random.get_rng_state()
    made = engines.make_engine(engine_config(tiny_model), tiny_policy)
    assert torch.equal(before, torch.random.get_rng_state())
    direct = TransformersEngine(tiny_policy, made.batch_rows)
    sampling = Sampling(max_new_tokens=8)
    assert made.generate(PROMPTS, 2, sampling) == direct.generate(PROMPTS, 2, sampling)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoding._Decoding, "advance", full)
    with pytest.raises(torch.OutOfMemoryError):
        made.why_it_cannot_decode()
