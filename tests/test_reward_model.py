"""Reward models against HF's own forward: packed, padded, cached, exported; and heads that were never trained."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from builders import config, group, prompt
from conftest import make_tiny_model

from ampo_fast.reward_model.config import RewardModelConfig
from ampo_fast.reward_model.model import RewardModel
from ampo_fast.rewards import make_reward
from ampo_fast.types import GivenResponse, Prompt

TEXTS = (("yes.", "yes indeed, and why not?"), ("no", "never ever", "no"), ("a" * 40, "b"))


def groups():
    return [
        Prompt(
            id=str(i),
            messages=prompt(i, "why? " * (i + 1)).messages,
            responses=tuple(GivenResponse(content=t) for t in texts),
        )
        for i, texts in enumerate(TEXTS)
    ]


def make_tiny_bert(directory):
    from transformers import BertConfig, BertModel, BertTokenizer

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,?!"]
    vocab += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    (directory / "vocab.txt").parent.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(vocab))
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.2,
    }
    BertModel(BertConfig(vocab_size=len(vocab), max_position_embeddings=128, **shape)).save_pretrained(directory)
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(params=["decoder", "encoder"])
def backbone(request, tiny_model, tiny_bert):
    return str(tiny_model if request.param == "decoder" else tiny_bert)


def load(path, **settings):
    return RewardModel.load(RewardModelConfig(path=str(path), **settings), max_tokens=128, seed=0)


def encode(model):
    return [model.encode(group) for group in groups()]


def hf_scores(model, encoded):
    """HF's own forward, one response at a time: nothing packed, nothing padded."""
    rows = [ids for group in encoded for ids in group.ids]
    return torch.cat([model.model(input_ids=torch.tensor([ids])).logits[0] for ids in rows])


def test_scores_and_gradients_are_those_of_hf_one_by_one(backbone):
    model = load(backbone)
    encoded = encode(model)
    assert model.is_shared == ("bert" not in backbone)
    weight_M = torch.linspace(-1.0, 1.0, 7)
    ours = model(encoded)
    (ours * weight_M).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    theirs = hf_scores(model, encoded)
    (theirs * weight_M).sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-4), name


def test_scores_are_float32_where_the_rest_is_bfloat16(backbone):
    model = load(backbone, dtype="bfloat16")
    head = getattr(model.model, "score", None) or model.model.classifier
    head.weight.data *= 100.0
    many = tuple(GivenResponse(content=letter * 3) for letter in "abcdefghijklmnop")
    scores = model([model.encode(Prompt(id="p", messages=groups()[0].messages, responses=many))])
    assert not torch.equal(scores, scores.bfloat16().float())
    scores.sum().backward()
    assert head.weight.grad.any()


def test_shared_beginnings_are_fed_once_and_repeats_too(tiny_model, tiny_bert):
    decoder, encoder = load(tiny_model), load(tiny_bert)
    encoded = encode(decoder)
    decoder(encoded)
    assert decoder.num_fed == decoder.num_real == sum(group.packed_tokens for group in encoded) < decoder.num_read
    encoder(encode(encoder)[1:2])
    texts = encode(encoder)[1].ids
    assert encoder.num_real == len(texts[0]) + len(texts[1])
    assert encoder.num_fed == 2 * max(len(ids) for ids in texts)
    assert encoder.num_read == encoder.num_real + len(texts[2])
    unshared = load(tiny_model, attention="unshared")
    assert torch.allclose(unshared(encoded), decoder(encoded), atol=1e-5)


def test_a_response_scores_the_same_in_any_company(backbone):
    model = load(backbone)
    encoded = encode(model)
    alone = torch.cat([model([group]) for group in encoded])
    assert torch.allclose(alone, model(encoded), atol=1e-5)
    listed = model.score_groups(encoded, max_tokens=1)
    assert torch.allclose(torch.cat(listed), alone, atol=1e-5)


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_no_forward_of_an_encoder_holds_more_tokens_than_it_is_told(tiny_bert, pooling):
    model = load(tiny_bert, pooling=pooling)
    texts = tuple(GivenResponse(content=letter) for letter in "abcdefgh")
    asked = prompt(0, "why " * 25).messages
    encoded = [model.encode(Prompt(id=f"{i}", messages=asked, responses=texts)) for i in range(3)]
    sizes = []
    model.model.base_model.embeddings.register_forward_hook(
        lambda m, args, out: sizes.append(out.shape[0] * out.shape[1])
    )
    if pooling == "mean":
        model.standardise_pooling(encoded, max_tokens=200)
    model.score_groups(encoded, max_tokens=200)
    assert encoded[0].packed_tokens < 100 < len(encoded[0].ids) * len(encoded[0].ids[0])
    assert max(sizes) <= 200


