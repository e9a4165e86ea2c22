"""Two hosts as two network namespaces: a store between them, and one pool over both. Needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.cluster import eventually
from two_hosts import ADDRESSES, DATA_ADDRESSES, DEADLINE, ENGINE, Host, Hosts

if TYPE_CHECKING:
    from conftest import Store

pytestmark = pytest.mark.processes
CLI = ("-m", "vcache.cli")
MANAGER = f"tcp://{ADDRESSES[0]}:7077"
BOUND = 2 * 1.2 * DEADLINE + 1


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


class Pool:
    """One manager on the first host; lenders and engines on both."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder
        self.token = folder / "token"
        self.token.write_text("a shared secret of the test\n")
        self.token.chmod(0o600)

    def env(self, host: int, **more: str) -> dict[str, str]:
        broker = self.folder / f"broker{host}"
        broker.mkdir(mode=0o700, exist_ok=True)
        return {
            "VCACHE_MANAGER_ADDRESS": MANAGER,
            "VCACHE_MANAGER_TOKEN_FILE": str(self.token),
            "VCACHE_MANAGER_SESSION_TIMEOUT": "3",
            "VCACHE_MANAGER_HEARTBEAT_INTERVAL": "0.5",
            "VCACHE_SEGMENT_BROKER_DIR": str(broker),
            "VCACHE_SEGMENT_REMOTE": "tcp",
            "VCACHE_SEGMENT_REMOTE_HOST": DATA_ADDRESSES[host],
            "VCACHE_CACHE_REMOTE": "tcp",
            **more,
        }

    def serve(self) -> Host:
        return self.hosts.start(0, self.env(0), *CLI, "serve", ready="manager ready")

    def lend(self, host: int, *arguments: str) -> Host:
        return self.hosts.start(host, self.env(host), *CLI, "lend", "--remote", "tcp", *arguments, ready="lending")

    def engine(self, host: int, head_size: int = 8, **env: str) -> Host:
        env = self.env(host, **{"VCACHE_SEGMENT_LEND": "false", **env})
        return self.hosts.start(host, env, ENGINE, str(head_size), ready="ready")


@pytest.fixture
def pool(hosts: Hosts, store: Store) -> Pool:
    """`store`: for its checks that Mooncake is there, and for a folder with a short path."""
    return Pool(hosts, store.folder)


def test_a_chunk_of_one_host_is_retrieved_on_the_other(hosts: Hosts, store: Store) -> None:
    store.options["master"] = f"{ADDRESSES[0]}:50051"
    env = {**store.env, "VCACHE_STORAGE_KIND": "mooncake"}
    socket = f"unix://{store.folder}/manager.sock"
    hosts.start(0, env, *CLI, "serve", "--with-mooncake", "--address", socket, ready="manager ready").wait_ready()
    hosts.start(0, env, *CLI, "lend-storage", "--size", "32MiB", ready="lending").wait_ready()
    engines = [hosts.start(host, env, ENGINE, ready="ready") for host in (0, 1)]
    one, two = (engine.wait_ready() for engine in engines)
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
        assert answer["seconds"] < BOUND
    assert two.ask("retrieve 3")["found"] == 64, "its own pool goes on"
    hosts.link("up")
    answer = eventually(lambda: (got := two.ask("retrieve 2"))["found"] and got, 40, what="storage is back by itself")
    assert (answer["found"], answer["right"]) == (64, True)


def test_memory_of_the_other_host_is_read(pool: Pool) -> None:
    """A lender on each host, an engine on each, no storage: both directions, and who has another secret stays out."""
    pool.serve().wait_ready()
    started = [pool.lend(0), pool.lend(1), pool.engine(0), pool.engine(1)]
    _, _, one, two = (each.wait_ready() for each in started)
    for writer, reader, seed in ((one, two, 1), (two, one, 2)):
        writer.ask(f"store {seed}")
        assert writer.ask(f"retrieve {seed}")["tiers"].keys() == {"dram"}
        answer = reader.ask(f"retrieve {seed}")
        assert (answer["found"], answer["right"]) == (64, True)
        assert answer["tiers"].keys() == {"remote"}
    other = pool.folder / "other"
    other.write_text("another secret\n")
    other.chmod(0o600)
    wrong = pool.hosts.start(1, pool.env(1, VCACHE_MANAGER_TOKEN_FILE=str(other)), *CLI, "lend", ready="lending")
    assert wrong.child.wait(30)
    (line,) = [line for line in wrong.errors().splitlines() if line.startswith("error:")]
    assert "wrong token" in line
    assert "Traceback" not in wrong.errors()


