"""KV from one GPU to another through Mooncake's store over TCP: one process copies down and puts, another gets and copies up.

Part of `two_gpus.py`; each side is a process of its own, told what to do by JSON lines.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from gpu_vllm_world import Child, free_port, installed

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
    if not installed("mooncake"):
        raise RuntimeError("not installed: mooncake (pip install mooncake-transfer-engine-non-cuda; it needs libibverbs1)")
    master = find_master()
    if master is None:
        raise RuntimeError("not installed: mooncake_master is not on PATH")
    port, metrics = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="mooncake-bounce-"))
    command = [master, f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}", "--metrics_host=127.0.0.1"]
    log = (folder / "master.log").open("wb")
    process = subprocess.Popen([*command, "--default_kv_lease_ttl=5000", "--logtostderr=1"], stdout=log, stderr=log)
    sides: list[Child] = []
    try:
        wait_for(port, process)
        for name, environment in (("source", source), ("target", target)):
            # Only the source lends memory to the store: what the target gets comes over TCP.
            lent = 3 * max(sizes) if name == "source" else 0
            arguments = [sys.executable, __file__, f"127.0.0.1:{port}", str(lent), str(max(sizes)), device]
            sides.append(Child(folder, name, arguments, dict(environment)))
        for side in sides:
            found[f"{side.name} set up"] = side.take(60)
        found["rows"] = []
        for size in sizes:
            found["rows"].append(_size(sides[0], sides[1], size))
            write()
    finally:
        for side in sides:
            side.end()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _size(source: Child, target: Child, size: int) -> dict[str, Any]:
    seconds: list[dict[str, float]] = []
    rounds = _LARGE_ROUNDS if size >= _LARGE else _ROUNDS
    for number in range(rounds + 1):
        put = source.call("put", name=f"{size}-{number}", size=size, seed=number)
        got = target.call("get", name=f"{size}-{number}", size=size, seed=number)
        if not got["equal"]:
            raise RuntimeError(f"{size} bytes came through Mooncake with other content")
        source.call("remove", name=f"{size}-{number}", size=size)
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


def find_master() -> str | None:
    """Path of `mooncake_master`, beside this Python first."""
    return shutil.which("mooncake_master", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    import socket

    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.3).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("mooncake_master did not start") from None
            time.sleep(0.1)
        else:
            return


class Side:
    """One process: a buffer on the GPU, one in pinned memory that Mooncake knows, and a client of the store."""

    def __init__(self, master: str, lent: int, size: int, device: str) -> None:
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


def serve(master: str, lent: int, size: int, device: str) -> None:
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    try:
        side = Side(master, lent, size, device)
    except Exception as error:  # noqa: BLE001 - sent to the parent
        output.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    output.write(json.dumps({"seconds": time.perf_counter() - began}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"value": getattr(side, order["do"])(**order["with"])}
        except Exception as error:  # noqa: BLE001 - sent to the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        output.write(json.dumps(answer) + "\n")
    side.store.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
