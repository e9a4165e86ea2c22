"""Triton kernels: the checksums of `checksum.py` over slots, launched between moving the bytes and publishing the headers.

They use the table of `kernels.py`. Its parameter `PARAM_TRAILERS` is the address of further words, which follow it in memory:

    [0]                     blocks of the longest payload
    [1 + 2 * i], [2 + 2 * i]  of chunk i: address of its trailer, 0 for none; its checksum, which begins at 0

The same kernels run on CPU tensors under TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from . import checksum
from .kernels import CHUNK, CHUNK_LIVE, CHUNK_PAYLOAD, CHUNK_WANTED, GENERATION, PARAM_TRAILERS, PARAMS, PAYLOAD_BYTES

DAMAGED = tl.constexpr(2)
"""What `compare` makes of CHUNK_LIVE when the payload is not what its trailer says."""
_BLOCK = tl.constexpr(checksum.BLOCK)
_STEP = tl.constexpr(checksum.STEP)
_FIRST = tl.constexpr(checksum.FIRST)
_SECOND = tl.constexpr(checksum.SECOND)


@triton.jit
def _mixed(value):
    value = (value ^ (value >> 33)) * _FIRST
    value = (value ^ (value >> 33)) * _SECOND
    return value ^ (value >> 33)


@triton.jit(do_not_specialize=["first", "count"])
def add_up(table, first, count):
    """Add the blocks of the payloads of the chunks `[first, first + count)` to their checksums. Any number of programs shares
    the blocks."""
    area = tl.load(table + PARAM_TRAILERS).to(tl.pointer_type(tl.int64))
    blocks = tl.load(area).to(tl.int32)
    total = count * blocks
    word = tl.arange(0, _BLOCK)
    key = _mixed((word + 1).to(tl.uint64) * _STEP)
    low_key, high_key = key & 0xFFFFFFFF, key >> 32
    item = tl.program_id(0)
    while item < total:
        chunk = first + item // blocks
        number = item % blocks
        row = table + PARAMS + chunk * CHUNK
        nbytes = tl.load(row + CHUNK_WANTED + PAYLOAD_BYTES)
        begin = number.to(tl.int64) * (8 * _BLOCK)
        if (begin < nbytes) & (tl.load(row + CHUNK_LIVE) != 0) & (tl.load(area + 1 + 2 * chunk) != 0):
            left = nbytes - begin - 8 * word.to(tl.int64)
            body = (tl.load(row + CHUNK_PAYLOAD) + begin).to(tl.pointer_type(tl.uint64))
            value = tl.load(body + word, mask=left > 0, other=0)
            bits = (8 * tl.minimum(tl.maximum(left, 0), 7)).to(tl.uint64)
            one = bits * 0 + 1
            value = tl.where(left >= 8, value, value & ((one << bits) - 1))  # the payload may end within a word
            low, high = (value + low_key) & 0xFFFFFFFF, ((value >> 32) + high_key) & 0xFFFFFFFF
            place = (number + 1).to(tl.uint64) * _STEP
            tl.atomic_add(area + 2 + 2 * chunk, _mixed(tl.sum(low * high) ^ place).to(tl.int64))
        item += tl.num_programs(0)


@triton.jit
def compare(table, STORE: tl.constexpr):
    """After `add_up`, one program per chunk. Store: write the trailer. Load: mark the chunk as damaged when its trailer counts
    and says something else."""
    chunk = tl.program_id(0)
    row = table + PARAMS + chunk * CHUNK
    area = tl.load(table + PARAM_TRAILERS).to(tl.pointer_type(tl.int64))
    address = tl.load(area + 1 + 2 * chunk)
    if (address != 0) & (tl.load(row + CHUNK_LIVE) != 0):
        found = tl.load(area + 2 + 2 * chunk)
        generation = tl.load(row + CHUNK_WANTED + GENERATION)
        trailer = address.to(tl.pointer_type(tl.int64))
        if STORE:
            tl.store(trailer, found)
            tl.store(trailer + 1, generation)
        elif (tl.load(trailer + 1, volatile=True) == generation) & (tl.load(trailer, volatile=True) != found):
            tl.store(row + CHUNK_LIVE, DAMAGED)
