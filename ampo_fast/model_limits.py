"""What a model's config says that a forward of a few tokens does not show: ropes that change with the length, windows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def context_length(model: Any) -> int | None:
    """The positions that the model was made for; None where its config names none.

    RoBERTa and its kin (XLM-R, MPNet) count from behind their padding token's position: 2 of their 514 are never a token's.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return module.num_embeddings - padding - 1
    return positions


def rope_limit(model: Any) -> tuple[str, int] | None:
    """(rope type, tokens): the longest sequence that leaves those beside it as they are; None: any length does.

    transformers picks such a rope's frequencies by the longest sequence of a forward, for all that run in it.
    """
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [found, *(rope for rope in found.values() if isinstance(rope, dict))]  # or one for each type of layer
    limits = [limit for rope in ropes if (limit := _limit(rope, config))]
    return min(limits, key=lambda limit: limit[1], default=None)


def usable_length(model: Any) -> int | None:
    """The longest sequence that a model reads as it was made to, and that leaves those beside it as they are; None: any."""
    rope = rope_limit(model)
    return min(filter(None, (context_length(model), rope and rope[1])), default=None)


def _limit(rope: dict[str, Any], config: Any) -> tuple[str, int] | None:
    kind = rope.get("rope_type") or rope.get("type") or ""
    if kind == "longrope":
        here = rope.get("original_max_position_embeddings")
        return kind, here or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    if "dynamic" in kind and not rope.get("alpha"):  # Hunyuan's, with an alpha, does not change
        return kind, config.max_position_embeddings
    return None


def why_window_is_lost(model: Any, windows: Iterable[int | None]) -> str | None:
    """Why an attention that goes by its keywords would see too much: none of its calls, each with the window that it was
    given, had the config's. None where there is no window, or it came."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    is_off = getattr(config, "use_sliding_window", None) is False
    types = getattr(config, "layer_types", None)
    if not window or is_off or (types and "sliding_attention" not in types) or any(windows):
        return None
    return f"its sliding window ({window} tokens) is in its mask alone, which shared-prefix attention does not read"
