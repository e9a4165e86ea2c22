"""`vcache bench engine`: one process stores, another retrieves, a third lends the memory; beside a plain copy of the bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import ByteSize, VCacheConfig
from ..errors import ArgumentError, VCacheError
from ..spec import KVCacheSpec
from ..worker import Worker
from .processes import clean_environment, lender_process, manager_process
from .report import Column, Report, verdict

if TYPE_CHECKING:
    import torch

TARGET_RATIO = 0.7
"""Of a plain copy by as many threads."""
MAPPINGS = ("blocks", "random")
THREADS = (1, 2)
"""`transfer.threads` of the engines; the plain copy beside them uses as many."""

_CHUNK = 256
_BLOCK = 16
_SPEC = KVCacheSpec(model="bench/llama-3.1-8b", dtype="bfloat16", num_layers=32, num_kv_heads=8, head_size=128)
_CHUNK_BYTES = _SPEC.payload_bytes(_CHUNK)

COLUMNS = (
    Column("operation", "operation"),
    Column("mapping", "slot mapping"),
    Column("threads", "threads", "d"),
    Column("milliseconds", "ms", ",.1f"),
    Column("gbps", "GB/s", ".2f"),
    Column("copy_gbps", "plain copy GB/s", ".2f"),
    Column("ratio", "ratio", ".2f"),
    Column("fastest_ratio", "of fastest runs", ".2f"),
)


def bench_engine(nbytes: int, repeats: int, progress: Callable[[str], None]) -> Report:
    """Measure over host memory. Blocks for about half a minute at 1 GiB; needs five times `nbytes` of memory.

    Raises `ArgumentError` when `nbytes` is less than one chunk."""
    if nbytes < _CHUNK_BYTES:
        raise ArgumentError(f"--bytes {ByteSize(nbytes)}: a chunk of the model measured is {ByteSize(_CHUNK_BYTES)}")
    chunks = nbytes // _CHUNK_BYTES
    report = Report(
        title=f"Engines: {ByteSize(chunks * _CHUNK_BYTES)} of KV (Llama-3.1-8B shape, bf16, blocks of 16) over host memory",
        command=f"vcache bench engine --bytes {ByteSize(nbytes)} --repeats {repeats}",
        columns=COLUMNS,
    )
    with ExitStack() as stack:
        progress("starting manager and lender")
        manager = stack.enter_context(manager_process())
        lent = chunks * _CHUNK_BYTES
        stack.enter_context(lender_process(manager.address, "host", lent, slab_bytes=8 * _CHUNK_BYTES, prefault=True))
        for threads in THREADS:
            with ExitStack() as pair:
                progress(f"starting two engines, {threads} thread(s) each")
                writer, reader = (
                    pair.enter_context(_engine(manager.address, chunks, name, threads)).ready() for name in ("writer", "reader")
                )
                for mapping in MAPPINGS:
                    report.rows += _measure(writer, reader, mapping, threads, chunks * _CHUNK_BYTES, repeats, progress)
    whole = [row["ratio"] for row in report.rows if row["mapping"] == "whole blocks"]
    target = f"at least {TARGET_RATIO} of a plain copy for whole blocks, with one thread and with two"
    report.notes.append(verdict(target, min(whole) >= TARGET_RATIO, of=str(ByteSize(chunks * _CHUNK_BYTES))))
    report.notes.append(
        "every retrieve was compared byte for byte with what was stored; medians of alternating runs, and fastest by fastest"
    )
    return report


def _measure(
    writer: Worker, reader: Worker, mapping: str, threads: int, nbytes: int, repeats: int, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in range(repeats + 1):
        progress(f"{mapping}: " + (f"run {run} of {repeats}" if run else "warming up"))
        writer.call(BenchEngine.clear)
        stored = writer.call(BenchEngine.store, run, mapping)
        loaded = reader.call(BenchEngine.retrieve, run, mapping)
        if loaded.tokens != stored.tokens or not loaded.equal:
            raise VCacheError(f"bench engine: {loaded.tokens} of {stored.tokens} tokens retrieved, equal: {loaded.equal}")
        for operation, timed, worker in (("store", stored, writer), ("retrieve", loaded, reader)):
            for name, taken in (("vcache", timed.seconds), ("plain", worker.call(BenchEngine.copy, threads))):
                seconds.setdefault((operation, name), []).append(taken)
    for operation in ("store", "retrieve"):
        taken_by = {name: seconds[operation, name][1:] for name in ("vcache", "plain")}
        own, plain_copy = (statistics.median(values) for values in taken_by.values())
        yield {
            "operation": operation,
            "mapping": "whole blocks" if mapping == "blocks" else "random tokens",
            "threads": threads,
            "milliseconds": 1e3 * own,
            "gbps": nbytes / own / 1e9,
            "copy_gbps": nbytes / plain_copy / 1e9,
            "ratio": plain_copy / own,
            "fastest_ratio": min(taken_by["plain"]) / min(taken_by["vcache"]),
        }


def _engine(address: str, chunks: int, name: str, threads: int) -> Worker:
    arguments = {"address": address, "chunks": chunks, "name": name, "threads": threads}
    return Worker(BenchEngine, arguments, name=name, env=clean_environment())


class Timed(NamedTuple):
    """A store or a retrieve. `tokens`: how many are there after it; `equal`: whether they hold the bytes that were stored."""

    seconds: float
    tokens: int
    equal: bool


class BenchEngine:
    """`reference` and `cache` hold the same number of bytes; the writer stores `reference`, the reader fills `cache`."""

    def __init__(self, address: str, chunks: int, name: str, threads: int) -> None:
        import torch

        from ..engine import VCacheEngine

        self._tokens = chunks * _CHUNK
        self._nbytes = chunks * _CHUNK_BYTES
        shape = (_SPEC.num_layers, 2, self._tokens // _BLOCK, _BLOCK, _SPEC.num_kv_heads, _SPEC.head_size)
        generator = torch.Generator().manual_seed(7)
        # Any bit pattern will do, so that a wrong byte shows.
        raw = torch.randint(-(2**63), 2**63 - 1, (self._nbytes // 8,), dtype=torch.int64, generator=generator)
        self._reference = raw.view(torch.bfloat16).view(shape)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16)
        sections = {"manager": {"address": address, "deadline": 10.0}, "segment": {"lend": False}}
        config = VCacheConfig.from_env({}, **sections, transfer={"threads": threads})
        self._engine = VCacheEngine(config, _SPEC, name=f"bench-{name}")

    def clear(self) -> None:
        self._engine.manager.clear()

    def store(self, prompt: int, mapping: str) -> Timed:
        slots, caches = self._slots(mapping, 11), list(self._reference)
        tokens = self._prompt(prompt)
        seconds = _timed(lambda: self._engine.store(tokens, kvcaches=caches, slot_mapping=slots))
        return Timed(seconds, self._engine.lookup(tokens), True)

    def retrieve(self, prompt: int, mapping: str) -> Timed:
        import torch

        self._cache.zero_()
        slots, caches = self._slots(mapping, 13), list(self._cache)
        tokens, found = self._prompt(prompt), torch.zeros(0)

        def work() -> None:
            nonlocal found
            found = self._engine.retrieve(tokens, kvcaches=caches, slot_mapping=slots)

        seconds = _timed(work)
        return Timed(seconds, int(found.sum()), self._equal(slots, self._slots(mapping, 11)))

    def copy(self, threads: int) -> float:
        """The plain copy: the same bytes from one contiguous buffer to another. By `threads` threads."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return _timed(lambda: self._cache.copy_(self._reference))
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        self._engine.close()

    def _prompt(self, number: int) -> list[int]:
        return [number, *range(1, self._tokens)]

    def _slots(self, mapping: str, seed: int) -> torch.Tensor:
        """A block table of shuffled whole blocks, or any token anywhere."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        if mapping == "random":
            return torch.randperm(self._tokens, generator=generator)
        blocks = torch.randperm(self._tokens // _BLOCK, generator=generator)
        return (blocks[:, None] * _BLOCK + torch.arange(_BLOCK)).reshape(-1)

    def _equal(self, here: torch.Tensor, there: torch.Tensor) -> bool:
        import torch

        rows = (self._tokens, _SPEC.num_kv_heads * _SPEC.head_size)
        for layer in range(_SPEC.num_layers):
            for plane in range(2):
                got = self._cache[layer, plane].view(rows).view(torch.int16)[here]
                if not torch.equal(got, self._reference[layer, plane].view(rows).view(torch.int16)[there]):
                    return False
        return True


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
