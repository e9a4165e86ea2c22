"""A ring of VRAM between slots in host memory and the mover's kernels.

Copy engines move whole payloads between host memory and the ring, batch by batch, on a stream of their own, and go on while
the GPU's multiprocessors do something else, in another process's time slice, say. One short kernel a batch moves it between the
ring and the paged cache. The host queues all of it and waits for nothing. What becomes of the protocol of slots: decision 0009.

    load    copies: [place free?] copy ... | kernels:           [copied?] scatter, place is free
    store   kernels: [place free?] gather  | copies: [gathered?] copy, place is free
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .columns import SlotColumns
from .copy_engine import WorkQueue

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_BYTES = 64 * 2**20
"""Of one batch, at most: 1.2 ms of PCIe 5. To be measured."""
_IN_FLIGHT = 3
"""Batches of that size or less for which a ring has room: one is copied, one moved, one waits."""
_ALIGN = 256
"""Of places in the ring. Payloads in slabs are aligned as well, or less."""


class Batch(NamedTuple):
    """Consecutive chunks of a request that go through the ring together."""

    first: int
    """Position of the first one in the request, as the table has it."""
    begin: int
    end: int
    """Its part of the ring: offsets in bytes."""
    places: list[int]
    """Where each chunk's payload lies in the ring: addresses."""
    homes: list[int]
    """Where it lies in host memory: addresses, likewise."""
    sizes: list[int]
    """Bytes."""

    @property
    def chunks(self) -> int:
        return len(self.sizes)


class Route(NamedTuple):
    """Which way each chunk of a request goes."""

    order: NDArray[np.int64]
    """Positions in the request, in the order of the table: first the chunks that kernels move in place."""
    direct: int
    """How many of these there are."""
    batches: list[Batch]
    """Those that go through the ring."""

    @property
    def places(self) -> list[int]:
        """Addresses in the ring, of all batches."""
        return [place for batch in self.batches for place in batch.places]

    @property
    def homes(self) -> list[int]:
        """By which address the device reaches the payloads of all batches at home; 0 for each chunk that is moved in place."""
        return [0] * self.direct + [home for batch in self.batches for home in batch.homes]


class HostRing:
    """Memory of a ring and what is under way in it, for loads or for stores. Not thread-safe: its mover's lock guards it."""

    def __init__(
        self, lane: WorkQueue, copies: WorkQueue, address: int, nbytes: int, *, store: bool, owner: object = None
    ) -> None:
        """`lane`: where the mover's kernels are queued. `copies`: nobody else's. `address`: of `nbytes` of memory, aligned by
        256, that `owner` keeps."""
        self._lane = lane
        self._copies = copies
        self._address = address
        self._nbytes = nbytes
        self._store = store
        self._owner = owner
        self._most = nbytes // 2 // _ALIGN * _ALIGN
        """Bytes of a chunk that comes through, at most: two must fit, so that one is copied while the other one is moved."""
        self._batch_bytes = min(BATCH_BYTES, nbytes // _IN_FLIGHT)
        self._at = 0
        self._busy: deque[tuple[int, int, Any]] = deque()
        """Parts of the ring (begin, end) in use until an event, the oldest first. All are of one queue, so that each implies
        those before it."""
        self._spare: list[Any] = []
        """Events to be used again: a wait is for what an event stands for when the wait is queued."""
        self._handed: Any = None

    def route(self, slots: SlotColumns) -> Route | None:
        """The ways of these chunks; None when none of them comes through the ring. Takes the places for those that do."""
        payload_bytes = slots.headers["payload_bytes"].astype(np.int64)
        through = slots.in_host_memory & (payload_bytes <= self._most)
        staged = np.flatnonzero(through)
        if not len(staged):
            return None
        bases = np.array([slab.device_address for slab in slots.slabs], np.int64)[slots.slab]
        payloads = zip((bases + slots.payload_offset)[staged].tolist(), payload_bytes[staged].tolist(), strict=True)
        direct = len(slots) - len(staged)
        batches: list[Batch] = []
        at, begin, first = self._at, -1, direct
        limit = 0
        places: list[int] = []
        homes: list[int] = []
        sizes: list[int] = []
        for row, (home, size) in enumerate(payloads, first):
            end = at + -(-size // _ALIGN) * _ALIGN
            if end > limit:  # always so for the first one
                if sizes:
                    batches.append(Batch(first, begin, at, places, homes, sizes))
                    places, homes, sizes = [], [], []
                # A batch lies in one piece. A request begins where a whole batch has room.
                if end > self._nbytes or (begin < 0 and at + self._batch_bytes > self._nbytes):
                    at, end = 0, end - at
                first, begin, limit = row, at, min(self._nbytes, at + self._batch_bytes)
            places.append(self._address + at)
            homes.append(home)
            sizes.append(size)
            at = end
        batches.append(Batch(first, begin, at, places, homes, sizes))
        self._at = at
        return Route(np.concatenate((np.flatnonzero(~through), staged)), direct, batches)

    def begin(self, batch: Batch) -> None:
        """Before the kernels of a batch are queued on the lane. Does not wait. Raises `DeviceUnavailableError`."""
        free = self._free_after(batch)
        user = self._lane if self._store else self._copies
        if free is not None:
            user.wait(free)
            self._spare.append(free)
        if not self._store:
            self._copies.copy(batch.places, batch.homes, batch.sizes)
            self._hand_over(self._copies, self._lane)

    def end(self, batch: Batch) -> None:
        """After the kernels of a batch were queued on the lane. Does not wait. Raises `DeviceUnavailableError`."""
        last = self._lane
        if self._store:
            self._hand_over(self._lane, self._copies)
            self._copies.copy(batch.homes, batch.places, batch.sizes)
            last = self._copies
        self._busy.append((batch.begin, batch.end, last.mark(self._spare.pop() if self._spare else None)))

    def settle(self) -> None:
        """After the last batch of a store: what is queued on the lane from now on comes after its copies have landed. A load's
        have, when its kernels run."""
        if self._store and self._busy:
            self._lane.wait(self._busy[-1][2])

    def drain(self) -> None:
        """Block until no copy is under way."""
        self._copies.drain()

    def _free_after(self, batch: Batch) -> Any:
        """The event after which the batch's part of the ring is free; None: it is now."""
        over = [number for number, (begin, end, _) in enumerate(self._busy) if begin < batch.end and batch.begin < end]
        event = None
        for _ in range(over[-1] + 1 if over else 0):
            if event is not None:
                self._spare.append(event)
            event = self._busy.popleft()[2]
        return event

    def _hand_over(self, before: WorkQueue, after: WorkQueue) -> None:
        self._handed = before.mark(self._handed)
        after.wait(self._handed)
