"""Whole engines over VRAM: a manager, a lender and two engines, each in a process of its own, as in real use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from ..errors import IntegrityError
from ..spec import KVCacheSpec
from ..worker import Worker
from .paged_data import CHUNK, LLAMA_8B, slab_size
from .plot import size_text
from .pool_worker import PoolEngine, Retrieved, WorkerSettings, pool_worker
from .processes import lender_process, manager_process
from .report import percentile
from .timing import Spread

_SHORT_RUNS = 7
_LONG_RUNS = 300
_LONG_RUNS_CPU = 20
_KERNEL_RUNS = 12
_LONG_GOAL = 1e-3
_SHORT_GOAL = 5e-3


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
        writer = stack.enter_context(pool_worker(shape.settings(address, "writer")))
        reader = stack.enter_context(pool_worker(shape.settings(address, "reader")))
        progress(f"end to end: {shape.short} tokens, stored by one process, retrieved by another")
        for operation, spread in zip(("store", "retrieve"), _short(writer, reader, shape.short), strict=True):
            rows.append(_row(shape, operation, shape.short, spread))
            verdict = _verdict(shape, spread.median < _SHORT_GOAL)
            yield (
                f"{verdict}: engine.{operation} of {shape.short} tokens between processes: {spread.median * 1e3:.2f} ms "
                f"[{spread.low * 1e3:.2f}-{spread.high * 1e3:.2f}] (goal {_SHORT_GOAL * 1e3:.0f} ms)"
            )
        progress(f"end to end: {shape.long} tokens")
        store, kernel = _long(writer, reader, shape.long)
        runs = _LONG_RUNS if shape.device.startswith("cuda") else _LONG_RUNS_CPU
        named = _retrieves(reader, shape.long, runs)
        unnamed = _retrieves(reader, shape.long, runs, unnamed=True)
        reader.call(PoolEngine.freeze)
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
            yield _judged(shape, operation, seconds, kernel)


def _verdict(shape: Shape, met: bool) -> str:
    """The goals are for whole engines over VRAM, with the usual shape."""
    return ("met" if met else "MISSED") if shape == Shape() else "no verdict for this shape"


def _judged(shape: Shape, operation: str, seconds: list[float], kernel: Spread) -> str:
    spread = Spread.of(seconds)
    above = spread.median - kernel.median
    took = f"{spread.median * 1e3:.2f} ms [{spread.low * 1e3:.2f}-{spread.high * 1e3:.2f}]"
    verdict = _verdict(shape, above <= _LONG_GOAL)
    return (
        f"{verdict}: engine.{operation}: {shape.long} tokens in {took}, {above * 1e3:.2f} ms above its kernels' "
        f"{kernel.median * 1e3:.2f} ms (goal 1 ms); p99 {percentile(seconds, 0.99) * 1e3:.2f} ms of {len(seconds)}"
    )


def _short(writer: Worker, reader: Worker, tokens: int) -> tuple[Spread, Spread]:
    """The first prompt warms up: kernels are compiled, slabs are mapped."""
    stores, retrieves = [], []
    for prompt in range(_SHORT_RUNS + 2):
        stores.append(writer.call(PoolEngine.store, prompt=prompt, tokens=tokens, seed=prompt))
        retrieves.append(_right(reader.call(PoolEngine.retrieve, prompt=prompt, tokens=tokens, seed=prompt + 1), tokens))
    return Spread.of(stores[2:]), Spread.of(retrieves[2:])


def _long(writer: Worker, reader: Worker, tokens: int) -> tuple[Spread, Spread]:
    store = writer.call(PoolEngine.store, prompt=1000, tokens=tokens)
    _right(reader.call(PoolEngine.retrieve, prompt=1000, tokens=tokens, seed=1), tokens)
    kernels = reader.call(PoolEngine.time_kernels, prompt=1000, tokens=tokens, runs=_KERNEL_RUNS)
    return Spread.of([store]), Spread.of(kernels[2:])


def _retrieves(reader: Worker, tokens: int, runs: int, *, unnamed: bool = False) -> list[float]:
    return reader.call(PoolEngine.time_retrieve, prompt=1000, tokens=tokens, runs=runs + 2, unnamed=unnamed)[2:]


def _right(found: Retrieved, tokens: int) -> float:
    if found.wrong or found.loaded != tokens:
        raise IntegrityError(f"I1: {found.loaded} of {tokens} tokens retrieved, {found.wrong} with wrong bytes")
    return found.seconds


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
