"""A bounded log of what was asked about chunks and of what became of them, searched for one chunk after the fact."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import IntegrityError, VCacheError
from ...keys import DIGEST_BYTES
from ...segment.slots import LOCATION_BYTES, SlotLocation
from ..api import (
    Acquire,
    Demote,
    Lookup,
    MovePlan,
    PlanSpill,
    Promote,
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

MAX_READ_BYTES = 1 << 19
"""What the entries of look-ups hold together, about: keys as they came in frames, 16 bytes each (a caller in this process keeps
objects of four times that). Little: they are many, and must drive out neither what is seldom nor what is in the processor's
cache; enough for one of 20,000 keys."""
MAX_LIFE_BYTES = 1 << 24
"""What all other entries hold together, about."""
ENTRY_BYTES = 384
"""What an entry holds by itself. So the number of entries is bounded as well."""
_KEY_BYTES = 64
_TICKET_BYTES = 128
_PLACE_BYTES = 512


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

    number: float
    time: float
    client: str
    kind: str
    named: Any
    """Keys, tickets, moves or spills: as they came. Keys that came in a frame: the frame's payload."""
    outcome: Any
    shard: int
    nbytes: int
    """What it holds, about."""


Kept = tuple[float, float, str, str, Any, Any, int, int]


class _Ring:
    """The latest entries: bounded in what they hold."""

    def __init__(self, max_bytes: int) -> None:
        self.entries: deque[Kept] = deque()
        self._max_bytes = max_bytes
        self.room = max_bytes
        """Below 0: call `forget`."""

    def add(self, entry: Kept) -> None:
        """O(1) on average. One that is too large by itself is not kept."""
        self.entries.append(entry)
        self.room = room = self.room - entry[7]
        if room < 0:
            self.forget()

    def forget(self) -> None:
        """Make some room at once, so that this is not done for every entry."""
        if self.entries[-1][7] > self._max_bytes:
            self.room += self.entries.pop()[7]
        while self.room < self._max_bytes // 16 and len(self.entries) > 1:
            self.room += self.entries.popleft()[7]

    def check_integrity(self) -> None:
        held = sum(entry[7] for entry in self.entries)
        if held != self._max_bytes - self.room or held > self._max_bytes:
            raise IntegrityError(f"log: {held} bytes in {len(self.entries)} entries, recorded {self._max_bytes - self.room}")


