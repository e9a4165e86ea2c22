"""What a manager allows those that it does not know, or that do not finish what they began: in number, bytes and log lines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

LOG_INTERVAL = 10.0
"""Seconds between two log lines about connections that were closed for the same reason."""


class LogThrottle:
    """Decides which lines are logged. Not thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def allows(self, reason: str) -> int | None:
        """None when the line is to be left out; else the number of lines left out for this reason since the last one. There
        must be few reasons: each is remembered."""
        now = self._clock()
        if now < self._next.get(reason, now):
            self._left_out[reason] = self._left_out.get(reason, 0) + 1
            return None
        self._next[reason] = now + LOG_INTERVAL
        return self._left_out.pop(reason, 0)


class Budget(Generic[T]):
    """A sum over holders that stays below a limit, at the cost of who has held on longest. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._amounts: OrderedDict[T, int] = OrderedDict()
        self._total = 0

    def set(self, holder: T, amount: int) -> list[T]:
        """`holder` holds that much now; 0 ends it. Those that must give up, who hold nothing any more by this account."""
        before = self._amounts.get(holder, 0)
        self._total += amount - before
        if amount:
            self._amounts[holder] = amount
        elif before:
            del self._amounts[holder]
        ended: list[T] = []
        while self._total > self._limit:
            oldest, freed = self._amounts.popitem(last=False)
            self._total -= freed
            ended.append(oldest)
        return ended
