"""A BERT-like encoder that pools the mean over its tokens, as a block of its own architecture: any HF user loads it.

BertForSequenceClassification reads the first token. One more block, with query and key 0, attends to all tokens alike,
so that the first token becomes LN(LN(h_first + mean_t h_t)); the pooler then standardises it.
Shapes: n texts, D hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ampo_fast.reward_model.frozen_blocks import StandIn, find_blocks

_PARTS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
          "attention.output.LayerNorm", "output.dense", "output.LayerNorm")  # fmt: skip

SCALE = 0.25
"""Of the standardised features inside the pooler's tanh: all but linear, with outliers squashed."""


def append_mean_block(model: Any, num_kept: int | None, field: str) -> None:
    """Adds the block after the first num_kept (all: None), in place, and counts it in the configuration.

    Raises ValueError for another architecture.
    """
    dense = getattr(getattr(model.base_model, "pooler", None), "dense", None)
    blocks = find_blocks(model.base_model)
    block = copy.deepcopy(blocks[-1])
    try:
        query, key, value, after, first_norm, out, last_norm = (block.get_submodule(name) for name in _PARTS)
    except AttributeError:
        dense = None
    if dense is None or model.config.is_decoder:
        raise ValueError(
            f'{field}: model.pooling = "mean" is for encoders of BERT\'s layout with a pooler, '
            f'this is {type(model).__name__}; use "native"'
        )
    with torch.no_grad():
        for linear in (query, key, out):
            linear.weight.zero_()
        for linear in (query, key, value, after, out):
            linear.bias.zero_()
        for linear in (value, after):
            nn.init.eye_(linear.weight)
        for norm in (first_norm, last_norm):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    blocks.append(block)
    if num_kept == 0:  # a model has at least one block; this is now it
        del blocks[0]
    model.config.num_hidden_layers = len(blocks)


@torch.no_grad()
def mean_first_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[n, D] the first tokens after the appended block, without running it: it does nothing but average."""
    blocks = find_blocks(model.base_model)
    block = blocks[-1]
    blocks[-1] = StandIn(block)
    try:
        hidden_nLD = model.base_model(**inputs).last_hidden_state
    finally:
        blocks[-1] = block
    mask_nL = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    weight_nL = mask_nL / mask_nL.sum(1, keepdim=True)
    mean_nD = torch.einsum("nl,nld->nd", weight_nL.to(hidden_nLD.dtype), hidden_nLD)
    return block.output.LayerNorm(block.attention.output.LayerNorm(hidden_nLD[:, 0] + mean_nD))


@torch.no_grad()
def standardise(model: Any, first_nD: torch.Tensor) -> None:
    """Sets the pooler to tanh(SCALE (h - mean) / std), with the mean and deviation of these first tokens, and fixes it."""
    std_D, mean_D = torch.std_mean(first_nD.double(), dim=0)
    scale_D = SCALE / std_D.clamp(min=1e-6)
    dense = model.base_model.pooler.dense
    dense.weight.copy_(torch.diag(scale_D))
    dense.bias.copy_(-scale_D * mean_D)
    model.base_model.pooler.requires_grad_(False)
