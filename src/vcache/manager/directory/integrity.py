"""What must hold between the tables of the directory, after every event. Each table checks itself."""

from __future__ import annotations

from ...errors import IntegrityError
from .records import Record
from .slabs import PROCESSING, QUARANTINED, HostMemory, Slab, Write
from .state import State


def check_core(core: State, away: list[Slab]) -> None:
    """`away`: detached slabs in which somebody may still write. Raises `IntegrityError` naming the rule. O(everything)."""
    counters = core.counters
    if counters.lookups != counters.hits + counters.misses + counters.errors:
        raise IntegrityError(f"I10: {counters.lookups} lookups, {counters.hits} + {counters.misses} + {counters.errors}")
    core.allocator.check_integrity()
    core.chunks.check_integrity(core.leases.pins())
    core.leases.check_integrity()
    core.writes.check_integrity()
    _check_places(core)
    _check_writes(core, away)
    _check_pending(core)
    for client in {lease.client for lease in core.leases.leases.values()} - set(core.sessions):
        raise IntegrityError(f"I9: client {client.hex()} holds leases without a session")


def _check_places(core: State) -> None:
    """Visible chunks and the slots they own point to each other. What is in storage as well is summed up right."""
    spilled: dict[HostMemory, int] = {}
    owned = sum(1 for slab in core.allocator.slabs.values() for owner in slab.owners if isinstance(owner, Record))
    for record in core.chunks.visible.values():
        for place in record.places():
            slab = core.allocator.slabs.get(core.allocator.slab_key(place.segment, place.slab))
            owned -= 1
            if slab is None or slab.owners[place.slot] is not record:
                raise IntegrityError(f"I2: {record.key.hex()} does not own the slot it points to")
            if not slab.format_generation < place.generation <= slab.counter:
                raise IntegrityError(f"I4: generation {place.generation} of {record.key.hex()} is out of its slab's range")
            if record.spilled:
                assert slab.segment is not None
                spilled[slab.segment.memory] = spilled.get(slab.segment.memory, 0) + slab.share
    if owned:
        raise IntegrityError("I2: a slot is owned by a chunk that does not point to it")
    for host, memory in core.allocator.hosts.items():
        if memory.spilled != spilled.get(memory, 0):
            raise IntegrityError(f"I5: host {host}: {spilled.get(memory, 0)} bytes in storage, recorded {memory.spilled}")
    hidden = [*core.chunks.ghosts.values(), *(pending.record for pending in core.chunks.pending.values())]
    if any(record.spilled for record in hidden):
        raise IntegrityError("I2: a chunk that is not visible is marked as in storage")


def _check_writes(core: State, away: list[Slab]) -> None:
    slabs = [*core.allocator.slabs.values(), *away]
    held = [owner for slab in slabs for owner in slab.owners if isinstance(owner, Write)]
    known = {id(write) for write in held}
    if any(id(write) not in known for writes in core.writes.by_writer.values() for write in writes.values()):
        raise IntegrityError("I6: a write is remembered in a slab that is gone")
    if {id(write) for write in held if write.source} != {id(write) for write in core.writes.moves}:
        raise IntegrityError("I3: moves remembered and slots that they hold differ")
    for write in held:
        pending = core.chunks.pending.get(write.key)
        part = pending.parts.get(write.shard) if pending is not None else None
        if write.source and (part is write or write.state not in (PROCESSING, QUARANTINED) or not write.writer):
            raise IntegrityError(f"I3: move of {write.key.hex()} is part of a pending chunk, or nobody's")
        if not write.source and (part is write) != (write.state != QUARANTINED):
            raise IntegrityError(f"I3: write of {write.key.hex()} and its pending chunk disagree")
        if write.state == PROCESSING and write.writer not in core.sessions:
            raise IntegrityError(f"I9: client {write.writer.hex()} writes without a session")


def _check_pending(core: State) -> None:
    for key, pending in core.chunks.pending.items():
        for part in pending.parts.values():
            if part.slab.owners[part.slot] is not part or part.slab.segment is None:
                raise IntegrityError(f"I3: a shard of pending chunk {key.hex()} does not hold its slot")
    for token, holders in core.wiping.items():
        for wipe in holders:
            if wipe.token != token or wipe.slab.owners[wipe.slot] is not wipe or wipe.slab.segment is None:
                raise IntegrityError(f"I3: wipe {token} does not hold its slot")
