"""A bounded log of what was asked about chunks and of what became of them, searched for one chunk after the fact."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import IntegrityError, VCacheError
from ...segment.slots import LOCATION_BYTES, SlotLocation
from ..api import (
    Acquire,
    Demote,
    Lookup,
    MovePlan,
    PlanSpill,
    PutEnd,
    PutRequest,
    PutRevoke,
    Remove,
    Spilled,
    SpillPlan,
    Ticket,
    Tiers,
    Verb,
)
from .jobs import Job

MAX_ENTRIES = 1 << 14
"""Entries of either kind."""
MAX_READ_KEYS = 1 << 15
"""Keys in the entries of look-ups: 2 MiB. Few, because look-ups are many, and must not drive out what is seldom."""
MAX_LIFE_KEYS = 1 << 17
"""Keys in all other entries: 16 MiB with what is kept beside them."""


class Line(NamedTuple):
    """What one entry says of one chunk."""

    time: float
    client: str
    """Who asked; empty for what happened by itself."""
    what: str
    """In the past tense, as a rule."""
    detail: str = ""
    place: SlotLocation | None = None
    shard: int = 0


class _Entry(NamedTuple):
    """Read as this, kept as a plain tuple of plain things: the garbage collector soon has nothing to do with it any more."""

    number: int
    time: float
    client: str
    kind: str
    named: Sequence[Any]
    """Keys, tickets, moves or spills: as they came."""
    outcome: Any
    shard: int


Kept = tuple[int, float, str, str, Sequence[Any], Any, int]


class _Ring:
    """The latest entries: bounded in number, and in the keys that they hold."""

    def __init__(self, max_keys: int) -> None:
        self.entries: deque[Kept] = deque()
        self._keys = 0
        self._max_keys = max_keys

    def add(self, entry: Kept) -> None:
        """O(1) on average. One with too many keys is not kept."""
        count = len(entry[4])
        if count > self._max_keys:
            return
        entries = self.entries
        entries.append(entry)
        self._keys += count
        while self._keys > self._max_keys or len(entries) > MAX_ENTRIES:
            self._keys -= len(entries.popleft()[4])

    def check_integrity(self) -> None:
        held = sum(len(entry[4]) for entry in self.entries)
        if held != self._keys or held > self._max_keys or len(self.entries) > MAX_ENTRIES:
            raise IntegrityError(f"log: {held} keys in {len(self.entries)} entries, recorded {self._keys}")


class Log:
    """Tells what happened to a chunk. Not thread-safe.

    A look-up costs one entry, however many keys it names: they are kept as they came, and looked into only when somebody asks.
    Whoever had a verb handled must not change its keys afterwards.
    """

    def __init__(self) -> None:
        self.number = 0
        """Grows with all that begins; stories are in its order."""
        self.reads = _Ring(MAX_READ_KEYS)
        self.lives = _Ring(MAX_LIFE_KEYS)

    def happened(
        self, now: float, what: str, keys: Sequence[bytes], detail: str = "", packed: bytes = b"", client: str = ""
    ) -> None:
        """Something happened to these chunks. `packed`: where, for one shard of a single chunk. `client`: who wanted it."""
        self.number += 1
        self.lives.add((self.number, now, client, what, keys, (detail, packed), 0))

    def placed(self, now: float, client: str, request: PutRequest, begin: int, places: Sequence[bytes | str]) -> None:
        """Part of a request was answered. `places`: for each of its keys from `begin` on the packed location granted, or the
        status in place of it."""
        self.number += 1
        keys = tuple(request.keys[begin : begin + len(places)])
        self.lives.add((self.number, now, client, "put_start", keys, tuple(places), request.shard))

    def story(self, key: bytes) -> list[Line]:
        """All that is kept about one chunk, the oldest first; nothing for one that was never heard of. O(all that is kept):
        some milliseconds."""
        entries = (_Entry(*entry) for entry in sorted((*self.reads.entries, *self.lives.entries), key=lambda kept: kept[0]))
        return [line for entry in entries for line in _TELLERS.get(entry.kind, _event)(entry, key)]

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when the bounds are not kept. O(entries)."""
        self.reads.check_integrity()
        self.lives.check_integrity()


# -- verbs into entries, after they were handled: O(1) for look-ups ----------------------------------------------------


def _note_lookup(log: Log, number: int, now: float, client: str, verb: Lookup, found: int) -> None:
    log.reads.add((number, now, client, "lookup", verb.keys, found, 0))


def _note_acquire(log: Log, number: int, now: float, client: str, verb: Acquire, reply: Any) -> None:
    log.reads.add((number, now, client, "located" if verb.lease else "leased", verb.keys, reply.packed, verb.shard))


def _note_tiers(log: Log, number: int, now: float, client: str, verb: Tiers, job: Job[list[int]]) -> None:
    log.reads.add((number, now, client, "tiers", verb.keys, job, 0))


def _note_put_end(log: Log, number: int, now: float, client: str, verb: PutEnd, done: list[bool]) -> None:
    log.lives.add((number, now, client, "put_end", verb.tickets, done, 0))


