"""One client's large requests and bursts do not keep the others waiting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from manager_helpers import RawClient, serving

from vcache.bench.population import mount_population, random_keys
from vcache.manager import protocol, service
from vcache.segment.slots import SegmentInfo, SlabHeader, SlabInfo, SlabInventory, slab_bytes_for


def test_others_are_answered_while_a_large_inventory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager read all headers of a mount before it answered anybody else: with very many, calls of others, and even the
    lender's heartbeats, were not answered in time."""
    monkeypatch.setattr(service, "_WORK_SECONDS", 0.0)  # One slice for each turn of the loop.
    count = 20_000
    digests = random_keys(count)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        lender, other = server.client(role="lender"), server.client()
        mounting = threading.Thread(target=lambda: mount_population(lender, digests, slabs_per_segment=20))
        mounting.start()
        seen = set()
        while mounting.is_alive():
            seen.add(other.lookup(digests))
        mounting.join()
        assert other.lookup(digests) == count
        assert len(seen) > 1
        assert server.counter("recovered") == count
        for client in (lender, other):
            client.close()


def test_a_mount_that_is_repeated_or_taken_back_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets its answer, also one whose work was not finished."""
    monkeypatch.setattr(service, "_WORK_SECONDS", 0.0)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        raw = RawClient(server.address)
        raw.hello(client=b"r" * 16)
        slots = 5000
        nbytes = slab_bytes_for(256, slots)
        info = SegmentInfo(
            uuid=b"u" * 16, kind="host", host="h", device="host", broker="", owner=b"r" * 16, slabs=(SlabInfo(0, nbytes),)
        )
        headers = SlabInventory(0, SlabHeader(2, 256, slots).pack(), bytes(64) * slots)
        mount = protocol.frame(5, protocol.CALL, protocol.encode_request(protocol.Mount(info, [headers])))
        again = protocol.frame(6, protocol.CALL, protocol.encode_request(protocol.Mount(info, [headers])))
        raw.send(mount + again)
        answers = {}
        while {5, 6} - set(answers):
            frame = raw.receive()
            assert frame is not None
            answers[frame.request] = frame
        assert answers[5].code == protocol.ERROR
        assert "before all headers were read" in str(protocol.decode_error(answers[5].payload))
        assert answers[6].code == protocol.OK
        raw.close()
