"""Whatever the storage tier does, an engine neither waits for it nor fails, and what it delivers is what was written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache.buffers import BufferPool
from vcache.errors import ArgumentError, StorageDeadlineError
from vcache.keys import CacheKey
from vcache.storage.memory import MemoryStorage

CHUNK, LAYOUT, BLOCKS, BLOCK_SIZE = 16, "2BNHD", 48, 8
SPEC = spec_for(LAYOUT)
PAYLOAD = SPEC.payload_bytes(CHUNK)


class Tier(MemoryStorage):
    """`before[call]` runs before each call of that name, and may raise or wait."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], None]] = {}
        self.registered: list[int] = []

    def _meet(self, call: str) -> None:
        if call in self.before:
            self.before[call]()

    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        self._meet("prefix")
        return super().prefix(keys, shard)

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        self._meet("get")
        return super().get(keys, shard, buffers)

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        self._meet("put")
        return super().put(keys, shard, values)

    def register(self, buffer: memoryview) -> None:
        self.registered.append(id(buffer))

    def unregister(self, buffer: memoryview) -> None:
        self.registered.remove(id(buffer))

    def change(self, key: CacheKey, change: Callable[[bytes], bytes]) -> None:
        """Replace a value behind everybody's back."""
        with self._lock:
            self._values[key, 0] = change(self._values[key, 0])


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: str = "512KiB", **storage: Any) -> None:
        self.tier = Tier()
        monkeypatch.setattr("vcache.cache.opening.open_storage", lambda config: self.tier)
        config = VCacheConfig.from_env(
            {},
            segment={"kind": "host", "size": size, "slab_size": "64KiB"},
            cache={"chunk_size": CHUNK},
            storage={"kind": "memory", "deadline": 0.2, **storage},
        )
        self.engine = VCacheEngine(config, SPEC, device="cpu")

    def store(self, chunks: int, seed: int = 1) -> list[int]:
        tokens = [seed * 10000 + i for i in range(chunks * CHUNK)]
        paged = Paged.zeros(SPEC, LAYOUT, BLOCKS, BLOCK_SIZE)
        paged.write(list(range(len(tokens))), content(SPEC, tokens))
        self.engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))
        return tokens

    def only_in_storage(self, chunks: int, seed: int = 1) -> list[int]:
        tokens = self.store(chunks, seed)
        assert self.engine.flush(20)
        self.drop(tokens)
        return tokens

    def drop(self, tokens: list[int]) -> None:
        """From the pool."""
        self.engine.manager.remove([key.digest for key in self.engine.chunk_keys(tokens)])

    def retrieve(self, tokens: list[int]) -> int:
        """Tokens delivered; their bytes are right. Fails when the engine waits for ever."""
        paged, found = Paged.zeros(SPEC, LAYOUT, BLOCKS, BLOCK_SIZE), list[int]()

        def run() -> None:
            mask = self.engine.retrieve(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))
            found.append(int(mask.sum()))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(20)
        assert found, "retrieve waits for ever"
        got = paged.read(list(range(len(tokens))))
        assert np.array_equal(got[: found[0]], content(SPEC, tokens)[: found[0]])
        assert not got[found[0] :].any(), "bytes of a miss were delivered"
        return found[0]

    def count(self, name: str) -> int:
        return int(self.engine.get_stats()["counters"].get(name, 0))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def build(**options: Any) -> World:
        made.append(World(monkeypatch, **options))
        return made[-1]

    yield build
    for world in made:
        world.tier.before.clear()
        world.engine.close()


# -- nobody waits ------------------------------------------------------------------------------------------------------


def test_reads_that_never_end_keep_no_later_read_waiting(make: Callable[..., World]) -> None:
    """A get that outlasts its deadline keeps its buffers. When all were out, the next load waited for one without a limit,
    and with it the request of an inference engine."""
    world = make()
    tokens = world.only_in_storage(8)
    over: list[Callable[[], None]] = []

    def late() -> None:
        raise StorageDeadlineError("no answer", over.append)

    world.tier.before["get"] = late
    assert world.retrieve(tokens) == 0
    assert world.count("storage_errors") == 1
    assert world.retrieve(tokens) == 0
    assert world.count("storage_busy") == 1
    world.tier.before.clear()
    over.pop()()
    assert world.retrieve(tokens) == len(tokens)


