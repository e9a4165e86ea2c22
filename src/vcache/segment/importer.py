"""Maps other processes' slabs: one thread that talks to all lenders' brokers, maps what they hand over, unmaps on request."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Literal

from ..errors import ProtocolError, SegmentError, SlabGoneError, VCacheError
from ..sockets import close_in_forked_child, peer_uid
from . import handover as protocol
from .backing import MappedSlab, SlabBacking
from .gate import WriteGate

logger = logging.getLogger(__name__)

LinkState = Literal["idle", "greeting", "up", "lost"]


class _Wanted:
    """A slab that was asked for and has not come yet."""

    __slots__ = ("futures", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.futures: list[Future[MappedSlab]] = []


class Link:
    """One segment's lender, as this process sees it. Only the importer's thread changes it (but `bound`); reading is free.

    States: `idle` (not connected; `problem` says why the last attempt failed), `greeting`, `up`, `lost` (for good: the lender
    ended or broke the protocol). A process connects once to a segment: a second connection could overtake the news of the
    first one's end, which the manager takes for the end of this process's writes.
    """

    def __init__(self, uuid: bytes, path: str, backing: Callable[[], SlabBacking]) -> None:
        self.uuid = uuid
        self.path = path
        self.state: LinkState = "idle"
        self.problem = ""
        """Why slabs cannot be mapped now; empty when they can."""
        self.retry_at = 0.0
        """`time.monotonic` before which an idle link is not tried again."""
        self.settled = threading.Event()
        """Set once the first attempt has succeeded or failed."""
        self.mapped: dict[int, MappedSlab] = {}
        self.gone: set[int] = set()
        """Slabs that the lender took back; their numbers are never used again."""
        self.bound = True
        """Whether somebody still wants the segment; without that, a lost link unmaps."""
        self.gate: WriteGate | None = None
        """That this process's writes pass; there from `up` on."""
        self._make_backing = backing
        self._backing: SlabBacking | None = None
        self._sock: socket.socket | None = None
        self._wanted: dict[int, _Wanted] = {}
        self._leaving: Counter[int] = Counter()
        """Retired mappings per slab that wait for their pins."""
        self._outgoing: deque[bytes] = deque()
        self._answer_by = 0.0

    @property
    def in_use(self) -> bool:
        return bool(self.mapped or self._leaving)

    def __repr__(self) -> str:
        return f"<Link {self.uuid.hex()[:8]} {self.state}, {len(self.mapped)} slabs{self.problem and ', ' + self.problem}>"


