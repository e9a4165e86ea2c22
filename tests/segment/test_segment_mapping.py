"""`SegmentMap` against real brokers in this process: locations, pins, concurrency, lenders that are away."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segment_support import CLIENT, MiB, eventually, info_of, mapped_slabs

from vcache.errors import DeviceUnavailableError, IntegrityError, SegmentError
from vcache.lender.broker import Broker
from vcache.segment import handover as protocol
from vcache.segment.backing import MappedSlab, OwnedSlab, SlabBacking
from vcache.segment.gate import Gate
from vcache.segment.host import HostBacking
from vcache.segment.mapping import SegmentMap
from vcache.segment.slots import HEADER_BYTES, SegmentInfo, SlotLocation, slab_geometry

UUID = b"segment-uuid-016"
OTHER = b"another-segment!"
IMPORTER = b"importing-client"
SLOT = 64 * 1024


class CountingBacking(HostBacking):
    """Host memory that counts what is mapped, and can be slow or refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = 0
        self.unmaps = 0
        self.problem = ""
        self.delay = threading.Event()
        self.delay.set()

    def map(self, fd: int, nbytes: int) -> MappedSlab:
        self.delay.wait(5)
        if self.problem:
            raise SegmentError(self.problem)
        self.maps += 1
        return super().map(fd, nbytes)

    def unmap(self, slab: MappedSlab) -> None:
        self.unmaps += 1
        super().unmap(slab)


class Lent:
    """A broker with slabs in this process, and a map that imports them over the socket."""

    def __init__(self, folder: Path, slabs: int = 3, size: int = MiB) -> None:
        self.folder = protocol.prepare_broker_dir(str(folder))
        self.backing = HostBacking()
        self.gone: list[bytes] = []
        self.broker = Broker(self.folder, UUID, Gate(b"lender-of-a-test"), self.gone.append)
        self.slabs: dict[int, OwnedSlab] = {}
        for index in range(slabs):
            self.slabs[index] = self.backing.create(size)
            self.broker.add_slab(index, size, self.slabs[index].fd)
        self.info = info_of(UUID, self.broker.path, dict.fromkeys(self.slabs, size))
        self.importing = CountingBacking()
        self.map = SegmentMap(IMPORTER, "here", {"host": self.backing_for}, timeout=0.5, retry_after=0.2)

    def backing_for(self, device: str) -> SlabBacking:
        assert device == "host"
        return self.importing

    def close(self) -> None:
        self.map.close()
        self.broker.close()
        for slab in self.slabs.values():
            slab.retire()
            self.backing.release(slab)


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[Lent]:
    lent = Lent(tmp_path / "broker")
    yield lent
    lent.close()


def at(slab: int, slot: int = 0, slot_bytes: int = SLOT, segment: int = 1) -> SlotLocation:
    return SlotLocation(segment, slab, 256, slot, slot_bytes, 2)


def test_pinned_slot_is_the_lenders_memory(lent: Lent) -> None:
    lent.map.update(lent.info)
    geometry = slab_geometry(MiB, SLOT)
    lent.backing.write(lent.slabs[2], geometry.payload_offset(5), b"payload")
    slot = lent.map.pin(at(2, 5))
    assert slot is not None
    assert (slot.header_offset, slot.payload_offset) == (HEADER_BYTES * 6, geometry.payload_offset(5))
    assert lent.map.read(slot.slab, slot.payload_offset, 7) == b"payload"
    assert slot.slab.buffer is not None
    slot.slab.buffer[slot.header_offset] = 9
    assert lent.backing.read(lent.slabs[2], HEADER_BYTES * 6, 1) == b"\x09"
    assert (slot.slab.pins, lent.map.mapped_bytes()) == (1, MiB)
    lent.map.check_integrity()
    lent.map.unpin(slot)
    assert slot.slab.pins == 0


def test_rounded_slot_sizes_give_the_same_place(lent: Lent) -> None:
    """`slot_bytes` comes rounded up from the wire; own tickets may carry it unrounded."""
    lent.map.update(lent.info)
    rounded, plain = lent.map.pin(at(0, 3, 1024)), lent.map.pin(at(0, 3, 1000))
    assert rounded is not None
    assert plain is not None
    assert rounded[1:] == plain[1:]
    lent.map.unpin(rounded)
    lent.map.unpin(plain)


