"""Circuit breaker: after repeated failures, stop asking for a while, then let one caller try. No IO; the clock is passed in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Thread-safe. Nothing here blocks.

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
