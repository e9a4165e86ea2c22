"""The slots of one request as columns: what a mover hands to a GPU in one piece, without an object per slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..segment.backing import MappedSlab
from ..segment.mapping import PinnedSlot
from ..segment.slots import HEADER_BYTES, SLOT_MAGIC, SlotHeader
from .mover import SlotTransfer

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("shard", "<u2"),
        ("num_shards", "<u2"),
        ("generation", "<u8"),
        ("key", "V16"),
        ("namespace", "V16"),
        ("payload_bytes", "<u8"),
        ("tokens", "<u4"),
        ("chunk_index", "<u4"),
    ]
)
"""A slot header, as `SlotHeader.pack` makes it."""


class SlotColumns(Sequence[SlotTransfer]):
    """`SlotTransfer`s of one request, column by column: row `i` of each belongs to transfer `i`."""

    __slots__ = ("header_offset", "headers", "payload_offset", "skip", "slab", "slab_headers", "slabs", "start", "trailer")

    def __init__(
        self,
        slabs: Sequence[MappedSlab],
        slab: NDArray[np.int64],
        header_offset: NDArray[np.int64],
        payload_offset: NDArray[np.int64],
        headers: NDArray[Any],
        start: NDArray[np.int64],
        skip: NDArray[np.int64],
        trailer: NDArray[np.int64],
        slab_headers: NDArray[np.uint8] | None = None,
    ) -> None:
        """`slab`: index into `slabs`, which holds each once. `headers`: of dtype `HEADER`. `slab_headers`: of shape (transfers,
        `HEADER_BYTES`), zeros for none; None where no transfer has one."""
        self.slabs = slabs
        self.slab = slab
        self.header_offset = header_offset
        self.payload_offset = payload_offset
        self.headers = headers
        self.start = start
        self.skip = skip
        self.trailer = trailer
        self.slab_headers = slab_headers

    @classmethod
    def of(cls, transfers: Sequence[SlotTransfer]) -> SlotColumns:
        """The columns of any transfers: these themselves when they are columns."""
        if isinstance(transfers, SlotColumns):
            return transfers
        slabs: dict[MappedSlab, int] = {}
        numbers = [(slabs.setdefault(t.slot.slab, len(slabs)), *t.slot[1:], t.start, t.skip, t.trailer) for t in transfers]
        columns = np.array(numbers, np.int64).reshape(-1, 6).T
        headers = np.frombuffer(b"".join(t.header.pack() for t in transfers), HEADER)
        shapes = None
        if any(t.slab_header for t in transfers):
            shapes = np.frombuffer(b"".join(t.slab_header or bytes(HEADER_BYTES) for t in transfers), np.uint8)
            shapes = shapes.reshape(-1, HEADER_BYTES)
        slab, header_offset, payload_offset, start, skip, trailer = columns
        return cls(list(slabs), slab, header_offset, payload_offset, headers, start, skip, trailer, shapes)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Of each chunk, as its header says."""
        tokens: NDArray[np.int64] = self.headers["tokens"].astype(np.int64)
        return tokens

    @property
    def devices(self) -> set[str]:
        """Where the slots lie."""
        return {self.slabs[number].device for number in set(self.slab.tolist())}

    @property
    def in_host_memory(self) -> NDArray[np.bool_]:
        """Of each slot."""
        kinds = np.array([slab.kind == "host" for slab in self.slabs], bool)
        chosen: NDArray[np.bool_] = kinds[self.slab]
        return chosen

    def take(self, places: NDArray[Any]) -> SlotColumns:
        """Those at these places (indices, or a mask), in that order."""
        return SlotColumns(
            self.slabs,
            self.slab[places],
            self.header_offset[places],
            self.payload_offset[places],
            self.headers[places],
            self.start[places],
            self.skip[places],
            self.trailer[places],
            None if self.slab_headers is None else self.slab_headers[places],
        )

    def __len__(self) -> int:
        return len(self.slab)

    @overload
    def __getitem__(self, index: int) -> SlotTransfer: ...

    @overload
    def __getitem__(self, index: slice) -> SlotColumns: ...

    def __getitem__(self, index: int | slice) -> SlotTransfer | SlotColumns:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        slot = PinnedSlot(self.slabs[int(self.slab[index])], int(self.header_offset[index]), int(self.payload_offset[index]))
        header = SlotHeader.unpack(self.headers[index].tobytes())
        assert header is not None
        shape = b"" if self.slab_headers is None else self.slab_headers[index].tobytes()
        return SlotTransfer(
            slot, header, int(self.start[index]), int(self.skip[index]), shape if any(shape) else b"", int(self.trailer[index])
        )

    def __iter__(self) -> Iterator[SlotTransfer]:
        return (self[index] for index in range(len(self)))


def headers_of(
    count: int,
    *,
    shard: int,
    num_shards: int,
    generation: NDArray[Any],
    digests: Sequence[bytes],
    namespace: bytes,
    token_bytes: int,
    tokens: NDArray[Any],
    positions: Sequence[int],
) -> NDArray[Any]:
    """The complete headers of `count` chunks of one namespace, of dtype `HEADER`. Pure."""
    headers = np.empty(count, HEADER)
    headers["magic"] = SLOT_MAGIC
    headers["shard"], headers["num_shards"] = shard, num_shards
    headers["generation"] = generation
    if count:  # `frombuffer` takes no empty one
        headers["key"] = np.frombuffer(b"".join(digests), "V16")
    headers["namespace"] = np.frombuffer(namespace, "V16")[0]
    headers["payload_bytes"] = tokens * np.uint64(token_bytes)
    headers["tokens"], headers["chunk_index"] = tokens, positions
    return headers
