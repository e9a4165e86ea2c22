"""How fast something may go in the background."""

from __future__ import annotations


class Pace:
    """A token bucket that may be overdrawn: what was moved is paid for before more is begun, and idle time is saved up for
    `burst` seconds at most. Has no clock: `now` is in seconds, and never goes back. Not thread-safe."""

    def __init__(self, rate: float, now: float, burst: float = 0.25) -> None:
        """`rate`: bytes a second, 0 for no limit."""
        self.rate = rate
        self._burst = burst
        self._even = now - burst
        """When all that was moved is, or was, paid for."""

    def moved(self, nbytes: int, now: float) -> None:
        """So many bytes were moved."""
        if self.rate:
            self._even = max(self._even, now - self._burst) + nbytes / self.rate

    def delay(self, now: float) -> float:
        """Seconds until more may be begun; 0 for at once."""
        return max(0.0, self._even - now) if self.rate else 0.0