class Log:
    """Tells what happened to a chunk. Not thread-safe.

    A look-up costs one entry, however many keys it names: they are kept as they came, and looked into only when somebody asks.
    Whoever had a verb handled must not change its keys afterwards.
    """

    def __init__(self) -> None:
        self.number = 0
        """Grows with all that happens. What is told first has the lower number, and look-ups come after what has theirs."""
        self.reads = _Ring(MAX_READ_BYTES)
        self.lives = _Ring(MAX_LIFE_BYTES)

    def happened(
        self, now: float, what: str, keys: Sequence[bytes], detail: str = "", packed: bytes = b"", client: str = ""
    ) -> None:
        """Something happened to these chunks. `packed`: where, for a single chunk: a location, or those of all its shards.
        `client`: who wanted it."""
        self.number += 1
        nbytes = ENTRY_BYTES + _KEY_BYTES * len(keys) + len(packed)
        self.lives.add((self.number, now, client, what, keys, (detail, packed), 0, nbytes))

    def placed(self, now: float, client: str, request: PutRequest, begin: int, places: Sequence[bytes | str]) -> None:
        """Part of a request was answered. `places`: for each of its keys from `begin` on the packed location granted, or the
        status in place of it."""
        self.number += 1
        keys = tuple(request.keys[begin : begin + len(places)])
        nbytes = ENTRY_BYTES + 2 * _KEY_BYTES * len(keys)
        self.lives.add((self.number, now, client, "put_start", keys, tuple(places), request.shard, nbytes))

    def verb(self, entry: Kept) -> None:
        """A verb was handled that was begun at the entry's number: it is told before what happened through it."""
        self.number += 1
        self.lives.add(entry)

    def story(self, key: bytes) -> list[Line]:
        """All that is kept about one chunk, the oldest first; nothing for one that was never heard of. O(all that is kept):
        some hundredths of a second."""
        entries = (_Entry(*entry) for entry in sorted((*self.lives.entries, *self.reads.entries), key=lambda kept: kept[0]))
        return [line for entry in entries for line in _TELLERS.get(entry.kind, _event)(entry, key)]

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when the bounds are not kept. O(entries)."""
        self.reads.check_integrity()
        self.lives.check_integrity()


# -- verbs into entries, after they were handled: O(1) for look-ups ----------------------------------------------------


def _note_lookup(log: Log, number: int, now: float, client: str, verb: Lookup, found: int) -> None:
    payload, reads = verb.payload, log.reads
    nbytes = ENTRY_BYTES + (len(payload) or DIGEST_BYTES * len(verb.keys))
    reads.entries.append((number, now, client, "lookup", payload or verb.keys, found, 0, nbytes))
    reads.room -= nbytes
    if reads.room < 0:
        reads.forget()


def _note_acquire(log: Log, number: int, now: float, client: str, verb: Acquire, reply: Any) -> None:
    payload, reads = verb.payload, log.reads
    nbytes = ENTRY_BYTES + (len(payload) or DIGEST_BYTES * len(verb.keys))
    kind, found = "located" if verb.lease else "leased", len(reply.packed) // LOCATION_BYTES
    reads.entries.append((number, now, client, kind, payload or verb.keys, found, verb.shard, nbytes))
    reads.room -= nbytes
    if reads.room < 0:
        reads.forget()


def _note_tiers(log: Log, number: int, now: float, client: str, verb: Tiers, job: Job[list[int]]) -> None:
    log.reads.add((number, now, client, "tiers", verb.keys, job, 0, ENTRY_BYTES + 2 * _KEY_BYTES * len(verb.keys)))


def _note_put_end(log: Log, number: int, now: float, client: str, verb: PutEnd, done: list[bool]) -> None:
    log.verb((number + 0.5, now, client, "put_end", verb.tickets, done, 0, ENTRY_BYTES + _TICKET_BYTES * len(done)))


def _note_put_revoke(log: Log, number: int, now: float, client: str, verb: PutRevoke, reply: None) -> None:
    nbytes = ENTRY_BYTES + _TICKET_BYTES * len(verb.tickets)
    log.verb((number + 0.5, now, client, "put_revoke", verb.tickets, None, 0, nbytes))


Note = Callable[[Log, int, float, str, Any, Any], None]


def _note_moves(kind: str) -> Note:
    def note(log: Log, number: int, now: float, client: str, verb: Demote | Promote, plan: MovePlan) -> None:
        log.verb((number + 0.5, now, client, kind, plan.moves, None, 0, ENTRY_BYTES + 2 * _PLACE_BYTES * len(plan.moves)))

    return note


def _note_plan_spill(log: Log, number: int, now: float, client: str, verb: PlanSpill, plan: SpillPlan) -> None:
    log.verb((number + 0.5, now, client, "spill", plan.spills, None, 0, ENTRY_BYTES + _PLACE_BYTES * len(plan.spills)))


def _note_spilled(log: Log, number: int, now: float, client: str, verb: Spilled, reply: None) -> None:
    nbytes = ENTRY_BYTES + _KEY_BYTES * len(verb.keys)
    log.verb((number + 0.5, now, client, "spilled", verb.keys, ("it is in storage", b""), 0, nbytes))


def _note_remove(log: Log, number: int, now: float, client: str, verb: Remove, job: object) -> None:
    nbytes = ENTRY_BYTES + _KEY_BYTES * len(verb.keys)
    log.verb((number + 0.5, now, client, "remove asked", verb.keys, ("", b""), 0, nbytes))


NOTES: dict[type[Verb[Any]], Note] = {
    Lookup: _note_lookup,
    Acquire: _note_acquire,
    Tiers: _note_tiers,
    PutEnd: _note_put_end,
    PutRevoke: _note_put_revoke,
    Demote: _note_moves("demote"),
    Promote: _note_moves("promote"),
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
        found = index < entry.outcome
        yield _line(entry, entry.kind if found else "looked up", "" if found else "not found")


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
        what = "given up" if entry.kind == "put_revoke" else "written" if entry.outcome[index] else "not taken"
        yield _line(entry, what, detail)._replace(shard=tickets[index].shard)


def _tell_moves(entry: _Entry, key: bytes) -> Iterator[Line]:
    for move in entry.named:
        if move.key == key:
            what = "demotion planned" if entry.kind == "demote" else "promotion planned"
            yield _line(entry, what, place=move.grant.location)._replace(shard=move.shard)


def _tell_spill(entry: _Entry, key: bytes) -> Iterator[Line]:
    for spill in entry.named:
        if spill.key == key:
            yield _line(entry, "spill planned", place=spill.source)._replace(shard=spill.shard)


def _event(entry: _Entry, key: bytes) -> Iterator[Line]:
    if key in entry.named:
        detail, packed = entry.outcome
        places = SlotLocation.unpack_many(packed)
        for shard, place in enumerate(places or (None,)):
            yield _line(entry, entry.kind, detail, place)._replace(shard=shard)


_TELLERS: dict[str, Callable[[_Entry, bytes], Iterator[Line]]] = {
    "lookup": _tell_lookup,
    "leased": _tell_acquire,
    "located": _tell_acquire,
    "tiers": _tell_tiers,
    "put_start": _tell_put_start,
    "put_end": _tell_tickets,
    "put_revoke": _tell_tickets,
    "demote": _tell_moves,
    "promote": _tell_moves,
    "spill": _tell_spill,
}


def _line(entry: _Entry, what: str, detail: str = "", place: SlotLocation | None = None) -> Line:
    return Line(entry.time, entry.client, what, detail, place, entry.shard)


def _places(named: Iterable[bytes] | bytes | bytearray, key: bytes) -> Iterator[int]:
    """Where among the keys, or in the payload that they came in, this key is."""
    if not isinstance(named, Iterator) and key not in named:
        return iter(())  # As a rule, and found out fast.
    return (index for index, each in enumerate(_keys(named)) if each == key)


def _keys(named: Iterable[bytes] | bytes | bytearray) -> Iterable[bytes]:
    if not isinstance(named, bytes | bytearray):
        return named
    begin = len(named) % DIGEST_BYTES
    return [bytes(named[at : at + DIGEST_BYTES]) for at in range(begin, len(named), DIGEST_BYTES)]


def _result(job: Job[list[int]]) -> list[int] | None:
    try:
        return job.result() if job.done else None
    except VCacheError:
        return None
