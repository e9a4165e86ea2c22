"""Where the chunks of a prompt are: the pool's VRAM and DRAM, then storage, then the pool again, as far as the prefix goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from ..keys import Chunk
from ..paged.mover import Rows
from .pool import HEAD_CHUNKS, ChunkPool, Lease, Presence, PutReport
from .storage_tier import ChunkStorage
from .transfer import PoolTransfer


def longest_prefix(
    count: int, pool: Callable[[int], Presence], storage: Callable[[int], int], *, rounds: int | None = None
) -> Presence:
    """Count the leading ones of `count` chunks that the pool and storage have together, or bring here: each goes on where the
    other one ends. Both get the number of chunks so far and say how many follow. `rounds`: at most so many."""
    found, failed = 0, False
    while found < count and rounds != 0:
        above = pool(found)
        found, failed = found + above.found, above.failed
        below = storage(found) if found < count else 0
        if not below:
            break
        found, rounds = found + below, None if rounds is None else rounds - 1
    return Presence(found, failed)


class Chunks(Protocol):
    """Consecutive chunks of a prompt, which may get their names only when they are asked for."""

    @property
    def length(self) -> int: ...

    def runs(self, begin: int, head: int) -> Iterable[list[Chunk]]:
        """Those from `begin` on, in order. Where the rest has no names yet, the first `head` of them come first: they are on
        their way while the rest is named."""

    def parent(self, index: int) -> bytes:
        """Digest of the chunk before chunk `index`; empty for a prompt's first, or when it is not known."""


class Tiers:
    """The pool and, behind it, the storage tier. Thread-safe; raises nothing for what fails: it is a miss, and counted."""

    def __init__(self, pool: ChunkPool, storage: ChunkStorage | None) -> None:
        """Owns neither."""
        self._pool = pool
        self.storage = storage
        """None when there is none, or when it was left."""

    def lookup(self, digests: Sequence[bytes]) -> Presence:
        """Count the leading chunks that are present. Blocks for a round trip for each change of tier; takes no lease."""
        return longest_prefix(len(digests), partial(self._in_pool, digests), partial(self._in_storage, digests))

    def load(self, chunks: Chunks, rows: Rows) -> Presence:
        """Load the longest prefix of `chunks` into `rows`; how much of it is there and verified. Blocks until it is."""
        return self.start_load(chunks, rows).result()

    def start_load(self, chunks: Chunks, rows: Rows, within: float | None = None) -> Loading:
        """Start to load the longest prefix of `chunks` into `rows`: what the pool has of it is on its way then. Blocks for a
        round trip; on a CPU, for the copy. The result raises what breaks.

        `within`: the round trip may take so many seconds, and what would block for a lender besides is left to the result."""
        return Loading(self, chunks, rows, within)

    def save(self, chunks: Sequence[Chunk], parent: bytes, rows: Rows) -> Saving:
        """Start storing those consecutive chunks that the pool does not have. `parent`: digest of the chunk before the first,
        empty for none. Blocks for a round trip; on a CPU, for the copy."""
        return Saving(self, self._pool.put(chunks, parent, rows), rows)

    def contains(self, digest: bytes) -> int:
        """Tell the best tier of a chunk: 0 for VRAM, 1 for a lower one, -1 for none. Does not count as a use."""
        tier = self._pool.tier(digest)
        return 1 if tier < 0 and self._in_storage([digest], 0) else tier

    def leave_storage(self) -> None:
        """Read nothing from the storage tier any more, and write nothing to it. Idempotent."""
        self.storage = None

    def _in_pool(self, digests: Sequence[bytes], begin: int) -> Presence:
        return self._pool.lookup(digests[begin:])

    def _in_storage(self, digests: Sequence[bytes], begin: int) -> int:
        storage = self.storage
        return 0 if storage is None else storage.prefix(digests[begin:])

    def _from_pool(self, chunks: Chunks, rows: Rows, begin: int, within: float | None = None) -> _FromPool:
        return _FromPool(self._pool, chunks, rows, begin, within)

    def _from_storage(self, chunks: Chunks, rows: Rows, begin: int) -> int:
        storage = self.storage
        if storage is None:
            return 0
        rest = [chunk for run in chunks.runs(begin, HEAD_CHUNKS) for chunk in run]
        return storage.load(rest, rows, chunks.parent(begin))


