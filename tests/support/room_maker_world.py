"""Two slabs, emulated VRAM and host memory, and a manager that hands out plans made by hand."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

from support.emulated_vram import GPU, EmulatedVram
from support.paged import spec_for

from vcache.cache.buffers import BufferPool
from vcache.cache.pool import ChunkPool
from vcache.cache.room_maker import RoomMaker
from vcache.cache.storage_writer import Spiller
from vcache.errors import VCacheError
from vcache.keys import CacheKey
from vcache.manager.api import Listener, Move, MovePlan, PromotionWanted, PutGrant, RoomWanted, Spill, SpillPlan, Ticket
from vcache.metrics import EngineMetrics
from vcache.segment.gate import Gate
from vcache.segment.host import HostBacking
from vcache.segment.mapping import SegmentMap
from vcache.segment.slots import (
    HEADER_BYTES,
    SegmentInfo,
    SlabHeader,
    SlabInfo,
    SlotHeader,
    SlotLocation,
    slab_bytes_for,
    slab_geometry,
)
from vcache.storage.base import StorageTier
from vcache.storage.values import TRAILER_BYTES, is_intact, value_bytes

SLOTS = 8
SLOT_BYTES = 4096
TOKENS = 16
VRAM, DRAM = 1, 2
FORMAT = 1000
"""Format generation of both slabs."""
NAMESPACE = b"n" * 16


class PlannedManager:
    """As much of `Manager` as a `RoomMaker` uses. `plans`: what `demote` and `spill` answer, in order; an exception is
    raised; nothing left: an empty plan."""

    def __init__(self) -> None:
        self.client_id = b"c" * 16
        self.epoch = 10
        self.move_plans: list[MovePlan | VCacheError] = []
        self.spill_plans: list[SpillPlan | VCacheError] = []
        self.refuse: set[bytes] = set()
        self.fail: dict[str, VCacheError] = {}
        self.calls: list[tuple[str, Any]] = []
        self.pool: ChunkPool | None = None
        self.writes_seen: list[bool] = []
        """Whether the gate was shut, at each call that concerns moves."""
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def want_room(self) -> None:
        for listener in self._listeners:
            listener.on_push(RoomWanted())

    def want_promotion(self) -> None:
        for listener in self._listeners:
            listener.on_push(PromotionWanted())

    def of(self, verb: str) -> list[Any]:
        return [argument for name, argument in self.calls if name == verb]

    def _hear(self, verb: str, argument: Any) -> None:
        self.calls.append((verb, argument))
        if verb in ("demote", "promote", "put_end", "put_revoke"):
            assert self.pool is not None
            self.writes_seen.append(not self.pool.no_writes())
        if verb in self.fail:
            raise self.fail[verb]

    def demote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        self._hear("demote", (nbytes, list(avoid)))
        return self._next(self.move_plans, MovePlan())

    def promote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        self._hear("promote", (nbytes, list(avoid)))
        return self._next(self.move_plans, MovePlan())

    def spill(self, nbytes: int, avoid: Sequence[int] = ()) -> SpillPlan:
        self._hear("spill", (nbytes, list(avoid)))
        return self._next(self.spill_plans, SpillPlan())

    def spilled(self, lease: int, keys: Sequence[bytes]) -> None:
        self._hear("spilled", (lease, list(keys)))

    def put_end(self, tickets: Sequence[Ticket]) -> list[bool]:
        self._hear("put_end", list(tickets))
        return [ticket.key not in self.refuse for ticket in tickets]

    def put_revoke(self, tickets: Sequence[Ticket]) -> None:
        self._hear("put_revoke", list(tickets))

    def release(self, lease: int) -> None:
        self._hear("release", lease)

    @staticmethod
    def _next(plans: list[Any], empty: Any) -> Any:
        plan = plans.pop(0) if plans else empty
        if isinstance(plan, VCacheError):
            raise plan
        return plan


class World:
    def __init__(self) -> None:
        self.manager = PlannedManager()
        self.vram = EmulatedVram()
        self.dram = HostBacking()
        self.nbytes = self.dram.physical_bytes(slab_bytes_for(SLOT_BYTES, SLOTS))
        self.geometry = slab_geometry(self.nbytes, SLOT_BYTES)
        self.gate = Gate(self.manager.client_id)
        self.fence = self.gate.renew()
        self.slabs = {VRAM: self.vram.create(self.nbytes), DRAM: self.dram.create(self.nbytes)}
        self.segments = SegmentMap(self.manager.client_id, "here", {})
        for number, backing in ((VRAM, self.vram), (DRAM, self.dram)):
            self._lend(number, backing)
        self.metrics = EngineMetrics()
        self.pool = ChunkPool(self.manager, self.segments, spec_for("2BNHD"), TOKENS, self.metrics)  # type: ignore[arg-type]
        self.manager.pool = self.pool
        self.format(VRAM, FORMAT)
        self.makers: list[RoomMaker] = []
        self._leases = iter(range(1, 1000))

    def _lend(self, number: int, backing: HostBacking) -> None:
        self.slabs[number].gate = self.gate.own
        uuid = bytes([number]) * 16
        self.segments.add_local(uuid, lambda index, slab=self.slabs[number]: slab, backing)
        info = SegmentInfo(
            uuid=uuid,
            kind=backing.kind,
            host="here",
            device=GPU if number == VRAM else "host",
            broker="",
            owner=self.manager.client_id,
            slabs=(SlabInfo(0, self.nbytes),),
            number=number,
        )
        self.segments.update(info)

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self, number: int) -> memoryview:
        buffer = self.slabs[number].buffer
        assert buffer is not None
        return buffer

    def format(self, number: int, generation: int) -> None:
        self.memory(number)[:HEADER_BYTES] = self.slab_header(generation).pack()

    def slab_header(self, generation: int = FORMAT) -> SlabHeader:
        return SlabHeader(generation, SLOT_BYTES, self.geometry.slots)

    def header(self, number: int, slot: int) -> SlotHeader | None:
        start = self.geometry.header_offset(slot)
        return SlotHeader.unpack(self.memory(number)[start : start + HEADER_BYTES])

    def set_header(self, number: int, slot: int, header: SlotHeader) -> None:
        start = self.geometry.header_offset(slot)
        self.memory(number)[start : start + HEADER_BYTES] = header.pack()

    def payload(self, number: int, slot: int, nbytes: int = SLOT_BYTES) -> bytes:
        start = self.geometry.payload_offset(slot)
        return bytes(self.memory(number)[start : start + nbytes])

    def fill(self, number: int, slot: int, **changes: Any) -> SlotHeader:
        """A complete chunk in a slot, as a writer leaves it: payload random, but the same for the same slot and key."""
        fields: dict[str, Any] = {
            "shard": 0,
            "num_shards": 1,
            "generation": FORMAT + 100 + 2 * slot,
            "key": bytes([slot]) * 16,
            "namespace": NAMESPACE,
            "payload_bytes": SLOT_BYTES - 128,
            "tokens": TOKENS,
            "chunk_index": slot,
        }
        header = SlotHeader(**{**fields, **changes})
        start = self.geometry.payload_offset(slot)
        self.memory(number)[start : start + SLOT_BYTES] = random.Random(header.key + bytes([slot])).randbytes(SLOT_BYTES)
        self.set_header(number, slot, header)
        return header

    # -- plans ---------------------------------------------------------------------------------------------------------

    def location(self, number: int, slot: int, generation: int, tokens: int = TOKENS, slot_bytes: int = 0) -> SlotLocation:
        return SlotLocation(number, 0, tokens, slot, slot_bytes or SLOT_BYTES, generation)

    def move(self, header: SlotHeader, slot: int, target: int, **changes: Any) -> Move:
        """Move the chunk with `header` from a slot of VRAM to slot `target` of host memory."""
        place = self.location(DRAM, target, FORMAT + 500 + 2 * target)
        grant = PutGrant("granted", place, FORMAT, self.geometry.slots, self.fence)
        source = self.location(VRAM, slot, header.generation, header.tokens)
        fields = {"key": header.key, "shard": header.shard, "source": source, "grant": grant, **changes}
        return Move(**fields)

    def plan_moves(self, *moves: Move) -> int:
        lease = next(self._leases)
        self.manager.move_plans.append(MovePlan(lease=lease, moves=list(moves)))
        return lease

    def plan_spills(self, *spills: Spill) -> int:
        lease = next(self._leases)
        self.manager.spill_plans.append(SpillPlan(lease=lease, spills=list(spills)))
        return lease

    def spill(self, header: SlotHeader, number: int, slot: int) -> Spill:
        return Spill(header.key, header.shard, self.location(number, slot, header.generation, header.tokens))

    # -- who makes room ------------------------------------------------------------------------------------------------

    def maker(
        self,
        storage: StorageTier | None = None,
        *,
        demote: bool = True,
        promote: bool = True,
        payload_bytes: int = SLOT_BYTES,
        **more: Any,
    ) -> RoomMaker:
        spiller = None
        if storage is not None:
            buffers = BufferPool(value_bytes(payload_bytes), 2, registry=storage)
            spiller = Spiller(storage, self.segments, buffers, self.metrics)
        maker = RoomMaker(self.pool, self.metrics, demote=demote, promote=promote, spiller=spiller, **more)
        self.makers.append(maker)
        return maker

    def make_room(self, maker: RoomMaker) -> None:
        """Push, and wait for the end of the round."""
        self.manager.want_room()
        assert maker.wait_idle(10)

    def count(self, name: str) -> int:
        return int(self.metrics.snapshot()["counters"][name])

    def close(self) -> None:
        for maker in self.makers:
            maker.close(5)
        self.segments.close()
        for number, backing in ((VRAM, self.vram), (DRAM, self.dram)):
            self.slabs[number].retire()
            backing.release(self.slabs[number])


class Pause:
    """Holds a thread up in the middle of something. Use as `EmulatedVram.amid`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, *arguments: Any) -> None:
        self.reached.set()
        assert self.go_on.wait(10)


def value_of(storage: StorageTier, header: SlotHeader) -> bytes:
    """What storage holds for a shard: header and payload, whose checksum is right; empty for nothing."""
    buffer = memoryview(bytearray(2 * SLOT_BYTES))
    size = storage.get([CacheKey(header.namespace, header.key)], header.shard, [buffer])[0]
    assert size < 0 or is_intact(buffer[:size])
    return bytes(buffer[: max(size - TRAILER_BYTES, 0)])
