"""A HuggingFace sequence classifier with one output, as a reward model: texts in, one score a response out.

Decoders run packed: what a prompt's responses share at their beginning is computed once, nothing is padded, and the
head reads the last token. Everything else (encoders) runs HF's own forward, pooling included, in batches of like lengths.
Shapes: M responses, T packed tokens, L padded length, D hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ampo_fast import attention, distributed
from ampo_fast.assets import from_hub, resolve_model
from ampo_fast.files import apply_umask
from ampo_fast.model import attention_implementation
from ampo_fast.packing import token_runs
from ampo_fast.reward_model.classifier_settings import check_missing, check_outputs, cut_blocks, token_limit
from ampo_fast.reward_model.config import RewardModelConfig
from ampo_fast.reward_model.frozen_blocks import FrozenBlocks
from ampo_fast.reward_model.mean_pooling import append_mean_block, mean_first_tokens, standardise
from ampo_fast.reward_model.text import RewardText
from ampo_fast.types import Prompt, Segment

log = logging.getLogger(__name__)

_MAX_WASTE = 0.1
_MIN_CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One prompt's responses as token ids, and how many first tokens all of them share."""

    id: str
    ids: tuple[tuple[int, ...], ...]
    shared: int

    @property
    def packed_tokens(self) -> int:
        return self.shared + sum(len(ids) - self.shared for ids in self.ids)


