"""Fragments and the CPU device: every layout against a reference in plain NumPy, and nothing else written."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv_core import _native
from flexkv_core.device import Device
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.errors import LayoutError
from flexkv_core.layout import Fragments, fragments_of

Array = npt.NDArray[Any]


def payload_of(tensor: Array, axis: int, block: int) -> bytes:
    """The bytes of one block by the documented order, element by element in NumPy."""
    inner = np.take(tensor, block, axis=axis) if tensor.ndim > 1 else tensor[block : block + 1]
    strides = [s for i, s in enumerate(tensor.strides) if i != axis % tensor.ndim]
    if tensor.ndim > 1:
        inner = inner[tuple(slice(None, None, -1) if s < 0 else slice(None) for s in strides)]
        order = sorted(range(inner.ndim), key=lambda i: -abs(strides[i]) if inner.shape[i] > 1 else 0)
        inner = inner.transpose(order)
    return inner.tobytes(order="C")


def expected(tensors: list[Array], axes: list[int], block: int) -> bytes:
    return b"".join(payload_of(t, a, block) for t, a in zip(tensors, axes, strict=True))


@st.composite
def views(draw: st.DrawFn, pages: int) -> tuple[Array, Array, int]:
    """(memory, view of some of it, block axis): any axis order, gaps by steps and cuts, descending axes."""
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.float32]))
    shape = [pages, *draw(st.lists(st.integers(1, 4), max_size=4))]
    axis = draw(st.integers(0, len(shape) - 1))
    shape[0], shape[axis] = shape[axis], shape[0]
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1, -2])) for _ in shape]
    margins = [draw(st.sampled_from([0, 0, 1, 3])) for _ in shape]
    full = [n * abs(s) + m for n, s, m in zip(shape, steps, margins, strict=True)]
    memory = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, int(np.prod(full)) * 4, np.uint8)
    base = memory[: int(np.prod(full)) * np.dtype(dtype).itemsize].view(dtype).reshape(full)
    view = base[tuple(slice(None, None, s) for s in steps)][tuple(slice(0, n) for n in shape)]
    order = draw(st.permutations(range(len(shape))))
    return memory, view.transpose(order), order.index(axis)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_layout_both_ways_and_nothing_outside(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 5))
    made = data.draw(st.lists(views(pages), min_size=1, max_size=3))
    tensors, axes = [view for _, view, _ in made], [axis for _, _, axis in made]
    device = CpuDevice([tensors], [axes], threads=data.draw(st.integers(1, 3)))  # type: ignore[list-item]
    size = device.fragments(0).block_bytes
    assert size == len(expected(tensors, axes, 0))
    n = data.draw(st.integers(0, pages))
    blocks = np.array(data.draw(st.permutations(range(pages)))[:n], np.int64)
    places = data.draw(st.permutations(range(n + 2)))[:n]
    gap = data.draw(st.integers(0, 9))
    offsets = np.array([3 + p * (size + gap) for p in places], np.int64)

    host = np.full(8 + (n + 2) * (size + gap), 0xA5, np.uint8)
    want = host.copy()
    for offset, block in zip(offsets, blocks, strict=True):
        want[offset : offset + size] = np.frombuffer(expected(tensors, axes, int(block)), np.uint8)
    device_before = [memory.copy() for memory, _, _ in made]
    device.gather(host, offsets, blocks)
    np.testing.assert_array_equal(host, want)
    for (memory, _, _), before in zip(made, device_before, strict=True):
        np.testing.assert_array_equal(memory, before)

    # Scatter other bytes, in another assignment of slots to device blocks; then the memory of each tensor
    # differs from before only in elements of the named blocks, and these are what was sent.
    host[:] = np.random.default_rng(1).integers(0, 256, host.size, np.uint8)
    sent = host.copy()
    device.scatter(host.tobytes(), offsets, blocks)
    np.testing.assert_array_equal(host, sent)
    for offset, block in zip(offsets, blocks, strict=True):
        assert expected(tensors, axes, int(block)) == sent[offset : offset + size].tobytes()
    for (memory, view, axis), before in zip(made, device_before, strict=True):
        for block in blocks:  # put back what was there
            old = np.ndarray(view.shape, view.dtype, before, view_offset(memory, view), view.strides)
            where = (slice(None),) * axis + (int(block),)
            view[where] = old[where]
        np.testing.assert_array_equal(memory, before)


def view_offset(memory: Array, view: Array) -> int:
    return int(view.ctypes.data - memory.ctypes.data)


def same(a: Fragments, b: Fragments) -> bool:
    names = ("base", "page_stride", "length", "host_offset")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names) and a.pages == b.pages


LAYERS, PAGES, TOKENS, HEADS, DIM = 3, 5, 4, 2, 8
TOKEN_BYTES = HEADS * DIM * 2


def test_tokens_first_fused_and_separate() -> None:
    fused = np.zeros((LAYERS, 2, PAGES, TOKENS, HEADS, DIM), np.float16)
    one = fragments_of([fused], 2)
    assert len(one) == LAYERS * 2
    assert one.length.tolist() == [TOKENS * TOKEN_BYTES] * 6
    assert one.page_stride.tolist() == [TOKENS * TOKEN_BYTES] * 6
    assert one.host_offset.tolist() == [i * TOKENS * TOKEN_BYTES for i in range(6)]
    assert one.block_bytes == 6 * TOKENS * TOKEN_BYTES
    assert same(one, fragments_of(list(fused), 1))  # a tensor a layer
    assert same(one, fragments_of([kv for layer in fused for kv in layer]))  # K and V separate
    assert same(one, fragments_of(list(fused.transpose(0, 2, 1, 3, 4, 5))))  # blocks first in the shape only
    assert not one.base.flags.writeable


def test_heads_first_is_found_by_strides_not_by_shape() -> None:
    memory = np.zeros((PAGES, 2, HEADS, TOKENS, DIM), np.float16)
    hnd = fragments_of([memory])
    assert hnd.length.tolist() == [2 * HEADS * TOKENS * DIM * 2]
    assert same(hnd, fragments_of([memory.transpose(0, 1, 3, 2, 4)]))


def test_k_and_v_halves_of_one_page_merge_across_tensors() -> None:
    memory = np.zeros((PAGES, 2, TOKENS, HEADS, DIM), np.float16)
    assert same(fragments_of([memory]), fragments_of([memory[:, 0], memory[:, 1]]))
    assert len(fragments_of([memory[:, 1], memory[:, 0]])) == 2  # payload order is the given one


def test_blocks_innermost_and_cut_heads() -> None:
    memory = np.zeros((TOKENS, DIM, PAGES), np.uint8)
    assert fragments_of([memory], -1).length.tolist() == [1] * (TOKENS * DIM)
    wide = np.zeros((PAGES, TOKENS, 2 * HEADS, DIM), np.float16)
    cut = fragments_of([wide[:, :, :HEADS]])
    assert cut.length.tolist() == [TOKEN_BYTES] * TOKENS


class Foreign:
    """A tensor of some other library."""

    def __init__(self, array: Array, **changes: object) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__ | {"strides": None} | changes


def read_only() -> Array:
    array = np.zeros((PAGES, 4))
    array.flags.writeable = False
    return array


def test_foreign_tensors() -> None:
    array = np.zeros((PAGES, 3, 4), np.int16)
    assert same(fragments_of([Foreign(array)]), fragments_of([array]))


@pytest.mark.parametrize(
    ("tensors", "axis", "message"),
    [
        ([], 0, "tensors: there are none"),
        ([np.zeros((2, 3)), np.zeros((3, 3))], 0, "tensor 1: 3 blocks along axis 0, but tensor 0 has 2"),
        ([np.zeros((2, 3)), np.zeros((0, 3))], 0, r"tensor 1: shape \(0, 3\) has no blocks"),
        ([np.zeros((2, 0))], 0, r"tensor 0: shape \(2, 0\)"),
        ([np.zeros((2, 3)), read_only()], 0, "tensor 1: is read-only"),
        ([np.broadcast_to(np.zeros((2, 1)), (2, 3))], 0, "tensor 0: is read-only"),
        ([torch.zeros(2, 1).expand(2, 3)], 0, "tensor 0: axis 1 has a stride of 0"),
        ([torch.zeros(1, 3).expand(2, 3)], 0, "tensor 0: axis 0 has a stride of 0"),
        ([torch.zeros(9).as_strided((4, 3), (2, 1))], 0, "tensor 0: axis 0 has a stride of 8 bytes"),
        ([np.zeros((2, 3))], 2, "tensor 0: has no axis 2"),
        ([np.zeros((2, 3))], -3, "tensor 0: has no axis -3"),
        ([np.zeros(())], 0, "tensor 0: has no axis 0"),
        ([np.zeros((2, 3))], [0, 0], "block_axis: 2 axes for 1 tensors"),
        ([b"bytes"], 0, "tensor 0: a bytes has neither"),
        ([np.array([[object()]] * 2)], 0, "tensor 0: dtype object holds references"),
        ([torch.eye(2).to_sparse()], 0, "tensor 0: is not plain strided memory"),
    ],
)
def test_tensors_that_cannot_be_served(tensors: list[Any], axis: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        fragments_of(tensors, axis)
    if tensors and not isinstance(axis, list):
        with pytest.raises(LayoutError, match=f"group 1, {message}"):
            CpuDevice([[np.zeros((2, 2))], tensors], [0, axis])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_torch_tensors(dtype: torch.dtype) -> None:
    noise = torch.randint(0, 256, (LAYERS, PAGES, TOKENS, HEADS, DIM * dtype.itemsize), dtype=torch.uint8)
    kv = noise.view(dtype).permute(0, 1, 3, 2, 4)
    device: Device = CpuDevice([list(kv)])
    size = device.fragments(0).block_bytes
    host = np.zeros(2 * size, np.uint8)
    before = noise.clone()
    device.gather(host, np.array([size, 0]), np.array([1, 4]))
    assert host.tobytes() == before[:, 4].numpy().tobytes() + before[:, 1].numpy().tobytes()
    device.scatter(host, np.array([size, 0]), np.array([0, 2]))
    before[:, 0], before[:, 2] = before[:, 1].clone(), before[:, 4].clone()
    assert torch.equal(noise, before)


def test_torch_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(LayoutError, match="group 0, tensor 1: is on 'meta'"):
        CpuDevice([[torch.zeros(2, 3), torch.zeros(2, 3, device="meta")]])


def test_groups_are_separate() -> None:
    a, b = np.full((3, 8), 1, np.uint8), np.full((5, 16), 2, np.uint8)
    device = CpuDevice([[a], [b]])
    host = np.zeros(16, np.uint8)
    device.gather(host, np.array([0]), np.array([4]), group=1)
    assert host.tolist() == [2] * 16
    for group in (-1, 2):
        with pytest.raises(LayoutError, match=f"group {group}: this device has groups 0 to 1"):
            device.fragments(group)


BYTES = 64


@pytest.mark.parametrize(
    ("method", "offsets", "blocks", "message"),
    [
        ("both", [0, 64], [0, 8], r"device_blocks\[1\] = 8: this device has blocks 0 to 7"),
        ("both", [0, 64], [-1, 0], r"device_blocks\[0\] = -1"),
        ("both", [0, 193], [0, 1], r"offsets\[1\] = 193"),
        ("both", [-1, 0], [0, 1], r"offsets\[0\] = -1"),
        ("both", [0, 2**63 - 1], [0, 1], r"offsets\[1\] = 9223372036854775807"),
        ("both", [0], [0, 1], "device_blocks: 2 of them for 1 offsets"),
        ("both", [[0]], [0], r"offsets: must be an int64 array of shape \(n,\)"),
        ("both", [0.0], [0], "offsets: must be an int64"),
        ("both", [0], np.array([0], np.uint64), "device_blocks: must be an int64"),
        ("gather", [64, 1], [0, 1], r"offsets\[0\] = 64: overlaps the block of offsets\[1\] = 1"),
        ("scatter", [0, 64, 128], [5, 2, 5], r"device_blocks\[2\] = 5: is named twice"),
    ],
)
def test_bad_calls_copy_nothing(method: str, offsets: Any, blocks: Any, message: str) -> None:
    tensor = np.ones((8, BYTES), np.uint8)
    host = np.zeros(4 * BYTES, np.uint8)
    device = CpuDevice([[tensor]])
    for name in ("gather", "scatter") if method == "both" else (method,):
        with pytest.raises(LayoutError, match=message):
            getattr(device, name)(host, offsets, blocks)
    assert tensor.all()
    assert not host.any()


def test_what_one_direction_allows() -> None:
    tensor = np.arange(8 * BYTES, dtype=np.uint8).reshape(8, BYTES)
    device = CpuDevice([[tensor]])
    host = np.zeros(2 * BYTES, np.uint8)
    device.gather(host, np.array([0, BYTES]), np.array([1, 1]))
    assert host.tobytes() == tensor[1].tobytes() * 2
    device.scatter(host.tobytes(), np.array([0, 0]), np.array([2, 3]))
    assert tensor[2].tolist() == tensor[3].tolist() == tensor[1].tolist()
    with pytest.raises(LayoutError, match="host: is read-only"):
        device.gather(host.tobytes(), np.array([0]), np.array([0]))


def test_bad_devices() -> None:
    with pytest.raises(LayoutError, match="no KV groups"):
        CpuDevice([])
    with pytest.raises(LayoutError, match="threads 0"):
        CpuDevice([[np.zeros((2, 2))]], threads=0)
    with pytest.raises(LayoutError, match="2 axes for 1 KV groups"):
        CpuDevice([[np.zeros((2, 2))]], [0, 0])


def odd_device(threads: int, length: int, start: int) -> tuple[CpuDevice, Array]:
    """Fragments of an odd length at an odd address, in a transfer large enough to be streamed."""
    pages = -(-(9 << 20) // (2 * length))
    memory = np.random.default_rng(0).integers(0, 256, 2 * pages * (length + 3) + 64, np.uint8)
    tensor = memory[start : start + 2 * pages * (length + 3)].reshape(2, pages, length + 3)[:, :, :length]
    return CpuDevice([[tensor]], 1, threads), tensor


@pytest.mark.parametrize("length", [1 << 15, 5000, 4096, 517, 64, 61])
@pytest.mark.parametrize("start", [0, 1, 47])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_copies_are_exact(length: int, start: int, threads: int) -> None:
    device, tensor = odd_device(threads, length, start)
    pages, size = tensor.shape[1], 2 * length
    blocks = np.random.default_rng(1).permutation(pages)[: pages - 1].astype(np.int64)
    assert len(blocks) * size > 8 << 20
    offsets = 5 + np.arange(len(blocks), dtype=np.int64) * (size + 7)
    host = np.full(int(offsets[-1]) + size + 9, 0xA5, np.uint8)
    want = host.copy()
    slots = np.lib.stride_tricks.as_strided(want[5:], (len(blocks), size), (size + 7, 1))
    slots[:] = tensor.transpose(1, 0, 2)[blocks].reshape(len(blocks), size)
    device.gather(host, offsets, blocks)
    np.testing.assert_array_equal(host, want)
    memory = tensor.base
    assert memory is not None
    before = memory.copy()
    tensor[:, blocks] = 0
    device.scatter(host, offsets, blocks)
    np.testing.assert_array_equal(memory, before)


def test_many_callers_share_the_threads() -> None:
    device, tensor = odd_device(3, 4096, 0)
    size, n = 2 * 4096, 600
    blocks = np.arange(n, dtype=np.int64)
    want = tensor.transpose(1, 0, 2)[:n].tobytes()
    bad: list[int] = []

    def call(number: int) -> None:
        host = np.zeros(n * size, np.uint8)
        for _ in range(5):
            host[:] = 0
            device.gather(host, blocks * size, blocks)
            if host.tobytes() != want:
                bad.append(number)

    def native_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    call(0)
    before = native_threads()
    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not bad
    # No thread is made by a call. A joined thread may take a moment to leave the kernel's list.
    deadline = time.monotonic() + 10
    while native_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert native_threads() == before


def test_a_forked_child_copies_with_threads_of_its_own() -> None:
    device, tensor = odd_device(3, 4096, 0)
    host = np.zeros(100 * 8192, np.uint8)
    blocks = np.arange(100, dtype=np.int64)
    device.gather(host, blocks * 8192, blocks)  # the parent's threads exist
    child = os.fork()
    if child == 0:
        host[:] = 0
        device.gather(host, blocks * 8192, blocks)
        right = host.tobytes() == tensor.transpose(1, 0, 2)[:100].tobytes()
        # The parent's workers did not survive: without new ones the caller would do all the work alone.
        os._exit(1 if not right else 2 if len(os.listdir("/proc/self/task")) != 3 else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memcpy_parallel() -> None:
    source = np.random.default_rng(0).integers(0, 256, 100_001, np.uint8)
    for threads in (1, 2, 5):
        to = np.zeros_like(source)
        _native.memcpy_parallel(to, source, threads)
        np.testing.assert_array_equal(to, source)
    with pytest.raises(ValueError, match="differ in length"):
        _native.memcpy_parallel(source[1:].copy(), source, 1)
