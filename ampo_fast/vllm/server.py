"""rollout.engine = "vllm-server": vLLM servers over HTTP, one or several, that may die, hang or answer garbage.

A prompt is one request. A failed one goes back to the queue and to another server; a server of ours that died or hangs is
started again, given the newest weights and checked, before it is asked again. Somebody's server may have been started again
by them: it shows that it still has our weights before its answers count.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from ampo_fast.engine_config import VllmConfig
from ampo_fast.http_client import HttpError, JsonClient, retried
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights
from ampo_fast.rollouts.protocol import IncompleteBatch, Keep
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling
from ampo_fast.vllm import canary
from ampo_fast.vllm.canary import Canary, SyncError
from ampo_fast.vllm.process import ServerDied, make_processes
from ampo_fast.vllm.replica import Replica
from ampo_fast.vllm.requests import request_fields
from ampo_fast.vllm.weight_files import WeightFiles, roomy_parent

log = logging.getLogger(__name__)

_MAX_REQUESTS = 256
"""Requests under way at a time; vLLM queues and batches them itself."""


class VllmServerEngine:
    """Starts on first use. `close` ends the servers it started; those that ran already are left alone."""

    answers_singly = True
    answers_for_all = True

    def __init__(self, policy: Policy, options: VllmConfig, dtype: str) -> None:
        self.policy, self.options = policy, options
        self.version = 0
        self.canary = Canary(policy, options.canary_tol or canary.default_tolerance(policy, dtype))
        self.canary.check_room(options.max_model_len, "rollout.options.max_model_len")
        self.compute_dtype = getattr(torch, dtype)
        self.replicas = _replicas(policy, options, dtype)
        num_bytes = _size(policy, self.compute_dtype) if options.transfer == "file" else 0
        self._files = WeightFiles(roomy_parent(options.sync_dir, num_bytes), self.compute_dtype)
        self._is_started = self._is_closed = False
        self._pick_lock = threading.Lock()
        atexit.register(self.close)

    # --- rollouts -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, keep: Keep | None = None
    ) -> list[CandidateGroup]:
        """Raises IncompleteBatch when a prompt cannot be answered, once all others were answered or given up."""
        self.start()
        for replica in self.replicas:
            replica.failures = 0  # who failed in an earlier round is asked again
            replica.suspicions += replica.process is None
        with self._threads(max(1, min(len(prompts), _MAX_REQUESTS))) as pool:
            futures = [pool.submit(self._answer, prompt, n, sampling) for prompt in prompts]
            for future in as_completed(futures):
                if keep is not None and future.exception() is None:
                    keep([future.result()])
        errors = [future.exception() for future in futures]
        failed = next((error for error in errors if error is not None), None)
        if failed is None:
            return [future.result() for future in futures]
        for error in errors:
            if isinstance(error, SyncError):
                raise error
        raise IncompleteBatch(f"{errors.count(None)} of {len(prompts)} prompts were answered, then: {failed}")

    def _answer(self, prompt: Prompt, n: int, sampling: Sampling) -> CandidateGroup:
        prompt_ids = self.policy.encode_prompt(prompt.messages)
        fields = request_fields(self.policy, prompt.id, n, sampling)

        def ask() -> CandidateGroup:
            replica = self._pick()
            try:
                candidates = self._candidates(replica, prompt_ids, fields)
            finally:
                with self._pick_lock:
                    replica.in_flight -= 1
            replica.failures = 0
            return CandidateGroup(prompt=prompt, prompt_ids=prompt_ids, candidates=tuple(candidates))

        return retried(ask, self.options.attempts, at_least_s=self.options.request_timeout_s)

    def _candidates(self, replica: Replica, prompt_ids: Sequence[int], fields: dict[str, Any]) -> list[Candidate]:
        """One server's answer, of our weights for certain. Raises HttpError, and SyncError where it cannot have them."""
        self._clear_suspicion(replica)
        with replica.repair_lock:  # one that is being started again answers before it has our weights
            life = replica.generation
        try:
            candidates = replica.complete(self.policy, prompt_ids, fields, self.version)
        except HttpError as error:
            self._failed(replica, life, error)
            raise
        self._clear_suspicion(replica)  # another request may have failed meanwhile
        if replica.generation != life:
            raise HttpError(f"{replica.name} was started again while it answered", True)
        return candidates

    def _pick(self) -> Replica:
        """The least failing, then least busy server that is not lost. Raises HttpError once the engine is closed."""
        with self._pick_lock:
            best = min(self._usable(), key=lambda replica: (replica.failures, replica.in_flight))
            best.in_flight += 1
            return best

    def _usable(self) -> list[Replica]:
        if self._is_closed:
            raise HttpError("the engine was closed", False)
        usable = [replica for replica in self.replicas if not replica.is_lost]
        if not usable:
            names = "\n".join(f"{replica.name}{replica.last_words()}" for replica in self.replicas)
            raise HttpError(f"no server is left: {names}", False)
        return usable

    def _failed(self, replica: Replica, life: int, error: HttpError) -> None:
        """Counts the failure; a server of ours that is dead or hangs is repaired, once for all who waited for it."""
        if not error.is_passing or self._is_closed:
            return
        replica.failures += 1
        replica.suspicions += replica.process is None
        with replica.repair_lock:
            if replica.generation == life and not replica.is_lost and replica.process and not replica.is_healthy():
                log.warning("%s failed (%s)", replica.name, error)
                replica.cause = error
                self._repair(replica)

    def _clear_suspicion(self, replica: Replica) -> None:
        """A suspect is asked for its weights' name and scores the canary's fixed response again; where it has lost our weights
        it gets them again."""
        failures = replica.failures
        if replica.cleared == replica.suspicions:
            return
        with replica.repair_lock:
            suspicions = replica.suspicions
            if replica.cleared == suspicions:
                return
            if replica.is_lost or replica.failures > failures:
                raise HttpError(f"{replica.name} failed while others waited for it", True)
            try:
                fixed_logp = replica.score(self.canary.prompt_ids, self.canary.response_ids)
                if replica.has_lost_its_mark() or not self.canary.is_as_checked(replica.name, fixed_logp):
                    self._hand_over_again(replica)
            except HttpError:
                replica.failures += 1
                raise
            except SyncError as error:
                replica.is_lost, replica.cause = True, error
                raise
            replica.cleared = suspicions

    def _hand_over_again(self, replica: Replica) -> None:
        replica.generation += 1  # before: no answer of the other weights may count
        if self._files.newest is None:
            raise SyncError(
                f"{replica.name} has lost our weights: was it started again? Only a file can hand them over again: set "
                'rollout.options.transfer = "file"'
            )
        log.warning("%s has lost our weights (was it started again?) and gets them again", replica.name)
        replica.start()
        replica.load(self._files.newest)
        self._check(replica, with_samples=False)

    def _repair(self, replica: Replica) -> None:
        """Starts a server of ours again with the newest weights, or gives it up. The caller holds its repair_lock.

        Raises SyncError, and gives it up, where it then has other weights all the same.
        """
        while replica.restarts_left and not self._is_closed:
            replica.restarts_left -= 1
            log.warning("%s is started again%s", replica.name, replica.last_words())
            replica.process.kill()
            replica.generation += 1  # before: what it answers until it is checked does not count
            try:
                replica.start()
                if self._files.newest is not None:
                    replica.load(self._files.newest)
                self._check(replica, with_samples=False)
            except (ServerDied, HttpError) as error:
                log.warning("%s did not come back: %s", replica.name, error)
                continue
            except SyncError as error:
                replica.cause = error
                self._give_up(replica)
                raise
            replica.failures = 0
            return
        self._give_up(replica)

    def _give_up(self, replica: Replica) -> None:
        replica.is_lost = True
        replica.process.kill()
        log.warning("%s is given up%s", replica.name, replica.last_words())

    # --- weights --------------------------------------------------------------------------------------------------

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hands the weights to every server and checks each. Raises SyncError, or HttpError when none is left."""
        self._start(check=False)
        self._sync(version, named_tensors)

    def _sync(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        hand_over = self._hand_over if self.options.transfer == "nccl" else self._hand_over_files
        self.canary.renew()
        hand_over(version, named_tensors)
        self._check_all()
        self.version = version

    def _hand_over(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for replica in self._usable():
            self._step(replica, functools.partial(replica.receive, version, named_tensors, self.compute_dtype))

    def _hand_over_files(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        before = self._files.write(version, named_tensors)
        for replica in self.replicas:  # somebody's server that was away may be back
            replica.is_lost = replica.is_lost and replica.process is not None
        usable = self._usable()
        with self._threads(len(usable)) as pool:
            list(pool.map(self._load, usable))
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    def _load(self, replica: Replica) -> None:
        def load() -> None:
            if replica.process is None:
                replica.start()  # it may be another one than at the last sync
            replica.load(self._files.newest)

        self._step(replica, lambda: self._again(replica, load, self.options.sync_timeout_s))

    def _step(self, replica: Replica, step: Callable[[], None]) -> None:
        """A step of the sync with one server. One of ours that fails is started again, with the weights and a check;
        somebody's is left out until the next sync."""
        try:
            step()
        except HttpError as error:
            log.warning("%s failed in the sync: %s", replica.name, error)
            replica.cause = error
            if replica.process is None:
                replica.is_lost = True
                return
            with replica.repair_lock:
                self._repair(replica)

    def _again(self, replica: Replica, call: Callable[[], Any], at_most_s: float) -> Any:
        """call(), repeated while it fails in passing: longer where nobody but another could start the only server again."""
        is_only = replica.process is None and len(self.replicas) == 1
        return retried(call, self.options.attempts, at_least_s=at_most_s if is_only else 0.0, at_most_s=at_most_s)

    def _check_all(self) -> None:
        for replica in self._usable():
            self._step(replica, functools.partial(self._check, replica))
        self._usable()

    def _check(self, replica: Replica, with_samples: bool = True) -> None:
        prompt_ids, timeout_s = self.canary.prompt_ids, self.options.request_timeout_s
        self.canary.check_room(replica.max_model_len, f"max_model_len of {replica.name}")
        fixed_logp = self._again(replica, lambda: replica.score(prompt_ids, self.canary.response_ids), timeout_s)
        samples = []
        if with_samples:
            fields = request_fields(self.policy, "canary", canary.NUM_SAMPLES, canary.SAMPLING)
            ask = functools.partial(replica.complete, self.policy, prompt_ids, fields, self.version)
            samples = self._again(replica, ask, timeout_s)
        self.canary.check(replica.name, fixed_logp, samples)

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._start()

    def rest(self) -> None:
        pass  # a server's GPU is its own

    def _start(self, check: bool = True) -> None:
        """Starts all servers. Those that ran already get our weights: they may serve an earlier run's."""
        if self._is_started:
            return
        with self._threads(len(self.replicas)) as pool:
            list(pool.map(Replica.start, self.replicas))
        self._is_started = True
        if not check:
            return
        if self.options.base_urls:
            self._sync(self.version, NamedWeights(self.policy))
            return
        self.canary.renew()
        self._check_all()

    @contextlib.contextmanager
    def _threads(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads that nobody waits for once the caller is ended, by Ctrl-C or an error: the engine is closed then."""
        pool = ThreadPoolExecutor(count)
        try:
            yield pool
        except BaseException:
            self.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def sync_metrics(self) -> dict[str, float]:
        return self.canary.metrics

    def close(self) -> None:
        """Also while another thread generates: that is told of the failure, and has kept what was finished until then."""
        self._is_closed = True
        atexit.unregister(self.close)
        for replica in self.replicas:
            replica.release()  # all at once
        for replica in self.replicas:
            replica.close()
        self._files.close()


def _size(policy: Policy, dtype: torch.dtype) -> int:
    """Bytes of the weights as files hold them, a tied head beside its embedding."""
    return sum(tensor.numel() for tensor in policy.model.state_dict().values()) * dtype.itemsize


def _replicas(policy: Policy, options: VllmConfig, dtype: str) -> list[Replica]:
    if options.base_urls:
        key = os.environ.get(options.key_env)
        clients = [JsonClient(url, key, options.request_timeout_s) for url in options.base_urls]
        return [Replica(client.base_url, options, client=client) for client in clients]
    processes = make_processes(policy.source, dtype, options, policy.trust_remote_code)
    return [Replica(process.name, options, process=process) for process in processes]
