"""Packed locations: what is read of them in place is what unpacking them says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vcache.segment.slots import (
    ALIGNMENT,
    LOCATION_BYTES,
    SlotLocation,
    generation_of,
    segment_id,
    segment_ids,
    slab_id,
    slab_ids,
    stride_of,
)

locations = st.builds(
    SlotLocation,
    segment=st.integers(0, 2**32 - 1),
    slab=st.integers(0, 2**16 - 1),
    tokens=st.integers(0, 2**16 - 1),
    slot=st.integers(0, 2**32 - 1),
    slot_bytes=st.integers(1, 2**32 - 1).map(lambda units: units * ALIGNMENT),
    generation=st.integers(0, 2**64 - 1),
)


@given(st.lists(locations, min_size=1, max_size=4))
def test_packed_locations_are_read_in_place(places: list[SlotLocation]) -> None:
    packed = b"".join(place.pack() for place in places)
    assert len(packed) == LOCATION_BYTES * len(places)
    assert SlotLocation.unpack_many(packed) == places
    assert [SlotLocation.unpack(place.pack()) for place in places] == places
    assert segment_ids(packed) == [segment_id(place.segment) for place in places]
    assert slab_ids(packed) == [slab_id(place.segment, place.slab) for place in places]
    assert (stride_of(packed), generation_of(packed)) == (places[0].slot_bytes, places[0].generation)


@given(locations, st.integers(0, ALIGNMENT - 1))
def test_slot_sizes_come_back_rounded_up(place: SlotLocation, less: int) -> None:
    odd = place._replace(slot_bytes=place.slot_bytes - less)
    assert SlotLocation.unpack(odd.pack()) == place
