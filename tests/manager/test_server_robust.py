"""Nothing that a peer sends, or fails to read, stops the server: that one connection closes, everybody else goes on."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manager_helpers import (
    NAMESPACE,
    RawClient,
    Recorder,
    ServerThread,
    key,
    keys,
    put_request,
    segment_of,
    serving,
    store,
    wait_until,
)

from vcache.config import ByteSize
from vcache.errors import ManagerRefusedError
from vcache.manager import wire
from vcache.manager.api import (
    WIPE_TIMEOUT,
    AddSlabs,
    Clear,
    DropSlabs,
    GateReport,
    GateWriter,
    ImporterGone,
    InventoryPart,
    Mount,
    Remove,
    RequestResize,
    SegmentGone,
    SegmentMounted,
    Segments,
    Stats,
    UndoneSlots,
    Unmount,
    Wiped,
    WipeSlots,
    WritersLeft,
)
from vcache.manager.client import Manager
from vcache.manager.directory.reading import Reading
from vcache.manager.server import session, sessions, strangers
from vcache.segment.slots import SegmentInfo, SlabInfo, SlabInventory

MAX_FRAME = 2**16
SEGMENTS = wire.encode_verb(Segments())[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, serving(f"unix://{folder}/m.sock", max_frame=ByteSize(MAX_FRAME)) as running:
        patch.setattr(strangers, "LOG_INTERVAL", 0.0)
        yield running


@pytest.fixture(scope="module")
def witness(server: ServerThread) -> Iterator[Manager]:
    """The other client, who must never notice anything."""
    client = server.client(name="witness")
    client.mount(segment_of(client, 7))
    store(client, keys(1, 3))
    # Well-formed nonsense may be a store, for which chunks that nobody reads are evicted.
    client.acquire(keys(1, 3))
    yield client
    client.close()


def still_serves(witness: Manager) -> None:
    assert witness.lookup(keys(1, 3)) == 3
    assert len(witness.segments()) == 1


OPENERS = {
    "oversized length": struct.pack("<IIB", 2**31, 1, wire.HELLO),
    "length of nothing": struct.pack("<IIB", 0, 1, wire.HELLO),
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "verb before hello": wire.frame(1, wire.LOOKUP, key(1)),
    "hello without body": wire.frame(1, wire.HELLO, b""),
    "hello with a broken body": wire.frame(1, wire.HELLO, b"VCMG\x01\x00\xff\xff"),
    "hello with a short id": wire.frame(
        1, wire.HELLO, b"VCMG\x01\x00" + msgspec.msgpack.encode([b"short", "n", "engine", "h", b""])
    ),
    "hello larger than a stranger may send": wire.frame(1, wire.HELLO, b"VCMG\x01\x00" + bytes(10_000)),
}


@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS.keys())
def test_strangers_are_sent_away(
    server: ServerThread, witness: Manager, opener: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    rejected = server.counter("connections_rejected")
    raw = RawClient(server.address)
    raw.send(opener)
    assert raw.last_words()
    raw.close()
    assert server.counter("connections_rejected") == rejected + 1
    assert len([record for record in caplog.records if "closed:" in record.message]) == 1, "one line, with the reason"
    still_serves(witness)


BROKEN = {
    "oversized frame": struct.pack("<IIB", MAX_FRAME, 2, wire.LOOKUP),
    "keys of odd length": wire.frame(2, wire.LOOKUP, bytes(17)),
    "acquire without lease": wire.frame(2, wire.ACQUIRE, bytes(5)),
    "release of three bytes": wire.frame(2, wire.RELEASE, bytes(3)),
    "unknown verb": wire.frame(2, 99, b""),
    "a status as verb": wire.frame(2, wire.OK, b""),
    "request id 0": wire.frame(0, wire.LOOKUP, key(1)),
    "second hello": wire.frame(2, wire.HELLO, b""),
    "broken msgpack": wire.frame(2, wire.CALL, b"\xc1"),
    "unknown request": wire.frame(2, wire.CALL, msgspec.msgpack.encode(["Exec", "rm"])),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_broken_frames_close_their_connection_only(server: ServerThread, witness: Manager, broken: bytes) -> None:
    raw = RawClient(server.address)
    raw.hello()
    raw.send(wire.frame(1, wire.LOOKUP, b"".join(keys(1, 3))) + broken)
    words = raw.last_words()
    assert words
    raw.close()
    wait_until(lambda: server.gauge("sessions") == 1, what="its session ended")
    still_serves(witness)


def test_answers_before_a_broken_frame_still_arrive(server: ServerThread, witness: Manager) -> None:
    raw = RawClient(server.address)
    raw.hello()
    raw.send(wire.frame(5, wire.LOOKUP, b"".join(keys(1, 3))) + wire.frame(6, 99))
    codes = []
    while (frame := raw.receive()) is not None:
        codes.append((frame.request, frame.code))
    assert (5, wire.OK) in codes
    assert codes[-1] == (0, wire.ERROR)
    raw.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(min_size=1, max_size=300), greeted=st.booleans(), chop=st.integers(0, 40))
def test_random_bytes(server: ServerThread, witness: Manager, junk: bytes, greeted: bool, chop: int) -> None:
    raw = RawClient(server.address)
    if greeted:
        raw.hello()
        whole = wire.frame(3, junk[0] % 8, junk)
        junk = whole[: len(whole) - chop] if chop else whole
    with suppress(BrokenPipeError, ConnectionResetError):
        raw.send(junk)
    raw.close()
    still_serves(witness)


def typed_requests() -> st.SearchStrategy[Any]:
    """Well-formed requests with any content: what the directory must refuse or survive."""
    small = st.binary(max_size=20)
    ident = st.one_of(st.binary(min_size=16, max_size=16), st.just((7).to_bytes(16, "little")))
    number = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-2, 20))
    text = st.text(max_size=8)
    slabs = st.lists(st.builds(SlabInfo, number, number), max_size=3).map(tuple)
    info = st.builds(
        SegmentInfo,
        uuid=st.one_of(ident, small),
        kind=st.sampled_from(["cuda", "host"]),
        host=text,
        device=text,
        broker=text,
        owner=st.one_of(st.just(b"r" * 16), small),
        slabs=slabs,
        number=number,
    )
    writers = st.lists(st.builds(GateWriter, ident, number), max_size=3).map(tuple)
    undone = st.lists(st.builds(UndoneSlots, number, number, number), max_size=2)
    gate = st.builds(GateReport, fence=number, writers=writers, floor=number)
    inventory = st.lists(st.builds(SlabInventory, number, st.binary(max_size=70), st.binary(max_size=130)), max_size=3)
    tickets = st.lists(st.tuples(st.one_of(ident, small), number, number), max_size=3)
    put = st.fixed_dictionaries(
        {
            "keys": st.lists(st.one_of(ident, small), max_size=3),
            "namespace": st.one_of(ident, small),
            "parent": st.one_of(ident, small),
            "first_index": number,
            "tokens": st.lists(number, max_size=3),
            "slot_bytes": number,
            "shard": number,
            "num_shards": number,
            "avoid": st.lists(number, max_size=2),
        }
    )
    return st.one_of(
        st.builds(Mount, info, inventory, gate),
        st.builds(WritersLeft, ident, st.lists(st.builds(GateWriter, ident, number), max_size=2), undone),
        st.builds(InventoryPart, ident, inventory),
        put.map(lambda fields: ["PutStart", fields]),
        st.tuples(st.sampled_from(["PutEnd", "PutRevoke"]), tickets).map(list),
        st.builds(AddSlabs, ident, st.lists(st.tuples(number, number), max_size=2)),
        st.builds(DropSlabs, ident, number),
        st.builds(RequestResize, ident, number),
        st.builds(ImporterGone, ident, ident),
        st.builds(Wiped, number),
        st.builds(Unmount, ident),
        # Whoever names them may remove the witness's chunks.
        st.builds(Remove, st.lists(st.binary(min_size=16, max_size=16).filter(lambda key: key not in keys(1, 3)), max_size=3)),
        st.builds(Clear, st.binary(min_size=16, max_size=16).filter(lambda namespace: namespace != NAMESPACE)),
        st.just(Stats()),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(typed_requests(), min_size=1, max_size=6))
def test_well_formed_nonsense(server: ServerThread, witness: Manager, requests: list[object]) -> None:
    raw = RawClient(server.address)
    raw.hello()
    with suppress(BrokenPipeError, ConnectionResetError):
        for request in requests:
            raw.send(wire.frame(3, wire.CALL, msgspec.msgpack.encode(request)))
    raw.socket.shutdown(1)
    while raw.receive() is not None:
        pass
    raw.close()
    assert witness.lookup(keys(1, 3)) == 3
    assert server.counter("internal_errors") == 0, "the directory refuses, it does not fail"
    server.run(server.server.check_integrity)


def test_truncated_frame_then_silence_holds_no_one_up(server: ServerThread, witness: Manager) -> None:
    raw = RawClient(server.address)
    raw.hello()
    raw.send(wire.frame(3, wire.LOOKUP, bytes(16 * 1000))[:-1])
    still_serves(witness)
    raw.send(bytes(1))
    frame = raw.receive()
    while frame is not None and frame.code == wire.PUSH:
        frame = raw.receive()
    assert frame is not None
    assert (frame.request, frame.code) == (3, wire.OK)
    raw.close()


def test_stranger_who_says_nothing_is_disconnected(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock", session_timeout=0.2, heartbeat_interval=0.05) as server:
        raw = RawClient(server.address)
        assert "no hello in time" in raw.last_words()
        raw.close()


def test_silent_client_loses_its_session(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock", session_timeout=0.3, heartbeat_interval=0.05) as server:
        listener = Recorder()
        alive = server.client()
        alive.subscribe(listener)
        raw = RawClient(server.address)
        raw.hello(client=b"s" * 16)
        mute = Mount(
            SegmentInfo(
                uuid=b"m" * 16, kind="host", host="h", device="host", broker="", owner=b"s" * 16, slabs=(SlabInfo(0, 65536),)
            ),
            [],
            GateReport(),
        )
        assert raw.ask(*wire.encode_verb(mute)).code == wire.OK
        assert "no sign of life" in raw.last_words()
        wait_until(lambda: bool(listener.of(SegmentGone)), what="its segment is gone")
        assert server.gauge("sessions") == 1, "the one that sends heartbeats stays"
        assert server.counter("session_timeouts") == 1
        raw.close()
        alive.close()


@pytest.mark.parametrize("turn", [0.0, 1.0], ids=["a frame in each turn", "all in one turn"])
def test_peer_that_does_not_read_is_bounded_and_disconnected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, turn: float
) -> None:
    """Where its turn ended just before the answers filled its buffer, it was read from again, without a bound."""
    monkeypatch.setattr(session, "_TURN_SECONDS", turn)
    with serving(f"unix://{tmp_path}/m.sock", session_timeout=2.0, heartbeat_interval=0.05) as server:
        client = server.client()
        client.mount(segment_of(client, slots=2000))
        for start in range(0, 2000, 500):
            store(client, keys(1 + start, 500))
        raw = RawClient(server.address, receive_buffer=4096)
        raw.hello()
        # Each asks for 48 KB; nobody reads. The server must stop taking requests long before all of these.
        request = wire.frame(9, wire.ACQUIRE, wire.encode_acquire(b"".join(keys(1, 2000))))
        raw.socket.settimeout(0.2)
        sent = 0
        with suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            for _ in range(2000):
                raw.send(request)
                sent += 1
        assert sent < 400, f"{sent} requests were taken"
        wait_until(lambda: server.counter("slow_peers") == 1, what="disconnected")
        wait_until(lambda: server.gauge("sessions") == 1)
        assert client.lookup(keys(1, 2000)) == 2000
        assert "does not read" in caplog.text
        raw.close()
        client.close()


def test_slow_but_steady_reader_gets_every_answer(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()
        client.mount(segment_of(client, slots=1000))
        store(client, keys(1, 1000))
        raw = RawClient(server.address, receive_buffer=4096)
        raw.hello()
        request = wire.encode_acquire(b"".join(keys(1, 1000)))
        received = []

        def read() -> None:
            while len(received) < 200:
                frame = raw.receive()
                assert frame is not None
                if frame.code == wire.OK:
                    received.append(frame)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(1, 201):
            raw.send(wire.frame(number, wire.ACQUIRE, request))
        reader.join(20)
        assert [frame.request for frame in received] == list(range(1, 201))
        assert all(len(frame.payload) == 16 + 24_000 for frame in received)
        raw.close()
        client.close()


def test_requests_left_over_when_the_peer_fell_behind_are_answered_later(tmp_path: Path) -> None:
    """All requests arrive in one read, and nothing comes after them that could wake the server."""
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()
        client.mount(msgspec.structs.replace(segment_of(client), broker="x" * 20_000))
        raw = RawClient(server.address, receive_buffer=4096)
        raw.hello()
        raw.send(b"".join(wire.frame(number, wire.CALL, SEGMENTS) for number in range(1, 501)))
        assert client.lookup([key(1)]) == 0
        received = []
        while len(received) < 500:
            frame = raw.receive()
            assert frame is not None
            if frame.code == wire.OK:
                received.append(frame.request)
        assert received == list(range(1, 501))
        raw.close()
        client.close()


def test_push_flood_to_a_peer_that_does_not_read(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock", max_frame=ByteSize(MAX_FRAME)) as server:
        raw = RawClient(server.address, receive_buffer=4096)
        raw.hello()
        client = server.client()
        info = msgspec.structs.replace(segment_of(client), broker="x" * 20_000)
        for _ in range(200):
            client.mount(info)
            if server.counter("slow_peers"):
                break
        assert server.counter("slow_peers") == 1
        assert client.lookup([key(1)]) == 0
        raw.close()
        client.close()


def test_answer_larger_than_a_frame_is_refused_not_sent(server: ServerThread, witness: Manager) -> None:
    client = server.client()
    before = server.gauge("leases")
    many = keys(1, 3) * 1300  # 62,400 bytes of keys fit, 93,600 bytes of locations do not.
    with pytest.raises(ManagerRefusedError, match=r"exceeds manager\.max_frame"):
        client.acquire(many)
    assert client.lookup(many) == len(many)
    client.close()
    wait_until(lambda: server.gauge("leases") == before, what="its lease fell with the session")


def test_same_client_again_replaces_its_older_connection(server: ServerThread, witness: Manager) -> None:
    first = RawClient(server.address)
    first.hello(client=b"d" * 16)
    second = RawClient(server.address)
    second.hello(client=b"d" * 16)
    assert "connected again" in first.last_words()
    assert second.ask(wire.LOOKUP, key(1)).code == wire.OK, "the loss of the first did not end the second's session"
    first.close()
    second.close()


def test_remove_is_answered_even_if_the_lender_never_wipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "WIPE_TIMEOUT", 0.2)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        lender = server.client()
        heard = Recorder()
        lender.subscribe(heard)
        lender.mount(segment_of(lender))
        store(lender, keys(1, 2))
        other = server.client()
        assert other.remove(keys(1, 1)) == 1
        assert heard.of(WipeSlots)
        assert server.gauge("wipes_outstanding") == 1
        lender.close()
        other.close()


def test_remove_is_answered_when_the_lender_goes(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        lender = server.client()
        lender.mount(segment_of(lender))
        store(lender, keys(1, 2))
        lender.subscribe(Recorder(lambda event: lender.close() if isinstance(event, WipeSlots) else None))
        other = server.client()
        began = time.monotonic()
        assert other.remove(keys(1, 1)) == 1
        assert time.monotonic() - began < WIPE_TIMEOUT / 2
        wait_until(lambda: server.gauge("sessions") == 1)
        other.close()


def test_rejections_do_not_log_what_was_sent(server: ServerThread, witness: Manager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    raw = RawClient(server.address)
    raw.send(wire.frame(1, wire.HELLO, b"VCMG\x01\x00" + msgspec.msgpack.encode([1, "n", "engine", "h", b"hunter2"])))
    raw.last_words()
    raw.close()
    assert "hunter2" not in caplog.text


def test_every_mounted_segment_reaches_a_newcomer(server: ServerThread, witness: Manager) -> None:
    raw = RawClient(server.address)
    raw.hello()
    frame = raw.receive()
    assert frame is not None
    push = wire.decode_push(frame.payload)
    assert isinstance(push, SegmentMounted)
    assert push.info.owner == witness.client_id
    raw.close()


def test_namespace_is_what_clear_names(server: ServerThread, witness: Manager) -> None:
    assert [grant.status for grant in witness.put_start(put_request(keys(1, 3), namespace=NAMESPACE))] == ["exists"] * 3


def test_a_release_that_fails_inside_is_logged_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no answer, and left no trace either."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("broken table")

    monkeypatch.setattr(Reading, "release", fail)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()
        client.release(2**62)
        assert client.segments() == []
        assert server.counter("internal_errors") == 1
        assert "broken table" in caplog.text
        client.close()
