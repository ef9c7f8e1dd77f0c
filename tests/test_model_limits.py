"""What only a config tells of a model: where its rope changes, and whether its attention is told of its window."""

import types

import pytest
import torch
from builders import group
from conftest import make_tiny_model

from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.model_limits import rope_limit, usable_length, why_window_is_lost
from ampo_fast.packing import pack_responses

LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def model_of(positions=512, **config):
    config = types.SimpleNamespace(max_position_embeddings=positions, **config)
    config.get_text_config = lambda: config
    return types.SimpleNamespace(config=config, named_modules=list)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64}}, None),
        ({"rope_parameters": LONGROPE}, ("longrope", 64)),
        ({"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 32}, ("longrope", 32)),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", 512)),
        ({"rope_parameters": DYNAMIC | {"alpha": 1000.0}}, None),
        ({"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": LONGROPE}}, ("longrope", 64)),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}}, None),
    ],
)
def test_the_limit_is_that_of_the_rope_that_changes_first(config, limit):
    assert rope_limit(model_of(**config)) == limit


def test_what_a_model_can_read_is_the_least_of_its_positions_and_its_ropes_limit():
    assert usable_length(model_of()) == 512
    assert usable_length(model_of(rope_parameters=LONGROPE)) == 64
    assert usable_length(model_of(48, rope_parameters=LONGROPE)) == 48
    assert usable_length(model_of(None)) is None


@pytest.mark.parametrize("rope", [LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, DYNAMIC])
def test_up_to_the_limit_a_sequence_leaves_those_beside_it_as_they_are_and_not_beyond(tmp_path, rope):
    """So the limit is transformers' own, to the token: it never sees a response's last one."""
    directory = make_tiny_model(tmp_path / "m", rope_parameters=rope, max_position_embeddings=64)
    policy = Policy.load(ModelConfig(path=str(directory)))
    kind, limit = rope_limit(policy.model)
    assert (kind, limit) == (rope["rope_type"], 64)
    short = group(["a"], 0, prompt_ids=range(5, 25), lengths=[8])
    changes = []
    for length in (limit + 1 - 30, limit + 2 - 30):
        long = group(["b"], 1, prompt_ids=range(5, 35), lengths=[length])
        alone, beside = (policy.token_logp(pack_responses(g, [[0]] * len(g)))[:8] for g in ([short], [short, long]))
        changes.append((alone - beside).abs().max().item())
    assert changes[0] < 1e-5
    assert changes[1] > 1e-4


@pytest.mark.parametrize(
    ("config", "windows", "is_lost"),
    [
        ({"sliding_window": 16}, {None}, True),
        ({"sliding_window": 16}, {None, 16}, False),
        ({"sliding_window": None}, {None}, False),
        ({"sliding_window": 0}, {None}, False),
        ({}, {None}, False),
        ({"sliding_window": 16, "use_sliding_window": False}, {None}, False),
        ({"sliding_window": 16, "use_sliding_window": True}, {None}, True),
        ({"sliding_window": 16, "layer_types": ["full_attention"]}, {None}, False),
        ({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, {None}, True),
    ],
)
def test_a_window_is_lost_where_one_is_in_use_and_no_attention_was_told(config, windows, is_lost):
    assert bool(why_window_is_lost(model_of(**config), windows)) == is_lost


def test_a_model_that_keeps_its_window_in_its_mask_is_trained_unshared(tmp_path, caplog):
    experts = {"num_local_experts": 4}
    directory = make_tiny_model(tmp_path / "m", "phimoe", sliding_window=6, **experts)
    policy = Policy.load(ModelConfig(path=str(directory)))
    assert not policy.is_shared
    assert "sliding window (6 tokens)" in caplog.text
    with pytest.raises(ValueError, match=r"model\.attention = \"segments\" cannot run here: its sliding window"):
        Policy.load(ModelConfig(path=str(directory), attention="segments"))
    assert Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path / "n", "phimoe", **experts)))).is_shared


@torch.no_grad()
def test_a_model_that_adds_to_its_mask_is_trained_unshared(tmp_path, caplog):
    """Doge weighs keys in the mask that it hands to its attention; as it starts, it weighs all the same."""
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path / "m", "doge"))))
    assert not policy.is_shared
    assert "does not honour a mask of the model's own" in caplog.text
