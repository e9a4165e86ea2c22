"""Mooncake's master, measured the way our manager is: `batch_is_exist` against a master on one core."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .processes import Cores, cpu_seconds, on_core, stop
from .report import percentile

_START_TIMEOUT = 20.0
_RUN_TIMEOUT = 300.0
_THREADS = (1, 4, 8)
_HOW_TO = "pip install 'vcache[mooncake]' (and the system libraries libibverbs1, libcurl4, libnuma1), then run this again"


class MooncakeResult(NamedTuple):
    rows: list[dict[str, Any]]
    notes: list[str]
    """Why there are no rows, if there are none."""


def measure_mooncake(keys: list[bytes], keys_per_request: int, seconds: float, cores: Cores) -> MooncakeResult:
    """Start a master on the server core and drive it from the client core. Blocks. What is missing is a note, not an error."""
    master = find_master()
    if master is None or find_spec("mooncake") is None:
        return MooncakeResult([], [f"Mooncake is not installed, so there is no comparison: {_HOW_TO}"])
    rpc, metrics = _free_port(), _free_port()
    command = [master, f"--rpc_port={rpc}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}", "--metrics_host=127.0.0.1"]
    command += ["--default_kv_lease_ttl=10000", "--logtostderr=1"]
    with tempfile.TemporaryFile("w+") as words:
        with on_core(cores.server):
            server = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        try:
            if not _accepts(rpc, server):
                words.seek(0)
                return MooncakeResult(
                    [], [f"mooncake_master did not start ({' '.join(words.read().split()[-20:])}); {_HOW_TO}"]
                )
            return _drive(rpc, server.pid, len(keys), keys_per_request, seconds, cores)
        finally:
            stop(server)


def find_master() -> str | None:
    """Path of `mooncake_master`, beside this Python first."""
    return shutil.which("mooncake_master", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def _drive(rpc: int, server: int, chunks: int, keys_per_request: int, seconds: float, cores: Cores) -> MooncakeResult:
    """The client is a process of its own: its library starts threads and prints what it likes."""
    with on_core(cores.client):
        arguments = [str(rpc), str(server), str(chunks), str(keys_per_request), str(seconds)]
        env = {**os.environ, "MC_LOG_LEVEL": "ERROR", "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
        try:
            client = subprocess.run(
                [sys.executable, "-m", __name__, *arguments],
                capture_output=True,
                text=True,
                timeout=_RUN_TIMEOUT,
                env=env,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return MooncakeResult([], [f"the Mooncake client did not finish within {_RUN_TIMEOUT:g} s"])
    answer = next((line for line in client.stdout.splitlines() if line.startswith("{")), None)
    if answer is None:
        return MooncakeResult([], [f"the Mooncake client failed: {' '.join(client.stderr.split()[-30:])}"])
    found = json.loads(answer)
    return MooncakeResult(found["rows"], found["notes"])


def _accepts(port: int, server: subprocess.Popen[str]) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return True
        except OSError:
            time.sleep(0.05)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- the client process ------------------------------------------------------------------------------------------------


def _client(rpc: int, server: int, chunks: int, keys_per_request: int, seconds: float) -> dict[str, Any]:
    import random

    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", 512 * 2**20, 64 * 2**20, "tcp", "", f"127.0.0.1:{rpc}")
    if code:
        return {"rows": [], "notes": [f"Mooncake client: setup returned {code}"]}
    names = [f"chunk-{number:08d}" for number in range(chunks)]
    for start in range(0, chunks, 1000):
        store.put_batch(names[start : start + 1000], [bytes(64)] * len(names[start : start + 1000]))
    chosen = random.Random(2)
    requests = [chosen.sample(names, keys_per_request) for _ in range(256)]
    present = sum(1 for code in store.batch_is_exist(names) if code == 1)
    rows = [_measure(store.batch_is_exist, requests, threads, seconds, server) for threads in _THREADS]
    notes = [] if present == chunks else [f"Mooncake held {present:,} of {chunks:,} keys; absent keys are cheaper to answer"]
    return {"rows": rows, "notes": notes}


def _measure(
    call: Callable[[list[str]], object], requests: list[list[str]], threads: int, seconds: float, server: int
) -> dict[str, Any]:
    latencies: list[list[float]] = [[] for _ in range(threads)]
    start = threading.Barrier(threads + 1)

    def work(own: list[float], offset: int) -> None:
        start.wait()
        end = time.perf_counter() + seconds
        number = offset
        while (began := time.perf_counter()) < end:
            call(requests[number % len(requests)])
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


def main(arguments: list[str]) -> None:
    rpc, server, chunks, keys_per_request = map(int, arguments[:4])
    print(json.dumps(_client(rpc, server, chunks, keys_per_request, float(arguments[4]))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # the store's threads may hold up a normal exit for seconds
