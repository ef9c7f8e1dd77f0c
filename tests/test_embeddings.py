import logging

import pytest
import torch
from conftest import make_tiny_model

from ampo_fast.assets import resolve_model
from ampo_fast.config import ModelConfig
from ampo_fast.embeddings import PolicyEmbedder, SentenceEncoder
from ampo_fast.model import Policy


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder("package:all-minilm-l6-v2", batch_rows=3)


def test_like_texts_lie_close_and_rows_have_unit_length(encoder):
    e = encoder.embed(["A cat sits on the mat.", "A kitten is on the rug.", "The bond market fell.", "", "x"])
    assert e.shape == (5, 384)
    assert e.dtype == torch.float32
    torch.testing.assert_close(e.norm(dim=1), torch.ones(5))
    assert e[0] @ e[1] > 0.5 > e[0] @ e[2]


def test_batching_and_repetition_change_nothing(encoder):
    texts = ["one", "two words", "three words here", "one"]
    together = encoder.embed(texts)
    assert torch.equal(together[0], together[3])
    alone = torch.cat([SentenceEncoder("package:all-minilm-l6-v2").embed([t]) for t in texts[:1]])
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=0)


def test_long_texts_are_averaged_over_windows_counted_and_said_once(encoder, caplog):
    long = "the sea is wide and blue " * 300 + "a dog barks at night"
    with caplog.at_level(logging.WARNING):
        (vector, _) = encoder.embed([long, "short"])
        encoder.embed([long + "."])
    assert encoder.num_windowed == 2
    assert caplog.messages == [
        "1 of 2 texts are longer than the sentence encoder's window of 510 tokens: averaged over windows"
    ]
    full = "the sea is wide and blue " * 85  # 510 tokens
    a_word_more, as_it_was = encoder.embed([full + "dog", full])
    assert a_word_more @ as_it_was > 0.999
    (head,) = encoder.embed(["the sea is wide and blue " * 80])
    assert 0.3 < vector @ head < 0.999  # neither cut to the head nor unrelated to it


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_a_window_holds_no_more_than_an_encoder_that_counts_from_its_padding_can_place(tmp_path, kind):
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    AutoTokenizer.from_pretrained(resolve_model("package:all-minilm-l6-v2", "embed.model")).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(kind, vocab_size=30522, max_position_embeddings=34, pad_token_id=1, **shape)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoder = SentenceEncoder(str(tmp_path))
    assert encoder.window == 34 - 2 - 2  # [CLS] and [SEP]; positions 0 and 1 are never a token's
    assert encoder.embed(["a dog barks " * 40]).isfinite().all()


def test_policy_embeddings_are_of_the_response_alone(tiny_policy):
    e = PolicyEmbedder(tiny_policy).embed(["abc", "abd", "abc"])
    assert torch.equal(e[0], e[2])
    assert not torch.equal(e[0], e[1])
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("attention", ["segments", "unshared"])
def test_policy_embeddings_do_not_depend_on_the_company(tiny_model, attention):
    policy = Policy.load(ModelConfig(path=str(tiny_model), attention=attention))
    texts = ["one", "a longer text with several words", "", "one", *(f"text {i}" * (i + 1) for i in range(5))]
    forwards = []
    policy.model.base_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    together = PolicyEmbedder(policy, batch_rows=4).embed(texts)
    assert len(forwards) == (2 if attention == "segments" else 8)  # eight different texts
    alone = torch.cat([PolicyEmbedder(policy).embed([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    ids = torch.tensor([policy.encode_response(texts[1])])
    hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(together[1], torch.nn.functional.normalize(hidden.mean(0), dim=0), atol=1e-6, rtol=0)


def test_a_policy_reads_a_longer_text_in_windows_that_it_can_place(tmp_path, caplog):
    policy = Policy.load(ModelConfig(path=str(make_tiny_model(tmp_path, max_position_embeddings=32))))
    longest = []
    policy.model.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: longest.append(int(kwargs["position_ids"].max()) + 1), with_kwargs=True
    )
    embedder = PolicyEmbedder(policy)
    (vector, _) = embedder.embed(["a" * 32 + "b" * 31, "short"])
    assert max(longest) == 32
    assert embedder.num_windowed == 1
    assert "1 of 2 texts are longer than the policy's window of 32 tokens" in caplog.text
    first, second = (states.sum(0) for states in policy.states([policy.encode_response("a" * 32)[:32],
                                                               policy.encode_response("b" * 31)]))  # fmt: skip
    torch.testing.assert_close(vector, torch.nn.functional.normalize(first + second, dim=0))
