"""Maps what is lent as soon as it is announced, so that no transfer has to wait for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection

from ..segment.mapping import SegmentMap

PATIENCE = 600.0
"""Seconds that one segment may take. Making host memory reachable for a GPU takes 0.3 s a GiB."""


class Mapper:
    """Maps the slabs of announced segments, one at a time, in a thread of its own. Thread-safe."""

    def __init__(self, segments: SegmentMap, *, ahead: bool) -> None:
        """`ahead`: whether to do so at all; slabs are mapped when a transfer needs them otherwise, and it waits for them, which
        is short where nothing has to be registered with a GPU."""
        self._segments = segments
        self._ahead = ahead
        self._changed = threading.Condition()
        self._wanted: deque[int] = deque()
        self._over: set[int] = set()
        """Segments that were mapped, as far as they can be, or went."""
        self._session = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def session_began(self) -> None:
        """Numbers mean other segments from now on. Does not block."""
        with self._changed:
            self._session += 1
            self._wanted.clear()
            self._over.clear()
            self._changed.notify_all()

    def want(self, number: int) -> None:
        """Segment `number` was announced, or has changed. Does not block."""
        with self._changed:
            if not self._ahead:
                self._ended(number)
            elif not self._closed and number not in self._wanted:
                self._wanted.append(number)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="vcache-mapper", daemon=True)
                    self._thread.start()
                self._changed.notify_all()

    def gone(self, number: int) -> None:
        """Segment `number` is not lent any more. Does not block."""
        with self._changed:
            self._ended(number)

    def wait(self, numbers: Collection[int], timeout: float) -> bool:
        """Block until these segments, whether they were announced yet or not, are mapped or cannot be; False on timeout
        (seconds), and when the manager begins a new session meanwhile."""
        with self._changed:
            session = self._session
            self._changed.wait_for(lambda: self._over.issuperset(numbers) or self._session != session, timeout)
            return self._over.issuperset(numbers) and self._session == session

    def close(self) -> None:
        """Map no more. Blocks for the slab that is being mapped. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _ended(self, number: int) -> None:
        self._over.add(number)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                session, number = self._session, self._wanted.popleft()

            def stop(session: int = session) -> bool:
                return self._closed or self._session != session

            self._segments.prepare(number, PATIENCE, stop)
            with self._changed:
                if not stop():
                    self._ended(number)
