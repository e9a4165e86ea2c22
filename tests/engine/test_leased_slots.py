"""Slots of a lease as columns: the same places as one by one, each slab pinned once, headers as `SlotHeader` packs them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.cache.leased_slots import LOCATION, Naming, ReachedSlots, reach
from vcache.keys import Chunk
from vcache.paged.columns import HEADER, SlotColumns
from vcache.paged.mover import SlotTransfer
from vcache.segment.backing import MappedSlab
from vcache.segment.host import HostBacking
from vcache.segment.mapping import PinnedSlot, SegmentMap
from vcache.segment.slots import (
    ALIGNMENT,
    Locations,
    SegmentInfo,
    SlabHeader,
    SlabInfo,
    SlotHeader,
    SlotLocation,
    slab_geometry,
)
from vcache.spec import KVCacheSpec

CLIENT = b"lending-client-1"
SLOT, SLABS, TOKENS = 64 * 1024, 3, 256
MIB = 2**20
SPEC = KVCacheSpec(model="m", dtype="bfloat16", num_layers=2, num_kv_heads=2, head_size=16, world_size=3, rank=1)
NAMING = Naming(SPEC, b"a namespace of 1", (SLOT, SLOT + ALIGNMENT))


def lent() -> tuple[SegmentMap, list[MappedSlab]]:
    """A map of one segment that this process lends itself. The slabs have no memory behind them: nobody moves a byte."""
    slabs = [MappedSlab("host", "host", MIB, 1 + index) for index in range(SLABS)]
    found = SegmentMap(CLIENT, "here", {})
    found.add_local(b"segment-uuid-016", lambda index: slabs[index] if index < SLABS else None, HostBacking())
    sizes = tuple(SlabInfo(index, MIB) for index in range(SLABS))
    found.update(
        SegmentInfo(
            uuid=b"segment-uuid-016", kind="host", host="here", device="host", broker="", owner=CLIENT, slabs=sizes, number=1
        )
    )
    return found, slabs


def at(slab: int, slot: int, slot_bytes: int = SLOT, segment: int = 1, tokens: int = TOKENS) -> SlotLocation:
    return SlotLocation(segment, slab, tokens, slot, slot_bytes, 2 * (1 + slot + 1000 * slab))


def chunks_for(locations: list[SlotLocation]) -> list[Chunk]:
    return [Chunk(bytes([i]) * 16, 5 + i, TOKENS, TOKENS * i, 3 if i == 0 else 0) for i in range(len(locations))]


def reached(segments: SegmentMap, locations: list[SlotLocation]) -> ReachedSlots:
    return reach(segments, NAMING, Locations.of(locations), chunks_for(locations))


SLOTS = st.integers(0, slab_geometry(MIB, SLOT).slots - 2)
GOOD = st.builds(at, st.integers(0, SLABS - 1), SLOTS, st.sampled_from([SLOT, SLOT + ALIGNMENT]))
BAD = st.one_of(
    st.builds(at, st.sampled_from([0, SLABS]), st.just(10**6), st.just(SLOT), st.sampled_from([1, 9])),
    st.builds(at, st.just(0), st.just(0), st.just(2 * SLOT)),  # of another namespace's size
    st.builds(at, st.just(0), st.just(0), tokens=st.just(TOKENS - 1)),
)


def test_the_columns_are_what_pinning_one_by_one_gives() -> None:
    """The same slots and headers, up to the first location that does not fit, and no pin is left in the end."""
    segments, slabs = lent()

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(GOOD, GOOD, GOOD, BAD), min_size=1, max_size=12))
    def check(locations: list[SlotLocation]) -> None:
        expected: list[SlotTransfer] = []
        chunks = chunks_for(locations)
        for location, chunk in zip(locations, chunks, strict=True):
            slot = segments.pin(location)
            if slot is None:
                break
            segments.unpin(slot)
            if location.tokens != chunk.tokens or location.slot_bytes not in NAMING.strides:
                break
            header = SlotHeader(
                1, 3, location.generation, chunk.digest, NAMING.namespace, TOKENS * SPEC.token_bytes, TOKENS, chunk.position
            )
            expected.append(SlotTransfer(slot, header, chunk.start, chunk.skip))
        found = reach(segments, NAMING, Locations.of(locations), chunks)
        assert list(found.columns) == expected
        assert [int(units) * ALIGNMENT for units in found.units] == [at.slot_bytes for at in locations[: len(expected)]]
        pinned = [each.slab for each in found.pinned]
        assert {id(transfer.slot.slab) for transfer in expected} <= {id(slab) for slab in pinned}
        assert all(slab.pins for slab in pinned)
        segments.unpin_all(pinned)
        assert not any(slab.pins for slab in slabs)

    check()
    segments.close()


def test_a_slab_is_pinned_once_for_all_of_its_slots_and_cannot_be_unmapped_meanwhile() -> None:
    segments, slabs = lent()
    found = reached(segments, [at(0, 0), at(0, 3), at(2, 1), at(0, 5)])
    assert [slab.pins for slab in slabs] == [1, 0, 1]
    assert len(found.columns) == 4
    idle: list[int] = []
    slabs[0].retire(lambda: idle.append(0))
    assert idle == []
    again = reached(segments, [at(2, 2), at(0, 0)])
    assert [transfer.slot.slab for transfer in again.columns] == [slabs[2]], "the retired slab ends the prefix"
    segments.unpin_all([each.slab for each in found.pinned])
    assert idle == [0]
    segments.unpin_all([slabs[2]])
    segments.close()


def test_columns_are_made_of_transfers_and_taken_apart_again() -> None:
    rng = random.Random(3)
    slabs = [MappedSlab("host", "host", MIB, 1 + index) for index in range(2)]
    transfers = [
        SlotTransfer(
            PinnedSlot(slabs[rng.randrange(2)], 64 * (1 + i), 4096 * (1 + i)),
            SlotHeader(i, 4, 2 * i + 2, rng.randbytes(16), rng.randbytes(16), 1000 + i, 10 + i, i),
            start=100 * i,
            skip=i % 3,
            slab_header=SlabHeader(8, SLOT, 4).pack() if i % 2 else b"",
            trailer=8000 + i if i % 3 else 0,
        )
        for i in range(7)
    ]
    columns = SlotColumns.of(transfers)
    assert SlotColumns.of(columns) is columns
    assert list(columns) == transfers
    assert list(columns[2:5]) == transfers[2:5]
    assert list(columns.take(np.array([6, 0]))) == [transfers[6], transfers[0]]
    assert columns[-1] == transfers[-1]
    assert columns.tokens.tolist() == [transfer.header.tokens for transfer in transfers]
    assert list(SlotColumns.of([])) == []


def test_the_columns_read_the_bytes_that_are_packed_elsewhere() -> None:
    location = SlotLocation(0xFFFFFFFE, 0xFFFD, 0xFFFC, 0xFFFFFFFB, 0xFFFFFFFA * ALIGNMENT, 2**64 - 7)
    (found,) = np.frombuffer(location.pack(), LOCATION).tolist()
    assert found == (*location[:4], location.slot_bytes // ALIGNMENT, location.generation)
    header = SlotHeader(1, 2, 2**64 - 2, b"k" * 16, b"n" * 16, 2**63, 2**32 - 1, 7)
    (row,) = np.frombuffer(header.pack(), HEADER)
    assert (row["shard"], row["num_shards"], row["generation"], row["key"].tobytes()) == header[:4]
    assert (row["namespace"].tobytes(), row["payload_bytes"], row["tokens"], row["chunk_index"]) == header[4:]


def test_packed_locations_behave_as_a_sequence() -> None:
    places = [at(0, slot) for slot in range(5)]
    packed = Locations.of(places)
    assert packed == places
    assert Locations.of(packed) is packed
    assert [packed[0], packed[-1]] == [places[0], places[-1]]
    assert packed[1:3] == places[1:3]
    assert packed[3:1] == []
    assert packed[::-2] == places[::-2]
    assert packed != places[:4]
    assert not Locations()
    with pytest.raises(IndexError):
        packed[5]
