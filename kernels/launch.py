"""How every kernel of this folder is started."""

from __future__ import annotations

import torch


def launch(kernel, num_programs: int, *arguments: object, **options: object) -> None:
    """Starts `num_programs` programs of a Triton kernel on the tensors' device, which need not be the current one.

    Kernels address a vector by element alone: one with other strides, such as an upstream gradient that `sum` expanded, goes
    in as a copy. A vector that a kernel writes must therefore be new. Matrices go as they are, with their row stride.
    """
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    dense = [
        value.contiguous() if isinstance(value, torch.Tensor) and value.ndim == 1 else value for value in arguments
    ]
    with torch.cuda.device_of(tensors[0]):
        kernel[(num_programs,)](*dense, **options)
