"""The compiled extension. Arrays are C-contiguous; bfloat16 points are the uint16 of their bits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32] | NDArray[np.float64] | NDArray[np.uint16]

has_cuda: bool
max_cuda_group: int
max_cuda_k: int
max_cuda_pool_dim: int

def vector_path() -> str: ...
def pairwise(points: Points, offsets: NDArray[np.int64], metric: int) -> NDArray[np.float32] | NDArray[np.float64]: ...
def k_center(points: Points, k: int, seeds: Sequence[int]) -> NDArray[np.int64]: ...
def k_medoids(weighted: NDArray[np.float64], k: int, fixed: Sequence[int]) -> list[int]: ...
def select(
    points: Points,
    reward: NDArray[np.float64],
    valid: NDArray[np.bool_],
    positive_ok: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    keys: NDArray[np.int64],
    strategy: int,
    k: int,
    num_positives: int,
    cover_positives: bool,
    tie_tol: float,
    seed: int,
    time_limit_s: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.uint8]]: ...
def few_rows(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]: ...

# Only where has_cuda: device addresses and a stream as integers.
def pairwise_cuda(
    pointer: int,
    is_bfloat16: bool,
    count: int,
    dim: int,
    offsets: NDArray[np.int64],
    metric: int,
    out_pointer: int,
    stream: int,
) -> None: ...
def k_center_cuda(
    pointer: int,
    is_bfloat16: bool,
    count: int,
    dim: int,
    k: int,
    seeds: Sequence[int],
    chosen_pointer: int,
    stream: int,
) -> None: ...
def select_cuda(
    pointer: int,
    is_bfloat16: bool,
    count: int,
    dim: int,
    reward_pointer: int,
    valid_pointer: int,
    positive_ok_pointer: int,
    offsets: NDArray[np.int64],
    keys_pointer: int,
    strategy: int,
    k: int,
    num_positives: int,
    cover_positives: bool,
    tie_tol: float,
    seed: int,
    out_pointers: Sequence[int],
    stream: int,
) -> None: ...
