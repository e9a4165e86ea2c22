"""Real writers, lenders and managers over memory of which every access is a step: the real pool, movers, gates, inventory and
directory. Only what carries messages, maps slabs and hands out file descriptors is made up."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from stepping import Agent, Scheduler, SteppedLock, SteppedMemory, SteppedWords
from support.paged import Paged, spec_for

from vcache.cache.pool import ChunkPool
from vcache.cache.room_maker import RoomMaker
from vcache.config import ManagerConfig
from vcache.errors import ManagerUnavailableError
from vcache.keys import Chunk
from vcache.lender.lender import Lender
from vcache.lender.orphans import Orphans
from vcache.lender.slabs import LentSlab, LentSlabs
from vcache.manager.api import (
    Acquire,
    AcquireReply,
    ImporterGone,
    Mount,
    Move,
    PutEnd,
    PutGrant,
    PutRequest,
    PutRevoke,
    PutStart,
    R,
    Release,
    SessionInfo,
    Ticket,
    Verb,
    Wiped,
    WritersLeft,
)
from vcache.manager.directory.directory import Directory
from vcache.manager.directory.jobs import Job
from vcache.manager.directory.reading import PackedReply
from vcache.metrics import EngineMetrics
from vcache.paged import cpu_mover
from vcache.paged.layout import PagedCache
from vcache.paged.mover import Rows, Target
from vcache.segment.gate import QUARANTINE, Gate, WriteGate
from vcache.segment.mapping import MappedSlab, PinnedSlab, PinnedSlot
from vcache.segment.slots import HEADER_BYTES, SegmentInfo, SlabInfo, SlotHeader, SlotLocation, slab_bytes_for, slab_geometry

T = TypeVar("T")
TOKENS = 4
SPEC = spec_for("2BNHD", "uint8", layers=1, heads=1, head_size=64)
SLOT_BYTES = SPEC.payload_bytes(TOKENS)
CONFIG = ManagerConfig(quarantine=1.0, ticket_ttl=30.0, session_timeout=1e6, lease_ttl=5.0)


def client_id(name: str) -> bytes:
    return name.encode().ljust(16, b".")


class Process:
    """A client: its session, its map of segments, its mappings. The `Manager` and the `SegmentMap` of what runs in it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.client_id = client_id(name)
        self.directory: Directory | None = None
        """That it said hello to."""
        self.epoch = 0
        self.numbers: dict[int, int] = {}
        """Its map: number of a segment -> which. Changes when it hears of it, not when the manager does."""
        self.alive = True
        self.closed = False
        self.slabs: list[MappedSlab] = []
        for lender in world.lenders:
            row = lender.gate.admit(self.client_id)
            gate = WriteGate(world.words(lender), row)
            gate._lock = SteppedLock(world.scheduler)  # type: ignore[assignment]
            self.slabs.append(world.mapped(lender, gate))

    # -- manager

    def ask(self, verb: Verb[R]) -> R:
        """One call to the manager; raises `ManagerUnavailableError` without a session."""
        what = re.sub(r"(?<=.)(?=[A-Z])", "_", type(verb).__name__).lower()
        self.world.scheduler.pause(what)
        directory = self.world.directory
        if self.directory is not directory:
            raise ManagerUnavailableError("no session")
        answer: Any = directory.handle(self.client_id, verb, self.world.now)
        if isinstance(answer, Job):
            answer = answer.finish()
        if isinstance(answer, PackedReply):
            answer = answer.unpack()
        self.world.scheduler.pause(f"hears the answer to {what}")
        return answer

    def put_start(self, request: PutRequest) -> list[PutGrant]:
        grants = self.ask(PutStart(request))
        for key, grant in zip(request.keys, grants, strict=True):
            if grant.location is not None:
                self.world.tickets[key] = self.epoch
        return grants

    def put_end(self, tickets: list[Ticket]) -> list[bool]:
        return self.ask(PutEnd(tickets))

    def put_revoke(self, tickets: list[Ticket]) -> None:
        self.ask(PutRevoke(tickets))

    def acquire(self, keys: list[bytes], shard: int, *, lease: int = 0, within: float | None = None) -> AcquireReply:
        return self.ask(Acquire(keys, shard, lease))

    def release(self, lease: int) -> None:
        self.ask(Release(lease))

    def mount(self, info: SegmentInfo, inventory: Any, report: Any) -> int:
        return self.ask(Mount(info, list(inventory), report))

    def writers_left(self, uuid: bytes, writers: Any, undone: Any) -> None:
        self.ask(WritersLeft(uuid, list(writers), list(undone)))

    def importer_gone(self, uuid: bytes, importer: bytes) -> None:
        self.ask(ImporterGone(uuid, importer))

    def wiped(self, token: int) -> None:
        self.ask(Wiped(token))

    def hello(self, role: str = "engine") -> None:
        self.directory = self.world.directory
        self.epoch = self.directory.epoch
        self.directory.open_session(self.client_id, self.name, role, self.world.now, host="h")  # type: ignore[arg-type]

    def learn(self) -> None:
        """Hear which segment has which number."""
        self.numbers = dict(self.world.numbers())

    # -- slabs

    def pin(self, location: SlotLocation) -> PinnedSlot | None:
        which = self.numbers.get(location.segment)
        if which is None or not self.slabs[which].pin():
            return None
        geometry = slab_geometry(self.slabs[which].nbytes, location.slot_bytes)
        return PinnedSlot(self.slabs[which], geometry.header_offset(location.slot), geometry.payload_offset(location.slot))

    def pin_slab(self, location: SlotLocation) -> PinnedSlab | None:
        slot = self.pin(location)
        return None if slot is None else PinnedSlab(slot.slab, slab_geometry(slot.slab.nbytes, location.slot_bytes))

    def unpin(self, slot: PinnedSlot) -> None:
        slot.slab.unpin()

    def unpin_all(self, slabs: Iterable[MappedSlab]) -> None:
        for slab in slabs:
            slab.unpin()

    def unreachable(self) -> list[int]:
        return []

    def read(self, slab: MappedSlab, offset: int, nbytes: int) -> bytes:
        assert slab.buffer is not None
        return bytes(slab.buffer[offset : offset + nbytes])

    def read_into(self, slab: MappedSlab, offset: int, out: memoryview) -> None:
        assert slab.buffer is not None
        half = len(out) // 2
        for start in (0, half):
            self.world.scheduler.pause(f"copies payload of {SLOT_BYTES} bytes from {start} on")
            out[start : start + half] = slab.buffer[offset + start : offset + start + half]

    def write(self, slab: MappedSlab, offset: int, data: bytes) -> None:
        assert slab.buffer is not None
        slab.buffer[offset : offset + len(data)] = data  # type: ignore[assignment]


