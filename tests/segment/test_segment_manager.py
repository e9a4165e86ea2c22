"""`Lender` and `SegmentMap` with the real manager: embedded, and as a process that is killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from segment_support import MiB, eventually, segment_config

from vcache.config import ManagerConfig, VCacheConfig
from vcache.lender.lender import Lender
from vcache.manager.api import Push, PutGrant, PutRequest, SegmentGone, SegmentMounted, SessionInfo, Ticket
from vcache.manager.client import Manager
from vcache.manager.loopback import Loopback
from vcache.manager.socket_transport import SocketTransport
from vcache.segment.host import HostBacking
from vcache.segment.mapping import SegmentMap
from vcache.segment.slots import HEADER_BYTES, SlabHeader, SlotHeader, SlotLocation

SLOT = 64 * 1024
NAMESPACE = b"n" * 16
KEYS = [bytes([number]) * 16 for number in range(1, 9)]


class Watcher:
    """Keeps a `SegmentMap` in step, as an engine does."""

    def __init__(self, segments: SegmentMap) -> None:
        self.segments = segments
        self.epoch = 0

    def on_session(self, session: SessionInfo) -> None:
        if session.epoch != self.epoch:
            self.segments.forget_all()
            self.epoch = session.epoch

    def on_disconnect(self) -> None:
        pass

    def on_push(self, push: Push) -> None:
        if isinstance(push, SegmentMounted):
            self.segments.update(push.info)
        elif isinstance(push, SegmentGone):
            self.segments.forget(push.number)


class Client:
    """Writes and reads chunks by hand, header protocol included."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.map = SegmentMap(manager.client_id, "here", {"host": lambda device: HostBacking()})
        manager.subscribe(Watcher(self.map))

    def begin(self, keys: list[bytes], parent: bytes = b"", first: int = 0) -> list[PutGrant]:
        """Tickets, and headers that announce the writes."""
        request = PutRequest(
            keys=keys,
            namespace=NAMESPACE,
            parent=parent,
            first_index=first,
            tokens=[256] * len(keys),
            slot_bytes=SLOT,
            avoid=self.map.unreachable(),
        )
        grants = self.manager.put_start(request)
        for index, (key, grant) in enumerate(zip(keys, grants, strict=True)):
            if grant.location is not None:
                self._write(key, grant, first + index, announce=True)
        return grants

    def store(self, keys: list[bytes], parent: bytes = b"", first: int = 0) -> int:
        """Number of chunks published."""
        grants = self.begin(keys, parent, first)
        tickets = []
        for index, (key, grant) in enumerate(zip(keys, grants, strict=True)):
            if grant.location is not None:
                self._write(key, grant, first + index, announce=False)
                tickets.append(Ticket(key, 0, grant.location.generation))
        return sum(self.manager.put_end(tickets))

    def load(self, keys: list[bytes]) -> int:
        """Number of leading chunks whose verified bytes are right."""
        reply = self.manager.acquire(keys)
        good = 0
        for index, (key, location) in enumerate(zip(keys, reply.locations, strict=False)):
            if self._read(key, location, index) != payload(key):
                break
            good += 1
        self.manager.release(reply.lease)
        return good

    def close(self) -> None:
        self.map.close()
        self.manager.close()

    def _write(self, key: bytes, grant: PutGrant, index: int, *, announce: bool) -> None:
        location = grant.location
        assert location is not None
        slot = self.map.pin(location)
        assert slot is not None
        memory = slot.slab.buffer
        assert memory is not None
        header = SlotHeader(0, 1, location.generation, key, NAMESPACE, SLOT, 256, index)
        if announce:
            slab = SlabHeader(grant.format_generation, location.slot_bytes, grant.slots).pack()
            memory[:HEADER_BYTES] = slab
            header = header.writing(self.manager.client_id)
        else:
            memory[slot.payload_offset : slot.payload_offset + SLOT] = payload(key)
        memory[slot.header_offset : slot.header_offset + HEADER_BYTES] = header.pack()
        self.map.unpin(slot)

    def _read(self, key: bytes, location: SlotLocation, index: int) -> bytes | None:
        slot = self.map.pin(location)
        if slot is None:
            return None
        try:
            expected = SlotHeader(0, 1, location.generation, key, NAMESPACE, SLOT, 256, index).pack()
            data = self.map.read(slot.slab, slot.payload_offset, SLOT)
            return data if self.map.read(slot.slab, slot.header_offset, HEADER_BYTES) == expected else None
        finally:
            self.map.unpin(slot)


