"""The ring between host memory and kernels, on a device made up here: queues whose work is done in any order they allow."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")

from paged_world import host_slab

from vcache.errors import DeviceUnavailableError
from vcache.paged.columns import SlotColumns
from vcache.paged.copy_engine import Copies
from vcache.paged.host_ring import BATCH_BYTES, HostRing, Route
from vcache.paged.mover import SlotTransfer
from vcache.segment.mapping import MappedSlab, PinnedSlot
from vcache.segment.slots import SlotHeader


class Event:
    """Counts its marks, as queued and as reached."""

    def __init__(self) -> None:
        self.queued = self.reached = 0


class LateQueue:
    """Does nothing until it is asked to go on."""

    def __init__(self) -> None:
        self.work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    def add(self, action: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        self.work.append((ready, action))

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        for target, source, nbytes in zip(targets, sources, sizes, strict=True):
            self.add(lambda target=target, source=source, nbytes=nbytes: ctypes.memmove(target, source, nbytes))

    def mark(self, event: Any = None) -> Any:
        event = event or Event()
        event.queued += 1

        def reach(number: int = event.queued) -> None:
            event.reached = number

        self.add(reach)
        return event

    def wait(self, event: Any) -> None:
        number = event.queued
        self.add(lambda: None, lambda: bool(event.reached >= number))

    def drain(self) -> None:
        raise AssertionError("waited for the device")


def go_on(queues: Sequence[LateQueue], chance: random.Random) -> None:
    """Do all that is queued; which queue is next is left to chance, for several steps at a time."""
    while any(queue.work for queue in queues):
        able = [queue for queue in queues if queue.work and queue.work[0][0]()]
        assert able, "the queues wait for each other"
        queue = chance.choice(able)
        for _ in range(chance.randint(1, 20)):
            if not queue.work or not queue.work[0][0]():
                break
            queue.work.popleft()[1]()


def chunk(slab: MappedSlab, offset: int, nbytes: int) -> SlotTransfer:
    header = SlotHeader(0, 1, 2, bytes(16), bytes(16), nbytes, 1, 0)
    return SlotTransfer(PinnedSlot(slab, 64, offset), header, 0)


class Bench:
    """A ring, and memory of which chunks are slots."""

    def __init__(self, store: bool, ring_bytes: int, seed: int) -> None:
        self.store = store
        self.chance = random.Random(seed)
        self.lane, self.copies = LateQueue(), LateQueue()
        self.memory = host_slab(ring_bytes + 256)
        address = -(-self.memory.address // 256) * 256
        self.ring = HostRing(self.lane, self.copies, address, ring_bytes, store=store)
        self.bounds = (address, address + ring_bytes)
        self.slabs: list[MappedSlab] = []
        self.looked = 0

    def request(self, sizes: Sequence[int]) -> None:
        """Queue a load or store of chunks of these sizes, with other bytes each time; at the end of the lane, look at them."""
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        slab = host_slab(max(offsets[-1], 4096))
        transfers = [chunk(slab, offset, size) for offset, size in zip(offsets, sizes, strict=False)]
        contents = [self.chance.randbytes(size) for size in sizes]
        homes = [slab.address + offset for offset in offsets]
        if not self.store:
            for home, content in zip(homes, contents, strict=False):
                ctypes.memmove(home, content, len(content))
        route = self.ring.route(SlotColumns.of(transfers))
        assert route is not None
        found: dict[int, bytes] = {}
        for batch in route.batches:
            self.ring.begin(batch)
            for row, place in enumerate(batch.places, batch.first):
                position = route.order[row]
                size, content = sizes[position], contents[position]
                assert self.bounds[0] <= place <= place + size <= self.bounds[1]

                def kernel(place: int = place, size: int = size, content: bytes = content, position: int = position) -> None:
                    if self.store:
                        ctypes.memmove(place, content, size)
                    else:
                        found[position] = ctypes.string_at(place, size)

                self.lane.add(kernel)
            self.ring.end(batch)
        self.ring.settle()

        def look() -> None:
            self.looked += 1
            for position in route.order[route.direct :]:
                at_home = ctypes.string_at(homes[position], sizes[position])
                assert (at_home if self.store else found[position]) == contents[position], f"chunk {position}"

        self.lane.add(look)
        self.slabs.append(slab)


@pytest.mark.parametrize("store", [False, True])
def test_every_chunk_comes_through_whole_in_any_order_of_the_queues(store: bool) -> None:
    """Requests larger than the ring, one after the other, before the device has begun with the first or while it is at it."""
    for seed in range(150):
        chance = random.Random(seed)
        bench = Bench(store, chance.choice((1024, 2048, 5000, 8192)), seed)
        most = bench.ring._nbytes // 512 * 256
        for _ in range(3):
            bench.request([chance.randint(1, most) for _ in range(chance.randint(1, 12))])
            if chance.random() < 0.3:
                go_on((bench.lane, bench.copies), chance)
        go_on((bench.lane, bench.copies), chance)
        assert bench.looked == 3
        assert len(bench.ring._busy) + len(bench.ring._spare) <= 40, "events are used again"


def routed(ring_bytes: int, transfers: Sequence[SlotTransfer]) -> Route | None:
    return HostRing(LateQueue(), LateQueue(), 2**20, ring_bytes, store=False).route(SlotColumns.of(transfers))


def test_batches_lie_in_one_piece_and_two_fit() -> None:
    slab = host_slab(2**20)
    for size in (100, 1000, 30_000):
        route = routed(65536, [chunk(slab, 0, size)] * 50)
        assert route is not None
        assert [len(batch.sizes) for batch in route.batches] == [b.chunks for b in route.batches]
        assert sum(batch.chunks for batch in route.batches) == 50
        for batch in route.batches:
            assert 0 <= batch.begin < batch.end <= 65536
            assert batch.end - batch.begin <= max(BATCH_BYTES, size)
            assert batch.places == sorted(batch.places)
        for one, two in pairwise(route.batches):
            assert one.first + one.chunks == two.first
            assert one.end <= two.begin or two.end <= one.begin


def test_only_host_memory_that_fits_twice_goes_through() -> None:
    host = host_slab(2**20)
    vram = MappedSlab("cuda", "GPU-0", 2**20, host.address, device_address=host.address)
    small, large, far = chunk(host, 0, 512), chunk(host, 0, 1025), chunk(vram, 0, 512)
    assert routed(2048, [large, far]) is None
    route = routed(2048, [small, far, large, small])
    assert route is not None
    assert (route.order.tolist(), route.direct) == ([1, 2, 0, 3], 2)
    assert [batch.first for batch in route.batches] == [2, 3]
    assert route.homes == [0, 0, host.address, host.address]
    assert len(route.places) == 2


CALL = ctypes.CFUNCTYPE(
    ctypes.c_uint, *[ctypes.c_void_p] * 3, ctypes.c_size_t, *[ctypes.c_void_p] * 2, ctypes.c_size_t, *[ctypes.c_void_p] * 2
)


def test_copies_are_one_call_of_the_driver_where_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    seen: list[tuple[Any, ...]] = []
    codes = [0, 700]

    def batch(
        targets: int, sources: int, sizes: int, count: int, attributes: int, first: int, kinds: int, failed: int, stream: int
    ) -> int:
        words = ctypes.c_uint64 * count
        seen.append((*(list(words.from_address(each)) for each in (targets, sources, sizes)), kinds, stream))
        ctypes.c_size_t.from_address(failed).value = 1
        assert ctypes.c_uint.from_address(attributes).value == 1
        assert ctypes.c_size_t.from_address(first).value == 0
        return codes.pop(0)

    call = CALL(batch)
    address = ctypes.cast(call, ctypes.c_void_p).value
    monkeypatch.setattr(driver, "cuGetProcAddress", lambda *_: (0, address, None))
    monkeypatch.setattr(driver, "cuMemcpyAsync", lambda *arguments: (seen.append(arguments), (0,))[1])
    copies = Copies()
    copies([2**40, 2], [3, 4], [5, 6], 7)
    copies([1], [2], [3], 7)
    assert seen == [([2**40, 2], [3, 4], [5, 6], 1, 7), (1, 2, 3, 7)]
    with pytest.raises(DeviceUnavailableError, match="error 700 at entry 1 of 2"):
        copies([1, 2], [3, 4], [5, 6], 7)

    monkeypatch.setattr(driver, "cuGetProcAddress", lambda *_: (500, 0, None))
    seen.clear()
    Copies()([1, 2], [3, 4], [5, 6], 7)
    assert seen == [(1, 3, 5, 7), (2, 4, 6, 7)]
    monkeypatch.setattr(driver, "cuMemcpyAsync", lambda *_: (700,))
    with pytest.raises(DeviceUnavailableError, match="cuMemcpyAsync of 5 bytes"):
        Copies()([1, 2], [3, 4], [5, 6], 7)
