"""A load that nobody waits for: what is on its way when it was started, and what is left to whoever asks for its result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache.tiers import Loading
from vcache.keys import Chunk
from vcache.paged.mover import Mover, Rows, Target, Transfer
from vcache.segment.slots import SlotLocation

CHUNK, LAYOUT = 16, "2BNHD"
SPEC = spec_for(LAYOUT)
TOKENS = list(range(3 * CHUNK))


class UnderWay(Transfer):
    """A transfer that has landed when the test says so."""

    def __init__(self, transfer: Transfer, landed: threading.Event) -> None:
        self._transfer = transfer
        self._landed = landed

    def done(self) -> bool:
        return self._landed.is_set() and self._transfer.done()

    def wait(self, timeout: float | None = None) -> bool:
        return self._landed.wait(timeout) and self._transfer.wait(timeout)

    def verified(self) -> list[bool]:
        return self._transfer.verified()


class Beside(Mover):
    """Copies beside the caller, as on a GPU."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self.landed = threading.Event()
        self.loads = 0

    def reaches(self, slab: Any) -> bool:
        return self._mover.reaches(slab)

    def store(self, *arguments: Any) -> Transfer:
        return self._mover.store(*arguments)

    def load(self, *arguments: Any) -> Transfer:
        self.loads += 1
        return UnderWay(self._mover.load(*arguments), self.landed)


class Named(NamedTuple):
    """Chunks that have names, in runs of some of them."""

    chunks: list[Chunk]
    run: int = 0

    @property
    def length(self) -> int:
        return len(self.chunks)

    def runs(self, begin: int, head: int) -> list[list[Chunk]]:
        rest = self.chunks[begin:]
        size = self.run or len(rest)
        return [rest[at : at + size] for at in range(0, len(rest), size)]

    def parent(self, index: int) -> bytes:
        return b""


class World:
    def __init__(self, **sections: Any) -> None:
        config = VCacheConfig.from_env(
            {}, segment={"kind": "host", "size": "1MiB", "slab_size": "256KiB"}, cache={"chunk_size": CHUNK}, **sections
        )
        self.engine = VCacheEngine(config, SPEC, device="cpu")
        self.tiers = self.engine.cache.tiers
        self.segments = self.engine.cache.segments
        self.chunks = [Chunk(bytes([9, index]) + bytes(14), index, CHUNK, index * CHUNK) for index in range(3)]
        self.paged = Paged.zeros(SPEC, LAYOUT, 8, 8)
        target = self.engine.bind(self.paged.tensors)
        self.mover = Beside(target.mover)
        self.rows = Rows(Target(target.cache, self.mover), torch.tensor(TOKENS))
        source = Paged.zeros(SPEC, LAYOUT, 8, 8)
        source.write(TOKENS, content(SPEC, TOKENS))
        self.source = Rows(self.engine.bind(source.tensors), torch.tensor(TOKENS))

    def store(self, *places: int) -> None:
        for place in places:
            self.tiers.save([self.chunks[place]], b"", self.source).finish()

    def start(self, run: int = 0, within: float | None = 1.0) -> Loading:
        return self.tiers.start_load(Named(self.chunks, run), self.rows, within)

    def check(self, chunks: int) -> None:
        """The first `chunks` chunks are in the paged cache, and nothing else."""
        got, expected = self.paged.read(TOKENS), content(SPEC, TOKENS)
        assert np.array_equal(got[: chunks * CHUNK], expected[: chunks * CHUNK])
        assert not got[chunks * CHUNK :].any()


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def build(**sections: Any) -> World:
        made.append(World(**sections))
        return made[-1]

    yield build
    for world in made:
        world.mover.landed.set()
        world.engine.close()


def test_it_is_on_its_way_when_it_was_started_and_done_when_it_has_landed(make: Callable[..., World]) -> None:
    world = make()
    world.store(0, 1)
    loading = world.start()
    assert (world.mover.loads, loading.done()) == (1, False)
    world.mover.landed.set()
    assert (loading.done(), loading.has_rest()) == (True, False)
    assert loading.result() == (2, False)
    world.check(2)


def test_what_storage_has_is_left_to_the_result(make: Callable[..., World]) -> None:
    world = make(storage={"kind": "memory"})
    world.store(0)
    storage = world.tiers.storage
    assert storage is not None
    storage.save_now(world.chunks[1:2], world.source)
    assert storage.flush(20)
    loading = world.start()
    assert not loading.done()
    world.mover.landed.set()
    assert (loading.done(), loading.has_rest(), world.mover.loads) == (True, True, 1)
    assert loading.result().found == 2
    world.check(2)


def test_nothing_is_left_where_all_of_it_has_landed_or_storage_was_left(make: Callable[..., World]) -> None:
    world = make(storage={"kind": "memory"})
    world.mover.landed.set()
    world.store(0, 1)
    assert world.start().has_rest()
    world.store(2)
    assert not world.start().has_rest()
    world.engine.manager.remove([world.chunks[0].digest])
    world.tiers.leave_storage()
    assert not world.start().has_rest()
    assert not world.tiers.start_load(Named([]), world.rows).has_rest()


def test_what_means_to_wait_for_a_lender_is_left_to_the_result(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lender that is stopped would stop whoever starts the load, for a second."""
    world = make()
    world.store(0, 1, 2)
    asked: list[int] = []

    def would_wait(locations: Sequence[SlotLocation]) -> bool:
        asked.append(len(locations))
        return len(asked) == 2

    monkeypatch.setattr(world.segments, "would_wait", would_wait)
    loading = world.start(run=1)
    assert (asked, world.mover.loads, loading.has_rest()) == ([1, 1], 1, True), "what follows is left as well"
    del asked[:]
    world.mover.loads = 0
    monkeypatch.setattr(world.segments, "would_wait", lambda locations: True)
    held = world.start()
    assert (world.mover.loads, held.done(), held.has_rest()) == (0, True, True)
    world.mover.landed.set()
    assert held.result().found == loading.result().found == 3
    assert world.mover.loads == 1 + 2
    world.check(3)
    assert world.start(within=None).done()
    assert world.mover.loads == 4, "who waits anyway does not ask"


def test_a_slab_that_is_mapped_means_no_wait_and_a_segment_that_is_not_known_does(make: Callable[..., World]) -> None:
    world = make()
    world.store(0)
    lease = world.engine.pool.acquire([world.chunks[0].digest])
    assert not world.segments.would_wait(lease.locations)
    assert world.segments.would_wait([lease.locations[0]._replace(segment=77)])
    world.engine.pool.release(lease.id)


def test_a_start_that_breaks_is_told_when_what_was_started_before_has_landed(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    world.store(0, 1)
    load, calls = world.engine.pool.load, 0

    def breaks(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise TypeError("a mistake")
        return load(*arguments)

    monkeypatch.setattr(world.engine.pool, "load", breaks)
    loading = world.start(run=1)
    assert not loading.done()
    world.mover.landed.set()
    assert loading.done()
    with pytest.raises(TypeError, match="a mistake"):
        loading.result()
    world.segments.check_integrity()


def test_the_question_to_the_manager_may_take_as_long_as_it_says(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    world.store(0)
    call, given = world.engine.manager.transport.call, list[float | None]()

    def listen(verb: Any, late: Any = None, within: float | None = None) -> Any:
        given.append(within)
        return call(verb, late, within)

    monkeypatch.setattr(world.engine.manager.transport, "call", listen)
    world.start(within=0.25)
    assert given == [0.25]
