"""The write gate of a segment: words in shared host memory through which writers and the lender see each other.

    word 0                                fence: 63 random bits, new at every mount
    [ROW_BYTES * (1 + r), + ROW_BYTES)    row r, of one writing process: for each slab, how many of its writes are under way

A writer counts itself in, makes a full memory fence, and compares the fence word with the one that came with its ticket; only
then does it touch the slab. The lender writes a new fence word at each mount, makes a full fence, and only then reads the rows
and the slot headers. So either the writer sees that its ticket is of an earlier mount and leaves, or the lender sees the writer
and nobody is given a slot in that slab until it is done: the store-to-load pattern of Dekker, which needs full fences on both
sides. The proof, and the mutants that it fails for, are in `tests/protocol`; why so, in decision 0006.

The page lies in host memory, for VRAM segments as well: a GPU never looks at it. The host checks before it queues a kernel and
counts itself out after the event behind it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from ..errors import SegmentError
from .shared import Fence, map_shared

SLAB_WORDS = 4096
"""Words in a row. Slabs whose indices are equal modulo this share one, so that a writer in one seems to write in both."""
ROW_BYTES = 8 * SLAB_WORDS
ROWS = 1024
"""Processes that may write in a segment at one time."""
GATE_BYTES = ROW_BYTES * (1 + ROWS)
"""Of address space; memory is used for rows in use only."""
QUARANTINE = 2.0
"""Seconds after the end of a process until its row counts as empty: for stores of its kernels that are still on their way."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class WriteGate:
    """A writing process's side. Thread-safe; one per process and segment."""

    def __init__(self, words: memoryview, row: int) -> None:
        """`words`: the mapped page, as 64-bit words. `row`: this process's."""
        self._words = words
        self._row = SLAB_WORDS * (1 + row)
        self._lock = threading.Lock()
        self._order = Fence()
        self._counts: Counter[int] = Counter()

    @classmethod
    def map(cls, fd: int, row: int) -> WriteGate:
        """Map the page of a lender. Does not close `fd`. Raises `SegmentError` when it is no such page."""
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if size != GATE_BYTES or seals & _SEALS != _SEALS or not 0 <= row < ROWS:
                raise SegmentError(f"segment gate: {size} bytes with seals {seals}, row {row}; refused")
            return cls(_map(fd), row)
        except OSError as error:
            raise SegmentError(f"segment gate: cannot map it: {error.strerror}") from None

    def enter(self, slab: int, fence: int) -> bool:
        """Count this process in as a writer of the slab of that index. False, and nothing is counted, when `fence`, the word
        that came with the ticket, is not that of the segment's last mount: then nothing may be written. Does not block."""
        with self._lock:
            self._add(slab, 1)
            # The count is seen before the fence word is read: a store before a load, which no weaker barrier orders.
            self._order()
            if fence and self._words[0] == fence:
                return True
            self._add(slab, -1)
            return False

    def leave(self, slab: int) -> None:
        """Undo an `enter`, after the last byte has landed. Does not block."""
        self._order()
        with self._lock:
            self._add(slab, -1)

    def _add(self, slab: int, change: int) -> None:
        word = slab % SLAB_WORDS
        self._counts[word] += change
        count = self._counts[word]
        if count < 0:
            raise AssertionError("left a gate without having entered it")
        self._words[self._row + word] = count
        if not count:
            del self._counts[word]


class Gated(Protocol):
    """A slab that stands behind a gate."""

    index: int
    """In its segment."""
    gate: WriteGate | None
    """None: nobody may write to it."""


class Passage:
    """The gates that one piece of work has passed. Not thread-safe."""

    def __init__(self) -> None:
        self._asked: dict[tuple[Gated, int], bool] = {}

    def admits(self, slab: Gated, fence: int) -> bool:
        """Whether a ticket that came with `fence` may be used in that slab; asked of its gate once for each word, because one
        answer of the manager may hold tickets of two mounts. The slab stays pinned until `leave`. A slab without a gate admits
        nobody."""
        admitted = self._asked.get((slab, fence))
        if admitted is None:
            admitted = self._asked[slab, fence] = slab.gate is not None and slab.gate.enter(slab.index, fence)
        return admitted

    def leave(self) -> None:
        """Nothing is written any more: pass all gates the other way. Idempotent."""
        asked, self._asked = self._asked, {}
        for (slab, _), admitted in asked.items():
            if admitted and slab.gate is not None:
                slab.gate.leave(slab.index)


class Gate:
    """The lender's side: owns the page and its rows. Thread-safe. Row 0 is the lender's own process's."""

    def __init__(self, owner: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        """`owner`: the lender's client id. `clock`: seconds, never backwards. Raises `SegmentError`."""
        self._clock = clock
        self._lock = threading.Lock()
        self._order = Fence()
        self._rows: dict[bytes, int] = {owner: 0}
        self._ended: dict[bytes, float] = {}
        """When processes ended whose rows still count."""
        self._spare = list(range(ROWS - 1, 0, -1))
        try:
            self.fd = os.memfd_create("vcache-gate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, GATE_BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            self._words = _map(self.fd)
        except OSError as error:
            raise SegmentError(f"segment gate: cannot create it: {error.strerror}") from None
        self.own = WriteGate(self._words, 0)
        """For writes of the lender's own process."""

    def renew(self) -> int:
        """Write a new fence word, which is returned: no ticket of an earlier mount passes any more. What is read after this
        call, rows and headers, was written by those who passed before. Does not block."""
        fence = secrets.randbits(63) or 1
        self._order()
        self._words[0] = fence
        self._order()
        return fence

    def admit(self, client: bytes) -> int:
        """The row of a process that may write from now on. Raises `SegmentError` when there is none left."""
        with self._lock:
            row = self._rows.get(client)
            if row is None:
                self._sweep()
                if not self._spare:
                    raise SegmentError(f"{ROWS} processes write in this segment already")
                row = self._rows[client] = self._spare.pop()
            return row

    def hung_up(self, client: bytes) -> None:
        """That process has ended, or maps nothing of the segment any more."""
        with self._lock:
            if client in self._rows:
                self._ended[client] = self._clock()

    def writers(self, slabs: Iterable[int]) -> set[tuple[bytes, int]]:
        """Who may be amid a write in which of these slabs: (client id, slab index). Those who have ended count for
        `QUARANTINE` seconds more. What is read after this call has all that those wrote who are not named any more.
        O(processes x slabs)."""
        with self._lock:
            self._sweep()
            indices = list(slabs)
            inside = {(client, slab) for client, row in self._rows.items() for slab in indices if self._word(row, slab)}
        self._order()
        return inside

    def close(self) -> None:
        """Close the descriptor; mappings stay. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _word(self, row: int, slab: int) -> int:
        return self._words[SLAB_WORDS * (1 + row) + slab % SLAB_WORDS]

    def _sweep(self) -> None:
        """Empty the rows of those who ended long enough ago."""
        over = self._clock() - QUARANTINE
        for client in [client for client, ended in self._ended.items() if ended <= over]:
            del self._ended[client]
            row = self._rows.pop(client)
            begin = SLAB_WORDS * (1 + row)
            self._words[begin : begin + SLAB_WORDS] = memoryview(bytes(ROW_BYTES)).cast("Q")
            self._spare.append(row)


def _map(fd: int) -> memoryview:
    """The page as 64-bit words, each of which is read and written in one piece. Lives as long as the view. Raises `OSError`."""
    return map_shared(fd, GATE_BYTES)[1].cast("Q")
