"""`Lender` with a stand-in for the manager: mounting, inventory, wiping, resizing, a manager that is away."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from segment_support import CLIENT, FakeManager, MiB, eventually, segment_config

from vcache.errors import DeadlineExceededError, ManagerRefusedError, ManagerUnavailableError, SegmentError
from vcache.lender.lender import Lender
from vcache.lender.slabs import slab_bytes
from vcache.manager.api import ResizeRequested, SegmentGone, UndoneSlots, WipeSlots, WriterLost
from vcache.segment import host
from vcache.segment.backing import OwnedSlab
from vcache.segment.host import HostBacking
from vcache.segment.mapping import SegmentMap
from vcache.segment.slots import HEADER_BYTES, SegmentInfo, SlabHeader, SlotHeader, SlotLocation, slab_geometry

SLOT = 64 * 1024
IMPORTER = b"importing-client"
SIZE = slab_bytes(MiB, 4096)

MakeLender = Callable[..., Lender]


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
def make(manager: FakeManager, tmp_path: Path) -> Iterator[MakeLender]:
    lenders: list[Lender] = []

    def build(backing: HostBacking | None = None, **sizes: float) -> Lender:
        config = segment_config(tmp_path / "broker", **sizes)  # type: ignore[arg-type]
        lender = Lender(manager, backing or HostBacking(), config, host="here")  # type: ignore[arg-type]
        lenders.append(lender)
        return lender

    yield build
    for lender in lenders:
        lender.close()


@pytest.fixture
def lender(manager: FakeManager, make: MakeLender) -> Lender:
    """The manager is there, and the segment is mounted."""
    manager.start()
    lender = make()
    assert lender.wait_mounted(5)
    return lender


@pytest.fixture
def importers() -> Iterator[Callable[[SegmentInfo], SegmentMap]]:
    maps: list[SegmentMap] = []

    def build(info: SegmentInfo, client: bytes = IMPORTER) -> SegmentMap:
        import msgspec

        segments = SegmentMap(client, "here", {"host": lambda device: HostBacking()}, timeout=1)
        maps.append(segments)
        segments.update(msgspec.structs.replace(info, number=1))
        assert segments.unreachable() == []
        return segments

    yield build
    for segments in maps:
        segments.close(1)


def memory(lender: Lender, index: int) -> OwnedSlab:
    slab = lender.slab(index)
    assert slab is not None
    return slab


def at(slab: int, slot: int = 0) -> SlotLocation:
    return SlotLocation(1, slab, 256, slot, SLOT, 2)


def slot_header(generation: int, key: bytes = b"k" * 16) -> SlotHeader:
    return SlotHeader(0, 1, generation, key, b"n" * 16, SLOT, 256, 0)


# -- mounting ---------------------------------------------------------------------------------------------------------


def test_segment_is_mounted_with_its_slabs(manager: FakeManager, lender: Lender) -> None:
    info, inventory = manager.mounts[0]
    assert (info.kind, info.host, info.device, info.owner, info.number) == ("host", "here", "host", CLIENT, 0)
    assert info.uuid == lender.uuid
    assert Path(info.broker).is_socket()
    assert [(slab.index, slab.nbytes) for slab in info.slabs] == [(0, SIZE), (1, SIZE)]
    assert [(item.slab, item.slab_header, item.slot_headers) for item in inventory] == [
        (0, bytes(HEADER_BYTES), b""),
        (1, bytes(HEADER_BYTES), b""),
    ]
    assert lender.payload_bytes == 2 * MiB


def test_last_slab_is_smaller_when_the_size_is_no_multiple(make: MakeLender) -> None:
    lender = make(size=2 * MiB + 300_000)
    assert [slab.nbytes for slab in lender.info.slabs] == [SIZE, SIZE, slab_bytes(300_000, 4096)]
    assert lender.payload_bytes == 2 * MiB + 300_000


def test_inventory_holds_the_headers_byte_for_byte(manager: FakeManager, make: MakeLender) -> None:
    lender = make()
    geometry = slab_geometry(SIZE, SLOT)
    header = SlabHeader(100, SLOT, geometry.slots).pack()
    chunk = slot_header(102).pack()
    lender.backing.write(memory(lender, 1), 0, header)
    lender.backing.write(memory(lender, 1), geometry.header_offset(3), chunk)
    manager.start()
    assert lender.wait_mounted(5)
    first, second = manager.mounts[0][1]
    assert (first.slab_header, first.slot_headers) == (bytes(HEADER_BYTES), b"")
    assert second.slab_header == header
    assert len(second.slot_headers) == geometry.slots * HEADER_BYTES
    assert second.slot_headers[3 * HEADER_BYTES : 4 * HEADER_BYTES] == chunk
    assert second.slot_headers.count(0) > len(second.slot_headers) - 2 * HEADER_BYTES


def test_absurd_slab_header_does_no_harm(manager: FakeManager, make: MakeLender) -> None:
    lender = make()
    lender.backing.write(memory(lender, 0), 0, SlabHeader(100, 1, 2**32 - 1).pack())
    manager.start()
    assert lender.wait_mounted(5)
    assert manager.mounts[0][1][0].slot_headers == b""


def test_every_session_gets_a_mount_with_the_headers_of_that_moment(manager: FakeManager, lender: Lender) -> None:
    geometry = slab_geometry(SIZE, SLOT)
    lender.backing.write(memory(lender, 0), 0, SlabHeader(100, SLOT, geometry.slots).pack())
    manager.stop()
    assert not lender.mounted
    manager.start()
    assert lender.wait_mounted(5)
    assert len(manager.mounts) == 2
    assert SlabHeader.unpack(manager.mounts[1][1][0].slab_header) == SlabHeader(100, SLOT, geometry.slots)
    assert manager.mounts[0][0].uuid == manager.mounts[1][0].uuid


def test_mount_that_fails_is_tried_again(manager: FakeManager, make: MakeLender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.lender.lender._RETRY", 0.05)
    manager.start()
    manager.fail_next = [DeadlineExceededError("slow"), ManagerRefusedError("not yet")]
    lender = make()
    assert lender.wait_mounted(5)
    assert manager.calls.count("mount") == 3


def test_pushes_about_other_segments_are_ignored(manager: FakeManager, lender: Lender) -> None:
    for push in (
        WipeSlots(token=1, segment=b"x" * 16, slots=[(0, 64)]),
        ResizeRequested(segment=b"x" * 16, nbytes=0),
        WriterLost(segment=b"x" * 16, client=IMPORTER),
        SegmentGone(number=1, uuid=lender.uuid),
    ):
        manager.push(push)
    manager.push(WipeSlots(token=2, segment=lender.uuid, slots=[]))
    eventually(lambda: manager.wiped_tokens == [2])
    assert manager.gone == []
    assert lender.payload_bytes == 2 * MiB


# -- wiping -----------------------------------------------------------------------------------------------------------


def test_wipe_zeroes_exactly_the_headers_named(manager: FakeManager, lender: Lender) -> None:
    slab = memory(lender, 0)
    lender.backing.write(slab, 0, b"\xaa" * 1024)
    manager.push(
        WipeSlots(
            token=5,
            segment=lender.uuid,
            slots=[(0, 128), (9, 64), (0, 0), (0, 65), (0, -64), (0, SIZE), (0, 2**40)],
        )
    )
    eventually(lambda: manager.wiped_tokens == [5])
    assert lender.backing.read(slab, 0, 1024) == b"\xaa" * 128 + bytes(64) + b"\xaa" * (1024 - 192)


def test_a_wipe_that_could_not_be_reported_is_reported_again(
    manager: FakeManager, make: MakeLender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of wipes was emptied before the calls: one deadline missed, and the others were never zeroed nor reported."""
    monkeypatch.setattr("vcache.lender.lender._RETRY", 0.05)
    manager.start()
    lender = make()
    assert lender.wait_mounted(5)
    lender.backing.write(memory(lender, 0), 0, b"\xaa" * 1024)
    manager.fail_next = [DeadlineExceededError("slow")]
    for token in (1, 2, 3):
        manager.push(WipeSlots(token=token, segment=lender.uuid, slots=[(0, 64 * token)]))
    eventually(lambda: set(manager.wiped_tokens) == {1, 2, 3})
    assert lender.backing.read(memory(lender, 0), 64, 192) == bytes(192)


