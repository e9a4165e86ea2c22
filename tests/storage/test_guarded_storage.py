"""Deadline and breaker: nobody waits for a tier that hangs, and nobody waits for the probe that finds it well again."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from support.cluster import eventually

from vcache.errors import StorageDeadlineError, StorageError
from vcache.keys import CacheKey
from vcache.storage.guarded import GuardedStorage
from vcache.storage.memory import MemoryStorage

BUFFER = memoryview(bytearray(4096))

KEY = CacheKey(b"n" * 16, b"k" * 16)


class Hanging(MemoryStorage):
    """Calls block while `gate` is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.calls = 0

    def prefix(self, keys: object, shard: int) -> int:
        self.calls += 1
        self.gate.wait(20)
        return super().prefix(keys, shard)  # type: ignore[arg-type]

    def close(self) -> None:
        self.gate.wait(20)


def test_a_hanging_tier_costs_one_deadline_and_comes_back_by_itself() -> None:
    tier = Hanging()
    guarded = GuardedStorage(tier, 1.0)
    began = time.monotonic()
    with pytest.raises(StorageDeadlineError) as caught:
        guarded.prefix([KEY], 0)
    assert 0.15 < time.monotonic() - began < 0.9, "a look-up gets a fifth of the deadline"
    over = threading.Event()
    caught.value.when_over(over.set)
    assert not over.is_set()

    def answered() -> bool:
        start = time.monotonic()
        try:
            guarded.prefix([KEY], 0)
            return True
        except StorageError:
            assert time.monotonic() - start < 0.15, "a caller waited although the breaker is open"
            return False

    assert not answered()
    eventually(lambda: not answered() and tier.calls == 2, what="a probe in the background")
    tier.gate.set()
    assert over.wait(5)
    eventually(answered, what="answers again")
    guarded.close()
    with pytest.raises(StorageError, match="closed"):
        guarded.prefix([KEY], 0)


def test_close_is_bounded() -> None:
    guarded = GuardedStorage(Hanging(), 0.2)
    began = time.monotonic()
    guarded.close()
    guarded.close()
    assert time.monotonic() - began < 2


class Owners(MemoryStorage):
    """Answers look-ups at once; reads block while `gate` is closed, as when those who hold the values are stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.asked: list[CacheKey] = []
        self.registered: list[memoryview] = []

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        self.asked += keys
        self.gate.wait(20)
        return super().get(keys, shard, buffers)

    def register(self, buffer: memoryview) -> None:
        self.registered.append(buffer)

    def unregister(self, buffer: memoryview) -> None:
        self.registered.remove(buffer)


def test_a_tier_whose_directory_answers_and_whose_owners_hang_stays_bypassed() -> None:
    """The probe only looked up. It found the tier well while every read of it hung, so each round of reads waited again."""
    tier, other = Owners(), CacheKey(b"n" * 16, b"l" * 16)
    guarded = GuardedStorage(tier, 0.2)
    with pytest.raises(StorageDeadlineError):
        guarded.get([KEY, other], 0, [BUFFER, BUFFER])

    def bypassed() -> None:
        with pytest.raises(StorageError, match="bypassed"):
            guarded.prefix([KEY], 0)

    eventually(lambda: bypassed() or len(tier.asked) > 2, what="a probe reads")
    for _ in range(20):
        bypassed()
    tier.gate.set()
    eventually(lambda: guarded.breaker.state == "closed", what="the probe ends")
    assert tier.asked == [KEY, other] * 2
    assert not tier.registered
    assert guarded.get([KEY], 0, [BUFFER]) == [-1]
    guarded.close()


class Raising(MemoryStorage):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def _check_open(self) -> None:
        raise self.error

    def register(self, buffer: memoryview) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("odd"), TimeoutError("odd"), MemoryError("odd"), SystemExit("odd")])
def test_whatever_a_tier_raises_is_a_storage_error(error: BaseException) -> None:
    """A binding's ValueError came out of an engine's look-up, and the breaker did not hear of it."""
    guarded = GuardedStorage(Raising(error), 5.0)
    if isinstance(error, Exception):
        with pytest.raises(StorageError, match="odd"):
            guarded.register(BUFFER)
    for _ in range(2):
        with pytest.raises(StorageError, match="odd") as caught:
            guarded.prefix([KEY], 0)
        assert not isinstance(caught.value, StorageDeadlineError)
    assert guarded.breaker.state == "open"
    with pytest.raises(StorageError, match="bypassed"):
        guarded.put([KEY], 0, [BUFFER])
    guarded.close()
