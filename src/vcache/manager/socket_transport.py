"""`SocketTransport`: a manager in another process, reached over one socket that comes back by itself."""

from __future__ import annotations

import logging
import os
import random
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from ..config import ManagerConfig
from ..errors import DeadlineExceededError, ManagerRefusedError, ManagerUnavailableError, ProtocolError, VCacheError
from ..guard import CircuitBreaker
from ..sockets import close_in_forked_child, peer_uid
from . import wire
from .address import Address, load_token, parse_address
from .api import Goodbye, Heartbeat, Listener, Push, R, Role, SessionInfo, Verb
from .listeners import Audience, Dispatcher

logger = logging.getLogger("vcache.manager")

_GATE_TIMEOUT = 1.0
_GATE_PATIENCE = 5.0
_MISSES = 3
"""Consecutive deadline misses after which the connection counts as dead."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_READ_BYTES = 2**16


class NotSentError(DeadlineExceededError):
    """The deadline passed before the request was sent: the manager will never hear of it."""


Late = Callable[[bytes | bytearray], None]
"""Undoes what a reply grants that came after its caller had given up."""


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
        return wire.decode_hello_reply(reply.payload)

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


class SocketTransport:
    """`Transport` over a unix or TCP socket. Thread-safe.

    Three daemon threads: one connects and reads, one sends heartbeats, one calls the listeners. Without a connection every
    call raises `ManagerUnavailableError` at once; the connection is retried in the background, with pauses that double up to
    5 s. Three deadlines missed in a row close the connection. A reply that arrives across a reconnect is never returned.

    Not usable in a forked child: there every call raises `ManagerUnavailableError`, and the parent's session is unharmed.
    """

    def __init__(
        self,
        config: ManagerConfig,
        *,
        client_id: bytes | None = None,
        name: str = "",
        role: Role = "engine",
        token: bytes | None = None,
        host: str = "",
        remote: bool = False,
    ) -> None:
        """Start connecting to `config.address` and return at once. `client_id`: 16 bytes, random by default. `host`,
        `remote`: as in `wire.Hello`.

        `token` defaults to `load_token(config)` for TCP. Raises `ConfigError` for a bad address or token file.
        """
        self._config = config
        self._address = parse_address(config.address)
        if token is None:
            token = load_token(config) if self._address.kind == "tcp" else b""
        self._hello = wire.Hello(client_id or secrets.token_bytes(16), name[:256], role, token, host, remote)
        self._breaker = CircuitBreaker(
            time.monotonic, threshold=_MISSES, cooldown=_FIRST_PAUSE, max_cooldown=_LONGEST_PAUSE, jitter=random.random
        )
        self._dispatcher = Dispatcher("vcache-manager-events")
        self._audience = Audience(self._dispatcher)
        self._gate: Callable[[float], bool] | None = None
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._failure: VCacheError | None = None
        self._closing = threading.Event()
        self._pid = os.getpid()
        close_in_forked_child(self, SocketTransport._forget_in_child)
        self._threads = [
            threading.Thread(target=self._stay_connected, name="vcache-manager-io", daemon=True),
            threading.Thread(target=self._beat, name="vcache-manager-heartbeat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- session ---------------------------------------------------------------------------------------------------

    @property
    def client_id(self) -> bytes:
        return self._hello.client

    @property
    def epoch(self) -> int:
        connection = self._connection
        return connection.session.epoch if connection is not None else 0

    @property
    def last_failure(self) -> VCacheError | None:
        """Why there is no session, as far as is known; None with one. `ManagerRefusedError` and `ProtocolError` will stay."""
        return self._failure

    def wait_connected(self, timeout: float) -> bool:
        """Block until there is a session, at most `timeout` seconds. Returns early, with False, when the manager refuses."""
        with self._changed:
            self._changed.wait_for(lambda: self._connection is not None or self._closing.is_set() or self._refused(), timeout)
            return self._connection is not None

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        self._gate = wait_idle

    def subscribe(self, listener: Listener) -> None:
        self._check_process()
        self._audience.subscribe(listener)

    def close(self) -> None:
        if os.getpid() != self._pid or self._closing.is_set():
            return
        deadline = time.monotonic() + self._config.deadline
        connection = self._connection
        self._closing.set()
        try:
            if connection is not None and not self._idle_gate(self._config.deadline / 2):
                # Goodbye would promise that nothing is being written. Without it the slots wait until the lenders see us gone.
                logger.warning("closed while writes are in flight; their slots stay reserved until these end")
            elif connection is not None:
                connection.call(*wire.encode_verb(Goodbye()), self._config.deadline / 2)
        except VCacheError as error:
            logger.debug("goodbye to the manager: %s", error)
        if connection is not None:
            connection.shut("closed by this client")
        with self._changed:
            self._changed.notify_all()
        self._dispatcher.close(max(0.0, deadline - time.monotonic()))
        for thread in self._threads if connection is not None and not self._dispatcher.is_current() else ():
            # Without a session they may be in the middle of a hello; they end by themselves when it does.
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- calls -----------------------------------------------------------------------------------------------------

    def call(self, verb: Verb[R], late: Callable[[R], None] | None = None, within: float | None = None) -> R:
        connection, timeout = self._live(), verb.deadline(self._config)
        if within is not None:
            timeout = min(timeout, within)
        *parts, last = wire.in_frames(verb, connection.max_frame)
        for part in parts:
            self._ask(connection, part, timeout)
        reply: R = self._ask(connection, last, timeout, late)
        return reply

    def tell(self, verb: Verb[None]) -> None:
        self._check_process()
        connection = self._connection
        if connection is None:
            return
        try:
            connection.send(*wire.encode_verb(verb), self._config.deadline)
        except ManagerUnavailableError as error:
            logger.debug("%s: %s", type(verb).__name__, error)

    def _ask(self, connection: Connection, verb: Verb[R], timeout: float, late: Callable[[R], None] | None = None) -> R:
        try:
            answer = connection.call(*wire.encode_verb(verb), timeout, self._undo(verb, late) if late is not None else None)
        except DeadlineExceededError as error:
            if verb.must_arrive and isinstance(error, NotSentError):
                connection.shut(f"{type(verb).__name__} could not be told")
            if self._breaker.failure():
                connection.shut(f"{_MISSES} calls in a row got no answer")
            raise
        if connection.closed:
            raise ManagerUnavailableError(f"manager {self._address}: the session of this answer is over")
        return wire.decode_reply(verb, answer)

    def _undo(self, verb: Verb[R], late: Callable[[R], None]) -> Late:
        """Runs in the reading thread, which must not wait for the manager."""

        def undo(payload: bytes | bytearray) -> None:
            reply = wire.decode_reply(verb, payload)
            self._dispatcher.post(lambda: late(reply))

        return undo

    def _live(self) -> Connection:
        self._check_process()
        connection = self._connection
        if connection is not None:
            return connection
        if self._closing.is_set():
            raise ManagerUnavailableError(f"manager {self._address}: this client is closed")
        reason = self._failure or f"manager {self._address}: not connected yet"
        raise ManagerUnavailableError(str(reason))

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ManagerUnavailableError(
                f"manager {self._address}: this client belongs to process {self._pid}; a forked child must connect by itself"
            )

    # -- threads ---------------------------------------------------------------------------------------------------

    def _stay_connected(self) -> None:
        while self._wait_for_turn():
            try:
                connection = Connection(
                    self._address, self._hello, max_frame=self._config.max_frame, timeout=self._config.deadline
                )
            except VCacheError as error:
                self._not_connected(error)
                continue
            self._connected(connection)
            reason = connection.read(self._audience.push, self._breaker.success)
            self._lost(connection, reason)

    def _wait_for_turn(self) -> bool:
        """Wait for the breaker's pause and for the write gate. False when the client closes."""
        while not self._closing.wait(self._breaker.retry_in()):
            if self._breaker.allow():
                return self._wait_for_writes()
        return False

    def _wait_for_writes(self) -> bool:
        began, warned = time.monotonic(), False
        while not self._closing.is_set():
            if self._idle_gate(_GATE_TIMEOUT):
                return True
            if not warned and time.monotonic() - began > _GATE_PATIENCE:
                logger.warning("reconnecting to manager %s waits for writes that do not end", self._address)
                warned = True
        return False

    def _idle_gate(self, timeout: float) -> bool:
        """Whether no write of this process is in flight; waits for that at most `timeout` seconds."""
        gate = self._gate
        try:
            return gate is None or gate(timeout)
        except Exception:
            logger.exception("the write gate raised; taken as: writes are in flight")
            self._closing.wait(_GATE_TIMEOUT)
            return False

    def _connected(self, connection: Connection) -> None:
        self._breaker.success()
        with self._changed:
            self._connection, self._failure = connection, None
            self._changed.notify_all()
        self._audience.session_began(connection.session)
        logger.info("connected to manager %s, epoch %d", self._address, connection.session.epoch)
        if self._closing.is_set():
            connection.shut("closed by this client")

    def _not_connected(self, error: VCacheError) -> None:
        self._breaker.trip()
        with self._changed:
            told = str(self._failure) == str(error)
            self._failure = error
            self._changed.notify_all()
        if not told and self._refused():
            logger.error("%s", error)
        elif not told:
            logger.info("%s", error)

    def _lost(self, connection: Connection, reason: str) -> None:
        self._breaker.trip()
        with self._changed:
            self._connection = None
            self._failure = ManagerUnavailableError(f"manager {self._address}: connection lost ({reason})")
            self._changed.notify_all()
        if not self._closing.is_set():
            logger.warning("%s; calls are misses until it is back", self._failure)
            self._audience.session_lost()

    def _beat(self) -> None:
        interval = self._config.heartbeat_interval
        while not self._closing.wait(interval):
            connection = self._connection
            if connection is None:
                continue
            interval = connection.session.heartbeat_interval
            try:
                self._ask(connection, Heartbeat(), self._config.deadline)
            except VCacheError as error:
                logger.debug("heartbeat: %s", error)

    def _refused(self) -> bool:
        return self._failure is not None and not isinstance(self._failure, ManagerUnavailableError)

    def _forget_in_child(self) -> None:
        if self._connection is not None:
            self._connection.forget()
