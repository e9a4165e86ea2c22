"""Slabs as this process sees them: its own and those mapped from other lenders, found by `SlotLocation`."""

from __future__ import annotations

from typing import NamedTuple

from .slots import SegmentKind


class MappedSlab:
    """Contract (to be completed): memory of one slab, mapped in this process.

    kind: SegmentKind, device: str ("host" or GPU uuid), nbytes: int
    address: int            host virtual address, or device address of a CUDA slab
    device_address: int     address by which the GPU reaches it (CUDA slab; registered host slab), 0 if it cannot
    buffer: memoryview|None writable bytes of a host slab; None for CUDA
    """

    kind: SegmentKind
    device: str
    nbytes: int
    address: int
    device_address: int
    buffer: memoryview | None


class PinnedSlot(NamedTuple):
    """A slot whose slab stays mapped until `SegmentMap.unpin`."""

    slab: MappedSlab
    header_offset: int
    payload_offset: int
