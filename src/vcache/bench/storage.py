"""The storage tier beside raw Mooncake: batched puts and gets of the same buffers, in turns, over TCP on this machine."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from ..config import ByteSize
from ..errors import StorageError
from ..keys import CacheKey
from ..storage.guarded import GuardedStorage
from ..storage.mooncake import MooncakeStorage
from ..storage.mooncake_options import MooncakeOptions, load_store
from .mooncake_master import BenchMaster, bench_master
from .processes import clean_environment, running
from .report import Column, Report, verdict

TARGET = 0.85
VALUE = 4 * 2**20
_BATCH = 8
_SPARE = 3
"""The store has room for so many times what a round moves, so that nothing is evicted."""
_MORE_ROUNDS = 4
"""Small sizes get up to so many times more rounds: they are short."""
_Call = Callable[[range], list[Any]]
_COLUMNS = (
    Column("size", "bytes"),
    Column("operation", "operation"),
    Column("raw", "Mooncake GB/s", ".2f"),
    Column("tier", "storage tier GB/s", ".2f"),
    Column("ratio", "ratio", ".2f"),
    Column("low", "from", ".2f"),
    Column("high", "to", ".2f"),
)


@contextmanager
def bench_store(nbytes: int, *, core: int | None = None, flags: Sequence[str] = ()) -> Iterator[BenchMaster]:
    """A master and a lender of `nbytes`, on `core` if given. Raises `ConfigError` without Mooncake, `StorageError` when it does
    not work here. `flags`: further flags of the master."""
    with bench_master(core=core, flags=flags) as master:
        command = [sys.executable, "-m", "vcache.cli", "lend-storage", "--size", str(nbytes)]
        env = clean_environment(VCACHE_STORAGE_OPTIONS=json.dumps(master.options))
        with running(command, "lending", core=core, env=env):
            yield master


def bench_storage(sizes: Sequence[int], rounds: int, progress: Callable[[str], None]) -> Report:
    """Move each of `sizes` bytes in values of 4 MiB, eight in a call, `rounds` times each way. Starts a master and a lender of
    its own.

    Blocks. Raises `ConfigError` without Mooncake, `StorageError` when it does not work here.
    """
    counts = sorted({max(_BATCH, size // VALUE) for size in sizes})
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        progress("starting a master and a lender")
        # Values that were just read must be there in the next round.
        store = stack.enter_context(bench_store(_SPARE * counts[-1] * VALUE, flags=["--default_kv_lease_ttl=5000"]))
        raw = load_store()()
        MooncakeOptions.parse(store.options).setup(raw)
        stack.callback(raw.close)
        tier = GuardedStorage(MooncakeStorage(store.options), 30.0)
        stack.callback(tier.close)
        buffers = [memoryview(mmap.mmap(-1, VALUE)) for _ in range(counts[-1])]
        for number, buffer in enumerate(buffers):
            buffer[:8] = number.to_bytes(8, "little")
            tier.register(buffer)
            raw.register_buffer(_address(buffer), VALUE)
        progress("touching the memory of the store")
        _touch(raw, buffers)
        for count in counts:
            more = min(_MORE_ROUNDS, counts[-1] // count)
            rows += _rows(_measure(raw, tier, buffers[:count], more * rounds, progress), count)
    met = all(row["ratio"] >= TARGET for row in rows)
    notes = [
        f"values of {ByteSize(VALUE)}, {_BATCH} in a call; raw Mooncake and the tier in turns, {rounds} rounds after one more "
        f"(smaller sizes: up to {_MORE_ROUNDS} times as many); ratio: median of the rounds' ratios, and the quarter points",
        verdict(f"a ratio of {TARGET} or more", met, of=", ".join(str(ByteSize(count * VALUE)) for count in counts)),
    ]
    return Report(
        title="Storage tier beside raw Mooncake calls",
        command="vcache bench storage "
        + " ".join(f"--size {ByteSize(count * VALUE)}" for count in counts)
        + f" --rounds {rounds}",
        columns=_COLUMNS,
        rows=rows,
        notes=notes,
    )


def _rows(times: dict[tuple[str, str], list[float]], count: int) -> Iterator[dict[str, Any]]:
    for operation in ("put", "get"):
        speeds = {who: count * VALUE / 1e9 / median(times[operation, who]) for who in ("raw", "tier")}
        ratios = [raw / tier for raw, tier in zip(times[operation, "raw"], times[operation, "tier"], strict=True)]
        low, high = quarters(ratios)
        yield {
            "size": str(ByteSize(count * VALUE)),
            "operation": operation,
            **speeds,
            "ratio": median(ratios),
            "low": low,
            "high": high,
        }


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The values a quarter and three quarters up. Not empty."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


def _touch(raw: Any, buffers: list[memoryview]) -> None:
    """Fill the store once and empty it: the first write to a page of the lender takes twenty times as long."""
    names = []
    for turn in range(_SPARE):
        for number, buffer in enumerate(buffers):
            name = f"touch/{turn}/{number}"
            if raw.batch_put_from([name], [_address(buffer)], [VALUE])[0] == 0:
                names.append(name)
    for name in names:
        raw.remove(name, True)


def _measure(
    raw: Any, tier: GuardedStorage, buffers: list[memoryview], rounds: int, progress: Callable[[str], None]
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every round by (operation, who). Values are removed after each."""
    times: dict[tuple[str, str], list[float]] = {(o, w): [] for o in ("put", "get") for w in ("raw", "tier")}
    addresses = [_address(buffer) for buffer in buffers]
    batches = [range(start, min(start + _BATCH, len(buffers))) for start in range(0, len(buffers), _BATCH)]
    sizes = [VALUE] * len(buffers)
    for number in range(rounds + 1):
        progress(f"{ByteSize(len(buffers) * VALUE)}: round {number} of {rounds}")
        keys = [CacheKey(bytes(16), os.urandom(16)) for _ in buffers]
        names = [f"raw/{key.digest.hex()}" for key in keys]

        def raw_put(part: range, names: list[str] = names) -> list[Any]:
            codes = raw.batch_put_from(names[part.start : part.stop], addresses[part.start : part.stop], sizes[: len(part)])
            return list(codes)

        def raw_get(part: range, names: list[str] = names) -> list[Any]:
            codes = raw.batch_get_into(names[part.start : part.stop], addresses[part.start : part.stop], sizes[: len(part)])
            return list(codes)

        def tier_put(part: range, keys: list[CacheKey] = keys) -> list[Any]:
            return tier.put(keys[part.start : part.stop], 0, buffers[part.start : part.stop])

        def tier_get(part: range, keys: list[CacheKey] = keys) -> list[Any]:
            return tier.get(keys[part.start : part.stop], 0, buffers[part.start : part.stop])

        order: list[tuple[str, _Call, _Call]] = [("raw", raw_put, raw_get), ("tier", tier_put, tier_get)]
        for which, operation in enumerate(("put", "get")):
            # The two side by side: what disturbs this machine for a second disturbs both.
            for who, *calls in order if number % 2 else order[::-1]:
                began = time.perf_counter()
                answers = [answer for part in batches for answer in calls[which](part)]
                seconds = time.perf_counter() - began
                good = VALUE if operation == "get" else {"raw": 0, "tier": True}[who]
                if any(answer != good for answer in answers):
                    raise StorageError(f"mooncake: a {operation} failed during the benchmark ({who}): {answers}")
                if number:
                    times[operation, who].append(seconds)
        tier.remove(keys, 0)
        for name in names:
            raw.remove(name, True)
    return times


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
