"""What the bytes of a block must be: content derived from its key, and the comparison with a device's pages.

Shares nothing with the path under test: only NumPy, no fragments, layouts, checksums or copies of FlexKV. It
fills and reads the device's tensors logically, by (layer, K or V, page, token, head, dim).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

POISON_BYTE = 0xA5
_WARM_UP = 16
"""Words dropped after seeding: SFC64's author asks for 12 before neighbouring states are independent."""


class BlockContent:
    """Fills, poisons and checks pages of a device's tensors.

    The content of a block is the stream of NumPy's SFC64 whose 256-bit state is the block's key, laid out in
    the order layer, K and V, token, head, dim. So a block at another page, layer, half or token is seen.
    """

    def __init__(self, tensors: Sequence[npt.NDArray[Any]]) -> None:
        """`tensors`: one a layer, of equal shape (2, pages, tokens, heads, dim) and dtype, C-contiguous."""
        shapes = {(tensor.shape, tensor.dtype) for tensor in tensors}
        if len(shapes) != 1 or tensors[0].ndim != 5:
            raise ValueError(f"tensors of {shapes}: need equal shapes (2, pages, tokens, heads, dim)")
        words = tensors[0].shape[-1] * tensors[0].itemsize % 8 == 0
        self._layers = [tensor.view(np.uint64) if words else tensor for tensor in tensors]
        _, self.pages, *inner = self._layers[0].shape
        self._shape = (len(tensors), 2, *inner)
        self.block_bytes = len(tensors) * tensors[0].nbytes // self.pages
        self._source = np.random.SFC64(0)

    def expected(self, key: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return the content that a (32,) uint8 key demands, shaped (layers, 2, tokens, heads, dim)."""
        state = np.ascontiguousarray(key, np.uint8).view("<u8").astype(np.uint64)
        self._source.state = {
            "bit_generator": "SFC64",
            "state": {"state": state},
            "has_uint32": 0,
            "uinteger": 0,
        }
        words: npt.NDArray[np.uint64] = self._source.random_raw(_WARM_UP + -(-self.block_bytes // 8))[_WARM_UP:]
        raw = words.view(np.uint8)[: self.block_bytes]
        content: npt.NDArray[Any] = raw.view(self._layers[0].dtype).reshape(self._shape)
        return content

    def fill(self, keys: npt.NDArray[np.uint8], pages: npt.NDArray[np.int64]) -> None:
        """Write into `pages[i]` what `keys[i]` demands; (n, 32) uint8 and (n,) int64."""
        for key, page in zip(keys, pages.tolist(), strict=True):
            for layer, content in zip(self._layers, self.expected(key), strict=True):
                layer[:, page] = content

    def wrong(self, keys: npt.NDArray[np.uint8], pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Compare every byte of `pages[i]` with what `keys[i]` demands: (n,) bool, True where any differs."""
        result = np.zeros(len(keys), np.bool_)
        for i, (key, page) in enumerate(zip(keys, pages.tolist(), strict=True)):
            expected = self.expected(key)
            result[i] = any(
                not np.array_equal(layer[:, page], content)
                for layer, content in zip(self._layers, expected, strict=True)
            )
        return result

    def poison(self, pages: npt.NDArray[np.int64]) -> None:
        """Overwrite pages, so that a load that does nothing is seen."""
        value = np.full(self._layers[0].itemsize, POISON_BYTE, np.uint8).view(self._layers[0].dtype)[0]
        for layer in self._layers:
            for half in layer:
                half[pages] = value
