"""How the CUDA mover cuts rows into units and tiles: the compile-time parameters of `kernels.move` for one cache."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from .layout import PagedCache


class Tiling(NamedTuple):
    """Sizes in units of `unit_bytes`: what one thread moves at once."""

    unit_bytes: int
    row: int
    piece: int
    """`row` where a row is one piece."""
    halves: int
    tile: int
    """Units of a tile, a power of two: what one program moves at once."""

    @property
    def word_bytes(self) -> int:
        """A unit is one word, or two words of 8 bytes."""
        return min(self.unit_bytes, 8)

    def tiles(self, tokens: int) -> int:
        """Tiles of one region of a chunk of `tokens` tokens."""
        return -(-tokens * self.row // self.tile)


def alignment(cache: PagedCache) -> int:
    """Bytes, at most 16, by which all pieces of all rows are aligned, in the cache and in a payload that is itself."""
    every = [16]
    for region in cache.regions:
        every += [region.address, region.block_stride, region.token_stride, region.piece_bytes]
        every += [region.piece_stride] if region.pieces > 1 else []
        every += [region.half_stride] if region.halves > 1 else []
    return gcd(*every)


def tiling(cache: PagedCache, align: int, tile: int) -> Tiling:
    """The tiling of `cache` where everything is aligned by `align` bytes (a power of two, at most 16)."""
    region = cache.regions[0]
    return Tiling(align, region.row_bytes // align, region.piece_bytes // align, region.halves, tile)
