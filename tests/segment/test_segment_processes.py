"""Lender and importers as real processes: shared bytes, SIGKILL, SIGSTOP, and memory that really comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from segment_child import ImporterChild, LenderChild
from segment_support import CLIENT, Child, FakeManager, MiB, children, eventually, segment_config, shared_memory_bytes

from vcache.lender.lender import Lender
from vcache.segment.host import HostBacking
from vcache.segment.slots import SegmentInfo, slab_geometry

pytestmark = pytest.mark.processes

SLOT = 64 * 1024
ALICE, BOB = b"alice's-client-1", b"bobby's-client-2"
WORDS = bytes(range(256)) * (SLOT // 256)


@pytest.fixture
def manager() -> FakeManager:
    manager = FakeManager(CLIENT)
    manager.start()
    return manager


@pytest.fixture
def lender(manager: FakeManager, tmp_path: Path) -> Iterator[Lender]:
    lender = Lender(manager, HostBacking(), segment_config(tmp_path / "broker", 2 * MiB, MiB, 0.5))  # type: ignore[arg-type]
    assert lender.wait_mounted(5)
    yield lender
    lender.close()


def start(child: Child, client: bytes, info: SegmentInfo) -> None:
    assert child.call(ImporterChild.start, client, info) == []


def read(child: Child, slab: int, slot: int = 0) -> bytes | None:
    return child.call(ImporterChild.read, slab, slot, SLOT)


def fill(lender: Lender, slab: int, slot: int, data: bytes) -> None:
    memory = lender.slab(slab)
    assert memory is not None
    lender.backing.write(memory, slab_geometry(memory.nbytes, SLOT).payload_offset(slot), data)


def test_three_processes_see_the_same_bytes(lender: Lender) -> None:
    fill(lender, 1, 3, WORDS)
    with children(ImporterChild, ImporterChild) as (alice, bob):
        start(alice, ALICE, lender.info)
        start(bob, BOB, lender.info)
        assert read(alice, 1, 3) == WORDS
        assert read(bob, 1, 3) == WORDS
        alice.call(ImporterChild.write, slab=1, slot=4, slot_bytes=SLOT, data=WORDS[::-1])
        assert read(bob, 1, 4) == WORDS[::-1]
        assert lender.importers() == {ALICE, BOB}


def test_killed_lender_leaves_readable_bytes_that_are_forgotten_on_request(tmp_path: Path) -> None:
    with children(LenderChild, ImporterChild) as (owner, alice):
        info = owner.call(LenderChild.start, folder=tmp_path / "broker", size=2 * MiB, slab=MiB)
        offset = slab_geometry(info.slabs[0].nbytes, SLOT).payload_offset(2)
        owner.call(LenderChild.write, slab=0, offset=offset, data=WORDS)
        start(alice, ALICE, info)
        assert alice.call(ImporterChild.pin, slab=0, slot=2, slot_bytes=SLOT) is True
        owner.kill()
        eventually(lambda: alice.call(ImporterChild.unreachable) == [1])
        assert alice.call(ImporterChild.read_pinned, nbytes=SLOT) == WORDS
        assert read(alice, 0, 2) == WORDS
        assert read(alice, 1) is None
        alice.call(ImporterChild.forget)
        assert read(alice, 0, 2) is None
        assert alice.call(ImporterChild.read_pinned, nbytes=SLOT) == WORDS
        alice.call(ImporterChild.unpin)
        assert alice.call(ImporterChild.mapped, expected=0) == 0


def test_killed_lenders_memory_is_free_when_the_importers_let_go(tmp_path: Path) -> None:
    size = 256 * MiB
    with children(LenderChild, ImporterChild) as (owner, alice):
        info = owner.call(LenderChild.start, folder=tmp_path / "broker", size=size, slab=size)
        start(alice, ALICE, info)
        assert alice.call(ImporterChild.pin, slab=0, slot=0, slot_bytes=SLOT) is True
        before = shared_memory_bytes()
        owner.call(LenderChild.touch, slab=0)
        assert shared_memory_bytes() > before + size // 2
        owner.kill()
        alice.kill()
        eventually(lambda: shared_memory_bytes() < before + size // 2, 10)


def test_killed_importer_is_reported(lender: Lender, manager: FakeManager) -> None:
    with children(ImporterChild, ImporterChild) as (alice, bob):
        start(alice, ALICE, lender.info)
        start(bob, BOB, lender.info)
        assert alice.call(ImporterChild.pin, slab=0, slot=0, slot_bytes=SLOT) is True
        alice.kill()
        eventually(lambda: manager.gone == [(lender.uuid, ALICE)])
        assert lender.importers() == {BOB}
        assert read(bob, 0) == bytes(SLOT)


def test_forked_child_is_no_sign_of_life_for_its_dead_parent(lender: Lender, manager: FakeManager) -> None:
    with children(ImporterChild) as (alice,):
        start(alice, ALICE, lender.info)
        assert alice.call(ImporterChild.pin, slab=0, slot=0, slot_bytes=SLOT) is True
        grandchild = alice.call(ImporterChild.fork, seconds=20)
        alice.signal(signal.SIGKILL)
        try:
            eventually(lambda: manager.gone == [(lender.uuid, ALICE)])
        finally:
            os.kill(grandchild, 9)


def test_forked_child_does_not_keep_a_dead_lender_alive(tmp_path: Path) -> None:
    with children(LenderChild, ImporterChild) as (owner, alice):
        start(alice, ALICE, owner.call(LenderChild.start, folder=tmp_path / "broker", size=MiB, slab=MiB))
        grandchild = owner.call(LenderChild.fork, seconds=20)
        owner.signal(signal.SIGKILL)
        try:
            eventually(lambda: alice.call(ImporterChild.unreachable) == [1])
        finally:
            os.kill(grandchild, 9)


def test_stopped_importer_is_not_gone_and_shrinking_is_bounded(lender: Lender, manager: FakeManager) -> None:
    fill(lender, 1, 0, WORDS)
    fill(lender, 0, 0, WORDS)
    slab = lender.slab(1)
    assert slab is not None
    observer = os.dup(slab.fd)
    with children(ImporterChild) as (alice,):
        start(alice, ALICE, lender.info)
        assert read(alice, 1) == WORDS
        alice.stop()
        lender.backing.frees_under_importers = True  # Alice has no GPU, whatever the machine has.
        report = lender.shrink(MiB)
        assert (report.slabs, report.freed_bytes, report.late) == (1, slab_nbytes(lender), (ALICE,))
        assert 0.4 < report.seconds < 3
        assert manager.gone == []
        assert lender.importers() == {ALICE}
        assert os.fstat(observer).st_blocks == 0
        alice.go_on()
        # It obeys as soon as it can (until then it reads zeros), and the rest of the segment is as it was.
        assert read(alice, 1) in (None, bytes(SLOT))
        eventually(lambda: read(alice, 1) is None)
        assert read(alice, 0) == WORDS
        assert alice.call(ImporterChild.unreachable) == []
        assert alice.call(ImporterChild.mapped, expected=1) == 1
        assert manager.gone == []
    os.close(observer)


def slab_nbytes(lender: Lender) -> int:
    return lender.info.slabs[0].nbytes


def test_shrinking_returns_memory_while_an_importer_maps_it(lender: Lender) -> None:
    """The importer pins the slab through the shrink: its bytes turn to zeros, and it does not crash."""
    fill(lender, 1, 0, WORDS)
    slab = lender.slab(1)
    assert slab is not None
    observer = os.dup(slab.fd)
    with children(ImporterChild) as (alice,):
        start(alice, ALICE, lender.info)
        assert alice.call(ImporterChild.pin, slab=1, slot=0, slot_bytes=SLOT) is True
        assert alice.call(ImporterChild.read_pinned, nbytes=SLOT) == WORDS
        assert os.fstat(observer).st_blocks > 0
        report = lender.shrink(MiB)
        assert report.late == (ALICE,)
        assert os.fstat(observer).st_blocks == 0
        assert alice.call(ImporterChild.read_pinned, nbytes=SLOT) == bytes(SLOT)
        alice.call(ImporterChild.unpin)
        assert alice.call(ImporterChild.mapped, expected=0) == 0
        assert alice.alive
    os.close(observer)


def test_large_segment_shrinks_in_milliseconds_and_returns_its_memory(manager: FakeManager, tmp_path: Path) -> None:
    size = 128 * MiB
    config = segment_config(tmp_path / "broker", size, 16 * MiB)
    lender = Lender(manager, HostBacking(prefault=True), config)  # type: ignore[arg-type]
    try:
        assert lender.wait_mounted(5)
        slabs = [slab for index in range(8) if (slab := lender.slab(index)) is not None]
        observers = [os.dup(slab.fd) for slab in slabs]
        assert sum(os.fstat(fd).st_blocks * 512 for fd in observers) > size
        with children(ImporterChild) as (alice,):
            start(alice, ALICE, lender.info)
            assert read(alice, 3) == bytes(SLOT)
            report = lender.shrink(size)
            assert (report.slabs, report.late) == (8, ())
            assert report.freed_bytes > size
            assert report.seconds < 1
            assert sum(os.fstat(fd).st_blocks for fd in observers) == 0
            assert alice.call(ImporterChild.mapped, expected=0) == 0
        for fd in observers:
            os.close(fd)
    finally:
        lender.close()


def test_stopped_lender_costs_an_importer_one_timeout(tmp_path: Path) -> None:
    with children(LenderChild, ImporterChild) as (owner, alice):
        info = owner.call(LenderChild.start, folder=tmp_path / "broker", size=2 * MiB, slab=MiB)
        start(alice, ALICE, info)
        assert read(alice, 0) == bytes(SLOT)
        owner.stop()
        began = time.monotonic()
        assert read(alice, 1) is None
        assert time.monotonic() - began < 4
        began = time.monotonic()
        assert read(alice, 1) is None
        assert alice.call(ImporterChild.unreachable) == [1]
        assert time.monotonic() - began < 0.8
        assert read(alice, 0) == bytes(SLOT)
        owner.go_on()

        def reads_again() -> Any:
            return read(alice, 1) == bytes(SLOT)

        eventually(reads_again, 10)


def test_dead_lenders_socket_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    with children(LenderChild, LenderChild) as (first, second):
        first.call(LenderChild.start, folder=folder, size=MiB, slab=MiB)
        old = set(folder.iterdir())
        assert len(old) == 1
        first.kill()
        second.call(LenderChild.start, folder=folder, size=MiB, slab=MiB)
        new = set(folder.iterdir())
        assert len(new) == 1
        assert new.isdisjoint(old)
