"""Mean pooling inside BERT's own architecture: the sum that it stands for, its export, and what it refuses."""

import pytest
import torch
from builders import prompt
from test_reward_model import encode, groups, hf_scores, load, make_tiny_bert
from torch.nn.functional import layer_norm

from ampo_fast.reward_model.mean_pooling import SCALE
from ampo_fast.reward_model.model import RewardModel


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("mean"))


def pooled(model, encoded):
    """[M, D] the first tokens that the pooler reads."""
    seen = []
    with model.model.base_model.pooler.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, 0])):
        rows = [ids for group in encoded for ids in group.ids]
        for ids in rows:
            model.model(input_ids=torch.tensor([ids]))
    return torch.cat(seen)


@pytest.mark.parametrize("kept", [0, 2, None])
def test_the_first_token_becomes_the_mean_of_all(tiny_bert, kept):
    from transformers import AutoModel

    model = load(tiny_bert, pooling="mean", keep_blocks=kept)
    plain = AutoModel.from_pretrained(tiny_bert).eval()
    encoded = encode(model)
    num_blocks = 3 if kept is None else kept
    assert model.model.config.num_hidden_layers == num_blocks + 1
    for row, ids in zip(pooled(model, encoded), [i for g in encoded for i in g.ids], strict=True):
        hidden = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[num_blocks][0]
        expected = layer_norm(layer_norm(hidden[0] + hidden.mean(0), (16,)), (16,))
        assert torch.allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("trained", [0, 1])
def test_padding_does_not_count_and_the_pooler_standardises(tiny_bert, trained):
    model = load(tiny_bert, pooling="mean", keep_blocks=1, trained_blocks=trained)
    encoded = encode(model)
    model.standardise_pooling(encoded, max_tokens=64)
    first_nD = pooled(model, encoded)
    texts = {ids: row for ids, row in zip([i for g in encoded for i in g.ids], first_nD, strict=True)}
    unique_nD = torch.stack(list(texts.values()))
    at_D = model.model.base_model.pooler(unique_nD[:, None])
    z_D = (unique_nD - unique_nD.mean(0)) / unique_nD.std(0)
    assert torch.allclose(at_D, torch.tanh(SCALE * z_D), atol=1e-3)
    assert torch.allclose(model(encoded), hf_scores(model, encoded), atol=1e-5)
    head = {name for name, p in model.named_parameters() if p.requires_grad and "encoder" not in name}
    assert head == {"model.classifier.weight", "model.classifier.bias"}


def test_the_frozen_blocks_run_once_and_change_nothing(tiny_bert):
    model = load(tiny_bert, pooling="mean", keep_blocks=1, trained_blocks=0)
    encoded = encode(model)
    first = model(encoded)
    fed = model.num_fed
    assert torch.equal(model([encoded[2], encoded[0], encoded[1]])[2:], first[:5])
    assert model.num_fed == fed
    first.sum().backward()
    assert model.model.classifier.weight.grad.any()
    assert torch.allclose(load(tiny_bert, pooling="mean", keep_blocks=1)(encoded), first, atol=1e-5)
    assert torch.allclose(load(tiny_bert, pooling="mean", keep_blocks=1, trained_blocks=0, cache_mib=0)(encoded), first)


def test_the_export_scores_the_same_in_hf_and_is_not_changed_again(tiny_bert, tmp_path):
    model = load(tiny_bert, pooling="mean", keep_blocks=0, trained_blocks=0)
    encoded = encode(model)
    model.standardise_pooling(encoded, max_tokens=64)
    assert model.export(tmp_path / "out", encoded) < 1e-5
    again = load(tmp_path / "out")
    assert torch.allclose(again(encode(again)), model(encoded), atol=1e-6)
    for settings in ({"pooling": "mean"}, {"keep_blocks": 1}):
        with pytest.raises(ValueError, match=f"classifier already; leave model.{next(iter(settings))} out"):
            load(tmp_path / "out", **settings)


def test_blocks_of_a_decoder_can_be_cut_but_not_its_pooling_changed(tiny_model, tmp_path):
    model = load(tiny_model, keep_blocks=1)
    encoded = encode(model)
    assert model.model.config.num_hidden_layers == 1
    assert model.export(tmp_path / "out", encoded) < 1e-5
    with pytest.raises(ValueError, match=r"pooling = \"mean\" is for encoders"):
        load(tiny_model, pooling="mean")
    with pytest.raises(ValueError, match=r"keep_blocks = 9, but .* has 2 blocks"):
        load(tiny_model, keep_blocks=9)
    with pytest.raises(ValueError, match=r"needs model\.pooling"):
        load(tiny_model, keep_blocks=0)


def test_line_breaks_are_visible_where_the_tokenizer_would_drop_them(tiny_bert, tmp_path):
    from transformers import BertTokenizer

    vocab = [*(tiny_bert / "vocab.txt").read_text().split("\n"), "¶"]
    marked = make_tiny_bert(tmp_path / "marked")
    (marked / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizer(str(marked / "vocab.txt")).save_pretrained(marked)
    group = groups()[0]
    for path, expected in ((tiny_bert, "a b"), (marked, "a ¶ b")):
        text = RewardModel.load(load_config(path), max_tokens=64, seed=0).text
        ids, _ = text.encode(prompt(0, "c").messages, ["a\nb", group.responses[0].content])
        assert text.tokenizer.decode(ids, skip_special_tokens=True) == f"c {expected}"


def load_config(path):
    from ampo_fast.reward_model.config import RewardModelConfig

    # One more word than the model has embeddings for: the tokens are what is looked at.
    return RewardModelConfig(path=str(path))
