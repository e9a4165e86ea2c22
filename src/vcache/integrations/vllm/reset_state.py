"""How far a reset of the shared cache has got: what the manager is still to be told, and which saves it has overtaken."""

from __future__ import annotations

from collections.abc import Iterable

RETRY_SECONDS = 5.0
"""Between attempts to clear the cache while the manager is away."""


class ResetState:
    """Keeps account of resets; carries out nothing. Has no clock: `now` is in seconds."""

    def __init__(self) -> None:
        self.happened = False
        """Whether there was a reset, ever: what storage holds cannot be told from what is valid."""
        self.owed = False
        """Whether chunks of before the reset may still be in the pool. Until then it is not used."""
        self._due = 0.0
        self._stale: set[int] = set()

    def begin(self, saves: Iterable[int], now: float) -> None:
        """The cache is to be cleared, at once. `saves`: jobs that are under way, and will store what is not wanted any more."""
        self.happened = self.owed = True
        self._due = now
        self._stale.update(saves)

    def due(self, now: float) -> bool:
        """Whether to ask the manager now to clear the cache."""
        return self.owed and now >= self._due

    def put_off(self, now: float) -> None:
        """The manager could not be asked: try again after `RETRY_SECONDS`."""
        self._due = now + RETRY_SECONDS

    def cleared(self) -> None:
        """The manager has cleared the cache."""
        self.owed = False

    def overtook(self, job: int) -> bool:
        """Whether a save that has ended had begun before a reset: what it stored must go. Forgets the job."""
        if job not in self._stale:
            return False
        self._stale.discard(job)
        return True
