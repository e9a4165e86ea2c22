"""Ways to move the same bytes again and again: the mover by grid size, copy engines over pages; and the ways around VCache:
plain copies on a GPU, between GPUs, and through host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import TransferConfig
from ..paged.layout import PagedCache
from ..paged.mover import Mover, SlotTransfer
from ..paged.select import mover_for
from .batch_copy import BatchCopier, plan
from .mover_runs import finish
from .paged_data import WRITER, CacheArena, Slots, block_mapping
from .timing import Spread, event_seconds, repeats_for, wall_seconds

if TYPE_CHECKING:
    import torch

GRIDS = (8, 16, 32, 64, 132, 264)
_BLOCK = 16
_PIECE = 16 * 2**20
"""Bytes of one piece of a pipelined bounce: large enough for full PCIe speed, small enough to overlap."""


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


class RawCopy(NamedTuple):
    """One measured copy of `nbytes`, counted once (not read plus written)."""

    path: str
    nbytes: int
    seconds: Spread


class RawCopies:
    """Buffers for copies of up to `nbytes` between `source` and `target` (may be one GPU). Holds 2 x `nbytes` of VRAM and
    `nbytes` of pinned memory."""

    def __init__(self, nbytes: int, source: torch.device, target: torch.device) -> None:
        import torch

        self.source_device, self.target_device = source, target
        self.source = torch.empty(nbytes, dtype=torch.uint8, device=source)
        self.source.view(torch.int64).random_()
        self.target = torch.empty(nbytes, dtype=torch.uint8, device=target)
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        stream: Any = torch.cuda.Stream
        self._down, self._up = stream(source), stream(target)

    def measure(self, nbytes: int, *, pageable: bool = True) -> Iterator[RawCopy]:
        """All ways for one size (a divisor of the buffer's size is moved through it, so that caches do not serve small ones).
        Blocks."""
        pieces = max(1, min(64, self.source.numel() // nbytes))

        def part(buffer: torch.Tensor, run: int) -> torch.Tensor:
            start = run % pieces * nbytes
            return buffer[start : start + nbytes]

        def on(path: str, action: Callable[[int], object], device: torch.device, rate: float) -> RawCopy:
            return RawCopy(path, nbytes, event_seconds(action, device, repeats_for(nbytes / rate)))

        same = self.source_device == self.target_device
        copy = lambda i: part(self.target, i).copy_(part(self.source, i), non_blocking=True)  # noqa: E731
        yield on("d2d" if same else "peer copy", copy, self.target_device, 2e11)
        yield on("h2d", lambda i: part(self.target, i).copy_(part(self.pinned, i), non_blocking=True), self.target_device, 5e10)
        yield on("d2h", lambda i: part(self.pinned, i).copy_(part(self.source, i), non_blocking=True), self.source_device, 5e10)
        runs = repeats_for(nbytes / 2.5e10)
        yield RawCopy("bounce serial", nbytes, wall_seconds(lambda i: self._serial(*self._parts(part, i)), runs))
        yield RawCopy("bounce pipelined", nbytes, wall_seconds(lambda i: self._pipelined(*self._parts(part, i)), runs))
        if pageable:
            runs = repeats_for(nbytes / 5e8, budget=2.0, least=2)
            yield RawCopy(
                "bounce pageable", nbytes, wall_seconds(lambda i: self._pageable(*self._parts(part, i)), runs, warmup=1)
            )

    def check(self) -> bool:
        """Whether a pipelined bounce of everything moves the right bytes. Blocks."""
        import torch

        self.target.zero_()
        torch.cuda.current_stream(self.target_device).synchronize()
        self._pipelined(self.source, self.pinned, self.target)
        return bool(torch.equal(self.source, self.target.to(self.source_device)))

    def _parts(self, part: Callable[[torch.Tensor, int], torch.Tensor], run: int) -> tuple[torch.Tensor, ...]:
        return part(self.source, run), part(self.pinned, run), part(self.target, run)

    def _serial(self, source: torch.Tensor, pinned: torch.Tensor, target: torch.Tensor) -> None:
        """Everything down, then everything up."""
        import torch

        pinned.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self.source_device).synchronize()
        target.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream(self.target_device).synchronize()

    def _pipelined(self, source: torch.Tensor, pinned: torch.Tensor, target: torch.Tensor) -> None:
        """Piece by piece: one goes up while the next comes down."""
        import torch

        for start in range(0, source.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            with torch.cuda.device(self.source_device), torch.cuda.stream(self._down):
                pinned[piece].copy_(source[piece], non_blocking=True)
                landed = self._down.record_event()
            with torch.cuda.device(self.target_device), torch.cuda.stream(self._up):
                self._up.wait_event(landed)
                target[piece].copy_(pinned[piece], non_blocking=True)
        self._down.synchronize()
        self._up.synchronize()

    def _pageable(self, source: torch.Tensor, pinned: torch.Tensor, target: torch.Tensor) -> None:
        """What `.cpu()` and `.to(device)` do: through memory that is not pinned."""
        import torch

        target.copy_(source.cpu())
        torch.cuda.current_stream(self.target_device).synchronize()


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
