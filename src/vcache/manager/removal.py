"""`remove` and `clear`: chunks that must not come back, neither after a manager restart nor with a lender that was away.

A slot header outlives its chunk's eviction, so what was removed is zeroed in the lender's memory, evicted copies included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ..segment.slots import SlotHeader
from .allocator import Slab, Traces
from .core import Core, name_of
from .records import Record

MAX_FORGOTTEN = 1 << 16
"""Removed keys and namespaces remembered for lenders that were not there."""


class Removal:
    """Forgets chunks for good."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._forgotten: OrderedDict[bytes, int] = OrderedDict()
        """Key or namespace (empty: all) -> number of its last removal."""
        self.event = 0
        """Number of the last removal."""

    def remove(self, keys: Iterable[bytes]) -> tuple[int, list[int]]:
        """Forget unleased chunks: their number, and the tokens of the wipes to wait for. O(slabs)."""
        visible = self._core.chunks.visible
        names = {key: None for key in keys if key not in visible or not visible[key].pins}
        for key in names:
            self._note(key)
        return self._erase([visible[key] for key in names if key in visible], set(names), b"")

    def clear(self, namespace: bytes) -> tuple[int, list[int]]:
        """Forget all chunks (of one namespace), leased ones too: their number, and the tokens of the wipes to wait for."""
        self._note(namespace)
        every = self._core.chunks.visible.values()
        victims = [record for record in every if not namespace or (record.space is not None and record.space.name == namespace)]
        return self._erase(victims, None, namespace)

    def was_removed(self, header: SlotHeader, since: int) -> bool:
        """Whether this chunk was removed after removal number `since`."""
        forgotten = self._forgotten
        return bool(forgotten) and any(forgotten.get(name, 0) > since for name in (header.key, header.namespace, b""))

    def _note(self, name: bytes) -> None:
        self.event += 1
        self._forgotten[name] = self.event
        self._forgotten.move_to_end(name)
        if len(self._forgotten) > MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)

    def _erase(self, victims: list[Record], keys: set[bytes] | None, namespace: bytes) -> tuple[int, list[int]]:
        core = self._core
        slots: list[tuple[Slab, int]] = []
        tokens: list[int] = []
        deferred: list[Slab] = []
        for record in victims:
            slots += [(core.allocator.slab_at(place), place.slot) for place in record.places()]
            core.hide(record)
        for slab in core.allocator.slabs.values():
            stale, buried = _matches(slab.stale, keys, namespace), _matches(slab.buried, keys, namespace)
            if buried and not slab.busy:
                tokens += core.wipe_slab(slab, sorted({*stale, *buried}))
                continue
            for slot in buried:
                slab.buried[slot] = None
            for slot in stale:
                if slab.owners[slot] is None:
                    slots.append((slab, slot))
                else:
                    slab.stale[slot] = None
            if None in slab.stale.values() or None in slab.buried.values():
                deferred.append(slab)
        for write in core.writes.moves:
            # The copy may be complete before its mover hears that the chunk is gone.
            if write.key in keys if keys is not None else not namespace or name_of(write.space) in (namespace, b""):
                write.slab.stale[write.slot] = None
                if write.slab.segment is not None:
                    deferred.append(write.slab)
        core.counters.removed += len(victims)
        return len(victims), tokens + core.wipe(slots) + core.defer_wipe(deferred)


def _matches(traces: dict[int, Traces], keys: set[bytes] | None, namespace: bytes) -> list[int]:
    """Slots whose header may say one of these keys, or this namespace. What is not known is taken for a match."""
    found = []
    for slot, entries in traces.items():
        for key, space in entries or ():
            if key in keys if keys is not None else not namespace or space in (namespace, b""):
                found.append(slot)
                break
    return found
