"""Copy engines over pages: every block of every region as one entry of `cuMemcpyBatchAsync`, for comparison with the mover.

Moves the same bytes between the same places as the mover does, for whole blocks only, and without headers: no ticket, no check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ArgumentError, DeviceUnavailableError
from ..paged.layout import PagedCache
from ..paged.mover import SlotTransfer

if TYPE_CHECKING:
    import numpy as np
    import torch

_ENTRIES = 1024
"""Of one call: so that the host is ready with the next call while the first one runs."""


class BatchPlan(NamedTuple):
    """Addresses and sizes, one entry a block and region: `cache` and `slots` uint64, `sizes` uint64."""

    cache: np.ndarray[Any, Any]
    slots: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]


def plan(cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> BatchPlan:
    """Entries for these chunks. `slot_mapping`: whole blocks. Reads the mapping from the device. Raises `ArgumentError` for a
    layout whose blocks are not one run of bytes in each region, and for chunks that do not begin and end with a block."""
    import numpy as np

    block = cache.block_size
    for region in cache.regions:
        if (region.pieces, region.halves) != (1, 1) or region.token_stride != region.row_bytes:
            raise ArgumentError(f"layout {cache.layout}: a block is not one run of bytes in each region")
    blocks = slot_mapping.cpu().numpy()[::block].astype(np.uint64) // np.uint64(block)
    here: list[np.ndarray[Any, Any]] = []
    there: list[np.ndarray[Any, Any]] = []
    for transfer in transfers:
        tokens = transfer.header.tokens
        if tokens % block or transfer.start % block:
            raise ArgumentError(f"a chunk of {tokens} tokens from {transfer.start} on is not whole blocks of {block}")
        own = blocks[transfer.start // block : (transfer.start + tokens) // block]
        payload = (transfer.slot.slab.device_address or transfer.slot.slab.address) + transfer.slot.payload_offset
        for number, region in enumerate(cache.regions):
            here.append(np.uint64(region.address) + own * np.uint64(region.block_stride))
            first = payload + number * tokens * region.row_bytes
            there.append(np.uint64(first) + np.arange(len(own), dtype=np.uint64) * np.uint64(block * region.row_bytes))
    sizes = np.full(sum(map(len, here)), block * cache.regions[0].row_bytes, dtype=np.uint64)
    return BatchPlan(np.concatenate(here), np.concatenate(there), sizes)


class BatchCopier:
    """Queues plans on a stream of its own. Thread-safe as far as the driver is."""

    def __init__(self, device: torch.device) -> None:
        """Raises `DeviceUnavailableError` where the driver has no cuMemcpyBatchAsync."""
        import torch

        try:
            from cuda.bindings import driver

            from ..paged.copy_engine import batch_function
        except ImportError:
            raise DeviceUnavailableError("copy engines over pages need the package cuda-bindings") from None
        function = batch_function()
        if function is None:
            raise DeviceUnavailableError("the driver has no cuMemcpyBatchAsync")
        self._function = function
        make: Any = torch.cuda.Stream
        self.device, self.stream = device, make(device)
        self._driver = driver
        with torch.cuda.device(device):
            self.stream.synchronize()
            _, self._context = driver.cuCtxGetCurrent()

    def start(self, entries: BatchPlan, *, store: bool) -> None:
        """Queue the copies on `stream`: from the cache to the slots, or back. Raises `DeviceUnavailableError` when the driver
        refuses."""
        target, source = (entries.slots, entries.cache) if store else (entries.cache, entries.slots)
        # A thread that has not used torch has no context, and the driver says no more than "invalid value".
        self._driver.cuCtxPushCurrent(self._context)
        try:
            for begin in range(0, len(entries.sizes), _ENTRIES):
                part = slice(begin, begin + _ENTRIES)
                self._function(
                    target[part].ctypes.data,
                    source[part].ctypes.data,
                    entries.sizes[part].ctypes.data,
                    len(entries.sizes[part]),
                    self.stream.cuda_stream,
                )
        finally:
            self._driver.cuCtxPopCurrent()

    def copy(self, entries: BatchPlan, *, store: bool) -> None:
        """As `start`, and wait."""
        self.start(entries, store=store)
        self.stream.synchronize()
