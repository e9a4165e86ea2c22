"""One socket between a client and the manager: opening it, calls from many threads, and the loop that reads replies."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from ..errors import DeadlineExceededError, ManagerRefusedError, ManagerUnavailableError, ProtocolError, VCacheError
from . import wire
from .address import Address
from .api import Push, SessionInfo

logger = logging.getLogger("vcache.manager")

_READ_BYTES = 2**16
_UCRED = struct.Struct("3i")


class NotSentError(DeadlineExceededError):
    """The deadline passed before the request was sent: the manager will never hear of it."""


Late = Callable[[bytes | bytearray], None]
"""Undoes what a reply grants that came after its caller had given up."""


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a unix socket, as the kernel recorded it."""
    return int(_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])


def open_socket(address: Address, timeout: float) -> socket.socket:
    """Connect. Blocks at most `timeout` seconds.

    Raises `ManagerUnavailableError`, or `ManagerRefusedError` when the unix socket is served by another user.
    """
    try:
        if address.kind == "unix":
            return _open_unix(address, timeout)
        sock = socket.create_connection((address.host, address.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except UnicodeError as error:
        raise ManagerUnavailableError(f"manager {address}: {error}") from None
    except OSError as error:
        # A full backlog of a stopped manager shows as BlockingIOError (unix) or as a timeout.
        full = isinstance(error, BlockingIOError | TimeoutError)
        reason = "does not accept connections" if full else error.strerror or error
        raise ManagerUnavailableError(f"manager {address}: {reason}") from None


def _open_unix(address: Address, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address.path)
        owner = peer_uid(sock)
        if owner != os.geteuid():
            raise ManagerRefusedError(f"manager {address}: runs as user {owner}, this process as {os.geteuid()}; not trusted")
    except BaseException:
        sock.close()
        raise
    return sock


class _Call:
    """A request that waits for its reply."""

    __slots__ = ("abandoned", "error", "late", "payload", "wake")

    def __init__(self, late: Late | None) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.late = late
        self.abandoned = False
        self.payload: bytes | bytearray | None = None
        self.error: VCacheError | None = None


class Connection:
    """A session on one socket. `call` and `send` are thread-safe; one thread runs `read`.

    When the connection ends, every pending call fails at once with `ManagerUnavailableError`.
    """

    def __init__(self, address: Address, hello: wire.Hello, *, max_frame: int, timeout: float) -> None:
        """Connect and say hello. Blocks at most `timeout` seconds.

        Raises `ManagerUnavailableError`, or `ManagerRefusedError` / `ProtocolError` with the manager's own words.
        """
        self._address = address
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._pending: dict[int, _Call] = {}
        self._request = 0
        self._reason = ""
        self._buffer = wire.FrameBuffer(max_frame)
        deadline = time.monotonic() + timeout
        self._socket = open_socket(address, timeout)
        try:
            reply = self._say_hello(hello, deadline)
        except BaseException:
            self._socket.close()
            raise
        self.session: SessionInfo = reply.session
        self.max_frame = min(max_frame, reply.max_frame)
        """Bytes of the largest frame that this side may send."""

    @property
    def closed(self) -> bool:
        return bool(self._reason)

    def call(self, verb: int, payload: bytes, timeout: float, late: Late | None = None) -> bytes | bytearray:
        """Send and wait for the reply's payload. Blocks at most `timeout` seconds.

        `late` gets the payload of a reply that arrives after the deadline; it runs in the reading thread and must not block.
        """
        deadline = time.monotonic() + timeout
        call = _Call(late)
        request = self._transmit(verb, payload, deadline, call)
        if call.wake.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return self._outcome(call)
        with self._lock:
            if call.payload is not None or call.error is not None:
                return self._outcome(call)  # It came in between.
            call.abandoned = True
            if late is None:
                self._pending.pop(request, None)
        raise DeadlineExceededError(f"manager {self._address}: no answer within {timeout:g} s")

    def send(self, verb: int, payload: bytes, timeout: float) -> None:
        """Send what has no reply. Blocks at most `timeout` seconds, and only when the socket's buffer is full."""
        self._transmit(verb, payload, time.monotonic() + timeout, None)

    def read(self, on_push: Callable[[Push], None], on_alive: Callable[[], None]) -> str:
        """Serve replies and pushes until the connection ends; returns why. Blocks until then, and closes the socket.

        `on_alive` is called whenever something arrived.
        """
        try:
            while not self.closed:
                for request, code, payload in self._buffer.frames():
                    if code == wire.PUSH:
                        on_push(wire.decode_push(payload))
                    elif request:
                        self._settle(request, code, payload)
                    else:
                        self.shut(str(wire.decode_error(payload)))
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    self.shut("the manager closed the connection")
                    break
                on_alive()
                self._buffer.feed(data)
        except OSError as error:
            self.shut(error.strerror or str(error))
        except ProtocolError as error:
            self.shut(f"unintelligible answer ({error})")
        except Exception:
            logger.exception("reading from the manager failed; the connection is reopened")
            self.shut("a fault in this client")
        finally:
            with self._send_lock:
                self._socket.close()
        return self._reason

    def shut(self, reason: str) -> None:
        """End the connection and fail what is pending. Does not block. The first reason counts."""
        with self._lock:
            if self._reason:
                return
            self._reason = reason
            pending = list(self._pending.values())
            self._pending.clear()
            for call in pending:
                call.error = self._gone()
        with suppress(OSError):  # ENOTCONN: the other side was faster.
            self._socket.shutdown(socket.SHUT_RDWR)  # Wakes the reading thread, which alone closes the socket.
        for call in pending:
            call.wake.release()

    def forget(self) -> None:
        """In a forked child: close the inherited descriptor without a word to the manager, who talks to the parent."""
        self._reason = "inherited through fork"
        self._socket.close()

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _say_hello(self, hello: wire.Hello, deadline: float) -> wire.HelloReply:
        where = f"manager {self._address}"
        try:
            reply = self._exchange(wire.frame(1, wire.HELLO, wire.encode_hello(hello)), deadline)
        except TimeoutError:
            raise DeadlineExceededError(f"{where}: no answer to hello") from None
        except OSError as error:
            raise ManagerUnavailableError(f"{where}: {error.strerror or error}") from None
        except ProtocolError as error:
            raise ProtocolError(f"{where}: not a vcache manager ({error})") from None
        if reply is None:
            raise ManagerUnavailableError(f"{where}: closed the connection at hello")
        if reply.code == wire.ERROR:
            refusal = wire.decode_error(reply.payload)
            raise type(refusal)(f"{where}: {refusal}")
        if reply.code != wire.OK:
            raise ProtocolError(f"{where}: not a vcache manager (status {reply.code})")
        return wire.decode_value(wire.HELLO_REPLY, reply.payload)

    def _exchange(self, data: bytes, deadline: float) -> wire.Frame | None:
        """Send the first frame and receive the first one back; None when the manager hung up."""
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        self._socket.sendall(data)
        self._request = 1
        while (reply := next(self._buffer.frames(), None)) is None:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            received = self._socket.recv(_READ_BYTES)
            if not received:
                return None
            self._buffer.feed(received)
        self._socket.settimeout(None)
        return reply

    def _transmit(self, verb: int, payload: bytes, deadline: float, call: _Call | None) -> int:
        if len(payload) + wire.HEADER_BYTES > self.max_frame:
            raise ProtocolError(
                f"request of {len(payload)} bytes is larger than manager.max_frame ({self.max_frame}); raise it"
            )
        if not self._send_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise NotSentError(f"manager {self._address}: does not take requests")
        try:
            with self._lock:
                if self._reason:
                    raise self._gone()
                self._request = request = self._request % (2**32 - 1) + 1
                if call is not None:
                    self._pending[request] = call
            self._send(wire.frame(request, verb, payload), request, deadline)
            return request
        finally:
            self._send_lock.release()

    def _send(self, data: bytes, request: int, deadline: float) -> None:
        sent = 0
        while sent < len(data):
            try:
                sent += self._socket.send(memoryview(data)[sent:] if sent else data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._writable(deadline - time.monotonic()):
                    self._unsent(request, sent)
            except OSError as error:
                self.shut(error.strerror or str(error))
                raise self._gone() from None

    def _writable(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return timeout > 0 and bool(poll.poll(timeout * 1000))

    def _unsent(self, request: int, sent: int) -> NoReturn:
        """The deadline passed before the frame was out. Half a frame cannot be taken back: then the connection is over."""
        if sent:
            self.shut("it does not take requests")
        with self._lock:
            self._pending.pop(request, None)
        raise NotSentError(f"manager {self._address}: does not take requests")

    def _settle(self, request: int, code: int, payload: bytes | bytearray) -> None:
        with self._lock:
            call = self._pending.pop(request, None)
            if call is None:
                return
            late = call.late if call.abandoned else None
            if code == wire.OK:
                call.payload = payload
            elif code == wire.ERROR:
                call.error = wire.decode_error(payload)
            else:
                self._pending[request] = call
                raise ProtocolError(f"status {code}")
        if not call.abandoned:
            call.wake.release()
        elif late is not None and code == wire.OK:
            late(payload)

    def _outcome(self, call: _Call) -> bytes | bytearray:
        if call.error is not None:
            raise call.error
        assert call.payload is not None
        return call.payload

    def _gone(self) -> ManagerUnavailableError:
        return ManagerUnavailableError(f"manager {self._address}: connection lost ({self._reason})")
