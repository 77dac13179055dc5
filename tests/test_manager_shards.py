"""Several ranks: TP, PP and replicated blocks. Each rank's bytes are cut by the test itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gates import PATIENCE_S, GatedDevice, until
from rig import BLOCK_SIZE, Group, Rig, gate_stack, gate_tier, nothing_left, settled, wait_ready

from flexkv_core.errors import LayoutError
from flexkv_core.layout import Coverage, KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    with KVCacheManager.open(gate_stack(48, gate_tier())) as manager:
        wait_ready(manager)
        yield manager
        nothing_left(manager)


LAYOUTS = {
    "tp2": (Group((1500, 1500)),),
    "tp4": (Group((1024,) * 4),),
    "pp2": (Group((5000, 1000)),),
    "pp3_one_without": (Group((700, 0, 4001)),),
    "pp2_groups": (Group((3000, 500)), Group((0, 900), window=2), Group((128, 0), state=True)),
    "mla": (Group((2222, 2222, 2222, 2222), same=True),),
    "mla_beside_shards": (Group((100, 300)), Group((640, 640), same=True)),
}


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_gets_its_own_bytes_back(manager: KVCacheManager, groups: tuple[Group, ...]) -> None:
    rig = Rig(manager, groups)
    keys = rig.keys(1, 5)
    assert rig.store(keys) == 5 * len(groups)
    assert rig.load(keys) == (5, 0)
    assert rig.store(keys) == 0
    for seed in range(2, 16):
        rig.store(rig.keys(seed, 5))
    assert rig.found(keys) == (5, 0)
    assert rig.load(keys) == (5, 0), "from the lower tier"


def test_the_check_of_this_file_sees_ranks_that_are_swapped(manager: KVCacheManager) -> None:
    """Negative control."""
    rig = Rig(manager, LAYOUTS["tp2"])
    keys = rig.keys(1, 2)
    rig.store(keys)
    ranks = manager._namespaces._ranks[rig.namespace.root]
    object.__setattr__(ranks, "shards", ranks.shards[::-1])
    assert rig.load(keys) == (2, 4)


def test_replicated_blocks_are_written_once_and_loaded_by_all(manager: KVCacheManager) -> None:
    rig = Rig(manager, LAYOUTS["mla"])
    keys = rig.keys(1, 3)
    rig.store(keys)
    assert [device.gathers for device in rig.devices] == [1, 0, 0, 0]
    assert rig.load(keys) == (3, 0)
    assert [device.scatters for device in rig.devices] == [1, 1, 1, 1]
    assert manager.stats()["tiers"]["cpu"]["used_bytes"] == 3 * 8192


@pytest.mark.parametrize("slow", [0, 1])
def test_a_block_is_not_visible_before_all_ranks_have_copied(manager: KVCacheManager, slow: int) -> None:
    rig = Rig(manager, LAYOUTS["tp2"])
    keys = rig.keys(1, 4)
    rig.devices[slow].free.clear()
    transfer = rig.begin_store(keys)
    until(lambda: all(device.gathers for device in rig.devices))
    rig.devices[1 - slow].entered.acquire()
    settled(manager)
    assert not transfer.done
    assert rig.found(keys) == (0, 0)
    rig.devices[slow].free.set()
    assert transfer.wait(PATIENCE_S)
    assert (transfer.blocks, transfer.error) == (4, None)
    assert rig.load(keys) == (4, 0)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_fails_gives_the_whole_store_up(manager: KVCacheManager, bad: int) -> None:
    rig = Rig(manager, LAYOUTS["pp2"])
    keys = rig.keys(1, 4)
    rig.devices[bad].failing = True
    rig.devices[1 - bad].free.clear()
    transfer = rig.begin_store(keys)
    until(lambda: all(device.gathers for device in rig.devices))
    settled(manager)
    assert not transfer.done, "the other rank's device blocks are still being read"
    rig.devices[1 - bad].free.set()
    assert transfer.wait(PATIENCE_S)
    assert (transfer.blocks, transfer.error) == (0, "the device is gone")
    assert rig.found(keys) == (0, 0)
    assert manager.stats()["tiers"]["cpu"]["used_bytes"] == 0
    rig.devices[bad].failing = False
    assert rig.store(keys) == 4
    assert rig.load(keys) == (4, 0)


def test_a_rank_that_fails_to_load_says_so_and_unpins(manager: KVCacheManager) -> None:
    rig = Rig(manager, LAYOUTS["tp2"])
    keys = rig.keys(1, 4)
    rig.store(keys)
    rig.devices[1].failing = True
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    transfer = rig.begin_load(fetch)
    assert transfer.wait(PATIENCE_S)
    assert (transfer.blocks, transfer.error) == (0, "the device is gone")
    fetch.release()
    until(lambda: settled(manager)["pinned_bytes"] == 0)


def device(*sizes: int, pages: int = 8) -> GatedDevice:
    return GatedDevice([[np.zeros((pages, size), np.uint8)] if size else [] for size in sizes])


@pytest.mark.parametrize(
    ("groups", "devices", "message"),
    [
        ([KVGroup(3000)], [], "0 devices for tensor_parallel 2"),
        ([KVGroup(3000)], [device(1000)] * 3, "3 devices for tensor_parallel 2"),
        ([KVGroup(3000)], [device(1500), device(1501)], "group 0, rank 1: the device's blocks have 1501 .* 1500"),
        ([KVGroup(3001)], [device(1500), device(1501)], "cannot be divided among 2 ranks"),
        ([KVGroup(3000, shard_bytes=(3000,))], [device(1500)] * 2, "cannot be divided among 2 ranks"),
        ([KVGroup(3000, shard_bytes=(1000, 2000))], [device(2000), device(1000)], "group 0, rank 0: .* 2000 .* 1000"),
        ([KVGroup(3000, replicated=True)], [device(3000), device(1500)], "group 0, rank 1: .* 1500 .* 3000"),
        (
            [KVGroup(3000)],
            [device(1500), device(0)],
            "group 0, rank 1: the model has 1500 bytes there, but .* no tensors",
        ),
        ([KVGroup(8), KVGroup(8, Coverage("state"))], [device(4, 4), device(4)], "group 1, rank 1: .* groups 0 to 0"),
        ([KVGroup(3000)], [device(1500)], "group 0: the device's blocks have 1500 bytes, the model's 3000"),
    ],
)
def test_wrong_devices_are_refused_with_the_reason(
    manager: KVCacheManager, groups: list[KVGroup], devices: list[GatedDevice], message: str
) -> None:
    spec = ModelSpec("wrong", BLOCK_SIZE, tuple(groups), tensor_parallel=2)
    with pytest.raises(LayoutError, match=message):
        manager.register(spec, devices)
    assert manager._planner.namespaces == 0, "nothing was registered"


@pytest.mark.parametrize("arguments", [{"shard_bytes": (1, 1)}, {"shard_bytes": (4, -1)}])
def test_shards_that_do_not_add_up_are_refused(arguments: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(LayoutError, match="must sum to block_bytes 3"):
        KVGroup(3, **arguments)
    with pytest.raises(LayoutError, match="replicated blocks have no shards"):
        KVGroup(3, shard_bytes=(1, 2), replicated=True)


def test_device_blocks_must_exist_on_every_rank(manager: KVCacheManager) -> None:
    spec = ModelSpec("pages", BLOCK_SIZE, (KVGroup(3000),), tensor_parallel=2)
    namespace = manager.register(spec, [device(1500, pages=9), device(1500, pages=5)])
    with pytest.raises(ValueError, match="device block 5 of group 0: the device has blocks 0 to 4"):
        manager.store(namespace, np.zeros((1, 32), np.uint8), np.array([5], np.int64))
