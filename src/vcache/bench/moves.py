"""Ways to move the same bytes again and again: the mover by grid size, copy engines over pages, plain copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import TransferConfig
from ..paged.layout import PagedCache
from ..paged.mover import Mover, SlotTransfer
from ..paged.select import mover_for
from .batch_copy import BatchCopier, plan
from .copies import RawCopies
from .mover_runs import finish
from .paged_data import WRITER, CacheArena, Slots, block_mapping

if TYPE_CHECKING:
    import torch

GRIDS = (8, 16, 32, 64, 132, 264)
_BLOCK = 16


class Move(NamedTuple):
    """Something that moves bytes. `run` blocks until `nbytes` have moved."""

    path: str
    grid: int
    """Programs of the mover's launch; 0 where a copy engine or the driver's own kernel moves the bytes."""
    run: Callable[[], None]
    nbytes: int


def mover_moves(
    arena: CacheArena, name: str, slots: Slots, nbytes: int, first_generation: int, *, grids: Sequence[int] = GRIDS
) -> Iterator[Move]:
    """Retrieves of `nbytes` from `slots` with each grid; last, stores with the first grid that is not below 132, else the last.
    Stores once to fill the slots. Blocks while kernels are compiled."""
    cache = arena.cache(_BLOCK)
    mapping = block_mapping(nbytes // arena.spec.token_bytes, _BLOCK, arena.tokens, cache.device)
    transfers = slots.transfers(len(mapping), first_generation)
    for grid in grids:
        mover = mover_for(cache, TransferConfig(grid=grid))
        if grid == grids[0]:
            finish(mover.store(cache, mapping, transfers, WRITER))
        yield Move(f"retrieve from {name}", grid, partial(_load, mover, cache, mapping, transfers), nbytes)
    grid = next((grid for grid in grids if grid >= 132), grids[-1])
    mover = mover_for(cache, TransferConfig(grid=grid))
    yield Move(f"store to {name}", grid, _Stores(mover, cache, mapping, transfers), nbytes)


class _Stores:
    """Stores the same chunks again and again, each time with the next generation."""

    def __init__(self, mover: Mover, cache: PagedCache, mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> None:
        self._mover, self._cache, self._mapping, self._transfers = mover, cache, mapping, list(transfers)

    def __call__(self) -> None:
        self._transfers = [
            each._replace(header=each.header._replace(generation=each.header.generation + 2)) for each in self._transfers
        ]
        finish(self._mover.store(self._cache, self._mapping, self._transfers, WRITER))


def copy_engine_moves(arena: CacheArena, name: str, slots: Slots, nbytes: int) -> list[Move]:
    """A copy for each block of 16 tokens in each region, from and to `slots`. Tries each once; raises `DeviceUnavailableError`
    where the driver refuses them."""
    cache, copier = arena.cache(_BLOCK), BatchCopier(arena.device)
    tokens = nbytes // arena.spec.token_bytes
    mapping = block_mapping(tokens, cache.block_size, arena.tokens, arena.device)
    entries = plan(cache, mapping, slots.transfers(tokens, 2))
    moves = [
        Move(f"page copies {'to' if store else 'from'} {name}", 0, partial(copier.copy, entries, store=store), nbytes)
        for store in (False, True)
    ]
    for move in moves:
        move.run()
    return moves


def plain_moves(copies: RawCopies, nbytes: int) -> list[Move]:
    """One copy of `nbytes` at a time: within or between GPUs, from and to pinned host memory."""
    import torch

    def copy(target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()

    make: Any = torch.cuda.Stream
    here, there = make(copies.target_device), make(copies.source_device)
    between = "d2d copy" if copies.source_device == copies.target_device else "peer copy"
    return [
        Move(between, 0, partial(copy, copies.target, copies.source, here), nbytes),
        Move("h2d copy", 0, partial(copy, copies.target, copies.pinned, here), nbytes),
        Move("d2h copy", 0, partial(copy, copies.pinned, copies.source, there), nbytes),
    ]


def _load(mover: Mover, cache: PagedCache, mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> None:
    finish(mover.load(cache, mapping, transfers))
