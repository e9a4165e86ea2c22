"""The mover for paged caches in host memory: NumPy copies between the tensors and host slabs, in the calling thread.

NumPy rather than torch, because gathers of long rows into a given buffer run several times faster there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from ctypes import c_char
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..errors import SegmentError
from ..segment.mapping import MappedSlab
from ..segment.shared import Fence
from ..segment.slot_protocol import HostMemory, announce, carries, publish, still_carries
from .checks import check_transfers
from .checksum import TRAILER_BYTES, contradicts, trailer
from .columns import SlotColumns
from .layout import PagedCache, Region
from .mover import Mover, Outcome, SlotTransfer, Transfer
from .plan import Blocks, Part, Rows, Run, Slots, plan

if TYPE_CHECKING:
    import torch

Words: TypeAlias = NDArray[Any]


PARALLEL_BYTES = 4 * 2**20
"""Below this, handing work to threads costs more than it saves."""


class RegionView(NamedTuple):
    """One region's memory as arrays of words of the widest type that its alignment allows."""

    blocks: Words
    """`[num_blocks, words]` where a block's rows lie side by side, else `[num_blocks, block_size, *row]`."""
    rows: Words
    """`[num_slots, *row]` where blocks follow each other in memory, else `[num_blocks, block_size, *row]`."""
    row: tuple[int, ...]
    """Shape of a row in words: `(words,)`, or `(pieces, words)`, or `(pieces, halves, words)`."""
    seamless: bool


class CacheViews(NamedTuple):
    """A paged cache's memory, understood once."""

    regions: list[RegionView]
    seamless: bool
    block_size: int


