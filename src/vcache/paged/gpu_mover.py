"""The mover for paged caches on a GPU: three kernel launches per request, whatever its size and the mix of its slots, and some
more for each batch of slots in host memory, which go through a ring (`host_ring.py`) when they are many bytes.

A store waits for the caller's current stream and runs on a low-priority stream of the mover; a load waits likewise and runs on
a second one. The host never waits for the device, except in `Transfer.wait`. Under TRITON_INTERPRET=1 the same kernels serve
CPU tensors, one call at a time, which is how they are tested without a GPU.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton

from ..errors import ArgumentError, DeviceUnavailableError
from ..segment.mapping import MappedSlab, PinnedSlot
from ..segment.slots import HEADER_BYTES, SlotHeader, align_up
from . import checksum_kernels, kernels
from .checks import check_transfers
from .columns import SlotColumns
from .copy_engine import Copies, InstantQueue, StreamQueue, WorkQueue
from .gpu_staging import Table, TablePool
from .host_ring import HostRing
from .launch import CacheLaunches, Launch
from .layout import PagedCache
from .mover import Mover, Outcome, SlotTransfer, Transfer
from .tiling import alignment, tiling

LOCAL_PROGRAMS_PER_SM = 3
"""Enough to saturate the GPU's memory."""
PEER_PROGRAMS_PER_SM = 1
"""Fills NVLink: on two H200, 16 KiB pages, 32 / 64 / 132 programs read 301 / 367 / 372 GB/s where a peer copy makes 393."""
HOST_STORE_PROGRAMS = 32
"""More than PCIe takes; more would only disturb what else the GPU does."""
HOST_LOAD_PROGRAMS = 16
"""Likewise: on an H200, 16 / 32 / 64 programs read 51 GB/s, and decoding beside them loses 12 / 18 / 21%."""
RING_FROM = 2**20
"""Bytes of a request in host memory from which on they go through a ring: less is over within a time slice. To be measured."""
STORE_SHARE = 2
"""Half of the staging memory is for stores, the rest for loads. What a ring holds is what copy engines can do in another
process's time slice: beside one, on an H200, a store of 1.25 GiB through 64 MiB took 55 ms, a load through 192 MiB 28 ms."""
TILE_UNITS = 1024
"""With units of 16 bytes, a tile is 16 KiB, of which each thread moves 64 bytes."""
INTERPRETED_PROGRAMS = 2
INTERPRETED_TILE_UNITS = 128
"""So that even the small caches of tests take several tiles."""
_KEEP_PROGRAMS = 16
"""Of the kernel that has nothing to do."""
_NOBODY = bytes(16)

logger = logging.getLogger(__name__)


class _Lane:
    """A stream and its tables."""

    def __init__(self, device: torch.device, *, priority: int, blocking: bool) -> None:
        """`blocking`: the host sleeps while it waits, and transfers are timed. It then wakes some 0.3 ms late; otherwise it
        spins."""
        self.stream: Any = None
        self.handle = 0
        self._blocking = blocking
        self._device = device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=priority)
            self.handle = self.stream.cuda_stream
            self._caller = torch.cuda.Event()
        self.tables = TablePool(device, self.current)

    def current(self) -> Any:
        """Context in which this lane's stream is current."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow(self) -> None:
        """What is queued here from now on comes after all that the caller's current stream has now."""
        if self.stream is not None:
            # One event serves all calls: a wait is for what the event stands for when it is queued.
            self._caller.record(torch.cuda.current_stream(self._device))
            self.stream.wait_event(self._caller)

    def drain(self) -> None:
        """Block until all that is queued here is over."""
        if self.stream is not None:
            self.stream.synchronize()

    def mark(self) -> Any:
        """An event behind everything queued on this lane; None without a stream, where all is done by now."""
        if self.stream is None:
            return None
        event = torch.cuda.Event(enable_timing=self._blocking, blocking=self._blocking)
        event.record(self.stream)
        return event


