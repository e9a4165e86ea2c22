"""Keeps callers from waiting for what fails or hangs: a circuit breaker, and a guard that adds deadlines and probes."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

BreakerState = Literal["closed", "open", "half_open"]

_COOLDOWN, _MAX_COOLDOWN = 0.5, 4.0
_FAILURES = 2


class CircuitBreaker:
    """Stops asking after repeated failures for a while, then lets one caller try. Thread-safe. Nothing here blocks.

    `closed`: everything passes. `open`: nothing passes, for a cool-down that doubles with every failed probe up to a cap.
    `half_open`: the cool-down is over; one caller at a time passes as a probe, and its success closes the breaker. A probe
    that never reports is forgotten after one further cool-down.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        threshold: int = 3,
        cooldown: float = 1.0,
        max_cooldown: float = 30.0,
        jitter: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`clock`: monotonic seconds. `threshold`: consecutive failures that open it. `cooldown`, `max_cooldown`: seconds.

        `jitter` returns a value in [0, 1) for each cool-down, which is lengthened by up to half of itself times that value, so
        that many clients do not come back at the same instant; pass `random.random`.
        """
        self._clock = clock
        self._threshold = threshold
        self._cooldown = cooldown
        self._max_cooldown = max_cooldown
        self._jitter = jitter
        self._lock = threading.Lock()
        self._failures = 0
        self._trips = 0
        self._open_until: float | None = None
        self._probe_until: float | None = None
        self._pause = cooldown

    @property
    def state(self) -> BreakerState:
        with self._lock:
            return self._state(self._clock())

    @property
    def failures(self) -> int:
        """Consecutive failures so far."""
        return self._failures

    def retry_in(self) -> float:
        """Seconds until a call may pass; 0 when one may pass now."""
        with self._lock:
            now = self._clock()
            if self._open_until is None:
                return 0.0
            return max(0.0, self._open_until - now, (self._probe_until or now) - now)

    def allow(self) -> bool:
        """Whether the caller may go on. In `half_open`, True makes the caller the probe: it must report its outcome."""
        if self._open_until is None:
            return True
        with self._lock:
            now = self._clock()
            state = self._state(now)
            if state == "half_open" and (self._probe_until is None or self._probe_until <= now):
                self._probe_until = now + self._pause
                return True
            return state == "closed"

    def success(self) -> None:
        """A call worked: close."""
        if not self._failures and self._open_until is None:
            return
        with self._lock:
            self._failures = self._trips = 0
            self._open_until = self._probe_until = None

    def failure(self) -> bool:
        """A call failed. Returns whether the breaker is open now."""
        with self._lock:
            now = self._clock()
            self._failures += 1
            if self._open_until is not None:
                if self._state(now) == "half_open":
                    self._trip(now)  # The probe failed. A straggler from before the trip changes nothing.
            elif self._failures >= self._threshold:
                self._trip(now)
            return self._open_until is not None

    def trip(self) -> None:
        """Open at once, whatever the count: the caller knows that the other side is gone. No effect while open."""
        with self._lock:
            now = self._clock()
            if self._state(now) != "open":
                self._trip(now)

    def _state(self, now: float) -> BreakerState:
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def _trip(self, now: float) -> None:
        pause = min(self._cooldown * 2.0 ** min(self._trips, 60), self._max_cooldown)
        self._pause = pause * (1.0 + self._jitter() / 2)
        self._trips += 1
        self._open_until = now + self._pause
        self._probe_until = None


class CallTimeoutError(TimeoutError):
    """A call outlasted its time and was left behind."""

    def __init__(self, call: Future[Any], began: bool) -> None:
        super().__init__("no answer within the deadline")
        self.began = began
        """Whether it may still run, with all that it uses; otherwise it never will."""
        self._call = call

    def when_over(self, callback: Callable[[], None]) -> None:
        """Call back when it has ended: at once if it has, else from its thread."""
        self._call.add_done_callback(lambda _: callback())


class Start(Protocol):
    """Starts work in another thread. What it raises counts as a failure of the work."""

    def __call__(self, work: Callable[[], T], /) -> Future[T]: ...


class Guard:
    """Makes calls that may fail or hang, for callers who must not wait. Thread-safe.

    Each call runs in another thread, where it is left behind when its time is over. After some failures `admits` turns callers
    away, until a probe has succeeded; it runs in the background, so that nobody waits for it either.
    """

    def __init__(self, start_probe: Start, breaker: CircuitBreaker | None = None) -> None:
        """`start_probe`: where probes run, one at a time."""
        self.breaker = breaker or CircuitBreaker(
            time.monotonic, threshold=_FAILURES, cooldown=_COOLDOWN, max_cooldown=_MAX_COOLDOWN, jitter=random.random
        )
        self._start_probe = start_probe
        self._lock = threading.Lock()
        self._probe: Future[None] | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def admits(self, probe: Callable[[], None]) -> bool:
        """Tell whether calls may be made now. If not, and it is time, start `probe`, which raises if they still may not.
        Does not block."""
        if self.breaker.state == "closed":
            return True
        with self._lock:
            if not self._closed and (self._probe is None or self._probe.done()) and self.breaker.allow():
                try:
                    self._probe = self._start_probe(probe)
                except Exception:  # noqa: BLE001 - no thread to be had, say
                    self.breaker.failure()
                else:
                    self._probe.add_done_callback(self._probed)
        return False

    def call(self, work: Callable[[], T], until: float, start: Start, failing: Callable[[], object] = lambda: None) -> T:
        """Return what `work` does in a thread of `start`. Blocks at most until `until` (by `time.monotonic`).

        Raises `CallTimeoutError`, or whatever `start` or `work` raises; `failing` is called before, and before any probe can
        begin. Asks no breaker: `admits` does."""
        try:
            call = start(work)
        except Exception:
            failing()
            self.breaker.failure()
            raise
        try:
            error = call.exception(max(0.0, until - time.monotonic()))
        except FutureTimeout:
            failing()
            self.breaker.trip()
            raise CallTimeoutError(call, began=not call.cancel()) from None
        if error is not None:
            failing()
            self.breaker.failure()
            raise error
        self.breaker.success()
        return call.result()

    def close(self) -> bool:
        """Start no more probes; False when it was closed already. Does not block."""
        with self._lock:
            was_closed, self._closed = self._closed, True
        return not was_closed

    def _probed(self, probe: Future[None]) -> None:
        if probe.cancelled() or probe.exception() is not None:
            self.breaker.failure()
        else:
            self.breaker.success()


class DaemonThreads:
    """Daemon threads that work off a queue, `start` by `start`. (Those of `ThreadPoolExecutor` are waited for at the end of the
    process.)"""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def start(self, work: Callable[[], T], /) -> Future[T]:
        """Queue `work`. Does not block."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def close(self) -> None:
        """Threads end after what they are doing and what is queued."""
        for _ in range(self._threads):
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                _run_into(future, work)


def start_thread(name: str, work: Callable[[], T]) -> Future[T]:
    """Run `work` in a daemon thread of its own: one that is stuck does not hold up the end of the process. Raises
    `RuntimeError` when no thread is to be had."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_run_into, args=(future, work), name=name, daemon=True).start()
    return future


def _run_into(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - it belongs to the caller
        future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - a binding's `SystemExit`, say: it ends neither this thread nor the caller
        failure = RuntimeError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        future.set_exception(failure)
    else:
        future.set_result(result)
