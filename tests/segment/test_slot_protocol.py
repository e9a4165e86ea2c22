"""The protocol of slots: in which order words are written and read, when a writer gives up, what a reader believes."""

from __future__ import annotations

import pytest

from vcache.segment.slot_protocol import announce, carries, complete_header, mend_format, proved, publish, still_carries
from vcache.segment.slots import HEADER_BYTES, SlabHeader, SlotHeader

AT = 2 * HEADER_BYTES
WRITER, NAMESPACE = b"w" * 16, b"n" * 16
HEADER = SlotHeader(0, 1, 42, b"k" * 16, NAMESPACE, 300, 16, 7)
ODD = HEADER.writing(WRITER)
SLAB = SlabHeader(30, 512, 3).pack()


class Memory:
    """A slab that notes what is done to it; `write` fences, as every memory does."""

    def __init__(self, slab_header: bytes = SLAB, slot_header: bytes = bytes(HEADER_BYTES)) -> None:
        self.raw = bytearray(slab_header + bytes(HEADER_BYTES) + slot_header)
        self.done: list[str] = []
        self.states: list[bytes] = []
        """The slot's header after each write."""

    def read(self, offset: int, nbytes: int) -> bytes:
        self.done.append(f"read {'slot' if offset >= AT else 'slab'}")
        return bytes(self.raw[offset : offset + nbytes])

    def write(self, offset: int, data: bytes) -> None:
        self.raw[offset : offset + len(data)] = data
        self.done.append(f"write {offset - AT if offset >= AT else 'slab'}")
        self.states.append(self.slot)

    def fence(self) -> None:
        self.done.append("fence")

    @property
    def slab(self) -> bytes:
        return bytes(self.raw[:HEADER_BYTES])

    @property
    def slot(self) -> bytes:
        return bytes(self.raw[AT:])


def test_a_write_is_odd_from_its_first_word_to_its_last_but_one() -> None:
    memory = Memory(bytes(HEADER_BYTES), HEADER._replace(generation=12, key=b"o" * 16).pack())
    odd = announce(memory, AT, HEADER, WRITER, SLAB)
    assert odd == memory.slot == ODD.pack()
    assert memory.done == ["read slab", "write slab", "read slot", "fence", "write 8", "write 0", "write 16"]
    assert memory.slab == SLAB
    memory.done.clear()
    assert publish(memory, AT, odd, HEADER)
    assert memory.done == ["fence", "read slot", "fence", "write 0", "write 16", "write 8"]
    assert memory.slot == HEADER.pack()
    _, *torn, last = memory.states
    assert all(state[8] & 1 for state in torn), "whatever is torn is odd"
    assert last == HEADER.pack()


def test_a_slab_header_that_is_there_is_not_written_again() -> None:
    memory = Memory()
    assert announce(memory, AT, HEADER, WRITER, SLAB)
    assert "write slab" not in memory.done
    memory = Memory(bytes(HEADER_BYTES))
    assert announce(memory, AT, HEADER, WRITER)
    assert memory.slab == bytes(HEADER_BYTES), "a buffer of one's own has none"


@pytest.mark.parametrize(
    ("slab", "slot", "taken"),
    [
        (SLAB, HEADER._replace(generation=41).pack(), True),
        (SLAB, HEADER._replace(generation=39, namespace=b"a" * 16).pack(), True),
        (SLAB, HEADER._replace(generation=40).pack(), True),
        (SLAB, HEADER.pack(), False),
        (SLAB, HEADER._replace(generation=43).pack(), False),
        (SLAB, b"\xff" * HEADER_BYTES, True),
        (SlabHeader(31, 512, 3).pack(), bytes(HEADER_BYTES), False),
        (SlabHeader(29, 4096, 1).pack(), bytes(HEADER_BYTES), True),
        (SlabHeader(31, 0, 3).pack(), bytes(HEADER_BYTES), True),
        (b"\xff" * HEADER_BYTES, bytes(HEADER_BYTES), True),
    ],
)
def test_older_headers_and_garbage_are_taken_over_and_newer_ones_left_alone(slab: bytes, slot: bytes, taken: bool) -> None:
    memory = Memory(slab, slot)
    assert announce(memory, AT, HEADER, WRITER, SLAB) == (ODD.pack() if taken else None)
    assert (memory.slab, memory.slot) == ((SLAB, ODD.pack()) if taken else (slab, slot))


def test_what_is_not_ours_any_more_is_not_published() -> None:
    for other in (HEADER._replace(generation=43).pack(), HEADER.writing(b"a" * 16).pack(), bytes(HEADER_BYTES)):
        memory = Memory(slot_header=other)
        assert not publish(memory, AT, ODD.pack(), HEADER)
        assert memory.slot == other


def test_a_read_looks_at_the_slot_before_and_at_slot_and_slab_after() -> None:
    memory, packed = Memory(slot_header=HEADER.pack()), HEADER.pack()
    assert carries(memory, AT, packed)
    assert memory.done == ["read slot", "fence"]
    memory.done.clear()
    assert still_carries(memory, AT, packed)
    assert memory.done == ["fence", "read slot", "read slab"]
    for field, value in HEADER._asdict().items():
        other = HEADER._replace(**{field: value + 1 if isinstance(value, int) else b"x" * 16})
        assert not carries(memory, AT, other.pack())
        assert not still_carries(memory, AT, other.pack())
    assert not memory.states


@pytest.mark.parametrize(("generation", "believed"), [(30, True), (41, True), (42, False), (50, False)])
def test_a_header_counts_above_its_slabs_format_only(generation: int, believed: bool) -> None:
    slab, packed = SlabHeader(generation, 512, 3).pack(), HEADER.pack()
    assert still_carries(Memory(slab, packed), AT, packed) == believed
    assert proved(packed, packed, slab, HEADER) == believed


def test_a_buffer_of_ones_own_has_no_format() -> None:
    memory = Memory()
    memory.raw[:HEADER_BYTES] = HEADER.pack()
    assert still_carries(memory, 0, HEADER.pack())


def test_copies_prove_a_payload_only_together() -> None:
    packed, other = HEADER.pack(), ODD.pack()
    assert proved(packed, packed, SLAB, HEADER)
    for copies in ((other, packed, SLAB), (packed, other, SLAB), (other, other, SLAB), (packed, packed, bytes(HEADER_BYTES))):
        assert not proved(*copies, HEADER)


def test_complete_headers() -> None:
    assert complete_header(HEADER.pack()) == HEADER
    assert complete_header(ODD.pack()) is None
    assert complete_header(bytes(HEADER_BYTES)) is None


def test_only_a_later_format_is_mended() -> None:
    for slab, mended in ((SlabHeader(31, 512, 3).pack(), True), (SLAB, False), (SlabHeader(29, 512, 3).pack(), False)):
        memory = Memory(slab)
        assert mend_format(memory, SLAB) == mended
        assert memory.slab == (SLAB if mended else slab)
