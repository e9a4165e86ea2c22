"""The broker against raw sockets: protocol, access, misbehaving importers, signs of life."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from segment_support import MiB, eventually

from vcache.errors import ProtocolError, SegmentError
from vcache.lender.broker import Broker
from vcache.segment import handover as protocol
from vcache.segment.backing import OwnedSlab
from vcache.segment.gate import Gate
from vcache.segment.host import HostBacking

UUID = b"segment-uuid-016"
CLIENTS = [bytes([number]) * 16 for number in range(8)]


class Lent:
    """A broker with two slabs."""

    def __init__(self, folder: Path) -> None:
        self.gone: list[bytes] = []
        self.backing = HostBacking()
        self.broker = Broker(protocol.prepare_broker_dir(str(folder)), UUID, Gate(b"lender-of-a-test"), self.gone.append)
        self.slabs: list[OwnedSlab] = [self.backing.create(MiB) for _ in range(2)]
        for index, slab in enumerate(self.slabs):
            self.broker.add_slab(index, slab.nbytes, slab.fd)

    def close(self) -> None:
        self.broker.close()
        for slab in self.slabs:
            slab.retire()
            self.backing.release(slab)


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[Lent]:
    lent = Lent(tmp_path / "broker")
    yield lent
    lent.close()


class Peer:
    """An importer made of one socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(5)
        self.sock.connect(path)

    def send(self, message: protocol.FromImporter) -> None:
        self.sock.send(protocol.encode(message))

    def receive(self) -> tuple[protocol.FromLender, list[int]]:
        frame, fds, _, _ = socket.recv_fds(self.sock, protocol.MAX_FRAME, 4)
        return protocol.decode_from_lender(frame), fds

    def ask(self, message: protocol.FromImporter) -> protocol.FromLender:
        self.send(message)
        answer, fds = self.receive()
        for fd in fds:
            os.close(fd)
        return answer

    def hung_up(self) -> bool:
        return self.sock.recv(protocol.MAX_FRAME) == b""


def greeted(lent: Lent, client: bytes) -> Peer:
    peer = Peer(lent.broker.path)
    assert isinstance(peer.ask(protocol.Hello(protocol.BROKER_VERSION, client, UUID)), protocol.Welcome)
    return peer


def test_descriptor_arrives_with_the_right_slab(lent: Lent) -> None:
    lent.backing.write(lent.slabs[1], 10, b"one")
    peer = greeted(lent, CLIENTS[0])
    peer.send(protocol.Get(1))
    answer, fds = peer.receive()
    assert answer == protocol.Granted(1, MiB)
    mapped = lent.backing.map(fds[0], MiB)
    assert lent.backing.read(mapped, 10, 3) == b"one"
    lent.backing.unmap(mapped)
    os.close(fds[0])
    assert peer.ask(protocol.Get(7)) == protocol.Gone(7)
    assert lent.broker.importers() == {CLIENTS[0]}


def test_socket_and_folder_are_private(lent: Lent) -> None:
    assert os.stat(lent.broker.path).st_mode & 0o777 == 0o600
    assert os.stat(Path(lent.broker.path).parent).st_mode & 0o777 == 0o700


def test_importer_gone_once_per_process_and_not_before_its_last_connection(lent: Lent) -> None:
    first, second, other = greeted(lent, CLIENTS[0]), greeted(lent, CLIENTS[0]), greeted(lent, CLIENTS[1])
    first.sock.close()
    other.sock.close()
    eventually(lambda: lent.gone == [CLIENTS[1]])
    second.sock.close()
    eventually(lambda: lent.gone == [CLIENTS[1], CLIENTS[0]])
    assert lent.broker.importers() == set()


def test_process_whose_writes_were_declared_over_never_imports_again(lent: Lent) -> None:
    connected = greeted(lent, CLIENTS[0])
    assert not lent.broker.bar(CLIENTS[0])
    assert lent.broker.bar(CLIENTS[1])
    connected.sock.close()
    eventually(lambda: lent.gone == [CLIENTS[0]])
    for client in CLIENTS[:2]:
        answer = Peer(lent.broker.path).ask(protocol.Hello(protocol.BROKER_VERSION, client, UUID))
        assert isinstance(answer, protocol.Refused)
        assert "only a new process may import again" in answer.reason
    assert lent.gone == [CLIENTS[0]]
    assert lent.broker.bar(CLIENTS[0])
    greeted(lent, CLIENTS[2])


