"""What a checkpoint says of itself before it becomes a reward model: outputs, positions, blocks, what it lacks."""

from __future__ import annotations

import logging
from typing import Any

from ampo_fast.model_limits import context_length, rope_limit, usable_length
from ampo_fast.reward_model.config import RewardModelConfig

log = logging.getLogger(__name__)


def token_limit(wanted: int | None, tokenizer: Any, model: Any) -> int:
    """data.max_tokens, else what an exported reward model says of its longest input, else its positions.

    Of a rope that changes with the length no more than its first limit: one longer text would change the scores beside it.
    """
    if wanted is None:
        return min(tokenizer.model_max_length, usable_length(model) or 512)
    positions, rope = context_length(model), rope_limit(model)
    if positions is not None and wanted > positions:
        raise ValueError(f"data.max_tokens = {wanted}, but it has {positions} positions; lower data.max_tokens")
    if rope and wanted > rope[1]:
        raise ValueError(
            f"data.max_tokens = {wanted}, but its rope (type {rope[0]}) changes beyond {rope[1]} tokens for all texts of a "
            "forward; lower data.max_tokens"
        )
    return wanted


def cut_blocks(settings: Any, config: RewardModelConfig, field: str) -> None:
    """Cuts the configuration to the first keep_blocks blocks. Raises ValueError for a reward model, or too many."""
    wanted = {"keep_blocks": config.keep_blocks is not None, "pooling": config.pooling != "native"}
    changed = [name for name, is_wanted in wanted.items() if is_wanted]
    if changed and is_classifier(settings):
        raise ValueError(f"{field} = {config.path!r} is a classifier already; leave model.{changed[0]} out")
    if config.keep_blocks is None:
        return
    if config.keep_blocks == 0 and config.pooling == "native":
        raise ValueError('model.keep_blocks = 0 leaves nothing but embeddings: it needs model.pooling = "mean"')
    inner, count = settings.get_text_config(), max(1, config.keep_blocks)
    if count > inner.num_hidden_layers:
        raise ValueError(
            f"model.keep_blocks = {config.keep_blocks}, but {config.path!r} has {inner.num_hidden_layers} blocks"
        )
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:count]
    inner.num_hidden_layers = count


def check_outputs(settings: Any, path: str, field: str) -> None:
    if is_classifier(settings) and settings.num_labels != 1:
        raise ValueError(f"{field} = {path!r} has {settings.num_labels} outputs, not one")


def is_classifier(settings: Any) -> bool:
    return any("SequenceClassification" in name for name in settings.architectures or ())


def check_missing(model: Any, settings: Any, info: dict, path: str, field: str, may_be_new: bool) -> None:
    """A parameter that is missing from the checkpoint is initialised at random and scores noise, plausibly."""
    missing = sorted(info["missing_keys"])
    prefix = f"{model.base_model_prefix}."
    is_head = all(not name.startswith(prefix) or "pooler" in name for name in missing)
    if missing and not (may_be_new and is_head and not is_classifier(settings)):
        hint = "it is no reward model" if is_head else "it is another architecture"
        raise ValueError(
            f"{field} = {path!r}: its checkpoint lacks {', '.join(missing[:5])} ({hint}); nothing random is used"
        )
    if missing:
        log.warning("%s: a new head: %s", field, ", ".join(missing))
