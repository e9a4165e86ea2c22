"""Arguments of movers, checked before a byte moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import ArgumentError, SegmentError
from ..segment.mapping import MappedSlab
from .layout import PagedCache
from .mover import SlotTransfer

if TYPE_CHECKING:
    import torch


def check_transfers(
    cache: PagedCache,
    slot_mapping: torch.Tensor,
    transfers: Sequence[SlotTransfer],
    reaches: Callable[[MappedSlab], bool],
) -> None:
    """Raise `ArgumentError` for a transfer that contradicts the cache or the mapping's length, `SegmentError` for a slab that
    this mover cannot reach. Costs about a microsecond per transfer."""
    covered, token_bytes = len(slot_mapping), cache.spec.token_bytes
    for position, (slot, header, start, skip, _) in enumerate(transfers):
        tokens = header.tokens
        if not 0 <= skip < tokens or start < 0 or start + tokens - skip > covered:
            raise ArgumentError(
                f"transfer {position}: start {start}, skip {skip} and {tokens} tokens exceed slot_mapping ({covered} entries)"
            )
        if header.payload_bytes != tokens * token_bytes:
            raise ArgumentError(
                f"transfer {position}: payload of {header.payload_bytes} bytes, but {tokens} tokens of the cache take "
                f"{tokens * token_bytes}"
            )
        if slot.payload_offset + header.payload_bytes > slot.slab.nbytes:
            raise ArgumentError(f"transfer {position}: payload reaches beyond the end of its slab ({slot.slab.nbytes} bytes)")
        if not reaches(slot.slab):
            raise SegmentError(
                f"transfer {position}: {slot.slab.kind} slab on {slot.slab.device} is out of reach of {cache.device}"
            )
