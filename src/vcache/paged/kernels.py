"""Triton kernels: check and write slot headers, move rows. One launch of each serves a whole request, or, of those that touch
payloads, the part of it that lies in a ring.

Everything that changes from call to call is in one table of 64-bit words, so that a launch has the same few arguments, and
the compiled kernel fits, whatever the request:

    [0, PARAMS)                    see the `PARAM_*` offsets
    [PARAMS + i * CHUNK, + CHUNK)  chunk i, see the `CHUNK_*` offsets

What `announce` and `publish` do to headers is `segment/slot_protocol.py` once more; change both, or none.

The same kernels run on CPU tensors under TRITON_INTERPRET=1, with SYSTEM=False (no fences there).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ..segment.slots import SLAB_MAGIC, SLOT_MAGIC

PARAMS = tl.constexpr(8)
PARAM_HOMES = tl.constexpr(0)
"""Address of a word per chunk: where the payload is at home that `move` writes elsewhere (`keep`); 0 when there is none."""
PARAM_TILES = tl.constexpr(1)
"""Tiles of the longest chunk, per region."""
PARAM_MAPPING = tl.constexpr(2)
"""Address of the slot mapping."""
PARAM_SLOTS = tl.constexpr(3)
"""Slots of the paged cache."""
PARAM_RESULTS = tl.constexpr(4)
"""Address of two 32-bit results per chunk: an `Outcome`, and tokens with a slot out of range."""
PARAM_TRAILERS = tl.constexpr(5)
"""Address of what `checksum_kernels` need; 0 when they are not launched."""
PARAM_WRITER = tl.constexpr(6)
"""Two words: the writer's client id."""

CHUNK = tl.constexpr(24)
CHUNK_PAYLOAD = tl.constexpr(0)
"""Address of the bytes that `move` reads or writes: in the slot, or in a ring that copy engines serve (`host_ring.py`)."""
CHUNK_HEADER = tl.constexpr(1)
"""Address of the slot header."""
CHUNK_SLAB = tl.constexpr(2)
"""Address of the slab header. 0: a store does not write it, a load's memory has none."""
CHUNK_START = tl.constexpr(3)
CHUNK_TOKENS = tl.constexpr(4)
CHUNK_SKIP = tl.constexpr(5)
CHUNK_LIVE = tl.constexpr(6)
"""Set by `announce`: whether this chunk's bytes are to be moved."""
CHUNK_ERRORS = tl.constexpr(7)
"""Counted by `move`: tokens with a slot out of range."""
CHUNK_WANTED = tl.constexpr(8)
"""The final slot header, 8 words."""
CHUNK_FORMAT = tl.constexpr(16)
"""The slab header, 8 words."""

REGION = tl.constexpr(5)
"""Words of the region table per region: address in bytes; strides of block, token, piece and half in units."""

GENERATION = tl.constexpr(1)
"""Index of the word that holds the generation, in slot headers and slab headers."""
PAYLOAD_BYTES = tl.constexpr(6)
"""Likewise, in slot headers: the bytes of the payload."""
_SLAB_MAGIC = tl.constexpr(SLAB_MAGIC)
_SLOT_MAGIC = tl.constexpr(SLOT_MAGIC)


@triton.jit
def _pick(words, index: tl.constexpr):
    """One word of a header as a scalar."""
    return tl.sum(tl.where(tl.arange(0, 8) == index, words, 0))