class GpuMover(Mover):
    """Reads and writes slots in place through `MappedSlab.device_address`: own VRAM, peer VRAM and pinned host memory, in any
    mix. Thread-safe. One per cache; holds three streams and a few small buffers, and from the first larger transfer of slots in
    host memory on, rings of VRAM with a stream each."""

    def __init__(self, device: torch.device, *, grid: int = 0, staging: int = 0, ring_from: int = RING_FROM) -> None:
        """`grid`: programs of the moving kernel's launch; 0 = chosen by where the slots lie. `staging`: bytes of the
        rings, 0 for none. `ring_from`: bytes of a request in host memory from which on they go through a ring.

        Raises `DeviceUnavailableError` for a CPU device unless Triton runs interpreted.
        """
        self.device = device
        self._system = device.type == "cuda"
        if not self._system and isinstance(kernels.move, triton.JITFunction):
            raise DeviceUnavailableError(f"CUDA mover on {device}: only for tests, with TRITON_INTERPRET=1 in the environment")
        self._grid = grid
        self._uuid, self._processors = "", 1
        if self._system:
            properties = torch.cuda.get_device_properties(device)
            self._uuid, self._processors = f"GPU-{properties.uuid}", properties.multi_processor_count
        # By direction: True stores, in the background; somebody waits for a load. 0 is the lowest priority that CUDA has.
        self._lanes = {
            True: _Lane(device, priority=0, blocking=True),
            False: _Lane(device, priority=-1, blocking=False),
        }
        self._setup = _Lane(device, priority=0, blocking=False)
        self._lock = threading.Lock()
        self._add_up = Launch(checksum_kernels.add_up, {}, warps=4)
        self._compare = {store: Launch(checksum_kernels.compare, {"STORE": store}, warps=1) for store in (True, False)}
        self._keep = Launch(kernels.keep, {}, warps=8)
        self._ring_bytes = {True: staging // STORE_SHARE, False: staging - staging // STORE_SHARE}
        self._ring_from = max(1, ring_from)
        self._rings: dict[bool, HostRing | None] = {}
        """By direction, from the first use on; None where there was no memory for one."""
        self._shapes: WeakKeyDictionary[PagedCache, dict[int, CacheLaunches]] = WeakKeyDictionary()

    def reaches(self, slab: MappedSlab) -> bool:
        return slab.device_address != 0

    def prepare(self, cache: PagedCache) -> None:
        """Compile and load the kernels for `cache`, so that the first transfer need not; neither reads nor writes the cache.
        Blocks: seconds the first time on a machine, then milliseconds."""
        nbytes = align_up(HEADER_BYTES + cache.spec.token_bytes, HEADER_BYTES)
        scratch = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        slab = MappedSlab("cuda", self._uuid, nbytes, scratch.data_ptr(), device_address=scratch.data_ptr())
        # A header that is newer than the store's and not the load's: both leave the payload alone.
        ticket = SlotHeader(0, 1, 2, _NOBODY, _NOBODY, cache.spec.token_bytes, 1, 0)
        newer = bytearray(ticket._replace(generation=4).pack())
        scratch[:HEADER_BYTES] = torch.frombuffer(newer, dtype=torch.uint8).to(self.device)
        mapping = torch.zeros(1, dtype=torch.int64, device=self.device)
        transfer = SlotTransfer(PinnedSlot(slab, 0, HEADER_BYTES), ticket, 0)
        for started in (self.store(cache, mapping, [transfer], _NOBODY), self.load(cache, mapping, [transfer])):
            started.wait()
        if self._ring_bytes[True]:
            with self._on_device(), self._setup.current():
                table = torch.zeros(kernels.PARAMS.value, dtype=torch.int64, device=self.device)
                self._keep(1, self._setup.handle, table, 0, 0)

    def store(
        self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer], writer: bytes
    ) -> GpuTransfer:
        return self._start(cache, slot_mapping, transfers, writer, True)

    def load(self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> GpuTransfer:
        return self._start(cache, slot_mapping, transfers, _NOBODY, False)

    def _start(
        self, cache: PagedCache, slot_mapping: torch.Tensor, transfers: Sequence[SlotTransfer], writer: bytes, store: bool
    ) -> GpuTransfer:
        cache.check_slot_mapping(slot_mapping, slot_mapping.numel())
        slots = SlotColumns.of(transfers)
        check_transfers(cache, slot_mapping, slots, self.reaches)
        if slot_mapping.device.type != "cpu" and slot_mapping.device != self.device:
            raise ArgumentError(f"slot_mapping: on {slot_mapping.device}, but kvcaches are on {self.device}")
        if not transfers:
            return GpuTransfer(None, None, 0, cache.num_slots)
        with self._lock, self._on_device():
            try:
                return self._enqueue(cache, slot_mapping, slots, writer, store)
            except BaseException:
                # Some kernels may be queued, and whoever hears of the failure takes all as ended.
                self._lanes[store].drain()
                ring = self._rings.get(store)
                if ring is not None:
                    ring.drain()
                raise

    def _enqueue(
        self, cache: PagedCache, slot_mapping: torch.Tensor, slots: SlotColumns, writer: bytes, store: bool
    ) -> GpuTransfer:
        lane, count = self._lanes[store], len(slots)
        ring = self._ring(slots, store)
        route = None if ring is None else ring.route(slots)
        if route is not None:
            slots = slots.take(route.order)
        lane.follow()
        begin = lane.mark() if store else None
        table = lane.tables.take(count, kernels.PARAMS.value + (kernels.CHUNK.value + 3) * count + 1 + len(slot_mapping))
        extent = table.fill(slots, store)
        shape = self._shape(cache, extent.addresses)
        tiles = shape.tiling.tiles(extent.tokens)
        if route is not None:
            table.divert(route.direct, route.places)
        table.finish(
            extent,
            slot_mapping,
            tiles=tiles,
            num_slots=cache.num_slots,
            writer=writer,
            stream=lane.handle,
            homes=route.homes if route is not None and store else (),
        )
        narrow = slot_mapping.dtype == torch.int32 and slot_mapping.device.type != "cpu"
        launches = shape.launches(store, narrow)
        warm = launches.warm and (route is None or not store or self._keep.warm)

        def move(first: int, chunks: int, devices: set[str]) -> None:
            most = self._programs(devices, store)
            launches.move(
                min(most, tiles * len(cache.regions) * chunks), lane.handle, table.device, shape.regions, first, chunks
            )
            if extent.trailers:
                with lane.current():
                    self._add_up(min(most, extent.blocks * chunks), lane.handle, table.device, first, chunks)

        with nullcontext() if warm else lane.current():
            launches.announce(count, lane.handle, table.device)
            if route is None:
                move(0, count, extent.devices)
            else:
                assert ring is not None
                if route.direct:
                    move(0, route.direct, slots[: route.direct].devices)
                for batch in route.batches:
                    ring.begin(batch)
                    move(batch.first, batch.chunks, {self._uuid})
                    if store:
                        self._keep(_KEEP_PROGRAMS, lane.handle, table.device, batch.first, batch.chunks)
                    ring.end(batch)
                ring.settle()
            if extent.trailers:
                with lane.current():
                    self._compare[store](count, lane.handle, table.device)
            launches.publish(count, lane.handle, table.device)
        table.event = lane.mark()
        transfer = GpuTransfer(
            table, table.event, count, cache.num_slots, begin, None if route is None else route.order.tolist()
        )
        table.owner, table.keep = weakref.ref(transfer), (cache, slot_mapping, shape, ring)
        lane.tables.put(table)
        return transfer

    def _ring(self, slots: SlotColumns, store: bool) -> HostRing | None:
        """The ring for a request; None when kernels are to move all of it in place."""
        nbytes = self._ring_bytes[store]
        if not nbytes or int(slots.headers["payload_bytes"][slots.in_host_memory].sum()) < self._ring_from:
            return None
        if store not in self._rings:
            self._rings[store] = self._make_ring(nbytes, store)
        return self._rings[store]

    def _make_ring(self, nbytes: int, store: bool) -> HostRing | None:
        lane: WorkQueue = InstantQueue()
        copies: WorkQueue = InstantQueue()
        stream = None
        if self._system:
            stream = torch.cuda.Stream(self.device, priority=0 if store else -1)
            lane, copies = StreamQueue(self._lanes[store].stream), StreamQueue(stream, Copies())
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            logger.warning(
                "no %.0f MiB of VRAM for %s of host memory by copy engines, kernels move them in place: %s",
                nbytes / 2**20,
                "stores" if store else "loads",
                str(error).partition(". ")[0],
            )
            return None
        if stream is not None:
            # Whoever gets this memory after the ring is gone comes after what is queued on either stream.
            memory.record_stream(self._lanes[store].stream)
        return HostRing(lane, copies, memory.data_ptr(), nbytes, store=store, owner=memory)

    def _on_device(self) -> Any:
        """Context in which this mover's GPU is current, as launches and copies by handle need."""
        if not self._system or torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def _shape(self, cache: PagedCache, addresses: int) -> CacheLaunches:
        """For payloads at these addresses (or-ed)."""
        unit = addresses & -addresses if addresses & 15 else 16
        known = self._shapes.setdefault(cache, {})
        if unit not in known:
            shape = tiling(cache, min(unit, alignment(cache)), TILE_UNITS if self._system else INTERPRETED_TILE_UNITS)
            rows = [
                [r.address, *(s // shape.unit_bytes for s in (r.block_stride, r.token_stride, r.piece_stride, r.half_stride))]
                for r in cache.regions
            ]
            with self._setup.current():  # the host waits for this copy: not on a stream that has other work
                regions = torch.tensor(rows, dtype=torch.int64).to(self.device)
            known[unit] = CacheLaunches(cache, shape, regions, self._system)
        return known[unit]

    def _programs(self, devices: set[str], store: bool) -> int:
        if self._grid:
            return self._grid
        if not self._system:
            return INTERPRETED_PROGRAMS
        if "host" in devices:
            return HOST_STORE_PROGRAMS if store else HOST_LOAD_PROGRAMS
        return (LOCAL_PROGRAMS_PER_SM if devices == {self._uuid} else PEER_PROGRAMS_PER_SM) * self._processors


class GpuTransfer(Transfer):
    """A request on its way. `event`: the `torch.cuda.Event` behind its last kernel; None when there is nothing to wait for."""

    def __init__(
        self,
        table: Table | None,
        event: Any,
        count: int,
        num_slots: int,
        begin: Any = None,
        order: Sequence[int] | None = None,
    ) -> None:
        """`begin`: an event before its first kernel, when both were made to take times. `order`: which of the request's
        transfers each row of the table is; None when they are the same."""
        self.event = event
        self._begin = begin
        self._lock = threading.Lock()
        self._table = table
        self._count = count
        self._num_slots = num_slots
        self._order = order
        self._results: list[tuple[int, int]] = []
        self._failure: BaseException | None = None
        if event is None:
            self.settle()

    def done(self) -> bool:
        if self._table is None:
            return True
        try:
            if self.event is not None and not self.event.query():
                return False
        except RuntimeError as error:  # how torch reports that the device failed
            self._fail(error)
            return True
        self.settle()
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """As `Transfer.wait`. Raises `ArgumentError` when slots were out of range, `DeviceUnavailableError` when the GPU
        failed."""
        if timeout is None:
            self._synchronize()
        else:
            # CUDA has no wait with a time limit: look again after a twentieth of the time waited so far.
            began, pause = time.monotonic(), 20e-6
            while not self.done():
                waited = time.monotonic() - began
                if waited >= timeout:
                    return False
                time.sleep(min(pause, timeout - waited))
                pause = min(max(20e-6, waited / 20), 1e-3)
        if self._failure is not None:
            raise DeviceUnavailableError(f"transfer failed on the GPU: {self._failure}") from self._failure
        outside = sum(number for _, number in self._results)
        if outside:
            raise ArgumentError(f"slot_mapping: {outside} slots are outside of the cache's [0, {self._num_slots})")
        return True

    @property
    def seconds(self) -> float:
        """As `Transfer.seconds`: of stores, by the GPU's clock."""
        if self._begin is None or not self.done() or self._failure is not None:
            return 0.0
        return float(self._begin.elapsed_time(self.event)) / 1e3

    def verified(self) -> list[bool]:
        """As `Transfer.verified`. Raises `ArgumentError` before `done`."""
        if not self.done():
            raise ArgumentError("transfer: verified() asked before it is done")
        return [outcome == Outcome.VERIFIED for outcome, _ in self._results]

    def damaged(self) -> list[int]:
        return [place for place, (outcome, _) in enumerate(self._results) if outcome == Outcome.DAMAGED]

    def wait_stream(self, stream: torch.cuda.Stream) -> None:
        """Let everything queued on `stream` from now on come after this transfer. Does not block the host."""
        if self.event is not None:
            stream.wait_event(self.event)

    def settle(self) -> None:
        """Fetch the results; only after the event. The mover calls it before it reuses the table."""
        with self._lock:
            if self._table is not None:
                rows, self._table = self._table.read(self._count), None
                self._results = rows
                if self._order is not None:
                    self._results = [row for _, row in sorted(zip(self._order, rows, strict=True))]

    def _synchronize(self) -> None:
        try:
            if self._table is not None and self.event is not None:
                self.event.synchronize()
        except RuntimeError as error:
            self._fail(error)
        self.done()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure, self._table, self._results = error, None, [(0, 0)] * self._count