def test_frozen_blocks_are_computed_once_and_change_nothing(backbone):
    full, part = load(backbone), load(backbone, trained_blocks=1)
    encoded = encode(part)
    blocks = part.frozen._blocks
    runs = []
    blocks[0].register_forward_hook(lambda *_: runs.append(1))
    first = part(encoded)
    num_first = len(runs)
    again = part([encoded[2], encoded[0], encoded[1]])
    assert num_first >= 1
    assert len(runs) == num_first
    order = [5, 6, 0, 1, 2, 3, 4]
    assert torch.allclose(again, first[order], atol=1e-5)
    assert torch.allclose(first, full(encoded), atol=1e-6)
    again.sum().backward()
    trained = {name for name, p in part.named_parameters() if p.requires_grad}
    assert {name for name, p in part.named_parameters() if p.grad is not None} == trained
    assert not any("embed" in name for name in trained)
    assert 0 < len(trained) < len(list(part.parameters()))


OTHER_LAYOUTS = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "bos_token_id": 2, "eos_token_id": 3},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
    },
    "mpnet": {"pad_token_id": 0},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
}


@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_what_the_frozen_blocks_read_is_frozen_wherever_it_stands(tiny_bert, tmp_path, kind):
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 140}
    shape |= {"intermediate_size": 32} if kind != "opt" else {}
    torch.manual_seed(0)
    made = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **shape, **OTHER_LAYOUTS[kind]))
    made.save_pretrained(tmp_path)
    kept, computed = load(tmp_path, trained_blocks=1), load(tmp_path, trained_blocks=1, cache_mib=0)
    encoded = encode(kept)
    trained = [p for p in kept.parameters() if p.requires_grad]
    for model in (kept, computed):
        model(encoded).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert len(kept.frozen.kept) > 0
    assert 0 < len(trained) < len(list(kept.parameters()))
    torch.testing.assert_close(kept(encoded), computed(encoded))


def test_a_full_cache_falls_back_to_computing(tiny_bert, caplog):
    model = load(tiny_bert, trained_blocks=1, cache_mib=0)
    runs = []
    model.frozen._blocks[0].register_forward_hook(lambda *_: runs.append(1))
    encoded = encode(model)
    assert torch.equal(model(encoded), model(encoded))
    assert len(runs) >= 2
    with pytest.raises(ValueError, match=r"trained_blocks = 3.*has 3 blocks"):
        load(tiny_bert, trained_blocks=3)


def test_models_that_share_a_cache_share_its_room(tiny_bert):
    first, second = (load(tiny_bert, trained_blocks=1, cache_mib=1) for _ in range(2))
    half = torch.zeros(2**17)  # MiB / 2
    first.frozen.keep("a", half)
    second.frozen.share(first.frozen)
    for model, key in ((second, "b"), (first, "c"), (second, "d")):
        model.frozen.keep(key, half)
    assert first.frozen.kept is second.frozen.kept
    assert list(first.frozen.kept) == ["a", "b"]


def test_export_scores_the_same_through_hf(backbone, tmp_path):
    model = load(backbone)
    encoded = encode(model)
    assert model.export(tmp_path / "out", encoded) < 1e-5
    reloaded = RewardModel.load(RewardModelConfig(path=str(tmp_path / "out")))
    assert reloaded.text.max_tokens == 128
    assert [group.ids for group in encode(reloaded)] == [group.ids for group in encoded]
    scores = model(encoded)
    assert torch.allclose(reloaded(encoded), scores, atol=1e-6)
    assert scores.std() > 1e-3


