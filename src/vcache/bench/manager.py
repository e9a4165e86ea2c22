"""`vcache bench manager`: key look-ups per second of one manager on one core, beside Mooncake's master on the same core."""

from __future__ import annotations

import random
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ProtocolError
from ..manager import wire
from ..manager.address import parse_address
from ..manager.connect import connect
from ..segment.slots import LOCATION_BYTES
from .mooncake_master import measure_mooncake
from .population import mount_population, random_keys
from .processes import Cores, choose_cores, cpu_seconds, manager_process, on_core
from .report import Column, Report, percentile, verdict

TARGET_KEYS_PER_SECOND = 500_000
TARGET_P99_MS = 1.0
TARGET_KEYS = 128

_TEMPLATES = 256
_LEASE = struct.Struct("<Q")

COLUMNS = (
    Column("server", "server"),
    Column("request", "request"),
    Column("depth", "depth", "d"),
    Column("keys_per_second", "keys/s", ",.0f"),
    Column("keys_per_cpu_second", "keys per CPU s", ",.0f"),
    Column("p50_us", "p50 µs", ",.0f"),
    Column("p99_us", "p99 µs", ",.0f"),
    Column("ratio", "of Mooncake", ".2f"),
)


class Driven(NamedTuple):
    """What one run of the driver saw. Latencies in seconds, one for each request."""

    keys_per_second: float
    latencies: list[float]


