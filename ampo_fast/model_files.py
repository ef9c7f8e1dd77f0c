"""What the files of a HuggingFace causal LM give: its weights, its shape without them, its tokenizer, its stop tokens."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from ampo_fast import attention, lora
from ampo_fast.assets import from_hub
from ampo_fast.config import ModelConfig


def read_model(source: str, config: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": config.trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError, SafetensorError) as error:
        where = from_hub(source)
        raise ValueError(f"model.path = {config.path!r}{where} cannot be loaded as a causal LM: {error}") from error
    attention.honour_softcap(model)
    if config.lora.rank:
        lora.inject(model, config.lora)
    return model


def read_tokenizer(source: str, config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of model.path = {config.path!r} cannot be loaded: {error}") from error


def empty_model(source: str, config: ModelConfig) -> Any:
    """The model without weights, on the meta device; read like rank 0's where it keeps tensors that nobody could send."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": config.trust_remote_code}
    settings = AutoConfig.from_pretrained(source, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, **options)
        attention.honour_softcap(model)
        if config.lora.rank:
            lora.inject(model, config.lora)
    hidden = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return read_model(source, config) if hidden else model


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The template's end-of-turn token first, then every other token that ends generation."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; put a chat_template.jinja beside it"
        )
    ids = [_end_of_turn(tokenizer), tokenizer.eos_token_id]
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids += eos if isinstance(eos, list) else [eos]
    found = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not found:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no EOS token and its template closes no turn; "
            "set eos_token in tokenizer_config.json"
        )
    return found


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an assistant's words, if it writes one."""
    marker = "ampo"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return ids[0] if ids and ids[0] in special else None
