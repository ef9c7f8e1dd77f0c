"""Liger's Triton kernels (Hsu et al. 2024, 2410.10989) for a model's norms, MLPs and rotary embeddings, in place.

The only module that imports liger_kernel. Its own losses stay off: the head here is ours.
"""

from __future__ import annotations

from typing import Any

from ampo_fast import distributed


def apply(model: Any) -> None:
    """Raises ValueError, naming model.liger, without a GPU or for a model that Liger does not know; ImportError without it."""
    if distributed.device().type != "cuda":
        raise ValueError("model.liger = true needs a GPU: Liger's kernels are Triton's; leave it out here")
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ImportError(f"model.liger = true needs Liger: pip install 'ampo_fast[liger]' ({error})") from error
    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"model.liger = true: Liger has no kernels for model type {kind!r}; set it to false")
    # Liger puts its rotary embedding in for the whole process, and rank 0 of several tries a model out on the host.
    is_alone = distributed.world_size() == 1
    monkey_patch._apply_liger_kernel_to_instance(
        model, rope=is_alone, cross_entropy=False, fused_linear_cross_entropy=False
    )
