"""`vcache bench lookup`: what an engine pays to ask for a long prompt, hashing included."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from typing import Any

from ..keys import TokenDatabase
from ..manager.client import Manager
from ..manager.connect import connect
from .population import mount_population, random_keys
from .processes import choose_cores, manager_process, on_core
from .report import Column, Report, percentile, verdict

TARGET_MS = 5.0
TARGET_SIZE = (131_072, 256)
"""Tokens of the prompt and of a chunk."""
_BACKGROUND = 100_000
_RUNS = 300

COLUMNS = (
    Column("what", "step"),
    Column("chunks", "chunks", ",d"),
    Column("median_ms", "median ms", ".2f"),
    Column("p99_ms", "p99 ms", ".2f"),
)


def bench_lookup(tokens: int, chunk_size: int, progress: Callable[[str], None]) -> Report:
    """Hash a prompt of `tokens` tokens and look it up, all of it present among 100,000 other chunks. Blocks for seconds."""
    report = Report(
        title=f"Look-up of a {tokens:,}-token prompt, chunks of {chunk_size}",
        command=f"vcache bench lookup --tokens {tokens} --chunk-size {chunk_size}",
        columns=COLUMNS,
    )
    prompt = array("I", random.Random(3).choices(range(128_000), k=tokens))
    database = TokenDatabase(bytes(16), chunk_size)
    digests = [span.digest for span in database.spans(prompt)]
    cores = choose_cores()
    with manager_process(cores.server) as manager, on_core(cores.client):
        api = connect(manager.config(), name="bench", role="lender", require=True)
        try:
            progress("mounting chunks")
            mount_population(api, [*digests, *random_keys(_BACKGROUND)])
            as_list = list(prompt)
            steps: list[tuple[str, Callable[[], int]]] = [
                ("hash (array of u32)", lambda: len(database.spans(prompt))),
                ("ask the manager", lambda: api.lookup(digests)),
                ("hash + ask (array of u32)", lambda: _ask(api, database, prompt)),
                ("hash + ask (list of int)", lambda: _ask(api, database, as_list)),
            ]
            for name, action in steps:
                progress(name)
                report.rows.append(_time(name, action, len(digests)))
        finally:
            api.close()
    worst = max(row["median_ms"] for row in report.rows)
    target = f"below {TARGET_MS:g} ms, hashing included"
    report.notes.append(verdict(target, worst < TARGET_MS, of=_size(*TARGET_SIZE), ran=_size(tokens, chunk_size)))
    return report


def _size(tokens: int, chunk_size: int) -> str:
    return f"{tokens:,} tokens in chunks of {chunk_size}"


def _ask(api: Manager, database: TokenDatabase, prompt: Any) -> int:
    return api.lookup([span.digest for span in database.spans(prompt)])


def _time(name: str, action: Callable[[], int], expected: int) -> dict[str, Any]:
    durations = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        found = action()
        durations.append(time.perf_counter() - began)
        if found != expected:
            raise AssertionError(f"bench lookup: {name} found {found} of {expected} chunks")
    return {
        "what": name,
        "chunks": expected,
        "median_ms": 1e3 * percentile(durations, 0.5),
        "p99_ms": 1e3 * percentile(durations, 0.99),
    }
