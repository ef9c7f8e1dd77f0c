"""What torch.compile is to call as it is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Op = TypeVar("Op", bound=Callable[..., Any])


def opaque(op: Op) -> Op:
    """`op` outside of torch.compile's programs: it goes by lengths, so that every batch would be a program of its own.

    Loads the compiler, which takes seconds, only where somebody else has.
    """

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return op(*args, **kwargs)
        if call.outside is None:
            call.outside = torch.compiler.disable(op)
        return call.outside(*args, **kwargs)

    call.outside = None
    return call