class Writer(Process):
    """Puts chunks, by the pool and a mover, or as a room maker copies a slot."""

    def __init__(self, world: World, name: str, copies: bool = False) -> None:
        super().__init__(world, name)
        self.pool = ChunkPool(self, self, SPEC, TOKENS, EngineMetrics())  # type: ignore[arg-type]
        self.paged = Paged.zeros(SPEC, "2BNHD", 1, TOKENS)
        cache = PagedCache.bind(self.paged.tensors, SPEC)
        self.rows = Rows(Target(cache, cpu_mover.CpuMover()), torch.arange(TOKENS))
        self.copies = copies
        self.budget = 0
        self.stored = 0
        self.agent = world.scheduler.spawn(name, self.run)
        self.listener = world.scheduler.spawn(f"{name}'s listener", self.listen)
        self._heard = 0

    def run(self) -> None:
        scheduler = self.world.scheduler
        while not self.closed:
            scheduler.pause("looks what to do", lambda: self.closed or self.lost or bool(self.budget and self.world.mounted))
            if self.closed:
                break
            if self.lost:
                # As the client does that reconnects: nothing is in flight, and nothing begins before it has its session.
                if self.pool.no_writes():
                    self.hello()
            elif self.budget:
                self.budget -= 1
                key, value = self.world.new_chunk(self.name)
                self.stored += self.copy(key, value) if self.copies else self.put(key, value)
        scheduler.pause("exits")
        self.world.buried(self)

    def listen(self) -> None:
        while True:
            self.world.scheduler.pause("hears of the segments", lambda: self._heard != self.epoch and self.world.mounted)
            self._heard = self.epoch
            self.learn()

    @property
    def lost(self) -> bool:
        return self.directory is not self.world.directory

    def put(self, key: bytes, value: int) -> int:
        self.paged.tensors[0].fill_(value)
        chunk = Chunk(key, 0, TOKENS, 0)
        return len(self.pool.put([chunk], b"", self.rows).result().stored)

    def copy(self, key: bytes, value: int) -> int:
        """As a room maker moves a chunk: from a slot of our own into one with a ticket."""
        with self.pool.writing():
            grants = self.pool._put_start([Chunk(key, 0, TOKENS, 0)], b"", "host")
            location = grants[0].location
            if location is None:
                return 0
            source = slab_geometry(slab_bytes_for(SLOT_BYTES, 1), SLOT_BYTES)
            raw = bytearray(slab_bytes_for(SLOT_BYTES, 1))
            header = self.pool.header(Chunk(key, 0, TOKENS, 0), 2)
            raw[HEADER_BYTES : 2 * HEADER_BYTES] = header.pack()
            raw[source.payload_base :] = bytes([value]) * (len(raw) - source.payload_base)
            self.slabs.append(MappedSlab("host", "host", len(raw), 4096, buffer=memoryview(raw)))
            self.numbers[0] = len(self.slabs) - 1
            move = Move(key, 0, SlotLocation(0, 0, TOKENS, 0, SLOT_BYTES, 2), grants[0])
            maker = RoomMaker.__new__(RoomMaker)
            maker._pool, maker._metrics = self.pool, self.pool.metrics
            nbytes = maker._copy_one(move)
            ticket = Ticket(key, 0, location.generation)
            try:
                if nbytes:
                    return sum(self.put_end([ticket]))
                self.put_revoke([ticket])
            except ManagerUnavailableError:
                pass
            return 0


