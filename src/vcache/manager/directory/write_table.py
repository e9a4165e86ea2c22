"""Writes under way: by writer, by deadline, and those that rest before their slot is free."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Container, Iterator

from ...errors import IntegrityError
from .slabs import PROCESSING, QUARANTINED, USED, Write


class WriteTable:
    """Finds every `Write`. One without a writer (recovered shard) is only timed."""

    def __init__(self) -> None:
        self.by_writer: dict[bytes, dict[tuple[bytes, int, int], Write]] = {}
        self.moves: dict[Write, None] = {}
        """Those that move a visible chunk's shard, in whichever state."""
        # Ordered: the first of a plain dict is found by walking over all that went before it.
        self._timed: OrderedDict[Write, None] = OrderedDict()
        """In order of deadline, because all tickets live equally long."""
        self.partial: dict[bytes, OrderedDict[Write, None]] = {}
        """By writer: its complete shards of chunks of which others are not complete, the oldest first."""
        self._resting: list[tuple[float, int, Write]] = []
        self._serial = 0

    def add(self, write: Write) -> None:
        """Remember a write until `remove`."""
        if write.writer:
            self.by_writer.setdefault(write.writer, {})[write.ticket] = write
        if write.source:
            self.moves[write] = None

    def get(self, writer: bytes, key: bytes, shard: int, generation: int) -> Write | None:
        """Find a write by its ticket."""
        writes = self.by_writer.get(writer)
        return writes.get((key, shard, generation)) if writes else None

    def of(self, writer: bytes) -> list[Write]:
        """List the writes of a client; the caller may remove while it goes through them."""
        return list(self.by_writer.get(writer, {}).values())

    def remove(self, write: Write) -> None:
        """Forget a write. Idempotent."""
        self._timed.pop(write, None)
        self.moves.pop(write, None)
        write.deadline = 0.0
        self.forget_ticket(write)
        partial = self.partial.get(write.writer)
        if partial is not None and partial.pop(write, self) is None and not partial:
            del self.partial[write.writer]

    def forget_ticket(self, write: Write) -> None:
        """Find it by its ticket no more: the writer has nothing more to say about it."""
        writes = self.by_writer.get(write.writer)
        if writes is not None and writes.get(write.ticket) is write:
            del writes[write.ticket]
            if not writes:
                del self.by_writer[write.writer]

    def time(self, write: Write, deadline: float) -> None:
        """(Re)start the ticket's clock."""
        self._timed.pop(write, None)
        write.deadline = deadline
        self._timed[write] = None

    def await_others(self, write: Write, deadline: float) -> None:
        """Time a complete shard of a chunk that is not complete: the others must be by then."""
        self.forget_ticket(write)
        self.time(write, deadline)
        self.partial.setdefault(write.writer, OrderedDict())[write] = None

    def own_partial(self, writer: bytes, spared: bytes) -> Write | None:
        """Find the client's shard that has waited longest for the others of its chunk, which is not `spared`."""
        return next((write for write in self.partial.get(writer, ()) if write.key != spared), None)

    def oldest_partial(self, before: float, spared: bytes) -> Write | None:
        """Find the same of all clients, if its deadline is before that time. Not what was found in an inventory: the others
        may still be found."""
        oldest = [self.own_partial(writer, spared) for writer in self.partial if writer]
        due = (write for write in oldest if write is not None and write.deadline < before)
        return min(due, key=lambda write: write.deadline, default=None)

    def held(self, writer: bytes) -> int:
        """Count the slots that hold no visible chunk, because this client writes or has written there."""
        return len(self.by_writer.get(writer, ())) + len(self.partial.get(writer, ()))

    def untime(self, write: Write) -> None:
        """Stop the clock: quarantined until somebody vouches for its writer."""
        self._timed.pop(write, None)
        write.deadline = 0.0

    def rest(self, write: Write, until: float) -> None:
        """Time a quarantined write whose writer is known to be dead: its slot is free at `until`."""
        if write.deadline:
            return
        write.deadline = until
        self._serial += 1
        heapq.heappush(self._resting, (until, self._serial, write))

    def lapsed(self, now: float) -> Iterator[Write]:
        """Go through the timed writes that are due; each must be removed or untimed before the next is taken."""
        while (write := next(iter(self._timed), None)) is not None and write.deadline <= now:
            yield write

    def rested(self, now: float) -> Iterator[Write]:
        """Go through the quarantined writes whose slots may be free now."""
        while self._resting and self._resting[0][0] <= now:
            until, _, write = heapq.heappop(self._resting)
            if write.state == QUARANTINED and write.deadline == until:
                yield write

    def next_deadline(self) -> float | None:
        """Tell when the next is due, or None."""
        write = next(iter(self._timed), None)
        times = [write.deadline] if write is not None else []
        if self._resting:
            times.append(self._resting[0][0])
        return min(times, default=None)

    def count(self, writer: bytes) -> int:
        """Count the writes of this client in PROCESSING."""
        return sum(1 for write in self.by_writer.get(writer, {}).values() if write.state == PROCESSING)

    def check_integrity(self, held: list[Write], sessions: Container[bytes]) -> None:
        """`held`: those that hold a slot. Raises `IntegrityError` naming the rule. O(writes)."""
        self._check_tickets()
        self._check_times()
        known = {id(write) for write in held}
        if any(id(write) not in known for writes in self.by_writer.values() for write in writes.values()):
            raise IntegrityError("I6: a write is remembered in a slab that is gone")
        if {id(write) for write in held if write.source} != {id(write) for write in self.moves}:
            raise IntegrityError("I3: moves remembered and slots that they hold differ")
        for write in held:
            if write.state == PROCESSING and write.writer not in sessions:
                raise IntegrityError(f"I9: client {write.writer.hex()} writes without a session")

    def _check_tickets(self) -> None:
        for writer, writes in self.by_writer.items():
            if not writes:
                raise IntegrityError(f"I5: empty table of writer {writer.hex()}")
            for ticket, write in writes.items():
                owner = write.slab.owners[write.slot]
                if write.ticket != ticket or write.writer != writer or owner is not write or write.state == USED:
                    raise IntegrityError(f"I5: write of {write.key.hex()} by {writer.hex()} does not hold its slot")
                if (write in self._timed) != (write.state == PROCESSING):
                    raise IntegrityError(f"I5: write of {write.key.hex()}: deadline and state differ")

    def _check_times(self) -> None:
        partial = {write for writes in self.partial.values() for write in writes}
        if partial != {write for write in self._timed if write.state == USED} or not all(self.partial.values()):
            raise IntegrityError("I5: shards that wait for others are counted wrongly")
        before = 0.0
        for write in self._timed:
            if write.slab.owners[write.slot] is not write or write.state == QUARANTINED or write.deadline < before:
                raise IntegrityError(f"I5: timed write of {write.key.hex()} does not hold its slot or is out of order")
            before = write.deadline
