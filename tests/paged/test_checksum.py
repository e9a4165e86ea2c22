"""The checksum of payloads: what engines of one pool must compute alike, on CPU and GPU."""

from __future__ import annotations

import random

import pytest

from vcache.paged.checksum import BLOCK, checksum, contradicts, slot_bytes_for, trailer, trailer_offset
from vcache.segment.slots import ALIGNMENT, slab_geometry

WORD, HALF = 2**64 - 1, 2**32 - 1


def mixed(value: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ (value >> 33)) * factor & WORD
    return value ^ (value >> 33)


def plain(payload: bytes) -> int:
    """The same, word by word."""
    total, step = 0, 0x9E3779B97F4A7C15
    for number, start in enumerate(range(0, len(payload), 8 * BLOCK)):
        block, found = payload[start : start + 8 * BLOCK].ljust(8 * BLOCK, b"\0"), 0
        for place in range(BLOCK):
            word, key = int.from_bytes(block[8 * place : 8 * place + 8], "little"), mixed((place + 1) * step & WORD)
            found += ((word + key) & HALF) * (((word >> 32) + (key >> 32)) & HALF)
        total += mixed((found ^ (number + 1) * step) & WORD)
    return total & WORD


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 1000, 8 * BLOCK - 1, 8 * BLOCK, 8 * BLOCK + 1, 8 * BLOCK * 34 + 5])
def test_it_equals_the_plain_computation(nbytes: int) -> None:
    payload = random.Random(nbytes).randbytes(nbytes)
    assert checksum(memoryview(payload)) == plain(payload)


def test_a_vector() -> None:
    """Engines of other versions wrote it: it must not change while the slot header's magic number does not."""
    assert checksum(memoryview(bytes(range(256)) * 33)) == 0x1FE12E27746AE5D8


def test_any_changed_bit_and_any_exchanged_words_show() -> None:
    payload = bytearray(random.Random(1).randbytes(3 * 8 * BLOCK + 12))
    good = checksum(memoryview(payload))
    chance = random.Random(2)
    for _ in range(200):
        place, bit = chance.randrange(len(payload)), chance.randrange(8)
        payload[place] ^= 1 << bit
        assert checksum(memoryview(payload)) != good
        payload[place] ^= 1 << bit
        one, two = (8 * chance.randrange(3 * BLOCK) for _ in range(2))
        if one != two:
            changed = bytearray(payload)
            changed[one : one + 8], changed[two : two + 8] = payload[two : two + 8], payload[one : one + 8]
            assert checksum(memoryview(changed)) != good
    swapped = payload[8 * BLOCK : 16 * BLOCK] + payload[: 8 * BLOCK] + payload[16 * BLOCK :]
    assert checksum(memoryview(swapped)) != good, "whole blocks"
    assert checksum(memoryview(payload)) == good


def test_a_trailer_counts_for_its_generation_only() -> None:
    payload, other = memoryview(b"payload" * 99), memoryview(b"Payload" * 99)
    sealed = trailer(payload, 6)
    assert not contradicts(sealed, payload, 6)
    assert contradicts(sealed, other, 6)
    assert not contradicts(sealed, other, 8)
    assert not contradicts(bytes(16), other, 8)


@pytest.mark.parametrize("payload_bytes", [1, 255, 256, 257, 4096])
def test_a_trailer_lies_behind_the_payload_in_its_slot(payload_bytes: int) -> None:
    assert slot_bytes_for(payload_bytes, "off") == payload_bytes
    nbytes = slot_bytes_for(payload_bytes, "always")
    assert nbytes == slot_bytes_for(payload_bytes, "sample")
    geometry = slab_geometry(2**20, nbytes)
    end = trailer_offset(geometry.payload_offset(0), nbytes)
    assert geometry.payload_offset(0) + payload_bytes <= end
    assert end + 16 == geometry.payload_offset(0) + nbytes == geometry.payload_offset(1)
    assert nbytes % ALIGNMENT == 0
