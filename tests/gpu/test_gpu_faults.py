"""What must hold when the pool is full, when processes die, and when memory goes back to its owner."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from gpu_pool import MIB, SPEC, Place, Pool, wait_until

from vcache.bench.pool_worker import PoolEngine
from vcache.errors import VCacheError
from vcache.manager.client import Manager

pytestmark = [pytest.mark.gpu, pytest.mark.processes, pytest.mark.slow]

Record = Callable[..., None]
FreeMemory = Callable[[], int]


def big(place: Place) -> Any:
    """A shape whose transfers take long enough to be hit in the middle: 32 MiB a chunk (on CPU 1 MiB)."""
    return msgspec.structs.replace(SPEC, model="big", num_layers=64 if place.on_gpu else 2)


def prompt_length(place: Place) -> int:
    """Tokens: 256 MiB of KV (on CPU 2 MiB)."""
    return 2048 if place.on_gpu else 512


FIRST = 100_000
"""Prompt with which `store_forever` begins; all of its prompts carry this one's KV."""


def unfinished(api: Manager) -> int:
    """Slots that wait for their writer's end."""
    return sum(each.slots_processing + each.slots_quarantined for each in api.stats().segments)


def test_concurrent_pairs_while_the_pool_evicts(pool: Pool, record: Record) -> None:
    """200 pairs of store and retrieve by two processes with four threads each, over a pool that holds a tenth of them."""
    spec = msgspec.structs.replace(SPEC, model="pairs")
    with pool.api() as api, pool.lender(64 * MIB, 16 * MIB), pool.worker(spec, name="one") as one, pool.worker(spec) as two:
        for worker in (one, two):
            worker.ready()
        begun = [
            worker.begin(PoolEngine.pairs, first=1000 * (number + 1), count=100, tokens=512, threads=4)
            for number, worker in enumerate((one, two))
        ]
        found = [pairs.result() for pairs in begun]
        counters = api.stats().counters
        engines = [worker.call(PoolEngine.counters) for worker in (one, two)]
    evicted = sum(count for name, count in counters.items() if "evict" in name)
    record(pairs=[each._asdict() for each in found], evicted=evicted, stale_reads=sum(each["stale_reads"] for each in engines))
    assert sum(each.wrong for each in found) == 0
    assert all(each.complete >= 50 for each in found), "hardly anything was found again"
    assert evicted > 100, f"the pool was to be too small: {counters}"


