"""Where a reward-model run stands: one file, replaced as a whole after each evaluation; no pickle.

RUN/checkpoint.safetensors holds the trained parameters, AdamW's moments and the best parameters so far; its header the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ampo_fast.files import save_tensors

NAME = "checkpoint.safetensors"


def save_checkpoint(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Any], state: dict[str, Any]
) -> None:
    """best: {"weights": {name: tensor}, ...}; its other entries and `state` must be JSON."""
    tensors = {}
    for name, parameter in _trained(model):
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors |= {f"best.{name}": tensor for name, tensor in best["weights"].items()}
    header = state | {"best": {key: value for key, value in best.items() if key != "weights"}}
    save_tensors(run_dir / NAME, tensors, metadata={"state": json.dumps(header)})


@torch.no_grad()
def load_checkpoint(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Restores model and optimizer in place -> (best, state), or None where the run has not come to its first one.

    Raises ValueError for a damaged file, or one of another model.
    """
    path = run_dir / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
        saved = load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to start from the beginning") from error
    names = {name for name, _ in _trained(model)}
    if names != {key.removeprefix("model.") for key in saved if key.startswith("model.")}:
        raise ValueError(f"{path} holds other parameters than model.path and model.trained_blocks give")
    for name, parameter in _trained(model):
        parameter.copy_(saved[f"model.{name}"])
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        if moments:
            # AdamW keeps its count of steps on the host, the moments beside their parameter.
            optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in moments.items()}
    best = state.pop("best") | {"weights": {n: saved[f"best.{n}"] for n in names}}
    return best, state


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
