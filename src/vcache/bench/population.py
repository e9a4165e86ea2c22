"""Chunks for a manager to know, without any memory behind them: what lenders would report of their slot headers."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ..manager.client import Manager
from ..segment.hostinfo import host_id
from ..segment.slots import ALIGNMENT, SegmentInfo, SlabHeader, SlabInfo, SlabInventory, SlotHeader, slab_bytes_for

CHUNKS_PER_PROMPT = 512
"""Chunks of a 128k-token prompt."""
_SLOTS_PER_SLAB = 1000
_SLABS_PER_SEGMENT = 50
_NAMESPACE = bytes(16)


def random_keys(count: int, seed: int = 1) -> list[bytes]:
    """Digests as BLAKE2b would make them: `count` random values of 16 bytes."""
    raw = random.Random(seed).randbytes(16 * count)
    return [raw[start : start + 16] for start in range(0, len(raw), 16)]


def mount_population(
    api: Manager, keys: list[bytes], *, first_segment: int = 0, slabs_per_segment: int = _SLABS_PER_SEGMENT
) -> int:
    """Mount segments of minimal slots whose headers carry `keys`, as lenders do after a manager restart. Blocks.

    Segments are named by numbers from `first_segment` on; returns the next free one.
    """
    number = first_segment
    per_segment = _SLOTS_PER_SLAB * slabs_per_segment
    for start in range(0, len(keys), per_segment):
        inventory = list(_inventory(keys, start, min(start + per_segment, len(keys))))
        slab_bytes = slab_bytes_for(ALIGNMENT, _SLOTS_PER_SLAB)
        info = SegmentInfo(
            uuid=number.to_bytes(16, "little"),
            kind="host",
            host=host_id(),
            device="host",
            broker="/nowhere",
            owner=api.client_id,
            slabs=tuple(SlabInfo(slab.slab, slab_bytes) for slab in inventory),
        )
        api.mount(info, inventory)
        number += 1
    return number


def _inventory(keys: list[bytes], start: int, end: int) -> Iterator[SlabInventory]:
    for index, first in enumerate(range(start, end, _SLOTS_PER_SLAB)):
        headers = [
            SlotHeader(
                shard=0,
                num_shards=1,
                generation=4 + 2 * slot,
                key=keys[position],
                namespace=_NAMESPACE,
                payload_bytes=ALIGNMENT,
                tokens=256,
                chunk_index=position % CHUNKS_PER_PROMPT,
            ).pack()
            for slot, position in enumerate(range(first, min(first + _SLOTS_PER_SLAB, end)))
        ]
        empty = bytes(64) * (_SLOTS_PER_SLAB - len(headers))
        yield SlabInventory(index, SlabHeader(2, ALIGNMENT, _SLOTS_PER_SLAB).pack(), b"".join(headers) + empty)
