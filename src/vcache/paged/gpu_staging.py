"""Pinned tables that carry a request's addresses and headers to the GPU, and its results back; reused, not reallocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..errors import DeviceUnavailableError
from .checksum import BLOCK
from .columns import SlotColumns
from .kernels import (
    CHUNK,
    CHUNK_ERRORS,
    CHUNK_FORMAT,
    CHUNK_HEADER,
    CHUNK_LIVE,
    CHUNK_PAYLOAD,
    CHUNK_SKIP,
    CHUNK_SLAB,
    CHUNK_START,
    CHUNK_TOKENS,
    CHUNK_WANTED,
    PARAMS,
)

_PARAMS = Struct("<6q16s")
_WORD = 8
_MIN_CHUNKS = 64
_MIN_WORDS = 2**14


class Extent(NamedTuple):
    """What a request comprises."""

    chunks: int
    tokens: int
    """Most tokens that are moved of one chunk."""
    addresses: int
    """All payload addresses, or-ed: tells by how many bytes they are aligned."""
    devices: set[str]
    """Where the slabs lie."""
    trailers: list[int]
    """Addresses of the slots' trailers, 0 for none; empty when there is not a single one."""
    blocks: int
    """Of the longest payload's checksum."""


class Settles(Protocol):
    """Who waits for the results in a table."""

    def settle(self) -> None: ...


