"""Master and owners of the memory die or stop during traffic: bounded calls, pool hits, and recovery without any help."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import eventually
from support.paged import spec_for
from support.stored import DEADLINE, LAYOUT, check, counters, engine_on, put, tokens_of

from vcache import KVCacheSpec, VCacheEngine

if TYPE_CHECKING:
    from conftest import Store

pytestmark = pytest.mark.processes
CALL = 1.2 * DEADLINE + 1.5
"""No call takes longer: a look-up and a get that run into their deadlines, and what a busy machine adds."""


class Traffic:
    """Stores and retrieves in a thread of its own, for as long as the block lasts."""

    def __init__(self, engine: VCacheEngine, spec: KVCacheSpec) -> None:
        self._engine, self._spec = engine, spec
        self._stop = threading.Event()
        self.slowest = 0.0
        self.turns = 0
        self.failures: list[BaseException] = []

    def run(self) -> None:
        try:
            while not self._stop.wait(0.01):
                self.turns += 1
                self._timed(put, tokens_of(100 + self.turns % 5, 32))
                self._timed(check, tokens_of(self.turns % 4))
        except BaseException as error:
            self.failures.append(error)
            raise

    def _timed(self, call: Any, tokens: list[int]) -> None:
        began = time.monotonic()
        call(self._engine, self._spec, tokens)
        self.slowest = max(self.slowest, time.monotonic() - began)

    def end(self) -> None:
        self._stop.set()


@contextmanager
def traffic(engine: VCacheEngine, spec: KVCacheSpec) -> Iterator[Traffic]:
    """Checks at the end that no call failed, gave wrong bytes or outlasted its deadline, and that all were counted."""
    made = Traffic(engine, spec)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield made
    finally:
        made.end()
        thread.join(30)
    assert not thread.is_alive()
    assert not made.failures
    assert made.slowest < CALL
    found = counters(engine)
    assert found["lookups"] == found["hits"] + found["misses"] + found["errors"]


def pool_hits_go_on(engine: VCacheEngine, spec: KVCacheSpec, running: Traffic) -> None:
    """The other thread's calls go on, and so do hits of the pool."""
    hot = tokens_of(3, 16)
    turns = running.turns
    eventually(lambda: running.turns > turns + 20, 30, what="traffic goes on")
    for _ in range(5):
        began = time.monotonic()
        put(engine, spec, hot)
        assert check(engine, spec, hot) == 16
        assert time.monotonic() - began < 1.0, "a pool hit waited for storage"


def written_again(engine: VCacheEngine, spec: KVCacheSpec, seeds: Iterator[int]) -> None:
    written = counters(engine)["storage_written"]

    def reached() -> bool:
        put(engine, spec, tokens_of(next(seeds), 16))  # new chunks: those in the pool are not written again
        return counters(engine)["storage_written"] > written

    eventually(reached, 40, what="writes reach the store by themselves")


def fill(engine: VCacheEngine, spec: KVCacheSpec) -> None:
    for seed in range(4):
        put(engine, spec, tokens_of(seed))
        assert engine.flush(20)


def test_master_and_owner_are_killed_during_traffic(store: Store) -> None:
    store.start_master()
    store.lend()
    spec, seeds = spec_for(LAYOUT), itertools.count(200)
    with engine_on(store.options, spec) as engine:
        fill(engine, spec)
        assert check(engine, spec, tokens_of(0)) == 64
        with traffic(engine, spec) as running:
            store.kill_master()
            store.donors[0].signal(signal.SIGKILL)
            eventually(
                lambda: engine.lookup(tokens_of(7777)) == 0 and counters(engine)["storage_errors"], what="errors are counted"
            )
            errors = counters(engine)["storage_errors"]
            eventually(lambda: counters(engine)["storage_errors"] > errors + 20, what="calls fail at once while it is away")
            pool_hits_go_on(engine, spec, running)
            store.start_master()
            store.lend()
            written_again(engine, spec, seeds)
        engine.cache.check_integrity()


def test_an_owner_is_killed_during_traffic(store: Store) -> None:
    store.start_master()
    store.lend()
    store.lend()
    spec, seeds = spec_for(LAYOUT), itertools.count(300)
    with engine_on(store.options, spec) as engine:
        fill(engine, spec)
        with traffic(engine, spec) as running:
            store.donors[0].signal(signal.SIGKILL)
            pool_hits_go_on(engine, spec, running)
            written_again(engine, spec, seeds)


def test_the_master_hangs_during_traffic(store: Store) -> None:
    master = store.start_master()
    store.lend()
    spec, seeds = spec_for(LAYOUT), itertools.count(400)
    with engine_on(store.options, spec) as engine:
        fill(engine, spec)
        with traffic(engine, spec) as running:
            assert master.pid is not None
            os.kill(master.pid, signal.SIGSTOP)
            try:
                errors = counters(engine)["storage_errors"]
                eventually(lambda: counters(engine)["storage_errors"] > errors + 5, 30, what="it is bypassed")
                pool_hits_go_on(engine, spec, running)
            finally:
                os.kill(master.pid, signal.SIGCONT)
            # The lender, too, was silent for longer than `client_ttl`, and mounts again.
            written_again(engine, spec, seeds)
