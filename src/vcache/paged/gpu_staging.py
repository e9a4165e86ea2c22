"""Pinned tables that carry a request's addresses and headers to the GPU, and its results back; reused, not reallocated."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from struct import Struct
from typing import Any, Protocol

import torch

from .kernels import CHUNK, PARAMS
from .mover import SlotTransfer

_PARAMS = Struct("<6q16s")
_CHUNK = Struct("<8q64s64s")
_WORD = 8
_MIN_CHUNKS = 64
_MIN_WORDS = 2**14


class Settles(Protocol):
    """Who waits for the results in a table."""

    def settle(self) -> None: ...


class Table:
    """Memory of one request in flight: a host table, its copy on the device, and results. Not thread-safe."""

    def __init__(self, device: torch.device, chunks: int, words: int) -> None:
        """Room for `chunks` chunks and a slot mapping, `words` in all. Allocates on the current stream."""
        self.pinned = device.type == "cuda"
        self.capacity = (chunks, words)
        self.host = torch.empty(words, dtype=torch.int64, pin_memory=self.pinned)
        self.device = torch.empty(words, dtype=torch.int64, device=device) if self.pinned else self.host
        self.results = torch.empty((chunks, 2), dtype=torch.int32, pin_memory=self.pinned)
        self._bytes = self.host.numpy().data.cast("B")
        self._results = self.results.numpy()
        self.event: Any = None
        """CUDA event behind the last use; None where work is done at once."""
        self.owner: weakref.ref[Settles] | None = None
        self.keep: tuple[object, ...] = ()
        """What the kernels read besides: must live until the event."""

    def fill(
        self,
        transfers: Sequence[SlotTransfer],
        slot_mapping: torch.Tensor,
        *,
        tiles: int,
        num_slots: int,
        writer: bytes,
        staged: bool,
    ) -> int:
        """Write the request into the host table; number of words used. `staged`: the slot mapping travels in the table."""
        used: int = PARAMS.value + CHUNK.value * len(transfers)
        address = slot_mapping.data_ptr()
        if staged:
            address = self.device.data_ptr() + used * _WORD
            self.host[used : used + len(slot_mapping)].copy_(slot_mapping)
            used += len(slot_mapping)
        _PARAMS.pack_into(self._bytes, 0, len(transfers), tiles, address, num_slots, self.results.data_ptr(), 0, writer)
        offset, step = PARAMS.value * _WORD, CHUNK.value * _WORD
        for (slab, header_offset, payload_offset), header, start, skip, slab_header in transfers:
            base = slab.device_address
            _CHUNK.pack_into(
                self._bytes,
                offset,
                base + payload_offset,
                base + header_offset,
                base if slab_header else 0,
                start,
                header.tokens,
                skip,
                0,
                0,
                header.pack(),
                slab_header,
            )
            offset += step
        return used

    def upload(self, words: int) -> None:
        """Bring the host table to the device, on the current stream."""
        if self.pinned:
            self.device[:words].copy_(self.host[:words], non_blocking=True)

    def read(self, chunks: int) -> list[tuple[int, int]]:
        """Per chunk: verified, number of slots out of range. Only after the event."""
        return [(verified, outside) for verified, outside in self._results[:chunks].tolist()]


class TablePool:
    """Tables of one stream, recycled when their event has completed. Not thread-safe: its mover's lock guards it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Table] = []
        self._busy: list[Table] = []

    def take(self, chunks: int, words: int) -> Table:
        """A table with room for a request. To be called on the stream that will use it, for the allocator's sake."""
        self._recycle()
        for position, table in enumerate(self._free):
            if table.capacity[0] >= chunks and table.capacity[1] >= words:
                return self._free.pop(position)
        if self._free:
            self._free.pop()  # too small; the one made now takes its place
        return Table(self._device, _power(chunks, _MIN_CHUNKS), _power(words, _MIN_WORDS))

    def put(self, table: Table) -> None:
        """Hand back a table whose `event` follows its last use."""
        self._busy.append(table)

    def _recycle(self) -> None:
        busy = []
        for table in self._busy:
            if table.event is not None and not table.event.query():
                busy.append(table)
                continue
            owner = None if table.owner is None else table.owner()
            if owner is not None:
                owner.settle()  # or its results would be overwritten
            table.owner, table.keep = None, ()
            self._free.append(table)
        self._busy = busy


def _power(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())
