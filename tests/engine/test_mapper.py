"""What is lent is mapped before a transfer needs it, one slab at a time, and nobody waits for what has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from support.cluster import eventually

from vcache.cache.mapper import Mapper


class Segments:
    """`SegmentMap.prepare`, a slab at a time as the test lets it."""

    def __init__(self, slabs: int = 3) -> None:
        self.slabs = slabs
        self.free = threading.Semaphore(0)
        self.mapped: list[tuple[int, int]] = []
        self.under_way = 0

    def prepare(self, number: int, timeout: float, stop: Callable[[], bool]) -> int:
        for slab in range(self.slabs):
            if stop():
                return slab
            self.under_way += 1
            assert self.free.acquire(timeout=10)
            self.under_way -= 1
            self.mapped.append((number, slab))
        return self.slabs


@pytest.fixture
def segments() -> Segments:
    return Segments()


@pytest.fixture
def mapper(segments: Segments) -> Iterator[Mapper]:
    made = Mapper(segments, ahead=True)  # type: ignore[arg-type]
    yield made
    segments.free.release(100)
    made.close()


def test_segments_are_mapped_in_turn_and_waited_for(mapper: Mapper, segments: Segments) -> None:
    mapper.want(7)
    mapper.want(8)
    assert not mapper.wait([7], 0.01)
    segments.free.release(3)
    assert mapper.wait([7], 10)
    assert not mapper.wait([7, 8], 0.01)
    segments.free.release(3)
    assert mapper.wait([7, 8], 10)
    assert segments.mapped == [(number, slab) for number in (7, 8) for slab in range(3)]


def test_a_segment_that_is_announced_later_is_waited_for(mapper: Mapper, segments: Segments) -> None:
    segments.free.release(3)
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.append(mapper.wait([9], 10)))
    waiter.start()
    mapper.want(9)
    waiter.join(10)
    assert found == [True]


def test_nobody_waits_for_a_segment_that_went(mapper: Mapper, segments: Segments) -> None:
    mapper.gone(5)
    assert mapper.wait([5], 10)


def test_a_new_session_ends_waiting_and_mapping(mapper: Mapper, segments: Segments) -> None:
    mapper.want(7)
    eventually(lambda: segments.under_way, what="mapping")
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.append(mapper.wait([7], 10)))
    waiter.start()
    while not found:  # whenever it began to wait
        mapper.session_began()
        waiter.join(0.01)
    segments.free.release(1)
    assert found == [False]
    mapper.want(7)
    segments.free.release(3)
    assert mapper.wait([7], 10)
    assert segments.mapped == [(7, 0), (7, 0), (7, 1), (7, 2)]


def test_close_waits_for_one_slab_only(segments: Segments) -> None:
    mapper = Mapper(segments, ahead=True)  # type: ignore[arg-type]
    mapper.want(7)
    eventually(lambda: segments.under_way, what="mapping")
    closing = threading.Thread(target=mapper.close)
    closing.start()
    segments.free.release(1)
    closing.join(10)
    assert not closing.is_alive()
    assert len(segments.mapped) <= 1
    mapper.close()


def test_without_a_gpu_nothing_is_mapped_ahead(segments: Segments) -> None:
    mapper = Mapper(segments, ahead=False)  # type: ignore[arg-type]
    mapper.want(7)
    assert mapper.wait([7], 10)
    assert segments.mapped == []
    mapper.close()
