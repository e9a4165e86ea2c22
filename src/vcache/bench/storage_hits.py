"""What a storage tier costs hits of the pool: two engines, with and without one, in turns, whatever the store does."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from ..config import ByteSize
from ..errors import VCacheError
from .asked import Worker, worker_process
from .processes import choose_cores, clean_environment, manager_process, running
from .report import Column, Report, percentile
from .storage import bench_store, quarters
from .storage_worker import CHUNK_BYTES, CHUNKS

TARGET = 0.05
_WORKER = "vcache.bench.storage_worker"
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
        lend = [sys.executable, "-m", "vcache.cli", "lend", "--kind", "host", "--size", str(_POOL), "--prefault"]
        lend += ["--address", manager.address]
        stack.enter_context(running(lend, "lending", core=cores.server, env=clean_environment()))
        store = stack.enter_context(bench_store(_STORE, core=cores.server))
        progress("starting two engines")
        engines = {
            name: stack.enter_context(worker_process(_WORKER, "hits", manager.address, json.dumps(options)))
            for name, options in (("without", None), ("with", store.options))
        }
        if engines["with"]("store")["tokens"] == 0:
            raise VCacheError("bench storage: nothing was stored in the pool")

        def measure(state: str, *, writing: bool = False) -> None:
            rows.append(_row(state, engines, rounds, hits, progress, writing))

        measure("idle")
        flood = [sys.executable, "-m", _WORKER, "flood", "-", json.dumps(store.options)]
        with running(flood, "flooding", core=cores.server, env=clean_environment()):
            measure("saturated by another process")
        measure("busy with this engine's own writes", writing=True)
        pid = store.master.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            _wake(engines)
            measure("master stopped (SIGSTOP)")
        finally:
            os.kill(pid, signal.SIGCONT)
        store.master.kill()
        _wake(engines)
        measure("master dead (SIGKILL)")
        errors = engines["with"]("counters")["storage_errors"]
    if not errors:
        raise VCacheError("bench storage: the engine did not notice that the master was gone")
    worst = max(row["ratio"] for row in rows if not row["state"].startswith("busy"))
    notes = [
        f"retrieve of {CHUNKS} chunks of {ByteSize(CHUNK_BYTES)}, all in DRAM of the pool; engines in processes of their own, "
        f"in turns, {rounds} times {hits} calls after one more; medians; ratio: median of the rounds' ratios, and the quarter "
        "points around it",
        "both engines are measured in every state: the ratio is what the tier costs, not what other processes take away",
        f"target: within {TARGET:.0%} while the tier is idle, saturated or dead: {'met' if worst <= 1 + TARGET else 'missed'}",
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
            found = engines[name]("hits", count=hits, writing=writing)["seconds"]
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
        engines["with"]("miss")
