"""Deadline and breaker: nobody waits for a tier that hangs, and nobody waits for the probe that finds it well again."""

from __future__ import annotations

import threading
import time

import pytest
from support.cluster import eventually

from vcache.errors import StorageDeadlineError, StorageError
from vcache.keys import CacheKey
from vcache.storage.guarded import GuardedStorage
from vcache.storage.memory import MemoryStorage

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
