"""Where a call of a worker, or a mount of a lender, can be halted: points between two accesses to shared memory, or between two
messages. No clock is involved: the thread reports where it is and goes on when it is told to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vcache.paged.cpu_mover import CpuMover
from vcache.paged.mover import SlotTransfer, Transfer
from vcache.segment.mapping import MappedSlab
from vcache.segment.slots import HEADER_BYTES

if TYPE_CHECKING:
    import torch

    from vcache.paged.layout import PagedCache

Window = Literal[
    "granted",
    "begun",
    "slab header",
    "header",
    "payload",
    "landed",
    "leased",
    "loading",
    "loaded",
    "reading",
    "mounting",
    "mounted",
]
"""In a store: tickets are there, but nothing was checked yet; the mover has been called; the slab header was written; a single
store of a slot header was made; amid a payload; all bytes landed, the manager does not know. In a retrieve: the lease is there;
a first header matched; a payload was copied, its header not compared again. In a lender: amid the inventory of a mount, before
and after it is sent."""

HEADER_STORES = 6
"""Single stores that write a slot's headers: three for the odd one, three for the even one."""


class Aim(NamedTuple):
    """One point of one call."""

    window: Window
    chunk: int = 0
    """Of those that the call moves."""
    step: int = 0
    """Of `header`: which single store was the last, from 1."""
    stop: bool = True
    """Stop the whole process (SIGSTOP), else hold up the calling thread alone."""

    @property
    def place(self) -> tuple[str, int, int]:
        return self.window, self.chunk, self.step


class Halts:
    """The points at which one call is to halt."""

    def __init__(self, aims: Sequence[Aim], report: Callable[[Aim], None]) -> None:
        """`report` tells whoever decides when to go on."""
        self._aims = {aim.place: aim for aim in aims}
        self._report = report
        self._held = threading.Semaphore(0)

    def reach(self, window: Window, chunk: int = 0, step: int = 0) -> None:
        """Halt here, once, if that was asked for."""
        aim = self._aims.pop((window, chunk, step), None)
        if aim is None:
            return
        self._report(aim)
        if aim.stop:
            # To this very thread: it makes no further access.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        else:
            self._held.acquire()

    def go_on(self) -> None:
        """For a thread that is held up alone; a stopped process needs SIGCONT."""
        self._held.release()


class WatchedMemory:
    """Stands in for a slab's buffer: every access of the mover to a header, and its first to a payload, is a window."""

    def __init__(self, memory: memoryview, transfers: Sequence[tuple[int, SlotTransfer]], halts: Halts, *, loads: bool) -> None:
        """`transfers`: those in this slab, each with its place in the call."""
        self._memory = memory
        self._halts = halts
        self._loads = loads
        self._headers = {transfer.slot.header_offset: place for place, transfer in transfers}
        self._payloads = {transfer.slot.payload_offset: place for place, transfer in transfers}
        self._copied: set[int] = set()
        self._stores = dict.fromkeys(self._headers.values(), 0)

    def __getitem__(self, part: slice) -> memoryview:
        place = self._payloads.get(part.start)
        if place is not None and place not in self._copied:
            self._begin(place, part)
        place = self._headers.get(part.start)
        if self._loads and place in self._copied:
            self._halts.reach("loaded", place)
        return self._memory[part]

    def __setitem__(self, part: slice, data: bytes) -> None:
        self._memory[part] = data
        place = self._headers.get((part.start or 0) // HEADER_BYTES * HEADER_BYTES)
        if place is not None:
            self._stores[place] += 1
            self._halts.reach("header", place, self._stores[place])
        elif not part.start:
            self._halts.reach("slab header")

    def _begin(self, place: int, part: slice) -> None:
        self._copied.add(place)
        if self._loads:
            self._halts.reach("loading", place)
            return
        # The slot is this writer's: half of it may hold anything until the payload is there.
        half = (part.stop - part.start) // 2
        self._memory[part.start : part.start + half] = b"\xee" * half
        self._halts.reach("payload", place)


class WatchedMover(CpuMover):
    """Moves in the calling thread, through watched memory."""

    def __init__(self, halts: Halts) -> None:
        super().__init__()
        self._halts = halts

    def store(
        self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer], writer: bytes
    ) -> Transfer:
        self._halts.reach("begun")
        return super().store(cache, slot_mapping, self._watched(transfers, loads=False), writer)

    def load(self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> Transfer:
        return super().load(cache, slot_mapping, self._watched(transfers, loads=True))

    def _watched(self, transfers: Sequence[SlotTransfer], *, loads: bool) -> list[SlotTransfer]:
        slabs: dict[int, tuple[MappedSlab, list[tuple[int, SlotTransfer]]]] = {}
        for place, transfer in enumerate(transfers):
            slabs.setdefault(id(transfer.slot.slab), (transfer.slot.slab, []))[1].append((place, transfer))
        stand_ins: dict[int, MappedSlab] = {}
        for key, (slab, inside) in slabs.items():
            assert slab.buffer is not None
            memory: Any = WatchedMemory(slab.buffer, inside, self._halts, loads=loads)
            stand_ins[key] = MappedSlab(slab.kind, slab.device, slab.nbytes, slab.address, buffer=memory)
        return [
            transfer._replace(slot=transfer.slot._replace(slab=stand_ins[id(transfer.slot.slab)])) for transfer in transfers
        ]


def stopped(pid: int) -> bool:
    """Whether a process stands still after SIGSTOP."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


def redirect_output(path: str) -> None:
    """Let this process write what it would print to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def exit_now() -> None:
    """End this process without any clean-up, as a kill would."""
    os._exit(1)
