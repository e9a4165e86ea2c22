"""`vcache bench engine`: one process stores, another retrieves, a third lends the memory; beside a plain copy of the bytes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from ..config import ByteSize
from ..errors import ArgumentError, VCacheError
from .asked import Worker, worker_process
from .engine_worker import CHUNK_BYTES
from .processes import clean_environment, manager_process, running
from .report import Column, Report

TARGET_RATIO = 0.7
"""Of a plain copy by as many threads."""
MAPPINGS = ("blocks", "random")
THREADS = (1, 2)
"""`transfer.threads` of the engines; the plain copy beside them uses as many."""

_WORKER = "vcache.bench.engine_worker"
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
    if nbytes < CHUNK_BYTES:
        raise ArgumentError(f"--bytes {ByteSize(nbytes)}: a chunk of the model measured is {ByteSize(CHUNK_BYTES)}")
    chunks = nbytes // CHUNK_BYTES
    report = Report(
        title=f"Engines: {ByteSize(chunks * CHUNK_BYTES)} of KV (Llama-3.1-8B shape, bf16, blocks of 16) over host memory",
        command=f"vcache bench engine --bytes {ByteSize(nbytes)} --repeats {repeats}",
        columns=COLUMNS,
    )
    with ExitStack() as stack:
        progress("starting manager and lender")
        manager = stack.enter_context(manager_process())
        command = [sys.executable, "-m", "vcache.cli", "lend", "--kind", "host", "--size", str(chunks * CHUNK_BYTES)]
        command += ["--address", manager.address, "--slab-size", str(8 * CHUNK_BYTES), "--prefault"]
        stack.enter_context(running(command, "lending", env=clean_environment()))
        for threads in THREADS:
            with ExitStack() as pair:
                progress(f"starting two engines, {threads} thread(s) each")
                writer, reader = (
                    pair.enter_context(worker_process(_WORKER, manager.address, str(chunks), name, str(threads)))
                    for name in ("writer", "reader")
                )
                for mapping in MAPPINGS:
                    report.rows += _measure(writer, reader, mapping, threads, repeats, progress)
    whole = [row["ratio"] for row in report.rows if row["mapping"] == "whole blocks"]
    verdict = "met" if min(whole) >= TARGET_RATIO else "missed"
    report.notes.append(
        f"target {verdict}: at least {TARGET_RATIO} of a plain copy for whole blocks, with one thread and with two"
    )
    report.notes.append(
        "every retrieve was compared byte for byte with what was stored; medians of alternating runs, and fastest by fastest"
    )
    return report


def _measure(
    writer: Worker, reader: Worker, mapping: str, threads: int, repeats: int, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    nbytes = 0
    for run in range(repeats + 1):
        progress(f"{mapping}: " + (f"run {run} of {repeats}" if run else "warming up"))
        prompt = {"prompt": run, "mapping": mapping}
        writer("clear")
        stored = writer("store", **prompt)
        loaded = reader("retrieve", **prompt)
        if loaded["tokens"] != stored["tokens"] or not loaded["equal"]:
            raise VCacheError(
                f"bench engine: {loaded['tokens']} of {stored['tokens']} tokens retrieved, equal: {loaded['equal']}"
            )
        nbytes = stored["nbytes"]
        for operation, answer, worker in (("store", stored, writer), ("retrieve", loaded, reader)):
            for name, each in (("vcache", answer), ("plain", worker("copy", threads=threads))):
                seconds.setdefault((operation, name), []).append(each["seconds"])
    for operation in ("store", "retrieve"):
        timed = {name: seconds[operation, name][1:] for name in ("vcache", "plain")}
        own, plain_copy = (statistics.median(values) for values in timed.values())
        yield {
            "operation": operation,
            "mapping": "whole blocks" if mapping == "blocks" else "random tokens",
            "threads": threads,
            "milliseconds": 1e3 * own,
            "gbps": nbytes / own / 1e9,
            "copy_gbps": nbytes / plain_copy / 1e9,
            "ratio": plain_copy / own,
            "fastest_ratio": min(timed["plain"]) / min(timed["vcache"]),
        }
