"""Whole engines over VRAM: a manager, a lender and two engines, each in a process of its own, as in real use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import IntegrityError
from .paged_data import CHUNK, LLAMA_8B, slab_size
from .plot import size_text
from .pool_worker import PoolWorker, WorkerSettings
from .processes import manager_process, running
from .timing import Spread

if TYPE_CHECKING:
    import subprocess

LONG = 32_768
SHORT = 512
_SHORT_RUNS = 7
_LONG_RUNS = 12
_LONG_GOAL = 1e-3
_SHORT_GOAL = 5e-3


@contextmanager
def lender_process(
    address: str, kind: str, nbytes: int, *, slab_bytes: int = 0, device: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """`vcache lend` until the block ends; enters once it lends."""
    command = [sys.executable, "-m", "vcache.cli", "lend", "--address", address, "--kind", kind, "--size", str(nbytes)]
    if slab_bytes:
        command += ["--slab-size", str(slab_bytes)]
    if device:
        command += ["--device", device]
    with running(command, "lending ") as process:
        yield process


def worker_settings(address: str, **changes: Any) -> WorkerSettings:
    """An engine of the 8B shape with a cache of 32k tokens on the first GPU, which lends nothing itself."""
    given: dict[str, Any] = {
        "config": {"manager": {"address": address}, "segment": {"lend": False}},
        "spec": LLAMA_8B,
        "blocks": LONG // 16,
    }
    return WorkerSettings(**(given | changes))


def measure(rows: list[dict[str, Any]], progress: Callable[[str], None]) -> Iterator[str]:
    """Append rows for engines end to end; one line for each target. Blocks for about a minute. Raises `VCacheError`."""
    with ExitStack() as stack:
        progress("end to end: starting a manager, a lender and two engines")
        address = stack.enter_context(manager_process()).address
        slots = LONG // CHUNK + 4 * _SHORT_RUNS
        nbytes = slab_size(LLAMA_8B, slots)
        stack.enter_context(lender_process(address, "cuda", nbytes))
        writer = stack.enter_context(PoolWorker(worker_settings(address, name="writer")))
        reader = stack.enter_context(PoolWorker(worker_settings(address, name="reader")))
        progress(f"end to end: {SHORT} tokens, stored by one process, retrieved by another")
        stores, retrieves = _short(writer, reader)
        for operation, spread in (("store", stores), ("retrieve", retrieves)):
            rows.append(_row(operation, SHORT, spread))
            verdict = "met" if spread.median < _SHORT_GOAL else "MISSED"
            yield (
                f"{verdict}: engine.{operation} of {SHORT} tokens between processes: {spread.median * 1e3:.2f} ms "
                f"[{spread.low * 1e3:.2f}-{spread.high * 1e3:.2f}] (goal {_SHORT_GOAL * 1e3:.0f} ms)"
            )
        progress(f"end to end: {LONG} tokens")
        store, retrieve, kernel = _long(writer, reader)
        rows += [_row("store", LONG, store), _row("retrieve", LONG, retrieve), _row("retrieve, kernels alone", LONG, kernel)]
        above = retrieve.median - kernel.median
        verdict = "met" if above <= _LONG_GOAL else "MISSED"
        yield (
            f"{verdict}: engine.retrieve of {LONG} tokens: {retrieve.median * 1e3:.2f} ms [{retrieve.low * 1e3:.2f}-"
            f"{retrieve.high * 1e3:.2f}], {above * 1e3:.2f} ms above its kernels' {kernel.median * 1e3:.2f} ms (goal 1 ms)"
        )


def _short(writer: PoolWorker, reader: PoolWorker) -> tuple[Spread, Spread]:
    """The first prompt warms up: kernels are compiled, slabs are mapped."""
    stores, retrieves = [], []
    for prompt in range(_SHORT_RUNS + 2):
        stores.append(writer.ask("store", prompt=prompt, tokens=SHORT, seed=prompt)["seconds"])
        retrieves.append(_right(reader.ask("retrieve", prompt=prompt, tokens=SHORT, seed=prompt + 1), SHORT))
    return Spread.of(stores[2:]), Spread.of(retrieves[2:])


def _long(writer: PoolWorker, reader: PoolWorker) -> tuple[Spread, Spread, Spread]:
    store = writer.ask("store", prompt=1000, tokens=LONG)["seconds"]
    _right(reader.ask("retrieve", prompt=1000, tokens=LONG, seed=1), LONG)
    retrieves = reader.ask("time_retrieve", prompt=1000, tokens=LONG, runs=_LONG_RUNS)["seconds"]
    kernels = reader.ask("time_kernels", prompt=1000, tokens=LONG, runs=_LONG_RUNS)["seconds"]
    return Spread.of([store]), Spread.of(retrieves[2:]), Spread.of(kernels[2:])


def _right(found: dict[str, Any], tokens: int) -> float:
    if found["wrong"] or found["loaded"] != tokens:
        raise IntegrityError(f"I1: {found['loaded']} of {tokens} tokens retrieved, {found['wrong']} with wrong bytes")
    return float(found["seconds"])


def _row(operation: str, tokens: int, spread: Spread) -> dict[str, Any]:
    nbytes = LLAMA_8B.payload_bytes(tokens)
    return {
        "path": "engine, other process",
        "operation": operation,
        "mapping": "blocks",
        "size": size_text(nbytes),
        "nbytes": nbytes,
        "page": "32 KiB",
        "page_bytes": 32 * 1024,
        "gbps": spread.gbps(nbytes),
        "gbps_low": nbytes / spread.high / 1e9,
        "gbps_high": nbytes / spread.low / 1e9,
        "call_ms": spread.median * 1e3,
        "runs": spread.runs,
    }
