"""Types of the native extension: knows bytes, not engines. Private to flexkv_core."""

import numpy as np
import numpy.typing as npt

# keys.cpp
def hash_blocks(
    tokens: npt.NDArray[np.int32] | npt.NDArray[np.int64],
    block_size: int,
    previous: bytes,
    extras: bytes,
    extra_offsets: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint8],
    portable: bool = False,
) -> int: ...
def first_bad_token(tokens: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> int: ...
def tokens_hashed() -> int: ...
def sha256_implementation() -> str: ...
