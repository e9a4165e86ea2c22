"""What the directory counts."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import IntegrityError


@dataclass(slots=True)
class Counters:
    """Since the manager started. Per key, unless the name says otherwise; lookups = hits + misses + errors (I10)."""

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    errors: int = 0
    leases: int = 0
    leases_refused: int = 0
    """Because the session held too many."""
    lease_expiries: int = 0
    puts: int = 0
    """Tickets granted."""
    puts_exist: int = 0
    puts_busy: int = 0
    puts_no_space: int = 0
    puts_not_admitted: int = 0
    """Answered in the same way: there was no room, and others were not pushed out for it (`manager.admission`)."""
    stored: int = 0
    """Shards written and published or waiting for the other shards."""
    late_ends: int = 0
    """`put_end` for a ticket that had lapsed."""
    revocations: int = 0
    ticket_expiries: int = 0
    incomplete: int = 0
    """Complete shards dropped because the others never came."""
    evictions: int = 0
    """Chunks that went for lack of room, because their slab was returned, or with their segment."""
    demotions: int = 0
    """Shards that moved from VRAM to host memory."""
    demotions_refused: int = 0
    """Copied shards that stayed where they were: leased by others, gone, or moved before."""
    promotions: int = 0
    """Shards that moved from host memory to VRAM."""
    promotions_refused: int = 0
    """Likewise."""
    spills: int = 0
    """Chunks that an engine wrote to storage before their eviction."""
    slab_reclaims: int = 0
    """Slabs emptied to hold another slot size."""
    removed: int = 0
    recovered: int = 0
    """Shards found in inventories."""
    inventory_ignored: int = 0
    """Slot headers in inventories that were not believed."""
    quarantines: int = 0
    """Slots that went into quarantine."""
    wipes: int = 0
    """Slot headers that a lender was told to zero."""
    sessions: int = 0
    session_timeouts: int = 0

    def check_integrity(self) -> None:
        """Raises `IntegrityError` naming the rule."""
        if self.lookups != self.hits + self.misses + self.errors:
            raise IntegrityError(f"I10: {self.lookups} lookups, {self.hits} + {self.misses} + {self.errors}")