@triton.jit
def _fence(SYSTEM: tl.constexpr):
    """Order all earlier accesses of this program before all later ones, for every observer of the memory: other GPUs and
    the host as well."""
    if SYSTEM:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.b32 $0, $1;", "=r,r", [tl.arange(0, 8)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _write_generation(header, words, allowed, SYSTEM: tl.constexpr):
    """Write the generation of a slot header, after all that was written before, and before all that follows: the first part
    of `slot_protocol.ANNOUNCED`, the last of `PUBLISHED`."""
    _fence(SYSTEM)
    if SYSTEM:
        # A plain store is no strong write, so observers could not synchronise with it, whatever fence stands before it.
        if allowed:
            one = tl.arange(0, 1).to(tl.int64)  # all threads store the same word
            address, value = header.to(tl.int64) + 8 * GENERATION + one, _pick(words, GENERATION) + one
            tl.inline_asm_elementwise(
                "st.release.sys.global.b64 [$1], $2; mov.b32 $0, 0;",
                "=r,l,l",
                [address, value],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    else:
        tl.store(header + GENERATION, _pick(words, GENERATION), mask=allowed)
    _fence(SYSTEM)


@triton.jit
def _write_rest(header, words, allowed):
    """Write all of a slot header but its generation: the other parts, in any order."""
    word = tl.arange(0, 8)
    tl.store(header + word, words, mask=allowed & (word != GENERATION))


@triton.jit
def _signed(table, wanted):
    """Make the odd header that announces the write of `wanted`: `SlotHeader.writing`."""
    word = tl.arange(0, 8)
    writer = tl.load(table + PARAM_WRITER + word - 4, mask=(word == 4) | (word == 5), other=0)
    odd = tl.where(word == GENERATION, wanted - 1, wanted)
    return tl.where((word == 4) | (word == 5), writer, odd)


@triton.jit
def announce(table, STORE: tl.constexpr, SYSTEM: tl.constexpr):
    """Look at a slot before the move, one program per chunk. Load: compare the header (`slot_protocol.carries`). Store: write
    slab header and odd header, unless a newer generation is there (`slot_protocol.announce`). Sets CHUNK_LIVE."""
    row = table + PARAMS + tl.program_id(0) * CHUNK
    word = tl.arange(0, 8)
    wanted = tl.load(row + CHUNK_WANTED + word)
    header = tl.load(row + CHUNK_HEADER).to(tl.pointer_type(tl.int64))
    seen = tl.load(header + word, volatile=True)
    if STORE:
        odd = _signed(table, wanted)
        newer = ((_pick(seen, 0) & 0xFFFFFFFF) == _SLOT_MAGIC) & (_pick(seen, GENERATION) > _pick(odd, GENERATION))
        address = tl.load(row + CHUNK_SLAB)
        slab = address.to(tl.pointer_type(tl.int64))
        shape = tl.load(row + CHUNK_FORMAT + word)
        found = tl.load(slab + word, mask=(word < 8) & (address != 0), other=0, volatile=True)
        formatted = (_pick(found, 0) == _SLAB_MAGIC) & (_pick(found, 2) != 0) & ((_pick(found, 3) & 0xFFFFFFFF) != 0)
        newer = newer | (formatted & (_pick(found, GENERATION) > _pick(shape, GENERATION)))
        live = newer == 0
        differs = tl.sum((found != shape).to(tl.int32)) != 0
        tl.store(slab + word, shape, mask=(word < 8) & (address != 0) & live & differs)
        # The odd generation first: a header that is torn here is never taken for a chunk.
        _write_generation(header, odd, live, SYSTEM)
        _write_rest(header, odd, live)
        _fence(SYSTEM)
    else:
        live = tl.sum((seen != wanted).to(tl.int32)) == 0
        _fence(SYSTEM)
    tl.store(row + CHUNK_LIVE, live.to(tl.int64))


@triton.jit
def publish(table, STORE: tl.constexpr, SYSTEM: tl.constexpr):
    """Look at a slot again after the move, one program per chunk. Load: compare the header, and the slab's format
    (`slot_protocol.still_carries`). Store: compare the odd header, write the even one (`slot_protocol.publish`). Reports
    results."""
    chunk = tl.program_id(0)
    row = table + PARAMS + chunk * CHUNK
    word = tl.arange(0, 8)
    wanted = tl.load(row + CHUNK_WANTED + word)
    header = tl.load(row + CHUNK_HEADER).to(tl.pointer_type(tl.int64))
    errors = tl.load(row + CHUNK_ERRORS)
    _fence(SYSTEM)
    seen = tl.load(header + word, volatile=True)
    good = (tl.load(row + CHUNK_LIVE) != 0) & (errors == 0)
    if STORE:
        good = good & (tl.sum((seen != _signed(table, wanted)).to(tl.int32)) == 0)
        _write_rest(header, wanted, good)
        _write_generation(header, wanted, good, SYSTEM)
    else:
        good = good & (tl.sum((seen != wanted).to(tl.int32)) == 0)
        # A header may outlive the format of its slab, and its payload not.
        address = tl.load(row + CHUNK_SLAB)
        slab = address.to(tl.pointer_type(tl.int64))
        formatted = tl.load(slab + word, mask=(word == GENERATION) & (address != 0), other=0, volatile=True)
        good = good & (_pick(formatted, GENERATION) < _pick(wanted, GENERATION))
    results = tl.load(table + PARAM_RESULTS).to(tl.pointer_type(tl.int32)) + 2 * chunk
    live = tl.load(row + CHUNK_LIVE)  # more than 1: what `compare` found
    tl.store(results, tl.where(good, live, 0).to(tl.int32))
    tl.store(results + 1, errors.to(tl.int32))


@triton.jit(do_not_specialize=["first", "count"])
def keep(table, first, count):
    """After `move` of a store that goes through a ring: give the place of each chunk that `announce` refused the bytes that lie
    in its slot, so that the copy which follows, and cannot be called off, changes nothing there. Serves the chunks
    `[first, first + count)`; any number of programs shares them."""
    piece: tl.constexpr = 4096
    homes = tl.load(table + PARAM_HOMES).to(tl.pointer_type(tl.int64))
    program = tl.program_id(0)
    item = first
    while item < first + count:
        row = table + PARAMS + item * CHUNK
        if tl.load(row + CHUNK_LIVE) == 0:
            nbytes = tl.load(row + CHUNK_WANTED + PAYLOAD_BYTES)
            home = tl.load(homes + item).to(tl.pointer_type(tl.int8))
            place = tl.load(row + CHUNK_PAYLOAD).to(tl.pointer_type(tl.int8))
            begin = program.to(tl.int64) * piece
            while begin < nbytes:
                byte = begin + tl.arange(0, piece)
                tl.store(place + byte, tl.load(home + byte, mask=byte < nbytes, other=0), mask=byte < nbytes)
                begin += tl.num_programs(0) * piece
        item += 1


@triton.jit(do_not_specialize=["first", "count"])
def move(
    table,
    regions,
    first,
    count,
    REGIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    PIECE: tl.constexpr,
    HALVES: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    NARROW: tl.constexpr,
    STORE: tl.constexpr,
):
    """Payload `[region][token][row]` <-> paged rows, of the chunks `[first, first + count)`.

    The payload of a region is cut into units of VECTOR words of the Triton integer type WORD, which one thread moves at once;
    all addresses and strides are aligned by a unit. ROW, PIECE: units of a row, of one piece of it. BLOCK: tokens of a block.
    UNITS: units of a tile; any number of programs shares the tiles. NARROW: the slot mapping is 32-bit.
    """
    align: tl.constexpr = VECTOR * WORD.primitive_bitwidth // 8
    tiles = tl.load(table + PARAM_TILES).to(tl.int32)
    total = count * tiles * REGIONS
    slots = tl.load(table + PARAM_SLOTS)
    mapping = tl.load(table + PARAM_MAPPING)
    mapping = mapping.to(tl.pointer_type(tl.int32 if NARROW else tl.int64))
    word = tl.arange(0, VECTOR)
    item = tl.program_id(0)
    while item < total:  # not a range: the interpreter cannot count to a tensor with recent versions of NumPy
        tile = item % tiles
        region = (item // tiles) % REGIONS
        row = table + PARAMS + (first + item // (tiles * REGIONS)) * CHUNK
        skip = tl.load(row + CHUNK_SKIP)
        tokens = tl.load(row + CHUNK_TOKENS)
        unit = tile * UNITS + tl.arange(0, UNITS)
        token = unit // ROW
        part = unit % ROW
        alive = (token < tokens - skip) & (tl.load(row + CHUNK_LIVE) != 0)
        slot = tl.load(mapping + tl.load(row + CHUNK_START) + token, mask=alive, other=0).to(tl.int64)
        inside = alive & (slot >= 0) & (slot < slots)
        if region == 0:
            outside = tl.sum((alive & (inside == 0) & (part == 0)).to(tl.int64))
            if outside > 0:
                tl.atomic_add(row + CHUNK_ERRORS, outside)
        slot = tl.where(inside, slot, 0)

        where = regions + region * REGION
        paged = (slot // BLOCK) * tl.load(where + 1) + (slot % BLOCK) * tl.load(where + 2)
        if PIECE == ROW:
            paged += part
        else:
            piece = part // PIECE
            paged += (piece // HALVES) * tl.load(where + 3) + (piece % HALVES) * tl.load(where + 4) + part % PIECE
        page = tl.multiple_of(tl.load(where).to(tl.pointer_type(WORD)), align)
        page = page + (paged * VECTOR)[:, None] + word[None, :]
        body = tl.multiple_of(tl.load(row + CHUNK_PAYLOAD).to(tl.pointer_type(WORD)), align)
        body = body + (((region * tokens + skip) * ROW + unit) * VECTOR)[:, None] + word[None, :]
        mask = tl.broadcast_to(inside[:, None], (UNITS, VECTOR))
        if STORE:
            tl.store(body, tl.load(page, mask=mask), mask=mask)
        else:
            tl.store(page, tl.load(body, mask=mask), mask=mask)
        item += tl.num_programs(0)
