"""`vcache bench memory`: what one chunk costs the manager, in bytes of resident memory."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..manager.connect import connect
from .population import mount_population, random_keys
from .processes import manager_process, resident_bytes
from .report import Column, Report, verdict

TARGET_BYTES = 400
TARGET_CHUNKS = 1_000_000
_STEPS = 4

COLUMNS = (
    Column("chunks", "chunks", ",d"),
    Column("resident_mib", "resident MiB", ",.1f"),
    Column("bytes_per_chunk", "bytes/chunk", ",.0f"),
    Column("seconds", "mount s", ".2f"),
)


def bench_memory(chunks: int, progress: Callable[[str], None]) -> Report:
    """Mount `chunks` chunks in a fresh manager process and read its resident set, in four steps. Blocks."""
    report = Report(
        title=f"Manager memory: {chunks:,} chunks", command=f"vcache bench memory --chunks {chunks}", columns=COLUMNS
    )
    keys = random_keys(chunks)
    with manager_process() as manager:
        config = manager.config(connect_timeout=60.0)
        api = connect(config, name="bench", role="lender", require=True)
        try:
            empty = resident_bytes(manager.pid)
            report.rows.append({"chunks": 0, "resident_mib": empty / 2**20, "bytes_per_chunk": None, "seconds": None})
            segment, began = 0, time.perf_counter()
            for step in range(1, _STEPS + 1):
                done, goal = chunks * (step - 1) // _STEPS, chunks * step // _STEPS
                progress(f"mounting chunks up to {goal:,}")
                segment = mount_population(api, keys[done:goal], first_segment=segment)
                known = api.lookup(keys[goal - 1 : goal])
                resident = resident_bytes(manager.pid)
                report.rows.append(
                    {
                        "chunks": goal,
                        "resident_mib": resident / 2**20,
                        "bytes_per_chunk": (resident - empty) / goal if known else None,
                        "seconds": time.perf_counter() - began,
                    }
                )
        finally:
            api.close()
    measured = report.rows[-1]["bytes_per_chunk"]
    met = measured is not None and measured <= TARGET_BYTES
    of, ran = f"{TARGET_CHUNKS:,} chunks", f"{chunks:,} chunks"
    report.notes.append(verdict(f"at most {TARGET_BYTES} bytes per chunk", met, of=of, ran=ran))
    report.notes.append("resident set of the manager process less that of the empty one; includes what the allocator keeps")
    return report
