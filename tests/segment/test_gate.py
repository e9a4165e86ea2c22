"""The write gate alone: who passes, who is seen inside, and when rows are free again."""

from __future__ import annotations

import os
import threading

import pytest

from vcache.errors import SegmentError
from vcache.segment.backing import MappedSlab
from vcache.segment.gate import GATE_BYTES, QUARANTINE, ROWS, SLAB_WORDS, Gate, Passage, WriteGate

OWNER, WRITER = b"o" * 16, b"w" * 16


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def gate() -> Gate:
    return Gate(OWNER)


def importer(gate: Gate, client: bytes = WRITER) -> WriteGate:
    return WriteGate.map(gate.fd, gate.admit(client))


def test_only_the_last_mounts_tickets_pass(gate: Gate) -> None:
    writer = importer(gate)
    assert not writer.enter(0, 0), "no mount yet"
    first = gate.renew()
    assert writer.enter(0, first)
    second = gate.renew()
    assert first != second
    assert not writer.enter(0, first), "a ticket of an earlier mount"
    assert gate.writers([0]) == {(WRITER, 0)}, "who had passed before is seen, and nobody else"
    writer.leave(0)
    assert gate.writers([0]) == set()
    assert writer.enter(0, second)


def test_fence_words_are_drawn_anew_for_every_mount_and_segment() -> None:
    """A number that several segments share (an epoch, say) would let a ticket pass the gate of another segment."""
    words = {Gate(OWNER).renew() for _ in range(50)}
    assert len(words) == 50
    assert 0 not in words


def test_a_refused_writer_leaves_no_trace(gate: Gate) -> None:
    writer = importer(gate)
    gate.renew()
    assert not writer.enter(3, 12345)
    assert gate.writers(range(10)) == set()


def test_the_last_of_several_threads_empties_the_word(gate: Gate) -> None:
    fence, writer = gate.renew(), importer(gate)
    assert writer.enter(1, fence)
    assert writer.enter(1, fence)
    writer.leave(1)
    assert gate.writers([1]) == {(WRITER, 1)}
    writer.leave(1)
    assert gate.writers([1]) == set()
    with pytest.raises(AssertionError, match="without having entered"):
        writer.leave(1)


def test_many_threads_end_at_zero(gate: Gate) -> None:
    fence, writer = gate.renew(), importer(gate)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(300):
            if not writer.enter(5, fence):
                wrong.append("refused")
            if gate.writers([5]) != {(WRITER, 5)}:
                wrong.append("not seen")
            writer.leave(5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert gate.writers([5]) == set()


def test_own_writes_are_seen_too(gate: Gate) -> None:
    fence = gate.renew()
    assert gate.own.enter(2, fence)
    assert gate.writers([1, 2]) == {(OWNER, 2)}


def test_slabs_that_share_a_word_seem_both_written(gate: Gate) -> None:
    fence, writer = gate.renew(), importer(gate)
    assert writer.enter(SLAB_WORDS + 7, fence)
    assert gate.writers([7, 8, SLAB_WORDS + 7]) == {(WRITER, 7), (WRITER, SLAB_WORDS + 7)}


def test_a_dead_writer_counts_until_the_quarantine_is_over() -> None:
    clock = Clock()
    gate = Gate(OWNER, clock)
    fence, writer = gate.renew(), importer(gate)
    assert writer.enter(4, fence)
    gate.hung_up(WRITER)
    clock.now += QUARANTINE - 0.1
    assert gate.writers([4]) == {(WRITER, 4)}
    clock.now += 0.2
    assert gate.writers([4]) == set()
    row = gate.admit(b"n" * 16)
    assert WriteGate.map(gate.fd, row).enter(4, fence), "its row is another's now"
    assert gate.writers([4]) == {(b"n" * 16, 4)}


def test_a_living_writer_is_waited_for_whatever_the_clock_says() -> None:
    clock = Clock()
    gate = Gate(OWNER, clock)
    assert importer(gate).enter(4, gate.renew())
    clock.now += 1e9
    assert gate.writers([4]) == {(WRITER, 4)}


def test_rows_are_given_once_and_run_out_with_a_clear_word() -> None:
    clock = Clock()
    gate = Gate(OWNER, clock)
    clients = [number.to_bytes(16, "little") for number in range(1, ROWS)]
    assert len({gate.admit(client) for client in clients}) == ROWS - 1
    assert gate.admit(clients[0]) == gate.admit(clients[0])
    with pytest.raises(SegmentError, match="write in this segment already"):
        gate.admit(WRITER)
    gate.hung_up(clients[0])
    clock.now += QUARANTINE + 1
    assert gate.admit(WRITER) > 0


@pytest.mark.parametrize("sealed", [True, False])
def test_a_page_that_could_be_resized_or_has_another_size_is_refused(sealed: bool) -> None:
    """Or its lender could make this process die by SIGBUS."""
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096 if sealed else GATE_BYTES)
        with pytest.raises(SegmentError, match="refused"):
            WriteGate.map(fd, 1)
    finally:
        os.close(fd)
    with pytest.raises(SegmentError, match="refused"):
        WriteGate.map(Gate(OWNER).fd, ROWS)


def test_a_passage_asks_each_slab_once_and_leaves_all(gate: Gate) -> None:
    fence = gate.renew()
    slabs = [MappedSlab("host", "host", 4096, 1) for _ in range(3)]
    for index, slab in enumerate(slabs[:2]):
        slab.index, slab.gate = index, gate.own
    passage = Passage()
    assert passage.admits(slabs[0], fence)
    assert passage.admits(slabs[0], fence)
    assert not passage.admits(slabs[1], fence + 1)
    assert not passage.admits(slabs[2], fence), "no gate, no writing"
    assert gate.writers(range(3)) == {(OWNER, 0)}
    passage.leave()
    passage.leave()
    assert gate.writers(range(3)) == set()


def test_a_passage_judges_each_word_for_itself(gate: Gate) -> None:
    """A large put is answered in slices, so its tickets may be of two mounts: the verdict on one is none on the other."""
    slab = MappedSlab("host", "host", 4096, 1)
    slab.index, slab.gate = 0, gate.own
    first, passage = gate.renew(), Passage()
    assert passage.admits(slab, first)
    second = gate.renew()
    assert passage.admits(slab, second)
    assert not Passage().admits(slab, first)
    third = gate.renew()
    assert passage.admits(slab, third)
    assert not Passage().admits(slab, second)
    passage.leave()
    assert gate.writers([0]) == set()
    late = Passage()
    assert late.admits(slab, third)
    assert not late.admits(slab, second), "one word was let in, the other is not"
    late.leave()
    assert gate.writers([0]) == set()
