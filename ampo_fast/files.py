"""Files that are there whole or not at all: written aside, synced, renamed; with the mode that the umask asks for."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives what the file system says of an open file that file's path: a full disk names none by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Write aside, fsync, rename: after a crash or on a full disk the old file is still there, whole."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            write(aside)
            fsync_path(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, whole or not at all. Raises OSError for what the file system refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(aside: Path) -> None:
        try:
            save_file(whole, aside, metadata=metadata)
        except SafetensorError as error:  # what the file system says comes wrapped
            raise OSError(f"cannot write {path} ({error})") from error
        apply_umask(aside)

    write_atomic(path, write)


def apply_umask(*paths: Path) -> None:
    """Gives files of one directory the mode of any new file: safetensors makes files that nobody else may read."""
    if not paths:
        return
    # A new file tells the umask; to ask for it is to set it, for every thread.
    probe = paths[0].with_name(f".{paths[0].name}.mode")
    try:
        with probe.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode
    finally:
        probe.unlink(missing_ok=True)
    for path in paths:
        path.chmod(mode)


def fsync_path(path: Path) -> None:
    """Of a file its content, of a directory its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
