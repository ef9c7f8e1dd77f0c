import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file
from test_export import EXPERTS

from ampo_fast.config import ModelConfig
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights, pieces


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("qwen3_moe", EXPERTS),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("gemma2", {"head_dim": 8}),
    ],
)
def test_the_tensors_are_those_of_the_models_files(kind, overrides, tmp_path):
    directory = make_tiny_model(tmp_path / "m", kind, **overrides)
    weights = NamedWeights(Policy.load(ModelConfig(path=str(directory))))
    for _ in range(2):  # as often as needed
        sent = dict(weights)
        head = sent.pop("lm_head.weight")
        files = load_file(directory / "model.safetensors")
        assert sent.keys() == files.keys()
        assert all(torch.equal(sent[name], files[name]) for name in files)
        assert torch.equal(head, sent["model.embed_tokens.weight"])


def test_pieces_are_copies_of_at_most_a_files_worth_or_one_tensor():
    tensors = {"a": torch.ones(10), "b": torch.ones(20), "c": torch.ones(5, 3), "d": torch.ones(100)}
    made = list(pieces(tensors.items(), torch.float16, max_bytes=70))
    assert [list(piece) for piece in made] == [["a", "b"], ["c"], ["d"]]
    made[0]["a"].zero_()
    assert tensors["a"].sum() == 10
    assert {tensor.dtype for piece in made for tensor in piece.values()} == {torch.float16}
    assert list(pieces([], torch.float32, 1)) == []
