"""What happens when processes die or stop: never a wrong byte, never a hang, and capacity comes back."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import EngineProcess, eventually
from support.paged import spec_for

if TYPE_CHECKING:
    from conftest import Cluster


pytestmark = pytest.mark.processes
LAYOUT = "2BNHD"


def prompt(seed: int, count: int = 64) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(2**31) for i in range(count)]


def free_slots(engine: EngineProcess) -> tuple[int, int, int]:
    """(free + used, processing, quarantined) over all segments, as the manager counts."""
    free, processing, quarantined = engine.call("manager_stats")
    return free, processing, quarantined


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_writer_that_dies_or_stops_between_header_and_payload(cluster: Cluster, number: signal.Signals) -> None:
    spec = spec_for(LAYOUT)
    cluster.lend(size="64KiB", slab="64KiB")
    reader, writer = cluster.engine(spec), cluster.engine(spec)
    reader.store(prompt(0))
    capacity = free_slots(reader)[0]
    assert capacity >= 8
    tokens = prompt(1)
    writer.start("store_dying", int(number), LAYOUT, tokens, list(range(64)), 12, 8)
    # The writer's session ends (by disconnect, or by silence); its slots rest.
    eventually(lambda: free_slots(reader)[1:] != (0, 0), what="the write begins")
    eventually(lambda: free_slots(reader)[1] == 0, what="no slot in PROCESSING")
    assert reader.check(spec, tokens) == 0
    # Others fill the pool several times over, and never get wrong bytes.
    for seed in range(2, 12):
        reader.store(prompt(seed))
        reader.check(spec, prompt(seed))
    if number == signal.SIGSTOP:
        assert free_slots(reader)[2] > 0, "slots of a living writer are never handed out"
        writer.signal(signal.SIGCONT)
        assert writer.answer() is None
        for seed in range(2, 12):
            reader.check(spec, prompt(seed))
        eventually(lambda: writer.call("connected"), what="the writer reconnects")
    eventually(lambda: free_slots(reader) == (capacity, 0, 0), what="full capacity back")
    reader.store(tokens)
    assert reader.check(spec, tokens) == 64


def test_a_reader_that_dies_leaves_nothing_behind(cluster: Cluster) -> None:
    spec = spec_for(LAYOUT)
    cluster.lend(size="64KiB", slab="64KiB")
    writer, reader = cluster.engine(spec), cluster.engine(spec)
    writer.store(prompt(1))
    reader.call("hold_lease", prompt(1))
    reader.kill()
    eventually(lambda: writer.call("leases") == 0, what="leases of the dead fall")
    for seed in range(2, 12):
        writer.store(prompt(seed))
    assert writer.check(spec, prompt(11)) == 64


def test_a_lender_that_dies_costs_misses_and_nothing_else(cluster: Cluster) -> None:
    spec = spec_for(LAYOUT)
    lender = cluster.lend()
    a, b = cluster.engine(spec), cluster.engine(spec)
    a.store(prompt(1))
    assert b.check(spec, prompt(1)) == 64
    lender.kill()
    eventually(lambda: b.call("lookup", prompt(1)) == 0, what="chunks become misses")
    a.store(prompt(2))
    assert b.check(spec, prompt(2)) == 0
    cluster.lend()
    eventually(lambda: (a.store(prompt(3)), b.call("lookup", prompt(3)))[1] == 64, what="a new lender is used")
    assert b.check(spec, prompt(3)) == 64


def test_manager_restart_loses_nothing(cluster: Cluster) -> None:
    spec = spec_for(LAYOUT)
    cluster.lend()
    a = cluster.engine(spec, segment={"lend": True, "size": "1MiB", "slab_size": "256KiB"})
    b = cluster.engine(spec)
    for seed in range(8):
        a.store(prompt(seed))
    epoch = b.call("connected")
    cluster._commands[0].kill()
    # Without a manager: misses at once, no hang, no error.
    assert b.call("lookup", prompt(0), timeout=5) == 0
    b.store(prompt(99))
    assert b.check(spec, prompt(0)) == 0
    cluster.serve()
    eventually(lambda: b.call("connected") not in (0, epoch), what="reconnect")
    eventually(lambda: all(b.call("lookup", prompt(seed)) == 64 for seed in range(8)), what="everything is back")
    for seed in range(8):
        assert b.check(spec, prompt(seed)) == 64
        assert a.check(spec, prompt(seed)) == 64
    b.store(prompt(100))
    assert a.check(spec, prompt(100)) == 64


def test_a_stopped_manager_costs_one_deadline(cluster: Cluster) -> None:
    spec = spec_for(LAYOUT)
    cluster.lend()
    engine = cluster.engine(spec, manager={"deadline": 0.5})
    engine.store(prompt(1))
    cluster._commands[0].signal(signal.SIGSTOP)
    for _ in range(3):
        assert engine.call("lookup", prompt(1), timeout=5) == 0
    engine.store(prompt(2))
    cluster._commands[0].signal(signal.SIGCONT)
    eventually(lambda: engine.call("lookup", prompt(1)) == 64, what="service resumes")
    assert engine.check(spec, prompt(1)) == 64


def test_stale_locations_are_misses_and_counted(cluster: Cluster) -> None:
    spec = spec_for(LAYOUT)
    cluster.lend(size="64KiB", slab="64KiB")
    a, b = cluster.engine(spec), cluster.engine(spec)
    a.store(prompt(1))
    b.call("hold_lease", prompt(1))
    a.call("clear")
    for seed in range(2, 8):
        a.store(prompt(seed))
    assert b.call("load_held", prompt(1)) == [False] * 4
    assert b.call("stats")["counters"]["stale_reads"] == 4
    assert b.check(spec, prompt(7)) == 64


def test_an_engine_without_any_manager_starts_and_misses(make_cluster: Any) -> None:
    cluster = make_cluster(connect_timeout=0.2)
    spec = spec_for(LAYOUT)
    engine = cluster.engine(spec)
    assert engine.call("lookup", prompt(1)) == 0
    engine.store(prompt(1))
    cluster.serve()
    cluster.lend()
    eventually(lambda: engine.call("connected"), what="connects in the background")
    eventually(lambda: (engine.store(prompt(1)), engine.call("lookup", prompt(1)))[1] == 64, what="works")
