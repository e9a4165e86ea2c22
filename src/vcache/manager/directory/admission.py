"""Which new chunks may push others out of a full pool: all, or, where that gives more hits, those that are offered again.

First turns of one-off prompts push out what is wanted when the pool is small for its load; when it is large enough, each first
turn is worth keeping for the second. Which of both it is, two small shadows of the pool find out: they hold names alone, of a
sample of the chunks, and play one LRU each, one that lets all in, one only the second time (set duelling: Qureshi et al., ISCA
2007, and spatial sampling: Waldspurger et al., FAST 2015).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal

from ...errors import IntegrityError

SHADOW_CHUNKS = 1024
"""Names in a shadow: from so many on, fewer of the chunks are followed."""
MAX_SHIFT = 8
"""One in 256 chunks is followed at least."""
WINDOW = 8
"""A second offer counts while not more than so many times the pool's chunks were offered after the first one."""
MAX_GENERATION = 1 << 21
"""Offers remembered in one generation of the memory at most, two of which there are: 4 MiB."""
ROUND = 4
"""Uses between two judgements, times the chunks of a shadow."""
MIN_ROUND = 256
"""The same at least: fewer say nothing."""
MARGIN = 1.02
"""The other way must give so many times the hits."""
REPEAT = 8
"""A use within so many eighths of a second after one is the same prompt's: its scheduler's, workers' and writer's."""

_PROBES = struct.Struct("<4I")
_SPREAD = 0x9E3779B1
_BITS_PER_KEY = 8
_MIN_BITS = 1 << 13