class Pipeline:
    """A raw session with the manager that keeps `depth` requests in flight, so that the client costs as little as it can."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(parse_address(address).path)
        self._buffer = wire.FrameBuffer(2**24)
        hello = wire.Hello(secrets.token_bytes(16), "bench", "tool")
        self._socket.sendall(wire.frame(1, wire.HELLO, wire.encode_hello(hello)))
        self._waiting: deque[wire.Frame] = deque()
        self._next()

    def close(self) -> None:
        self._socket.close()

    def acquire(self, requests: list[list[bytes]], depth: int, seconds: float) -> Driven:
        """Acquire leases on the keys of `requests`, in turn, and release each as soon as it was granted."""
        frames = [wire.frame(2, wire.ACQUIRE, wire.encode_acquire(b"".join(keys))) for keys in requests]
        wanted = 16 + LOCATION_BYTES * len(requests[0])

        def done(payload: bytes | bytearray) -> bytes:
            if len(payload) != wanted:
                raise ProtocolError(f"bench: a reply of {len(payload)} bytes instead of {wanted}: not all keys were found")
            return wire.frame(3, wire.RELEASE, payload[: _LEASE.size])

        return self._drive(frames, done, len(requests[0]), depth, seconds)

    def lookup(self, requests: list[list[bytes]], depth: int, seconds: float) -> Driven:
        frames = [wire.frame(2, wire.LOOKUP, b"".join(keys)) for keys in requests]
        wanted = wire.encode_count(len(requests[0]))

        def done(payload: bytes | bytearray) -> bytes:
            if payload != wanted:
                raise ProtocolError("bench: not all keys were found")
            return b""

        return self._drive(frames, done, len(requests[0]), depth, seconds)

    def _drive(
        self, frames: list[bytes], done: Callable[[bytes | bytearray], bytes], keys: int, depth: int, seconds: float
    ) -> Driven:
        clock, send = time.perf_counter, self._socket.sendall
        sent: deque[float] = deque()
        latencies: list[float] = []
        began = clock()
        for number in range(depth):
            sent.append(clock())
            send(frames[number % len(frames)])
        number, end = depth, began + seconds
        while sent:
            payload = self._next()
            now = clock()
            latencies.append(now - sent.popleft())
            after = done(payload)
            if now < end:
                sent.append(now)
                send(after + frames[number % len(frames)])
                number += 1
            elif after:
                send(after)
        return Driven(len(latencies) * keys / (clock() - began), latencies)

    def _next(self) -> bytes | bytearray:
        while not self._waiting:
            data = self._socket.recv(2**18)
            if not data:
                raise ProtocolError("bench: the manager closed the connection")
            self._buffer.feed(data)
            self._waiting.extend(frame for frame in self._buffer.frames() if frame.code != wire.PUSH)
        frame = self._waiting.popleft()
        if frame.code != wire.OK:
            raise wire.decode_error(frame.payload)
        return frame.payload


def bench_manager(keys_per_request: int, seconds: float, chunks: int, progress: Callable[[str], None]) -> Report:
    """Measure both servers in one run. Blocks for about six times `seconds`. `progress` is told each step."""
    cores = choose_cores()
    keys = random_keys(chunks)
    chosen = random.Random(2)
    requests = [chosen.sample(keys, keys_per_request) for _ in range(_TEMPLATES)]
    command = f"vcache bench manager --keys-per-request {keys_per_request} --seconds {seconds:g} --chunks {chunks}"
    report = Report(
        title=f"Manager: {chunks:,} chunks, {keys_per_request} random keys a request", command=command, columns=COLUMNS
    )
    report.rows = _our_rows(cores, keys, requests, seconds, progress)
    progress("mooncake_master")
    theirs = measure_mooncake(len(keys), keys_per_request, seconds, cores)
    report.rows += theirs.rows
    report.notes.append(_judged(report.rows, keys_per_request))
    report.notes += theirs.notes
    report.notes.append("keys per CPU s: per second of processor time that the server used; hardly depends on what else runs")
    add_ratios(report.rows)
    if cores.shared:
        report.notes.append("there is one usable core: client and server share it, so the rates are less than half")
    return report


def _our_rows(
    cores: Cores, keys: list[bytes], requests: list[list[bytes]], seconds: float, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = []
    keys_per_request = len(requests[0])
    with manager_process(cores.server) as manager, on_core(cores.client):
        progress(f"mounting {len(keys):,} chunks")
        api = connect(manager.config(), name="bench", role="lender", require=True)
        try:
            mount_population(api, keys)
            pipeline = Pipeline(manager.address)
            pipeline.acquire(requests, 8, min(0.5, seconds))  # warm up
            for name, drive, depth in (
                ("acquire+release", pipeline.acquire, 1),
                ("acquire+release", pipeline.acquire, 8),
                ("lookup", pipeline.lookup, 8),
            ):
                progress(f"{name}, depth {depth}")
                before = cpu_seconds(manager.pid)
                driven = drive(requests, depth, seconds)
                rows.append(_row(name, depth, driven, keys_per_request, cpu_seconds(manager.pid) - before))
            pipeline.close()
        finally:
            api.close()
    return rows


def _row(request: str, depth: int, driven: Driven, keys_per_request: int, cpu: float) -> dict[str, Any]:
    return {
        "server": "vcache",
        "request": request,
        "depth": depth,
        "keys_per_second": driven.keys_per_second,
        "keys_per_cpu_second": len(driven.latencies) * keys_per_request / cpu if cpu else None,
        "p50_us": 1e6 * percentile(driven.latencies, 0.5),
        "p99_us": 1e6 * percentile(driven.latencies, 0.99),
    }


def _judged(rows: list[dict[str, Any]], keys_per_request: int) -> str:
    rate = max(row["keys_per_second"] for row in rows if row["request"] == "acquire+release")
    p99 = next(row["p99_us"] for row in rows if row["request"] == "acquire+release" and row["depth"] == 1) / 1e3
    met = rate >= TARGET_KEYS_PER_SECOND and p99 < TARGET_P99_MS
    target = f"{TARGET_KEYS_PER_SECOND:,} keys/s with leases, p99 below {TARGET_P99_MS:g} ms at depth 1"
    note = verdict(target, met, of=f"{TARGET_KEYS} keys a request", ran=f"{keys_per_request} keys a request")
    return f"{note}; measured {rate:,.0f} keys/s, p99 {p99:.2f} ms"


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each of our rows against Mooncake's at the same depth: one request at a time, or its best with several."""
    for row in rows:
        depth_one = row["depth"] == 1
        theirs = [r["keys_per_second"] for r in rows if r["server"] != "vcache" and (r["depth"] == 1) == depth_one]
        if row["server"] == "vcache" and theirs:
            row["ratio"] = row["keys_per_second"] / max(theirs)
