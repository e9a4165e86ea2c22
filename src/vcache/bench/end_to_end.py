"""Whole engines over VRAM: a manager, a lender and two engines, each in a process of its own, as in real use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import IntegrityError
from ..spec import KVCacheSpec
from .paged_data import CHUNK, LLAMA_8B, slab_size
from .plot import size_text
from .pool_worker import PoolWorker, WorkerSettings
from .processes import manager_process, running
from .report import percentile
from .timing import Spread

if TYPE_CHECKING:
    import subprocess

_SHORT_RUNS = 7
_LONG_RUNS = 300
_LONG_RUNS_CPU = 20
_KERNEL_RUNS = 12
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


class Shape(NamedTuple):
    """What is moved, and where."""

    spec: KVCacheSpec = LLAMA_8B
    long: int = 32_768
    """Tokens of the long prompt."""
    short: int = 512
    kind: str = "cuda"
    """Of the lent segment."""
    device: str = "cuda"
    """torch device of the caches."""

    def settings(self, address: str, name: str) -> WorkerSettings:
        """An engine that lends nothing itself."""
        config: dict[str, dict[str, Any]] = {"manager": {"address": address}, "segment": {"lend": False}}
        return WorkerSettings(config=config, spec=self.spec, blocks=self.long // 16, device=self.device, name=name)


def measure(rows: list[dict[str, Any]], progress: Callable[[str], None], shape: Shape = Shape()) -> Iterator[str]:  # noqa: B008
    """Append rows for engines end to end; yields one line for each target. Blocks for about a minute. Raises `VCacheError`."""
    with ExitStack() as stack:
        progress("end to end: starting a manager, a lender and two engines")
        address = stack.enter_context(manager_process()).address
        slots = shape.long // CHUNK + 2 * (_SHORT_RUNS + 2) * -(-shape.short // CHUNK)
        stack.enter_context(lender_process(address, shape.kind, slab_size(shape.spec, slots)))
        writer = stack.enter_context(PoolWorker(shape.settings(address, "writer")))
        reader = stack.enter_context(PoolWorker(shape.settings(address, "reader")))
        progress(f"end to end: {shape.short} tokens, stored by one process, retrieved by another")
        for operation, spread in zip(("store", "retrieve"), _short(writer, reader, shape.short), strict=True):
            rows.append(_row(shape, operation, shape.short, spread))
            verdict = "met" if spread.median < _SHORT_GOAL else "MISSED"
            yield (
                f"{verdict}: engine.{operation} of {shape.short} tokens between processes: {spread.median * 1e3:.2f} ms "
                f"[{spread.low * 1e3:.2f}-{spread.high * 1e3:.2f}] (goal {_SHORT_GOAL * 1e3:.0f} ms)"
            )
        progress(f"end to end: {shape.long} tokens")
        store, kernel = _long(writer, reader, shape.long)
        runs = _LONG_RUNS if shape.device.startswith("cuda") else _LONG_RUNS_CPU
        named = _retrieves(reader, shape.long, runs)
        unnamed = _retrieves(reader, shape.long, runs, unnamed=True)
        reader.ask("freeze", frozen=True)
        frozen = _retrieves(reader, shape.long, runs)
        rows += [_row(shape, "store", shape.long, store), _row(shape, "retrieve, kernels alone", shape.long, kernel)]
        for operation, seconds in (
            ("retrieve", named),
            ("retrieve, not looked up before", unnamed),
            ("retrieve, objects frozen", frozen),
        ):
            rows.append(
                _row(shape, operation, shape.long, Spread.of(seconds)) | {"call_p99_ms": percentile(seconds, 0.99) * 1e3}
            )
            yield _verdict(operation, shape.long, seconds, kernel)


def _verdict(operation: str, tokens: int, seconds: list[float], kernel: Spread) -> str:
    spread = Spread.of(seconds)
    above = spread.median - kernel.median
    took = f"{spread.median * 1e3:.2f} ms [{spread.low * 1e3:.2f}-{spread.high * 1e3:.2f}]"
    met = "met" if above <= _LONG_GOAL else "MISSED"
    return (
        f"{met}: engine.{operation}: {tokens} tokens in {took}, {above * 1e3:.2f} ms above its kernels' "
        f"{kernel.median * 1e3:.2f} ms (goal 1 ms); p99 {percentile(seconds, 0.99) * 1e3:.2f} ms of {len(seconds)}"
    )


def _short(writer: PoolWorker, reader: PoolWorker, tokens: int) -> tuple[Spread, Spread]:
    """The first prompt warms up: kernels are compiled, slabs are mapped."""
    stores, retrieves = [], []
    for prompt in range(_SHORT_RUNS + 2):
        stores.append(writer.ask("store", prompt=prompt, tokens=tokens, seed=prompt)["seconds"])
        retrieves.append(_right(reader.ask("retrieve", prompt=prompt, tokens=tokens, seed=prompt + 1), tokens))
    return Spread.of(stores[2:]), Spread.of(retrieves[2:])


def _long(writer: PoolWorker, reader: PoolWorker, tokens: int) -> tuple[Spread, Spread]:
    store = writer.ask("store", prompt=1000, tokens=tokens)["seconds"]
    _right(reader.ask("retrieve", prompt=1000, tokens=tokens, seed=1), tokens)
    kernels = reader.ask("time_kernels", prompt=1000, tokens=tokens, runs=_KERNEL_RUNS)["seconds"]
    return Spread.of([store]), Spread.of(kernels[2:])


def _retrieves(reader: PoolWorker, tokens: int, runs: int, *, unnamed: bool = False) -> list[float]:
    answer = reader.ask("time_retrieve", prompt=1000, tokens=tokens, runs=runs + 2, unnamed=unnamed)
    found: list[float] = answer["seconds"][2:]
    return found


def _right(found: dict[str, Any], tokens: int) -> float:
    if found["wrong"] or found["loaded"] != tokens:
        raise IntegrityError(f"I1: {found['loaded']} of {tokens} tokens retrieved, {found['wrong']} with wrong bytes")
    return float(found["seconds"])


def _row(shape: Shape, operation: str, tokens: int, spread: Spread) -> dict[str, Any]:
    nbytes = shape.spec.payload_bytes(tokens)
    return {
        "path": "engine, other process",
        "operation": operation,
        "mapping": "blocks",
        "size": size_text(nbytes),
        "nbytes": nbytes,
        "page": size_text(16 * shape.spec.row_bytes),
        "page_bytes": 16 * shape.spec.row_bytes,
        "gbps": spread.gbps(nbytes),
        "gbps_low": nbytes / spread.high / 1e9,
        "gbps_high": nbytes / spread.low / 1e9,
        "call_ms": spread.median * 1e3,
        "runs": spread.runs,
    }