class OfferMemory:
    """Remembers which shards of chunks were offered: a Bloom filter in two generations, the older of which is forgotten when
    the younger is full. Says now and then that something was offered that was not (below 5%)."""

    def __init__(self, generation: int) -> None:
        """`generation`: offers in one."""
        self._limit = max(1, min(generation, MAX_GENERATION))
        size = _MIN_BITS
        while size < _BITS_PER_KEY * self._limit:
            size *= 2
        self._mask = size - 1
        self._young, self._old = bytearray(size // 8), bytearray(size // 8)
        self._count = 0

    @property
    def nbytes(self) -> int:
        """What it takes, for good."""
        return len(self._young) + len(self._old)

    def offer(self, key: bytes, shard: int) -> bool:
        """Remember one; whether it was remembered before."""
        mask, young, old = self._mask, self._young, self._old
        fresh = known = True
        for probe in _PROBES.unpack_from(key):
            at = (probe ^ shard * _SPREAD) & mask
            byte, bit = at >> 3, 1 << (at & 7)
            if not young[byte] & bit:
                known = False
                young[byte] |= bit
            fresh = fresh and bool(old[byte] & bit)
        if not known:
            self._count += 1
            if self._count >= self._limit:
                self._young, self._old, self._count = bytearray(len(young)), young, 0
        return known or fresh


class _Duel:
    """Two shadows of the pool and their hits."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        """Names in each at most."""
        self.all: OrderedDict[bytes, int] = OrderedDict()
        """Lets all in; when each was used, as in `Record.used`. The latest last."""
        self.again: OrderedDict[bytes, None] = OrderedDict()
        """Lets in what is used again while it is among `once`."""
        self.once: OrderedDict[bytes, None] = OrderedDict()
        self.hits_all = 0.0
        self.hits_again = 0.0
        self.uses = 0

    def resize(self, chunks: int) -> None:
        """Keep so many names in each."""
        self.chunks = chunks
        self._trim()

    def use(self, key: bytes, clock: int) -> None:
        """A chunk was used, or would have been."""
        used = self.all.get(key)
        if used is not None and clock - used < REPEAT:
            return
        self.uses += 1
        self.hits_all += used is not None
        self.all[key] = clock
        self.all.move_to_end(key)
        if key in self.again:
            self.hits_again += 1
            self.again.move_to_end(key)
        elif key in self.once or len(self.again) < self.chunks:
            self.once.pop(key, None)
            self.again[key] = None
        else:
            self.once[key] = None
        self._trim()

    def judge(self, selective: bool) -> bool:
        """Which way to go on, after enough uses; what was longer ago counts less."""
        if self.uses < max(ROUND * self.chunks, MIN_ROUND):
            return selective
        now, other = (self.hits_again, self.hits_all) if selective else (self.hits_all, self.hits_again)
        self.uses, self.hits_all, self.hits_again = 0, self.hits_all / 2, self.hits_again / 2
        return not selective if other > MARGIN * now else selective

    def _trim(self) -> None:
        while len(self.all) > self.chunks:
            self.all.popitem(last=False)
        for names, limit in ((self.again, self.chunks), (self.once, WINDOW * self.chunks)):
            while len(names) > limit:
                names.popitem(last=False)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when there are more names than there may be, or one is where it cannot be."""
        sizes = len(self.all), len(self.again), len(self.once)
        if max(sizes[:2]) > self.chunks or sizes[2] > WINDOW * self.chunks:
            raise IntegrityError(f"admission: shadows hold {sizes} names, {self.chunks} chunks are theirs")
        if not self.again.keys().isdisjoint(self.once):
            raise IntegrityError("admission: a name is in a shadow and waits for it")


class Admission:
    """Decides for one directory. With `all`, or while the pool has never been full, it keeps nothing and lets everything in."""

    def __init__(self, name: Literal["all", "reuse"]) -> None:
        """`name`: of `manager.admission`."""
        self._judges = name == "reuse"
        self.selective = False
        """Whether a chunk is let into a full pool only when it was offered before."""
        self._fitted = 0
        """Chunks of the pool for which everything is sized."""
        self._shift = 0
        """One in so many powers of two is followed."""
        self._mask = 0
        self._duel: _Duel | None = None
        """None: the pool has not been full yet."""
        self._memory = OfferMemory(1)

    @property
    def follows(self) -> bool:
        """Whether `used` means anything now."""
        return self._duel is not None

    def full(self, chunks: int) -> None:
        """The pool is full with so many chunks."""
        if not self._judges or not chunks:
            return
        if self._duel is None or not self._fitted <= 2 * chunks <= 4 * self._fitted:
            self._fit(chunks)
        elif max(1, chunks >> self._shift) != self._duel.chunks:
            self._duel.resize(max(1, chunks >> self._shift))

    def _fit(self, chunks: int) -> None:
        """Size everything anew; what is remembered stays where the sample does."""
        shift = min(MAX_SHIFT, (chunks // SHADOW_CHUNKS).bit_length())
        if self._duel is None or shift != self._shift:
            self._duel = _Duel(max(1, chunks >> shift))
        else:
            self._duel.resize(max(1, chunks >> shift))
        self._shift, self._mask, self._fitted = shift, (1 << shift) - 1, chunks
        self._memory = OfferMemory(WINDOW * chunks // 2)

    def used(self, keys: Sequence[bytes], clock: int) -> None:
        """Chunks of one prompt were found, in prompt order, or offered. `clock`: as in `Record.used`."""
        duel = self._duel
        if duel is None:
            return
        mask = self._mask
        followed = [key for key in keys if not key[0] & mask]
        if followed:
            for key in reversed(followed):  # the head is the latest
                duel.use(key, clock)
            self.selective = duel.judge(self.selective)

    def offered(self, keys: Iterable[bytes], shard: int) -> list[bool]:
        """Shards of chunks are offered; which of them were before, and may push others out now."""
        if self._duel is None:
            return [False for _ in keys]
        offer = self._memory.offer
        return [offer(key, shard) for key in keys]

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when it keeps more than it may."""
        if self._duel is not None:
            self._duel.check_integrity()
        elif self.selective:
            raise IntegrityError("admission: selective without a reason")
