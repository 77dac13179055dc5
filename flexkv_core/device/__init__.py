"""Devices: copying blocks between an engine's KV tensors and slots of the host region.

Owns the `Device` interface and its implementations, one module each: `cpu.py`. Does not own slots or their
lifetime (the caller names only slots that are its own until the call has returned), seals, or what a block
means. Where a device's bytes lie is `flexkv_core.layout.fragments_of`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import Fragments


class Device(Protocol):
    """The KV tensors of one rank, by KV group. Block i goes between slot `offsets[i]` and device block
    `device_blocks[i]`; its payload has the order of bytes of `fragments_of`.

    Arguments of `gather` and `scatter`:
        host: buffer, the host region.
        offsets: (n,) int64, bytes, where each payload starts in `host`.
        device_blocks: (n,) int64, from 0 to pages - 1.
        group: number of the KV group.

    Both raise `LayoutError` for arguments that would touch anything else, before any byte has been copied.
    """

    def attach(self, host: Any) -> None:
        """Make ready for a host region (a buffer), once for each that this process maps: pin it, where the device wants
        pinned memory. Its mapping stays until the next call."""

    def fragments(self, group: int) -> Fragments:
        """Return where the blocks of a KV group lie on this device."""

    def gather(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        """Copy device blocks to slots. Slots must not overlap; a device block may be named twice."""

    def scatter(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        """Copy slots to device blocks. No device block may be named twice; a slot may."""
