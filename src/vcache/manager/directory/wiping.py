"""Slot headers that lenders must zero before anything else may be written there, and who waits for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...errors import IntegrityError
from ...segment.slots import SlabGeometry
from ..api import WipeSlots
from .allocator import Allocator
from .counters import Counters
from .slabs import FREE, Slab, Wipe, state_of

WIPE_BATCH = 1024
"""Slots in one `WipeSlots` at most."""


class Wiping:
    """Wipes under way, each under a token that callers may wait for."""

    def __init__(self, allocator: Allocator, counters: Counters, push: Callable[[bytes, WipeSlots], None], last: int) -> None:
        """`push`: tells a client. `last`: tokens are above it."""
        self._allocator = allocator
        self._counters = counters
        self._push = push
        self._last = last
        self._holders: dict[int, dict[Wipe, None]] = {}
        """Outstanding wipes, by token; in order, because the same events must always have the same effects."""
        self._deferred: dict[int, list[Slab]] = {}
        """Removals whose headers cannot be zeroed yet because somebody writes in these slabs, by token."""

    def hold(self, slots: Iterable[tuple[Slab, int]]) -> None:
        """Hold these slots (free or not) until their lenders zeroed the headers."""
        by_segment: dict[int, list[tuple[Slab, int]]] = {}
        for slab, slot in slots:
            assert slab.segment is not None
            by_segment.setdefault(slab.segment.number, []).append((slab, slot))
        for places in by_segment.values():
            for start in range(0, len(places), WIPE_BATCH):
                batch = places[start : start + WIPE_BATCH]
                self._hold(batch, batch)

    def hold_slab(self, slab: Slab, headers: list[int]) -> None:
        """Zero headers that an earlier format left in an empty slab. All of the slab is held meanwhile, because those places
        may be payload now."""
        if headers:
            self._hold([(slab, slot) for slot in range(slab.slots)], [(slab, slot) for slot in headers])

    def defer(self, slabs: list[Slab]) -> None:
        """Count headers of removed chunks in these slabs (traces of None) as outstanding until they are zeroed, or voided by
        the writes that are under way there."""
        if slabs:
            self._last += 1
            self._deferred[self._last] = slabs

    def outstanding(self, token: int) -> bool:
        """Whether headers of removed chunks are still in the memory of a mounted segment. O(slots) for deferred wipes."""
        slabs = self._deferred.get(token)
        if slabs is None:
            return token in self._holders
        while slabs:
            if slabs[-1].segment is not None and slabs[-1].is_doomed():
                return True
            slabs.pop()
        del self._deferred[token]
        return False

    def tokens(self) -> list[int]:
        """List all that may be outstanding."""
        return [*self._holders, *self._deferred]

    def count(self) -> int:
        """Count the tokens that are outstanding; forget those that nobody asks about any more."""
        return len(self._holders) + sum(self.outstanding(token) for token in list(self._deferred))

    def wiped(self, lender: bytes, token: int) -> None:
        """End the wipes of a token in this lender's memory. Unknown tokens and those of other lenders are ignored."""
        for wipe in list(self._holders.get(token, ())):
            segment = wipe.slab.segment
            if segment is not None and segment.info.owner == lender:
                self.end(wipe)

    def end(self, wipe: Wipe) -> None:
        """Free one slot, which is clean, or whose memory is gone."""
        holders = self._holders.get(wipe.token)
        if holders is not None:
            holders.pop(wipe, None)
            if not holders:
                del self._holders[wipe.token]
        if wipe.slab.owners[wipe.slot] is wipe:
            self._allocator.release(wipe.slab, wipe.slot)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` naming the rule. O(wipes)."""
        for token, holders in self._holders.items():
            for wipe in holders:
                if wipe.token != token or wipe.slab.owners[wipe.slot] is not wipe or wipe.slab.segment is None:
                    raise IntegrityError(f"I3: wipe {token} does not hold its slot")

    def _hold(self, holds: list[tuple[Slab, int]], headers: list[tuple[Slab, int]]) -> None:
        """Both in slabs of one segment."""
        self._last = token = self._last + 1
        holders = self._holders[token] = {}
        segment = holds[0][0].segment
        assert segment is not None
        for slab, slot in holds:
            before = state_of(slab.owners[slot])
            wipe = Wipe(slab, slot, token)
            holders[wipe] = None
            if before == FREE:
                self._allocator.hold(slab, slot, wipe)
            else:
                slab.owners[slot] = wipe
                self._allocator.change(slab, slot, before)
        for slab, slot in headers:
            slab.stale.pop(slot, None)
            slab.buried.pop(slot, None)
        self._counters.wipes += len(headers)
        offsets = [(slab.index, SlabGeometry.header_offset(slot)) for slab, slot in headers]
        self._push(segment.info.owner, WipeSlots(token=token, segment=segment.info.uuid, slots=offsets))
