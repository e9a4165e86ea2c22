"""What must hold between the tables of the directory, after every event. Each table checks itself."""

from __future__ import annotations

from ...errors import IntegrityError
from .records import Record
from .slabs import PROCESSING, QUARANTINED, HostMemory, Slab, Write
from .state import State


def check_state(state: State, away: list[Slab]) -> None:
    """Check every table by itself, and that they agree. `away`: detached slabs in which somebody may still write. Raises
    `IntegrityError` naming the rule. O(everything)."""
    held = [owner for slab in (*state.allocator.slabs.values(), *away) for owner in slab.owners if isinstance(owner, Write)]
    state.counters.check_integrity()
    state.allocator.check_integrity()
    state.chunks.check_integrity(state.leases.leased())
    state.leases.check_integrity(state.sessions)
    state.writes.check_integrity(held, state.sessions)
    state.wiping.check_integrity()
    state.log.check_integrity()
    state.admission.check_integrity()
    _check_places(state)
    for write in held:
        _check_write(state, write)


def _check_places(state: State) -> None:
    """Check that visible chunks and the slots they own point to each other, and the sum of what is in storage as well."""
    spilled: dict[HostMemory, int] = {}
    owned = sum(1 for slab in state.allocator.slabs.values() for owner in slab.owners if isinstance(owner, Record))
    for record in state.chunks.visible.values():
        for place in record.places():
            slab = state.allocator.slabs.get(state.allocator.slab_key(place.segment, place.slab))
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
    for host, memory in state.allocator.hosts.items():
        if memory.spilled != spilled.get(memory, 0):
            raise IntegrityError(f"I5: host {host}: {spilled.get(memory, 0)} bytes in storage, recorded {memory.spilled}")


def _check_write(state: State, write: Write) -> None:
    """Check that a write that holds a slot is a part of its pending chunk, or a move, or nothing that counts any more."""
    pending = state.chunks.pending.get(write.key)
    part = pending.parts.get(write.shard) if pending is not None else None
    if write.source and (part is write or write.state not in (PROCESSING, QUARANTINED) or not write.writer):
        raise IntegrityError(f"I3: move of {write.key.hex()} is part of a pending chunk, or nobody's")
    if not write.source and (part is write) != (write.state != QUARANTINED):
        raise IntegrityError(f"I3: write of {write.key.hex()} and its pending chunk disagree")
