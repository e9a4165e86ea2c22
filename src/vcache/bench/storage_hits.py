"""What a storage tier costs hits of the pool: two engines, with and without one, in turns, whatever the store does."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from ..config import ByteSize, VCacheConfig
from ..errors import StorageError, VCacheError
from ..keys import CacheKey
from ..spec import KVCacheSpec
from ..worker import Worker
from .processes import choose_cores, clean_environment, lender_process, manager_process, on_core
from .report import Column, Report, percentile, verdict
from .storage import bench_store, quarters

TARGET = 0.05
_CHUNK = 16
_BLOCK = 16
_CHUNKS = 8
_SPEC = KVCacheSpec(model="bench/storage-hits", dtype="bfloat16", num_layers=16, num_kv_heads=8, head_size=128)
_CHUNK_BYTES = _SPEC.payload_bytes(_CHUNK)
_FLOOD = 8
"""Values in one call of the flood."""
_JOIN_TIMEOUT = 30.0
_FRESH = 100
"""Number of the first prompt that `write` stores."""
_POOL = 256 * 2**20
_STORE = 512 * 2**20
_COLUMNS = (
    Column("state", "storage tier"),
    Column("without", "without it, ms", ".3f"),
    Column("with", "with it, ms", ".3f"),
    Column("ratio", "ratio", ".3f"),
    Column("low", "from", ".3f"),
    Column("high", "to", ".3f"),
    Column("p99", "ratio of p99", ".2f"),
)
_Engines = dict[str, Worker]


def bench_storage_hits(rounds: int, hits: int, progress: Callable[[str], None]) -> Report:
    """Retrieve eight chunks of 1 MiB from the pool, `rounds` times `hits` with each engine in every state of the store.

    Blocks for a minute. Raises `ConfigError` without Mooncake, `VCacheError` when something does not start."""
    cores = choose_cores()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        progress("starting manager, lender, master and lender of storage")
        manager = stack.enter_context(manager_process(cores.server))
        stack.enter_context(lender_process(manager.address, "host", _POOL, prefault=True, core=cores.server))
        store = stack.enter_context(bench_store(_STORE, core=cores.server))
        progress("starting two engines")
        engines = {
            name: stack.enter_context(_engine(name, manager.address, options)).ready()
            for name, options in (("without", None), ("with", store.options))
        }
        if engines["with"].call(HitEngine.store) == 0:
            raise VCacheError("bench storage: nothing was stored in the pool")

        def measure(state: str, *, writing: bool = False) -> None:
            rows.append(_row(state, engines, rounds, hits, progress, writing))

        measure("idle")
        with _flooding(store.options, cores.server):
            measure("saturated by another process")
        measure("busy with this engine's own writes", writing=True)
        pid = store.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            _wake(engines)
            measure("master stopped (SIGSTOP)")
        finally:
            os.kill(pid, signal.SIGCONT)
        store.process.kill()
        _wake(engines)
        measure("master dead (SIGKILL)")
        errors = engines["with"].call(HitEngine.counters)["storage_errors"]
    if not errors:
        raise VCacheError("bench storage: the engine did not notice that the master was gone")
    worst = max(row["ratio"] for row in rows if not row["state"].startswith("busy"))
    notes = [
        f"retrieve of {_CHUNKS} chunks of {ByteSize(_CHUNK_BYTES)}, all in DRAM of the pool; engines in processes of their "
        f"own, in turns, {rounds} times {hits} calls after one more; medians; ratio: median of the rounds' ratios, and the "
        "quarter points around it",
        "both engines are measured in every state: the ratio is what the tier costs, not what other processes take away",
        verdict(f"within {TARGET:.0%}", worst <= 1 + TARGET, of="while the tier is idle, saturated, stopped or dead"),
    ]
    if cores.shared:
        notes.append("one core only: everything shares it")
    return Report(
        title="Hits of the pool, with and without a storage tier",
        command=f"vcache bench storage --hits {hits} --rounds {rounds}",
        columns=_COLUMNS,
        rows=rows,
        notes=notes,
    )


def _row(
    state: str, engines: _Engines, rounds: int, hits: int, progress: Callable[[str], None], writing: bool
) -> dict[str, Any]:
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        progress(f"{state}: round {number} of {rounds}")
        for name in sorted(engines, reverse=bool(number % 2)):
            found = engines[name].call(HitEngine.hits, hits, writing)
            if number:
                seconds[name].append(found)
    medians = {name: [median(each) for each in found] for name, found in seconds.items()}
    ratios = [with_it / without for with_it, without in zip(medians["with"], medians["without"], strict=True)]
    low, high = quarters(ratios)
    every = {name: [each for found in seconds[name] for each in found] for name in engines}
    return {
        "state": state,
        "without": 1e3 * median(every["without"]),
        "with": 1e3 * median(every["with"]),
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "p99": percentile(every["with"], 0.99) / percentile(every["without"], 0.99),
    }


def _wake(engines: _Engines) -> None:
    """Make the engine find out: its next look-ups run into the tier's trouble, and it begins to probe."""
    for _ in range(4):
        engines["with"].call(HitEngine.miss)