def test_writes_that_wait_take_no_buffer_from_reads(make: Callable[..., World]) -> None:
    """Chunks that find no room in the pool wait in buffers for the writer. They took all that there were, so that a load
    waited for a write to end."""
    world = make(size="64KiB")
    tokens = world.only_in_storage(4)
    stuck, reached = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        stuck.wait(60)

    world.tier.before["put"] = hang
    leases = [world.engine.pool.acquire([key.digest for key in world.engine.chunk_keys(world.store(3, 2))])]
    assert leases[0].locations, "what is leased leaves no room for the next ones"
    assert reached.wait(20)
    for seed in range(3, 8):
        world.store(20, seed)
    assert world.count("storage_dropped") > 0, "more than buffers hold"
    try:
        assert world.retrieve(tokens) == len(tokens)
    finally:
        stuck.set()
    assert world.engine.flush(20)


def test_a_write_that_never_ends_holds_up_no_flush(make: Callable[..., World]) -> None:
    """The writer waited without a limit for buffers which a put that was left behind still used."""
    world = make()
    over: list[Callable[[], None]] = []

    def late() -> None:
        raise StorageDeadlineError("no answer", over.append)

    world.tier.before["put"] = late
    for seed in range(10):
        world.store(4, seed)
    assert world.engine.flush(20)
    world.tier.before.clear()
    for call in over:
        call()
    tokens = world.only_in_storage(4, 99)
    assert world.retrieve(tokens) == len(tokens)


# -- nothing ends a thread or reaches the engine -----------------------------------------------------------------------


@pytest.mark.parametrize("call", ["prefix", "get", "put"])
def test_whatever_a_tier_raises_is_a_miss(make: Callable[..., World], call: str) -> None:
    """Only some kinds of exceptions were foreseen: a ValueError of a binding ended the writer's thread, after which `flush`
    never returned, or it came out of `retrieve`."""
    world = make()
    tokens = world.only_in_storage(4)

    def fail() -> None:
        raise ValueError("not foreseen")

    world.tier.before[call] = fail
    assert world.engine.lookup(tokens) == (0 if call == "prefix" else len(tokens))
    assert world.retrieve(tokens) == (len(tokens) if call == "put" else 0)
    world.store(4, 2)
    assert world.engine.flush(20), "the writer's thread is gone"
    assert world.count("storage_errors") > 0
    world.tier.before.clear()
    assert world.retrieve(tokens) == len(tokens)
    assert world.retrieve(world.only_in_storage(4, 3)) == 4 * CHUNK


# -- buffers are counted -----------------------------------------------------------------------------------------------


class NoMemory:
    """Pins nothing."""

    def __init__(self) -> None:
        self.failing = False

    def register(self, slab: object) -> int:
        if self.failing:
            raise OSError("cannot allocate memory")
        return 0

    def unregister(self, slab: object) -> None: ...


def pools(pinning: NoMemory) -> list[Any]:
    return [BufferPool(PAYLOAD, 4, registry=MemoryStorage(), pinning=pinning), BufferPool(PAYLOAD, 4, pinning=pinning)]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("count", [0, -3])
def test_no_buffers_cannot_be_taken(kind: int, count: int) -> None:
    """Taking a negative number was allowed and raised the limit for good; taking none waited for a free buffer."""
    pool = pools(NoMemory())[kind]
    with pytest.raises(ArgumentError, match="at least 1"):
        pool.take(count, 0)
    assert len(pool.take(100, 0)) == 4


@pytest.mark.parametrize("kind", [0, 1])
def test_buffers_that_could_not_be_made_are_not_counted_as_out(kind: int) -> None:
    """Only errors of this package were undone: after a few of the system's, the pool was empty for ever."""
    pinning = NoMemory()
    pool = pools(pinning)[kind]
    pool.give(pool.take(2, 0))
    pinning.failing = True
    for _ in range(3):
        with pytest.raises(OSError, match="memory"):
            pool.take(4, 0)
    assert len(pool.take(2, 0)) == 2, "those that are there are used"
    pinning.failing = False
    assert len(pool.take(100, 0)) == 2


