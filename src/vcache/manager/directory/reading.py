"""Reads: which chunks are there for a session, and leases on them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

from ...errors import ProtocolError
from ...segment.slots import LOCATION_BYTES, Locations, slab_ids
from ..api import Acquire, AcquireReply, Lookup, Release, Tiers
from .promoting import Promoting
from .records import Record
from .slabs import VRAM
from .state import Session, State


class PackedReply(NamedTuple):
    """`AcquireReply` with the locations still packed: `LOCATION_BYTES` each, joined."""

    lease: int
    expires_in: float
    packed: bytes

    def unpack(self) -> AcquireReply:
        """The same, as clients get it."""
        return AcquireReply(self.lease, self.expires_in, Locations(self.packed))


class Reading:
    """Answers look-ups, grants and ends leases."""

    def __init__(self, state: State, promoting: Promoting) -> None:
        """`promoting`: hears what is read on hosts whose VRAM has room."""
        self._state = state
        self._promoting = promoting
        self._hosts = state.allocator.hosts
        self._find = state.chunks.visible.get
        self._counters = state.counters
        self._touch = state.chunks.policy.touch
        self._admission = state.admission

    def lookup(self, session: Session, verb: Lookup) -> int:
        found = self._prefix(session, verb.keys)
        if found:
            self._touch(found, self._state.tick_clock(self._state.now))
        return len(found)

    def acquire(self, session: Session, verb: Acquire) -> PackedReply:
        """Raises `ProtocolError` for a negative shard."""
        if verb.shard < 0:
            raise ProtocolError(f"acquire: shard {verb.shard}")
        if verb.lease:
            return self._locate(session, verb)
        state, client = self._state, session.client
        state.check_leases(client)
        found = self._prefix(session, verb.keys)
        packed = b"".join([record.packed for record in found])
        if verb.shard or len(packed) != LOCATION_BYTES * len(found):
            packed = self._places(found, verb.shard)
        if not found:
            return PackedReply(0, 0.0, b"")
        granted = state.leases.grant(client, found, state.now)
        state.counters.leases += 1
        clock = state.tick_clock(state.now)
        self._touch(found, clock)
        if self._admission.follows:
            self._admission.used(verb.keys[: len(found)], clock)
        memory = self._hosts.get(session.host)
        if (
            memory is not None
            and memory.nbytes[VRAM]
            and memory.busy[VRAM] < state.config.low_watermark * memory.nbytes[VRAM]
            and not verb.shard
        ):
            self._promoting.leased(memory, found)
        return PackedReply(granted.number, state.leases.ttl, packed)

    def release(self, session: Session, verb: Release) -> None:
        state = self._state
        state.unleased(state.leases.drop(verb.lease, session.client))
        memory = self._hosts.get(session.host)
        if memory is not None and memory.heat.hot:
            self._promoting.ask(session, memory)

    def tiers(self, session: Session, verb: Tiers) -> Generator[None, None, list[int]]:
        """Pauses after each slice of keys."""
        state, keys, levels = self._state, verb.keys, list[int]()
        segments = state.allocator.segments
        for start in range(0, len(keys), state.slice_size):
            unreadable = state.unreadable(session)
            for key in keys[start : start + state.slice_size]:
                record = self._find(key)
                if record is None or (unreadable and not readable(record, unreadable)):
                    levels.append(-1)
                else:
                    levels.append(max(int(segments[place.segment].info.kind == "host") for place in record.places()))
            if start + state.slice_size < len(keys):
                yield
        return levels

    def _prefix(self, session: Session, keys: Sequence[bytes]) -> list[Record]:
        """Find the records of the leading keys that are visible and that the session can read; count hits and misses."""
        counters, asked = self._counters, len(keys)
        found: list[Record] = list(map(self._find, keys))  # type: ignore[arg-type]
        if not all(found):
            del found[found.index(None) :]  # type: ignore[arg-type]
        unreadable = self._state.unreadable(session)
        if unreadable:
            del found[readable_prefix(found, unreadable) :]
        hits = len(found)
        counters.lookups += asked
        counters.hits += hits
        counters.misses += asked - hits
        if self._state.chunks.orphans:
            self._state.chunks.relink(found)
        return found

    def _places(self, found: list[Record], shard: int) -> bytes:
        """Join the packed locations of one shard; cut `found` at the first record without it, which makes the rest misses."""
        places = [record.packed_at(shard) for record in found]
        if b"" in places:
            cut = places.index(b"")
            lost = len(found) - cut
            self._counters.hits -= lost
            self._counters.misses += lost
            del found[cut:], places[cut:]
        return b"".join(places)

    def _locate(self, session: Session, verb: Acquire) -> PackedReply:
        """Locate chunks that a lease of the session's holds already."""
        counters, keys, now = self._counters, verb.keys, self._state.now
        lease = self._state.leases.get(verb.lease, session.client, now)
        if lease is None:
            counters.lookups += len(keys)
            counters.errors += len(keys)
            return PackedReply(0, 0.0, b"")
        found = self._prefix(session, keys)
        cover = lease.cover()
        cut = next((place for place, record in enumerate(found) if record.key not in cover), len(found))
        counters.hits -= len(found) - cut
        counters.misses += len(found) - cut
        del found[cut:]
        packed = self._places(found, verb.shard)
        return PackedReply(verb.lease if found else 0, lease.expires - now, packed)


def readable(record: Record, unreadable: frozenset[bytes]) -> bool:
    """Whether none of a visible chunk's shards lies in one of these slabs."""
    return unreadable.isdisjoint(slab_ids(record.packed))


def readable_prefix(records: Iterable[Record], unreadable: frozenset[bytes]) -> int:
    """Count the leading records that are readable."""
    count = 0
    for record in records:
        if not readable(record, unreadable):
            break
        count += 1
    return count