class Importer:
    """Connects to lenders, maps slabs and unmaps them, in a thread of its own. Thread-safe. No method blocks but `close`."""

    def __init__(self, client_id: bytes, *, timeout: float = 1.0, retry_after: float = 2.0) -> None:
        """`timeout`: seconds that a lender may take to answer hello. `retry_after`: seconds between attempts to connect."""
        self._client_id = client_id
        self._timeout = timeout
        self._retry_after = retry_after
        self._uid = os.geteuid()
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._links: list[Link] = []
        self._closing = False
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="vcache-importer", daemon=True)
        self._thread.start()
        close_in_forked_child(self, Importer.close_sockets)

    # -- called from anywhere ----------------------------------------------------------------------------------------

    def open(self, uuid: bytes, path: str, backing: Callable[[], SlabBacking]) -> Link:
        """Start connecting to the lender of segment `uuid`. `backing` is called in the importer's thread, may raise
        `VCacheError`, and maps the slabs. Call once per segment."""
        link = Link(uuid, path, backing)
        self._post(lambda: self._open(link))
        return link

    def reconnect(self, link: Link) -> None:
        """Try an idle link again."""
        self._post(lambda: self._connect(link))

    def map(self, link: Link, index: int, nbytes: int) -> Future[MappedSlab]:
        """Ask for a slab; the mapped one, once it is there. However often it is asked for, it is mapped once. The future
        fails with `SlabGoneError` when it is not lent any more, with another `VCacheError` when it cannot be had now."""
        future: Future[MappedSlab] = Future()
        if not self._post(lambda: self._want(link, index, nbytes, future)):
            future.set_exception(SegmentError("the segment map is closed"))
        return future

    def drop(self, link: Link, indices: Collection[int] | None = None) -> None:
        """Unmap these slabs (default: all) as soon as no pin holds them. They can be mapped again."""
        self._post(lambda: self._drop(link, list(link.mapped) if indices is None else indices))

    def unbind(self, link: Link) -> None:
        """Stop wanting the segment: keep what is mapped for as long as its lender lives, in case it comes back."""
        link.bound = False
        self._post(lambda: self._tidy(link))

    def close(self, timeout: float) -> bool:
        """Unmap all, hang up, end the thread. Blocks at most `timeout` seconds. False when pins still hold slabs: these stay
        mapped and their lenders' connections open until the last pin is gone. Idempotent."""
        self._post(self._begin_close)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close_sockets(self) -> None:
        """Close this process's descriptors without a word; for a forked child, which must not stand in for its parent."""
        for link in self._links:
            if link._sock is not None:
                link._sock.close()

    def _post(self, job: Callable[[], None]) -> bool:
        with self._lock:
            if self._ended:
                return False
            self._jobs.append(job)
            os.eventfd_write(self._wake_fd, 1)
        return True

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._closing and not any(link.in_use for link in self._links)):
                for key, events in self._selector.select(self._next_timeout()):
                    if key.data is None:
                        os.eventfd_read(self._wake_fd)
                    else:
                        self._serve(key.data, events)
                self._run_jobs()
                self._check_greetings()
        finally:
            self._end()

    def _run_jobs(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            job()

    def _end(self) -> None:
        self._closing = True
        for link in self._links:
            self._lost(link, "the segment map is closed")
            if link._sock is not None:
                link._sock.close()
        with self._lock:
            self._ended = True
            jobs = list(self._jobs)
        for job in jobs:
            job()
        self._selector.close()
        os.close(self._wake_fd)

    def _begin_close(self) -> None:
        self._closing = True
        for link in self._links:
            self._drop(link, list(link.mapped))

    def _next_timeout(self) -> float | None:
        waiting = [link._answer_by for link in self._links if link._answer_by]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def _check_greetings(self) -> None:
        now = time.monotonic()
        for link in self._links:
            if link._answer_by and link._answer_by <= now:
                link._answer_by = 0.0
                self._fail(link, f"its lender does not answer (no welcome within {self._timeout:g} s)")

    # -- connecting --------------------------------------------------------------------------------------------------

    def _open(self, link: Link) -> None:
        self._links.append(link)
        self._connect(link)

    def _connect(self, link: Link) -> None:
        if link.state != "idle":
            if link.state != "greeting":
                link.settled.set()
            return
        if self._closing:
            self._fail(link, "the segment map is closed")
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if link._backing is None:
                link._backing = link._make_backing()
            sock.connect(link.path)
            uid = peer_uid(sock)
            if uid not in (self._uid, 0):
                raise SegmentError(f"its lender runs as user {uid}, this process as {self._uid}")
            sock.send(protocol.encode(protocol.Hello(protocol.BROKER_VERSION, self._client_id, link.uuid)), socket.MSG_NOSIGNAL)
        except (VCacheError, OSError) as error:
            sock.close()
            link.retry_at = time.monotonic() + self._retry_after
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._fail(link, f"cannot reach its lender at {link.path}: {text}")
            return
        link._sock = sock
        link.state = "greeting"
        link._answer_by = time.monotonic() + self._timeout
        self._selector.register(sock, selectors.EVENT_READ, link)

    def _fail(self, link: Link, problem: str) -> None:
        """Fail all that waits: nothing can be mapped now."""
        if link.problem != problem:
            logger.log(logging.INFO if self._closing else logging.WARNING, "segment %s: %s", link.uuid.hex()[:8], problem)
        link.problem = problem
        link.settled.set()
        wanted, link._wanted = link._wanted, {}
        for want in wanted.values():
            for future in want.futures:
                future.set_exception(SegmentError(problem))

    def _lost(self, link: Link, problem: str) -> None:
        """Give the lender up: no word comes from it any more. What is mapped stays, and so does our end of the socket: while it
        is open, a lender that lives (but broke with us) does not take this process's writes for ended."""
        if link._sock is not None and link.state != "lost":
            self._selector.unregister(link._sock)
        link.state = "lost"
        link._answer_by = 0.0
        link._outgoing.clear()
        self._fail(link, problem)
        self._tidy(link)

    def _tidy(self, link: Link) -> None:
        if link.state != "lost":
            return
        if not link.bound:
            self._drop(link, list(link.mapped))
        if not link.in_use and link._sock is not None:
            link._sock.close()
            link._sock = None

    # -- talking -----------------------------------------------------------------------------------------------------

    def _serve(self, link: Link, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(link)
        if not events & selectors.EVENT_READ or link._sock is None or link.state == "lost":
            return
        fds: list[int] = []
        try:
            frame, fds, flags, _ = socket.recv_fds(link._sock, protocol.MAX_FRAME, 4, socket.MSG_CMSG_CLOEXEC)
            if not frame:
                self._lost(link, "its lender ended")
            elif flags & socket.MSG_TRUNC:
                raise ProtocolError("too long a message")
            else:
                self._handle(link, protocol.decode_from_lender(frame), fds)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(link, f"its lender ended ({error.strerror})")
        except (ProtocolError, SegmentError) as error:
            self._lost(link, str(error))
        finally:
            for fd in fds:
                os.close(fd)

    def _handle(self, link: Link, message: protocol.FromLender, fds: list[int]) -> None:
        if isinstance(message, protocol.Refused):
            self._lost(link, f"its lender refuses: {message.reason}")
        elif isinstance(message, protocol.Welcome):
            if len(fds) != 1:
                raise ProtocolError("a welcome without the segment's gate; is the limit of open files (ulimit -n) too low?")
            link.gate = WriteGate.map(fds[0], message.row)
            link.state, link.problem, link._answer_by = "up", "", 0.0
            link.settled.set()
            for index in link._wanted:
                self._send(link, protocol.Get(index))
        elif isinstance(message, protocol.Granted):
            self._granted(link, message, fds)
        elif isinstance(message, protocol.Gone):
            link.gone.add(message.slab)
            want = link._wanted.pop(message.slab, None)
            for future in want.futures if want else ():
                future.set_exception(SlabGoneError(f"slab {message.slab} is not lent any more"))
            self._acknowledge(link, message.slab)
        else:
            link.gone.update(message.slabs)
            self._drop(link, message.slabs)

    def _send(self, link: Link, message: protocol.FromImporter) -> None:
        link._outgoing.append(protocol.encode(message))
        if len(link._outgoing) == 1:
            self._flush(link)

    def _flush(self, link: Link) -> None:
        if link._sock is None or link.state == "lost":
            return
        try:
            while link._outgoing:
                link._sock.send(link._outgoing[0], socket.MSG_NOSIGNAL)
                link._outgoing.popleft()
            self._selector.modify(link._sock, selectors.EVENT_READ, link)
        except BlockingIOError:
            self._selector.modify(link._sock, selectors.EVENT_READ | selectors.EVENT_WRITE, link)
        except OSError as error:
            # What the lender said before it ended is still to be read; reading finds the end.
            link._outgoing.clear()
            logger.debug("segment %s: its lender cannot be told: %s", link.uuid.hex()[:8], error)

    # -- mapping and unmapping ---------------------------------------------------------------------------------------

    def _want(self, link: Link, index: int, nbytes: int, future: Future[MappedSlab]) -> None:
        slab = link.mapped.get(index)
        if slab is not None:
            future.set_result(slab)
        elif index in link.gone:
            future.set_exception(SlabGoneError(f"slab {index} is not lent any more"))
        elif self._closing or link.state == "lost" or (link.state == "greeting" and link.problem):
            future.set_exception(SegmentError(link.problem or "the segment map is closed"))
        else:
            new = index not in link._wanted
            want = link._wanted.setdefault(index, _Wanted(nbytes))
            want.futures.append(future)
            if link.state == "idle":
                self._connect(link)
            elif link.state == "up" and new:
                self._send(link, protocol.Get(index))

    def _granted(self, link: Link, message: protocol.Granted, fds: list[int]) -> None:
        want = link._wanted.pop(message.slab, None)
        backing = link._backing
        if want is None or backing is None:
            self._acknowledge(link, message.slab)
            return
        try:
            if message.nbytes != want.nbytes:
                raise SegmentError(f"slab {message.slab} has {message.nbytes} bytes instead of {want.nbytes}")
            if len(fds) != 1:
                raise SegmentError(f"slab {message.slab} came without its file descriptor; is the limit (ulimit -n) too low?")
            slab = backing.map(fds[0], message.nbytes)
        except VCacheError as error:
            self._acknowledge(link, message.slab)
            for future in want.futures:
                future.set_exception(error)
            return
        slab.index, slab.gate = message.slab, link.gate
        link.mapped[message.slab] = slab
        for future in want.futures:
            future.set_result(slab)

    def _drop(self, link: Link, indices: Collection[int]) -> None:
        for index in indices:
            slab = link.mapped.pop(index, None)
            if slab is not None:
                link._leaving[index] += 1
                slab.retire(self._when_idle(link, index, slab))
            else:
                self._acknowledge(link, index)

    def _when_idle(self, link: Link, index: int, slab: MappedSlab) -> Callable[[], None]:
        def unmap_later() -> None:
            # The last pin may be dropped by a thread that moves data; unmapping can take milliseconds and is ours to do.
            self._post(lambda: self._unmap(link, index, slab))

        return unmap_later

    def _unmap(self, link: Link, index: int, slab: MappedSlab) -> None:
        assert link._backing is not None
        try:
            link._backing.unmap(slab)
        except VCacheError as error:
            logger.error("segment %s: slab %d cannot be unmapped: %s", link.uuid.hex()[:8], index, error)
        link._leaving[index] -= 1
        if not link._leaving[index]:
            del link._leaving[index]
        self._acknowledge(link, index)
        self._tidy(link)

    def _acknowledge(self, link: Link, index: int) -> None:
        """Tell the lender that we do not map this slab, unless we do, or may soon."""
        if link.state == "up" and not (index in link.mapped or index in link._wanted or index in link._leaving):
            self._send(link, protocol.Unmapped([index]))
