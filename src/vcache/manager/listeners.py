"""Delivers events to listeners from a thread of its own, in order, so that a listener may itself call the manager."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from ..segment.slots import SegmentInfo
from .api import Listener, Push, SegmentGone, SegmentMounted, SessionInfo

logger = logging.getLogger("vcache.manager")


class Dispatcher:
    """Thread-safe. One daemon thread; it starts with the first job, so that a client nobody listens to costs none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def post(self, job: Callable[[], None]) -> None:
        """Queue a job; dropped after `close`. Does not block."""
        with self._lock:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put(job)

    def is_current(self) -> bool:
        """Whether the caller runs inside a job: such a caller must not wait for another job."""
        return threading.current_thread() is self._thread

    def close(self, timeout: float) -> None:
        """Run what is queued, then stop. Blocks at most `timeout` seconds. Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._jobs.put(None)
        if thread is not None and not self.is_current():
            thread.join(timeout)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a listener of the manager client raised; it is kept, the event is lost to it")


class Audience:
    """The listeners of one client, and the mounted segments that a newcomer must hear of. Thread-safe.

    Events are queued under the lock that also guards the list of segments, so that every listener sees the segments known
    when it subscribed, and then each later change once.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._session: SessionInfo | None = None
        self._segments: dict[bytes, SegmentInfo] = {}

    def subscribe(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.append(listener)
            if self._session is None:
                return
            session = self._session
            self._dispatcher.post(lambda: listener.on_session(session))
            for info in self._segments.values():
                self._post_push(listener, SegmentMounted(info))

    def listens(self) -> bool:
        """Whether anybody has subscribed."""
        return bool(self._listeners)

    def session_began(self, session: SessionInfo) -> None:
        with self._lock:
            self._session = session
            self._segments.clear()
            for listener in self._listeners:
                self._post_session(listener, session)

    def session_lost(self) -> None:
        with self._lock:
            if self._session is None:
                return
            self._session = None
            self._segments.clear()
            for listener in self._listeners:
                self._dispatcher.post(listener.on_disconnect)

    def push(self, push: Push) -> None:
        with self._lock:
            if isinstance(push, SegmentMounted):
                self._segments[push.info.uuid] = push.info
            elif isinstance(push, SegmentGone):
                self._segments.pop(push.uuid, None)
            for listener in self._listeners:
                self._post_push(listener, push)

    def _post_session(self, listener: Listener, session: SessionInfo) -> None:
        self._dispatcher.post(lambda: listener.on_session(session))

    def _post_push(self, listener: Listener, push: Push) -> None:
        self._dispatcher.post(lambda: listener.on_push(push))
