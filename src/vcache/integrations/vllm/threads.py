"""Threads beside the model runner's: work that is handed to them is done or, if it never comes to that, refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

Work = Callable[[], None]
Run = Callable[[Work], None]
"""Does work in the thread that calls it, or fails before the work has begun."""


class Threads:
    """Does work in a few threads. Whoever waits for the work hears of it whatever happens: of each piece either `work` runs or
    `refuse`, once. Thread-safe."""

    def __init__(self, name: str, count: int, complain: Callable[[str, BaseException], None]) -> None:
        """`complain`: told what went wrong, in any thread."""
        self._executor = ThreadPoolExecutor(count, name)
        self._complain = complain
        self._lock = threading.Lock()
        self._pending: set[Future[None]] = set()

    def submit(self, work: Work, refuse: Work, run: Run) -> Future[None] | None:
        """Let a thread do `run(work)`; when that fails before the work has begun, or no thread can be had, refuse the work, in
        whatever thread finds out. Returns None when that was this one. Does not block."""
        turn = threading.Lock()  # for the first of the two

        def take(either: Work) -> None:
            if turn.acquire(blocking=False):
                either()

        def over(future: Future[None]) -> None:
            with self._lock:
                self._pending.discard(future)
            error = future.exception()
            if error is not None:
                self._complain("a transfer ended", error)
                take(refuse)

        try:
            future = self._executor.submit(run, partial(take, work))
        except Exception as error:  # noqa: BLE001 - no thread can be started
            self._complain("a transfer was not started", error)
            take(refuse)
            return None
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(over)
        return future

    def drain(self, timeout: float | None = None) -> bool:
        """Wait for all work that was submitted; False on timeout (seconds)."""
        with self._lock:
            pending = set(self._pending)
        return not wait(pending, timeout).not_done

    def close(self) -> None:
        """Let the threads end when their work is done; refuse more. Idempotent. Does not block."""
        self._executor.shutdown(wait=False)