def test_request_unmap_waits_for_answers_and_names_the_late(lent: Lent) -> None:
    peers = [greeted(lent, client) for client in CLIENTS[:3]]
    for peer in peers[:2]:
        assert isinstance(peer.ask(protocol.Get(0)), protocol.Granted)
    assert isinstance(peers[2].ask(protocol.Get(1)), protocol.Granted)

    def obey() -> None:
        assert peers[0].receive()[0] == protocol.Unmap([0])
        peers[0].send(protocol.Unmapped([0]))

    thread = threading.Thread(target=obey)
    thread.start()
    began = time.monotonic()
    assert lent.broker.request_unmap([0], 0.3) == {CLIENTS[1]: frozenset([0])}
    assert 0.25 < time.monotonic() - began < 2
    thread.join()
    assert peers[0].ask(protocol.Get(0)) == protocol.Gone(0)
    peers[1].sock.close()
    assert lent.broker.request_unmap([0], 5) == {}


def test_request_unmap_ends_when_the_importer_dies(lent: Lent) -> None:
    peer = greeted(lent, CLIENTS[0])
    peer.ask(protocol.Get(0))
    threading.Timer(0.1, peer.sock.close).start()
    began = time.monotonic()
    assert lent.broker.request_unmap([0], 10) == {}
    assert time.monotonic() - began < 5


def test_request_unmap_of_what_nobody_maps_is_immediate(lent: Lent) -> None:
    greeted(lent, CLIENTS[0])
    began = time.monotonic()
    assert lent.broker.request_unmap([0, 1, 99], 10) == {}
    assert time.monotonic() - began < 1


def test_other_protocol_version_is_refused_with_a_reason(lent: Lent) -> None:
    peer = Peer(lent.broker.path)
    answer = peer.ask(protocol.Hello(99, CLIENTS[0], UUID))
    assert isinstance(answer, protocol.Refused)
    assert "speaks broker protocol 2, the importer 99" in answer.reason
    assert peer.hung_up()
    assert lent.broker.importers() == set()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1" * 10,
        b"\x92\xa1\x96\x00",
        b"\x93\xa1G\x01" + b"\x91" * 30000,
        protocol.encode(protocol.Get(1)),
        protocol.encode(protocol.Welcome(1)),
        protocol.encode(protocol.Hello(1, b"short", UUID)),
        protocol.encode(protocol.Hello(1, CLIENTS[0], b"another-segment!")),
        b"x" * (protocol.MAX_FRAME + 1),
    ],
    ids=["empty", "garbage", "bad-utf8", "deep", "no-hello", "wrong-direction", "short-id", "wrong-segment", "too-long"],
)
def test_malformed_hello_closes_that_connection_only(lent: Lent, frame: bytes) -> None:
    good, bad = greeted(lent, CLIENTS[0]), Peer(lent.broker.path)
    bad.sock.send(frame)
    assert isinstance(bad.receive()[0], protocol.Refused)
    assert bad.hung_up()
    assert isinstance(good.ask(protocol.Get(0)), protocol.Granted)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"junk",
        protocol.encode(protocol.Hello(1, CLIENTS[1], UUID)),
        b"\x92\xa1A\x91\xff",
        b"y" * (2 * protocol.MAX_FRAME),
    ],
    ids=["empty", "garbage", "second-hello", "negative", "too-long"],
)
def test_end_of_a_misbehaving_importer_is_still_seen(lent: Lent, frame: bytes) -> None:
    """It is served no more, but it may still write: only its real end counts as its end."""
    bad = greeted(lent, CLIENTS[1])
    bad.ask(protocol.Get(0))
    bad.sock.send(frame)
    assert isinstance(bad.receive()[0], protocol.Refused)
    assert bad.hung_up()
    assert lent.broker.request_unmap([0], 0.1) == {CLIENTS[1]: frozenset([0])}
    assert lent.gone == []
    bad.sock.close()
    eventually(lambda: lent.gone == [CLIENTS[1]])


def test_random_frames_never_stop_the_broker(lent: Lent) -> None:
    random_bytes = random.Random(7)
    good = greeted(lent, CLIENTS[0])
    valid = [
        protocol.encode(message)
        for message in (protocol.Hello(1, CLIENTS[2], UUID), protocol.Get(0), protocol.Unmapped([0, 1]), protocol.Gone(0))
    ]
    for round_number in range(300):
        client = round_number.to_bytes(16, "little")
        peer = greeted(lent, client) if round_number % 3 == 0 else Peer(lent.broker.path)
        for _ in range(random_bytes.randrange(1, 4)):
            frame = bytearray(random_bytes.choice([*valid, random_bytes.randbytes(random_bytes.randrange(1, 200))]))
            for _ in range(random_bytes.randrange(3)):
                frame[random_bytes.randrange(len(frame))] = random_bytes.randrange(256)
            try:
                peer.sock.send(frame)
            except OSError:
                break
        peer.sock.close()
        if round_number % 50 == 0:
            assert isinstance(good.ask(protocol.Get(0)), protocol.Granted)
    assert isinstance(good.ask(protocol.Get(1)), protocol.Granted)
    eventually(lambda: lent.broker.importers() == {CLIENTS[0]})
    assert CLIENTS[0] not in lent.gone


