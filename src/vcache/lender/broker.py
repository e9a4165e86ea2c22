"""Hands the descriptors of a segment's slabs to importers over a unix socket, and asks for the slabs back; in one thread."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import ProtocolError, SegmentError
from ..segment import handover as protocol
from ..segment.gate import Gate
from ..sockets import close_in_forked_child, peer_uid

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT = 5.0
_RETRY = 0.1
_MAX_QUEUE = 4096
_BUSY = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)
"""The message could not be sent now: socket full, or too many descriptors of this user in flight."""


class _Slab(NamedTuple):
    nbytes: int
    fd: int


class _Connection:
    """One importer. Touched by the broker's thread only, except `client`, `holds` and `outgoing` (under the broker's lock)."""

    __slots__ = ("client", "condemned", "deadline", "holds", "outgoing", "sock")

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.client = b""
        self.deadline = deadline
        self.condemned = False
        self.holds: set[int] = set()
        """Slabs sent to it and not acknowledged as unmapped."""
        self.outgoing: deque[protocol.FromLender] = deque()


class Broker:
    """Serves the importers of one segment, from construction until `close`. Thread-safe.

    A connection that breaks the protocol is served no more, but its end still counts as the importer's sign of life: the
    socket is kept, unread, until the peer hangs up.
    """

    def __init__(self, folder: Path, segment: bytes, gate: Gate, on_importer_gone: Callable[[bytes], None]) -> None:
        """`folder` comes from `prepare_broker_dir`. `gate`: the segment's, open until `close`. `on_importer_gone(client id)` is
        called from the broker's thread when the last connection of a process has ended; it must not block or raise. Raises
        `SegmentError`."""
        self.path = str(protocol.socket_path(folder, segment))
        self._segment = segment
        self._gate = gate
        self._on_importer_gone = on_importer_gone
        self._uid = os.geteuid()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._slabs: dict[int, _Slab] = {}
        self._ended: set[bytes] = set()
        """Clients whose writes were declared over: they must never write here again."""
        self._connections: dict[int, _Connection] = {}
        self._closing = False
        self._accept_after = 0.0
        self._retry = False
        _remove_stale_sockets(folder)
        self._listener = _listen(self.path)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="vcache-broker", daemon=True)
        self._thread.start()
        close_in_forked_child(self, Broker.close_sockets)

    # -- called by the lender ----------------------------------------------------------------------------------------

    def add_slab(self, index: int, nbytes: int, fd: int) -> None:
        """Hand out `fd` for slab `index` from now on. The fd stays the caller's, open until `request_unmap` returned."""
        with self._lock:
            self._slabs[index] = _Slab(nbytes, fd)

    def request_unmap(self, indices: Iterable[int], timeout: float) -> dict[bytes, frozenset[int]]:
        """Hand these slabs out no more, and ask every importer that has them to unmap. Blocks at most `timeout` seconds.

        Returns the importers that did not answer in time, each with the slabs that it may still map.
        """
        wanted = set(indices)
        with self._changed:
            if self._closing:
                return {}
            for index in wanted:
                self._slabs.pop(index, None)
            for connection in self._connections.values():
                held = sorted(connection.holds & wanted)
                connection.outgoing.extend(protocol.Unmap(batch) for batch in protocol.batches(held))
            self._wake()
            self._changed.wait_for(lambda: not self._holders(wanted), timeout)
            late = self._holders(wanted)
        if late:
            logger.warning(
                "%d importers did not unmap within %.1f s: %s", len(late), timeout, ", ".join(name.hex() for name in late)
            )
        return late

    def importers(self) -> set[bytes]:
        """Tell which processes are connected now, by client id."""
        with self._lock:
            return {connection.client for connection in self._connections.values() if connection.client}

    def bar(self, client: bytes) -> bool:
        """Keep a process out for good, if it is not connected: True when it maps nothing of the segment and never will, so that
        its writes are over; False while it is connected."""
        with self._lock:
            if any(connection.client == client for connection in self._connections.values()):
                return False
            self._ended.add(client)
            return True

    def close(self) -> None:
        """Stop serving, hang up, remove the socket. No importer is reported as gone any more. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._wake()
        self._thread.join()
        Path(self.path).unlink(missing_ok=True)
        self.close_sockets()
        self._poll.close()
        os.close(self._wake_fd)

    def close_sockets(self) -> None:
        """Close this process's descriptors without a word; for a forked child, which must not stand in for its parent."""
        self._listener.close()
        for connection in self._connections.values():
            connection.sock.close()

    def _holders(self, wanted: set[int]) -> dict[bytes, frozenset[int]]:
        late: dict[bytes, frozenset[int]] = {}
        for connection in self._connections.values():
            if held := connection.holds & wanted:
                late[connection.client] = late.get(connection.client, frozenset()) | held
        return late

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            for fd, events in self._poll.poll(self._next_timeout()):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                elif fd == self._listener.fileno():
                    self._accept()
                elif (connection := self._connections.get(fd)) is not None:
                    self._serve(connection, events)
            self._retry = False
            for connection in list(self._connections.values()):
                self._flush(connection)
            self._check_deadlines()

    def _next_timeout(self) -> float:
        if self._retry:
            return _RETRY
        waiting = [connection.deadline for connection in self._connections.values() if not connection.client]
        if self._accept_after:
            waiting.append(self._accept_after)
        return max(0.0, min(waiting) - time.monotonic()) if waiting else -1

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if not connection.client and connection.deadline <= now:
                self._drop(connection)
        if self._accept_after and self._accept_after <= now:
            self._accept_after = 0.0
            self._poll.register(self._listener.fileno(), select.EPOLLIN)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors: let the importers wait in the backlog for a while instead of spinning.
            logger.warning("broker cannot accept an importer: %s", error.strerror)
            self._poll.unregister(self._listener.fileno())
            self._accept_after = time.monotonic() + 5 * _RETRY
            return
        sock.setblocking(False)
        connection = _Connection(sock, time.monotonic() + _HELLO_TIMEOUT)
        with self._lock:
            self._connections[sock.fileno()] = connection
        self._poll.register(sock.fileno(), select.EPOLLIN)
        uid = peer_uid(sock)
        if uid != self._uid:
            self._refuse(connection, f"user {uid} may not import from a lender of user {self._uid}")

    def _serve(self, connection: _Connection, events: int) -> None:
        """Deal with one event of one importer. The kernel reports again what is left."""
        if connection.condemned or not events & select.EPOLLIN:
            if events & (select.EPOLLHUP | select.EPOLLERR):
                self._drop(connection)
            return
        try:
            frame, _, flags, _ = connection.sock.recvmsg(protocol.MAX_FRAME)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        if not frame and events & select.EPOLLHUP:
            self._drop(connection)
            return
        try:
            if not frame or flags & socket.MSG_TRUNC:
                raise ProtocolError("malformed message from an importer: empty or too long")
            self._handle(connection, protocol.decode_from_importer(frame))
        except ProtocolError as error:
            self._refuse(connection, str(error))

    def _handle(self, connection: _Connection, message: protocol.FromImporter) -> None:
        if isinstance(message, protocol.Hello):
            if connection.client:
                raise ProtocolError("a second hello")
            if message.version != protocol.BROKER_VERSION:
                raise ProtocolError(
                    f"this lender speaks broker protocol {protocol.BROKER_VERSION}, the importer {message.version}; "
                    "run the same VCache version"
                )
            if message.segment != self._segment:
                raise ProtocolError("another segment is lent here now")
            with self._lock:
                if message.client in self._ended:
                    raise ProtocolError("this client had ended or was given up; only a new process may import again")
                try:
                    row = self._gate.admit(message.client)
                except SegmentError as error:
                    raise ProtocolError(str(error)) from None
                connection.client = message.client
                connection.outgoing.append(protocol.Welcome(protocol.BROKER_VERSION, row))
        elif not connection.client:
            raise ProtocolError("a request before hello")
        elif isinstance(message, protocol.Get):
            with self._lock:
                slab = self._slabs.get(message.slab)
                connection.outgoing.append(
                    protocol.Gone(message.slab) if slab is None else protocol.Granted(message.slab, slab.nbytes)
                )
        else:
            with self._changed:
                connection.holds.difference_update(message.slabs)
                self._changed.notify_all()
        if len(connection.outgoing) > _MAX_QUEUE:
            raise ProtocolError("too many requests without reading the answers")

    def _flush(self, connection: _Connection) -> None:
        """Send what is queued, as far as the socket takes it."""
        if connection.condemned or not connection.outgoing:
            return
        try:
            # Under the lock: a slab's fd is not closed, and its number not reused, before `request_unmap` had the lock.
            with self._lock:
                while connection.outgoing:
                    self._send(connection, connection.outgoing[0])
                    connection.outgoing.popleft()
            self._poll.modify(connection.sock.fileno(), select.EPOLLIN)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                self._poll.modify(connection.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
            elif error.errno in _BUSY:
                self._retry = True
            else:
                self._drop(connection)

    def _send(self, connection: _Connection, message: protocol.FromLender) -> None:
        if isinstance(message, protocol.Welcome):
            socket.send_fds(connection.sock, [protocol.encode(message)], [self._gate.fd], socket.MSG_NOSIGNAL)
            return
        if isinstance(message, protocol.Granted):
            slab = self._slabs.get(message.slab)
            if slab is not None:
                socket.send_fds(connection.sock, [protocol.encode(message)], [slab.fd], socket.MSG_NOSIGNAL)
                connection.holds.add(message.slab)
                return
            message = protocol.Gone(message.slab)
        connection.sock.send(protocol.encode(message), socket.MSG_NOSIGNAL)

    def _refuse(self, connection: _Connection, reason: str) -> None:
        logger.warning("broker refuses importer %s: %s", connection.client.hex() or "(unnamed)", reason)
        try:
            connection.sock.send(protocol.encode(protocol.Refused(reason[:1000])), socket.MSG_NOSIGNAL)
        except OSError as error:
            logger.debug("the refused importer could not be told: %s", error)
        # It may map slabs and write to them, so its process's end must still be seen: hang up one way and watch for EPOLLHUP.
        connection.condemned = True
        with self._lock:
            connection.outgoing.clear()
        self._poll.modify(connection.sock.fileno(), 0)
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            logger.debug("the refused importer is gone already: %s", error)

    def _drop(self, connection: _Connection) -> None:
        fd = connection.sock.fileno()
        self._poll.unregister(fd)
        with self._changed:
            del self._connections[fd]
            known = any(other.client == connection.client for other in self._connections.values())
            if connection.client and not known:
                self._ended.add(connection.client)
            self._changed.notify_all()
        connection.sock.close()
        if connection.client and not known:
            self._gate.hung_up(connection.client)
            self._on_importer_gone(connection.client)


def _listen(path: str) -> socket.socket:
    """Bind and listen, then show the socket under its name: whoever finds the name can connect."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    hidden = f"{path[: -len('.sock')]}.new"
    try:
        Path(hidden).unlink(missing_ok=True)
        sock.bind(hidden)
        os.chmod(hidden, 0o600)
        sock.listen(128)
        os.rename(hidden, path)
    except OSError as error:
        sock.close()
        raise SegmentError(f"segment.broker_dir: cannot serve {path}: {error.strerror}") from None
    return sock


def _remove_stale_sockets(folder: Path) -> None:
    """Remove the sockets of lenders that were killed: they refuse connections, and nobody will ever serve them again."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.debug("left %s alone: %s", path, error)