def payload(key: bytes) -> bytes:
    return key * (SLOT // len(key))


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[tuple[Manager, Lender, Client]]:
    manager = Manager(Loopback(ManagerConfig()))
    lender = Lender(manager, HostBacking(), segment_config(tmp_path / "broker"), host="here")
    client = Client(manager)
    client.map.add_local(lender.uuid, lender.slab, lender.backing)
    assert lender.wait_mounted(5)
    eventually(client.map.segments)
    yield manager, lender, client
    lender.close()
    client.close()


def test_embedded_store_load_and_remove(embedded: tuple[Manager, Lender, Client]) -> None:
    manager, lender, client = embedded
    assert client.store(KEYS) == 8
    assert client.load(KEYS) == 8
    reply = manager.acquire(KEYS[:1])
    location = reply.locations[0]
    manager.release(reply.lease)
    assert manager.clear() == 8
    slab = lender.slab(location.slab)
    assert slab is not None
    assert lender.backing.read(slab, HEADER_BYTES, 15 * HEADER_BYTES) == bytes(15 * HEADER_BYTES)
    assert client.load(KEYS) == 0
    assert isinstance(manager.transport, Loopback)
    manager.transport.check_integrity()


def test_embedded_shrink_and_growth(embedded: tuple[Manager, Lender, Client]) -> None:
    manager, lender, client = embedded
    assert client.store(KEYS) == 8
    report = lender.shrink(2 * MiB)
    assert (report.slabs, report.late) == (2, ())
    assert client.load(KEYS) == 0
    manager.request_resize(lender.uuid, 3 * MiB)
    eventually(lambda: lender.payload_bytes == 3 * MiB)
    assert lender.wait_mounted(5)
    eventually(lambda: len(client.map.segments()[0].slabs) == 3)
    assert client.store(KEYS) == 8
    assert client.load(KEYS) == 8
    assert isinstance(manager.transport, Loopback)
    manager.transport.check_integrity()


@contextmanager
def served(folder: Path) -> Iterator[ManagerConfig]:
    """A manager process; leaving kills it."""
    file = folder / "vcache.yaml"
    file.write_text(
        f"manager: {{address: 'unix://{folder}/manager.sock', heartbeat_interval: 0.2, session_timeout: 2, quarantine: 0.1}}"
    )
    script = (
        "import sys\nfrom vcache.config import VCacheConfig\nfrom vcache.manager.server.server import run_server\n"
        "run_server(VCacheConfig.from_file(sys.argv[1], env={}), ready=lambda address: print('ready', flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield VCacheConfig.from_file(file, env={}).manager
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.processes
def test_chunks_survive_a_killed_manager_and_a_dead_writers_slot_comes_back(tmp_path: Path) -> None:
    with served(tmp_path) as config:
        lending = Manager(SocketTransport(config, role="lender"))
        lender = Lender(lending, HostBacking(), segment_config(tmp_path / "broker", MiB), host="here")
        reader, writer = Client(Manager(SocketTransport(config))), Client(Manager(SocketTransport(config)))
        assert lender.wait_mounted(10)
        eventually(reader.map.segments)
        eventually(writer.map.segments)
        assert reader.store(KEYS[:4]) == 4
        capacity = reader.manager.stats().segments[0].slots_free + 4
        # It dies between header and payload, and while the manager is away.
        assert [grant.status for grant in writer.begin(KEYS[4:6], KEYS[3], 4)] == ["granted"] * 2
    writer.close()
    eventually(lambda: lender.importers() == {reader.manager.client_id})
    with served(tmp_path):
        eventually(lambda: lender.mounted, 10)
        eventually(lambda: reader.manager.epoch and reader.map.segments(), 10)
        assert reader.load(KEYS) == 4
        eventually(lambda: reader.manager.stats().segments[0].slots_free == capacity - 4, 10)
        assert reader.store(KEYS[4:], KEYS[3], 4) == 4
        assert reader.load(KEYS) == 8
        reader.map.check_integrity()
        reader.close()
        lender.close()
        lending.close()
    assert not os.path.exists(lender.info.broker)
