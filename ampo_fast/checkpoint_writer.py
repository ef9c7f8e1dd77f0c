"""A run's checkpoints: written at once, or beside the training from a copy in host memory, one at a time."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from ampo_fast import distributed
from ampo_fast.checkpoint import (
    Snapshot,
    commit,
    open_aside,
    prune_checkpoints,
    save_checkpoint,
    snapshot,
    write_shards,
)
from ampo_fast.config import CheckpointConfig
from ampo_fast.model import Policy

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Every rank must make one and call its methods together: what any rank meets is raised on all of them."""

    def __init__(self, root: Path, policy: Policy, optimizer: torch.optim.Optimizer, config: CheckpointConfig) -> None:
        self.root, self.policy, self.optimizer, self.config = root, policy, optimizer, config
        self._group = distributed.second_group() if config.asynchronous else None
        self._stager = BlockingAsyncStager()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes root/step_N, or has it written once the one before is on disk; raises what stopped either (OSError)."""
        self.wait()
        if not self.config.asynchronous:
            save_checkpoint(self.root, step, self.policy, self.optimizer, state)
            distributed.on_main(lambda: prune_checkpoints(self.root, self.config))
            return
        taken = snapshot(self.root, step, self.policy, self.optimizer, state)
        if not distributed.on_main(lambda: open_aside(taken)):
            return
        taken.tensors = self._stager.stage(taken.tensors)
        self._thread = threading.Thread(target=self._write, args=(taken,), name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the one in flight is on disk; raises on every rank what stopped any rank's part of it."""
        if not self.config.asynchronous:
            return
        self._join()
        error, self._error = self._error, None
        with distributed.together():
            if error is not None:
                raise error

    def close(self) -> None:
        """Lets the one in flight end, without a word to the other ranks: for a run that is failing already."""
        self._join()
        if self._error:
            log.error("the checkpoint in flight was not written: %s", self._error)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, taken: Snapshot) -> None:
        try:
            write_shards(taken, self._group)
            if distributed.is_main():
                commit(taken)
                prune_checkpoints(self.root, self.config)
        except Exception as error:  # raised where the run waits for it
            self._error = error
