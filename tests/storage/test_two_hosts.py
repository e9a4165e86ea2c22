"""Two hosts as two network namespaces: one Mooncake store over TCP between them, a pool in each. Needs root and `ip`."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import eventually

if TYPE_CHECKING:
    from conftest import Store

pytestmark = pytest.mark.processes
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Names of two namespaces, joined by a link."""

    def __init__(self) -> None:
        self.names = [f"vc{os.getpid()}{side}" for side in "ab"]
        self.links = [f"ve{os.getpid()}{side}" for side in "ab"]
        self.children: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def link(self, state: str) -> None:
        """`up` or `down`."""
        _ip("-n", self.names[0], "link", "set", self.links[0], state)

    def start(self, host: int, store: Store, *arguments: str, ready: str) -> Host:
        env = {
            **os.environ,
            **store.env,
            "VCACHE_STORAGE_KIND": "mooncake",
            "VCACHE_STORAGE_DEADLINE": "2",
            "OMP_NUM_THREADS": "1",
        }
        env |= {"VCACHE_CACHE_CHUNK_SIZE": "16", "VCACHE_SEGMENT_KIND": "host", "VCACHE_SEGMENT_SIZE": "256KiB"}
        env |= {"VCACHE_SEGMENT_SLAB_SIZE": "64KiB", "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = str(Path(__file__).parents[1])
        child = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            env=env,
        )
        self.children.append(child)
        started = Host(child)
        eventually(lambda: ready in started.line(), 30, what=ready)
        return started

    def close(self) -> None:
        # Engines, the lender, and last the manager, which ends its master.
        for child in reversed(self.children):
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(10)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Host:
    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def line(self) -> str:
        assert self._child.stdout is not None
        assert select.select([self._child.stdout], [], [], 30)[0], "no answer"
        return self._child.stdout.readline()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{what}\n")
        found: dict[str, Any] = json.loads(self.line())
        return found


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and the program ip, to make network namespaces")
    made = Hosts()
    try:
        made.open()
    except subprocess.CalledProcessError as error:
        made.close()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.close()


def test_a_chunk_of_one_host_is_retrieved_on_the_other(hosts: Hosts, store: Store) -> None:
    store.options["master"] = f"{ADDRESSES[0]}:50051"
    socket = f"unix://{store.folder}/manager.sock"
    cli = ("-m", "vcache.cli")
    hosts.start(0, store, *cli, "serve", "--with-mooncake", "--address", socket, ready="manager ready")
    hosts.start(0, store, *cli, "lend", "--tier", "storage", "--size", "32MiB", ready="lending")
    engine = str(Path(__file__).with_name("netns_engine.py"))
    one, two = (hosts.start(host, store, engine, ready="ready") for host in (0, 1))
    assert eventually(lambda: one.ask("store 1")["written"], what="stored") == 4
    assert one.ask("store 2")["written"] == 8
    answer = eventually(lambda: (got := two.ask("retrieve 1"))["found"] and got, what="the other host joins")
    assert (answer["found"], answer["right"]) == (64, True)
    two.ask("store 3")
    assert one.ask("retrieve 3")["found"] == 64
    hosts.link("down")
    for _ in range(4):
        answer = two.ask("retrieve 2")
        assert answer["right"]
        assert answer["seconds"] < 2 * 1.2 * 2.0 + 1
    assert two.ask("retrieve 3")["found"] == 64, "its own pool goes on"
    hosts.link("up")
    answer = eventually(lambda: (got := two.ask("retrieve 2"))["found"] and got, 40, what="storage is back by itself")
    assert (answer["found"], answer["right"]) == (64, True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
