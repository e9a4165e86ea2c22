"""Rebuilding the directory from the headers of mounted slabs, slice by slice."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain

from ...segment.slots import SlabInfo, SlotHeader, SlotLocation, stride_of
from .inventory import SlabHeaders, Verdict
from .records import Record
from .removal import Removal
from .slabs import PROCESSING, QUARANTINED, UNREAD, USED, Owner, Segment, Slab, Write
from .state import State
from .writing import Writing

DEEPEST = 1 << 16
"""Chunks at least so deep in their prompts are equally deep when it comes to the order of eviction."""


class Recovery:
    """Takes what `inventory.py` finds into the directory. Between two slices all is as it will be, but for slots that were not
    read yet: nothing is given out in their slab, and a look-up does not find what is there."""

    def __init__(self, state: State, writing: Writing, removal: Removal) -> None:
        self._state = state
        self._writing = writing
        self._removal = removal

    def attach(self, segment: Segment, info: SlabInfo, held: Slab | None, headers: SlabHeaders | None) -> None:
        """Attach a slab, closed while there are `headers` to be read. `held`: what we remember of it, because somebody may
        still write there; its format stands even if the memory shows an older one: that writer may be about to write it."""
        floor = self._state.allocator.floor
        if held is not None:
            slab = held
            slab.address = info.address
            if headers is not None:
                slab.unread_all()
        else:
            slab = Slab(info.index, info.nbytes, 0, info.address)
            if headers is not None:
                slab.layout(headers.geometry, headers.format_generation, unread=True)
        _raise_counter(slab, max(floor, headers.format_generation if headers is not None else 0))
        slab.stale, slab.buried = {}, {}
        self._state.allocator.attach(segment, slab)

    def read(self, segment: Segment, inventory: dict[int, SlabHeaders], since: int) -> Generator[None, None, int]:
        """Take in what the headers of attached slabs say, and open the slabs; the segment's number. Chunks that were removed
        after removal number `since` are not believed but zeroed. Pauses after each slice of slots."""
        step, reader = self._state.slice_size, _Reader(self._state, self._writing, self._removal, since)
        for index, headers in inventory.items():
            slab = segment.slabs.get(index)
            count = max(headers.geometry.slots, slab.slots) if slab is not None else 0
            # From the last on, so that the first free slot is given out first.
            for end in range(count, 0, -step):
                if slab is None or slab.segment is not segment:
                    break  # It was given back meanwhile.
                reader.read(slab, headers, range(end - 1, max(0, end - step) - 1, -1))
                if end <= step:
                    slab.unread = False
                    self._state.allocator.refresh(slab)
                yield
        yield from reader.sort()
        return segment.number


def _raise_counter(slab: Slab, generation: int) -> None:
    """Give out only generations above this one in the slab from now on (rule I4)."""
    if generation > slab.counter:
        slab.counter = generation + (generation & 1)


class _Reader:
    """Judges the slots of one inventory."""

    def __init__(self, state: State, writing: Writing, removal: Removal, since: int) -> None:
        self._state = state
        self._writing = writing
        self._removal = removal
        self._since = since
        self._cold: dict[int, dict[int, list[Record]]] = {}
        """Chunks that became visible, by slot size and chunk index."""
        self._found: list[bytes] = []
        """Of the slots that are being read: whose shards were taken in."""

    def read(self, slab: Slab, headers: SlabHeaders, slots: range) -> None:
        """Give each of these slots a holder, or free it. `headers` may have more slots than the slab, or fewer, when
        they are of another format."""
        state = self._state
        wipes: list[tuple[Slab, int]] = []
        same = slab.format_generation == headers.format_generation
        for slot in slots:
            verdict, header = headers.judge(slot) if slot < headers.geometry.slots else (Verdict.EMPTY, None)
            unread = slot < slab.slots and slab.owners[slot] is UNREAD
            if header is not None:
                _raise_counter(slab, header.generation)
            if verdict is Verdict.CHUNK and header is not None:
                doomed = self._removal.was_removed(header, self._since)
                if not same:
                    slab.buried[slot] = None if doomed else ((header.key, header.namespace),)
                elif unread and doomed:
                    wipes.append((slab, slot))
                    continue
                elif not (unread and self._believe(slab, slot, header)):
                    slab.stale[slot] = None if doomed else ((header.key, header.namespace),)
            elif same and unread and verdict is Verdict.BROKEN:
                wipes.append((slab, slot))
                unread = False
            elif (
                same and unread and verdict is Verdict.WRITING and header is not None and header.namespace not in state.sessions
            ):
                # A client that has said hello has no unfinished writes but those that we know.
                self._suspect(slab, slot, header)
            if same and verdict in (Verdict.STRANGE, Verdict.BROKEN):
                state.counters.inventory_ignored += 1
            if unread and slab.owners[slot] is UNREAD:
                state.allocator.release(slab, slot)
        state.wiping.hold(wipes)
        if self._found:
            assert slab.segment is not None
            where = f"in segment {slab.segment.number}, slab {slab.index}"
            state.log.happened(state.now, "recovered", self._found, where)
            self._found = []

    def sort(self) -> Iterator[None]:
        """Have what became visible evicted before all that was used, a prompt's tail before its head."""
        for slot_bytes, by_index in self._cold.items():
            records = chain.from_iterable(by_index[index] for index in sorted(by_index, reverse=True))
            yield from self._state.chunks.policy.sort_cold(records, slot_bytes, self._state.slice_size)

    def _suspect(self, slab: Slab, slot: int, header: SlotHeader) -> None:
        """Wait for the client that signed this unfinished write."""
        write = Write(slab, slot, header.key, header.shard, header.generation + 1, writer=header.namespace)
        write.state = QUARANTINED
        write.ticket = (b"%x/%x" % (id(slab), slot), header.shard, header.generation)
        slab.owners[slot] = write
        self._state.writes.add(write)
        self._state.counters.quarantines += 1

    def _believe(self, slab: Slab, slot: int, header: SlotHeader) -> bool:
        """Take a complete shard in, unless there is a better copy."""
        state, chunks = self._state, self._state.chunks
        packed = slab.location(slot, header.tokens, header.generation).pack()
        record = chunks.visible.get(header.key)
        if record is not None:
            if not self._replace(record, header, packed):
                return False
            self._hold(slab, slot, record)
            return True
        namespace = chunks.namespace(header.namespace)
        pending = chunks.pending.get(header.key)
        if pending is None and header.num_shards == 1:
            record = chunks.recover(header.key, header.chunk_index, namespace, packed)
            self._hold(slab, slot, record)
            state.counters.recovered += 1
            self._found.append(header.key)
            self._add_cold(record)
            return True
        if pending is None:
            pending = chunks.begin(header.key, header.chunk_index, namespace, header.num_shards)
        part = pending.parts.get(header.shard)
        if pending.num_shards != header.num_shards or (
            part is not None and (part.state == PROCESSING or part.generation >= header.generation)
        ):
            return False
        write = Write(slab, slot, header.key, header.shard, header.generation, namespace=namespace, packed=packed)
        write.state = USED
        self._hold(slab, slot, write)
        pending.parts[header.shard] = write
        state.writes.await_others(write, state.now + state.config.ticket_ttl)
        state.counters.recovered += 1
        self._found.append(header.key)
        if part is not None:
            state.writes.remove(part)
            self._supersede(part.slab, part.slot, part.key, namespace.name)
        record = self._writing.complete(header.key)
        if record is not None:
            self._add_cold(record)
        return True

    def _hold(self, slab: Slab, slot: int, owner: Owner) -> None:
        slab.owners[slot] = owner
        self._state.allocator.change(slab, slot, QUARANTINED)

    def _add_cold(self, record: Record) -> None:
        slot_bytes = stride_of(record.packed)
        self._cold.setdefault(slot_bytes, {}).setdefault(min(record.index, DEEPEST), []).append(record)
        self._state.chunks.policy.add_cold(record, slot_bytes)

    def _replace(self, record: Record, header: SlotHeader, packed: bytes) -> bool:
        """Let a second copy of a visible shard take the place of the first, and say whether it did: the higher generation wins,
        but nothing moves under a lease."""
        places = record.places()
        if record.leased or len(places) != header.num_shards:
            return False
        old, new = places[header.shard], SlotLocation.unpack(packed)
        if old.generation >= new.generation or old.slot_bytes != new.slot_bytes:
            return False
        self._state.replace(record, header.shard, packed)
        return True

    def _supersede(self, slab: Slab, slot: int, key: bytes, namespace: bytes) -> None:
        slab.trace(slot, key, namespace)
        self._state.free(slab, slot)
