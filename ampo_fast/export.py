"""The policy as a HuggingFace model directory, written file by file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ampo_fast import lora
from ampo_fast.files import save_tensors, write_json
from ampo_fast.led_policy import LedPolicy
from ampo_fast.model import Policy, attention_implementation
from ampo_fast.named_weights import as_in_files, pieces

_FILE_BYTES = 4 << 30


def export(policy: Policy, directory: Path) -> None:
    """Writes a HuggingFace model directory in float32, loads it again and compares every tensor bit for bit. A LoRA adapter
    is merged into it, and beside that written as adapter/.

    Every rank must call it: rank 0 writes, while the shards reach it one tensor at a time, and holds no more of them than
    make up one file. Raises RuntimeError when what was read back differs, OSError for what the file system refuses.
    """
    led = LedPolicy(policy)
    led.lead(lambda: _write_and_compare(led, directory))
    if policy.lora:
        lora.save_adapter(policy.model, policy.lora, policy.source, directory / "adapter")


def _write_and_compare(policy: LedPolicy, directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    with attention_implementation(policy.model, "sdpa"):
        policy.model.save_pretrained(directory, state_dict={})  # all but the weights: configs, a model's own code
    policy.tokenizer.save_pretrained(directory)
    _write_weights(policy, directory)
    # Mapped from the files: it takes no memory of its own.
    reloaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    wrong = [
        name
        for name, tensor in policy.whole_tensors()
        if not torch.equal(tensor.to("cpu", torch.float32), reloaded[name])
    ]
    if wrong:
        raise RuntimeError(f"the model exported to {directory} reads back different: {', '.join(wrong[:5])}")


def _write_weights(policy: LedPolicy, directory: Path) -> None:
    """model.safetensors, or numbered files and their index; none gets its name before all are there, and then those of an
    export of before go, which transformers might read instead."""
    parts: list[Path] = []
    names_in: list[list[str]] = []
    num_bytes = 0
    try:
        for piece in pieces(as_in_files(policy.model, _untied(policy)), torch.float32, _FILE_BYTES):
            parts.append(directory / f".part-{len(parts) + 1:05d}.safetensors")
            save_tensors(parts[-1], piece, metadata={"format": "pt"})
            names_in.append(list(piece))
            num_bytes += sum(tensor.nbytes for tensor in piece.values())
        files = _file_names(len(parts))
        for part, file in zip(parts, files, strict=True):
            os.replace(part, directory / file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    index = directory / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    for old in {path.name for path in directory.glob("model*.safetensors")} - set(files):
        (directory / old).unlink()
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, names_in, strict=True) for name in names}
        write_json(index, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _untied(policy: LedPolicy) -> Iterator[tuple[str, torch.Tensor]]:
    """A tied head is one tensor under two names: it is written under the first, as transformers does."""
    names = dict(policy.model.named_parameters(remove_duplicate=False)).keys()
    second = names - dict(policy.model.named_parameters()).keys()
    return ((name, tensor) for name, tensor in policy.whole_tensors() if name not in second)
