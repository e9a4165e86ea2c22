"""Child process of the segment tests: `segment_child.py importer|lender`, then one JSON command a line."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

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

    def start(self, client: str, info: str) -> list[int]:
        segment = msgspec.json.decode(info, type=SegmentInfo)
        self.map = SegmentMap(bytes.fromhex(client), segment.host, {"host": lambda device: HostBacking()})
        self.map.update(msgspec.structs.replace(segment, number=1))
        return self.map.unreachable()

    def pin(self, slab: int, slot: int, slot_bytes: int) -> bool:
        pinned = self.map.pin(SlotLocation(1, slab, 1, slot, slot_bytes, 2))
        if pinned is not None:
            self.pins.append(pinned)
        return pinned is not None

    def unpin(self) -> None:
        self.map.unpin(self.pins.pop())

    def read(self, slab: int, slot: int, slot_bytes: int) -> str | None:
        """The whole payload, as hex, through a fresh pin."""
        pinned = self.map.pin(SlotLocation(1, slab, 1, slot, slot_bytes, 2))
        if pinned is None:
            return None
        try:
            return self.map.read(pinned.slab, pinned.payload_offset, slot_bytes).hex()
        finally:
            self.map.unpin(pinned)

    def read_pinned(self, nbytes: int) -> str:
        pinned = self.pins[-1]
        return self.map.read(pinned.slab, pinned.payload_offset, nbytes).hex()

    def write(self, slab: int, slot: int, slot_bytes: int, data: str) -> None:
        pinned = self.map.pin(SlotLocation(1, slab, 1, slot, slot_bytes, 2))
        assert pinned is not None
        memory: MappedSlab = pinned.slab
        assert memory.buffer is not None
        raw = bytes.fromhex(data)
        memory.buffer[pinned.payload_offset : pinned.payload_offset + len(raw)] = raw
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

    def start(self, folder: str, size: int, slab: int, unmap_timeout: float = 2.0) -> str:
        self.manager.start()
        self.lender = Lender(self.manager, HostBacking(), segment_config(Path(folder), size, slab, unmap_timeout))
        assert self.lender.wait_mounted(5)
        return msgspec.json.encode(self.lender.info).decode()

    def write(self, slab: int, offset: int, data: str) -> None:
        memory = self.lender.slab(slab)
        assert memory is not None
        self.lender.backing.write(memory, offset, bytes.fromhex(data))

    def touch(self, slab: int) -> None:
        memory = self.lender.slab(slab)
        assert memory is not None
        ctypes.memset(memory.address, 1, memory.nbytes)

    def fork(self, seconds: float) -> int:
        return fork(seconds)

    def read(self, slab: int, offset: int, nbytes: int) -> str:
        memory = self.lender.slab(slab)
        assert memory is not None
        return self.lender.backing.read(memory, offset, nbytes).hex()


def main() -> None:
    child: Any = {"importer": ImporterChild, "lender": LenderChild}[sys.argv[1]]()
    for line in sys.stdin:
        arguments = json.loads(line)
        answer = getattr(child, arguments.pop("command"))(**arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
