"""What child processes of the segment tests serve: an importer, a lender."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import msgspec
from segment_support import FakeManager, eventually, mapped_slabs, segment_config

from vcache.lender.lender import Lender
from vcache.segment.backing import MappedSlab
from vcache.segment.host import HostBacking
from vcache.segment.mapping import PinnedSlot, SegmentMap
from vcache.segment.slots import SegmentInfo, SlotLocation


def fork(seconds: float) -> int:
    """Leave a forked child behind that outlives this process."""
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(0)
    return pid


class ImporterChild:
    def __init__(self) -> None:
        self.map: SegmentMap
        self.pins: list[PinnedSlot] = []

    def start(self, client: bytes, info: SegmentInfo) -> list[int]:
        self.map = SegmentMap(client, info.host, {"host": lambda device: HostBacking()})
        self.map.update(msgspec.structs.replace(info, number=1))
        return self.map.unreachable()

    def pin(self, slab: int, slot: int, slot_bytes: int) -> bool:
        pinned = self.map.pin(SlotLocation(1, slab, 1, slot, slot_bytes, 2))
        if pinned is not None:
            self.pins.append(pinned)
        return pinned is not None

    def unpin(self) -> None:
        self.map.unpin(self.pins.pop())

    def read(self, slab: int, slot: int, slot_bytes: int) -> bytes | None:
        """The whole payload, through a fresh pin."""
        pinned = self.map.pin(SlotLocation(1, slab, 1, slot, slot_bytes, 2))
        if pinned is None:
            return None
        try:
            return self.map.read(pinned.slab, pinned.payload_offset, slot_bytes)
        finally:
            self.map.unpin(pinned)

    def read_pinned(self, nbytes: int) -> bytes:
        pinned = self.pins[-1]
        return self.map.read(pinned.slab, pinned.payload_offset, nbytes)

    def write(self, slab: int, slot: int, slot_bytes: int, data: bytes) -> None:
        pinned = self.map.pin(SlotLocation(1, slab, 1, slot, slot_bytes, 2))
        assert pinned is not None
        memory: MappedSlab = pinned.slab
        assert memory.buffer is not None
        memory.buffer[pinned.payload_offset : pinned.payload_offset + len(data)] = data
        self.map.unpin(pinned)

    def unreachable(self) -> list[int]:
        return self.map.unreachable()

    def forget(self) -> None:
        self.map.forget(1)

    def mapped(self, expected: int) -> int:
        """Waits for it."""
        eventually(lambda: mapped_slabs() == expected)
        return mapped_slabs()

    def fork(self, seconds: float) -> int:
        return fork(seconds)


class LenderChild:
    def __init__(self) -> None:
        self.manager = FakeManager()
        self.lender: Lender

    def start(self, folder: Path, size: int, slab: int, unmap_timeout: float = 2.0) -> SegmentInfo:
        self.manager.start()
        self.lender = Lender(self.manager, HostBacking(), segment_config(folder, size, slab, unmap_timeout))
        assert self.lender.wait_mounted(5)
        return self.lender.info

    def write(self, slab: int, offset: int, data: bytes) -> None:
        memory = self.lender.slab(slab)
        assert memory is not None
        self.lender.backing.write(memory, offset, data)

    def touch(self, slab: int) -> None:
        memory = self.lender.slab(slab)
        assert memory is not None
        ctypes.memset(memory.address, 1, memory.nbytes)

    def fork(self, seconds: float) -> int:
        return fork(seconds)