# -- locations that lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        at(0, segment=2),
        at(3),
        at(-1),
        at(0, slot=slab_geometry(MiB, SLOT).slots),
        at(0, slot=-1),
        at(0, slot_bytes=MiB),
        at(0, slot_bytes=0),
        at(0, slot_bytes=-5),
        at(0, slot_bytes=2**60),
    ],
)
def test_bogus_location_has_no_address(lent: Lent, location: SlotLocation) -> None:
    lent.map.update(lent.info)
    assert lent.map.pin(location) is None
    assert lent.importing.maps == 0


def test_every_address_lies_inside_its_slab(lent: Lent) -> None:
    lent.map.update(lent.info)
    numbers = st.integers(-(2**40), 2**40) | st.integers(-2, 40)

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.builds(SlotLocation, numbers, numbers, numbers, numbers, numbers, numbers))
    def check(location: SlotLocation) -> None:
        slot = lent.map.pin(location)
        if slot is not None:
            assert location.slot_bytes > 0
            assert HEADER_BYTES <= slot.header_offset <= slot.payload_offset - HEADER_BYTES
            assert slot.payload_offset + location.slot_bytes <= slot.slab.nbytes
            lent.map.unpin(slot)

    check()


def test_slab_of_another_size_than_announced_is_refused(lent: Lent) -> None:
    lent.map.update(info_of(UUID, lent.broker.path, {0: 2 * MiB}))
    assert lent.map.pin(at(0)) is None
    assert "has 1048576 bytes instead of 2097152" in lent.map.problems()[1]
    assert lent.broker.request_unmap([0], 2) == {}


def test_location_may_overtake_the_announcement_of_its_segment(lent: Lent) -> None:
    timer = threading.Timer(0.05, lent.map.update, [lent.info])
    timer.start()
    slot = lent.map.pin(at(0))
    timer.join()
    assert slot is not None
    lent.map.unpin(slot)
    lent.map.forget_all()
    began = time.monotonic()
    for _ in range(20):
        assert lent.map.pin(at(0)) is None
    assert time.monotonic() - began < 1


# -- once, and with others --------------------------------------------------------------------------------------------


