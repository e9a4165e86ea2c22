"""Mooncake's master, measured the way our manager is: `batch_is_exist` against a master on one core."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..errors import StorageError
from ..storage.mooncake_master import MooncakeMaster
from ..storage.mooncake_options import MooncakeOptions, find_master
from ..worker import Worker, WorkerError
from .processes import Cores, cpu_seconds, on_core
from .report import percentile

_RUN_TIMEOUT = 300.0
_THREADS = (1, 4, 8)
_LEASE = "--default_kv_lease_ttl=10000"
_HOW_TO = "pip install 'vcache[mooncake]' (and the system libraries libibverbs1, libcurl4, libnuma1), then run this again"


class MooncakeResult(NamedTuple):
    rows: list[dict[str, Any]]
    notes: list[str]
    """Why there are no rows, if there are none."""


class BenchMaster(NamedTuple):
    """A master of a benchmark's own, on this machine."""

    options: dict[str, str]
    process: MooncakeMaster


@contextmanager
def bench_master(*, core: int | None = None, flags: Sequence[str] = ()) -> Iterator[BenchMaster]:
    """A master until the block ends, on `core` if given. `flags`: further ones. Raises as `MooncakeMaster`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        options = {"master": f"127.0.0.1:{probe.getsockname()[1]}"}
    with on_core(core) if core is not None else nullcontext():
        master = MooncakeMaster(MooncakeOptions.parse(options), flags=flags)
    try:
        yield BenchMaster(options, master)
    finally:
        master.close()


def measure_mooncake(chunks: int, keys_per_request: int, seconds: float, cores: Cores) -> MooncakeResult:
    """Start a master on the server core, give it `chunks` keys and drive it from the client core. Blocks. What is missing is a
    note, not an error."""
    if find_master() is None or find_spec("mooncake") is None:
        return MooncakeResult([], [f"Mooncake is not installed, so there is no comparison: {_HOW_TO}"])
    try:
        with bench_master(core=cores.server, flags=[_LEASE]) as master:
            return _drive(master, chunks, keys_per_request, seconds, cores)
    except StorageError as error:
        return MooncakeResult([], [f"mooncake_master did not start ({error}); {_HOW_TO}"])
    except WorkerError as error:
        return MooncakeResult([], [f"the Mooncake client failed: {error}"])


def _drive(master: BenchMaster, chunks: int, keys_per_request: int, seconds: float, cores: Cores) -> MooncakeResult:
    """The client is a process of its own: its library starts threads and prints what it likes."""
    env = {**os.environ, "MC_LOG_LEVEL": "ERROR", "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
    with on_core(cores.client):
        client = Worker(MasterClient, {"master": master.options["master"], "chunks": chunks}, env=env, timeout=_RUN_TIMEOUT)
    try:
        present, server = client.ready().call(MasterClient.present), master.process.pid or 0
        rows = [client.call(MasterClient.measure, keys_per_request, threads, seconds, server) for threads in _THREADS]
    finally:
        client.kill()  # the store's threads may hold up a normal end for seconds
    notes = [] if present == chunks else [f"Mooncake held {present:,} of {chunks:,} keys; absent keys are cheaper to answer"]
    return MooncakeResult(rows, notes)


class MasterClient:
    """A client that has put `chunks` keys."""

    def __init__(self, master: str, chunks: int) -> None:
        """Raises `StorageError` when the store cannot be joined."""
        from mooncake.store import MooncakeDistributedStore

        self._store = MooncakeDistributedStore()
        code = self._store.setup("127.0.0.1", "P2PHANDSHAKE", 512 * 2**20, 64 * 2**20, "tcp", "", master)
        if code:
            raise StorageError(f"setup returned {code}")
        self._names = [f"chunk-{number:08d}" for number in range(chunks)]
        for start in range(0, chunks, 1000):
            names = self._names[start : start + 1000]
            self._store.put_batch(names, [bytes(64)] * len(names))

    def present(self) -> int:
        """How many of the keys are there."""
        return sum(1 for code in self._store.batch_is_exist(self._names) if code == 1)

    def measure(self, keys_per_request: int, threads: int, seconds: float, server: int) -> dict[str, Any]:
        """A row: random keys asked by `threads` threads; `server`: process id of the master."""
        chosen, store = random.Random(2), self._store
        requests = [chosen.sample(self._names, keys_per_request) for _ in range(256)]
        latencies: list[list[float]] = [[] for _ in range(threads)]
        start = threading.Barrier(threads + 1)

        def work(own: list[float], offset: int) -> None:
            start.wait()
            end = time.perf_counter() + seconds
            number = offset
            while (began := time.perf_counter()) < end:
                store.batch_is_exist(requests[number % len(requests)])
                own.append(time.perf_counter() - began)
                number += 1

        workers = [threading.Thread(target=work, args=(own, 31 * i)) for i, own in enumerate(latencies)]
        for worker in workers:
            worker.start()
        cpu = cpu_seconds(server)
        start.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        elapsed = time.perf_counter() - began
        cpu = cpu_seconds(server) - cpu
        every = [latency for own in latencies for latency in own]
        return {
            "server": "mooncake_master",
            "request": "batch_is_exist",
            "depth": threads,
            "keys_per_second": len(every) * len(requests[0]) / elapsed,
            "keys_per_cpu_second": len(every) * len(requests[0]) / cpu if cpu else None,
            "p50_us": 1e6 * percentile(every, 0.5),
            "p99_us": 1e6 * percentile(every, 0.99),
        }
