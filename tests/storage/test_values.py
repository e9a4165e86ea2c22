"""The bytes of a value: the format that engines on other hosts rely on."""

from __future__ import annotations

import pytest

from vcache.segment.slots import HEADER_BYTES, SlotHeader
from vcache.storage.values import is_intact, seal, value_bytes

HEADER = SlotHeader(1, 2, 6, b"k" * 16, b"n" * 16, 100, 5, 3)


def sealed(payload: bytes) -> bytes:
    buffer = memoryview(bytearray(4096))
    buffer[: HEADER_BYTES + len(payload)] = HEADER.pack() + payload
    return bytes(seal(buffer, len(payload)))


def test_a_value_is_header_payload_and_checksum() -> None:
    """A vector: whoever changes it changes the format, and must name a new one."""
    value = sealed(bytes(range(100)))
    assert value[: HEADER_BYTES + 100] == HEADER.pack() + bytes(range(100))
    assert value[HEADER_BYTES + 100 :].hex() == "564356414c554532c89d6dbb00000000"
    assert len(value) == value_bytes(100)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 3000])
def test_any_changed_bit_shows(nbytes: int) -> None:
    value = sealed(bytes(nbytes))
    assert is_intact(memoryview(value))
    for position in range(0, len(value), max(1, len(value) // 97)):
        for bit in range(8):
            damaged = bytearray(value)
            damaged[position] ^= 1 << bit
            assert not is_intact(memoryview(damaged))
    assert not is_intact(memoryview(value)[:-1])
    assert not is_intact(memoryview(value)[16:])
    assert not is_intact(memoryview(b""))