def test_a_slab_is_mapped_once_however_many_ask(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.importing.delay.clear()
    slots = []

    def pin() -> None:
        slots.append(lent.map.pin(at(1)))

    threads = [threading.Thread(target=pin) for _ in range(8)]
    for thread in threads:
        thread.start()
    lent.importing.delay.set()
    for thread in threads:
        thread.join(5)
    assert len({id(slot.slab) for slot in slots if slot is not None}) == 1
    assert len(slots) == 8
    assert lent.importing.maps == 1
    for slot in slots:
        assert slot is not None
        lent.map.unpin(slot)


def test_prepare_maps_everything(lent: Lent) -> None:
    lent.map.update(lent.info)
    assert lent.map.prepare(1) == 3
    assert lent.importing.maps == 3
    assert lent.map.prepare(1) == 3
    assert lent.importing.maps == 3
    assert lent.map.prepare(7) == 0


def test_unmap_waits_for_the_pin_and_holds_up_nobody_else(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.prepare(1)
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.backing.write(lent.slabs[0], slot.payload_offset, b"still here")
    assert lent.broker.request_unmap([0], 0.2) == {IMPORTER: frozenset([0])}
    assert lent.map.pin(at(0)) is None
    assert lent.map.read(slot.slab, slot.payload_offset, 10) == b"still here"
    began = time.monotonic()
    assert lent.broker.request_unmap([1], 5) == {}
    assert time.monotonic() - began < 2
    waiter: list[dict[bytes, frozenset[int]]] = []
    thread = threading.Thread(target=lambda: waiter.append(lent.broker.request_unmap([0], 5)))
    thread.start()
    lent.map.unpin(slot)
    thread.join(5)
    assert waiter == [{}]
    assert (slot.slab.address, slot.slab.buffer) == (0, None)
    assert lent.map.unreachable() == []


def test_traffic_during_unmapping_never_touches_unmapped_memory(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.prepare(1)
    stop = threading.Event()
    errors: list[str] = []

    def use() -> None:
        while not stop.is_set():
            for slab in range(3):
                slot = lent.map.pin(at(slab))
                if slot is not None:
                    if slot.slab.address == 0 or slot.slab.buffer is None:
                        errors.append("unmapped under a pin")
                    lent.map.unpin(slot)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for index in range(3):
        assert lent.broker.request_unmap([index], 5) == {}
    stop.set()
    for thread in threads:
        thread.join(5)
    assert errors == []
    assert lent.importing.unmaps == 3
    assert lent.map.mapped_bytes() == 0


# -- forgetting -------------------------------------------------------------------------------------------------------


def test_forget_unmaps_and_the_segment_may_come_back(lent: Lent) -> None:
    lent.map.update(lent.info)
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.forget(1)
    lent.map.forget(1)
    assert lent.map.pin(at(0)) is None
    assert slot.slab.buffer is not None
    eventually(lambda: slot.slab.retired)
    lent.map.update(info_of(UUID, lent.broker.path, {0: MiB}, number=4))
    again = lent.map.pin(at(0, segment=4))
    assert again is not None
    assert again.slab is not slot.slab
    # The lender hears of the slab as unmapped only when neither mapping is left.
    assert lent.broker.request_unmap([0], 0.2) == {IMPORTER: frozenset([0])}
    lent.map.unpin(again)
    assert lent.broker.request_unmap([0], 0.2) == {IMPORTER: frozenset([0])}
    lent.map.unpin(slot)
    assert lent.broker.request_unmap([0], 5) == {}
    assert lent.gone == []


def test_slab_mapped_anew_is_not_reported_as_unmapped_by_its_old_mapping(lent: Lent) -> None:
    lent.map.update(lent.info)
    old = lent.map.pin(at(0))
    assert old is not None
    lent.map.forget(1)
    eventually(lambda: old.slab.retired)
    lent.map.update(lent.info)
    new = lent.map.pin(at(0))
    assert new is not None
    lent.map.unpin(old)
    eventually(lambda: lent.importing.unmaps == 1)
    assert lent.map.prepare(1) == 3
    assert lent.broker.request_unmap([0], 0.2) == {IMPORTER: frozenset([0])}
    lent.map.unpin(new)
    assert lent.broker.request_unmap([0], 5) == {}


def test_new_epoch_keeps_mappings_for_the_segments_return(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.prepare(1)
    lent.map.forget_all()
    assert lent.map.pin(at(0)) is None
    assert lent.map.segments() == []
    lent.map.update(info_of(UUID, lent.broker.path, dict.fromkeys(range(3), MiB), number=9))
    assert lent.map.prepare(9) == 3
    assert lent.importing.maps == 3
    assert lent.map.pin(at(0)) is None


def test_segment_that_does_not_return_is_unmapped_when_its_lender_ends(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.prepare(1)
    lent.map.forget_all()
    lent.broker.close()
    eventually(lambda: lent.importing.unmaps == 3)


def test_shrunk_segment_drops_the_slabs_that_are_gone(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.prepare(1)
    lent.map.update(info_of(UUID, lent.broker.path, {0: MiB, 2: MiB}))
    eventually(lambda: lent.importing.unmaps == 1)
    assert lent.map.pin(at(1)) is None
    assert lent.map.mapped_bytes() == 2 * MiB
    lent.map.check_integrity()


def test_number_that_means_another_segment_now(lent: Lent, tmp_path: Path) -> None:
    other = Broker(lent.folder, OTHER, Gate(b"lender-of-a-test"), lambda client: None)
    slab = lent.backing.create(MiB)
    other.add_slab(0, MiB, slab.fd)
    lent.backing.write(slab, slab_geometry(MiB, SLOT).payload_offset(0), b"other")
    lent.map.update(lent.info)
    lent.map.prepare(1)
    lent.map.update(info_of(OTHER, other.path, {0: MiB}))
    slot = lent.map.pin(at(0))
    assert slot is not None
    assert lent.map.read(slot.slab, slot.payload_offset, 5) == b"other"
    lent.map.unpin(slot)
    lent.map.check_integrity()
    lent.map.forget(1)
    other.close()
    slab.retire()
    lent.backing.release(slab)


def test_one_segment_never_has_two_numbers(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.update(info_of(UUID, lent.broker.path, {0: MiB}, number=2))
    assert [info.number for info in lent.map.segments()] == [2]
    lent.map.check_integrity()


# -- what cannot be reached ---------------------------------------------------------------------------------------------


def test_segments_of_other_hosts_and_kinds_are_unreachable(lent: Lent) -> None:
    lent.map.update(info_of(UUID, lent.broker.path, {0: MiB}, host="there", number=3))
    cuda = another(lent, kind="cuda", device="GPU-1", number=5)
    lent.map.update(cuda)
    assert lent.map.unreachable() == [3, 5]
    assert lent.map.problems() == {3: "it is on another host", 5: "this process cannot map cuda memory"}
    assert lent.map.pin(at(0, segment=3)) is None
    assert lent.map.pin(at(0, segment=5)) is None
    assert lent.importing.maps == 0


def another(lent: Lent, **changes: Any) -> SegmentInfo:
    return msgspec.structs.replace(lent.info, uuid=OTHER, **changes)


def test_device_that_is_missing_here_makes_the_segment_unreachable(lent: Lent) -> None:
    def refuse(device: str) -> SlabBacking:
        raise DeviceUnavailableError(f"no link to {device}")

    segments = SegmentMap(IMPORTER, "here", {"cuda": refuse}, timeout=0.5, retry_after=60)
    segments.update(another(lent, kind="cuda", device="GPU-1"))
    assert "no link to GPU-1" in segments.problems()[1]
    segments.close()


def test_absent_lender_is_tried_again_after_a_while(lent: Lent, tmp_path: Path) -> None:
    path = str(protocol.socket_path(lent.folder, OTHER))
    lent.map.update(info_of(OTHER, path, {0: MiB}))
    assert "No such file" in lent.map.problems()[1]
    began = time.monotonic()
    assert lent.map.pin(at(0)) is None
    assert time.monotonic() - began < 0.2
    late = Broker(lent.folder, OTHER, Gate(b"lender-of-a-test"), lambda client: None)
    slab = lent.backing.create(MiB)
    late.add_slab(0, MiB, slab.fd)
    eventually(lambda: lent.map.unreachable() == [])
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.unpin(slot)
    late.close()
    slab.retire()
    lent.backing.release(slab)


def test_failed_mapping_is_remembered_and_tried_again(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.importing.problem = "no room for the mapping"
    assert lent.map.pin(at(0)) is None
    assert lent.map.problems() == {1: "no room for the mapping"}
    lent.importing.problem = ""
    assert lent.map.pin(at(0)) is None
    eventually(lambda: lent.map.unreachable() == [])
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.unpin(slot)
    assert lent.broker.request_unmap([0], 5) == {}


def test_slab_that_is_gone_does_not_make_the_segment_unreachable(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.broker.request_unmap([1], 1)
    assert lent.map.pin(at(1)) is None
    assert lent.map.unreachable() == []
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.unpin(slot)


class SilentLender:
    """Accepts connections and says nothing, until it is told to speak."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen(8)

    def accept(self) -> socket.socket:
        self.listener.settimeout(5)
        return self.listener.accept()[0]


def test_lender_that_does_not_answer_costs_one_timeout_and_then_nothing(lent: Lent) -> None:
    path = protocol.socket_path(lent.folder, OTHER)
    silent = SilentLender(path)
    lent.map.update(info_of(OTHER, str(path), {0: MiB}))
    began = time.monotonic()
    assert lent.map.unreachable() == [1]
    assert 0.3 < time.monotonic() - began < 2
    began = time.monotonic()
    for _ in range(20):
        assert lent.map.pin(at(0)) is None
        assert lent.map.unreachable() == [1]
    assert time.monotonic() - began < 0.3
    assert "does not answer" in lent.map.problems()[1]
    connection = silent.accept()
    assert isinstance(protocol.decode_from_importer(connection.recv(4096)), protocol.Hello)
    welcome(connection)
    eventually(lambda: lent.map.unreachable() == [])
    # Connected, but it does not hand out its slab.
    began = time.monotonic()
    assert lent.map.pin(at(0)) is None
    assert 0.3 < time.monotonic() - began < 2
    assert lent.map.unreachable() == [1]
    began = time.monotonic()
    assert lent.map.pin(at(0)) is None
    assert time.monotonic() - began < 0.2
    silent.listener.close()
    connection.close()


@pytest.mark.parametrize(
    "frame",
    [b"", b"junk", protocol.encode(protocol.Get(0)), protocol.encode(protocol.Refused("because")), b"z" * 40000],
    ids=["empty", "garbage", "wrong-direction", "refused", "too-long"],
)
def test_lender_that_breaks_the_protocol_is_lost_and_others_are_not(lent: Lent, frame: bytes) -> None:
    path = protocol.socket_path(lent.folder, OTHER)
    silent = SilentLender(path)
    lent.map.update(lent.info)
    lent.map.update(info_of(OTHER, str(path), {0: MiB}, number=2))
    connection = silent.accept()
    connection.send(frame)
    eventually(lambda: lent.map.unreachable() == [2])
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.unpin(slot)
    silent.listener.close()
    connection.close()


def welcome(connection: socket.socket) -> None:
    gate = Gate(b"lender-of-a-test")
    socket.send_fds(connection, [protocol.encode(protocol.Welcome(protocol.BROKER_VERSION, 1))], [gate.fd])
    gate.close()


def test_descriptors_that_nobody_asked_for_are_closed(lent: Lent) -> None:
    path = protocol.socket_path(lent.folder, OTHER)
    silent = SilentLender(path)
    lent.map.update(info_of(OTHER, str(path), {0: MiB}))
    connection = silent.accept()
    welcome(connection)
    eventually(lambda: lent.map.unreachable() == [])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        socket.send_fds(connection, [protocol.encode(protocol.Granted(0, MiB))], [lent.slabs[0].fd] * 2)
    for _ in range(10):
        connection.settimeout(5)
        while protocol.decode_from_importer(connection.recv(4096)) != protocol.Unmapped([0]):
            continue
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before)  # The last ones are closed after the answer.
    assert lent.importing.maps == 0
    silent.listener.close()
    connection.close()


# -- local, end -------------------------------------------------------------------------------------------------------


def test_own_segment_needs_no_broker() -> None:
    backing = HostBacking()
    owned = {0: backing.create(MiB)}
    segments = SegmentMap(CLIENT, "here", {})
    segments.add_local(UUID, owned.get, backing)
    segments.update(info_of(UUID, "/nowhere", {0: MiB, 1: MiB}))
    assert segments.unreachable() == []
    slot = segments.pin(at(0))
    assert slot is not None
    assert slot.slab is owned[0]
    assert segments.read(slot.slab, 0, 4) == b"\0\0\0\0"
    assert segments.pin(at(1)) is None
    assert segments.prepare(1) == 2
    assert not owned[0].wait_idle(0)
    assert segments.pin(at(0)) is None
    segments.unpin(slot)
    assert owned[0].wait_idle(1)
    segments.close()
    backing.release(owned[0])


def test_own_segment_under_another_client_id_is_not_used() -> None:
    backing = HostBacking()
    segments = SegmentMap(IMPORTER, "here", {})
    segments.add_local(UUID, {}.get, backing)
    segments.update(info_of(UUID, "/nowhere", {0: MiB}))
    assert segments.problems() == {1: "it is lent by this process, but under another client id"}
    segments.close()


def test_close_unmaps_and_hangs_up(lent: Lent) -> None:
    lent.map.update(lent.info)
    lent.map.prepare(1)
    count = mapped_slabs()
    lent.map.close()
    lent.map.close()
    assert mapped_slabs() == count - 3
    eventually(lambda: lent.gone == [IMPORTER])
    assert lent.map.pin(at(0)) is None
    lent.map.update(lent.info)
    assert lent.map.pin(at(0)) is None
    assert lent.map.prepare(1) == 0


def test_close_leaves_pinned_slabs_and_the_sign_of_life(lent: Lent) -> None:
    lent.map.update(lent.info)
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.prepare(1)
    began = time.monotonic()
    lent.map.close(timeout=0.2)
    assert time.monotonic() - began < 2
    assert slot.slab.buffer is not None
    assert lent.broker.importers() == {IMPORTER}
    lent.map.unpin(slot)
    eventually(lambda: slot.slab.buffer is None)
    eventually(lambda: lent.gone == [IMPORTER])


def test_integrity_check_notices_a_contradiction(lent: Lent) -> None:
    lent.map.update(lent.info)
    slot = lent.map.pin(at(0))
    assert slot is not None
    lent.map.check_integrity()
    slot.slab.nbytes += 1
    with pytest.raises(IntegrityError, match="mapped with"):
        lent.map.check_integrity()
    slot.slab.nbytes -= 1
    slot.slab.retire()
    with pytest.raises(IntegrityError, match="used but not mapped"):
        lent.map.check_integrity()
    lent.map.unpin(slot)
