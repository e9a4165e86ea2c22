"""How long a manager that was killed needs to know all chunks of one lender again, and how long others wait meanwhile.

usage: bench_recovery.py [CHUNKS]        1,000,000 by default: takes about two minutes and 1 GiB of memory

The chunks are headers without payload. A witness on a connection of its own looks up 32 keys two hundred times a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event

from vcache.bench.population import mount_population, random_keys
from vcache.bench.processes import clean_environment, running
from vcache.bench.report import percentile
from vcache.config import ManagerConfig
from vcache.errors import VCacheError
from vcache.manager.api import WipeSlots
from vcache.manager.client import Manager
from vcache.manager.socket_transport import SocketTransport

KEYS = 32
PERIOD = 0.005


class Zeroer:
    """A lender's answer to `WipeSlots`, without memory behind it."""

    def __init__(self) -> None:
        self.client: Manager | None = None

    def on_session(self, session: object) -> None:
        pass

    def on_disconnect(self) -> None:
        pass

    def on_push(self, push: object) -> None:
        if isinstance(push, WipeSlots) and self.client is not None:
            self.client.wiped(push.token)


def lend(address: str, chunks: int, mounted: Event) -> None:
    """Mount all chunks as one segment, whenever there is a session that has not got them. Runs until it is killed."""
    keys = random_keys(chunks)
    client = Manager(SocketTransport(ManagerConfig(address=address), name="lender", role="lender"))
    zeroer = Zeroer()
    zeroer.client = client
    client.subscribe(zeroer)
    epoch = 0
    while True:
        if client.wait_connected(1.0) and client.epoch not in (0, epoch):
            try:
                asked, begun = client.epoch, time.perf_counter()
                mount_population(client, keys, slabs_per_segment=-(-chunks // 1000))
                print(f"  mount: {time.perf_counter() - begun:.1f} s, the inventory's making included", flush=True)
                epoch = asked
                mounted.set()
            except VCacheError as error:
                print(f"  mount: {error}", flush=True)
        else:
            time.sleep(0.01)


class Witness:
    """Looks keys up and writes down how long each answer took, in seconds."""

    def __init__(self, address: str, chunks: int) -> None:
        self._client = Manager(SocketTransport(ManagerConfig(address=address), name="witness", role="tool"))
        self._keys = random_keys(chunks)
        self._chosen = random.Random(3)
        self.taken: list[float] = []
        self.failed = 0

    def watch(self, what: str, done: Callable[[], bool]) -> None:
        """Look up until `done`, and print what was seen."""
        self.taken, self.failed = [], 0
        begun = due = time.perf_counter()
        while not done():
            due += PERIOD
            self._ask()
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - PERIOD)
        taken = self.taken or [0.0]
        print(
            f"{what}: {time.perf_counter() - begun:.1f} s; {len(self.taken)} look-ups of others, p50 "
            f"{1e3 * percentile(taken, 0.5):.2f} ms, p99 {1e3 * percentile(taken, 0.99):.2f} ms, longest "
            f"{1e3 * max(taken):.1f} ms; {self.failed} failed",
            flush=True,
        )

    def found(self, count: int) -> bool:
        """Whether `count` random chunks are all there."""
        try:
            return all(self._client.lookup([key]) == 1 for key in self._chosen.sample(self._keys, count))
        except VCacheError:
            return False

    def _ask(self) -> None:
        begun = time.perf_counter()
        try:
            self._client.lookup(self._chosen.sample(self._keys, KEYS))
        except VCacheError:
            self.failed += 1
        else:
            self.taken.append(time.perf_counter() - begun)


def main(chunks: int) -> None:
    context = multiprocessing.get_context("spawn")
    mounted = context.Event()
    with tempfile.TemporaryDirectory(prefix="vcache-bench-") as folder:
        address = f"unix://{folder}/manager.sock"
        command = [sys.executable, "-m", "vcache.cli", "serve", "--address", address]
        lender = context.Process(target=lend, args=(address, chunks, mounted), daemon=True)
        lender.start()
        witness = Witness(address, chunks)
        with running(command, address, env=clean_environment()) as manager:
            witness.watch("first mount", mounted.is_set)
            end = time.perf_counter() + 3
            witness.watch("at rest", lambda: time.perf_counter() > end)
            os.kill(manager.pid, signal.SIGKILL)
            manager.wait()
        mounted.clear()
        with running(command, address, env=clean_environment()) as manager:
            witness.watch("recovery", mounted.is_set)
            print(f"all found: {witness.found(1000)}")
            clearing = context.Process(target=clear, args=(address,))
            clearing.start()
            witness.watch("clear", lambda: not clearing.is_alive())
            os.kill(manager.pid, signal.SIGKILL)
            manager.wait()
        mounted.clear()
        with running(command, address, env=clean_environment()):
            witness.watch("second recovery", mounted.is_set)
            lender.kill()
            lender.join()
            end = time.perf_counter() + 3
            witness.watch("the lender's end", lambda: time.perf_counter() > end)


def clear(address: str) -> None:
    client = Manager(SocketTransport(ManagerConfig(address=address), name="clear", role="tool"))
    client.wait_connected(5.0)
    begun = time.perf_counter()
    print(f"  clear: {client.clear():,} chunks, {time.perf_counter() - begun:.1f} s", flush=True)
    client.close()


if __name__ == "__main__":
    main(int(sys.argv[1].replace(",", "")) if len(sys.argv) > 1 else 1_000_000)
