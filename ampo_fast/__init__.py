"""ampo_fast: Active Multi-Preference Optimization of language models (arXiv 2502.18293), fast.

Everything public is reachable from here and loaded on first use (PEP 562), so `import ampo_fast` costs nothing
and needs neither transformers nor triton nor vllm.

    from ampo_fast import fused_linear_group_loss, linear_logprob, group_contrastive_loss, select_responses
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "linear_logprob": "logprobs",
    "fused_linear_group_loss": "fused",
    "group_contrastive_loss": "losses",
    "validate": "validation",
    "Selection": "selection",
    "select_responses": "selection",
    "pairwise_distances": "distances",
    "k_center": "distances",
    "k_medoids": "distances",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ampo_fast' has no attribute {name!r}")
    value = getattr(import_module(f"ampo_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
