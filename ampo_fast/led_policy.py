"""A sharded policy as rank 0 alone runs it, for servers that only rank 0 speaks to: the other ranks follow it, call by call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ampo_fast import distributed
from ampo_fast.model import Policy
from ampo_fast.types import PackedBatch


class LedPolicy:
    """Within `lead`, what rank 0 computes with it is computed by all ranks; what needs no other rank is the policy's own."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._walk: Iterator | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def lead(self, work: Callable[[], None]) -> None:
        """Runs work on rank 0, which may call token_logp and whole_tensors; what it raises is raised on every rank."""
        if not distributed.is_main():
            self._follow()
            return
        error = None
        try:
            work()
        except Exception as caught:  # whatever stops rank 0 must stop the others too, with the same words
            error = caught
        self._end_walk(error)
        distributed.from_main(("end", distributed.portable(error)))
        if error is not None:
            raise error

    def _end_walk(self, error: Exception | None = None) -> None:
        """Takes the others to the end of a walk that was left early: there they listen again."""
        walk, self._walk = self._walk, None
        try:
            if walk is not None:
                walk.close()
        except ValueError:  # it hangs in a thread of its own, and nobody can be told
            raise error or RuntimeError("the weights that were handed out before are still being gathered") from None

    def token_logp(self, batch: PackedBatch) -> torch.Tensor:
        """Policy.token_logp, on rank 0 within `lead`."""
        self._end_walk()
        distributed.from_main(("token_logp", _moved(batch, "cpu")))
        return self._token_logp(batch)

    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Policy.whole_tensors, on rank 0 within `lead`; the others walk to the end even where rank 0 stops early."""
        self._end_walk()
        self._walk = self._led_walk()
        return self._walk

    def _led_walk(self) -> Iterator[tuple[str, torch.Tensor]]:
        distributed.from_main(("whole_tensors", None))
        with distributed.to_the_end(self._policy.whole_tensors()) as tensors:
            yield from tensors

    def _token_logp(self, batch: PackedBatch) -> torch.Tensor:
        logp_R = self._policy.token_logp(batch)
        distributed.reshard(self._policy)
        return logp_R

    def _follow(self) -> None:
        while True:
            call, argument = distributed.from_main(("", None))
            if call == "token_logp":
                self._token_logp(_moved(argument, self._policy.device))
            elif call == "whole_tensors":
                for _ in self._policy.whole_tensors():
                    pass
            elif argument is not None:
                raise argument
            else:
                return


def _moved(batch: PackedBatch, device: torch.device | str) -> PackedBatch:
    """The batch as it would have been packed for the device: its offsets stay on the CPU."""
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor) and not field.name.endswith("_offsets")
    }
    return dataclasses.replace(batch, **moved)
