"""Many slots pinned at once: the same places as one by one, and each slab once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.segment.backing import MappedSlab
from vcache.segment.host import HostBacking
from vcache.segment.mapping import SegmentMap
from vcache.segment.slots import SegmentInfo, SlabInfo, SlotLocation, slab_geometry

CLIENT = b"lending-client-1"
SLOT, SLABS = 64 * 1024, 3
MIB = 2**20


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


def at(slab: int, slot: int, slot_bytes: int = SLOT, segment: int = 1) -> SlotLocation:
    return SlotLocation(segment, slab, 256, slot, slot_bytes, 2)


SLOTS = st.integers(0, slab_geometry(MIB, SLOT).slots - 1)
GOOD = st.builds(at, st.integers(0, SLABS - 1), SLOTS, st.sampled_from([SLOT, 2 * SLOT - 300]))
BAD = st.builds(at, st.sampled_from([0, SLABS]), st.just(10**6), st.sampled_from([0, SLOT]), st.sampled_from([1, -1]))


def test_pinning_a_prefix_is_pinning_one_by_one() -> None:
    """The same slots, up to the first that has none, and no pin is left in the end."""
    segments, slabs = lent()

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(GOOD, GOOD, GOOD, BAD), max_size=12))
    def check(locations: list[SlotLocation]) -> None:
        singles = [segments.pin(location) for location in locations]
        expected = singles[: next((i for i, slot in enumerate(singles) if slot is None), len(singles))]
        for single in singles:
            if single is not None:
                segments.unpin(single)
        pinned = segments.pin_prefix(locations)
        assert pinned.slots == expected
        assert {id(slot.slab) for slot in pinned.slots} <= {id(slab) for slab in pinned.slabs}
        assert all(slab.pins for slab in pinned.slabs)
        segments.unpin_all(pinned.slabs)
        assert not any(slab.pins for slab in slabs)

    check()
    segments.close()


def test_a_slab_is_pinned_once_for_all_of_its_slots_and_cannot_be_unmapped_meanwhile() -> None:
    segments, slabs = lent()
    pinned = segments.pin_prefix([at(0, 0), at(0, 3), at(2, 1), at(0, 5)])
    assert [slab.pins for slab in slabs] == [1, 0, 1]
    idle: list[int] = []
    slabs[0].retire(lambda: idle.append(0))
    assert idle == []
    assert segments.pin_prefix([at(2, 2), at(0, 0)]).slots == [segments.pin(at(2, 2))], "the retired slab ends the prefix"
    segments.unpin_all(pinned.slabs)
    assert idle == [0]
    segments.unpin_all([slabs[2], slabs[2]])
    segments.close()
