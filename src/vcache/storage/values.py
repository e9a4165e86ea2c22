"""What lies in storage under a key: slot header, payload, and a checksum over both, verified before a byte is delivered."""

from __future__ import annotations

import struct
from zlib import crc32

from ..segment.slots import HEADER_BYTES

_TRAILER = struct.Struct("<8sI4x")
_MAGIC = b"VCVALUE2"
"""Names this format. The one before had no trailer, so its values are too short for their headers."""
TRAILER_BYTES = _TRAILER.size


def value_bytes(payload_bytes: int) -> int:
    """Length of the value with a payload of that length, in bytes. Pure."""
    return HEADER_BYTES + payload_bytes + TRAILER_BYTES


def seal(buffer: memoryview, payload_bytes: int) -> memoryview:
    """Append the checksum to the header and payload at the start of `buffer`; the part of it that is the value."""
    # CRC-32 rather than sums by NumPy, which are as fast: it is one call, so a busy process waits for its lock once.
    end = HEADER_BYTES + payload_bytes
    buffer[end : end + TRAILER_BYTES] = _TRAILER.pack(_MAGIC, crc32(buffer[:end]))
    return buffer[: end + TRAILER_BYTES]


def is_intact(value: memoryview) -> bool:
    """Whether header and payload are what was sealed. Pure; reads all of `value`."""
    end = len(value) - TRAILER_BYTES
    return end >= HEADER_BYTES and value[end:] == _TRAILER.pack(_MAGIC, crc32(value[:end]))