def test_importer_that_asks_without_reading_is_cut_off_and_others_are_served(lent: Lent) -> None:
    flood, good = greeted(lent, CLIENTS[1]), greeted(lent, CLIENTS[0])
    flood.sock.setblocking(False)
    get = protocol.encode(protocol.Get(99))
    cut_off = False
    deadline = time.monotonic() + 10
    while not cut_off and time.monotonic() < deadline:
        try:
            flood.sock.send(get)
        except BlockingIOError:
            cut_off = not select.select([], [flood.sock], [], 0.5)[1]
    assert cut_off
    assert isinstance(good.ask(protocol.Get(0)), protocol.Granted)
    assert lent.gone == []
    flood.sock.close()
    eventually(lambda: lent.gone == [CLIENTS[1]])


def test_silent_connection_is_dropped(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.lender.broker._HELLO_TIMEOUT", 0.1)
    assert Peer(lent.broker.path).hung_up()


def test_close_hangs_up_removes_the_socket_and_reports_nobody(tmp_path: Path) -> None:
    lent = Lent(tmp_path / "broker")
    peer = greeted(lent, CLIENTS[0])
    lent.close()
    lent.broker.close()
    assert peer.hung_up()
    assert not Path(lent.broker.path).exists()
    assert lent.gone == []
    assert lent.broker.request_unmap([0], 5) == {}


def test_stale_sockets_are_removed_and_live_ones_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    live = Lent(folder)
    dead = folder / "dead.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(dead))
    second = Broker(folder, b"another-segment!", Gate(b"lender-of-a-test"), lambda client: None)
    assert not dead.exists()
    assert isinstance(greeted(live, CLIENTS[0]).ask(protocol.Get(0)), protocol.Granted)
    second.close()
    live.close()


def test_bad_broker_folders_are_one_clear_line(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir(mode=0o755)
    with pytest.raises(SegmentError, match=r"segment.broker_dir: .*wide is open to other users; run chmod 700"):
        protocol.prepare_broker_dir(str(wide))
    (tmp_path / "file").touch()
    with pytest.raises(SegmentError, match="cannot create"):
        protocol.prepare_broker_dir(str(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SegmentError, match="is not a folder"):
        protocol.prepare_broker_dir(str(tmp_path / "link"))
    with pytest.raises(SegmentError, match="too long: socket paths have at most 107 bytes"):
        protocol.socket_path(tmp_path / ("x" * 100), UUID)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert protocol.prepare_broker_dir("") == tmp_path / "vcache"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert protocol.socket_folder() == Path(f"/tmp/vcache-{os.geteuid()}")


def test_decoders_accept_only_their_direction() -> None:
    assert protocol.decode_from_importer(protocol.encode(protocol.Get(3))) == protocol.Get(3)
    with pytest.raises(ProtocolError):
        protocol.decode_from_importer(protocol.encode(protocol.Gone(3)))
    with pytest.raises(ProtocolError):
        protocol.decode_from_lender(protocol.encode(protocol.Get(3)))
    assert [len(batch) for batch in protocol.batches(list(range(9000)))] == [4096, 4096, 808]


FOREIGN_USER = """
import os, socket, sys
sys.path[:0] = {path!r}
from vcache.segment import handover as protocol
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(5)
sock.connect({socket!r})
print(protocol.decode_from_lender(sock.recv(4096)).reason)
"""


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_other_user_is_refused_even_with_access_to_the_socket(lent: Lent, tmp_path: Path) -> None:
    for folder in (Path(lent.broker.path).parent, *Path(lent.broker.path).parent.parents):
        if str(folder).startswith(str(tmp_path.parents[2])):
            folder.chmod(folder.stat().st_mode | 0o011)
    os.chmod(lent.broker.path, 0o666)
    script = FOREIGN_USER.format(path=[p for p in sys.path if p], socket=lent.broker.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert "user 65534 may not import from a lender of user 0" in done.stdout, done.stderr
    assert lent.broker.importers() == set()
