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

# seal.cpp
def seal_blocks(
    host: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    payload_bytes: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.uint8],
    threads: int,
) -> None: ...
def verify_blocks(
    host: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    payload_bytes: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.uint8],
    faults: npt.NDArray[np.uint8],
    threads: int,
) -> None: ...
def checksum_kernel() -> str: ...

# copy.cpp
def gather(
    host: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    device_blocks: npt.NDArray[np.int64],
    base: npt.NDArray[np.uint64],
    page_stride: npt.NDArray[np.int64],
    length: npt.NDArray[np.int64],
    host_offset: npt.NDArray[np.int64],
    threads: int,
) -> None: ...
def scatter(
    host: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    device_blocks: npt.NDArray[np.int64],
    base: npt.NDArray[np.uint64],
    page_stride: npt.NDArray[np.int64],
    length: npt.NDArray[np.int64],
    host_offset: npt.NDArray[np.int64],
    threads: int,
) -> None: ...
def memcpy_parallel(dst: npt.NDArray[np.uint8], src: npt.NDArray[np.uint8], threads: int) -> None: ...

# memory.cpp
def populate(address: int, bytes: int, threads: int) -> int: ...
def advise_huge_pages(address: int, bytes: int) -> bool: ...

# sketch.cpp
class TouchSketch:
    def __init__(self, window: int) -> None: ...
    def touch(self, keys: npt.NDArray[np.uint8], group: int, seen: npt.NDArray[np.bool_]) -> None: ...
    @property
    def window(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
