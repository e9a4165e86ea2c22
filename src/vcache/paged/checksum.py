"""Checksums of payloads in slots: 64 bits that the CPU's mover and CUDA's compute alike, and where a slot keeps its own.

A payload is cut into blocks of `BLOCK` 64-bit words, little-endian, filled up with zeros. A block's sum is that of the products
of the two halves of each word, each half plus a key of its place (the hash NH, of which one block in 2^32 that differs has the
same sum). The checksum is the sum of all blocks' sums, each mixed with the block's number. All of it modulo 2^64: order matters
nowhere, so that any number of programs can share the work.

A slot with a checksum is `ALIGNMENT` longer than its payload needs; its last 16 bytes, the trailer, hold checksum and
generation. The trailer counts only while its generation is that of the slot's header: who writes such a slot and knows
nothing of checksums (a copy from tier to tier) leaves one behind that does not count.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..segment.slots import ALIGNMENT, align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

ChecksumMode = Literal["off", "sample", "always"]

BLOCK = 1024
"""Words of a block."""
_ROWS = 64
"""Blocks in one step: 512 KiB, which stay in a core's cache between two operations on them."""
_TRAILER = struct.Struct("<QQ")
TRAILER_BYTES = _TRAILER.size
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
"""Odd constants of the mixing: the golden ratio, and the two of MurmurHash3's finaliser."""


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's finaliser: every bit of a word changes half of the bits of the result. Pure."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(FIRST)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(SECOND)
    return values ^ (values >> np.uint64(33))


_KEYS = mixed(np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(STEP)).view(np.uint32)
_KEYS.flags.writeable = False


def checksum(payload: memoryview) -> int:
    """The checksum of a payload in host memory. Pure; reads all of it, at 5 to 9 GB/s."""
    size = 8 * BLOCK
    whole = len(payload) // size
    total = _sums(np.frombuffer(payload[: whole * size], np.uint32).reshape(whole, 2 * BLOCK), 0)
    if rest := bytes(payload[whole * size :]):
        total += _sums(np.frombuffer(rest.ljust(size, b"\0"), np.uint32).reshape(1, 2 * BLOCK), whole)
    return total % 2**64


def _sums(blocks: NDArray[np.uint32], first: int) -> int:
    """Of whole blocks, the number of whose first one is `first`."""
    total, rows = 0, min(_ROWS, len(blocks))
    halves, upper = np.empty((rows, 2 * BLOCK), np.uint32), np.empty((rows, BLOCK), np.uint64)  # once: new pages cost more
    for start in range(0, len(blocks), _ROWS):
        part = blocks[start : start + _ROWS]
        words: Any = np.add(part, _KEYS, out=halves[: len(part)]).view(np.uint64)
        high = np.right_shift(words, np.uint64(32), out=upper[: len(part)])
        np.bitwise_and(words, np.uint64(0xFFFFFFFF), out=words)
        sums = np.einsum("ij,ij->i", words, high)
        numbers = np.arange(first + start + 1, first + start + 1 + len(part), dtype=np.uint64) * np.uint64(STEP)
        total += int(mixed(sums ^ numbers).sum(dtype=np.uint64))
    return total


def slot_bytes_for(payload_bytes: int, mode: ChecksumMode) -> int:
    """Length of the slots for such payloads, in bytes. Pure."""
    return payload_bytes if mode == "off" else align_up(payload_bytes, ALIGNMENT) + ALIGNMENT


def trailer_offset(payload_offset: int, slot_bytes: int) -> int:
    """Where the trailer of a slot that has one lies, in its slab. Pure."""
    return payload_offset + slot_bytes - TRAILER_BYTES


def trailer(payload: memoryview, generation: int) -> bytes:
    """The trailer of a payload. Pure."""
    return _TRAILER.pack(checksum(payload), generation)


def contradicts(found: bytes | memoryview, payload: memoryview, generation: int) -> bool:
    """Whether the trailer `found` counts for `generation` and says that the payload was another one. Pure."""
    expected, counts = _TRAILER.unpack(found)
    return bool(counts == generation and expected != checksum(payload))
