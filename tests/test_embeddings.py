import pytest
import torch

from ampo_fast.embeddings import PolicyEmbedder, SentenceEncoder


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


def test_long_texts_are_averaged_over_windows_and_counted(encoder):
    before = encoder.num_windowed
    long = "the sea is wide and blue " * 300 + "a dog barks at night"
    (vector,) = encoder.embed([long])
    assert encoder.num_windowed == before + 1
    (head,) = encoder.embed(["the sea is wide and blue " * 80])
    assert 0.3 < vector @ head < 0.999  # neither cut to the head nor unrelated to it


def test_policy_embeddings_are_of_the_response_alone(tiny_policy):
    e = PolicyEmbedder(tiny_policy).embed(["abc", "abd", "abc"])
    assert torch.equal(e[0], e[2])
    assert not torch.equal(e[0], e[1])
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