def test_lender_killed_while_others_read_and_write(pool: Pool, place: Place, record: Record, free_memory: FreeMemory) -> None:
    spec = big(place)
    tokens = prompt_length(place)
    nbytes = 4096 * MIB if place.on_gpu else 64 * MIB
    with pool.worker(spec, blocks=256, name="reader") as reader, pool.worker(spec, blocks=256, name="writer") as writer:
        for worker in (reader, writer):
            worker.ready()
        before = free_memory()
        # The block ends the lender once more on leaving, which does no harm.
        with pool.lender(nbytes, nbytes // 8) as lender:
            for prompt in range(3):
                writer.call(PoolEngine.store, prompt=prompt, tokens=tokens)
            reader.call(PoolEngine.retrieve, prompt=0, tokens=tokens)
            reading = reader.begin(PoolEngine.read_for, prompts=[0, 1, 2], tokens=tokens, seconds=3.0)
            time.sleep(0.5)  # the length of the reader's load alone: the writer will soon evict what it reads
            writer.begin(PoolEngine.store_forever, first=FIRST, tokens=tokens)
            time.sleep(0.5)  # the length of the load of both
            loaded = free_memory()
            os.kill(lender.pid, signal.SIGKILL)
            killed = time.perf_counter()
            lender.wait()
            returned = None
            if place.on_gpu:
                # More than the lender's own context can account for: both importers have unmapped. The writer goes on.
                wait_until(
                    lambda: free_memory() >= loaded + nbytes, 20, f"{nbytes >> 20} MiB more are free than {loaded >> 20}"
                )
                returned = round(time.perf_counter() - killed, 3)
            found = reading.result()
            writer.kill()
            assert reader.call(PoolEngine.retrieve, prompt=0, tokens=tokens).loaded == 0
    free = {"before": before >> 20, "under_load": loaded >> 20, "after": free_memory() >> 20}
    record(reads=found._asdict(), free_MiB=free, lent_MiB=nbytes >> 20, seconds_until_free=returned)
    assert found.wrong == 0
    assert found.loaded > 0 or not place.on_gpu, "the reader read nothing before the lender died"
    assert found.longest < 5, "a retrieve hung"


@pytest.mark.parametrize("delay", [0.05, 0.17, 0.31, 0.83])
def test_writer_killed_in_the_middle(pool: Pool, place: Place, record: Record, free_memory: FreeMemory, delay: float) -> None:
    spec = big(place)
    tokens = prompt_length(place)
    prompt_bytes = spec.payload_bytes(tokens)
    # Room for three prompts: the victim is always evicting its own.
    with pool.lender(3 * prompt_bytes, prompt_bytes // 2), pool.worker(spec, blocks=256, name="reader") as reader:
        reader.ready()
        before = free_memory()
        with pool.worker(spec, blocks=256, name="victim") as victim:
            victim.call(PoolEngine.store, prompt=1, tokens=tokens)
            with pool.api() as api:
                start = api.stats().counters
                victim.begin(PoolEngine.store_forever, first=FIRST, tokens=tokens)
                wait_until(lambda: api.stats().counters["stored"] > start["stored"], 20, "the victim is storing")
                time.sleep(delay)  # where in its work it is hit, not a synchronisation
                victim.kill()
                end = api.stats().counters
        if place.on_gpu:
            wait_until(lambda: free_memory() > before - 128 * MIB, 20, "the writer's own memory is free again")
        # Whatever the victim left: either right, or a miss.
        last = FIRST + (end["puts"] - start["puts"]) // (tokens // 256)
        seen = [reader.call(PoolEngine.retrieve, prompt=1, tokens=tokens)]
        for prompt in range(max(FIRST, last - 12), last + 4):
            seen.append(reader.call(PoolEngine.retrieve, prompt=prompt, tokens=tokens, seed=prompt, content=FIRST))
        with pool.api() as api:
            interrupted = api.stats().counters["quarantines"] - start["quarantines"]
        counters = {name: count for name, count in reader.call(PoolEngine.counters).items() if count}
        # Its slots come back: everything can be stored and found by somebody else.
        with pool.worker(spec, blocks=256, name="heir") as heir:
            for prompt in range(200, 206):
                heir.call(PoolEngine.store, prompt=prompt, tokens=tokens)

            with pool.api() as api:
                released = wait_until(lambda: unfinished(api) == 0, 15, "the dead writer's slots are released")
            heir.call(PoolEngine.store, prompt=300, tokens=tokens)
            found = reader.call(PoolEngine.retrieve, prompt=300, tokens=tokens)
    record(
        delay=delay,
        prompts_stored=last - FIRST,
        interrupted_slots=interrupted,
        reader=counters,
        loaded_of_victim=sum(each.loaded for each in seen),
        slots_released_after_s=round(released, 3),
        free_MiB={"before": before >> 20, "after": free_memory() >> 20},
    )
    assert sum(each.wrong for each in seen) == 0
    assert sum(each.loaded for each in seen) > 0
    assert max(each.seconds for each in seen) < 5, "a retrieve hung"
    assert (found.loaded, found.wrong) == (tokens, 0)


def test_growth_and_return_under_load(pool: Pool, place: Place, record: Record, free_memory: FreeMemory) -> None:
    """4 GiB (on CPU 256 MiB) are lent in addition and given back while a reader is active."""
    spec = big(place)
    tokens = prompt_length(place)
    unit = 256 * MIB if place.on_gpu else 4 * MIB
    small, large = 2 * unit, 2 * unit + (4096 * MIB if place.on_gpu else 64 * MIB)
    with pool.api() as api, pool.lender(small, unit), pool.worker(spec, blocks=256) as reader, pool.worker(spec) as writer:
        for worker in (reader, writer):
            worker.ready()
        segment = next(info for info in api.segments() if info.nbytes >= small)
        writer.call(PoolEngine.store, prompt=90, tokens=tokens)
        reader.call(PoolEngine.retrieve, prompt=90, tokens=tokens)

        def free_now() -> int:
            """Pages of host memory are free before and after, so there the segment's size must do."""
            return free_memory() if place.on_gpu else -sum(info.nbytes for info in api.segments())

        base = free_now()

        def resize(nbytes: int, done: Callable[[int], bool], what: str) -> float:
            start = time.perf_counter()
            api.request_resize(segment.uuid, nbytes)
            wait_until(lambda: done(free_now()), 20, what)
            return round((time.perf_counter() - start) * 1e3, 2)

        measured = []
        for round_number in range(3):
            grown = resize(large, lambda free: free < base - (large - small) * 9 // 10, "grown")
            prompts = range(100 * round_number, 100 * round_number + 8)
            for prompt in prompts:
                writer.call(PoolEngine.store, prompt=prompt, tokens=tokens)
            there = reader.call(PoolEngine.retrieve, prompt=prompts[-1], tokens=tokens)
            assert (there.loaded, there.wrong) == (tokens, 0)
            reading = reader.begin(PoolEngine.read_for, prompts=list(prompts), tokens=tokens, seconds=1.5)
            time.sleep(0.5)  # the reader is in full swing: the length of the load, not a synchronisation
            returned = resize(small, lambda free: free > base - (large - small) // 16, "the memory is back")
            found = reading.result()
            measured.append({"grown_ms": grown, "returned_ms": returned, **found._asdict()})
            assert found.wrong == 0
            assert found.longest < 5, "a retrieve hung"
        free = {"base": base >> 20, "after": free_now() >> 20}
    record(bytes_MiB=(large - small) >> 20, rounds=measured, free_MiB=free)


def test_a_stopped_reader_does_not_stop_the_owner(pool: Pool, place: Place, record: Record) -> None:
    """Memory that a stopped process still maps comes back when it goes on or dies; the lender does not wait for it for ever."""
    spec, tokens = big(place), prompt_length(place)
    unit = 128 * MIB if place.on_gpu else 4 * MIB
    with pool.api() as api, pool.lender(4 * unit, unit), pool.worker(spec, blocks=256) as reader, pool.worker(spec) as writer:
        writer.call(PoolEngine.store, prompt=1, tokens=tokens)
        reader.call(PoolEngine.retrieve, prompt=1, tokens=tokens)
        segment = api.segments()[0]
        os.kill(reader.pid, signal.SIGSTOP)
        try:
            start = time.perf_counter()
            api.request_resize(segment.uuid, unit)
            shrunk = lambda: sum(info.nbytes for info in api.segments()) < 2 * unit  # noqa: E731
            wait_until(shrunk, 20, "the lender has taken its slabs back")
            seconds = time.perf_counter() - start
            stored = writer.call(PoolEngine.store, prompt=2, tokens=256)
        finally:
            os.kill(reader.pid, signal.SIGCONT)
        found = reader.call(PoolEngine.retrieve, prompt=2, tokens=256)
        with contextlib.suppress(VCacheError):
            reader.call(PoolEngine.retrieve, prompt=1, tokens=tokens)
    record(seconds=round(seconds, 3), store_meanwhile_s=stored)
    assert found.wrong == 0