def _engine(name: str, address: str, options: dict[str, str] | None) -> Worker:
    return Worker(HitEngine, {"address": address, "options": options}, name=name, env=clean_environment())


@contextmanager
def _flooding(options: dict[str, str], core: int) -> Iterator[None]:
    """Another process floods the store while the block runs."""
    with on_core(core):
        flood = Worker(Flood, {"options": options}, env=clean_environment())
    try:
        flood.ready().begin(Flood.go_on)
        yield
    finally:
        flood.kill()


class HitEngine:
    """One engine and a paged cache of `_CHUNKS` chunks."""

    def __init__(self, address: str, options: dict[str, str] | None) -> None:
        """`options`: of the storage tier; None for an engine without one."""
        import torch

        from ..engine import VCacheEngine

        torch.set_num_threads(1)
        storage: dict[str, Any] = {"kind": "none"}
        if options is not None:
            storage = {"kind": "mooncake", "options": options, "queue": "64MiB"}
        self._tokens = _CHUNKS * _CHUNK
        shape = (_SPEC.num_layers, 2, self._tokens // _BLOCK, _BLOCK, _SPEC.num_kv_heads, _SPEC.head_size)
        self._cache = torch.ones(shape, dtype=torch.bfloat16)
        self._slots = torch.arange(self._tokens)
        sections = {"manager": {"address": address}, "segment": {"lend": False}, "cache": {"chunk_size": _CHUNK}}
        config = VCacheConfig.from_env({}, **sections, storage=storage, transfer={"threads": 1})
        self._engine = VCacheEngine(config, _SPEC, name="bench-hits", device="cpu")
        self._fresh = _FRESH

    def store(self) -> int:
        """Put the prompt that is measured into the pool, and through to storage. Raises `RuntimeError` when that does not take
        part within 30 s. How many tokens the pool has of it."""
        end = time.monotonic() + _JOIN_TIMEOUT
        while self._errors_of_a_miss():
            if time.monotonic() > end:
                raise RuntimeError("the engine did not join the store")
        self._engine.store(self._prompt(0), kvcaches=list(self._cache), slot_mapping=self._slots)
        self._engine.flush(30)
        return self._engine.lookup(self._prompt(0))

    def _errors_of_a_miss(self) -> int:
        before = self.counters()["storage_errors"]
        self.miss()
        return self.counters()["storage_errors"] - before

    def miss(self) -> None:
        """A look-up that must ask the storage tier."""
        self._engine.lookup(self._prompt(-1 - time.monotonic_ns() % 10**9))

    def hits(self, count: int, writing: bool = False) -> list[float]:
        """Seconds of `count` retrieves from the pool. `writing`: store other chunks, untimed, before each."""
        tokens, caches, found = self._prompt(0), list(self._cache), []
        for _ in range(count):
            if writing:
                self._fresh += 1
                self._engine.store(self._prompt(self._fresh), kvcaches=caches, slot_mapping=self._slots)
            began = time.perf_counter()
            mask = self._engine.retrieve(tokens, kvcaches=caches, slot_mapping=self._slots)
            found.append(time.perf_counter() - began)
            if not bool(mask.all()):
                raise RuntimeError("a chunk that is measured has left the pool")
        return found

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self._engine.get_stats()["counters"]
        return found

    def close(self) -> None:
        self._engine.close()

    def _prompt(self, number: int) -> list[int]:
        return [number % 2**31, *range(1, self._tokens)]


class Flood:
    """Puts new values as fast as the store takes them. It has begun once it is made."""

    def __init__(self, options: dict[str, str]) -> None:
        from ..storage.mooncake import MooncakeStorage

        self._tier = MooncakeStorage(options)
        memory = memoryview(mmap.mmap(-1, _FLOOD * _CHUNK_BYTES))
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, memory.nbytes)
        self._tier.register(memory)
        self._values = [memory[start : start + _CHUNK_BYTES] for start in range(0, memory.nbytes, _CHUNK_BYTES)]
        self._put()

    def go_on(self) -> None:
        """Until this process is killed."""
        while True:
            self._put()

    def _put(self) -> None:
        try:
            self._tier.put([CacheKey(bytes(16), os.urandom(16)) for _ in self._values], 0, self._values)
        except StorageError:  # the master is gone: that is what is measured next
            time.sleep(0.05)