class CpuMover(Mover):
    """Runs inline: `store` and `load` return when all is done. Any number of threads may call it at once."""

    def __init__(self, threads: int = 1) -> None:
        """`threads`: how many chunks of one call are moved at a time, when there is enough to move."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="vcache-mover") if threads > 1 else None
        self._views: WeakKeyDictionary[PagedCache, CacheViews] = WeakKeyDictionary()
        self._fence = Fence()

    def reaches(self, slab: MappedSlab) -> bool:
        return slab.buffer is not None

    def store(
        self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer], writer: bytes
    ) -> FinishedTransfer:
        slots, views, began = self._prepare(cache, slot_mapping, transfers), self._understood(cache), time.perf_counter()
        done = self._each(transfers, lambda transfer: self._store_one(views, slots, transfer, writer))
        return FinishedTransfer(done, time.perf_counter() - began)

    def load(self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> FinishedTransfer:
        slots, views, began = self._prepare(cache, slot_mapping, transfers), self._understood(cache), time.perf_counter()
        done = self._each(transfers, lambda transfer: self._load_one(views, slots, transfer))
        return FinishedTransfer(done, time.perf_counter() - began)

    def _each(self, transfers: Sequence[SlotTransfer], move: Callable[[SlotTransfer], Outcome]) -> list[Outcome]:
        """NumPy copies long runs without the interpreter's lock, so threads share the memory bandwidth of several cores."""
        nbytes = sum(transfer.header.payload_bytes for transfer in transfers)
        if self._executor is None or len(transfers) < 2 or nbytes < PARALLEL_BYTES:
            return [move(transfer) for transfer in transfers]
        moving = [self._executor.submit(move, transfer) for transfer in transfers]
        wait(moving)  # also when one breaks: whoever hears of that takes all as ended
        return [each.result() for each in moving]

    def _store_one(self, views: CacheViews, slots: Slots, transfer: SlotTransfer, writer: bytes) -> Outcome:
        memory, at, header = self._memory(transfer), transfer.slot.header_offset, transfer.header
        odd = announce(memory, at, header, writer, transfer.slab_header)
        if odd is None:
            return Outcome.FAILED
        payload = _payload(memory.buffer, transfer)
        self._move(views, slots[transfer.start : transfer.start + header.tokens], transfer, payload, to_slot=True)
        if transfer.trailer:
            memory.write(transfer.trailer, trailer(payload, header.generation))
        return Outcome.VERIFIED if publish(memory, at, odd, header) else Outcome.FAILED

    def _load_one(self, views: CacheViews, slots: Slots, transfer: SlotTransfer) -> Outcome:
        memory, at, header = self._memory(transfer), transfer.slot.header_offset, transfer.header
        expected = header.pack()
        if not carries(memory, at, expected):
            return Outcome.FAILED
        count, payload = header.tokens - transfer.skip, _payload(memory.buffer, transfer)
        self._move(views, slots[transfer.start : transfer.start + count], transfer, payload, to_slot=False)
        damaged = False
        if transfer.trailer:
            damaged = contradicts(memory.read(transfer.trailer, TRAILER_BYTES), payload, header.generation)
        if not still_carries(memory, at, expected):
            return Outcome.FAILED
        return Outcome.DAMAGED if damaged else Outcome.VERIFIED

    def _memory(self, transfer: SlotTransfer) -> HostMemory:
        return HostMemory(_buffer(transfer.slot.slab), self._fence)

    def _prepare(self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> Slots:
        slots = slot_mapping.detach().cpu()
        cache.check_slot_mapping(slots, slots.numel())
        check_transfers(cache, slots, SlotColumns.of(transfers), self.reaches)
        return slots.numpy().astype(np.int64, copy=False)

    def _understood(self, cache: PagedCache) -> CacheViews:
        views = self._views.get(cache)
        if views is None:
            regions = [_view(region, cache) for region in cache.regions]
            views = self._views[cache] = CacheViews(regions, all(view.seamless for view in regions), cache.block_size)
        return views

    def _move(self, views: CacheViews, slots: Slots, transfer: SlotTransfer, payload: memoryview, *, to_slot: bool) -> None:
        regions, seamless, block_size = views
        parts = plan(slots, block_size, seamless)
        bodies = np.frombuffer(payload, np.uint8).reshape(len(regions), transfer.header.tokens, -1)[:, transfer.skip :]
        for view, rows in zip(regions, bodies, strict=True):
            body = rows.view(view.rows.dtype).reshape(len(rows), *view.row)
            for part in parts:
                _copy(view, body[part.first : part.first + part.tokens], part, block_size, to_slot)


class FinishedTransfer(Transfer):
    """A transfer that was over before it was handed out."""

    def __init__(self, outcomes: list[Outcome], seconds: float) -> None:
        self._outcomes = outcomes
        self._seconds = seconds

    @property
    def seconds(self) -> float:
        return self._seconds

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def verified(self) -> list[bool]:
        return [outcome is Outcome.VERIFIED for outcome in self._outcomes]

    def damaged(self) -> list[int]:
        return [place for place, outcome in enumerate(self._outcomes) if outcome is Outcome.DAMAGED]


def _buffer(slab: MappedSlab) -> memoryview:
    if slab.buffer is None:
        raise SegmentError(f"slab on {slab.device}: not mapped in host memory, the CPU mover cannot reach it")
    return slab.buffer


def _payload(memory: memoryview, transfer: SlotTransfer) -> memoryview:
    start = transfer.slot.payload_offset
    return memory[start : start + transfer.header.payload_bytes]


def _view(region: Region, cache: PagedCache) -> RegionView:
    seamless = region.block_stride == cache.block_size * region.token_stride
    shape, strides = [cache.num_blocks, cache.block_size], [region.block_stride, region.token_stride]
    row: list[int] = []
    for size, stride in ((region.pieces, region.piece_stride), (region.halves, region.half_stride)):
        if size > 1:
            row.append(size)
            strides.append(stride)
    width = next(w for w in (8, 4, 2, 1) if gcd(region.address, region.piece_bytes, *strides) % w == 0)
    row.append(region.piece_bytes // width)
    strides.append(width)
    span = sum((size - 1) * stride for size, stride in zip([*shape, *row], strides, strict=True)) + width
    memory = memoryview((c_char * span).from_address(region.address)).cast("B")
    every: Words = np.ndarray([*shape, *row], f"i{width}", memory, strides=strides)
    rows, blocks = every, every
    if seamless:
        rows = np.ndarray([cache.num_slots, *row], every.dtype, memory, strides=strides[1:])
    if len(row) == 1 and region.token_stride == region.piece_bytes:
        blocks = np.ndarray([shape[0], shape[1] * row[0]], every.dtype, memory, strides=[strides[0], width])
    return RegionView(blocks, rows, tuple(row), seamless)


def _copy(view: RegionView, body: Words, part: Part, block_size: int, to_slot: bool) -> None:
    """Move one part of one region; `body` is `[part.tokens, *row]` of the payload."""
    paged: Words = view.rows
    index: Any
    if isinstance(part, Run):
        first = part.slot if view.seamless else part.slot % block_size
        rows = view.rows if view.seamless else view.rows[part.slot // block_size]
        paged, index = rows, slice(first, first + part.tokens)
    elif isinstance(part, Blocks):
        paged, index = view.blocks, part.blocks
        body = body.reshape(len(part.blocks), *view.blocks.shape[1:])
    elif isinstance(part, Rows):
        paged, index = view.rows, part.slots if view.seamless else np.divmod(part.slots, block_size)
    if not to_slot:
        paged[index] = body
    elif isinstance(index, np.ndarray) and paged.flags.c_contiguous and body.flags.c_contiguous:
        np.take(paged, index, axis=0, out=body, mode="clip")  # one pass; "clip" because "raise" would buffer the output
    else:
        body[...] = paged[index]
