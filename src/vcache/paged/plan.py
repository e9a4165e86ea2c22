"""How the CPU mover covers the slot mapping of one chunk: long copies where it can, vectorised gathers where it cannot."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Slots: TypeAlias = "NDArray[np.int64]"

MAX_PARTS = 8
"""Beyond this many parts per chunk, one gather of single tokens beats the calls that separate copies would cost."""


class Run(NamedTuple):
    """Consecutive slots, inside one block unless blocks follow each other in memory."""

    first: int
    slot: int
    tokens: int


class Blocks(NamedTuple):
    """Whole blocks in any order."""

    first: int
    blocks: Slots
    tokens: int


class Rows(NamedTuple):
    """Any slots."""

    first: int
    slots: Slots
    tokens: int


Part: TypeAlias = "Run | Blocks | Rows"


def plan(slots: Slots, block_size: int, seamless: bool) -> list[Part]:
    """Parts that cover `slots` in order; `first` counts tokens from the first slot. Pure, no loop over tokens.

    `seamless`: block b + 1 follows block b in memory, so that a run may cross their border.
    """
    count = len(slots)
    if not count:
        return []
    follows = np.diff(slots) == 1
    if (seamless or int(slots[0]) % block_size + count <= block_size) and bool(follows.all()):
        return [Run(0, int(slots[0]), count)]
    breaks = np.flatnonzero(~follows | (slots[1:] % block_size == 0)) + 1
    starts = np.concatenate((np.zeros(1, np.int64), breaks))
    lengths = np.diff(np.append(starts, count))
    first = slots[starts]
    whole = (lengths == block_size) & (first % block_size == 0)
    # Neighbouring runs of one kind form a part: all whole blocks, or all less than that.
    edges = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(np.diff(whole.astype(np.int8))) + 1, [len(starts)]))
    if len(edges) - 1 > MAX_PARTS:
        return [Rows(0, slots, count)]
    parts: list[Part] = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        token = int(starts[begin])
        length = int(lengths[begin:end].sum())
        if end - begin == 1:
            parts.append(Run(token, int(first[begin]), length))
        elif whole[begin]:
            parts.append(_blocks(token, first[begin:end] // block_size, block_size, seamless))
        else:
            parts.append(Rows(token, slots[token : token + length], length))
    return parts


def _blocks(token: int, blocks: Any, block_size: int, seamless: bool) -> Part:
    if seamless and bool((np.diff(blocks) == 1).all()):
        return Run(token, int(blocks[0]) * block_size, len(blocks) * block_size)
    return Blocks(token, blocks, len(blocks) * block_size)