def test_own_memory_other_memory_and_storage_in_one_retrieve(pool: Pool, store: Store) -> None:
    store.options["master"] = f"{ADDRESSES[0]}:50051"
    storage = {**store.env, "VCACHE_STORAGE_KIND": "mooncake"}
    del storage["VCACHE_SEGMENT_BROKER_DIR"]
    env = pool.env(0, **storage)
    pool.hosts.start(0, env, *CLI, "serve", "--with-mooncake", ready="manager ready").wait_ready()
    # An engine with a pool of its own, which the others see nothing of: what it stores is in storage only.
    alone = {"VCACHE_MANAGER_ADDRESS": "embedded", "VCACHE_SEGMENT_LEND": "true", "VCACHE_SEGMENT_REMOTE": "off"}
    donor = pool.hosts.start(0, env, *CLI, "lend-storage", "--size", "32MiB", ready="lending")
    started = [donor, pool.lend(0), pool.lend(1), pool.engine(0), pool.engine(1, **storage), pool.engine(0, **storage, **alone)]
    _, _, _, one, two, third = (each.wait_ready() for each in started)
    assert eventually(lambda: third.ask("store 1")["written"], what="stored") == 4
    two.ask("store 1 16")
    one.ask("store 1 48")
    answer = eventually(lambda: (got := two.ask("retrieve 1"))["found"] == 64 and got, what="all three tiers")
    assert answer["right"]
    sizes = answer["tiers"]
    assert sizes.keys() == {"dram", "remote", "storage"}
    assert (sizes["remote"], sizes["storage"]) == (2 * sizes["dram"], sizes["dram"])


@pytest.mark.parametrize("addresses", [ADDRESSES, DATA_ADDRESSES], ids=["manager", "data"])
def test_the_link_is_cut_and_restored_during_reads(pool: Pool, addresses: tuple[str, str]) -> None:
    """`data`: only the way of the reads, so that the manager goes on to hand them out; `manager`: only the way to it."""
    pool.serve().wait_ready()
    started = [pool.lend(0, "--size", "16MiB", "--slab-size", "4MiB"), pool.engine(0, 256), pool.engine(1, 256)]
    _, one, two = (each.wait_ready() for each in started)
    for seed in range(4):
        one.ask(f"store {seed}")
    assert two.ask("read 1 4")["hits"] > 0
    two.begin("read 7 4")
    time.sleep(1)
    pool.hosts.link("down", addresses=addresses)
    time.sleep(3.5)
    pool.hosts.link("up", addresses=addresses)
    answer = two.answer()
    assert answer["wrong"] == 0
    assert answer["slowest"] < BOUND
    assert answer["hits"] < answer["calls"]
    if addresses == DATA_ADDRESSES:
        assert answer["counters"]["remote_errors"] > 0
        assert answer["counters"]["remote_bypassed"] > 0
    after = eventually(lambda: (got := two.ask("retrieve 1"))["found"] and got, 30, what="it is read again")
    assert (after["found"], after["right"]) == (64, True)
    answer = two.ask("read 1 4")
    assert (answer["wrong"], answer["hits"]) == (0, answer["calls"])


def test_a_lender_is_killed_while_it_is_read(pool: Pool) -> None:
    pool.serve().wait_ready()
    size = ("--size", "16MiB", "--slab-size", "4MiB")
    started = [pool.lend(0, *size), pool.engine(0, 256), pool.engine(1, 256)]
    lender, one, two = (each.wait_ready() for each in started)
    for seed in range(4):
        one.ask(f"store {seed}")
    two.begin("read 4 4")
    time.sleep(1)
    lender.kill()
    answer = two.answer()
    assert answer["wrong"] == 0
    assert 0 < answer["hits"] < answer["calls"]
    assert answer["slowest"] < BOUND
    pool.lend(0, *size).wait_ready()
    eventually(lambda: one.ask("store 5") and one.ask("retrieve 5")["found"], what="stored with the new lender")
    answer = eventually(lambda: (got := two.ask("retrieve 5"))["found"] and got, what="the new lender is read")
    assert (answer["found"], answer["right"]) == (64, True)


def test_chunks_are_overwritten_while_they_are_read(pool: Pool) -> None:
    """Half of the prompts fit: what host 1 stores evicts what host 2 reads. Now and then all is forgotten, leased or not: slots
    then go to the next writer in the middle of a read."""
    pool.serve().wait_ready()
    started = [pool.lend(0, "--size", "8MiB", "--slab-size", "4MiB"), pool.engine(0, 512), pool.engine(1, 512)]
    _, one, two = (each.wait_ready() for each in started)
    assert one.ask("flood 2 10")["stored"] > 0
    one.begin("flood 8 10 7")
    two.begin("read 8 10")
    answer, stored = two.answer(), one.answer()["stored"]
    assert answer["wrong"] == 0
    assert answer["hits"] > 0
    assert stored > 200, "chunks were evicted and stored again"
    assert answer["counters"]["remote_stale"] > 0, "slots were overwritten during reads"
