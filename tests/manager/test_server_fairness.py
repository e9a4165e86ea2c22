"""One client's large requests and bursts do not keep the others waiting."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from manager_helpers import RawClient, serving, wait_until

from vcache.bench.population import mount_population, random_keys
from vcache.manager import wire
from vcache.manager.api import GateReport, Mount, Stats, Verb
from vcache.manager.directory.directory import Directory
from vcache.manager.server import sessions
from vcache.manager.server.session import Session
from vcache.segment.slots import SegmentInfo, SlabHeader, SlabInfo, SlabInventory, slab_bytes_for


def test_others_are_answered_while_a_large_inventory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager read all headers of a mount before it answered anybody else: with very many, calls of others, and even the
    lender's heartbeats, were not answered in time."""
    monkeypatch.setattr(sessions, "_WORK_SECONDS", 0.0)  # One slice for each turn of the loop.
    count = 20_000
    digests = random_keys(count)
    work = Directory.work
    partly = threading.Event()
    patience = time.monotonic() + 30.0

    def unhurried(self: Directory, now: float) -> None:
        """The reading goes on, after its first slabs, only when the other client had an answer: however busy the machine."""
        if 2000 <= self.stats(now).counters["recovered"] < count and not partly.is_set() and time.monotonic() < patience:
            return
        work(self, now)

    monkeypatch.setattr(Directory, "work", unhurried)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        lender, other = server.client(role="lender", deadline=20.0), server.client(deadline=20.0)
        mounting = threading.Thread(target=lambda: mount_population(lender, digests, slabs_per_segment=20))
        mounting.start()
        seen = set()
        while mounting.is_alive():
            seen.add(other.lookup(digests))
            if len(seen | {0, count}) > 2:
                partly.set()
        mounting.join()
        assert other.lookup(digests) == count
        assert len(seen | {0, count}) > 2, f"no answer while headers were being read: {seen}"
        assert server.counter("recovered") == count
        for client in (lender, other):
            client.close()


def test_a_mount_that_is_repeated_or_taken_back_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets its answer, also one whose work was not finished."""
    monkeypatch.setattr(sessions, "_WORK_SECONDS", 0.0)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        raw = RawClient(server.address)
        raw.hello(client=b"r" * 16)
        slots = 5000
        nbytes = slab_bytes_for(256, slots)
        info = SegmentInfo(
            uuid=b"u" * 16, kind="host", host="h", device="host", broker="", owner=b"r" * 16, slabs=(SlabInfo(0, nbytes),)
        )
        headers = SlabInventory(0, SlabHeader(2, 256, slots).pack(), bytes(64) * slots)
        mount = wire.frame(5, *wire.encode_verb(Mount(info, [headers], GateReport())))
        # Small, so that it is there by the time the first one's headers are being read.
        again = wire.frame(6, *wire.encode_verb(Mount(info, [], GateReport())))
        raw.send(mount + again)
        answers = {}
        while {5, 6} - set(answers):
            frame = raw.receive()
            assert frame is not None
            answers[frame.request] = frame
        assert answers[5].code == wire.ERROR
        assert "before all headers were read" in str(wire.decode_error(answers[5].payload))
        assert answers[6].code == wire.OK
        raw.close()


def test_a_burst_of_one_client_is_answered_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that one client had sent at once was answered before anybody else was: 20,000 small requests kept the others waiting
    for a second, and newcomers outside."""
    order: list[str] = []
    finish = sessions.Sessions.finish

    def record(self: sessions.Sessions, session: Session, number: int, verb: Verb[Any], reply: object) -> object:
        order.append(session.name)
        return finish(self, session, number, verb, reply)

    monkeypatch.setattr(sessions.Sessions, "finish", record)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        other, raw = server.client(name="other", heartbeat_interval=5.0), RawClient(server.address)
        raw.hello()
        count = 10_000
        request = wire.encode_verb(Stats())[1]
        raw.send(b"".join(wire.frame(number, wire.CALL, request) for number in range(1, count + 1)))
        wait_until(lambda: len(order) > 10, what="the burst has begun")
        newcomer = server.client(name="newcomer", heartbeat_interval=5.0)
        newcomer.segments()
        other.segments()
        assert order.count("raw") < count, "the others waited for the end of the burst"
        for number in range(1, count + 1):
            frame = raw.receive()
            assert frame is not None
            assert (frame.request, frame.code) == (number, wire.OK)
        assert order.count("raw") == count
        for client in (other, newcomer):
            client.close()
        raw.close()
