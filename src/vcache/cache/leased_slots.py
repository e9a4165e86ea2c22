"""From what a lease locates to what a mover moves: the slots that this process reaches, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..keys import Chunk
from ..paged.columns import SlotColumns, headers_of
from ..segment.mapping import PinnedSlab, SegmentMap
from ..segment.slots import ALIGNMENT, HEADER_BYTES, Locations
from ..spec import KVCacheSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOCATION = np.dtype(
    [("segment", "<u4"), ("slab", "<u2"), ("tokens", "<u2"), ("slot", "<u4"), ("units", "<u4"), ("generation", "<u8")]
)
"""A packed location, as `SlotLocation.pack` makes it."""


class Naming(NamedTuple):
    """What the headers of all chunks of one engine have in common."""

    spec: KVCacheSpec
    namespace: bytes
    strides: tuple[int, int]
    """Lengths of slots that its chunks may lie in, bytes: multiples of `ALIGNMENT`."""

    @property
    def units(self) -> tuple[int, int]:
        return self.strides[0] // ALIGNMENT, self.strides[1] // ALIGNMENT


class ReachedSlots(NamedTuple):
    """The leading ones of leased slots that lie in mapped memory."""

    columns: SlotColumns
    """Without trailers."""
    pinned: list[PinnedSlab]
    """For as long as the slots are used; some may hold none of them."""
    units: NDArray[np.uint32]
    """Length of each slot, in units of `ALIGNMENT`."""


def reach(segments: SegmentMap, naming: Naming, locations: Locations, chunks: Sequence[Chunk]) -> ReachedSlots:
    """Pin the slots of `locations`, in which `chunks` are said to lie, one for one, up to the first one that this process does
    not reach or that cannot hold its chunk. Each slab is looked up and pinned once; may block as `SegmentMap.pin` does."""
    found: NDArray[Any] = np.frombuffer(locations.packed, LOCATION)
    count, pinned = len(found), list[PinnedSlab]()
    names = found["segment"].astype(np.uint64) << np.uint64(48) | found["slab"].astype(np.uint64) << np.uint64(32)
    names |= found["units"]
    runs = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist()]  # of locations in one slab
    known: dict[int, int] = {}
    numbers: list[int] = []
    for at, name in zip(runs, names[runs].tolist(), strict=True):
        if name not in known:
            slab = segments.pin_slab(locations[at])
            if slab is None:
                count = at
                break
            known[name] = len(pinned)
            pinned.append(slab)
        numbers.append(known[name])
    digests, positions, tokens, start, skip = zip(*chunks, strict=True)
    which = np.repeat(np.array(numbers, np.int64), np.diff([*runs[: len(numbers)], count]))
    shape = np.array([each.geometry for each in pinned], np.int64).reshape(-1, 4)[which]
    wanted, slot, units = np.array(tokens[:count], np.int64), found["slot"][:count].astype(np.int64), found["units"][:count]
    first, other = naming.units
    good = (slot < shape[:, 1]) & (found["tokens"][:count] == wanted) & ((units == first) | (units == other))
    if not good.all():
        count = int(np.argmin(good))
    kept = slice(0, count)
    headers = headers_of(
        count,
        shard=naming.spec.rank,
        num_shards=naming.spec.world_size,
        generation=found["generation"][kept],
        digests=digests[kept],
        namespace=naming.namespace,
        token_bytes=naming.spec.token_bytes,
        tokens=wanted[kept],
        positions=positions[kept],
    )
    columns = SlotColumns(
        [each.slab for each in pinned],
        which[kept],
        HEADER_BYTES * (1 + slot[kept]),
        (shape[:, 2] + slot * shape[:, 3])[kept],
        headers,
        np.array(start[kept], np.int64),
        np.array(skip[kept], np.int64),
        np.zeros(count, np.int64),
    )
    return ReachedSlots(columns, pinned, units[kept])
