"""`remove` and `clear`: chunks that must not come back, neither after a manager restart nor with a lender that was away.

A slot header outlives its chunk's eviction, so what was removed is zeroed in the lender's memory, evicted copies included. Both
are done slice by slice (`jobs.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ...segment.slots import SlotHeader
from ..api import Clear, Remove
from .records import Record
from .slabs import Slab
from .state import Session, State, name_of

MAX_FORGOTTEN = 1 << 16
"""Removed keys and namespaces remembered for lenders that were not there."""


class RemovalReply(NamedTuple):
    """What `Remove` and `Clear` did at once, and what must still happen before the answer may go out."""

    removed: int
    tokens: list[int]
    """Wait until `Directory.outstanding(tokens)` is false, or for `WIPE_TIMEOUT`. Those of other removals are among them: the
    same chunk may be theirs, hidden by them and not zeroed yet."""


class Removal:
    """Forgets chunks for good."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._forgotten: OrderedDict[bytes, int] = OrderedDict()
        """Key or namespace (empty: all) -> number of its last removal."""
        self._under_way: dict[int, int] = {}
        """Removals that were begun and are not at their end -> number of the last one before."""
        self._serial = 0
        self.event = 0
        """Number of the last removal."""

    @property
    def done(self) -> int:
        """Return the number of the last removal that has reached all mounted memory: those after it may be under way."""
        return min(self._under_way.values(), default=self.event)

    def remove(self, session: Session, verb: Remove) -> Generator[None, None, RemovalReply]:
        """Gone at the last pause, and for good when the tokens are no longer outstanding."""
        step, keys = self._state.slice_size, verb.keys
        with self._begun():
            visible = self._state.chunks.visible
            names: set[bytes] = set()
            removed = 0
            for start in range(0, len(keys), step):
                victims = []
                for key in keys[start : start + step]:
                    record = visible.get(key)
                    if key not in names and (record is None or not record.leased):
                        names.add(key)
                        self._note(key)
                        if record is not None:
                            victims.append(record)
                removed += len(victims)
                self._hide(victims, "removed", session)
                yield
            yield from self._erase(names, b"")
            return RemovalReply(removed, self._state.wiping.tokens())

    def clear(self, session: Session, verb: Clear) -> Generator[None, None, RemovalReply]:
        """As `remove`, for all that is there now. O(chunks)."""
        step, namespace = self._state.slice_size, verb.namespace
        with self._begun():
            self._note(namespace)
            every = list(self._state.chunks.visible.values())
            every.reverse()
            removed = 0
            while every:
                victims = [
                    record
                    for record in every[-step:]
                    if record.packed and (not namespace or name_of(record.namespace) == namespace)
                ]
                del every[-step:]  # So that their memory is not given back all at once either.
                removed += len(victims)
                self._hide(victims, "cleared", session)
                yield
            yield from self._erase(None, namespace)
            return RemovalReply(removed, self._state.wiping.tokens())

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

    @contextmanager
    def _begun(self) -> Iterator[None]:
        self._serial = serial = self._serial + 1
        self._under_way[serial] = self.event
        try:
            yield
        finally:
            del self._under_way[serial]

    def _hide(self, victims: list[Record], what: str, session: Session) -> None:
        state = self._state
        slots: list[tuple[Slab, int]] = []
        for record in victims:
            slots += [(state.allocator.slab_at(place), place.slot) for place in record.places()]
            state.hide(record)
        state.counters.removed += len(victims)
        if victims:
            state.log.happened(state.now, what, [record.key for record in victims], client=session.name)
        state.wiping.hold(slots)

    def _erase(self, keys: set[bytes] | None, namespace: bytes) -> Iterator[None]:
        """Erase what is left in memory of chunks that the directory does not have, or has no longer."""
        state = self._state
        deferred: list[Slab] = []
        for write in state.writes.moves:
            # The copy may be complete before its mover hears that the chunk is gone.
            if write.key in keys if keys is not None else not namespace or name_of(write.namespace) in (namespace, b""):
                write.slab.stale[write.slot] = None
                if write.slab.segment is not None:
                    deferred.append(write.slab)
        slabs = [slab for slab in state.allocator.slabs.values() if slab.stale or slab.buried]
        steps = 0
        for slab in slabs:
            doomed = False
            for traces in (slab.stale, slab.buried):
                for slot in list(traces):
                    found = traces.get(slot, ())
                    # What another removal has doomed, and has not zeroed yet, may be ours as well: nobody knows any more.
                    if found is None or _matches(found, keys, namespace):
                        traces[slot] = None
                        doomed = True
                    steps += 1
                    if steps % state.slice_size == 0:
                        yield
            if doomed and slab.segment is not None:
                yield from self._wipe_doomed(slab)
                if slab.segment is not None and slab.is_doomed():
                    deferred.append(slab)
        state.wiping.defer(deferred)

    def _wipe_doomed(self, slab: Slab) -> Iterator[None]:
        """Zero what can be zeroed now of the headers in an attached slab that must go."""
        state = self._state
        buried = [slot for slot, traces in slab.buried.items() if traces is None]
        stale = [slot for slot, traces in slab.stale.items() if traces is None]
        if buried and not slab.busy:
            state.wiping.hold_slab(slab, sorted({*stale, *buried}))
            return
        for start in range(0, len(stale), state.slice_size):
            if slab.segment is None:
                break
            slots = stale[start : start + state.slice_size]
            state.wiping.hold(
                (slab, slot)
                for slot in slots
                if slot < slab.slots and slab.owners[slot] is None and slab.stale.get(slot, ()) is None
            )
            yield


def _matches(traces: Sequence[tuple[bytes, bytes]], keys: set[bytes] | None, namespace: bytes) -> bool:
    """Whether a header may say one of these keys, or this namespace. A namespace that is not known is taken for a match."""
    return any(key in keys if keys is not None else not namespace or name in (namespace, b"") for key, name in traces)
