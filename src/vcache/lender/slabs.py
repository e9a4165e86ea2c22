"""The slabs that a lender owns: allocated, handed to the broker, read, wiped and taken back. Knows nothing of the manager."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ..errors import SegmentError, VCacheError
from ..segment.backing import OwnedSlab, SlabBacking
from ..segment.gate import WriteGate
from ..segment.slots import HEADER_BYTES, SlabHeader, SlabInfo, SlabInventory, SlotHeader, align_up
from .broker import Broker
from .export import RemoteExport

logger = logging.getLogger(__name__)

_HEADER_SHARE = 128


def slab_bytes(payload: int, granularity: int) -> int:
    """Compute the physical size of a slab for `payload` bytes of slots: 1/128 more, for headers, rounded up to `granularity`.

    Enough for slots of 16 KiB and more to fill the payload; a slab of 256 MiB gets 258 MiB (exactly eight slots of 32 MiB),
    one of 1 MiB gets 1 MiB and 8 KiB. Pure.
    """
    return align_up(payload + align_up(payload, _HEADER_SHARE) // _HEADER_SHARE, granularity)


class LentSlab(NamedTuple):
    """One slab, lent from `create` to `remove`."""

    memory: OwnedSlab
    payload: int
    """Bytes meant for slots; the rest is room for headers."""
    address: int = 0
    """For reads from other hosts; 0: there are none."""


class TakenBack(NamedTuple):
    """What became of slabs that were to be freed."""

    freed_bytes: int
    """Of which it is certain that the system has them back (`SlabBacking.frees_under_importers`)."""
    late: set[bytes]
    """Client ids (possibly our own) that still map some."""


class LentSlabs:
    """Allocates, finds and frees the slabs of one segment. Thread-safe. Slab numbers are never reused."""

    def __init__(
        self,
        backing: SlabBacking,
        broker: Broker,
        slab_payload: int,
        client_id: bytes,
        gate: WriteGate,
        export: RemoteExport | None = None,
    ) -> None:
        """`gate`: that our own writes pass. `slab_payload`: payload bytes of a whole slab. `client_id`: our own, for reports.
        `export`: makes slabs readable from other hosts."""
        self._backing = backing
        self._broker = broker
        self._slab_payload = slab_payload
        self._client_id = client_id
        self._gate = gate
        self._export = export
        self._lock = threading.Lock()
        self._slabs: dict[int, LentSlab] = {}
        self._next_index = 0

    @property
    def payload_bytes(self) -> int:
        with self._lock:
            return sum(slab.payload for slab in self._slabs.values())

    def infos(self) -> list[SlabInfo]:
        """List the slabs that are lent now, by index."""
        with self._lock:
            return [SlabInfo(index, slab.memory.nbytes, slab.address) for index, slab in sorted(self._slabs.items())]

    def find(self, index: int) -> OwnedSlab | None:
        """This process's own mapping of a slab; None when it is not lent (any more)."""
        slab = self._slabs.get(index)
        return None if slab is None else slab.memory

    def physical_bytes(self, payload: int) -> int:
        """Compute how many bytes `create(payload)` allocates."""
        whole, rest = divmod(payload, self._slab_payload)
        granularity = self._backing.granularity
        return whole * slab_bytes(self._slab_payload, granularity) + (slab_bytes(rest, granularity) if rest else 0)

    def create(self, payload: int) -> None:
        """Lend `payload` bytes more, all or nothing, in whole slabs and a smaller last one. Raises `SegmentError`."""
        available, needed = self._backing.available_bytes(), self.physical_bytes(payload)
        if needed > available:
            raise SegmentError(
                f"segment: cannot lend {payload} bytes ({needed} with headers) on {self._backing.device}: "
                f"only {available} bytes are available; lower segment.size"
            )
        created: list[LentSlab] = []
        try:
            whole, rest = divmod(payload, self._slab_payload)
            for part in [self._slab_payload] * whole + [rest] * bool(rest):
                memory = self._backing.create(slab_bytes(part, self._backing.granularity))
                created.append(LentSlab(memory, part))
                if self._export is not None:
                    created[-1] = LentSlab(memory, part, self._export.register(memory))
        except BaseException:
            for slab in created:
                slab.memory.retire()
                self._release(slab.memory)
            raise
        with self._lock:
            for slab in created:
                slab.memory.index, slab.memory.gate = self._next_index, self._gate
                self._slabs[self._next_index] = slab
                self._broker.add_slab(self._next_index, slab.memory.nbytes, slab.memory.fd)
                self._next_index += 1

    def newest(self, payload: int) -> list[int]:
        """Choose the last slabs that hold `payload` bytes together, or all there are."""
        chosen: list[int] = []
        with self._lock:
            for index in sorted(self._slabs, reverse=True):
                if payload <= 0:
                    break
                payload -= self._slabs[index].payload
                chosen.append(index)
        return chosen

    def remove(self, indices: Iterable[int] | None = None) -> dict[int, LentSlab]:
        """Lend these slabs (default: all) no more; follow up with `take_back`. Unknown ones are ignored."""
        with self._lock:
            if indices is None:
                indices = list(self._slabs)
            return {index: self._slabs.pop(index) for index in indices if index in self._slabs}

    def take_back(self, slabs: dict[int, LentSlab], timeout: float) -> TakenBack:
        """Make everybody unmap removed slabs, then release them. Blocks at most about `timeout` seconds, whoever is dead or
        stopped; what a transfer of this process still uses then is released when that ends."""
        deadline = time.monotonic() + timeout
        idle = {index: threading.Event() for index in slabs}
        for index, slab in slabs.items():
            slab.memory.retire(idle[index].set)
        holders = self._broker.request_unmap(slabs, timeout)
        late = set(holders)
        still_mapped = {index for held in holders.values() for index in held}
        freed = 0
        for index, slab in slabs.items():
            if not idle[index].wait(max(0.0, deadline - time.monotonic())):
                late.add(self._client_id)
                slab.memory.retire(partial(self._release, slab.memory))
                continue
            self._release(slab.memory)
            if slab.memory.fd < 0 and (self._backing.frees_under_importers or index not in still_mapped):
                freed += slab.memory.nbytes
        return TakenBack(freed, late)

    def inventory(self, indices: Sequence[int]) -> list[SlabInventory]:
        """Read the headers of these slabs, as they are now; slabs that are gone are left out."""
        found = []
        for index in indices:
            memory = self.find(index)
            if memory is None or not memory.pin():
                continue
            try:
                first = self._backing.read(memory, 0, HEADER_BYTES)
                header = SlabHeader.unpack(first)
                size = header.slots * HEADER_BYTES if header is not None else 0
                fits = size <= memory.nbytes - HEADER_BYTES
                found.append(SlabInventory(index, first, self._backing.read(memory, HEADER_BYTES, size if fits else 0)))
            finally:
                memory.unpin()
        return found

    def wipe(self, index: int, offset: int) -> None:
        """Zero the slot header at `offset`. Ignored when the slab is gone or `offset` is no place for a header."""
        memory = self.find(index)
        if memory is None or offset < HEADER_BYTES or offset % HEADER_BYTES or offset + HEADER_BYTES > memory.nbytes:
            return
        self._write(index, offset, bytes(HEADER_BYTES))

    def put_slab_header(self, index: int, header: bytes) -> None:
        """Replace the slab header (`HEADER_BYTES` bytes). Ignored when the slab is gone."""
        self._write(index, 0, header)

    def _write(self, index: int, offset: int, data: bytes) -> None:
        memory = self.find(index)
        if memory is not None and memory.pin():
            try:
                self._backing.write(memory, offset, data)
            finally:
                memory.unpin()

    def _release(self, memory: OwnedSlab) -> None:
        if self._export is not None:
            self._export.unregister(memory)
        try:
            self._backing.release(memory)
        except VCacheError as error:
            logger.error("a slab of %d bytes cannot be released: %s", memory.nbytes, error)


def unfinished_writers(inventory: Iterable[SlabInventory]) -> set[bytes]:
    """Find the client ids that signed slot headers of unfinished writes. Pure."""
    writers = set()
    for slab in inventory:
        for start in range(0, len(slab.slot_headers), HEADER_BYTES):
            header = SlotHeader.unpack(slab.slot_headers[start : start + HEADER_BYTES])
            if header is not None and header.is_writing:
                writers.add(header.namespace)
    return writers
