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
_REMOVE_AT_END = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


class WeightFiles:
    """`newest` is a directory of safetensors, each tensor by name, a tied head beside its embedding: vLLM keeps a stale head
    otherwise."""

    def __init__(self, parent: Path | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.newest: Path | None = None
        self._parent = parent or (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
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