def test_any_hf_user_reads_the_same_tokens(backbone):
    model = load(backbone)
    turns = [*groups()[0].messages, {"role": "assistant", "content": "yes."}]
    text = model.text.tokenizer.apply_chat_template(turns, tokenize=False)
    assert encode(model)[0].ids[0] == tuple(model.text.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert model.text.pad_id != encode(model)[0].ids[0][-1]


def test_overlong_texts_keep_their_opening_the_question_and_their_closing(backbone):
    model = RewardModel.load(RewardModelConfig(path=backbone), max_tokens=20, seed=0)
    (ids,) = model.text.encode(prompt(0, "x" * 60 + "why?").messages, ["c" * 60])
    (whole,) = model.text.encode(prompt(0, "x").messages, ["c"])
    assert len(ids) == 20
    assert ids[0] == whole[0]
    assert ids[-1] == model.text.closing_id
    (long,), (short,) = (model.text.encode(prompt(0, asked).messages, ["c"]) for asked in ("x" * 60, "x"))
    end = 1 + len(model.text._closing)
    assert long[-end:] == short[-end:]  # closed once
    assert len(long) == 10 + end
    assert model.text.num_truncated == 2
    assert model.text.is_overlong(prompt(0, "x").messages, "c" * 60)


def test_answers_that_a_reward_does_not_read_to_their_end_are_said_once(backbone, tmp_path, caplog):
    RewardModel.load(RewardModelConfig(path=backbone), max_tokens=20, seed=0).export(tmp_path / "out", [])
    caplog.clear()
    reward = make_reward(config(reward={"kind": f"classifier:{tmp_path / 'out'}"}))
    for _ in range(2):
        assert len(reward([group(["a" * 60, "b", "c" * 60])])[0]) == 3
    assert [message for message in caplog.messages if "does not read" in message] == [
        "2 of 3 responses are, with their prompt, longer than the reward model's 20 tokens: it does not read their end"
    ]


def test_a_responses_length_counts_what_it_shares_with_the_others_and_what_is_read_of_it(backbone):
    text = RewardModel.load(RewardModelConfig(path=backbone), max_tokens=40, seed=0).text
    closing = len(text._closing)
    for asked in ("x", "x" * 60):
        turns = prompt(0, asked).messages
        answers = ["ab", "ab cd ef", "z " * 60]
        short, long, cut = text.response_lengths(turns, answers)
        assert short == len(text.tokenizer("ab", add_special_tokens=False).input_ids) + closing
        assert long == len(text.tokenizer("ab cd ef", add_special_tokens=False).input_ids) + closing
        ids = text.encode(turns, answers)
        assert [long - short, cut - long] == [len(b) - len(a) for a, b in itertools.pairwise(ids)]


def test_a_head_that_was_never_trained_is_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"model\.path = .*lacks .*no reward model.*nothing random"):
        RewardModel.load(RewardModelConfig(path=backbone))
    load(backbone).export(tmp_path / "out", [])
    from safetensors.torch import load_file, save_file

    file = tmp_path / "out" / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith(("score", "classifier"))}
    save_file(kept, file, metadata={"format": "pt"})
    # It calls itself a classifier, so a new head is refused for training as well.
    with pytest.raises(ValueError, match="lacks"):
        load(tmp_path / "out")


def test_a_classifier_of_several_classes_is_refused(tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(tiny_model, tmp_path / "three")
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path / "three")
    assert json.loads((tmp_path / "three" / "config.json").read_text())["architectures"]
    with pytest.raises(ValueError, match="3 outputs, not one"):
        load(tmp_path / "three")


def test_more_tokens_than_positions_are_refused(tiny_bert):
    with pytest.raises(ValueError, match=r"max_tokens = 129, but it has 128 positions"):
        RewardModel.load(RewardModelConfig(path=str(tiny_bert)), max_tokens=129, seed=0)


def test_a_text_fits_the_positions_and_the_rope_of_its_model(tiny_bert, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path / "roberta")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(
        RobertaConfig(vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=33, **shape)
    ).save_pretrained(tmp_path / "roberta")
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    long = make_tiny_model(tmp_path / "long", rope_parameters=rope)
    for path, limit in ((tmp_path / "roberta", 32), (long, 64)):
        with pytest.raises(ValueError, match=rf"max_tokens = {limit + 1}, but it"):
            RewardModel.load(RewardModelConfig(path=str(path)), max_tokens=limit + 1, seed=0)
        model = RewardModel.load(RewardModelConfig(path=str(path)), seed=0)
        assert model.text.max_tokens == limit
        (encoded,) = [model.encode(replace(group, messages=prompt(0, "why " * 99).messages)) for group in groups()[:1]]
        assert model([encoded]).isfinite().all()
