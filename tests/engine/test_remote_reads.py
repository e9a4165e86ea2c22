"""Slots of other hosts: verified like mapped ones, whatever the transfer engine does."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from remote_world import CHUNK, HERE, SPEC, FakeEngine, World, copy
from support.cluster import eventually
from support.paged import content

from vcache.cache.transfer import JoinedTransfer
from vcache.errors import SegmentError
from vcache.keys import Chunk
from vcache.paged.mover import Transfer
from vcache.segment.slots import HEADER_BYTES, SlotHeader

PAYLOAD = SPEC.payload_bytes(CHUNK)


def hang(until: threading.Event) -> int:
    until.wait(30)
    return -1


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def build(**options: Any) -> World:
        made.append(World(**options))
        return made[-1]

    yield build
    for world in made:
        world.close()


def test_chunks_of_another_host_arrive(make: Callable[..., World]) -> None:
    world = make()
    tokens = world.stored(6)
    assert world.load(tokens).flags() == [True] * 6
    stats = world.metrics.snapshot()
    assert stats["operations"]["retrieve"]["remote"]["bytes"] == 6 * PAYLOAD
    assert set(stats["operations"]["retrieve"]) == {"remote"}
    assert (stats["counters"]["retrieve_chunks"], stats["counters"]["stale_reads"]) == (6, 0)
    assert world.pool.manager.stats().gauges["leases"] == 0


def test_more_chunks_than_buffers(make: Callable[..., World]) -> None:
    world = make(limit=3)
    tokens = world.stored(8)
    loads = [world.load(tokens) for _ in range(4)]
    assert [load.flags() for load in loads] == [[True] * 8] * 4


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_writer_overwrites_is_never_delivered(make: Callable[..., World], number: int) -> None:
    """A writer takes the third slot before (1) or after (2) its header and payload were read."""
    world = make()
    tokens = world.stored(4)
    slot = SlotHeader(0, 1, 2**62, b"k" * 16, b"n" * 16, PAYLOAD, CHUNK, 0)

    def behave(endpoint: str, call: int, targets: list[int], sources: list[int], sizes: list[int]) -> int:
        if call == number:
            header, payload = (sources[4], sources[5]) if number == 1 else (sources[2], None)
            ctypes.memmove(header, slot.writing(b"w" * 16).pack(), HEADER_BYTES)
            if payload:
                ctypes.memset(payload, 0xEE, PAYLOAD // 2)
        return copy(targets, sources, sizes)

    world.behave = behave
    load = world.load(tokens)
    assert load.flags() == [True, True, False, False]
    assert not load.paged.read(list(range(2 * CHUNK, 3 * CHUNK))).any(), "a chunk that failed must not be moved on"
    assert world.counter("remote_stale") == 1
    assert world.pool.broken([world.chunks(tokens)[2].digest])


def test_a_read_that_brings_nothing_is_a_miss(make: Callable[..., World]) -> None:
    """The buffer still holds the very same slot from the time before."""
    world = make(limit=2)
    tokens = world.stored(1)
    assert world.load(tokens).flags() == [True]
    world.behave = lambda endpoint, call, targets, sources, sizes: 0
    assert world.load(tokens).flags() == [False]
    world.behave = lambda endpoint, call, targets, sources, sizes: (
        copy(targets[:1], sources[:1], sizes[:1]) if len(set(sizes)) > 1 else 0
    )
    assert world.load(tokens).flags() == [False], "without the second header"
    assert world.counter("remote_stale") == 2


@pytest.mark.parametrize("failing", [1, 2])
def test_buffers_of_a_failed_read_are_never_used_again(make: Callable[..., World], failing: int) -> None:
    world = make(limit=2)
    tokens = world.stored(1)
    world.behave = lambda endpoint, call, targets, sources, sizes: -1 if call == failing else copy(targets, sources, sizes)
    assert world.load(tokens).flags() == [False]
    assert world.counter("remote_errors") == 1
    (engine,) = world.engines
    (buffer,) = engine.retired
    assert buffer.address not in engine.registered  # type: ignore[attr-defined]
    with open("/dev/zero", "rb") as late, pytest.raises(OSError, match="Bad address"):
        os.readv(late.fileno(), [buffer.view])  # type: ignore[attr-defined]
    world.behave = None
    assert world.load(tokens).flags() == [True]
    assert all(buffer.address not in targets for _, targets, _ in engine.calls[failing:])  # type: ignore[attr-defined]


def test_a_read_beyond_its_deadline_is_left_behind(make: Callable[..., World]) -> None:
    world = make(deadline=0.3)
    tokens = world.stored(4)
    assert world.load(tokens).flags() == [True] * 4
    stuck = threading.Event()

    world.behave = lambda *call: hang(stuck)
    began = time.monotonic()
    assert world.load(tokens).flags() == [False] * 4
    assert 0.3 <= time.monotonic() - began < 1.5
    began = time.monotonic()
    assert world.load(tokens).flags() == [False] * 4
    assert time.monotonic() - began < 0.2, "bypassed"
    assert world.counter("remote_bypassed") == 4
    world.behave = None
    stuck.set()
    eventually(lambda: world.load(tokens).flags() == [True] * 4, 10, what="it recovers by itself")


def test_after_failures_one_header_at_a_time_is_tried(make: Callable[..., World]) -> None:
    world = make()
    tokens = world.stored(2)
    world.behave = lambda *call: -1
    for _ in range(2):
        assert world.load(tokens).flags() == [False] * 2
    (engine,) = world.engines
    count = len(engine.calls)
    eventually(lambda: not any(world.load(tokens).flags()) and len(engine.calls) >= count + 2, 10, what="probes")
    assert {tuple(sizes) for _, _, sizes in engine.calls[count:]} == {(HEADER_BYTES,)}
    assert world.counter("remote_errors") == 2
    assert len(engine.retired) == 2 * 2, "probes cost no buffers"
    world.behave = None
    eventually(lambda: world.load(tokens).flags() == [True] * 2, 10, what="it recovers by itself")


def test_one_dead_lender_does_not_hold_up_another(make: Callable[..., World]) -> None:
    world = make(lenders=2, deadline=0.4)
    tokens = world.stored(4)
    owners = [location.segment for location in world.pool.acquire([c.digest for c in world.chunks(tokens)]).locations]
    assert len(set(owners)) == 2, "placed on both"
    stuck = threading.Event()
    world.behave = lambda endpoint, call, *rest: hang(stuck) if endpoint == "fake:1" else copy(*rest)
    try:
        first = next(i for i, owner in enumerate(owners) if owner == world.segments.segments()[1].number)
        assert world.load(tokens).flags()[: first + 1] == [True] * first + [False]
        began = time.monotonic()
        assert world.load(tokens).flags()[:first] == [True] * first
        assert time.monotonic() - began < 0.3
    finally:
        stuck.set()


def test_mapped_and_remote_slots_of_one_lease(make: Callable[..., World]) -> None:
    world = make(lenders=2)
    world.show(1, host=HERE)
    tokens = world.stored(9)
    assert world.load(tokens).flags() == [True] * 9
    rows = world.metrics.snapshot()["operations"]["retrieve"]
    assert set(rows) == {"remote", "dram"}
    assert rows["remote"]["bytes"] + rows["dram"]["bytes"] == 9 * PAYLOAD
    (engine,) = world.engines
    assert {endpoint for endpoint, _, _ in engine.calls} == {"fake:0"}, "slots of the same host are mapped"


def test_flags_keep_their_order(make: Callable[..., World]) -> None:
    world = make(lenders=2)
    world.show(1, host=HERE)
    tokens = world.stored(9)
    lease = world.pool.acquire([chunk.digest for chunk in world.chunks(tokens)])
    remote = [world.segments.remote(location) is not None for location in lease.locations]
    assert len(set(remote)) == 2
    world.behave = lambda *call: -1
    assert world.load(tokens).flags() == [not there for there in remote]


def test_a_skipped_head_and_a_partial_tail(make: Callable[..., World]) -> None:
    world = make()
    tokens = world.stored(3)[: 2 * CHUNK + 5]
    world.store(tokens)
    keys, skip, rows = world.engine.chunk_keys(tokens), 4, len(tokens) - 4
    chunks = [
        Chunk(keys[0].digest, 0, CHUNK, 0, skip),
        Chunk(keys[1].digest, 1, CHUNK, CHUNK - skip),
        Chunk(keys[2].digest, 2, 5, 2 * CHUNK - skip),
    ]
    load = world.load_chunks(chunks, rows)
    assert load.transfer.result() == [True] * 3
    got = load.paged.read(list(range(rows)))
    assert np.array_equal(got, content(SPEC, tokens)[skip:])
    assert world.metrics.snapshot()["counters"]["retrieve_tokens"] == rows


def test_the_first_slot_that_nothing_reaches_ends_it(make: Callable[..., World]) -> None:
    world = make(lenders=2)
    world.show(1, host=HERE)
    tokens = world.stored(9)
    lease = world.pool.acquire([chunk.digest for chunk in world.chunks(tokens)])
    remote = [world.segments.remote(location) is not None for location in lease.locations]
    world.show(0, endpoint="")  # exported by nobody
    first = remote.index(True)
    assert world.load(tokens).flags() == [True] * first + [False] * (9 - first)
    assert world.counter("unreachable") == 1
    assert not world.engines


def test_nothing_is_ever_written_to_another_host(make: Callable[..., World]) -> None:
    world = make()
    assert world.segments.unreachable() == [world.segments.segments()[0].number]


def test_engines_are_used_again_but_never_for_an_endpoint_they_know(make: Callable[..., World]) -> None:
    world = make()
    tokens = world.stored(1)
    (info,) = world.segments.segments()
    assert world.load(tokens).flags() == [True]
    for uuid, endpoint, engines in (
        (b"2" * 16, "fake:9", 1),
        (b"3" * 16, "fake:9", 2),
        (b"4" * 16, "fake:8", 2),
        (b"2" * 16, "fake:9", 2),
    ):
        world.segments.forget(info.number)
        world.segments.update(msgspec.structs.replace(info, uuid=uuid, endpoint=endpoint))
        assert world.load(tokens).flags() == [True]
        assert len(world.engines) == engines


def test_closing_does_not_wait_for_a_stuck_read(make: Callable[..., World]) -> None:
    world = make(deadline=20.0)
    tokens = world.stored(1)
    stuck = threading.Event()
    world.behave = lambda *call: hang(stuck)
    load = world.load(tokens)
    began = time.monotonic()
    world.remote.close(0.3)
    assert time.monotonic() - began < 2
    stuck.set()
    assert load.flags() == [False]
    assert world.load(tokens).flags() == [False]


def test_an_engine_that_cannot_be_made_is_a_miss(make: Callable[..., World]) -> None:
    world = make()
    tokens = world.stored(2)

    def refuse(endpoint: str) -> FakeEngine:
        raise SegmentError("no engine")

    world.remote._lenders._make_engine = refuse
    assert world.load(tokens).flags() == [False] * 2
    assert world.counter("remote_errors") == 1


@pytest.mark.parametrize("name", ["vcache-remote", "vcache-remote-call"])
def test_no_thread_to_be_had_is_a_miss(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    world = make(limit=2)
    tokens = world.stored(2)
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert world.load(tokens).flags() == [False] * 2
        assert world.counter("remote_errors") == 1
    assert world.load(tokens).flags() == [True] * 2


class Slow(Transfer):
    """Breaks, or goes on until it is told that it is over."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.over = threading.Event()

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        if self.error is not None:
            raise self.error
        return self.over.wait(timeout)

    def verified(self) -> list[bool]:
        return [True]


