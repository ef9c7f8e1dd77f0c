"""LoRA (Hu et al. 2021, 2106.09685): W + alpha / rank B A on linear layers, A and B trained, W frozen. Through PEFT.

The only module that imports peft. The layers are put into the transformers model in place, so that its forward, the packed
attention and FSDP2 see an ordinary model; what leaves it (exports, weight syncs) has the base model's names and B A added.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ampo_fast import distributed
from ampo_fast.config import LoraConfig
from ampo_fast.files import save_tensors

_ADAPTER = "default"
_BASE = ".base_layer."
_SEED = 0
"""Of A (B starts at zero): the same on every rank and in every run, whatever was drawn before."""


def inject(model: Any, config: LoraConfig) -> None:
    """Freezes the model and puts a float32 adapter on the layers that the config names, in place.

    Raises ValueError, naming the field, without peft, for layers that are not there, and for layers that are not linear or
    are the head (which stays frozen: the fused loss reads its weight).
    """
    peft = _peft()
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            peft.inject_adapter_in_model(_peft_config(config), model, _ADAPTER)
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules = {config.target_modules!r}: {error}") from error
    refused = [
        name
        for name, layer in _layers(model)
        if not isinstance(layer.get_base_layer(), nn.Linear) or layer.get_base_layer() is head
    ]
    if refused:
        raise ValueError(
            f"model.lora.target_modules = {config.target_modules!r} names {', '.join(refused[:3])}: only linear layers "
            'other than the head can be adapted; name those, or use "all-linear"'
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return ".lora_A." in name or ".lora_B." in name


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base model. (Not PEFT's disable_adapter: it toggles requires_grad, which FSDP2 has already copied.)"""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, 0.0):
        yield


def base_tensors(model: nn.Module, is_merged: bool, by_name: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of the base model, with the adapter added where is_merged, in the model's order or by name; one
    at a time, and all ranks must iterate to the end."""
    distributed.reshard(model)
    tensors = [item for item in model.state_dict().items() if not is_adapter(item[0])]
    if by_name:
        tensors.sort(key=lambda item: _base_name(item[0]))
    for name, tensor in tensors:
        whole = distributed.whole(tensor.detach())
        prefix, _, leaf = name.rpartition(_BASE)
        if is_merged and prefix and leaf == "weight":
            whole = whole + _delta(model.get_submodule(prefix))
        yield _base_name(name), whole


def _base_name(name: str) -> str:
    return name.replace(_BASE, ".")


def base_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 bits of the frozen base; every rank must ask."""
    digest = hashlib.sha256()
    for name, tensor in base_tensors(model, is_merged=False):
        if distributed.is_main():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to("cpu", torch.float32).contiguous().numpy())
    return distributed.from_main(digest.hexdigest())


def save_adapter(model: nn.Module, config: LoraConfig, base: str, directory: Path) -> None:
    """Writes a directory that peft.PeftModel.from_pretrained reads; every rank must call it. base: the model's path."""
    distributed.reshard(model)
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": distributed.whole(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(directory / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
        peft_config = _peft_config(config)
        peft_config.base_model_name_or_path, peft_config.inference_mode = base, True
        peft_config.save_pretrained(str(directory))

    distributed.on_main(write)


def _delta(layer: Any) -> torch.Tensor:
    matrices = (distributed.whole(part[_ADAPTER].weight.detach()) for part in (layer.lora_B, layer.lora_A))
    b_OR, a_RI = matrices
    return layer.scaling[_ADAPTER] * (b_OR @ a_RI)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _peft_config(config: LoraConfig) -> Any:
    targets = config.target_modules
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"model.lora.rank needs PEFT ({error}); pip install 'ampo_fast[lora]'") from error
    return peft
