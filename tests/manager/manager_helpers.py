"""What the tests of server, client and embedded manager share."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from vcache.config import ManagerConfig, VCacheConfig
from vcache.manager import wire
from vcache.manager.address import Address, parse_address
from vcache.manager.api import Push, PutRequest, SessionInfo, Ticket
from vcache.manager.client import Manager
from vcache.manager.server.server import ManagerServer
from vcache.manager.socket_transport import SocketTransport
from vcache.segment.hostinfo import host_id
from vcache.segment.slots import SegmentInfo, SlabInfo

T = TypeVar("T")
NAMESPACE = b"n" * 16
SLOT = 4096


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def keys(start: int, count: int) -> list[bytes]:
    return [key(number) for number in range(start, start + count)]


def config(address: str, **options: Any) -> ManagerConfig:
    return ManagerConfig(address=address, **options)


def wait_until(condition: Callable[[], bool], timeout: float = 5.0, what: str = "condition") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.002)


def segment_of(manager: Manager, number: int = 1, slots: int = 64, kind: Any = "host") -> SegmentInfo:
    return SegmentInfo(
        uuid=number.to_bytes(16, "little"),
        kind=kind,
        host=host_id(),
        device="host" if kind == "host" else "GPU-0",
        broker="/nowhere",
        owner=manager.client_id,
        slabs=(SlabInfo(0, (SLOT + 64) * (slots + 8)),),
    )


def put_request(digests: Sequence[bytes], **changes: Any) -> PutRequest:
    fields: dict[str, Any] = {
        "keys": list(digests),
        "namespace": NAMESPACE,
        "parent": b"",
        "first_index": 0,
        "tokens": [256] * len(digests),
        "slot_bytes": SLOT,
    }
    return PutRequest(**{**fields, **changes})


def store(manager: Manager, digests: Sequence[bytes]) -> list[Ticket]:
    """Put as a writer would whose copies take no time."""
    grants = manager.put_start(put_request(digests))
    tickets = [
        Ticket(digest, 0, grant.location.generation) for digest, grant in zip(digests, grants, strict=True) if grant.location
    ]
    assert all(manager.put_end(tickets))
    return tickets


class Recorder:
    """A listener that keeps what it hears. `act` may call the manager back."""

    def __init__(self, act: Callable[[object], None] | None = None) -> None:
        self.events: list[object] = []
        self._act = act

    def _hear(self, event: object) -> None:
        self.events.append(event)
        if self._act is not None:
            self._act(event)

    def on_session(self, session: SessionInfo) -> None:
        self._hear(session)

    def on_disconnect(self) -> None:
        self._hear("disconnect")

    def on_push(self, push: Push) -> None:
        self._hear(push)

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def epochs(self) -> list[int]:
        return [session.epoch for session in self.of(SessionInfo)]


class ServerThread:
    """A `ManagerServer` on a uvloop of its own in this process."""

    def __init__(self, manager: ManagerConfig) -> None:
        self.config = manager
        self.server = ManagerServer(VCacheConfig(manager=manager))
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.run(self.server.start)
        except BaseException:
            self._end()
            raise

    @property
    def address(self) -> str:
        return self.server.address

    def run(self, work: Callable[[], Any]) -> Any:
        """Call on the loop; await the result if it is a coroutine."""

        async def call() -> Any:
            result = work()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def counter(self, name: str) -> int:
        return int(self.run(self.server.stats).counters[name])

    def gauge(self, name: str) -> int:
        return int(self.run(self.server.stats).gauges[name])

    def client(self, **options: Any) -> Manager:
        """A connected client of this server."""
        token = options.pop("token", None)
        identity = {name: options.pop(name) for name in ("name", "role", "client_id", "host", "remote") if name in options}
        settings = msgspec.structs.replace(self.config, **{"address": self.address, **options})
        client = Manager(SocketTransport(settings, token=token, **identity))
        assert client.wait_connected(5), client.last_failure
        return client

    def close(self) -> None:
        self.run(self.server.stop)
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@contextmanager
def serving(address: str, **options: Any) -> Iterator[ServerThread]:
    server = ServerThread(config(address, **options))
    try:
        yield server
        server.run(server.server.check_integrity)
    finally:
        server.close()


class RawClient:
    """A socket that sends whatever it is told."""

    def __init__(self, address: str, *, receive_buffer: int = 0) -> None:
        where: Address = parse_address(address)
        family = socket.AF_UNIX if where.kind == "unix" else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(5)
        self.socket.connect(where.path if where.kind == "unix" else (where.host, where.port))
        self.buffer = wire.FrameBuffer(1 << 26)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> wire.Frame | None:
        """The next frame, or None when the server hung up."""
        while (frame := next(self.buffer.frames(), None)) is None:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.buffer.feed(data)
        return frame

    def ask(self, code: int, payload: bytes, request: int = 7) -> wire.Frame:
        """Send a request and skip pushes until its answer."""
        self.send(wire.frame(request, code, payload))
        while (frame := self.receive()) is not None:
            if frame.request == request:
                return frame
        raise AssertionError("the server hung up")

    def hello(self, *, client: bytes = b"r" * 16, token: bytes = b"", version: int | None = None) -> wire.Frame:
        hello = wire.Hello(client, "raw", "tool", token)
        payload = wire.encode_hello(hello) if version is None else wire.encode_hello(hello, version)
        self.send(wire.frame(1, wire.HELLO, payload))
        answer = self.receive()
        assert answer is not None
        return answer

    def last_words(self) -> str:
        """The error about the connection, after which the server must have hung up."""
        words = ""
        while (frame := self.receive()) is not None:
            if frame.code == wire.ERROR and not frame.request:
                words = str(wire.decode_error(frame.payload))
        return words

    def close(self) -> None:
        self.socket.close()


_SERVE = """
import sys
from vcache.config import ManagerConfig, VCacheConfig
from vcache.manager.server.server import run_server
import msgspec
manager = msgspec.json.decode(sys.argv[1].encode(), type=ManagerConfig, dec_hook=lambda kind, value: kind(value))
run_server(VCacheConfig(manager=manager), ready=lambda address: print("ready", address, flush=True))
"""


class ServerProcess:
    """`run_server` in a process of its own."""

    def __init__(self, manager: ManagerConfig) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, msgspec.json.encode(manager, enc_hook=int).decode()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        assert self.process.stdout is not None
        word, _, self.address = self.process.stdout.readline().strip().partition(" ")
        if word != "ready":
            _, errors = self.process.communicate(timeout=10)
            raise AssertionError(f"server did not start: {errors}")

    def stop(self, number: int) -> tuple[int, str]:
        """Send a signal and wait; exit status and what it wrote to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=10)
        return self.process.returncode, errors

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=10)