def _note_put_revoke(log: Log, number: int, now: float, client: str, verb: PutRevoke, reply: None) -> None:
    log.lives.add((number, now, client, "put_revoke", verb.tickets, None, 0))


def _note_demote(log: Log, number: int, now: float, client: str, verb: Demote, plan: MovePlan) -> None:
    log.lives.add((number, now, client, "demote", plan.moves, None, 0))


def _note_plan_spill(log: Log, number: int, now: float, client: str, verb: PlanSpill, plan: SpillPlan) -> None:
    log.lives.add((number, now, client, "spill", plan.spills, None, 0))


def _note_spilled(log: Log, number: int, now: float, client: str, verb: Spilled, reply: None) -> None:
    log.lives.add((number, now, client, "spilled", verb.keys, ("it is in storage", b""), 0))


def _note_remove(log: Log, number: int, now: float, client: str, verb: Remove, job: object) -> None:
    log.lives.add((number, now, client, "remove asked", verb.keys, ("", b""), 0))


Note = Callable[[Log, int, float, str, Any, Any], None]

NOTES: dict[type[Verb[Any]], Note] = {
    Lookup: _note_lookup,
    Acquire: _note_acquire,
    Tiers: _note_tiers,
    PutEnd: _note_put_end,
    PutRevoke: _note_put_revoke,
    Demote: _note_demote,
    PlanSpill: _note_plan_spill,
    Spilled: _note_spilled,
    Remove: _note_remove,
}
"""How a verb is kept, for those that name chunks. `PutStart` is kept by `Log.placed`."""


# -- entries into lines ------------------------------------------------------------------------------------------------


def _tell_lookup(entry: _Entry, key: bytes) -> Iterator[Line]:
    for index in _places(entry.named, key):
        yield _line(entry, "looked up", "found" if index < entry.outcome else "not found")


def _tell_acquire(entry: _Entry, key: bytes) -> Iterator[Line]:
    for index in _places(entry.named, key):
        packed = entry.outcome[LOCATION_BYTES * index : LOCATION_BYTES * (index + 1)]
        if packed:
            yield _line(entry, entry.kind, place=SlotLocation.unpack(packed))
        else:
            yield _line(entry, "looked up", "not found")


def _tell_tiers(entry: _Entry, key: bytes) -> Iterator[Line]:
    levels = _result(entry.outcome)
    for index in _places(entry.named, key):
        yield _line(entry, "looked up", ("in VRAM", "in DRAM", "not found")[levels[index]] if levels is not None else "")


def _tell_put_start(entry: _Entry, key: bytes) -> Iterator[Line]:
    for index in _places(entry.named, key):
        place = entry.outcome[index]
        if isinstance(place, bytes):
            yield _line(entry, "granted", place=SlotLocation.unpack(place))
        else:
            yield _line(entry, "not granted", place.replace("_", " "))


def _tell_tickets(entry: _Entry, key: bytes) -> Iterator[Line]:
    tickets: Sequence[Ticket] = entry.named
    for index in _places((ticket.key for ticket in tickets), key):
        detail = f"generation {tickets[index].generation}"
        what = "given up" if entry.kind == "put_revoke" else "written" if entry.outcome[index] else "written too late"
        yield _line(entry, what, detail)._replace(shard=tickets[index].shard)


def _tell_demote(entry: _Entry, key: bytes) -> Iterator[Line]:
    for move in entry.named:
        if move.key == key:
            yield _line(entry, "demotion planned", place=move.grant.location)._replace(shard=move.shard)


def _tell_spill(entry: _Entry, key: bytes) -> Iterator[Line]:
    for spill in entry.named:
        if spill.key == key:
            yield _line(entry, "spill planned", place=spill.source)._replace(shard=spill.shard)


def _event(entry: _Entry, key: bytes) -> Iterator[Line]:
    if key in entry.named:
        detail, packed = entry.outcome
        yield _line(entry, entry.kind, detail, SlotLocation.unpack(packed) if len(packed) == LOCATION_BYTES else None)


_TELLERS: dict[str, Callable[[_Entry, bytes], Iterator[Line]]] = {
    "lookup": _tell_lookup,
    "leased": _tell_acquire,
    "located": _tell_acquire,
    "tiers": _tell_tiers,
    "put_start": _tell_put_start,
    "put_end": _tell_tickets,
    "put_revoke": _tell_tickets,
    "demote": _tell_demote,
    "spill": _tell_spill,
}


def _line(entry: _Entry, what: str, detail: str = "", place: SlotLocation | None = None) -> Line:
    return Line(entry.time, entry.client, what, detail, place, entry.shard)


def _places(keys: Iterable[bytes], key: bytes) -> Iterator[int]:
    return (index for index, each in enumerate(keys) if each == key)


def _result(job: Job[list[int]]) -> list[int] | None:
    try:
        return job.result() if job.done else None
    except VCacheError:
        return None