def test_a_buffer_that_cannot_be_pinned_is_not_left_registered() -> None:
    tier, pinning = Tier(), NoMemory()
    pool = BufferPool(PAYLOAD, 4, registry=tier, pinning=pinning)
    pinning.failing = True
    with pytest.raises(OSError, match="memory"):
        pool.take(1, 0)
    assert not tier.registered


def test_a_buffer_that_comes_back_after_the_end_is_unregistered() -> None:
    tier = Tier()
    pool = BufferPool(PAYLOAD, 4, registry=tier)
    late = pool.take(1, 0)
    pool.give(pool.take(1, 0))
    pool.close()
    assert len(tier.registered) == 1, "what is out may still be used"
    pool.give(late)
    assert not tier.registered


def test_buffers_do_not_grow_in_number(make: Callable[..., World]) -> None:
    """A writer that got fewer buffers than it had chunks asked for a negative number of them in its second round: more and
    more of them were out at a time. Writes that are left behind make buffers short here."""
    world = make()
    over: list[Callable[[], None]] = []

    def late() -> None:
        if len(over) < 2:
            raise StorageDeadlineError("no answer", over.append)

    world.tier.before["put"] = late
    for seed in range(2):
        world.store(1, seed)
        assert world.engine.flush(20)
    gate = threading.Event()
    world.tier.before["prefix"] = lambda: gate.wait(20) and None
    for seed in range(2, 20):
        world.store(4, seed)
    gate.set()
    assert world.engine.flush(20)
    assert world.count("storage_written") > 20
    for call in over:
        call()
    storage = world.engine.cache.storage
    assert storage is not None
    for pool in storage._buffers:
        assert len(pool.take(100, 0)) == pool.limit


# -- values are what was written ---------------------------------------------------------------------------------------


def flip(position: int) -> Callable[[bytes], bytes]:
    def change(value: bytes) -> bytes:
        damaged = bytearray(value)
        damaged[position] ^= 0x10
        return bytes(damaged)

    return change


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        (flip(64), "storage_damaged"),
        (flip(64 + PAYLOAD // 2), "storage_damaged"),
        (flip(64 + PAYLOAD - 1), "storage_damaged"),
        (flip(64 + PAYLOAD + 8), "storage_damaged"),
        (flip(20), "storage_invalid"),
        (lambda value: value[: 64 + PAYLOAD], "storage_invalid"),  # the format before checksums
        (lambda value: value[: PAYLOAD // 2], "storage_invalid"),
        (lambda value: value + b"more", "storage_invalid"),
        (lambda value: b"", "storage_invalid"),
    ],
)
def test_a_damaged_value_is_a_miss_and_written_again(
    make: Callable[..., World], change: Callable[[bytes], bytes], counter: str
) -> None:
    """Only header and length were verified: a bit that flipped on a disk or in a donor's memory was delivered as KV."""
    world = make()
    tokens = world.only_in_storage(4)
    world.tier.change(world.engine.chunk_keys(tokens)[2], change)
    assert world.retrieve(tokens) == 2 * CHUNK
    found = world.count(counter)
    assert found
    assert world.engine.flush(20)
    assert world.engine.lookup(tokens) == 2 * CHUNK, "it is removed"
    assert world.only_in_storage(4) == tokens
    assert world.retrieve(tokens) == len(tokens)
    assert world.count(counter) == found


def test_an_engine_that_never_writes_leaves_damaged_values_alone(make: Callable[..., World]) -> None:
    world = make()
    tokens = world.only_in_storage(2)
    key = world.engine.chunk_keys(tokens)[0]
    world.tier.change(key, flip(100))
    values = dict(world.tier._values)
    reader = make(write="never")
    reader.tier._values.update(values)
    assert reader.retrieve(tokens) == 0
    assert reader.count("storage_damaged")
    assert reader.engine.flush(20)
    assert reader.tier.prefix([key], 0) == 1


def test_every_way_into_storage_seals_the_value(make: Callable[..., World]) -> None:
    """From the pool, and from the paged cache where the pool has no room."""
    world = make(size="64KiB")
    for seed in range(6):
        tokens = world.store(20, seed)
        assert world.engine.flush(20)
        world.drop(tokens)
        assert world.retrieve(tokens) > 0
    assert world.count("put_no_space") > 0
    assert (world.count("storage_damaged"), world.count("storage_invalid")) == (0, 0)
