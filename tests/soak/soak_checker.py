"""What a retrieve delivered, compared with what it must be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from support.paged import Paged, content

from vcache import KVCacheSpec

POISON = 0xA5


class Read(NamedTuple):
    """One retrieve."""

    asked: int
    """Tokens."""
    delivered: int
    """Tokens marked True: every byte of theirs was compared."""
    wrong: tuple[int, ...] = ()
    """Tokens marked True whose bytes differ."""
    strays: int = 0
    """Rows of the cache that were written although no token of the prompt lies there, and marks that are no prefix."""
    rows: bytes = b""
    """Of the wrong tokens."""


def poisoned(spec: KVCacheSpec, layout: str, blocks: int, block_size: int) -> Paged:
    """A paged cache in which nothing can be taken for a delivered row."""
    paged = Paged.zeros(spec, layout, blocks, block_size)
    for tensor in paged.tensors:
        tensor.view(torch.uint8).fill_(POISON)
    return paged


def compare(paged: Paged, tokens: list[int], slots: list[int], mask: list[bool]) -> Read:
    """Compare every byte under a True with the content of its token."""
    found = sum(mask)
    rows = paged.read(slots)
    differs = (rows != content(paged.spec, tokens)).any(axis=(1, 2))
    wrong = np.flatnonzero(differs & np.array(mask))
    others = sorted(set(range(paged.blocks * paged.block_size)) - set(slots))
    strays = int((paged.read(others) != POISON).any(axis=(1, 2)).sum()) + (mask != [i < found for i in range(len(mask))])
    return Read(len(tokens), found, tuple(map(int, wrong)), strays, rows[wrong].tobytes())


def whose(spec: KVCacheSpec, read: Read, prompts: dict[str, list[int]]) -> str:
    """Where the bytes of wrong tokens come from: names of prompts, "poison" or "unknown", with the number of tokens."""
    size = spec.regions * spec.row_bytes
    known = {bytes([POISON]) * size: "nobody (not written)"}
    for name, tokens in prompts.items():
        known.update((row.tobytes(), name) for row in content(spec, tokens))
    found: dict[str, int] = {}
    for i in range(len(read.wrong)):
        name = known.get(read.rows[i * size : (i + 1) * size], "mixed or unknown bytes")
        found[name] = found.get(name, 0) + 1
    return ", ".join(f"{count} of {name}" for name, count in found.items())
