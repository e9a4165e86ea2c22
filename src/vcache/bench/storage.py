"""The storage tier beside raw Mooncake: batched puts and gets of the same buffers, in turns, over TCP on this machine."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from ..config import ByteSize
from ..errors import StorageError
from ..keys import CacheKey
from ..storage.guarded import GuardedStorage
from ..storage.mooncake import MooncakeStorage
from ..storage.mooncake_master import MooncakeMaster
from ..storage.mooncake_options import MooncakeOptions, load_store
from .processes import clean_environment, running
from .report import Column, Report

TARGET = 0.85
_VALUE = 4 * 2**20
_BATCH = 8
_Call = Callable[[range], list[Any]]
_COLUMNS = (
    Column("operation", "operation"),
    Column("raw", "Mooncake GB/s", ".2f"),
    Column("tier", "storage tier GB/s", ".2f"),
    Column("ratio", "ratio", ".2f"),
)


def bench_storage(size: int, rounds: int, progress: Callable[[str], None]) -> Report:
    """Move `size` bytes in values of 4 MiB, eight in a call, `rounds` times each way. Starts a master and a lender of its own.

    Blocks. Raises `ConfigError` without Mooncake, `StorageError` when it does not work here.
    """
    count = max(_BATCH, size // _VALUE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings = {"master": f"127.0.0.1:{probe.getsockname()[1]}"}
    options = MooncakeOptions.parse(settings)
    with ExitStack() as stack:
        progress("starting a master and a lender")
        master = MooncakeMaster(options, flags=["--default_kv_lease_ttl=5000"])
        stack.callback(master.close)
        command = [sys.executable, "-m", "vcache.cli", "lend", "--tier", "storage", "--size", str(3 * count * _VALUE)]
        env = clean_environment(VCACHE_STORAGE_OPTIONS=json.dumps(settings))
        stack.enter_context(running(command, "lending", env=env))
        raw = load_store()()
        options.setup(raw)
        stack.callback(raw.close)
        tier = GuardedStorage(MooncakeStorage(settings), 30.0)
        stack.callback(tier.close)
        buffers = [memoryview(mmap.mmap(-1, _VALUE)) for _ in range(count)]
        for number, buffer in enumerate(buffers):
            buffer[:8] = number.to_bytes(8, "little")
            tier.register(buffer)
            raw.register_buffer(_address(buffer), _VALUE)
        times = _measure(raw, tier, buffers, rounds, progress)
    rows: list[dict[str, Any]] = []
    for operation in ("put", "get"):
        speeds = {who: count * _VALUE / 1e9 / median(times[operation, who]) for who in ("raw", "tier")}
        rows.append({"operation": operation, **speeds, "ratio": speeds["tier"] / speeds["raw"]})
    met = all(row["ratio"] >= TARGET for row in rows)
    notes = [
        f"{count} values of {ByteSize(_VALUE)}, {_BATCH} in a call; median of {rounds} rounds in turns, after one more",
        f"target: a ratio of {TARGET} or more: {'met' if met else 'missed'}",
    ]
    return Report(
        title="Storage tier beside raw Mooncake calls",
        command=f"vcache bench storage --size {ByteSize(size)}",
        columns=_COLUMNS,
        rows=rows,
        notes=notes,
    )


def _measure(
    raw: Any, tier: GuardedStorage, buffers: list[memoryview], rounds: int, progress: Callable[[str], None]
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every round by (operation, who). Values are removed after each."""
    times: dict[tuple[str, str], list[float]] = {(o, w): [] for o in ("put", "get") for w in ("raw", "tier")}
    addresses = [_address(buffer) for buffer in buffers]
    batches = [range(start, min(start + _BATCH, len(buffers))) for start in range(0, len(buffers), _BATCH)]
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}")
        keys = [CacheKey(bytes(16), os.urandom(16)) for _ in buffers]
        names = [f"raw/{key.digest.hex()}" for key in keys]
        sizes = [_VALUE] * len(buffers)

        def raw_put(part: range, names: list[str] = names, sizes: list[int] = sizes) -> list[Any]:
            codes = raw.batch_put_from(names[part.start : part.stop], addresses[part.start : part.stop], sizes[: len(part)])
            return list(codes)

        def raw_get(part: range, names: list[str] = names, sizes: list[int] = sizes) -> list[Any]:
            codes = raw.batch_get_into(names[part.start : part.stop], addresses[part.start : part.stop], sizes[: len(part)])
            return list(codes)

        def tier_put(part: range, keys: list[CacheKey] = keys) -> list[Any]:
            return tier.put(keys[part.start : part.stop], 0, buffers[part.start : part.stop])

        def tier_get(part: range, keys: list[CacheKey] = keys) -> list[Any]:
            return tier.get(keys[part.start : part.stop], 0, buffers[part.start : part.stop])

        order: list[tuple[str, _Call, _Call]] = [("raw", raw_put, raw_get), ("tier", tier_put, tier_get)]
        for who, put, get in order if number % 2 else order[::-1]:
            for operation, call in (("put", put), ("get", get)):
                began = time.perf_counter()
                answers = [answer for part in batches for answer in call(part)]
                good = _VALUE if operation == "get" else {"raw": 0, "tier": True}[who]
                if any(answer != good for answer in answers):
                    raise StorageError(f"mooncake: a {operation} failed during the benchmark ({who}): {answers}")
                if number:
                    times[operation, who].append(time.perf_counter() - began)
        tier.remove(keys, 0)
        for name in names:
            raw.remove(name, True)
    return times


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