class Loading:
    """Chunks on their way into a paged cache: those that the pool has of a prefix, and then what storage has behind them."""

    def __init__(self, tiers: Tiers, chunks: Chunks, rows: Rows, within: float | None) -> None:
        """Made by `Tiers.start_load`."""
        self._tiers = tiers
        self._chunks = chunks
        self._rows = rows
        self._first = tiers._from_pool(chunks, rows, 0, within) if chunks.length else None

    def done(self) -> bool:
        """Whether what was started has landed. Does not block."""
        return self._first is None or self._first.done()

    def has_rest(self) -> bool:
        """Once done: whether `result` blocks, because chunks are missing that may be in storage, or that a lender must be asked
        for."""
        first = self._first
        if first is None:
            return False
        return first.held or (self._tiers.storage is not None and first.found() < self._chunks.length)

    def result(self) -> Presence:
        """How much of the prefix is there and verified. To be called once; blocks until that is known. Raises what broke the
        start; nothing is under way then."""
        return longest_prefix(self._chunks.length, self._pool, self._storage)

    def _pool(self, begin: int) -> Presence:
        part = self._first if begin == 0 else None
        return (part or self._tiers._from_pool(self._chunks, self._rows, begin)).result()

    def _storage(self, begin: int) -> int:
        return self._tiers._from_storage(self._chunks, self._rows, begin)


class _FromPool:
    """The pool's chunks from one of them on, on their way."""

    def __init__(self, pool: ChunkPool, chunks: Chunks, rows: Rows, begin: int, within: float | None) -> None:
        self._pool = pool
        self._rows = rows
        self._under_way: list[PoolTransfer[list[bool]]] = []
        self._held: list[tuple[Lease, list[Chunk]]] = []
        """Leased, and left to whoever waits."""
        self._failed = False
        self._error: BaseException | None = None
        try:
            for run in chunks.runs(begin, HEAD_CHUNKS):
                lease = pool.acquire([chunk.digest for chunk in run], within)
                self._failed = lease.failed
                if lease.locations:
                    waits = within is not None and (self._held or pool.segments.would_wait(lease.locations))
                    self._held.append((lease, run))
                    if not waits:
                        self._launch()
                if len(lease.locations) < len(run):
                    break
        except BaseException as error:  # noqa: BLE001 - raised by `result`, when what was started has landed and is unpinned
            self._error = error

    @property
    def held(self) -> bool:
        """Whether a part was not started."""
        return bool(self._held)

    def done(self) -> bool:
        return all(transfer.done() for transfer in self._under_way)

    def _launch(self) -> None:
        while self._held:
            lease, run = self._held.pop(0)
            self._under_way.append(self._pool.load(lease, run, self._rows))

    def found(self) -> int:
        """Leading chunks that are there and verified. Blocks until they are."""
        try:
            self._launch()
        except BaseException as error:  # noqa: BLE001 - as above
            self._error = error
        flags = [flag for transfer in self._under_way for flag in transfer.result()]
        return next((i for i, ok in enumerate(flags) if not ok), len(flags))

    def result(self) -> Presence:
        found = self.found()
        if self._error is not None:
            raise self._error
        return Presence(found, self._failed)


class Saving:
    """Chunks on their way into the pool. What finds no room there goes to storage."""

    def __init__(self, tiers: Tiers, put: PoolTransfer[PutReport], rows: Rows) -> None:
        self._tiers = tiers
        self._put = put
        self._rows = rows

    def landed(self) -> bool:
        """Tell whether the bytes are in the pool. Does not block."""
        return self._put.done()

    def finish(self) -> PutReport:
        """Publish the chunks, and hand them on to storage. To be called once; blocks until the source may change."""
        report, storage = self._put.result(), self._tiers.storage
        if storage is not None:
            storage.save_later(report.stored)
            storage.save_now(report.unplaced, self._rows)
        return report
