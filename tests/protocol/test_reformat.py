"""A slot that is read while its slab is formatted anew, for slots of another size."""

from __future__ import annotations

import torch
from live_world import SPEC, TOKENS
from support.paged import Paged

from vcache.paged.cpu_mover import CpuMover
from vcache.paged.layout import PagedCache
from vcache.paged.mover import SlotTransfer
from vcache.segment.mapping import MappedSlab, PinnedSlot
from vcache.segment.slots import SlabHeader, SlotHeader, slab_bytes_for, slab_geometry


def test_bytes_of_a_slab_formatted_since_are_not_taken_for_the_chunk():
    """A reader whose lease has lapsed (it was stopped, or its session ended) still has the place of a chunk. Its slab was given
    to chunks of another size. Their headers are fewer, so the old one of the third slot stands, untouched, between the new
    headers and the new payloads; its payload is overwritten. The header equals what the reader expects before and after: it
    took the other chunk's bytes. A slot header counts only above its slab's format generation, also for readers."""
    mover, tokens = CpuMover(), torch.arange(2 * TOKENS)
    paged = Paged.zeros(SPEC, "2BNHD", 3, TOKENS)
    cache = PagedCache.bind(paged.tensors, SPEC)
    nbytes = slab_bytes_for(SPEC.payload_bytes(TOKENS), 4)
    slab = MappedSlab("host", "host", nbytes, 4096, buffer=memoryview(bytearray(nbytes)))

    def transfer(slot: int, count: int, generation: int, format_generation: int) -> SlotTransfer:
        payload = SPEC.payload_bytes(count)
        geometry = slab_geometry(nbytes, payload)
        place = PinnedSlot(slab, geometry.header_offset(slot), geometry.payload_offset(slot))
        header = SlotHeader(0, 1, generation, b"%016d" % generation, b"n" * 16, payload, count, 0)
        return SlotTransfer(place, header, 0, 0, SlabHeader(format_generation, payload, geometry.slots).pack())

    paged.tensors[0].fill_(1)
    small = transfer(2, TOKENS, 4, 2)
    assert mover.store(cache, tokens, [small], b"w" * 16).verified() == [True]
    assert mover.load(cache, tokens, [small]).verified() == [True]
    paged.tensors[0].fill_(2)
    large = [transfer(slot, 2 * TOKENS, generation, 6) for slot, generation in ((0, 8), (1, 10))]
    assert mover.store(cache, tokens, large[:1], b"w" * 16).verified() == [True]
    assert mover.store(cache, tokens, large[1:2], b"w" * 16).verified() == [True]
    assert mover.load(cache, tokens, [small]).verified() == [False]
