"""The newest weights as files that servers read: written piece by piece, gone with this process however it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ampo_fast.files import save_tensors
from ampo_fast.named_weights import pieces

_FILE_BYTES = 1 << 30
_IN_MEMORY = Path("/dev/shm")
_REMOVE_AT_END = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


def roomy_parent(sync_dir: Path | None, num_bytes: int) -> Path:
    """rollout.options.sync_dir; where that is not set memory, or else the disk of temporary files. Raises ValueError where
    two versions of num_bytes find no room: the old one stays until every server has the new one."""
    if sync_dir is not None and not os.access(sync_dir, os.W_OK):
        raise ValueError(
            f"rollout.options.sync_dir = {str(sync_dir)!r} is not a directory that can be written; make it"
        )
    places = [sync_dir.absolute()] if sync_dir is not None else [_IN_MEMORY, Path(tempfile.gettempdir())]
    free = {place: shutil.disk_usage(place).free for place in places if os.access(place, os.W_OK)}
    found = next((place for place, room in free.items() if room >= 2 * num_bytes), None)
    if found is None:
        shown = ", ".join(f"{room / 2**30:.2f} GiB in {place}" for place, room in free.items())
        raise ValueError(
            f"the weights go to the servers through files, of two versions at a time: {2 * num_bytes / 2**30:.2f} GiB; free "
            f"are {shown}; set rollout.options.sync_dir to a directory with more room"
        )
    return found


class WeightFiles:
    """`newest` is a directory of safetensors, each tensor by name, a tied head beside its embedding: vLLM keeps a stale head
    otherwise."""

    def __init__(self, parent: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.newest: Path | None = None
        self._parent = parent
        self._folder: Path | None = None
        self._remover: subprocess.Popen | None = None

    def write(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Path | None:
        """Writes the weights of `version`, by now newest; -> those of before, for the caller to remove when all have moved on.

        This process holds one file's tensors at a time, never the whole model.
        """
        folder = self._make_folder() / f"version_{version:06d}"
        folder.mkdir(exist_ok=True)
        for number, tensors in enumerate(pieces(named_tensors, self.dtype, _FILE_BYTES), start=1):
            save_tensors(folder / f"model-{number:05d}.safetensors", tensors)
        before, self.newest = self.newest, folder
        return before if before != folder else None

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._remover.stdin.close()
            self._remover.wait()
            self._folder = self.newest = None

    def _make_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ampo-fast-weights-", dir=self._parent))
            # In memory a killed trainer would leave a whole model there for good. The kernel closes the pipe at our death.
            self._remover = subprocess.Popen(
                [sys.executable, "-I", "-c", _REMOVE_AT_END, str(self._folder)],
                stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        return self._folder
