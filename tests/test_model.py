"""The policy, its shared-prefix attention, and packing: shared = unshared = one response at a time."""

import shutil

import pytest
import torch
from builders import config, group
from conftest import make_tiny_model
from transformers import CONFIG_MAPPING

from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.losses import AMPO, NLL
from ampo_fast.model import Policy
from ampo_fast.packing import pack_responses, packed_length
from ampo_fast.sampler import admit_prompts
from ampo_fast.types import Prompt

RAGGED = [
    group(["a", "b", "c"], 0, (0, 3, 10, 11, 12), lengths=[1, 7, 4]),
    group(["d"], 1, (0, 3), lengths=[5]),
    group(["e", "f"], 2, (0, 3, 9, 9, 9, 9, 9), lengths=[2, 2]),
]


def one_at_a_time(policy, groups):
    rows = []
    for g in groups:
        for c in g.candidates:
            ids = torch.tensor([[*g.prompt_ids, *c.token_ids]])
            logp = torch.log_softmax(policy.model(input_ids=ids).logits[0].double(), -1)
            start = len(g.prompt_ids)
            rows += [logp[start + t - 1, token] for t, token in enumerate(c.token_ids)]
    return torch.stack(rows)


def test_packed_rows_and_targets_are_exactly_the_response_tokens():
    batch = pack_responses(RAGGED, [[0, 1, 2], [0], [0, 1]])
    assert batch.target_R.tolist() == [t for g in RAGGED for c in g.candidates for t in c.token_ids]
    lengths = [packed_length(len(g.prompt_ids), [len(c.token_ids) for c in g.candidates]) for g in RAGGED]
    assert len(batch.token_T) == sum(lengths)  # nothing padded, each prompt once
    # The prompt's last row serves the first token of every response.
    first = batch.row_R[batch.response_offsets[:-1]].tolist()
    assert first == [4, 4, 4, lengths[0] + 1, lengths[0] + lengths[1] + 6, lengths[0] + lengths[1] + 6]
    restarts = batch.position_T[5:11].tolist()  # the second response's fed tokens, after the first one's none
    assert restarts == [5, 6, 7, 8, 9, 10]


def test_shared_prefix_equals_one_response_at_a_time(tiny_policy):
    batch = pack_responses(RAGGED, [range(len(g.candidates)) for g in RAGGED])
    assert tiny_policy.is_shared
    got = tiny_policy.token_logp(batch)
    torch.testing.assert_close(got.double(), one_at_a_time(tiny_policy, RAGGED), atol=2e-5, rtol=0)


