"""Memory per host, summed up as it changes, and when its engines are asked to make room."""

from __future__ import annotations

from ...segment.slots import SegmentInfo

VRAM, DRAM = 0, 1
"""Kinds of memory; also indices into the sums of `HostMemory`."""

_DEMOTE, _SPILL = 0, 1
ASK_AGAIN = 2.0
"""Seconds after which an engine is asked again that has not said it is done."""
_NEVER = float("-inf")


class HostMemory:
    """What is lent on one host. A slot counts as its share of its slab, so that a slab without a free slot is used to 100%
    whatever its geometry wastes."""

    __slots__ = ("busy", "nbytes", "quiet_until", "segments", "spilled")

    def __init__(self) -> None:
        self.segments = 0
        self.nbytes = [0, 0]
        """Bytes of slabs, VRAM and DRAM."""
        self.busy = [0, 0]
        """Bytes of slots that are not free, VRAM and DRAM."""
        self.spilled = 0
        """Bytes of slots whose chunk is in the storage tier as well: room that costs nothing to make."""
        self.quiet_until = [_NEVER, _NEVER]
        """Before this time nobody is asked to demote, or to spill."""

    def wants_room(self, high: float, now: float) -> bool:
        """Whether to ask an engine of this host now: VRAM is used above `high` although there is host memory, or the whole
        pool is, without what could go at once. At most one wish of each kind is outstanding. O(1)."""
        demote = self.nbytes[DRAM] > 0 and self.busy[VRAM] > high * self.nbytes[VRAM]
        spill = self.unspilled() > high * sum(self.nbytes)
        wanted = False
        for kind, over in ((_DEMOTE, demote), (_SPILL, spill)):
            if over and now >= self.quiet_until[kind]:
                self.quiet_until[kind] = now + ASK_AGAIN
                wanted = True
        return wanted

    def unspilled(self) -> int:
        """Bytes in use that would be lost with their slots."""
        return sum(self.busy) - self.spilled

    def demoted(self) -> None:
        """Nothing more to demote: the wish is fulfilled."""
        self.quiet_until[_DEMOTE] = _NEVER

    def spilled_all(self) -> None:
        """Nothing more to spill: the wish is fulfilled."""
        self.quiet_until[_SPILL] = _NEVER


def tier_of(info: SegmentInfo) -> int:
    """`VRAM` or `DRAM`."""
    return VRAM if info.kind == "cuda" else DRAM
