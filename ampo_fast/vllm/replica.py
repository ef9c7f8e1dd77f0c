"""One vLLM server as the engine sees it: asked over HTTP for completions, scores and new weights; token ids in and out."""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from ampo_fast.engine_config import VllmConfig
from ampo_fast.http_client import HttpError, JsonClient, retried
from ampo_fast.model import Policy
from ampo_fast.types import Candidate
from ampo_fast.vllm.engine import transfer_api
from ampo_fast.vllm.process import VllmProcess
from ampo_fast.vllm.requests import BadAnswer, answer_room, checked_logp, read_candidate
from ampo_fast.vllm.transfer import Weights, WeightTransfer

_PROBE_TIMEOUT_S = 5.0


class Replica:
    """A server, ours (with a process) or somebody's (with a client alone)."""

    def __init__(
        self, name: str, options: VllmConfig, process: VllmProcess | None = None, client: JsonClient | None = None
    ) -> None:
        self.name, self.options, self.process, self.client = name, options, process, client
        self.in_flight = 0
        self.failures = 0
        # Only a file outlives a sync: a server that comes back finds no weights where they went from GPU to GPU.
        self.restarts_left = options.restarts if process and options.transfer == "file" else 0
        self.is_lost = False
        self.suspicions = self.cleared = 0
        """How often somebody's server may have been started again, with other weights than ours, and how many of these times
        are known to have been harmless."""
        self.cause: Exception | None = None
        """What it was repaired or lost for."""
        self.generation = 0
        """How often it was started again: a failure of an earlier life calls for no second restart."""
        self.max_model_len: int | None = None
        self.repair_lock = threading.Lock()
        self._mark: str | None = None
        """What somebody's server says of its weights since we handed them over; None: nothing, or it knows no such names."""
        self._model = "policy"
        self._transfer: WeightTransfer | None = None

    def start(self) -> None:
        """Starts a server of ours; of any, learns its model. Raises ValueError where somebody's is not fit to sample from."""
        if self.process is not None:
            self.client = self.process.start()
        served = retried(lambda: self.client.get("/v1/models", timeout_s=_PROBE_TIMEOUT_S), self.options.attempts)
        try:
            self._model = served["data"][0]["id"]
            self.max_model_len = served["data"][0].get("max_model_len")
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise HttpError(f"{self.name} does not describe itself as a vLLM server: {error!r}", False) from None
        if self.process is None:
            self._check_settings()

    def _check_settings(self) -> None:
        try:
            info = retried(lambda: self.client.get("/server_info?config_format=json"), self.options.attempts)
        except HttpError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            raise ValueError(
                f"{self.name} does not offer what the hand-over of weights needs ({error}); start it with "
                "VLLM_SERVER_DEV_MODE=1"
            ) from None
        try:
            mode = info["vllm_config"]["model_config"]["logprobs_mode"]
            is_insecure = info["vllm_env"].get("VLLM_ALLOW_INSECURE_SERIALIZATION")
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise HttpError(f"{self.name} does not describe itself as a vLLM server: {error!r}", False) from None
        if mode != "processed_logprobs":
            raise ValueError(
                f"{self.name} was started with --logprobs-mode {mode}: its log-probs are not those of the sampling "
                "temperature; start it with --logprobs-mode processed_logprobs"
            )
        if is_insecure:
            raise ValueError(
                f"{self.name} unpickles what it is sent; start it without VLLM_ALLOW_INSECURE_SERIALIZATION"
            )

    def complete(
        self, policy: Policy, prompt_ids: Sequence[int], fields: Mapping[str, Any], version: int
    ) -> list[Candidate]:
        """The candidates of one prompt. Raises HttpError; one that answers garbage counts as away."""
        body = {"model": self._model, "prompt": list(prompt_ids), "return_token_ids": True, **fields}
        answer = self.client.post("/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(fields["n"])):
                raise BadAnswer(f"{len(choices)} completions where {fields['n']} were asked for")
            if any(choice.get("prompt_token_ids") not in (None, list(prompt_ids)) for choice in choices):
                raise BadAnswer("the completions are of another prompt")
            room = answer_room(prompt_ids, fields["max_tokens"], self.max_model_len)
            read = functools.partial(read_candidate, policy, room=room, version=version)
            return [
                read(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])
                for choice in choices
            ]
        except (BadAnswer, KeyError, TypeError, AttributeError) as error:
            raise HttpError(f"{self.name} answered garbage: {error!r}", True) from None

    def score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Log-probs of the response after the prompt, at temperature 1."""
        tokens = [*prompt_ids, *response_ids]
        body = {"model": self._model, "prompt": tokens, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        answer = self.client.post("/v1/completions", body)
        try:
            rows = answer["choices"][0]["prompt_logprobs"][len(prompt_ids) :]
            return checked_logp([row[str(token)]["logprob"] for row, token in zip(rows, response_ids, strict=True)])
        except (BadAnswer, KeyError, TypeError, IndexError, ValueError) as error:
            raise HttpError(f"{self.name} scored with garbage: {error!r}", True) from None

    def load(self, weights: Path) -> None:
        """Loads a directory of safetensors into the running server and empties its cache of keys and values."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
        self.client.post("/collective_rpc", body, timeout_s=self.options.sync_timeout_s)
        self._take_over()

    def receive(self, version: int, weights: Weights, dtype: torch.dtype) -> None:
        """Takes the weights GPU to GPU, and empties its cache of keys and values."""
        if self._transfer is None:
            self._transfer = WeightTransfer(transfer_api(), self.name, self.client, self.options, dtype)
        self._transfer.send(version, weights)
        self._take_over()

    def _take_over(self) -> None:
        retried(self._forget, attempts=5)
        if self.process is None:
            self._mark = self._marked(f"ampo_fast {secrets.token_hex(8)}")

    def _marked(self, mark: str) -> str | None:
        """Has the server call its weights by this name, which it forgets with them; None where it cannot."""
        try:
            self.client.post("/update_weight_version", {"new_version": mark})
        except HttpError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        return mark

    def has_lost_its_mark(self) -> bool:
        """Whether somebody's server does not call its weights ours any more: it was started again, however alike they are."""
        if self._mark is None:
            return False
        return (self.client.get("/weight_info") or {}).get("weight_version") != self._mark

    def _forget(self) -> None:
        """Drops the keys and values of the old weights, which the server does only when nothing is running."""
        answer = self.client.post("/reset_prefix_cache", timeout_s=self.options.sync_timeout_s)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise HttpError(f"{self.name} did not empty its prefix cache: {answer!r}", True)

    def is_healthy(self) -> bool:
        """Alive and answering within a few seconds."""
        if self.process is not None and not self.process.is_alive():
            return False
        try:
            self.client.get("/health", timeout_s=_PROBE_TIMEOUT_S)
        except HttpError:
            return False
        return True

    def last_words(self) -> str:
        cause = f": {self.cause}" if self.cause is not None else ""
        return cause + (f"; its output ends:\n{self.process.output_tail()}" if self.process is not None else "")

    def release(self) -> None:
        """Breaks off what waits for the server, and lets one of ours end; close waits for that."""
        if self.client is not None:
            self.client.break_off()
        if self.process is not None:
            self.process.release()

    def close(self) -> None:
        self.release()
        if self.process is not None:
            self.process.close()
