"""Writes that go on after the mount that fenced them off: whatever they change is undone before anybody hears of it.

Such a writer passed the gate under an earlier fence word, so nobody keeps it from completing its chunk. But its ticket is void:
no manager would learn of that chunk but by reading the headers once more, at a mount after `remove` and `clear` have passed it
by. So the headers that a mount tells of are kept for slabs in which somebody is counted, and until those have left, the slab
says nothing but that, at later mounts as well; what differs when they have left is zeroed. Nobody else writes there: no slot of
such a slab is given out before the manager was told that it is over.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..manager.api import UndoneSlots
from ..segment.slots import HEADER_BYTES, SlabGeometry, SlabInventory
from .slabs import LentSlabs


class Orphans:
    """Keeps what was told of slabs that are written by void tickets. Not thread-safe."""

    def __init__(self, lent: LentSlabs) -> None:
        self._lent = lent
        self._told: dict[int, SlabInventory] = {}

    def inventory(self, indices: Sequence[int], busy: Collection[int]) -> list[SlabInventory]:
        """Read the headers of these slabs for a mount, without what void tickets did. `busy`: slabs in which somebody was
        counted, of all that passed the gate before the mount's fence word. Raises `SegmentError`; it can be called again."""
        for slab in [slab for slab in self._told if slab not in busy]:
            self.undo(slab)
        found = self._lent.inventory(indices)
        inventory = [undisturbed(self._told[item.slab], item) if item.slab in self._told else item for item in found]
        self._told = {item.slab: item for item in inventory if item.slab in busy}
        return inventory

    def undo(self, slab: int) -> list[UndoneSlots]:
        """Zero what changed in a slab since the last mount, now that nobody is counted there any more; what that was. To be
        called before the manager hears that they have left. Raises `SegmentError`; it can be called again."""
        told = self._told.get(slab)
        if told is None:
            return []
        slots: list[int] = []
        for found in self._lent.inventory([slab]):
            slots = changed(told, found)
            for slot in slots:
                self._lent.wipe(slab, SlabGeometry.header_offset(slot))
            if found.slab_header != told.slab_header:
                # Last: under this header those of the slots would count again.
                self._lent.put_slab_header(slab, told.slab_header)
        del self._told[slab]
        return _runs(slab, slots)


def changed(told: SlabInventory, found: SlabInventory) -> list[int]:
    """Find the slots whose headers are not what was told: all of them if the slab was formatted meanwhile. Pure."""
    old, new = told.slot_headers, found.slot_headers
    slots = range(max(len(old), len(new)) // HEADER_BYTES)
    if told.slab_header != found.slab_header:
        return list(slots)
    if old == new:
        return []
    return [slot for slot in slots if _header(old, slot) != _header(new, slot)]


def undisturbed(told: SlabInventory, found: SlabInventory) -> SlabInventory:
    """Make up what to tell of a slab: what was told before, but for slots that changed since, which are empty. Pure."""
    headers = bytearray(told.slot_headers)
    for slot in changed(told, found):
        if (slot + 1) * HEADER_BYTES <= len(headers):
            headers[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES] = bytes(HEADER_BYTES)
    return SlabInventory(told.slab, told.slab_header, bytes(headers))


def _header(headers: bytes, slot: int) -> bytes:
    return headers[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES]


def _runs(slab: int, slots: Sequence[int]) -> list[UndoneSlots]:
    """Sum up slots, in order, as runs."""
    runs: list[UndoneSlots] = []
    for slot in slots:
        if runs and runs[-1].first + runs[-1].count == slot:
            runs[-1] = UndoneSlots(slab, runs[-1].first, runs[-1].count + 1)
        else:
            runs.append(UndoneSlots(slab, slot, 1))
    return runs
