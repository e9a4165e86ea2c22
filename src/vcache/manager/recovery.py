"""Rebuilding the directory from a mounted slab's headers."""

from __future__ import annotations

from ..segment.slots import SlabInfo, SlotHeader, SlotLocation
from .allocator import Segment, Slab, Traces
from .chunks import deepest_first
from .core import Core
from .inventory import SlabFindings
from .puts import PutDesk
from .records import PROCESSING, QUARANTINED, USED, Record, Write
from .removal import Removal


class Recovery:
    """Takes what `inventory.py` found into the directory."""

    def __init__(self, core: Core, puts: PutDesk, removal: Removal) -> None:
        self._core = core
        self._puts = puts
        self._removal = removal

    def adopt(self, segment: Segment, slabs: list[tuple[SlabInfo, Slab | None, SlabFindings]], since: int, now: float) -> None:
        """Attach slabs. The second item is what we remember of a slab in which somebody may still write. Chunks that were
        removed after removal number `since` are not believed but zeroed."""
        core = self._core
        published: list[Record] = []
        wipes: list[tuple[Slab, int]] = []
        for info, held, found in slabs:
            slab = self._attach(segment, info, held, found)
            if slab.format_generation != found.format_generation:
                for slot, header in found.chunks:
                    slab.buried[slot] = self._traces(header, since)
                continue
            for slot, header in found.chunks:
                owner = slab.owners[slot]
                if owner is None and self._removal.was_removed(header, since):
                    wipes.append((slab, slot))
                    continue
                if owner is None:
                    record = self._believe(slab, slot, header, now)
                    if record is not None:
                        published.append(record)
                if slab.owners[slot] is owner:
                    slab.stale[slot] = self._traces(header, since)
            wipes += [(slab, slot) for slot in found.broken if slab.owners[slot] is None]
            core.counters.inventory_ignored += found.ignored
        for slab in segment.slabs.values():
            core.allocator.recount(slab)
        core.wipe(wipes)
        self._enqueue([record for record in published if record.packed])

    def _traces(self, header: SlotHeader, since: int) -> Traces:
        return None if self._removal.was_removed(header, since) else ((header.key, header.namespace),)

    def _attach(self, segment: Segment, info: SlabInfo, held: Slab | None, found: SlabFindings) -> Slab:
        """The slab with the holders of unfinished writes in place."""
        core = self._core
        if held is not None:
            # Its format stands even if the memory shows an older one: the writer that we wait for may be about to write it.
            slab = held
            slab.address = info.address
        else:
            slab = Slab(info.index, info.nbytes, 0, info.address)
            if found.geometry is not None:
                slab.layout(found.geometry, found.format_generation)
        counter = max(core.allocator.floor, found.top, slab.counter)
        slab.counter = counter + (counter & 1)
        slab.stale, slab.buried = {}, {}
        if slab.format_generation == found.format_generation:
            for slot, header in found.writing:
                # A client that has said hello has no unfinished writes but those that we know.
                if slab.owners[slot] is None and header.namespace not in core.sessions:
                    self._suspect(slab, slot, header)
        slab.recount()
        core.allocator.attach(segment, slab)
        return slab

    def _suspect(self, slab: Slab, slot: int, header: SlotHeader) -> None:
        """Wait for the client that signed this unfinished write."""
        write = Write(slab, slot, header.key, header.shard, header.generation + 1, writer=header.namespace)
        write.state = QUARANTINED
        write.ticket = (b"%x/%x" % (id(slab), slot), header.shard, header.generation)
        slab.owners[slot] = write
        self._core.writes.add(write)
        self._core.counters.quarantines += 1

    def _believe(self, slab: Slab, slot: int, header: SlotHeader, now: float) -> Record | None:
        """Take a complete shard in, unless there is a better copy. The record if its chunk became visible. Leaves the slab's
        counts to `recount`."""
        core, chunks = self._core, self._core.chunks
        packed = slab.location(slot, header.tokens, header.generation).pack()
        record = chunks.visible.get(header.key)
        if record is not None:
            if self._replace(record, header, packed):
                slab.owners[slot] = record
            return None
        space = chunks.space(header.namespace)
        pending = chunks.pending.get(header.key)
        if pending is None and header.num_shards == 1:
            slab.owners[slot] = record = chunks.recover(header.key, header.chunk_index, space, packed)
            core.counters.recovered += 1
            return record
        if pending is None:
            pending = chunks.begin(header.key, header.chunk_index, space, header.num_shards)
        part = pending.parts.get(header.shard)
        if pending.num_shards != header.num_shards or (
            part is not None and (part.state == PROCESSING or part.generation >= header.generation)
        ):
            return None
        write = Write(slab, slot, header.key, header.shard, header.generation, space=space, packed=packed)
        write.state = USED
        slab.owners[slot] = pending.parts[header.shard] = write
        core.writes.time(write, now + core.config.ticket_ttl)
        core.counters.recovered += 1
        if part is not None:
            core.writes.remove(part)
            self._supersede(part.slab, part.slot, part.key, space.name)
        return self._puts.complete(header.key)

    def _replace(self, record: Record, header: SlotHeader, packed: bytes) -> bool:
        """Whether a second copy of a visible shard takes the place of the first: the higher generation wins, but nothing moves
        under a lease."""
        places = list(record.places())
        if record.pins or len(places) != header.num_shards:
            return False
        old, new = places[header.shard], SlotLocation.unpack_many(packed)[0]
        if old.generation >= new.generation or old.slot_bytes != new.slot_bytes:
            return False
        self._core.replace(record, header.shard, packed)
        return True

    def _supersede(self, slab: Slab, slot: int, key: bytes, namespace: bytes) -> None:
        slab.trace(slot, key, namespace)
        self._core.free(slab, slot)

    def _enqueue(self, records: list[Record]) -> None:
        by_size: dict[int, list[Record]] = {}
        for record in deepest_first(records):
            by_size.setdefault(int.from_bytes(record.packed[12:16], "little") * 256, []).append(record)
        for slot_bytes, group in by_size.items():
            self._core.chunks.policy.add_cold(group, slot_bytes)
