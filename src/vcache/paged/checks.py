"""Check the arguments of movers, before a byte moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, SegmentError
from ..segment.mapping import MappedSlab
from .checksum import TRAILER_BYTES
from .columns import SlotColumns
from .layout import PagedCache

if TYPE_CHECKING:
    import torch


def check_transfers(
    cache: PagedCache, slot_mapping: torch.Tensor, slots: SlotColumns, reaches: Callable[[MappedSlab], bool]
) -> None:
    """Raise `ArgumentError` for a transfer that contradicts the cache or the mapping's length, `SegmentError` for a slab that
    this mover cannot reach. Costs some twenty microseconds, whatever the number of transfers."""
    covered, token_bytes, skip = len(slot_mapping), cache.spec.token_bytes, slots.skip
    tokens, payload_bytes = slots.tokens, slots.headers["payload_bytes"].astype(np.int64)
    nbytes = np.array([slab.nbytes for slab in slots.slabs], np.int64)[slots.slab]
    end = slots.payload_offset + payload_bytes
    outside = (slots.trailer != 0) & ((slots.trailer < end) | (slots.trailer > nbytes - TRAILER_BYTES))
    exceeds = (skip < 0) | (skip >= tokens) | (slots.start < 0) | (slots.start + tokens - skip > covered)
    wrong = exceeds | (payload_bytes != tokens * token_bytes) | (end > nbytes) | outside
    if wrong.any():
        at = int(np.argmax(wrong))
        if exceeds[at]:
            raise ArgumentError(
                f"transfer {at}: start {slots.start[at]}, skip {skip[at]} and {tokens[at]} tokens exceed slot_mapping "
                f"({covered} entries)"
            )
        if payload_bytes[at] != tokens[at] * token_bytes:
            raise ArgumentError(
                f"transfer {at}: payload of {payload_bytes[at]} bytes, but {tokens[at]} tokens of the cache take "
                f"{tokens[at] * token_bytes}"
            )
        if end[at] > nbytes[at]:
            raise ArgumentError(f"transfer {at}: payload reaches beyond the end of its slab ({nbytes[at]} bytes)")
        raise ArgumentError(f"transfer {at}: trailer at {slots.trailer[at]} lies in the payload or beyond the end of its slab")
    for number in np.unique(slots.slab).tolist():
        slab = slots.slabs[number]
        if not reaches(slab):
            at = int(np.argmax(slots.slab == number))
            raise SegmentError(f"transfer {at}: {slab.kind} slab on {slab.device} is out of reach of {cache.device}")