def test_an_error_of_the_memory_does_not_end_the_lenders_thread(
    manager: FakeManager, make: MakeLender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failed read of a header, and the segment was never mounted again, in no later session either."""
    monkeypatch.setattr("vcache.lender.lender._RETRY", 0.05)
    manager.start()
    lender = make()
    assert lender.wait_mounted(5)
    read = lender.backing.read
    failures = [SegmentError("the device is away"), ValueError("of another kind")]

    def failing(*arguments: Any) -> bytes:
        if failures:
            raise failures.pop(0)
        return read(*arguments)

    monkeypatch.setattr(lender.backing, "read", failing)
    manager.stop()
    manager.start()
    assert lender.wait_mounted(5)
    assert not failures


def test_who_is_amid_a_write_is_said_at_the_mount_and_when_it_is_over(manager: FakeManager, lender: Lender) -> None:
    slab = memory(lender, 0)
    first = manager.gates[-1]
    assert slab.gate is not None
    assert slab.gate.enter(0, first.fence)
    manager.stop()
    manager.start()
    assert lender.wait_mounted(5)
    second = manager.gates[-1]
    assert first.fence != second.fence
    assert [(writer.client, writer.slab) for writer in second.writers] == [(manager.client_id, 0)]
    assert not slab.gate.enter(0, first.fence), "a ticket of the mount before"
    assert second.floor >= first.floor > 0, "epochs that it has heard of"
    assert manager.left == []
    slab.gate.leave(0)
    eventually(lambda: [writer.slab for writer in manager.left] == [0])


def left_headers(lender: Lender, count: int) -> list[bytes]:
    raw = lender.backing.read(memory(lender, 0), 0, HEADER_BYTES * (1 + count))
    return [bytes(raw[at : at + HEADER_BYTES]) for at in range(0, len(raw), HEADER_BYTES)]


@pytest.mark.parametrize(("restarts", "seen"), [(1, True), (2, True), (3, True), (2, False), (3, False)])
def test_what_an_old_ticket_wrote_is_undone_before_anybody_hears_of_it(
    manager: FakeManager, lender: Lender, restarts: int, seen: bool
) -> None:
    """`seen`: the writer is still there at the last mount."""
    slab, backing = memory(lender, 0), lender.backing
    assert slab.gate is not None
    formatted = SlabHeader(2, 4096, 3).pack()
    stood = [slot_header(8).pack(), slot_header(10, b"l" * 16).pack(), bytes(HEADER_BYTES)]
    backing.write(slab, 0, b"".join([formatted, *stood]))
    fence = manager.gates[-1].fence
    assert slab.gate.enter(0, fence)
    for number in range(restarts):
        manager.stop()
        if number == restarts - 1 and not seen:
            slab.gate.leave(0)
        manager.start()
        assert lender.wait_mounted(5)
        inventory = next(item for item in manager.mounts[-1][1] if item.slab == 0)
        told = [inventory.slot_headers[at : at + HEADER_BYTES] for at in range(0, 3 * HEADER_BYTES, HEADER_BYTES)]
        assert (inventory.slab_header, told) == (formatted, stood if number == 0 else [stood[0], *[bytes(HEADER_BYTES)] * 2])
        if number == 0:
            # It goes over a chunk of which nobody but the first manager knew that it was evicted, and writes a new one.
            backing.write(slab, 2 * HEADER_BYTES, slot_header(12).pack() + slot_header(14).pack())
    assert manager.left == []
    if seen:
        slab.gate.leave(0)
        eventually(lambda: [writer.slab for writer in manager.left] == [0])
        assert manager.undone == [UndoneSlots(0, 1, 2)]
    assert left_headers(lender, 3) == [formatted, stood[0], *[bytes(HEADER_BYTES)] * 2]


def test_a_slab_that_an_old_ticket_formatted_is_empty_in_the_format_that_was_told(manager: FakeManager, lender: Lender) -> None:
    slab, backing = memory(lender, 0), lender.backing
    assert slab.gate is not None
    formatted = SlabHeader(2, 4096, 3).pack()
    backing.write(slab, 0, formatted + slot_header(8).pack() + bytes(HEADER_BYTES) + slot_header(10).pack())
    assert slab.gate.enter(0, manager.gates[-1].fence)
    for number in range(2):
        manager.stop()
        manager.start()
        assert lender.wait_mounted(5)
        inventory = next(item for item in manager.mounts[-1][1] if item.slab == 0)
        assert inventory.slab_header == formatted
        assert any(inventory.slot_headers) == (number == 0), "old headers say nothing: other payloads may be there"
        backing.write(slab, 0, SlabHeader(20, 6144, 2).pack() + slot_header(22).pack())
    slab.gate.leave(0)
    eventually(lambda: manager.left)
    assert manager.undone == [UndoneSlots(0, 0, 3)]
    assert left_headers(lender, 3) == [formatted, *[bytes(HEADER_BYTES)] * 3]


def test_what_was_undone_is_told_again_when_the_report_failed_and_not_undone_again(
    manager: FakeManager, lender: Lender
) -> None:
    """The manager may have heard it, though the lender did not hear so: then others write there."""
    slab, backing = memory(lender, 0), lender.backing
    assert slab.gate is not None
    backing.write(slab, 0, SlabHeader(2, 4096, 3).pack())
    assert slab.gate.enter(0, manager.gates[-1].fence)
    manager.stop()
    manager.start()
    assert lender.wait_mounted(5)
    backing.write(slab, HEADER_BYTES, slot_header(8).pack())
    report, reports = manager.writers_left, []

    def lost(uuid: bytes, writers: Any, undone: Any = ()) -> None:
        reports.append(list(undone))
        if len(reports) == 1:
            backing.write(slab, HEADER_BYTES, slot_header(12).pack())  # By a ticket of this manager, which did hear it.
            raise ManagerUnavailableError("no answer")
        report(uuid, writers, undone)

    manager.writers_left = lost  # type: ignore[method-assign]
    slab.gate.leave(0)
    eventually(lambda: manager.left)
    assert reports == [[UndoneSlots(0, 0, 1)]] * 2
    assert left_headers(lender, 1)[1] == slot_header(12).pack()


# -- importers that end -------------------------------------------------------------------------------------------------


def test_importers_end_is_reported(
    manager: FakeManager, lender: Lender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    segments = importers(lender.info)
    assert lender.importers() == {IMPORTER}
    assert manager.gone == []
    segments.close()
    eventually(lambda: manager.gone == [(lender.uuid, IMPORTER)])


def test_end_seen_while_the_manager_was_away_is_reported_after_the_next_mount(
    manager: FakeManager, lender: Lender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    segments = importers(lender.info)
    manager.stop()
    segments.close()
    eventually(lambda: lender.importers() == set())
    assert manager.gone == []
    manager.calls.clear()
    manager.start()
    eventually(lambda: manager.gone == [(lender.uuid, IMPORTER)])
    assert manager.calls == ["mount", "importer_gone"]


def test_unfinished_writes_of_writers_that_are_not_connected_are_over(
    manager: FakeManager, make: MakeLender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    lender = make()
    importers(lender.info)
    geometry = slab_geometry(SIZE, SLOT)
    slab = memory(lender, 0)
    lender.backing.write(slab, 0, SlabHeader(100, SLOT, geometry.slots).pack())
    for slot, writer in enumerate((IMPORTER, b"long-dead-client", CLIENT)):
        lender.backing.write(slab, geometry.header_offset(slot), slot_header(200).writing(writer).pack())
    lender.backing.write(slab, geometry.header_offset(3), slot_header(202, b"finished-by-dead").pack())
    manager.start()
    eventually(lambda: manager.gone == [(lender.uuid, b"long-dead-client")])
    assert manager.calls == ["mount", "importer_gone"]


def test_lost_writer_is_over_unless_it_is_connected(
    manager: FakeManager, lender: Lender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    segments = importers(lender.info)
    for client in (IMPORTER, CLIENT, b"never-came-here!"):
        manager.push(WriterLost(segment=lender.uuid, client=client))
    eventually(lambda: manager.gone == [(lender.uuid, b"never-came-here!")])
    manager.push(WriterLost(segment=lender.uuid, client=b"never-came-here!"))
    eventually(lambda: len(manager.gone) == 2)
    segments.close()
    eventually(lambda: manager.gone[2:] == [(lender.uuid, IMPORTER)])


def test_refused_report_is_not_repeated(
    manager: FakeManager, lender: Lender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    segments = importers(lender.info)
    manager.fail_next = [ManagerRefusedError("unknown segment")]
    segments.close()
    eventually(lambda: not manager.fail_next)
    manager.push(WipeSlots(token=3, segment=lender.uuid, slots=[]))
    eventually(lambda: manager.wiped_tokens == [3])
    assert manager.calls == ["mount", "importer_gone", "wiped"]


# -- resizing ---------------------------------------------------------------------------------------------------------


def test_grow_announces_new_slabs(manager: FakeManager, lender: Lender) -> None:
    assert lender.grow(MiB + 5000) == 3 * MiB + 5000
    assert lender.wait_mounted(5)
    assert manager.slabs == {0: SIZE, 1: SIZE, 2: SIZE, 3: slab_bytes(5000, 4096)}


def test_shrink_gives_memory_back_and_numbers_are_not_reused(
    lender: Lender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    segments = importers(lender.info)
    assert segments.prepare(1) == 2
    slab = memory(lender, 1)
    observer = os.dup(slab.fd)
    lender.backing.write(slab, 0, b"\xff" * MiB)
    assert os.fstat(observer).st_blocks * 512 >= MiB
    report = lender.shrink(MiB)
    assert (report.slabs, report.freed_bytes, report.late) == (1, SIZE, ())
    assert report.seconds < 1
    assert os.fstat(observer).st_blocks == 0
    os.close(observer)
    assert lender.slab(1) is None
    assert segments.pin(at(1)) is None
    kept = segments.pin(at(0))
    assert kept is not None
    segments.unpin(kept)
    lender.grow(MiB)
    assert [slab.index for slab in lender.info.slabs] == [0, 2]


def test_shrink_beyond_all_there_is(manager: FakeManager, lender: Lender) -> None:
    assert lender.shrink(100 * MiB).slabs == 2
    assert (lender.payload_bytes, manager.slabs) == (0, {})
    assert lender.grow(MiB) == MiB
    assert lender.wait_mounted(5)


def test_shrink_is_bounded_by_a_reader_of_this_process_and_frees_when_it_ends(manager: FakeManager, make: MakeLender) -> None:
    manager.start()
    lender = make(unmap_timeout=0.3)
    assert lender.wait_mounted(5)
    slab = memory(lender, 1)
    assert slab.pin()
    observer = os.dup(slab.fd)
    lender.backing.write(slab, 0, b"\xff" * MiB)
    report = lender.shrink(MiB)
    assert (report.slabs, report.freed_bytes, report.late) == (1, 0, (CLIENT,))
    assert 0.25 < report.seconds < 2
    assert lender.backing.read(slab, 0, 1) == b"\xff"
    slab.unpin()
    assert os.fstat(observer).st_blocks == 0
    assert slab.fd == -1
    os.close(observer)


def test_late_importer_is_named_and_host_memory_is_freed_nevertheless(
    manager: FakeManager, make: MakeLender, importers: Callable[[SegmentInfo], SegmentMap]
) -> None:
    manager.start()
    backing = HostBacking()
    backing.frees_under_importers = True  # This importer has no GPU, whatever the machine has.
    lender = make(backing, unmap_timeout=0.3)
    assert lender.wait_mounted(5)
    segments = importers(lender.info)
    slot = segments.pin(at(1))
    assert slot is not None
    lender.backing.write(memory(lender, 1), slot.payload_offset, b"bytes")
    assert segments.read(slot.slab, slot.payload_offset, 5) == b"bytes"
    report = lender.shrink(MiB)
    assert (report.freed_bytes, report.late) == (SIZE, (IMPORTER,))
    assert segments.read(slot.slab, slot.payload_offset, 5) == bytes(5)
    segments.unpin(slot)


@pytest.mark.parametrize("why", ["vram", "host memory that a GPU may have pinned"])
def test_memory_that_an_importer_holds_is_not_counted_as_freed(
    why: str,
    manager: FakeManager,
    make: MakeLender,
    importers: Callable[[SegmentInfo], SegmentMap],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Host memory was reported as given back while an importer's GPU kept its pages pinned: punching a hole into the file
    frees only what nobody has pinned."""
    if why != "vram":
        monkeypatch.setattr(host, "_GPU_DRIVER", (tmp_path,))
    backing = HostBacking()
    if why == "vram":
        backing.frees_under_importers = False
    manager.start()
    lender = make(backing, size=3 * MiB, unmap_timeout=0.3)
    assert lender.wait_mounted(5)
    segments = importers(lender.info)
    slot = segments.pin(at(2))
    assert slot is not None
    report = lender.shrink(2 * MiB)
    assert (report.slabs, report.freed_bytes, report.late) == (2, SIZE, (IMPORTER,))
    segments.unpin(slot)


def test_resize_to_a_target(lender: Lender) -> None:
    assert lender.resize(4 * MiB) == 4 * MiB
    assert lender.resize(4 * MiB) == 4 * MiB
    assert lender.resize(2 * MiB + 1) == 2 * MiB
    assert lender.resize(0) == 0


def test_resize_requested_by_the_manager(manager: FakeManager, lender: Lender) -> None:
    for target in (5 * MiB, 3 * MiB, MiB):
        manager.push(ResizeRequested(segment=lender.uuid, nbytes=target))
    eventually(lambda: lender.payload_bytes == MiB)
    eventually(lambda: len(manager.slabs) == 1)
    manager.push(ResizeRequested(segment=lender.uuid, nbytes=2**50))
    manager.push(WipeSlots(token=4, segment=lender.uuid, slots=[]))
    eventually(lambda: manager.wiped_tokens == [4])
    manager.push(ResizeRequested(segment=lender.uuid, nbytes=2 * MiB))
    eventually(lambda: lender.payload_bytes == 2 * MiB)


def test_shrinking_without_the_manager(manager: FakeManager, lender: Lender) -> None:
    manager.stop()
    report = lender.shrink(MiB)
    assert (report.slabs, report.freed_bytes) == (1, SIZE)
    manager.start()
    assert lender.wait_mounted(5)
    assert manager.slabs == {0: SIZE}


def test_lost_answer_to_a_shrink_is_repaired_by_a_new_mount(manager: FakeManager, lender: Lender) -> None:
    manager.fail_next = [DeadlineExceededError("the answer is lost")]
    assert lender.shrink(MiB).slabs == 1
    assert lender.wait_mounted(5)
    assert len(manager.mounts) == 2
    assert manager.slabs == {0: SIZE}


def test_growing_without_the_manager(manager: FakeManager, lender: Lender) -> None:
    manager.stop()
    assert lender.grow(MiB) == 3 * MiB
    manager.start()
    assert lender.wait_mounted(5)
    assert sorted(manager.slabs) == [0, 1, 2]


def test_resizing_from_many_threads_ends_consistent(manager: FakeManager, make: MakeLender) -> None:
    manager.start()
    lender = make(size=4 * MiB)

    def churn(seed: int) -> None:
        for step in range(6):
            if (seed + step) % 2:
                lender.grow(MiB)
            else:
                lender.shrink(MiB)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    for thread in threads:
        while thread.is_alive() and time.monotonic() < deadline:
            manager.start()
            thread.join(0.01)
    assert lender.wait_mounted(5)
    assert manager.slabs == {slab.index: slab.nbytes for slab in lender.info.slabs}
    assert lender.payload_bytes == len(manager.slabs) * MiB


# -- errors and end -----------------------------------------------------------------------------------------------------


def test_absurd_size_is_one_clear_line_and_leaves_nothing_behind(
    manager: FakeManager, make: MakeLender, tmp_path: Path
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        SegmentError, match=r"segment: cannot lend \d+ bytes .* on host: only \d+ bytes are available; lower segment.size"
    ):
        make(size=2**50, slab=2**49)
    assert list((tmp_path / "broker").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert manager.listeners == []


def test_growth_that_fails_midway_lends_nothing_more(manager: FakeManager, make: MakeLender) -> None:
    class Reluctant(HostBacking):
        left = 3

        def create(self, nbytes: int) -> OwnedSlab:
            if not self.left:
                raise SegmentError("no more")
            self.left -= 1
            return super().create(nbytes)

    manager.start()
    lender = make(Reluctant())
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentError, match="no more"):
        lender.grow(3 * MiB)
    assert lender.payload_bytes == 2 * MiB
    assert len(os.listdir("/proc/self/fd")) == before
    for change in (lender.grow, lender.shrink):
        with pytest.raises(SegmentError, match="at least 1 byte"):
            change(0)


def test_close_unmounts_and_frees(manager: FakeManager, lender: Lender, importers: Callable[[SegmentInfo], SegmentMap]) -> None:
    segments = importers(lender.info)
    segments.prepare(1)
    slab = memory(lender, 0)
    observer = os.dup(slab.fd)
    lender.backing.write(slab, 0, b"x")
    broker = Path(lender.info.broker)
    lender.close()
    lender.close()
    assert manager.unmounted == [lender.uuid]
    assert os.fstat(observer).st_blocks == 0
    assert not broker.exists()
    assert segments.mapped_bytes() == 0
    eventually(lambda: segments.unreachable() == [1])
    with pytest.raises(SegmentError, match="closed"):
        lender.grow(MiB)
    os.close(observer)


def test_close_without_the_manager(manager: FakeManager, make: MakeLender) -> None:
    lender = make()
    began = time.monotonic()
    lender.close()
    assert time.monotonic() - began < 2
    assert lender.payload_bytes == 0


def test_size_changes_are_told_to_the_owner(manager: FakeManager, tmp_path: Path) -> None:
    sizes: list[int] = []
    lender = Lender(manager, HostBacking(), segment_config(tmp_path / "broker"), on_resize=sizes.append)  # type: ignore[arg-type]
    lender.grow(MiB)
    lender.shrink(2 * MiB)
    lender.close()
    assert sizes == [3 * MiB, MiB]