def test_shared_and_unshared_gradients_agree(tiny_model):
    kept, reward = [range(len(g.candidates)) for g in RAGGED], [[1.0, 0.0, 0.5], [1.0], [0.0, 1.0]]
    batch = pack_responses(RAGGED, kept, reward=reward, positive=[(0,), (0,), (1,)])
    grads = []
    for mode in ("segments", "unshared"):
        policy = Policy.load(ModelConfig(path=str(tiny_model), attention=mode))
        # beta 10 saturates on a random model: gradients of 1e-4 would compare nothing but rounding.
        loss, _ = policy(batch, AMPO(beta=0.5), 3)
        loss.backward()
        grads.append((loss.item(), {n: p.grad.clone() for n, p in policy.named_parameters()}))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    scale = max(g.abs().max().item() for g in grads[0][1].values())
    for name, shared in grads[0][1].items():
        torch.testing.assert_close(
            shared, grads[1][1][name], atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_response_logp_does_not_depend_on_the_chunks(tiny_policy):
    whole = response_logp(tiny_policy, RAGGED, 10_000)
    torch.testing.assert_close(response_logp(tiny_policy, RAGGED, 16), whole, atol=1e-5, rtol=0)
    assert len(whole) == sum(len(c.token_ids) for g in RAGGED for c in g.candidates)


def test_prompt_has_one_bos_and_a_given_response_ends_its_turn(tiny_policy):
    ids = tiny_policy.encode_prompt(({"role": "user", "content": "hi"},))
    assert ids.count(0) == 1
    assert ids[0] == 0
    response = tiny_policy.encode_response("ok")
    assert response[-1] == tiny_policy.stop_ids[0] == 1
    assert response.count(1) == 1
    assert tiny_policy.decode(response) == "ok"


def test_bfloat16_is_compute_only(tiny_model):
    policy = Policy.load(ModelConfig(path=str(tiny_model), dtype="bfloat16"))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    logp = response_logp(policy, RAGGED, 1000)
    assert logp.dtype == torch.float32
    assert (logp.double() - one_at_a_time(policy, RAGGED)).abs().max() < 0.15


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path.*config\.json"):
        Policy.load(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="does not exist"):
        Policy.load(ModelConfig(path=str(tmp_path / "nowhere")))


def test_tokenizer_without_a_template_is_named(tmp_path):
    directory = make_tiny_model(tmp_path / "m")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat template"):
        Policy.load(ModelConfig(path=str(directory)))


def test_tokenizer_without_pad_and_bos_works(tmp_path):
    import json

    directory = make_tiny_model(tmp_path / "m")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("bos_token", None)
    settings.pop("pad_token", None)
    path.write_text(json.dumps(settings))
    policy = Policy.load(ModelConfig(path=str(directory)))
    assert policy.tokenizer.pad_token is None
    assert torch.isfinite(response_logp(policy, RAGGED, 1000)).all()


SCALED_HEADS = {
    "granite": ({"logits_scaling": 8.0}, 8.0),
    "hyperclovax": ({"logits_scaling": 0.25}, 4.0),  # multiplies by what Granite divides by
    "cohere2": ({"logit_scale": 0.0625, "sliding_window": 4}, 16.0),
}


@pytest.mark.parametrize("kind", SCALED_HEADS)
def test_a_head_that_scales_its_logits_gives_the_models_own_log_probs_and_gradient(kind, tmp_path):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    overrides, divisor = SCALED_HEADS[kind]
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path / "m", kind, **overrides))))
    assert policy.logit_divisor == divisor
    kept, reward = [range(len(g.candidates)) for g in RAGGED], [[1.0, 0.0, 0.5], [1.0], [0.0, 1.0]]
    batch = pack_responses(RAGGED, kept, reward=reward, positive=[(0,), (0,), (1,)])
    truth = one_at_a_time(policy, RAGGED)
    torch.testing.assert_close(policy.token_logp(batch).double(), truth, atol=2e-5, rtol=0)

    def gradient_of(loss: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(loss, policy.model.get_input_embeddings().weight)
        return found

    loss, _ = policy(batch, NLL(), 1.0)
    per_response = [-rows.mean() for rows in truth.split(batch.response_offsets.diff().tolist())]
    wanted = per_response[0] + per_response[3] + per_response[5]
    torch.testing.assert_close(loss.double(), wanted.detach(), atol=2e-5, rtol=0)
    torch.testing.assert_close(gradient_of(loss), gradient_of(wanted), atol=2e-5, rtol=1e-4)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tiny_model, monkeypatch):
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def shifted(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits after the head"):
        Policy.load(ModelConfig(path=str(tiny_model)))


def test_a_model_whose_layers_cannot_be_told_from_its_head_is_refused_by_name(tmp_path):
    settings = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}
    directory = make_tiny_model(tmp_path / "m", "llama4_text", **settings)
    with pytest.raises(ValueError, match=r"model\.path: Llama4ForCausalLM does not tell its layers from its head"):
        Policy.load(ModelConfig(path=str(directory)))


def test_a_response_that_ends_by_itself_is_closed_once(tiny_policy):
    (stop, *_) = tiny_policy.stop_ids
    closed = tiny_policy.encode_response("yes")
    assert closed[-1] == stop != closed[-2]
    assert tiny_policy.encode_response("yes" + tiny_policy.tokenizer.decode([stop])) == closed


def test_turns_that_the_template_refuses_are_named(tiny_policy, monkeypatch):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    monkeypatch.setattr(tiny_policy.tokenizer, "chat_template", template)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(ValueError, match=r"takes no turns of system, user: System role not supported"):
        tiny_policy.encode_prompt(turns)
    prompt = Prompt(id="7", messages=tuple(turns), where="x.jsonl:3")
    with pytest.raises(ValueError, match=r"^data\.train, x\.jsonl:3: the chat template"):
        admit_prompts([prompt], tiny_policy, config(), "data.train")


def test_a_weight_file_that_was_copied_in_part_is_named(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "half")
    whole = (tmp_path / "half/model.safetensors").read_bytes()
    (tmp_path / "half/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.path = '.*half' cannot be loaded as a causal LM"):
        Policy.load(ModelConfig(path=str(tmp_path / "half")))


def test_the_layers_are_the_outermost_of_what_a_model_does_not_split(tmp_path):
    """A part sharded or recomputed within its own layer once more is an error, or twice the work."""
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path, "mamba"))))
    assert [type(block).__name__ for block in policy.blocks] == ["MambaBlock"] * 2


def test_switches_of_layers_are_refused_where_a_model_names_none(tmp_path):
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path, "biogpt"))))
    with pytest.raises(ValueError, match=r"optim\.activation_checkpointing = true: BioGptForCausalLM"):
        policy.checkpoint_activations()
    with pytest.raises(ValueError, match=r"model\.compile = true: BioGptForCausalLM"):
        policy.compile_blocks()
