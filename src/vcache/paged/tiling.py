"""How the CUDA mover cuts rows into tiles: the compile-time parameters of `kernels.move` for one cache."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from .layout import PagedCache

TILE_WORDS = 2048
"""Words of a tile; with 8-byte words 16 KiB, which eight warps move as 16-byte accesses."""
MAX_COLUMNS = 512


class Tiling(NamedTuple):
    """Sizes in words of `word_bytes`."""

    word_bytes: int
    vector: int
    row: int
    piece: int
    halves: int
    columns: int
    tokens: int

    @property
    def segments(self) -> int:
        """Tiles that lie side by side in a row."""
        return -(-self.row // self.columns)

    def tiles(self, tokens: int) -> int:
        """Tiles that lie one after another in a chunk of `tokens` tokens."""
        return -(-tokens // self.tokens)


def alignment(cache: PagedCache) -> int:
    """Bytes, at most 16, by which all pieces of all rows are aligned, in the cache and in a payload that is itself."""
    every = [16]
    for region in cache.regions:
        every += [region.address, region.block_stride, region.token_stride, region.piece_bytes]
        every += [region.piece_stride] if region.pieces > 1 else []
        every += [region.half_stride] if region.halves > 1 else []
    return gcd(*every)


def tiling(cache: PagedCache, align: int) -> Tiling:
    """The tiling of `cache` where everything is aligned by `align` bytes (a power of two, at most 16)."""
    word = min(align, 8)
    region = cache.regions[0]
    row = region.row_bytes // word
    columns = _columns(row)
    # A row in one piece needs no arithmetic on pieces: the kernel sees that from piece == row.
    piece = row if region.pieces == region.halves == 1 else region.piece_bytes // word
    return Tiling(word, align // word, row, piece, region.halves, columns, max(1, TILE_WORDS // columns))


def _columns(row: int) -> int:
    """A power of two that leaves few lanes idle, yet reads long stretches: a stretch costs as much as 8 words, as a rule."""
    widths = [1 << power for power in range(1, MAX_COLUMNS.bit_length())]
    return min(widths, key=lambda columns: -(-row // columns) * (columns + 8))
