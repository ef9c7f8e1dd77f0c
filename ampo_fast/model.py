"""The policy: a HuggingFace causal LM, its tokenizer, and one forward from packed groups to the loss.

Parameters are float32; `dtype` is the compute type.
Shapes: T packed tokens, R predicted response tokens, D hidden, V vocab, B groups, M responses.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from torch.utils.checkpoint import checkpoint

from ampo_fast import attention, distributed, liger, lora, model_limits, unshared
from ampo_fast.assets import resolve_model
from ampo_fast.config import ModelConfig
from ampo_fast.fused import fused_linear_group_loss
from ampo_fast.logprobs import linear_logprob
from ampo_fast.model_files import empty_model, read_model, read_tokenizer, stop_ids
from ampo_fast.packing import pack_responses
from ampo_fast.types import Candidate, CandidateGroup, PackedBatch, Prompt
from ampo_fast.validation import nan_let_through

log = logging.getLogger(__name__)


class Policy(nn.Module):
    """A causal LM with its chat template and head, ready for packed groups.

    Always in eval mode: dropout would make the two forwards of a response disagree.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: ModelConfig, source: str, found: tuple | None = None
    ) -> None:
        """found: (stop_ids, logit_divisor, is_shared) as rank 0 has them, for a model whose weights are not here yet."""
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.source = source
        self.trust_remote_code = config.trust_remote_code
        self.lora = config.lora if config.lora.rank else None
        self.compute_dtype = getattr(torch, config.dtype)
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.logit_divisor = 1.0
        """What the model divides its logits by after the head: 1 for most."""
        if found:
            self.stop_ids, self.logit_divisor, self.is_shared = found
        else:
            self.stop_ids: tuple[int, ...] = stop_ids(model, tokenizer)
            self.logit_divisor = self._find_logit_divisor()
            self.is_shared: bool = self._decide_shared(config.attention)
        if config.liger:
            liger.apply(model)

    @classmethod
    def load(cls, config: ModelConfig) -> Policy:
        """Loads model and tokenizer from a directory, a hub name, or package:NAME. Raises ValueError naming the field.

        With several ranks all must call it, and then shard(): rank 0 alone reads the weights, into host memory; elsewhere
        they are on the meta device until then.
        """
        attention.register()
        source = resolve_model(config.path, "model.path")
        if distributed.world_size() == 1:
            return cls(
                read_model(source, config).to(distributed.device()), read_tokenizer(source, config), config, source
            )
        own: list[Policy] = []

        def read() -> tuple:
            own.append(cls(read_model(source, config), read_tokenizer(source, config), config, source))
            return own[0].stop_ids, own[0].logit_divisor, own[0].is_shared

        found = distributed.on_main(read)
        return (
            own[0] if own else cls(empty_model(source, config), read_tokenizer(source, config), config, source, found)
        )

    @classmethod
    def load_replica(cls, config: ModelConfig) -> Policy:
        """A whole copy for sampling and scoring beside a sharded policy: parameters in the compute type, none trained,
        no adapter of its own. All ranks must call it."""
        policy = cls.load(config.without_adapter).requires_grad_(False)
        for parameter in policy.parameters():  # not .to(dtype): rotary frequencies are buffers and stay float32
            parameter.data = parameter.data.to(policy.compute_dtype)
        if distributed.world_size() > 1:
            distributed.share_values(policy.modules())
        return policy

    def compile_blocks(self) -> Policy:
        """Has torch.compile fuse the small operations between each block's matrix products, in passes with a gradient.

        What samples and scores runs as before: its shapes change at every token. Before checkpoint_activations and shard.
        """
        attention.keep_out_of_programs()
        for block in self._blocks_for("model.compile"):
            block.forward = functools.partial(_compiled, block.forward, torch.compile(block.forward, dynamic=True))
        return self

    def checkpoint_activations(self) -> Policy:
        """Keeps only each block's input for the backward, which runs the block again; the head is never run twice."""
        for block in self._blocks_for("optim.activation_checkpointing"):
            block.forward = functools.partial(_checkpointed, self.model, block.forward)
        return self

    def shard(self) -> Policy:
        """Spreads the parameters over all ranks (FSDP2), in place; nothing where there is one rank."""
        if distributed.world_size() > 1:
            distributed.shard(self, self.blocks, self.compute_dtype, methods=("token_logp", "response_states"))
        return self

    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of everything by the base model's names, an adapter merged into what it adapts; one at a time,
        and all ranks must iterate to the end."""
        if self.lora:
            return lora.base_tensors(self.model, is_merged=True)
        return distributed.whole_tensors(self.model)

    @functools.cached_property
    def adapter_id(self) -> dict[str, Any] | None:
        """What a saved adapter fits: its settings and the hash of its base; None without one. Every rank must ask."""
        return {**self.lora.model_dump(mode="json"), "base": lora.base_hash(self.model)} if self.lora else None

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The model that the adapter started from."""
        with lora.switched_off(self.model):
            yield

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's layers, by what the model class says must not be split; not what such a layer holds (Mamba's
        names its mixers too)."""
        names = set(self.model._no_split_modules or ())
        found = [module for module in self.model.modules() if type(module).__name__ in names]
        inside = {id(part) for module in found for part in module.modules() if part is not module}
        return [module for module in found if id(module) not in inside]

    def _blocks_for(self, field: str) -> list[nn.Module]:
        """Raises ValueError where the model names no layers, and the switch would do nothing in silence."""
        found = self.blocks
        if not found:
            raise ValueError(
                f"{field} = true: {type(self.model).__name__} does not say what its layers are; set it to false"
            )
        return found

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def rope_limit(self) -> tuple[str, int] | None:
        """(rope type, tokens) up to which a sequence leaves those beside it as they are; None: any length."""
        return model_limits.rope_limit(self.model)

    @property
    def context_length(self) -> int | None:
        return model_limits.context_length(self.model)

    @property
    def usable_length(self) -> int | None:
        return model_limits.usable_length(self.model)

    def encode_prompt(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Applies the chat template once, with the generation prompt.

        The template writes its own BOS, so the tokenizer adds no special tokens: a doubled BOS cannot arise.
        """
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template of model.path takes no turns of {roles}: {error}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_response(self, content: str) -> tuple[int, ...]:
        """Token ids of a given response, closed by the end-of-turn token, which its text may bring already."""
        ids = self.tokenizer(content, add_special_tokens=False)["input_ids"]
        return tuple(ids) if ids and ids[-1] in self.stop_ids else (*ids, self.stop_ids[0])

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def hidden_rows(self, batch: PackedBatch) -> torch.Tensor:
        """Packed groups -> the hidden state that predicts each response token, [R, D], in the type that is computed in.

        Under autocast the model's own last one is float32, and the head's products would be too: outside its reach, and at a
        fifteenth of a GPU's speed.
        """
        with self.autocast():
            if self.is_shared:
                hidden_RD = self._shared_hidden(batch)[batch.row_R]
            else:
                hidden_RD = unshared.hidden_rows(self.model, batch, distributed.is_sharded(self))
        return hidden_RD.to(self.compute_dtype)

    def _shared_hidden(self, batch: PackedBatch, plan: attention.SegmentPlan | None = None) -> torch.Tensor:
        plan = plan or attention.SegmentPlan.build(batch.segments)
        with attention_implementation(self.model, attention.NAME):
            return self.model.base_model(
                input_ids=batch.token_T[None], position_ids=batch.position_T[None], segments=plan, use_cache=False
            ).last_hidden_state[0]

    def states(self, texts: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
        """Last hidden states of independent texts, given as token ids, [L, D] each: one forward where attention keeps apart
        what is packed, else one each."""
        with self.autocast():
            if not self.is_shared:
                ids = [torch.tensor([text], device=self.device) for text in texts]
                return [self.model.base_model(input_ids=i, use_cache=False).last_hidden_state[0] for i in ids]
            alone = [
                CandidateGroup(prompt=Prompt(id="", messages=()), prompt_ids=tuple(text), candidates=())
                for text in texts
            ]
            batch = pack_responses(alone, [()] * len(texts), self.device)
            return self._shared_hidden(batch).split([len(text) for text in texts])

    def forward(
        self, batch: PackedBatch, loss_fn: Callable, normalizer: float, eos_id: int | None = None
    ) -> tuple[torch.Tensor, Any]:
        """-> (loss, ResponseStats): the sum of the batch's group losses over `normalizer`, the global group count."""
        hidden_RD = self.hidden_rows(batch)
        with nan_let_through():  # the step's own guard sees it, on all ranks
            return fused_linear_group_loss(
                hidden_RD,
                self.head.weight.to(hidden_RD.dtype),
                batch.target_R,
                batch.response_offsets,
                batch.group_offsets,
                batch.reward_M,
                loss_fn,
                ref_logp_M=batch.ref_logp_M,
                positive_M=batch.positive_M,
                baseline_B=batch.baseline_B,
                ref_logp_R=batch.ref_logp_R,
                compare_tokens=True,
                eos_id=eos_id,
                normalizer=normalizer,
                **self._head_options,
            )

    @torch.no_grad()
    def token_logp(
        self, batch: PackedBatch, eos_id: int | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of each response token at temperature 1, [R] float32; given eos_id, also that token's at each row."""
        hidden_RD = self.hidden_rows(batch)
        weight_VD = self.head.weight.to(hidden_RD.dtype)
        with nan_let_through():
            return linear_logprob(hidden_RD, weight_VD, batch.target_R, eos_id=eos_id, **self._head_options)

    @property
    def _head_options(self) -> dict[str, Any]:
        return {"bias_V": self.head.bias, "softcap": self.softcap, "temperature": self.logit_divisor}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head on last hidden states [..., D], float32 [..., V]: for a few rows at a time."""
        logits = self.head(hidden).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.logit_divisor == 1.0 else logits / self.logit_divisor

    @torch.no_grad()
    def response_states(self, batch: PackedBatch) -> torch.Tensor:
        """The hidden state that predicts each response token, [R, D]; of a sharded policy every rank must ask."""
        return self.hidden_rows(batch)

    def _decide_shared(self, wanted: str) -> bool:
        """Whether a prompt runs once for its group; refused, or left with a warning, where the model cannot."""
        if wanted == "unshared":
            return False
        reason = attention.why_not_shared(self.model) or self._why_sharing_differs()
        if reason and wanted == "segments":
            raise ValueError(f'model.attention = "segments" cannot run here: {reason}; set it to "unshared"')
        if reason:
            log.warning("each response runs with its own copy of the prompt (slower): %s", reason)
        return not reason

    @torch.no_grad()
    def _why_sharing_differs(self) -> str | None:
        """Runs two short groups both ways: whatever a model's layers do, their hidden states must agree.

        A sliding window is longer than they are: of it only this is known, whether attention was told.
        """
        batch = _probe_batch(self.stop_ids[0], self.device)
        alone_RD = unshared.hidden_rows(self.model, batch, is_sharded=False, max_padded=1.0)
        plan = attention.SegmentPlan.build(batch.segments)
        try:
            shared_RD = self._shared_hidden(batch, plan)[batch.row_R]
        except (ValueError, TypeError, RuntimeError) as error:
            return str(error)
        worst = (alone_RD - shared_RD).abs().max() / alone_RD.abs().max()
        # Parameters are float32 here, where rounding alone stays below 1e-4.
        if not worst < 1e-3:
            return f"its hidden states differ by {worst:.1e} when a prompt is shared"
        return model_limits.why_window_is_lost(self.model, plan.windows)

    @torch.no_grad()
    def _find_logit_divisor(self) -> float:
        """Refuses a model whose logits are not softcap(hidden W^T + b) / divisor: our log-probs would be of another model.

        The divisor stands in the config, as what divides (Granite) or what multiplies (Cohere, HyperCLOVA X).
        """
        name = type(self.model).__name__
        if self.model.base_model is self.model:
            raise ValueError(f"model.path: {name} does not tell its layers from its head; choose another model")
        ids = torch.tensor([[self.stop_ids[0], *range(3)]], device=self.device)
        ours = self.logits(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = self.model(input_ids=ids, use_cache=False).logits
        config = self.model.config.get_text_config()
        scales = [scale for key in ("logits_scaling", "logit_scale") if (scale := getattr(config, key, None))]
        divisors = [1.0, *(divisor for scale in scales for divisor in (scale, 1.0 / scale))]
        divisor = min(divisors, key=lambda divisor: (ours / divisor - theirs).abs().max())
        if not torch.allclose(ours / divisor, theirs, atol=1e-3, rtol=1e-3):
            raise ValueError(f"{name} changes its logits after the head; not supported")
        return divisor


def _probe_batch(token: int, device: torch.device) -> PackedBatch:
    """Two short groups with responses of one to three tokens, for a comparison of two ways to run them."""
    answers = [Candidate(content="", token_ids=(token, *range(n))) for n in range(3)]
    groups = [
        CandidateGroup(prompt=Prompt(id="", messages=()), prompt_ids=(token, *range(n)), candidates=tuple(answers))
        for n in (3, 1)
    ]
    return pack_responses(groups, [range(3)] * 2, device)


def _compiled(forward: Callable, compiled: Callable, *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)


def _checkpointed(model: Any, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    name = model.config.get_text_config()._attn_implementation

    def run(*args: Any, **kwargs: Any) -> Any:
        with attention_implementation(model, name):  # the second run is in the backward, after the forward put it back
            return forward(*args, **kwargs)

    # Always in eval mode, so there is no dropout whose random state a second run would have to meet again.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextlib.contextmanager
def attention_implementation(model: Any, name: str):
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
