"""KV from one GPU to another through Mooncake's store over TCP: one process copies down and puts, another gets and copies up.

Part of `two_gpus.py`; each side is a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

from gpu_parts import python_path
from gpu_vllm_world import Worker, installed

MIB = 2**20
VALUE = 4 * MIB
"""Bytes of one value. Eight values in a call."""
_BATCH = 8
_ROUNDS, _LARGE_ROUNDS, _LARGE = 5, 3, 512 * MIB


def measure(
    sizes: list[int],
    source: Mapping[str, str],
    target: Mapping[str, str],
    device: str,
    found: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """GB/s by size into `found["rows"]`. `source`, `target`: environments of the two sides. Raises `RuntimeError` without
    Mooncake."""
    from vcache.bench.mooncake_master import bench_master

    if not installed("mooncake"):
        raise RuntimeError("not installed: mooncake (pip install mooncake-transfer-engine-non-cuda; it needs libibverbs1)")
    with ExitStack() as stack:
        master = stack.enter_context(bench_master(flags=["--default_kv_lease_ttl=5000"])).options["master"]
        sides = []
        for name, environment in (("source", source), ("target", target)):
            # Only the source lends memory to the store: what the target gets comes over TCP.
            lent = 3 * max(sizes) if name == "source" else 0
            arguments = {"master": master, "lent": lent, "size": max(sizes), "device": device}
            sides.append(stack.enter_context(Worker(Side, arguments, name=name, env=python_path(**environment))))
        for side in sides:
            found[f"{side.name} set up"] = {"seconds": side.ready(60).call(Side.set_up)}
        found["rows"] = []
        for size in sizes:
            found["rows"].append(_size(sides[0], sides[1], size))
            write()


def _size(source: Worker, target: Worker, size: int) -> dict[str, Any]:
    seconds: list[dict[str, float]] = []
    rounds = _LARGE_ROUNDS if size >= _LARGE else _ROUNDS
    for number in range(rounds + 1):
        put = source.call(Side.put, name=f"{size}-{number}", size=size, seed=number)
        got = target.call(Side.get, name=f"{size}-{number}", size=size, seed=number)
        if not got["equal"]:
            raise RuntimeError(f"{size} bytes came through Mooncake with other content")
        source.call(Side.remove, name=f"{size}-{number}", size=size)
        if number:
            seconds.append({"down": put["copy"], "put": put["store"], "get": got["store"], "up": got["copy"]})
    totals = [sum(each.values()) for each in seconds]
    return {
        "path": "Mooncake over TCP",
        "nbytes": size,
        "gbps": size / median(totals) / 1e9,
        "gbps_low": size / max(totals) / 1e9,
        "gbps_high": size / min(totals) / 1e9,
        "ms": {name: 1e3 * median(each[name] for each in seconds) for name in ("down", "put", "get", "up")},
        "runs": rounds,
    }


class Side:
    """One process: a buffer on the GPU, one in pinned memory that Mooncake knows, and a client of the store."""

    def __init__(self, master: str, lent: int, size: int, device: str) -> None:
        began = time.perf_counter()
        import torch
        from mooncake.store import MooncakeDistributedStore

        self.torch, self.device = torch, torch.device(device)
        self.kv = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self.pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self.store = MooncakeDistributedStore()
        code = self.store.setup("127.0.0.1", "P2PHANDSHAKE", lent, 64 * MIB, "tcp", "", master)
        if code:
            raise RuntimeError(f"Mooncake's setup failed with {code}")
        if code := self.store.register_buffer(self.pinned.data_ptr(), size):
            raise RuntimeError(f"Mooncake's register_buffer failed with {code}")
        self._set_up = time.perf_counter() - began

    def set_up(self) -> float:
        """Seconds that it took to make this."""
        return self._set_up

    def close(self) -> None:
        self.store.close()

    def put(self, name: str, size: int, seed: int) -> dict[str, float]:
        self.kv[:size] = self._content(size, seed)
        self._settle()
        began = time.perf_counter()
        self.pinned[:size].copy_(self.kv[:size])
        self._settle()
        copied = time.perf_counter()
        self._batches(name, size, self.store.batch_put_from, 0)
        return {"copy": copied - began, "store": time.perf_counter() - copied}

    def get(self, name: str, size: int, seed: int) -> dict[str, float | bool]:
        self.kv[:size].zero_()
        self._settle()
        began = time.perf_counter()
        self._batches(name, size, self.store.batch_get_into, VALUE)
        stored = time.perf_counter()
        self.kv[:size].copy_(self.pinned[:size])
        self._settle()
        seconds = time.perf_counter() - stored
        equal = bool(self.torch.equal(self.kv[:size], self._content(size, seed)))
        return {"store": stored - began, "copy": seconds, "equal": equal}

    def remove(self, name: str, size: int) -> None:
        for number in range(size // VALUE):
            self.store.remove(f"{name}/{number}", True)

    def _batches(self, name: str, size: int, call: Callable[..., list[int]], good: int) -> None:
        address = self.pinned.data_ptr()
        for first in range(0, size // VALUE, _BATCH):
            numbers = range(first, min(first + _BATCH, size // VALUE))
            keys = [f"{name}/{number}" for number in numbers]
            codes = call(keys, [address + number * VALUE for number in numbers], [VALUE] * len(keys))
            if any(code != good for code in codes):
                raise RuntimeError(f"Mooncake: {call.__name__} answered {list(codes)}")

    def _content(self, size: int, seed: int) -> Any:
        base = self.torch.arange(size // 8, dtype=self.torch.int64, device=self.device)
        return (base * 0x9E3779B1 + seed).view(self.torch.uint8)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.current_stream(self.device).synchronize()