class Table:
    """Memory of one request in flight: a host table, its copy on the device, and results. Not thread-safe."""

    def __init__(self, device: torch.device, chunks: int, words: int) -> None:
        """Room for `chunks` chunks and a slot mapping, `words` in all. Allocates on the current stream."""
        pinned = device.type == "cuda"
        self.capacity = (chunks, words)
        self.host = torch.empty(words, dtype=torch.int64, pin_memory=pinned)
        self.device = torch.empty(words, dtype=torch.int64, device=device) if pinned else self.host
        self.results = torch.empty((chunks, 2), dtype=torch.int32, pin_memory=pinned)
        self._upload = _upload() if pinned else None
        self._host_address, self._device_address = self.host.data_ptr(), self.device.data_ptr()
        self._results_address = self.results.data_ptr()
        self._words = self.host.numpy()
        self._bytes = self._words.data.cast("B")
        self._results = self.results.numpy()
        self.event: Any = None
        """CUDA event behind the last use; None where work is done at once."""
        self.owner: weakref.ref[Settles] | None = None
        self.keep: tuple[object, ...] = ()
        """What the kernels read besides: must live until the event."""

    def fill(self, slots: SlotColumns, store: bool) -> Extent:
        """Write the chunks of a store or load into the host table."""
        count = len(slots)
        bases = np.array([slab.device_address for slab in slots.slabs], np.int64)[slots.slab]
        rows = self._words[PARAMS.value : PARAMS.value + CHUNK.value * count].reshape(count, CHUNK.value)
        tokens = slots.tokens
        rows[:, CHUNK_PAYLOAD.value] = bases + slots.payload_offset
        rows[:, CHUNK_HEADER.value] = bases + slots.header_offset
        rows[:, CHUNK_START.value], rows[:, CHUNK_TOKENS.value], rows[:, CHUNK_SKIP.value] = slots.start, tokens, slots.skip
        rows[:, CHUNK_LIVE.value] = rows[:, CHUNK_ERRORS.value] = 0
        rows[:, CHUNK_WANTED.value : CHUNK_FORMAT.value] = slots.headers.view(np.int64).reshape(count, -1)
        shapes = slots.slab_headers
        if not store:
            # A buffer of one's own begins with the slot's header, and has none of a slab's.
            rows[:, CHUNK_SLAB.value] = np.where(slots.header_offset != 0, bases, 0)
        elif shapes is not None:
            rows[:, CHUNK_SLAB.value] = np.where(shapes.any(1), bases, 0)
        else:
            rows[:, CHUNK_SLAB.value] = 0
        rows[:, CHUNK_FORMAT.value :] = 0 if shapes is None else np.ascontiguousarray(shapes).view(np.int64)
        sealed = slots.trailer != 0
        trailers, blocks = list[int](), 0
        if sealed.any():
            trailers = np.where(sealed, bases + slots.trailer, 0).tolist()
            blocks = -(-int(slots.headers["payload_bytes"][sealed].max()) // (8 * BLOCK))
        return Extent(
            count,
            int((tokens - slots.skip).max()),
            int(np.bitwise_or.reduce(rows[:, CHUNK_PAYLOAD.value])),
            slots.devices,
            trailers,
            blocks,
        )

    def divert(self, first: int, payloads: Sequence[int]) -> None:
        """After `fill`: let the kernels move the chunks from `first` on to or from these addresses, instead of their slots."""
        begin, step = PARAMS.value + CHUNK.value * first + CHUNK_PAYLOAD.value, CHUNK.value
        self._words[begin : begin + step * len(payloads) : step] = payloads

    def finish(
        self,
        extent: Extent,
        slot_mapping: torch.Tensor,
        *,
        tiles: int,
        num_slots: int,
        writer: bytes,
        stream: int,
        homes: Sequence[int] = (),
    ) -> None:
        """Write the parameters, and the slot mapping if it lies in host memory, and bring all of it to the device, on the
        stream of that handle, whose device must be current. Does not wait. Raises `DeviceUnavailableError`.

        `homes`: empty, or the addresses that `kernels.keep` needs, one for each chunk."""
        used: int = PARAMS.value + CHUNK.value * extent.chunks
        address = slot_mapping.data_ptr()
        if slot_mapping.device.type == "cpu":
            address = self._device_address + used * _WORD
            self.host[used : used + len(slot_mapping)].copy_(slot_mapping)
            used += len(slot_mapping)
        trailers = 0
        if extent.trailers:
            trailers = self._device_address + used * _WORD
            words = [extent.blocks, *(word for at in extent.trailers for word in (at, 0))]
            self.host[used : used + len(words)] = torch.tensor(words)
            used += len(words)
        home = 0
        if homes:
            home = self._device_address + used * _WORD
            self._words[used : used + len(homes)] = homes
            used += len(homes)
        _PARAMS.pack_into(self._bytes, 0, home, tiles, address, num_slots, self._results_address, trailers, writer)
        if self._upload is not None:
            self._upload(self._device_address, self._host_address, used * _WORD, stream)

    def read(self, chunks: int) -> list[tuple[int, int]]:
        """Per chunk: an `Outcome`, number of slots out of range. Only after the event."""
        return [(outcome, outside) for outcome, outside in self._results[:chunks].tolist()]


class TablePool:
    """Tables of one stream, recycled when their event has completed. Not thread-safe: its mover's lock guards it."""

    def __init__(self, device: torch.device, current: Callable[[], Any]) -> None:
        """`current`: context in which the stream that will use the tables is current, for the allocator's sake."""
        self._device = device
        self._current = current
        self._free: list[Table] = []
        self._busy: list[Table] = []

    def take(self, chunks: int, words: int) -> Table:
        """A table with room for a request."""
        self._recycle()
        for position, table in enumerate(self._free):
            if table.capacity[0] >= chunks and table.capacity[1] >= words:
                return self._free.pop(position)
        if self._free:
            self._free.pop()  # too small; the one made now takes its place
        with self._current():
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


def _upload() -> Callable[[int, int, int, int], None]:
    """Copies `(device address, host address, bytes, stream)` by the driver, which takes less of the host's time than a tensor's
    `copy_` with its slices and its current stream. Raises `DeviceUnavailableError`, the function too."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DeviceUnavailableError("kvcaches on a GPU need cuda-bindings: pip install 'vcache[cuda]'") from None
    copy = driver.cuMemcpyHtoDAsync

    def upload(target: int, source: int, nbytes: int, stream: int) -> None:
        (status,) = copy(target, source, nbytes, stream)
        if status:
            raise DeviceUnavailableError(f"cuMemcpyHtoDAsync: {status!r}")

    return upload


def _power(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())
