"""Slabs in which somebody may be amid a write of an earlier manager's ticket: no slot of theirs is given out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from directory_cases import ME, header, lone, slab_of

from vcache.manager.api import GateReport, GateWriter, PutGrant, PutRequest, Ticket
from vcache.manager.directory.directory import Directory
from vcache.segment.slots import SegmentInfo

WRITER, OTHER = b"w" * 16, b"o" * 16
FENCE = 77


def put(directory: Directory, first: int, count: int = 1) -> list[PutGrant]:
    keys = [b"key%013d" % number for number in range(first, first + count)]
    request = PutRequest(keys=keys, namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4] * count, slot_bytes=256)
    return directory.put_start(OTHER, request, 1.0)


def statuses(grants: list[PutGrant]) -> list[str]:
    return [grant.status for grant in grants]


@pytest.fixture
def mounted() -> tuple[Directory, SegmentInfo]:
    """One slab with four slots, one of them with a chunk, in which WRITER is counted."""
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    inventory = [slab_of(header(), slots=4)]
    directory.mount(ME, info, inventory, 1.0, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
    directory.take_instructions()
    return directory, info


def test_nothing_is_granted_or_evicted_while_it_waits(mounted: tuple[Directory, SegmentInfo]) -> None:
    directory, _ = mounted
    assert statuses(put(directory, 0, 6)) == ["no_space"] * 6
    assert directory.lookup(OTHER, [b"k" * 16], 1.0) == 1, "what is there can be read, and nothing goes for slots of no use"
    assert directory.stats(1.0).counters["evictions"] == 0
    directory.check_integrity()


def hello(directory: Directory, info: SegmentInfo) -> None:
    directory.open_session(WRITER, "w", "engine", 2.0)


def report(directory: Directory, info: SegmentInfo) -> None:
    directory.writers_left(ME, info.uuid, [GateWriter(WRITER, 0), GateWriter(OTHER, 9)], 2.0)


def remount(directory: Directory, info: SegmentInfo) -> None:
    directory.mount(ME, info, [slab_of(header(), slots=4)], 2.0, GateReport(fence=FENCE))


@pytest.mark.parametrize("end", [hello, report, remount])
def test_it_is_open_again_when_the_writer_is_known_to_be_done(
    mounted: tuple[Directory, SegmentInfo], end: Callable[[Directory, SegmentInfo], None]
) -> None:
    directory, info = mounted
    end(directory, info)
    grants = put(directory, 0, 3)
    assert statuses(grants) == ["granted"] * 3
    assert [grant.fence for grant in grants] == [FENCE] * 3, "each ticket carries the word of its mount"
    directory.check_integrity()


def test_no_clock_and_no_other_client_opens_it(mounted: tuple[Directory, SegmentInfo]) -> None:
    directory, info = mounted
    directory.open_session(b"x" * 16, "x", "engine", 2.0)
    directory.writers_left(ME, info.uuid, [GateWriter(OTHER, 0)], 2.0)
    for now in (10.0, 1e6, 1e9):
        for client in (ME, OTHER):
            directory.open_session(client, "again", "lender" if client == ME else "engine", now)
        directory.mount(ME, info, [slab_of(header(), slots=4)], now, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
        directory.tick(now)
        assert statuses(put(directory, 0)) == ["no_space"]


def test_a_client_with_a_session_is_not_waited_for() -> None:
    """What it writes is known: it had nothing in flight when it said hello."""
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    directory.mount(ME, info, [slab_of(slots=4)], 1.0, GateReport(fence=FENCE, writers=(GateWriter(OTHER, 0),)))
    assert statuses(put(directory, 0)) == ["granted"]


def test_two_writers_are_both_waited_for() -> None:
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    writers = (GateWriter(WRITER, 0), GateWriter(b"v" * 16, 0))
    directory.mount(ME, info, [slab_of(slots=4)], 1.0, GateReport(fence=FENCE, writers=writers))
    directory.writers_left(ME, info.uuid, writers[:1], 1.0)
    assert statuses(put(directory, 0)) == ["no_space"]
    directory.writers_left(ME, info.uuid, writers[1:], 1.0)
    assert statuses(put(directory, 0)) == ["granted"]


def test_other_slabs_go_on() -> None:
    directory, info = lone(slabs=2)
    directory.open_session(OTHER, "o", "engine", 0.0)
    directory.mount(ME, info, [], 1.0, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
    grants = put(directory, 0, 8)
    granted = [grant for grant in grants if grant.location is not None]
    assert granted
    assert {grant.location.slab for grant in granted if grant.location} == {1}


def test_generations_start_above_every_epoch_that_a_lender_knows() -> None:
    """The epoch is the time of day: set back between two managers, new tickets lay below old ones."""
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    directory.mount(ME, info, [], 1.0, GateReport(fence=FENCE, floor=5_000_001))
    location = put(directory, 0)[0].location
    assert location is not None
    assert location.generation > 5_000_001
    assert directory.put_end(OTHER, [Ticket(b"key%013d" % 0, 0, location.generation)], 1.0) == [True]
