"""What a field names as MODULE:NAME in a user's own code: how it is found, and how its mistakes are told."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch


def named_object(name: str, field: str) -> Any:
    """What MODULE:NAME is; the module may lie in the working directory. Raises ValueError naming the field."""
    module, _, attribute = name.partition(":")
    # An installed command has its own directory there, where `python -m` has the working one.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with own_grad_mode():
            return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does as it is imported
        raise ValueError(f"{field} = {name!r} cannot be imported: {told(error)}") from error


@contextlib.contextmanager
def own_grad_mode() -> Iterator[None]:
    """What code for inference switches off for good, training needs on."""
    is_on = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(is_on)


def told(error: Exception, function: Any = None) -> str:
    """Type, message, and where it happened: the deepest line that is not a library's, else where the function begins."""
    libraries = (os.path.dirname(os.__file__), os.path.dirname(__file__), "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    frames = [frame for frame in frames if "site-packages" not in frame.filename]
    code = getattr(function, "__code__", None)
    where = (frames[-1].filename, frames[-1].lineno) if frames else code and (code.co_filename, code.co_firstlineno)
    return f"{type(error).__name__}: {error}" + (f" ({where[0]}:{where[1]})" if where else "")