class SteppedLender(Lender):
    """The real lender, but for its threads, its broker and its backing."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.uuid = client_id(f"segment {number}")
        self.raw = bytearray(slab_bytes_for(SLOT_BYTES, world.slots))
        self.memory = SteppedMemory(
            world.scheduler, f"slab{number}", self.raw, slab_geometry(len(self.raw), SLOT_BYTES).payload_base
        )
        owner = client_id(f"lender {number}")
        self.gate = self._gate = Gate(owner, lambda: world.now)
        self.words = self._gate._words
        self._gate._words = world.words(self)
        self._gate._lock = SteppedLock(world.scheduler)  # type: ignore[assignment]
        self._lent = LentSlabs.__new__(LentSlabs)
        self._lent._lock = threading.Lock()
        self._lent._slabs = {0: LentSlab(world.mapped(self, None), len(self.raw))}  # type: ignore[arg-type]
        self._changed = threading.Condition()
        self._manager_lock = threading.Lock()
        self._session = None
        self._mounted = False
        self._announced: set[int] = set()
        self._gone: set[bytes] = set()
        self._wipes: list[Any] = []
        self._awaited: set[tuple[bytes, int]] = set()
        self._undone: list[Any] = []
        self._orphans = Orphans(self._lent)
        self._floor = 0
        self._looked = 0.0
        self._work = queue.SimpleQueue()

    def begin(self) -> None:
        self.process = Process(self.world, f"lender {self.number}")
        self._manager = self.process  # type: ignore[assignment]
        self._lent._backing = self.process  # type: ignore[assignment]
        self.agent = self.world.scheduler.spawn(f"lender {self.number}", self.run)

    @property
    def info(self) -> SegmentInfo:
        slab = SlabInfo(0, len(self.raw))
        return SegmentInfo(
            uuid=self.uuid, kind="host", host="h", device="host", broker="", owner=self.process.client_id, slabs=(slab,)
        )

    def _ended(self, writer: bytes) -> bool:
        return writer not in self.world.living

    @property
    def busy(self) -> bool:
        """It has something to do, or looks again whether writers have left, as time goes by."""
        lost = self.process.directory is not self.world.directory or not self._mounted
        return lost or bool(self._gone or self._wipes) or (bool(self._awaited) and self.world.now != self._looked)

    def run(self) -> None:
        while True:
            self.world.scheduler.pause("looks what to do", lambda: self.busy)
            self._looked = self.world.now
            try:
                if self.process.directory is not self.world.directory:
                    self.process.hello("lender")
                    self.on_session(self.world.session(self.process))
                self._tell_manager()
            except ManagerUnavailableError:
                continue


class World:
    """One host. Chunks of one size; every chunk's bytes are all alike, and no two chunks have the same."""

    def __init__(self, slots: int = 1, segments: int = 1) -> None:
        self.scheduler = Scheduler()
        self.now = 100.0
        self.slots = slots
        self.values: dict[bytes, int] = {}
        self.tickets: dict[bytes, int] = {}
        """Key -> epoch of the manager that granted it."""
        self.void: set[bytes] = set()
        """Keys that were still being written, or about to be, when all memory was mounted by a later manager."""
        self.living: set[bytes] = set()
        self.epoch = 0
        self.lenders = [SteppedLender(self, number) for number in range(segments)]
        self.writers: list[Writer] = []
        self.start_manager()
        for lender in self.lenders:
            lender.begin()

    # -- what there is

    def words(self, lender: SteppedLender) -> Any:
        return SteppedWords(self.scheduler, f"gate{lender.number}", lender.words)

    def mapped(self, lender: SteppedLender, gate: WriteGate | None) -> MappedSlab:
        slab = MappedSlab("host", "host", len(lender.raw), 4096, buffer=lender.memory)  # type: ignore[arg-type]
        slab.gate = gate
        return slab

    def writer(self, name: str, budget: int = 1, copies: bool = False) -> Writer:
        writer = Writer(self, name, copies)
        writer.budget = budget
        self.writers.append(writer)
        self.living.add(writer.client_id)
        return writer

    def new_chunk(self, name: str) -> tuple[bytes, int]:
        value = len(self.values) + 1
        key = f"{value:03} {name}".encode().ljust(16, b".")
        self.values[key] = value
        return key, value

    @property
    def mounted(self) -> bool:
        return len(self.directory.segments()) == len(self.lenders)

    def numbers(self) -> dict[int, int]:
        by_uuid = {lender.uuid: lender.number for lender in self.lenders}
        return {info.number: by_uuid[info.uuid] for info in self.directory.segments()}

    def session(self, process: Process) -> Any:
        return SessionInfo(epoch=process.epoch, heartbeat_interval=1.0, session_timeout=1e6)

    # -- what happens

    def start_manager(self, step: int = 1_000_000) -> None:
        """A manager, or the next one. `step`: how much higher its clock stands."""
        self.epoch += step
        self.directory = Directory(CONFIG, epoch=self.epoch, now=self.now)

    def kill(self, writer: Writer) -> None:
        """SIGKILL: it does nothing any more, and its sockets close."""
        writer.alive = False
        writer.agent.over = writer.listener.over = True
        writer.closed = True
        if writer.directory is self.directory:
            self.directory.close_session(writer.client_id, self.now)
        self.scheduler.spawn(f"broker of {writer.name}", lambda: self.buried(writer))

    def buried(self, writer: Writer) -> None:
        """Its sockets have closed."""
        writer.listener.over = True
        self.living.discard(writer.client_id)
        for lender in self.lenders:
            lender.gate.hung_up(writer.client_id)
            lender._importer_gone(writer.client_id)

    def close(self, writer: Writer) -> None:
        """Its session ends in order, as the client does it: Goodbye if nothing is in flight."""
        writer.closed = True
        if writer.directory is self.directory:
            self.directory.close_session(writer.client_id, self.now, goodbye=writer.pool.no_writes())
        writer.directory = None

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.directory.tick(self.now)

    # -- running

    def step(self, agent: Agent) -> None:
        self.scheduler.step(agent)
        self.deliver()
        self.check()

    def deliver(self) -> None:
        """What the manager has to say to lenders."""
        for target, push in self.directory.take_instructions():
            for lender in self.lenders:
                if target == lender.process.client_id and lender.process.directory is self.directory and push is not None:
                    lender.on_push(push)

    def settle(self, *agents: Agent) -> None:
        """Let these (default: all) do whatever they can do."""
        for _ in range(100_000):
            ready = [agent for agent in agents or self.scheduler.agents if agent.ready]
            if not ready:
                return
            for agent in ready:
                self.step(agent)
        raise AssertionError("it goes on for ever")

    def until(self, agent: Agent, text: str) -> None:
        """Let an agent do all before its step `text`."""
        while agent.at != text:
            assert agent.ready, f"{agent.name} never {text}; it {agent.at}"
            self.step(agent)

    def check(self) -> None:
        """No chunk that the manager knows has other bytes than its own, where its header is what a reader demands; and none was
        written by a ticket that was void."""
        which = self.numbers()
        if self.mounted:
            late = [key for key, epoch in self.tickets.items() if epoch != self.epoch and key not in self.void]
            self.void.update(set(late) - self.complete() if late else ())
        for record in self.directory._state.chunks.visible.values():
            for place in record.places():
                raw = self.lenders[which[place.segment]].raw
                geometry = slab_geometry(len(raw), place.slot_bytes)
                at = geometry.header_offset(place.slot)
                header = SlotHeader.unpack(bytes(raw[at : at + HEADER_BYTES]))
                if header is None or (header.key, header.generation) != (record.key, place.generation):
                    continue
                if record.key in self.void:
                    raise AssertionError(f"{record.key!r} is the chunk of a void ticket\n" + self.story())
                start = geometry.payload_offset(place.slot)
                payload = bytes(raw[start : start + header.payload_bytes])
                assert record.namespace is not None
                if header.namespace == record.namespace.name and payload != bytes([self.values[record.key]]) * len(payload):
                    raise AssertionError(f"{record.key!r} has the bytes of {sorted(set(payload))}\n" + self.story())

    def complete(self) -> set[bytes]:
        """Keys of all complete headers that there are."""
        raws = [bytes(lender.raw[at : at + HEADER_BYTES]) for lender in self.lenders for at in self.header_offsets()]
        headers = [SlotHeader.unpack(raw) for raw in raws]
        return {header.key for header in headers if header is not None and not header.is_writing}

    def header_offsets(self) -> range:
        return range(HEADER_BYTES, HEADER_BYTES * (1 + self.slots), HEADER_BYTES)

    def story(self) -> str:
        """What happened, an agent's steps of one kind in a line."""
        lines: list[str] = []
        for line in self.scheduler.trace:
            if not (lines and lines[-1].partition(" ..")[0].rstrip("0123456789[]") == line.rstrip("0123456789[]")):
                lines.append(line)
            elif not lines[-1].endswith(".."):
                lines[-1] += " .."
        return "\n".join(lines)

    def check_alive(self) -> None:
        """Everything that was going on has ended; a client that is new must be able to put in every segment."""
        self.settle()
        for _ in range(2):
            self.advance(max(QUARANTINE, CONFIG.quarantine) + CONFIG.ticket_ttl)
            self.settle()
        for writer in self.writers:
            assert writer.closed or not writer.alive or writer.directory is self.directory, f"{writer.name} has no session"
        fresh = self.writer("fresh", 8 * self.slots * len(self.lenders))
        self.settle()
        assert fresh.stored >= 2 * self.slots, self.story()
        held = {place.segment for record in self.directory._state.chunks.visible.values() for place in record.places()}
        assert len(held) == len(self.lenders), "a segment takes no chunks any more"
        self.directory.check_integrity()
