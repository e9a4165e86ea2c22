"""What this instance has learnt of single chunks: which were in the pool a moment ago, and which could not be loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

KNOWN_SECONDS = 60.0
KNOWN_CHUNKS = 100_000
"""Chunks seen in the pool are not offered to it again for this long; so many are remembered."""
BAD_SECONDS = 10.0
"""A chunk that could not be loaded ends every prefix for this long."""


class ChunkMemory:
    """Remembers chunks by digest, for a limited time. Has no clock: `now` is in seconds, and never goes back."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, float] = OrderedDict()
        """When each was last seen in the pool; the latest last."""
        self._bad: dict[bytes, float] = {}
        """Until when each ends a prefix."""

    def __len__(self) -> int:
        """Chunks remembered as in the pool."""
        return len(self._known)

    def saw(self, digests: Sequence[bytes], now: float) -> None:
        """Remember chunks as in the pool. Beyond `KNOWN_CHUNKS`, those seen longest ago are forgotten."""
        for digest in digests:
            self._known[digest] = now
            self._known.move_to_end(digest)
        while len(self._known) > KNOWN_CHUNKS:
            self._known.popitem(last=False)

    def stored(self, digests: Sequence[bytes], now: float) -> None:
        """Remember chunks as in the pool, and as good: whatever was wrong with their slots, they have others now."""
        self.saw(digests, now)
        for digest in digests:
            self._bad.pop(digest, None)

    def missed(self, digests: Sequence[bytes]) -> None:
        """Forget that chunks were in the pool."""
        for digest in digests:
            self._known.pop(digest, None)

    def failed(self, digest: bytes, now: float) -> None:
        """Remember that a chunk could not be loaded."""
        self._bad = {each: until for each, until in self._bad.items() if until > now}
        self._bad[digest] = now + BAD_SECONDS

    def known(self, digests: Sequence[bytes], now: float) -> int:
        """Count the leading chunks that need not be offered to the pool: they were seen there."""
        oldest = now - KNOWN_SECONDS
        return next((i for i, digest in enumerate(digests) if self._known.get(digest, -1e18) < oldest), len(digests))

    def usable(self, digests: Sequence[bytes], now: float) -> int:
        """Count the leading chunks that may be looked up: none of them failed a short time ago."""
        if not self._bad:
            return len(digests)
        return next((i for i, digest in enumerate(digests) if self._bad.get(digest, 0.0) > now), len(digests))

    def clear_known(self) -> None:
        """Forget all that was in the pool: the cache was reset."""
        self._known.clear()
