"""rollout.engine = "vllm": vLLM inside this process. The only module that imports vllm."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ampo_fast import distributed
from ampo_fast.engine_config import VllmConfig
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights
from ampo_fast.rollouts.protocol import Keep
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling
from ampo_fast.vllm import canary
from ampo_fast.vllm.canary import Canary
from ampo_fast.vllm.requests import (
    HEAD_IN_FLOAT32,
    BadAnswer,
    answer_room,
    checked_logp,
    computes_prompts_whole,
    read_candidate,
    request_fields,
)


class VllmEngine:
    """Starts on first use, from the policy's own directory; later weights are handed over in memory. Each rank has its own,
    on its own device, but all must start it together: vLLM makes its groups of processes among all ranks.

    Raises ValueError where vllm is not installed or cannot sleep, and SyncError, on all ranks, where it does not sample
    from the trainer's weights.
    """

    answers_singly = True
    answers_for_all = False

    def __init__(self, policy: Policy, options: VllmConfig, dtype: str) -> None:
        self.policy, self.options, self.dtype = policy, options, dtype
        self.version = 0
        self.canary = Canary(policy, options.canary_tol or canary.default_tolerance(policy, dtype))
        self.canary.check_room(options.max_model_len, "rollout.options.max_model_len")
        self.sleep_level = sleep_level(options, policy.device.type)
        self._is_asleep = False
        self._vllm = _import_vllm()
        self._llm: Any = None

    def start(self) -> None:
        is_new = self._llm is None
        if is_new:
            self._start()
        if is_new or self._is_asleep:
            self._wake()
            self._check()

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, keep: Keep | None = None
    ) -> list[CandidateGroup]:
        self.start()
        encoded = [self.policy.encode_prompt(prompt.messages) for prompt in prompts]
        fields = [request_fields(self.policy, prompt.id, n, sampling) for prompt in prompts]
        answers = self._complete(encoded, fields)
        groups = [
            CandidateGroup(prompt=prompt, prompt_ids=prompt_ids, candidates=tuple(candidates))
            for prompt, prompt_ids, candidates in zip(prompts, encoded, answers, strict=True)
        ]
        if keep is not None:
            keep(groups)
        return groups

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._llm is None:
            self._start()
        self._load(named_tensors)
        self.version = version
        self._check()

    def _load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Puts the tensors in the engine's place of weights, one at a time, and ends with the engine awake."""
        dtype = getattr(torch, self.dtype)
        # A rank whose engine fails gathers the rest all the same: the others wait for its shards.
        with distributed.together(), distributed.to_the_end(named_tensors) as tensors, torch.no_grad():
            if self._is_asleep:
                self._llm.wake_up(tags=["weights"])
            # A tied head is named beside its embedding by the caller: without it vLLM keeps a stale one.
            weights = ((name, tensor.detach().to(dtype)) for name, tensor in tensors)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self._is_asleep:  # only now: the room for keys and values is not taken while weights are in two places
                self._llm.wake_up(tags=["kv_cache"])
                self._is_asleep = False
            if not self._llm.reset_prefix_cache():
                raise RuntimeError(
                    "vLLM kept keys and values of the old weights: its prefix cache could not be emptied"
                )

    def rest(self) -> None:
        """Leaves the GPU's memory to the training, at level 2 with the weights forgotten."""
        if self._llm is not None and self.sleep_level and not self._is_asleep:
            self._llm.sleep(level=self.sleep_level)
            self._is_asleep = True

    def _wake(self) -> None:
        """The engine as it was; asked again at the version that it slept at, where the policy still is."""
        if self._is_asleep and self.sleep_level == 2:
            self._load(NamedWeights(self.policy))
        elif self._is_asleep:
            with distributed.together():
                self._llm.wake_up()
            self._is_asleep = False

    def close(self) -> None:
        """Ends the engine; with several ranks the end of the process does: vLLM's shutdown leaves the trainer's group too."""
        if self._llm is not None and distributed.world_size() == 1:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    @property
    def sync_metrics(self) -> dict[str, float]:
        return self.canary.metrics

    def _start(self) -> None:
        options = self.options
        limit = {"max_model_len": options.max_model_len} if options.max_model_len else {}
        # One engine a rank, on the GPU of its LOCAL_RANK, within the group of processes that there is already.
        ranks = {"distributed_executor_backend": "external_launcher"} if distributed.world_size() > 1 else {}
        self._llm = self._vllm.LLM(
            model=self.policy.source,
            dtype=self.dtype,
            trust_remote_code=self.policy.trust_remote_code,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            hf_overrides=HEAD_IN_FLOAT32,
            enable_prefix_caching=True,
            enable_chunked_prefill=not computes_prompts_whole(),
            enforce_eager=options.enforce_eager,
            gpu_memory_utilization=options.memory_share,
            enable_sleep_mode=self.sleep_level > 0,
            **limit,
            **ranks,
        )

    def _check(self) -> None:
        self.canary.renew()
        fields = request_fields(self.policy, "canary", canary.NUM_SAMPLES, canary.SAMPLING)
        name = "vllm" if distributed.world_size() == 1 else f"vllm of rank {distributed.rank()}"
        with distributed.together():
            (samples,) = self._complete([self.canary.prompt_ids], [fields])
            fixed_logp = self._score(self.canary.prompt_ids, self.canary.response_ids)
        with distributed.together():
            self.canary.check(name, fixed_logp, samples)

    def _complete(self, prompts: Sequence[Sequence[int]], fields: Sequence[dict[str, Any]]) -> list[list[Candidate]]:
        """The candidates of each prompt of token ids. Raises BadAnswer."""
        params = [self._vllm.SamplingParams(**field, detokenize=False) for field in fields]
        outputs = self._llm.generate(self._tokens(prompts), params, use_tqdm=False)
        answers = []
        for prompt, output, field in zip(prompts, outputs, fields, strict=True):
            if len(output.outputs) != field["n"]:
                raise BadAnswer(f"vllm gave {len(output.outputs)} completions where {field['n']} were asked for")
            room = answer_room(prompt, field["max_tokens"], self._llm.model_config.max_model_len)
            answers.append(
                [self._candidate(part, room) for part in sorted(output.outputs, key=lambda part: part.index)]
            )
        return answers

    def _candidate(self, part: Any, room: int) -> Candidate:
        logp = [row[token].logprob for token, row in zip(part.token_ids, part.logprobs, strict=True)]
        return read_candidate(self.policy, list(part.token_ids), logp, part.finish_reason, room, self.version)

    def _score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Log-probs of the response after the prompt, at temperature 1."""
        params = self._vllm.SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate(self._tokens([(*prompt_ids, *response_ids)]), params, use_tqdm=False)
        rows = output.prompt_logprobs[len(prompt_ids) :]
        return checked_logp([row[token].logprob for row, token in zip(rows, response_ids, strict=True)])

    def _tokens(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        return [self._vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]


def sleep_level(options: VllmConfig, device: str) -> int:
    """How deep the engine sleeps while others train on `device`'s memory. Raises ValueError for sleep on a CPU.

    By default 2: weights that the next sync replaces are not worth a copy to host memory and back.
    """
    if device == "cuda":
        return 2 if options.sleep_level is None else options.sleep_level
    if options.sleep_level:
        raise ValueError(
            f"rollout.options.sleep_level = {options.sleep_level}: vLLM sleeps on CUDA only, this is a {device}; set it to 0"
        )
    return 0


class _Vllm:
    """The names of vllm that are used here."""

    def __init__(self) -> None:
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt

        self.LLM, self.SamplingParams, self.TokensPrompt = LLM, SamplingParams, TokensPrompt


def transfer_api() -> SimpleNamespace:
    """The names of vLLM's weight-transfer API that transfer.py uses. Raises ValueError where vllm has none."""
    try:
        from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise ValueError(
            f'rollout.options.transfer = "nccl" needs the weight-transfer API of vllm >= 0.32 in the trainer\'s environment '
            f'({error}); set rollout.options.transfer = "file"'
        ) from error
    return SimpleNamespace(
        ParamMeta=ParamMeta, WeightSource=WeightSource, Factory=WeightTransferTrainerFactory, TrainerInfo=NCCLTrainerInitInfo
    )  # fmt: skip


def _import_vllm() -> _Vllm:
    # The engine core in this process takes tensors as they are; in its own it would take them by pickle.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        return _Vllm()
    except ImportError as error:
        raise ValueError(
            f'rollout.engine = "vllm" cannot import vllm ({error}): pip install ampo_fast[vllm], or set "transformers"'
        ) from error
