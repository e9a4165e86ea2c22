"""Payloads from VRAM to host memory, and copies of slots between all kinds of slabs, against a driver made of memfds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable

import pytest
from fake_driver import GRANULARITY, FakeDriver
from gpu_pool import Place

from vcache.errors import SegmentError
from vcache.segment.backing import OwnedSlab, SlabBacking
from vcache.segment.cuda import CudaBacking, PageLock
from vcache.segment.host import HostBacking
from vcache.segment.mapping import PinnedSlot, SegmentMap
from vcache.segment.slot_protocol import SourceSlot, TargetSlot, copy_slot, read_slot, slot_header
from vcache.segment.slots import SegmentInfo, SlabHeader, SlabInfo, SlotHeader, SlotLocation, slab_geometry

real = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

SLOT_BYTES = 5 * 2**20
SLAB_BYTES = 8 * GRANULARITY
WRITER = b"w" * 16


def test_a_payload_has_landed_when_the_call_returns(fake: FakeDriver, backing: CudaBacking) -> None:
    slab = backing.create(GRANULARITY)
    data = random.Random(1).randbytes(100_000)
    backing.write(slab, 4096, data)
    out = memoryview(bytearray(len(data) + 2))
    fake.contexts.append(77)
    backing.read_into(slab, 4096, out[1:-1])
    assert out == b"\0" + data + b"\0"
    assert fake.contexts == [77], "the caller's context was not restored"
    assert not fake.events
    assert fake.priorities == [0, 0], "the second stream is for the background, at the lowest priority"
    backing.read_into(slab, 0, memoryview(bytearray()))
    backing.read_into(slab, 0, out[:9])
    assert len(fake.priorities) == 2, "one such stream is enough"
    slab.retire()
    backing.release(slab)
    backing.close()
    assert fake.streams == 0


def test_a_copy_that_fails_is_over_when_it_raises(fake: FakeDriver, backing: CudaBacking) -> None:
    slab = backing.create(GRANULARITY)
    out = memoryview(bytearray(64))
    for call in ("cuEventCreate", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventSynchronize"):
        fake.failures = {call: "CUDA_ERROR_UNKNOWN"}
        with pytest.raises(SegmentError, match=f"{call}: CUDA_ERROR_UNKNOWN"):
            backing.read_into(slab, 0, out)
        assert not fake.events
        assert not any(fake.under_way.values())
        assert not fake.contexts


def test_payloads_stay_inside_and_go_to_writable_memory(backing: CudaBacking) -> None:
    slab = backing.create(GRANULARITY)
    with pytest.raises(SegmentError, match="outside"):
        backing.read_into(slab, GRANULARITY - 3, memoryview(bytearray(4)))
    for out in (memoryview(bytes(4)), memoryview(bytearray(8))[::2], memoryview(bytearray(8)).cast("I")):
        with pytest.raises(SegmentError, match="writable bytes in one piece"):
            backing.read_into(slab, 0, out)
        with pytest.raises(SegmentError, match="writable bytes in one piece"):
            HostBacking().read_into(HostBacking().create(4096), 0, out)


class Pool:
    """One slab of each kind in one map."""

    def __init__(self, cuda: CudaBacking, host: HostBacking | None = None) -> None:
        self.segments = SegmentMap(WRITER, "here", {})
        self.geometry = slab_geometry(SLAB_BYTES, SLOT_BYTES)
        self.header = SlabHeader(10, SLOT_BYTES, self.geometry.slots)
        self.backings: dict[str, SlabBacking] = {"cuda": cuda, "host": host or HostBacking()}
        self.slabs: dict[str, OwnedSlab] = {}
        for number, (kind, backing) in enumerate(self.backings.items(), start=1):
            slab = self.slabs[kind] = backing.create(SLAB_BYTES)
            self.segments.add_local(bytes([number]) * 16, lambda index, slab=slab: slab, backing)
            info = SegmentInfo(
                uuid=bytes([number]) * 16,
                kind=backing.kind,
                host="here",
                device=backing.device,
                broker="",
                owner=WRITER,
                slabs=(SlabInfo(0, SLAB_BYTES),),
                number=number,
            )
            self.segments.update(info)

    def close(self) -> None:
        self.segments.close()
        for kind, slab in self.slabs.items():
            slab.retire()
            self.backings[kind].release(slab)
            self.backings[kind].close()

    def pin(self, kind: str, slot: int, generation: int) -> tuple[PinnedSlot, SlotLocation]:
        location = SlotLocation(1 + list(self.slabs).index(kind), 0, 16, slot, SLOT_BYTES, generation)
        pinned = self.segments.pin(location)
        assert pinned is not None
        return pinned, location

    def fill(self, kind: str, slot: int) -> tuple[SlotHeader, bytes]:
        header = SlotHeader(0, 1, 20, bytes([slot + 1]) * 16, b"n" * 16, SLOT_BYTES - 7, 16, slot)
        payload = random.Random(slot).randbytes(header.payload_bytes)
        backing, slab = self.backings[kind], self.slabs[kind]
        backing.write(slab, self.geometry.payload_offset(slot), payload)
        backing.write(slab, self.geometry.header_offset(slot), header.pack())
        return header, payload


def copy_and_check(pool: Pool, source: str, target: str) -> None:
    header, payload = pool.fill(source, 0)
    origin, location = pool.pin(source, 0, header.generation)
    place, grant = pool.pin(target, 2, 32)
    job = SourceSlot(origin, location, header.key, 0)
    assert copy_slot(pool.segments, job, TargetSlot(place, grant, pool.header.pack()), WRITER) == len(payload)
    there, slab = pool.backings[target], pool.slabs[target]
    assert there.read(slab, 0, 64) == pool.header.pack()
    assert there.read(slab, place.header_offset, 64) == header._replace(generation=32).pack()
    assert there.read(slab, place.payload_offset, len(payload)) == payload
    assert copy_slot(pool.segments, job, TargetSlot(place, grant, pool.header.pack()), WRITER) == 0, "it is newer now"
    for pinned in (origin, place):
        pool.segments.unpin(pinned)


KINDS = [(source, target) for source in ("cuda", "host") for target in ("cuda", "host")]


@pytest.mark.parametrize(("source", "target"), KINDS)
def test_slots_are_copied_between_all_kinds_of_slabs(backing: CudaBacking, source: str, target: str) -> None:
    copy_and_check(Pool(backing), source, target)


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "target"), KINDS)
def test_slots_are_copied_on_a_gpu(place: Place, source: str, target: str) -> None:
    if not place.on_gpu:
        pytest.skip("needs a CUDA GPU")
    backing = CudaBacking()
    pinning = PageLock(backing.gpu.uuid)
    pool = Pool(backing, HostBacking(register=pinning.register, unregister=pinning.unregister))
    copy_and_check(pool, source, target)
    pool.close()
    pinning.close()


@pytest.mark.gpu
def test_slabs_dropped_on_a_gpu_do_not_stand_in_the_way_of_others(place: Place) -> None:
    """Addresses stayed registered when the memory behind them was gone:
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED for the next slab that came to lie there."""
    if not place.on_gpu:
        pytest.skip("needs a CUDA GPU")
    owner = HostBacking()
    slab = owner.create(SLAB_BYTES)
    for _ in range(3):
        pinning = PageLock()
        importer = HostBacking(register=pinning.register, unregister=pinning.unregister)
        for _ in range(3):
            assert importer.map(slab.fd, slab.nbytes).device_address  # and dropped
            gc.collect()
    slab.retire()
    owner.release(slab)


@pytest.mark.gpu
def test_speed_of_payloads_to_host_memory(place: Place, record: Callable[..., None]) -> None:
    if not place.on_gpu:
        pytest.skip("needs a CUDA GPU")
    backing = CudaBacking()
    pinning = PageLock(backing.gpu.uuid)
    slab = backing.create(256 * 2**20)
    gbps = {}
    for name, host in (
        ("pinned", HostBacking(prefault=True, register=pinning.register, unregister=pinning.unregister)),
        ("pageable", HostBacking(prefault=True)),
    ):
        target = host.create(slab.nbytes)
        assert target.buffer is not None
        backing.read_into(slab, 0, target.buffer)
        began = time.perf_counter()
        backing.read_into(slab, 0, target.buffer)
        gbps[name] = slab.nbytes / (time.perf_counter() - began) / 1e9
        target.retire()
        host.release(target)
    slab.retire()
    backing.release(slab)
    pinning.close()
    backing.close()
    record(**gbps)


@pytest.mark.parametrize("kind", ["cuda", "host"])
def test_a_slot_is_read_into_host_memory(backing: CudaBacking, kind: str) -> None:
    pool = Pool(backing)
    header, payload = pool.fill(kind, 1)
    origin, location = pool.pin(kind, 1, header.generation)
    source = SourceSlot(origin, location, header.key, 0)
    assert slot_header(pool.segments, source) == header
    out = memoryview(bytearray(64 + SLOT_BYTES))
    assert read_slot(pool.segments, source, header, out)
    assert out[: 64 + len(payload)] == header.pack() + payload
    assert not read_slot(pool.segments, source, header._replace(generation=22), out)