def test_a_broken_part_does_not_end_the_wait_for_the_others() -> None:
    """Or rows would be written after the caller was told that the load is over."""
    remote = Slow()
    joined = JoinedTransfer([(Slow(RuntimeError("broken")), [0])], (remote, [1]))
    assert not joined.wait(0.05)
    remote.over.set()
    with pytest.raises(RuntimeError, match="broken"):
        joined.wait()


@pytest.mark.parametrize("call", ["read", "register"])
def test_whatever_a_transfer_engine_raises_is_a_miss(make: Callable[..., World], call: str) -> None:
    """Only some kinds of exceptions were foreseen: after a ValueError of the binding, buffers stayed out for ever and the
    pool could not be closed."""
    world = make(limit=2, deadline=1.0)
    tokens = world.stored(2)
    assert world.load(tokens).flags() == [True] * 2
    (engine,) = world.engines

    def fail(*arguments: Any) -> int:
        raise ValueError("not foreseen")

    works = engine.register
    if call == "read":
        world.behave = fail
    else:
        engine.register = fail  # type: ignore[method-assign]
    for _ in range(2):
        assert world.load(tokens).flags() == [False] * 2
    assert world.counter("remote_errors") == 2
    world.behave, engine.register = None, works  # type: ignore[method-assign]
    eventually(lambda: world.load(tokens).flags() == [True] * 2, 10, what="it recovers by itself")