class RewardModel(nn.Module):
    """Scores of encoded groups; always in eval mode, so that a response's score does not depend on its company."""

    def __init__(self, model: Any, text: RewardText, config: RewardModelConfig, field: str) -> None:
        super().__init__()
        self.model = model.eval()
        self.text = text
        self.compute_dtype = getattr(torch, config.dtype)
        self.trusts_remote_code = config.trust_remote_code
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 1:
                module.register_forward_hook(_float32_scores)
        self.is_shared = self._decide_shared(config.attention, field)
        self.frozen = FrozenBlocks(model, config.trained_blocks, config.cache_mib)
        self.reads_first = config.pooling == "mean" and config.trained_blocks == 0
        """Whether only the first token leaves the frozen blocks: then nothing else of them is computed or kept."""
        self.num_fed = 0
        """Tokens fed so far, padding included; num_real: without it; num_read: each response with its own prompt."""
        self.num_real = 0
        self.num_read = 0

    @classmethod
    def load(
        cls,
        config: RewardModelConfig,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        field: str = "model.path",
    ) -> RewardModel:
        """Loads a backbone or a reward model onto this process's device.

        With `seed` a head that a bare backbone lacks is made anew; else it is refused.

        Raises ValueError naming the field for what cannot be loaded, for parameters that the checkpoint lacks, and for
        more than one output.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        attention.register()
        source = resolve_model(config.path, field)
        options = {"trust_remote_code": config.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            settings = AutoConfig.from_pretrained(source, **options)
            check_outputs(settings, config.path, field)
            settings.num_labels = 1
            cut_blocks(settings, config, field)
            text = RewardText(tokenizer)
            settings.get_text_config().pad_token_id = text.pad_id
            if seed is not None:
                torch.manual_seed(seed)  # of the new head
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, config=settings, dtype=torch.float32, output_loading_info=True, **options
            )
            text.limit(token_limit(max_tokens, tokenizer, model))
        except (OSError, ValueError, RuntimeError) as error:
            where = from_hub(source)
            raise ValueError(f"{field} = {config.path!r}{where} cannot be loaded as a classifier: {error}") from error
        check_missing(model, settings, info, config.path, field, seed is not None)
        attention.honour_softcap(model)
        if config.pooling == "mean":
            append_mean_block(model, config.keep_blocks, field)
        return cls(model.to(distributed.device()), text, config, field)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, group: Prompt) -> EncodedGroup:
        ids = self.text.encode(group.messages, [response.content for response in group.responses])
        return EncodedGroup(f"{group.id}", tuple(ids), _shared_length(ids))

    def encode_all(self, groups: Sequence[Prompt]) -> list[EncodedGroup]:
        """Says, the first time, how many responses are cut."""
        was_said = self.text.num_truncated > 0
        encoded = [self.encode(group) for group in groups]
        if self.text.num_truncated and not was_said:
            log.warning(
                "%d of %d responses are, with their prompt, longer than the reward model's %d tokens: it does not read their end",
                self.text.num_truncated, sum(len(group.responses) for group in groups), self.text.max_tokens,
            )  # fmt: skip
        return encoded

    def num_tokens(self, group: EncodedGroup) -> int:
        """What a forward of the group holds, but for padding: its shared beginning once, or with each response."""
        return group.packed_tokens if self.is_shared else sum(map(len, set(group.ids)))

    def forward(self, groups: Sequence[EncodedGroup], max_tokens: float = math.inf) -> torch.Tensor:
        """[M] float32: one score per response, groups in order. max_tokens: of a batch of whole texts."""
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            rows = [ids for group in groups for ids in group.ids]
            scores = self._packed(groups) if self.is_shared else self._padded(rows, max_tokens)
        self.num_read += sum(len(ids) for group in groups for ids in group.ids)
        return scores.float()

    @torch.no_grad()
    def score_groups(self, groups: Sequence[EncodedGroup], max_tokens: int) -> list[torch.Tensor]:
        """[N] float32 on the CPU for each group; groups of like length run together."""
        lengths = [self.num_tokens(group) for group in groups]
        order = sorted(range(len(groups)), key=lengths.__getitem__)
        found: dict[int, torch.Tensor] = {}
        for chunk in token_runs([lengths[i] for i in order], max_tokens):
            batch = [groups[order[i]] for i in chunk]
            parts = self(batch, max_tokens).cpu().split([len(group.ids) for group in batch])
            found |= {order[i]: part for i, part in zip(chunk, parts, strict=True)}
        return [found[i] for i in range(len(groups))]

    # --- decoders -----------------------------------------------------------------------------------------------------

    def _packed(self, groups: Sequence[EncodedGroup]) -> torch.Tensor:
        tokens, positions, last, segments, units = [], [], [], [], []
        for group in groups:
            start = len(tokens)
            tokens += group.ids[0][: group.shared]
            positions += range(group.shared)
            for ids in group.ids:
                tokens += ids[group.shared :]
                positions += range(group.shared, len(ids))
                last.append(len(tokens) - 1)
            lengths = tuple(len(ids) - group.shared for ids in group.ids)
            segments.append(Segment(start=start, prompt_length=group.shared, response_lengths=lengths))
            units.append((0, start, len(tokens)))
        self.num_fed += len(tokens)
        self.num_real += len(tokens)
        plan = attention.SegmentPlan.build(segments)

        def run() -> torch.Tensor:
            with attention_implementation(self.model, attention.NAME):
                return self.model.base_model(
                    input_ids=torch.tensor([tokens], device=self.device),
                    position_ids=torch.tensor([positions], device=self.device),
                    segments=plan,
                    use_cache=False,
                ).last_hidden_state

        hidden_TD = self.frozen.forward([group.ids for group in groups], units, (1, len(tokens)), run)[0]
        return self.model.score(hidden_TD[torch.tensor(last, device=self.device)])[:, 0]

    # --- everything else ----------------------------------------------------------------------------------------------

    def _padded(self, rows: Sequence[tuple[int, ...]], max_tokens: float) -> torch.Tensor:
        """Each different row once, in chunks of like lengths, through HF's own forward."""
        unique = sorted(set(rows), key=len)
        place = {ids: i for i, ids in enumerate(unique)}
        if self.reads_first:
            scores_U = self._head(self._first_tokens(unique, max_tokens))
        else:
            scores_U = torch.cat([self._padded_chunk(chunk) for chunk in _like_lengths(unique, max_tokens)])
        return scores_U[torch.tensor([place[ids] for ids in rows], device=self.device)]

    def _padded_chunk(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        inputs = self._inputs(rows)
        units = [(m, 0, len(ids)) for m, ids in enumerate(rows)]
        run = lambda: self.model(**inputs).logits  # noqa: E731
        return self.frozen.forward(rows, units, tuple(inputs["input_ids"].shape), run)[:, 0]

    def _inputs(self, rows: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids in rows)
        token_ML = torch.full((len(rows), longest), self.text.pad_id)
        mask_ML = torch.zeros((len(rows), longest), dtype=torch.long)
        for m, ids in enumerate(rows):
            token_ML[m, : len(ids)] = torch.tensor(ids)
            mask_ML[m, : len(ids)] = 1
        self.num_fed += token_ML.numel()
        self.num_real += sum(len(ids) for ids in rows)
        inputs = {"input_ids": token_ML.to(self.device), "attention_mask": mask_ML.to(self.device)}
        if all(len(ids) == longest for ids in rows):
            del inputs["attention_mask"]  # nothing is padded, and attention is faster without a mask
        return inputs

    def _first_tokens(self, rows: Sequence[tuple[int, ...]], max_tokens: float) -> torch.Tensor:
        """[n, D] what the frozen blocks leave at each row's first token, computed once."""
        found = {ids: self.frozen.kept[ids] for ids in rows if ids in self.frozen.kept}
        for chunk in _like_lengths([ids for ids in rows if ids not in found], max_tokens):
            for ids, first_D in zip(chunk, mean_first_tokens(self.model, self._inputs(chunk)), strict=True):
                found[ids] = first_D
                self.frozen.keep(ids, first_D)
        return torch.stack([found[ids] for ids in rows])

    def _head(self, first_nD: torch.Tensor) -> torch.Tensor:
        return self.model.classifier(self.model.base_model.pooler(first_nD[:, None]))[:, 0]

    @torch.no_grad()
    def standardise_pooling(self, groups: Sequence[EncodedGroup], max_tokens: int) -> None:
        """Fits model.pooling = "mean" to the spread of these responses; to be called once, before training."""
        rows = sorted({ids for group in groups for ids in group.ids}, key=lambda ids: (len(ids), ids))
        if self.reads_first:
            first_nD = self._first_tokens(rows, max_tokens)
        else:
            first_nD = torch.cat([self._run_to_pooler(chunk) for chunk in _like_lengths(rows, max_tokens)])
        standardise(self.model, first_nD)

    def _run_to_pooler(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        return self.model.base_model(**self._inputs(rows)).last_hidden_state[:, 0]

    # --- start and end ------------------------------------------------------------------------------------------------

    def _decide_shared(self, wanted: str, field: str) -> bool:
        reason = attention.why_not_shared(self.model) or self._why_not_last_token()
        if wanted == "segments" and reason:
            raise ValueError(f'{field}: attention = "segments" cannot run here: {reason}; set it to "unshared"')
        return wanted != "unshared" and not reason

    @torch.no_grad()
    def _why_not_last_token(self) -> str | None:
        """Why `score` of the last hidden state is not this model's output, or None where it is."""
        head = getattr(self.model, "score", None)
        if not isinstance(head, nn.Linear):
            return f"{type(self.model).__name__} has no linear head on the last token"
        ids = torch.tensor([[*range(5), self.text.closing_id]], device=self.device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours, theirs = head(hidden[:, -1]), self.model(input_ids=ids, use_cache=False).logits
        if not torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4):
            return f"{type(self.model).__name__} does more than a linear head on the last token"
        changed = torch.cat((ids[:, :-1], ids[:, :1]), 1)
        first = self.model.base_model(input_ids=changed, use_cache=False).last_hidden_state[:, 0]
        return None if torch.allclose(first, hidden[:, 0], atol=1e-5) else f"{type(self.model).__name__} is not causal"

    def export(self, directory: Path, sample: Sequence[EncodedGroup]) -> float:
        """Writes a HuggingFace directory, loads it again, and compares every tensor and the scores of `sample`.

        Returns the largest difference of a score between HF's own padded forward and ours. Raises RuntimeError where a
        tensor reads back different, or a score differs by more than 1e-3 of the scores' size.
        """
        from transformers import AutoModelForSequenceClassification

        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        self.model.save_pretrained(directory)
        self.text.tokenizer.save_pretrained(directory)
        apply_umask(*directory.glob("*.safetensors"))
        reloaded = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=self.trusts_remote_code
        ).eval()
        found = reloaded.state_dict()
        wrong = [name for name, tensor in state.items() if not torch.equal(tensor.cpu(), found[name])]
        if wrong:
            raise RuntimeError(f"the reward model exported to {directory} reads back different: {', '.join(wrong[:5])}")
        return _compare_scores(self, reloaded, sample, directory)


def _float32_scores(head: nn.Linear, args: tuple[torch.Tensor], score: torch.Tensor) -> torch.Tensor:
    """The head's product in float32: bfloat16 has 8 bits, and scores around 30 would be told apart by eighths."""
    if score.dtype == torch.float32:
        return score
    with torch.autocast(score.device.type, enabled=False):
        return nn.functional.linear(args[0].float(), head.weight, head.bias)


@torch.no_grad()
def _compare_scores(ours: RewardModel, reloaded: Any, sample: Sequence[EncodedGroup], directory: Path) -> float:
    if not sample:
        return 0.0
    rows = [torch.tensor(ids) for group in sample for ids in group.ids]
    pad = nn.utils.rnn.pad_sequence
    token_ML = pad(rows, batch_first=True, padding_value=ours.text.pad_id)
    mask_ML = pad([torch.ones_like(row) for row in rows], batch_first=True)
    theirs = reloaded(input_ids=token_ML, attention_mask=mask_ML).logits[:, 0]
    mine = ours(sample).cpu()
    gap = (theirs - mine).abs().max().item()
    if ours.compute_dtype == torch.float32 and gap > 1e-3 * max(1.0, mine.abs().max().item()):
        raise RuntimeError(f"the reward model exported to {directory} scores differently: by up to {gap:.3g}")
    return gap


def _like_lengths(rows: Sequence[tuple[int, ...]], max_tokens: float) -> list[list[tuple[int, ...]]]:
    """Rows, shortest first, in runs of at most max_tokens, padding included (one row may be longer alone), whose padding
    stays below a tenth, unless the run is too short to be worth a batch."""
    chunks: list[list[tuple[int, ...]]] = []
    tokens = 0
    for ids in rows:
        if chunks:
            padded = len(ids) * (len(chunks[-1]) + 1)
            is_wasteful = padded > (1.0 + _MAX_WASTE) * (tokens + len(ids)) and tokens >= _MIN_CHUNK_TOKENS
        if not chunks or is_wasteful or padded > max_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(ids)
        tokens += len(ids)
    return chunks


def _shared_length(ids: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share, leaving each at least one of its own."""
    shortest = min(len(row) for row in ids) - 1
    return next((t for t in range(shortest) if any(row[t] != ids[0][t] for row in ids)), shortest)
