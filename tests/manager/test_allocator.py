"""Segments, slabs and slots: placement order, formatting, accounting."""

from __future__ import annotations

import pytest

from vcache.errors import IntegrityError
from vcache.manager.directory.allocator import Allocator
from vcache.manager.directory.records import Record
from vcache.manager.directory.slabs import FREE, PROCESSING, USED, Segment, Slab, Write
from vcache.segment.slots import SegmentInfo, slab_bytes_for

SLAB = slab_bytes_for(256, 4)


def make_segment(allocator: Allocator, kind: str, device: str, slabs: int = 1) -> Segment:
    number = len(allocator.segments)
    info = SegmentInfo(uuid=bytes([number]) * 16, kind=kind, host="h", device=device, broker="", owner=b"o" * 16, slabs=())
    segment = allocator.add_segment(info)
    for index in range(slabs):
        allocator.attach(segment, Slab(index, SLAB, allocator.floor))
    return segment


def hold_one(allocator: Allocator, segments: list[Segment], stride: int) -> Write | None:
    slab = allocator.find_free(segments, stride)
    if slab is None:
        return None
    slot = allocator.take(slab)
    write = Write(slab, slot, b"k", 0, slab.next_generation(), writer=b"w")
    allocator.hold(slab, slot, write)
    allocator.check_integrity()
    return write


@pytest.fixture
def allocator() -> Allocator:
    return Allocator(1000)


def test_local_prefers_own_gpu_then_other_gpus_then_host(allocator):
    host = make_segment(allocator, "host", "host")
    far = make_segment(allocator, "cuda", "GPU-b")
    near = make_segment(allocator, "cuda", "GPU-a")
    assert allocator.candidates("local", "GPU-a", []) == [near, far, host]
    assert allocator.candidates("local", "GPU-a", [near.number]) == [far, host]
    assert allocator.candidates("local", "host", []) == [far, near, host]


def test_spread_prefers_the_least_loaded_gpu_and_host_last(allocator):
    host = make_segment(allocator, "host", "host")
    first = make_segment(allocator, "cuda", "GPU-a")
    second = make_segment(allocator, "cuda", "GPU-b")
    assert allocator.candidates("spread", "GPU-b", []) == [first, second, host]
    hold_one(allocator, [first], 256)
    assert allocator.candidates("spread", "GPU-a", []) == [second, first, host]


def test_slots_are_handed_out_once_until_none_is_left(allocator):
    segment = make_segment(allocator, "host", "host", slabs=2)
    writes = [hold_one(allocator, [segment], 256) for _ in range(8)]
    assert len({(write.slab.index, write.slot) for write in writes}) == 8
    assert hold_one(allocator, [segment], 256) is None
    allocator.release(writes[3].slab, writes[3].slot)
    again = hold_one(allocator, [segment], 256)
    assert (again.slab, again.slot) == (writes[3].slab, writes[3].slot)
    assert again.generation > max(write.generation for write in writes if write.slab is again.slab)


def test_a_slab_holds_one_slot_size_and_takes_another_when_empty(allocator):
    segment = make_segment(allocator, "host", "host")
    small = hold_one(allocator, [segment], 256)
    assert hold_one(allocator, [segment], 512) is None
    first_format = small.slab.format_generation
    assert first_format > 1000
    allocator.release(small.slab, small.slot)
    assert allocator.totals(segment)[2] == 1
    large = hold_one(allocator, [segment], 512)
    assert large.slab is small.slab
    assert large.slab.geometry.stride == 512
    assert large.generation - 1 > large.slab.format_generation > small.generation > first_format


def test_an_empty_slab_is_not_formatted_again_for_the_same_size(allocator):
    segment = make_segment(allocator, "host", "host")
    write = hold_one(allocator, [segment], 256)
    before = write.slab.format_generation
    allocator.release(write.slab, write.slot)
    assert hold_one(allocator, [segment], 256).slab.format_generation == before


def test_half_full_slabs_are_filled_before_empty_ones(allocator):
    segment = make_segment(allocator, "host", "host", slabs=2)
    writes = [hold_one(allocator, [segment], 256) for _ in range(5)]
    for write in writes[:4]:
        allocator.release(write.slab, write.slot)
    assert hold_one(allocator, [segment], 256).slab is writes[4].slab


def test_slots_larger_than_a_slab_have_no_place(allocator):
    assert hold_one(allocator, [make_segment(allocator, "host", "host")], 4096) is None


def test_tiny_slots_do_not_get_a_huge_table(allocator):
    segment = make_segment(allocator, "host", "host", slabs=0)
    allocator.attach(segment, Slab(0, 2**40, allocator.floor))
    assert hold_one(allocator, [segment], 256) is None


def test_detached_slab_leaves_nothing_behind_but_its_generations(allocator):
    segment = make_segment(allocator, "host", "host", slabs=2)
    write = hold_one(allocator, [segment], 256)
    allocator.detach(write.slab)
    allocator.check_integrity()
    assert (segment.busy, segment.nbytes) == (0, SLAB)
    assert allocator.floor >= write.generation
    allocator.release(write.slab, write.slot)
    assert write.slab.counts[FREE] == 4


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda segment, slab: slab.free.append(0), "I5"),
        (lambda segment, slab: slab.counts.__setitem__(USED, 3), "I5"),
        (lambda segment, slab: slab.owners.__setitem__(slab.free[0], Record(b"x", None, 0)), "I5"),
        (lambda segment, slab: segment.open.clear(), "I5"),
        (lambda segment, slab: segment.empty.__setitem__(0, slab), "I5"),
        (lambda segment, slab: setattr(segment, "busy", 0), "I5"),
        (lambda segment, slab: setattr(slab, "counter", slab.format_generation - 2), "I4"),
        (lambda segment, slab: setattr(slab.owners[next(i for i, o in enumerate(slab.owners) if o)], "slot", 9), "I5"),
    ],
)
def test_check_integrity_names_the_broken_rule(allocator, damage, rule):
    segment = make_segment(allocator, "host", "host")
    write = hold_one(allocator, [segment], 256)
    assert write.slab.counts[PROCESSING] == 1
    damage(segment, write.slab)
    with pytest.raises(IntegrityError, match=rule):
        allocator.check_integrity()
