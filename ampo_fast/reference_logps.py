"""The reference's log-probs of responses; of given ones each is computed once in a run, kept on disk, checked.

A frozen reference: RUN/reference/HASH.jsonl holds a line {id, index, logp} per response: the sum over its tokens, or, for
a loss that weights them, a list. HASH is of the reference's weights and compute type, its tokenizer and template, and the
data with the length at which responses are cut. One that follows the policy (reference.every) is computed anew at every
step; its weights are in RUN/reference/step_N.safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from ampo_fast import distributed
from ampo_fast.checkpoint import checkpoint_dirs
from ampo_fast.config import Config
from ampo_fast.files import save_tensors
from ampo_fast.jsonl import drop_torn_line, dump_line, read_jsonl
from ampo_fast.lora import base_tensors
from ampo_fast.model import Policy
from ampo_fast.packing import MicroBatch, group_length, idle_batch, kept_candidates, pack_responses, token_runs
from ampo_fast.types import CandidateGroup, PackedBatch, Prompt, SelectedGroup

_Key = tuple[str, int]
"""(prompt id, index of the response)."""
_Logp = float | list[float]
"""Summed over the response's tokens, or one each."""


class ReferenceLogps:
    """log pi_ref(y | x), summed over tokens, for every response that is trained on. Every rank makes the same calls.

    by_token: token by token as well, for a loss that weights tokens.
    """

    def __init__(self, config: Config, policy: Policy, prompts: Sequence[Prompt], by_token: bool = False) -> None:
        self.config = config
        self.by_token = by_token
        self.moves = config.reference.every > 0
        if self.moves and (distributed.world_size() > 1 or policy.lora):
            raise ValueError("reference.every > 0 runs in one process and without model.lora; set reference.every = 0")
        is_given = config.rollout.engine == "data" and not config.rollout.segment_tokens
        self.is_kept = is_given and not self.moves
        # An adapter's reference is its own base: no second copy.
        self.is_base = bool(policy.lora)
        self.model = policy if self.is_base else Policy.load(config.model)
        if self.is_kept:
            facts = (self.model, prompts, config.rollout.max_new_tokens)
            # The base of a sharded policy is gathered by all ranks; a copy is whole on the first one until it is sharded.
            self.hash = reference_hash(*facts) if self.is_base else distributed.on_main(lambda: reference_hash(*facts))
        if not self.is_base:
            self.model.shard()
        self.folder: Path | None = None
        self.path: Path | None = None
        self._kept: dict[_Key, _Logp] = {}

    @property
    def is_copy_of_start(self) -> bool:
        return not self.moves and not self.is_base

    def keep_in(self, run_dir: Path) -> None:
        """Takes over what the run's file holds and adds to it from now on; only for given responses.

        Raises ValueError where the run began with another model, template or data.
        """
        self.folder = run_dir / "reference"
        if not self.is_kept:
            return
        self.path = self.folder / f"{self.hash}.jsonl"
        self._kept = distributed.from_main(_read(self.path) if distributed.is_main() else {})

    def prepare(self, groups: Sequence[SelectedGroup]) -> None:
        """Computes what is missing of the step's given responses, in forwards of at most optim.micro_batch_tokens."""
        if not self.is_kept:
            return
        wanted = [(g.scored.group, [i for i in kept_candidates(g) if (_id(g), i) not in self._kept]) for g in groups]
        missing = [each for each in wanted if each[1]]
        lengths = [group_length(group, indices) for group, indices in missing]
        runs = token_runs(lengths, self.config.optim.micro_batch_tokens)
        chunks = [[missing[i] for i in run] for run in runs]
        num_ranks = distributed.world_size()
        chunks += [[]] * (-len(chunks) % num_ranks)
        mine = [self._score(chunk) for chunk in chunks[distributed.rank() :: num_ranks]]
        found = {key: logp for part in distributed.all_gather(mine) for chunk in part for key, logp in chunk.items()}
        self._kept |= found
        if found and self.path is not None and distributed.is_main():
            _append(self.path, found)

    def of(self, batch: PackedBatch, micro: MicroBatch) -> PackedBatch:
        """The batch that was packed from `micro`, with the reference's log-probs; zeros for the data's idle batch."""
        if not self.is_kept:
            logp_R = self._tokens(batch)
            sum_M = _sums(batch, logp_R)
            return dataclasses.replace(batch, ref_logp_M=sum_M, ref_logp_R=logp_R if self.by_token else None)
        if not micro.groups:
            zero_R = torch.zeros(batch.target_R.shape, device=batch.token_T.device)
            return dataclasses.replace(batch, ref_logp_M=torch.zeros_like(batch.reward_M), ref_logp_R=zero_R)
        kept = [self._kept[_id(group), i] for group in micro.groups for i in micro.part or kept_candidates(group)]
        if not self.by_token:
            return dataclasses.replace(batch, ref_logp_M=torch.tensor(kept, device=batch.token_T.device))
        logp_R = torch.tensor([logp for values in kept for logp in values], device=batch.token_T.device)
        return dataclasses.replace(batch, ref_logp_M=_sums(batch, logp_R), ref_logp_R=logp_R)

    # --- a reference that moves ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """After optimizer step `step`, where it is due: theta_ref <- decay theta_ref + (1 - decay) theta.

        decay 0: the reference of the next mini-batches is the policy (TSO, arXiv 2409.02118, iterative mini-batch DPO);
        decay 0.5 at every step: the moving average of SAPO (arXiv 2405.20830).
        """
        config = self.config.reference
        if not self.moves or step % config.every:
            return
        for own, new in zip(self.model.parameters(), policy.parameters(), strict=True):
            own.lerp_(new, 1.0 - config.decay)

    def save(self, step: int) -> None:
        """The weights at `step`, whole or not at all, before its checkpoint; those that no checkpoint needs any more go."""
        if not self.moves:
            return
        self.folder.mkdir(exist_ok=True)
        save_tensors(self._weights(step), {name: p.detach() for name, p in self.model.named_parameters()})
        saved = {int(path.stem.removeprefix("step_")): path for path in self.folder.glob("step_*.safetensors")}
        # The checkpoint saved before this one may still be in flight: not complete yet, and the next to be resumed from.
        before = max((other for other in saved if other < step), default=step)
        complete = {other for other, _ in checkpoint_dirs(self.folder.parent / "checkpoints")}
        for other in saved.keys() - complete - {before, step}:
            saved[other].unlink()

    @torch.no_grad()
    def restore(self, step: int) -> None:
        """Raises ValueError where the weights of that step are missing."""
        if not self.moves or step == 0:
            return
        path = self._weights(step)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the reference at step {step} is not known; use another --run.name")
        saved = load_file(path)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(saved[name])

    def _weights(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.safetensors"

    def _score(self, chunk: Sequence[tuple[CandidateGroup, list[int]]]) -> dict[_Key, _Logp]:
        if not chunk:
            self._tokens(idle_batch(self.model.device))
            return {}
        groups, indices = zip(*chunk, strict=True)
        batch = pack_responses(groups, indices, self.model.device)
        logp_R = self._tokens(batch)
        found = [part.tolist() for part in _parts(batch, logp_R)] if self.by_token else _sums(batch, logp_R).tolist()
        keys = [(group.prompt.id, i) for group, kept in chunk for i in kept]
        return dict(zip(keys, found, strict=True))

    def _tokens(self, batch: PackedBatch) -> torch.Tensor:
        with self.model.adapter_off() if self.is_base else contextlib.nullcontext():
            logp_R = self.model.token_logp(batch)
        distributed.reshard(self.model)
        return logp_R


def _parts(batch: PackedBatch, logp_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return logp_R.split(batch.response_offsets.diff().tolist())


def _sums(batch: PackedBatch, logp_R: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.sum() for part in _parts(batch, logp_R)])


def reference_hash(reference: Policy, prompts: Iterable[Prompt], max_new_tokens: int) -> str:
    """Of everything that the log-probs of given responses depend on; about a second per GB of weights."""
    digest = hashlib.blake2b(digest_size=12)
    tokenizer = reference.tokenizer
    facts = [str(reference.compute_dtype), max_new_tokens, reference.stop_ids, tokenizer.chat_template]
    digest.update(json.dumps([*facts, sorted(tokenizer.get_vocab().items())]).encode())
    for prompt in prompts:
        row = [prompt.id, prompt.messages, [response.content for response in prompt.responses]]
        digest.update(json.dumps(row, sort_keys=True).encode())
    if reference.lora:  # one whole tensor of a sharded base at a time
        tensors = base_tensors(reference.model, is_merged=False, by_name=True)
    else:
        tensors = sorted(reference.model.state_dict().items())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _id(group: SelectedGroup) -> str:
    return group.scored.group.prompt.id


def _read(path: Path) -> dict[_Key, _Logp]:
    path.parent.mkdir(exist_ok=True)
    others = [other.name for other in path.parent.glob("*.jsonl") if other != path]
    if others:
        raise ValueError(
            f"{path.parent} holds {others[0]}: the run began with another reference, template or data than now "
            f"({path.stem}); restore them, or use another --run.name"
        )
    path.touch()
    drop_torn_line(path)
    rows = (row for _, row in read_jsonl(path)) if path.stat().st_size else ()
    return {(row["id"], row["index"]): row["logp"] for row in rows}


def _append(path: Path, found: dict[_Key, _Logp]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(dump_line({"id": id_, "index": i, "logp": logp}) for (id_, i), logp in found.items())
