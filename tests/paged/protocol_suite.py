"""What every mover owes the header protocol, as plain functions: run on the CPU, interpreted, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_world import ORDERS, WRITER, Model, Slots, make_spec, make_tensors

from vcache.errors import ArgumentError
from vcache.paged.checksum import TRAILER_BYTES, trailer
from vcache.paged.layout import PagedCache
from vcache.segment.slots import SlabHeader


class Bench:
    """One cache, one slab of four slots of 8 tokens, one mover."""

    def __init__(self, mover: Any, slots: Slots | None = None, device: str = "cpu") -> None:
        self.spec = make_spec()
        self.tensors = make_tensors(self.spec, *ORDERS[0], num_blocks=8, block_size=4, device=device)
        self.cache = PagedCache.bind(self.tensors, self.spec)
        self.slots = slots or Slots.make(self.spec, 8)
        self.mover = mover
        self.mapping = torch.arange(32, device=device)

    def store(self, *transfers: Any) -> list[bool]:
        done = self.mover.store(self.cache, self.mapping, transfers, WRITER)
        assert done.wait(30)
        return list(done.verified())

    def load(self, *transfers: Any) -> list[bool]:
        done = self.mover.load(self.cache, self.mapping, transfers)
        assert done.wait(30)
        return list(done.verified())

    def sealed(self, slot: int, tokens: int, start: int) -> Any:
        """A ticket with a trailer behind its payload, where the next slot begins."""
        ticket = self.slots.transfer(slot, tokens, start)
        return ticket._replace(trailer=self.slots.pinned(slot + 1).payload_offset)

    def damaged(self, *transfers: Any) -> list[int]:
        done = self.mover.load(self.cache, self.mapping, transfers)
        assert done.wait(30)
        assert not any(done.verified()[place] for place in done.damaged())
        return list(done.damaged())

    def untouched(self, action: Any) -> bool:
        model = Model(self.spec, ORDERS[0][0], self.tensors)
        action()
        return model.equals(self.tensors)


def stale_generation_is_not_verified_and_not_loaded(bench: Bench) -> None:
    old = bench.slots.transfer(1, 8, 0)
    assert bench.store(old) == [True]
    new = bench.slots.transfer(1, 8, 8)
    assert bench.store(new) == [True]

    def load_old() -> None:
        assert bench.load(old) == [False]

    assert bench.untouched(load_old)
    assert bench.load(old, new) == [False, True]


def any_other_header_is_not_verified(bench: Bench) -> None:
    ticket = bench.slots.transfer(0, 8, 0)
    assert bench.store(ticket) == [True]
    for field, value in ticket.header._asdict().items():
        other = ticket.header._replace(**{field: value + 1 if isinstance(value, int) else b"x" * 16})
        bench.slots.write(ticket.slot.header_offset, other.pack())
        assert bench.load(ticket) == [False], field
    bench.slots.write(ticket.slot.header_offset, b"\0" * 4 + ticket.header.pack()[4:])
    assert bench.load(ticket) == [False]
    bench.slots.write(ticket.slot.header_offset, ticket.header.pack())
    assert bench.load(ticket) == [True]


def odd_header_is_not_verified(bench: Bench) -> None:
    ticket = bench.slots.transfer(0, 8, 0)
    bench.slots.write(ticket.slot.header_offset, ticket.header.writing(WRITER).pack())
    assert bench.load(ticket) == [False]


def newer_header_is_never_overwritten(bench: Bench) -> None:
    for ahead in (1, 2, 3):
        late = bench.slots.transfer(0, 8, 0)
        newer = late.header._replace(generation=late.header.generation - 1 + ahead, key=b"newer" + bytes(11)).pack()
        bench.slots.write(late.slot.header_offset, newer)
        before = bench.slots.read(0, bench.slots.slab.nbytes)
        assert bench.store(late._replace(slab_header=b"")) == [False]
        assert bench.slots.read(0, bench.slots.slab.nbytes) == before


def garbage_is_no_newer_header(bench: Bench) -> None:
    ticket = bench.slots.transfer(0, 8, 0)
    bench.slots.write(0, b"\xff" * 128)
    assert bench.store(ticket) == [True]
    assert bench.slots.read(0, 64) == ticket.slab_header


def a_slab_formatted_anew_is_left_alone(bench: Bench) -> None:
    late = bench.slots.transfer(0, 8, 0)
    bench.slots.write(0, SlabHeader(2000, 64, 9).pack())
    before = bench.slots.read(0, bench.slots.slab.nbytes)
    assert bench.store(late) == [False]
    assert bench.slots.read(0, bench.slots.slab.nbytes) == before
    bench.slots.write(0, SlabHeader(2000, 0, 9).pack())  # no slab header: no slot sizes
    assert bench.store(late) == [True]


def one_bad_slot_among_good_ones(bench: Bench) -> None:
    first, second = bench.slots.transfer(0, 8, 0), bench.slots.transfer(1, 8, 8)
    bench.slots.write(first.slot.header_offset, first.header._replace(generation=first.header.generation + 100).pack())
    assert bench.store(first, second) == [False, True]
    assert bench.load(first, second) == [False, True]


def wrong_arguments(bench: Bench) -> None:
    ticket = bench.slots.transfer(0, 8, 0)
    device = bench.mapping.device
    mappings = [
        (torch.arange(32, dtype=torch.float32), "float32"),
        (torch.arange(32)[None], "shape"),
        (torch.arange(64)[::2], "contiguous"),
        (torch.arange(7), "transfer 0"),
    ]
    for mapping, text in mappings:
        mapping = mapping.to(device) if text != "contiguous" else torch.arange(64, device=device)[::2]
        with pytest.raises(ArgumentError, match=text):
            bench.mover.store(bench.cache, mapping, [ticket], WRITER)
        with pytest.raises(ArgumentError, match=text):
            bench.mover.load(bench.cache, mapping, [ticket])
    for mapping, text in ((torch.arange(32) - 1, "slot -1"), (torch.arange(32) + 1, "slot 32")):
        with pytest.raises(ArgumentError, match=text):
            bench.mover.load(bench.cache, mapping, [ticket])
    for start, skip in ((-1, 0), (25, 0), (0, 8), (0, -1), (26, 1)):
        with pytest.raises(ArgumentError, match="transfer 0"):
            bench.mover.load(bench.cache, bench.mapping, [ticket._replace(start=start, skip=skip)])
    wrong = ticket._replace(header=ticket.header._replace(payload_bytes=ticket.header.payload_bytes - 1))
    with pytest.raises(ArgumentError, match="payload"):
        bench.mover.load(bench.cache, bench.mapping, [wrong])
    far = ticket._replace(slot=ticket.slot._replace(payload_offset=bench.slots.slab.nbytes - 8))
    with pytest.raises(ArgumentError, match="end of its slab"):
        bench.mover.load(bench.cache, bench.mapping, [far])
    assert bench.slots.header_at(0) == bytes(64)


def nothing_to_do_is_done(bench: Bench) -> None:
    assert bench.load() == []
    assert bench.store() == []


def a_sealed_slot_is_verified(bench: Bench) -> None:
    whole, part = bench.sealed(0, 8, 0), bench.sealed(2, 5, 8)
    assert bench.store(whole, part) == [True, True]
    for ticket, slot, tokens in ((whole, 0, 8), (part, 2, 5)):
        expected = trailer(memoryview(bench.slots.payload_at(slot, tokens)), ticket.header.generation)
        assert bench.slots.read(ticket.trailer, TRAILER_BYTES) == expected
    assert bench.load(whole, part, part._replace(skip=2, trailer=0)) == [True] * 3
    assert bench.damaged(whole, part) == []
    before = bench.slots.read(part.trailer, TRAILER_BYTES)
    assert bench.store(bench.slots.transfer(2, 8, 16)) == [True]
    assert bench.slots.read(part.trailer, TRAILER_BYTES) == before, "who knows of no trailer leaves it alone"


def a_changed_bit_is_damage(bench: Bench) -> None:
    ticket, other = bench.sealed(0, 7, 0), bench.sealed(2, 8, 8)
    assert bench.store(ticket, other) == [True, True]
    start, nbytes = ticket.slot.payload_offset, ticket.header.payload_bytes
    for place in (start, start + 100, start + nbytes - 1, ticket.trailer, ticket.trailer + 7):
        (byte,) = bench.slots.read(place, 1)
        bench.slots.write(place, bytes([byte ^ 0x80]))
        assert bench.damaged(other, ticket) == [1]
        assert bench.load(other, ticket._replace(skip=3)) == [True, False], "also where only a part is wanted"
        assert bench.load(ticket._replace(trailer=0)) == [True], "nobody asked"
        bench.slots.write(place, bytes([byte]))
        assert bench.damaged(other, ticket) == []


def two_sign_bits_are_damage(bench: Bench) -> None:
    """Sums of words, each times an odd number, do not see it: the highest bits cancel each other out."""
    ticket = bench.sealed(0, 8, 0)
    assert bench.store(ticket) == [True]
    for place in (7, 71, 503):
        (byte,) = bench.slots.read(ticket.slot.payload_offset + place, 1)
        bench.slots.write(ticket.slot.payload_offset + place, bytes([byte ^ 0x80]))
        assert bench.damaged(ticket) == [0]


def a_trailer_of_another_generation_does_not_count(bench: Bench) -> None:
    first = bench.sealed(0, 8, 0)
    assert bench.store(first) == [True]
    second = bench.slots.transfer(0, 8, 16)
    assert bench.store(second) == [True]
    assert bench.load(second._replace(trailer=first.trailer)) == [True]


def a_stale_slot_is_no_damage(bench: Bench) -> None:
    old = bench.sealed(0, 8, 0)
    assert bench.store(old) == [True]
    assert bench.store(bench.slots.transfer(0, 8, 16)) == [True]
    assert bench.damaged(old) == []
    assert bench.load(old) == [False]


def a_trailer_within_the_payload_is_refused(bench: Bench) -> None:
    ticket = bench.slots.transfer(0, 8, 0)
    for place in (ticket.slot.payload_offset + 8, bench.slots.slab.nbytes - 8):
        with pytest.raises(ArgumentError, match="trailer"):
            bench.mover.load(bench.cache, bench.mapping, [ticket._replace(trailer=place)])


SUITE = [
    stale_generation_is_not_verified_and_not_loaded,
    any_other_header_is_not_verified,
    odd_header_is_not_verified,
    newer_header_is_never_overwritten,
    garbage_is_no_newer_header,
    a_slab_formatted_anew_is_left_alone,
    one_bad_slot_among_good_ones,
    wrong_arguments,
    nothing_to_do_is_done,
    a_sealed_slot_is_verified,
    a_changed_bit_is_damage,
    two_sign_bits_are_damage,
    a_trailer_of_another_generation_does_not_count,
    a_stale_slot_is_no_damage,
    a_trailer_within_the_payload_is_refused,
]
