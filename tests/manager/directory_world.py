"""A small world around a `Directory`: lenders with real bytes in their slabs, writers that follow the header protocol step by
step, readers that verify. It checks the rules as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from directory_model import (
    CONFIG,
    MAX_CHUNKS,
    SLAB_BYTES,
    TOKENS,
    VARIANTS,
    Client,
    Flight,
    Places,
    Slot,
    Variant,
    digest,
    overlap,
    payload_of,
    spans_of,
)
from directory_room import MakingRoom
from driven import Driven

from vcache.config import ManagerConfig
from vcache.manager.api import (
    GateReport,
    GateWriter,
    PromotionWanted,
    PutGrant,
    PutRequest,
    RoomWanted,
    SegmentGone,
    SegmentMounted,
    WipeSlots,
    WriterLost,
)
from vcache.manager.directory.jobs import SLICE, Job
from vcache.segment.slots import (
    HEADER_BYTES,
    SegmentInfo,
    SlabHeader,
    SlabInfo,
    SlotHeader,
    SlotLocation,
    slab_geometry,
)


@dataclass(eq=False)
class Removing:
    """A `remove` or `clear` under way."""

    job: Job
    keys: set[bytes]
    """Those that must be gone at its end."""
    clears: bool
    sure: bool
    """Whether all memory was there when it began."""
    since: int
    """Number of the last removal before."""


class World(MakingRoom):
    def __init__(
        self,
        eviction: str = "sieve",
        engines: int = 2,
        lenders: int = 2,
        slabs: int = 2,
        slice_size: int = SLICE,
        admission: str = "all",
        **options: Any,
    ) -> None:
        """`options`: of the manager, in place of `CONFIG`'s."""
        self.slice_size = slice_size
        self.options = options
        self.eviction, self.admission = eviction, admission
        self.offered: set[tuple[bytes, int]] = set()
        """Shards of chunks that were offered since this manager began."""
        self.now = 1.0
        self.epoch = 1000
        self.clients: list[Client] = []
        self.serial = 0
        self.leases: dict[int, tuple[bytes, float, dict[bytes, Places]]] = {}
        """Number -> client, expiry, places that it protects, by chunk."""
        self.tops: dict[tuple[bytes, int], int] = {}
        self.banned: dict[bytes, bool] = {}
        self.gone: list[Flight] = []
        """Unfinished writes of dead clients."""
        self.unheard: set[tuple[bytes, int, int]] = set()
        """Places that were written, since this manager began, with a ticket of an earlier one, and whose lender has not told
        yet."""
        self.lazy = False
        """Whether mounts and removals are left unfinished, for `work` to go on with."""
        self.removing: list[Removing] = []
        self.start_manager()
        for _ in range(engines):
            self.new_client()
        for number in range(lenders):
            self.new_lender("cuda" if number % 2 == 0 else "host", slabs)
        for client in self.clients:
            self.connect(client)

    # People

    def new_client(self, host: str = "h", remote: bool = False) -> Client:
        self.serial += 1
        client = Client(digest("client", self.serial), host, remote)
        self.clients.append(client)
        return client

    def new_lender(self, kind: str, slabs: int, host: str = "h", endpoint: str = "") -> Client:
        client = self.new_client(host)
        client.uuid, client.kind, client.endpoint = digest("segment", self.serial), kind, endpoint
        for _ in range(slabs):
            self.new_slab(client)
        return client

    def new_slab(self, lender: Client) -> int:
        index = lender.next_slab
        lender.next_slab += 1
        lender.slabs[index] = bytearray(SLAB_BYTES)
        return index

    @property
    def living(self) -> list[Client]:
        return [client for client in self.clients if client.alive]

    @property
    def flights(self) -> list[Flight]:
        """Writes that their writers have not concluded."""
        return [flight for client in self.living for flight in client.flights] + self.gone

    def lender_of(self, uuid: bytes) -> Client | None:
        return next((client for client in self.living if client.uuid == uuid), None)

    def info(self, lender: Client) -> SegmentInfo:
        return SegmentInfo(
            uuid=lender.uuid,
            kind=lender.kind,
            host=lender.host,
            endpoint=lender.endpoint,
            device="host" if lender.kind == "host" else f"GPU-{lender.uuid.hex()[:4]}",
            broker="/b",
            owner=lender.id,
            slabs=tuple(self.slab_info(lender, index) for index in lender.slabs),
        )

    @staticmethod
    def slab_info(lender: Client, index: int) -> SlabInfo:
        """Of lenders with a transfer engine, every second slab is registered with it."""
        return SlabInfo(index, SLAB_BYTES, 4096 + index if lender.endpoint and index % 2 == 0 else 0)

    def reads(self, client: Client, record) -> bool:
        """Whether the client can read all of a visible chunk."""
        infos = {info.number: info for info in self.directory.segments()}
        for place in record.places():
            info = infos[place.segment]
            address = next(slab.address for slab in info.slabs if slab.index == place.slab)
            if client.host not in ("", info.host) and not (client.remote and info.endpoint and address):
                return False
        return True

    def foreign(self, client: Client) -> list[int]:
        """Numbers of segments that the client cannot map."""
        return [info.number for info in self.directory.segments() if info.host != client.host]

    # Manager and sessions

    def start_manager(self) -> None:
        self.epoch += 1_000_000
        config = ManagerConfig(eviction=self.eviction, admission=self.admission, **{**CONFIG, **self.options})
        self.directory = Driven(config, epoch=self.epoch, now=self.now, slice_size=self.slice_size)
        self.offered.clear()

    def restart_manager(self) -> None:
        if self.directory.stats(self.now).gauges["wipes_outstanding"]:
            self.banned.clear()  # the answer to the removal said nothing yet
        self.banned = {key: sure for key, sure in self.banned.items() if sure}
        self.start_manager()
        self.leases.clear()
        self.removing.clear()
        self.unheard.clear()
        # Writes begin with tickets of a manager that is gone, until the lender mounts; what is written stays a complete chunk.
        self.gone = [flight for flight in self.gone if flight.under_way]
        for client in self.living:
            client.flights = [flight for flight in client.flights if flight.phase < 4]
            client.connected = False
            client.wipes.clear()

    def settle(self) -> None:
        """Carry out what the directory instructs, and hear which removals are over."""
        for removing in [removing for removing in self.removing if removing.job.done]:
            self.removing.remove(removing)
            self.removed(removing)
        for target, push in self.directory.take_instructions():
            for client in self.living:
                if target not in (None, client.id) or not client.connected:
                    continue
                if push is None:
                    self.lost_session(client)
                elif isinstance(push, WipeSlots):
                    assert push.segment == client.uuid
                    client.wipes.append(push)
                elif isinstance(push, WriterLost):
                    assert push.segment == client.uuid
                    client.lost[push.client] = None
                elif isinstance(push, RoomWanted):
                    assert target == client.id
                    assert not client.uuid
                    client.room += 1
                elif isinstance(push, PromotionWanted):
                    assert target == client.id
                    assert not client.uuid
                    client.promotion += 1
                elif isinstance(push, SegmentMounted | SegmentGone):
                    assert target is None or isinstance(push, SegmentMounted)

    def lost_session(self, client: Client) -> None:
        """As the client sees it; it may go on writing what it has begun."""
        client.connected = False
        client.wipes.clear()
        if client.uuid:
            # What it was told to zero may stand until it is back, and a manager that restarts meanwhile knows nothing of it.
            self.banned = dict.fromkeys(self.banned, False)
        self.void_leases(lambda lease: lease[0] == client.id)
        self.void_memory(client.uuid)

    def void_leases(self, condition) -> None:
        self.leases = {number: lease for number, lease in self.leases.items() if not condition(lease)}

    def void_memory(self, uuid: bytes, slab: int | None = None) -> None:
        """Leases do not protect what its lender takes away, nor the other shards of such a chunk."""
        for _, _, chunks in self.leases.values():
            for key, places in list(chunks.items()):
                if any(place[0] == uuid and slab in (None, place[1]) for place in places):
                    del chunks[key]

    def connect(self, client: Client) -> None:
        """Hello: wait for our transfers first. Lenders mount at once."""
        if client.connected:
            self.lost_session(client)
        for flight in client.flights:
            if flight.entered:
                while self.write(flight):
                    pass
        client.flights.clear()
        client.silent = False
        role = "lender" if client.uuid else "engine"
        self.directory.open_session(client.id, "c", role, self.now, host=client.host, remote=client.remote)
        client.connected, client.epoch = True, self.epoch
        self.settle()
        if client.uuid:
            self.mount(client)

    def at_risk(self) -> set[bytes]:
        """Visible chunks over which a void ticket's writer may go: the manager before had evicted them."""
        void = [f for f in self.flights if f.under_way and (lender := self.lender_of(f.uuid)) and f.fence != lender.fence]
        found = set()
        for key, record in self.directory._state.chunks.visible.items():
            for (uuid, slab, _), spans in self.places_of(record).items():
                there = [flight for flight in void if (flight.uuid, flight.slab) == (uuid, slab)]
                formats = SlabHeader.unpack(self.lender_of(uuid).slabs[slab][:HEADER_BYTES])
                if any(flight.slab_header != formats or overlap(flight.spans, spans) for flight in there):
                    found.add(key)
        return found

    def mount(self, lender: Client) -> None:
        self.void_memory(lender.uuid)
        lender.wipes.clear()
        self.serial += 1
        lender.fence = self.serial
        lender.awaited = self.writers(lender)
        report = GateReport(fence=lender.fence, writers=tuple(lender.awaited))
        inventory = lender.orphans.inventory(list(lender.slabs), {writer.slab for writer in lender.awaited})
        job = self.directory.begin_mount(lender.id, self.info(lender), inventory, self.now, report)
        if not self.lazy:
            assert job.finish() > 0
        self.settle()

    def writers(self, lender: Client) -> set[GateWriter]:
        """Who is amid a write in which of its slabs."""
        return {GateWriter(f.client, f.slab) for f in self.flights if f.uuid == lender.uuid and f.under_way}

    def look_at_gates(self) -> None:
        """Lenders undo what old tickets wrote, and report who has left. Now and then they do so twice."""
        for lender in self.living:
            busy = {writer.slab for writer in self.writers(lender)}
            left = {writer for writer in lender.awaited if writer.slab not in busy}
            if not left or not lender.connected:
                continue
            slabs = {writer.slab for writer in left}
            undone = [slots for slab in slabs for slots in lender.orphans.undo(slab)]
            for _ in range(1 + len(left) % 2):
                self.directory.writers_left(lender.id, lender.uuid, list(left), self.now, undone)
            lender.awaited -= left
            # From now on what the manager says of these slabs is what stands there.
            self.unheard = {place for place in self.unheard if place[0] != lender.uuid or place[1] not in slabs}

    def work(self, slices: int | None = None) -> None:
        """Go on with mounts and removals, to their end without a number."""
        while self.directory.has_work and slices != 0:
            self.directory.work(self.now)
            self.settle()
            self.directory.check_integrity()
            slices = slices - 1 if slices is not None else None

    def disconnect(self, client: Client) -> None:
        self.directory.close_session(client.id, self.now)
        self.lost_session(client)
        self.settle()

    def goodbye(self, client: Client) -> None:
        for flight in client.flights:
            if flight.entered:
                while self.write(flight):
                    pass
        client.flights.clear()
        self.directory.close_session(client.id, self.now, goodbye=True)
        self.lost_session(client)
        self.bury(client)
        self.settle()

    def kill(self, client: Client) -> None:
        self.directory.close_session(client.id, self.now)
        self.lost_session(client)
        self.gone += client.flights
        self.bury(client)
        self.settle()

    def bury(self, client: Client) -> None:
        client.alive = False
        self.gone = [flight for flight in self.gone if flight.uuid != client.uuid or not client.uuid]
        self.clients.remove(client)

    def importer_gone(self, lender: Client, client: bytes) -> None:
        """The lender's broker saw that a dead process's socket closed."""
        assert client not in [other.id for other in self.living]
        self.directory.importer_gone(lender.id, lender.uuid, client, self.now)
        self.gone = [flight for flight in self.gone if flight.client != client or flight.uuid != lender.uuid]

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for client in self.living:
            if client.connected and not client.silent:
                self.directory.heartbeat(client.id, self.now)
        self.look_at_gates()
        self.directory.tick(self.now)
        self.void_leases(lambda lease: lease[1] <= self.now)
        self.settle()
        deadline = self.directory.next_deadline()
        assert deadline is None or deadline > self.now

    # Writing

    def put(
        self, client: Client, variant: Variant, prompt: int, start: int, count: int, shard: int = 0, **options
    ) -> list[PutGrant]:
        keys = variant.keys(prompt, start + count)
        options["avoid"] = [*options.get("avoid", []), *self.foreign(client)]
        request = PutRequest(
            keys=keys[start:],
            namespace=variant.namespace,
            parent=keys[start - 1] if start else b"",
            first_index=start,
            tokens=[TOKENS] * count,
            slot_bytes=variant.slot_bytes,
            shard=shard,
            num_shards=variant.num_shards,
            **options,
        )
        state = self.directory._state
        before, selective = set(state.chunks.visible), state.admission.selective
        strange = not any((key, shard) in self.offered or key in state.chunks.pending for key in request.keys)
        grants = self.directory.put_start(client.id, request, self.now)
        assert len(grants) == count
        if strange and selective and state.admission.selective:
            assert before <= set(state.chunks.visible), "pushed out by what nobody offered before"
        self.offered.update((key, shard) for key in request.keys)
        for offset, grant in enumerate(grants):
            assert (grant.location is not None) == (grant.status == "granted")
            if grant.location is not None:
                self.banned.pop(request.keys[offset], None)
                for removing in self.removing:
                    removing.keys.discard(request.keys[offset])
                client.flights.append(self.flight(client, variant, request.keys[offset], start + offset, shard, grant))
        self.settle()
        return grants

    def flight(self, client: Client, variant: Variant, key: bytes, index: int, shard: int, grant: PutGrant) -> Flight:
        location = grant.location
        assert location is not None
        header = SlotHeader(
            shard,
            variant.num_shards,
            location.generation,
            key,
            variant.namespace,
            variant.slot_bytes // TOKENS * TOKENS,
            TOKENS,
            index,
        )
        return self.granted(client, header, grant)

    def granted(self, client: Client, header: SlotHeader, grant: PutGrant) -> Flight:
        """What a writer holds in its hand; checks that it may."""
        location = grant.location
        assert location is not None
        info = next(info for info in self.directory.segments() if info.number == location.segment)
        assert info.host == client.host
        allocator = self.directory._state.allocator
        assert not allocator.slab_at(location).unread, "granted among slots whose headers nobody has read"
        slab_header = SlabHeader(grant.format_generation, location.slot_bytes, grant.slots)
        flight = Flight(client.id, info.uuid, header, slab_header, location.slab, location.slot, self.epoch, fence=grant.fence)
        lender = self.lender_of(info.uuid)
        assert lender is not None
        assert grant.fence == lender.fence
        assert slab_geometry(SLAB_BYTES, location.slot_bytes).slots == grant.slots
        assert location.tokens == TOKENS
        # I3: nobody else may be writing there, and no lease may protect it.
        for other in self.flights:
            if (other.uuid, other.slab) != (flight.uuid, flight.slab):
                continue
            assert other.fence == lender.fence or not other.under_way, "I3: granted where an old ticket is written"
            if other.epoch == self.epoch and (other.entered or other.fence == lender.fence):
                assert not overlap(other.spans, flight.spans), "I3: granted while another client may write there"
        for _, _, chunks in self.leases.values():
            for (uuid, slab, _), spans in [place for places in chunks.values() for place in places.items()]:
                if (uuid, slab) == (flight.uuid, flight.slab):
                    assert not overlap(spans, flight.spans), "I3: granted while leased"
        # I4
        place = flight.uuid, flight.slab
        assert location.generation % 2 == 0
        assert location.generation - 1 > max(self.tops.get(place, 0), grant.format_generation), "I4"
        self.tops[place] = location.generation
        return flight

    def enter(self, flight: Flight) -> bool:
        """Through the gate: not with a ticket of an earlier mount. A session that is over keeps nobody back."""
        lender = self.lender_of(flight.uuid)
        flight.entered = flight.entered or (lender is not None and flight.fence == lender.fence)
        return flight.entered

    def write(self, flight: Flight) -> bool:
        """One step of the header protocol. False when done, or when the memory is gone or somebody newer is there."""
        lender = self.lender_of(flight.uuid)
        writer = next((client for client in self.living if client.id == flight.client), None)
        if lender is None or flight.slab not in lender.slabs or writer is None or flight.phase == 4:
            return False
        memory = lender.slabs[flight.slab]
        geometry = slab_geometry(SLAB_BYTES, flight.slab_header.slot_bytes)
        at, payload = geometry.header_offset(flight.slot), geometry.payload_offset(flight.slot)
        odd = flight.header.writing(flight.client).pack()
        content: bytes | None = payload_of(flight.header) if flight.source is None else self.copied(flight.source)
        if content is None:
            return False  # a move whose source is not what it was: it must be revoked
        half = len(content) // 2
        if flight.phase == 0:
            if not self.enter(flight):
                return False
            if memory[:HEADER_BYTES] != flight.slab_header.pack():
                memory[:HEADER_BYTES] = flight.slab_header.pack()
            there = SlotHeader.unpack(memory[at : at + HEADER_BYTES])
            if there is not None and there.generation > flight.header.generation - 1:
                raise AssertionError("a higher generation stands where we may write")
            memory[at : at + HEADER_BYTES] = odd
            if flight.epoch != self.epoch:
                self.unheard.add((flight.uuid, flight.slab, flight.slot))
        elif flight.phase == 1:
            memory[payload : payload + half] = content[:half]
        elif flight.phase == 2:
            memory[payload + half : payload + len(content)] = content[half:]
        else:
            if memory[at : at + HEADER_BYTES] != odd:
                assert flight.epoch != self.epoch, "I3: our header was overwritten while we wrote"
                return False
            memory[at : at + HEADER_BYTES] = flight.header.pack()
        flight.phase += 1
        return True

    def copied(self, source: Slot) -> bytes | None:
        """The payload that a mover finds at its source, if the header is the one that it expects."""
        lender = self.lender_of(source.uuid)
        if lender is None or source.slab not in lender.slabs:
            return None
        memory, geometry = lender.slabs[source.slab], slab_geometry(SLAB_BYTES, source.slot_bytes)
        at, payload = geometry.header_offset(source.slot), geometry.payload_offset(source.slot)
        slab_header = SlabHeader.unpack(memory[:HEADER_BYTES])
        if slab_header is None or slab_header.format_generation >= source.header.generation:
            return None  # formatted anew: the header may be what an earlier format left behind
        if memory[at : at + HEADER_BYTES] != source.header.pack():
            return None
        return bytes(memory[payload : payload + source.header.payload_bytes])

    def finish(self, client: Client, flights: list[Flight]) -> list[bool]:
        """Write all that is left and publish what landed; moves that cannot be completed are revoked."""
        for flight in flights:
            while self.write(flight):
                pass
        landed = [flight for flight in flights if flight.phase == 4]
        for flight in flights:
            lender = self.lender_of(flight.uuid)
            refused = not flight.entered and lender is not None and flight.fence != lender.fence
            if flight.phase < 4 and (flight.source is not None or refused):
                self.revoke(client, flight)
        client.flights = [flight for flight in client.flights if flight not in landed]
        results = self.directory.put_end(client.id, [flight.ticket for flight in landed], self.now)
        for flight, done in zip(landed, results, strict=True):
            if done and flight.source is not None:
                self.moved(flight, flight.source)
        self.settle()
        return results

    def revoke(self, client: Client, flight: Flight) -> None:
        client.flights.remove(flight)
        self.directory.put_revoke(client.id, [flight.ticket], self.now)
        self.settle()

    # Reading

    def acquire(
        self, client: Client, variant: Variant, prompt: int, start: int, count: int, shard: int = 0, lease: int = 0
    ) -> int:
        keys = variant.keys(prompt, start + count)[start:]
        visible = self.directory._state.chunks.visible
        present = next(
            (i for i, key in enumerate(keys) if key not in visible or not self.reads(client, visible[key])), len(keys)
        )
        reply = self.directory.acquire(client.id, keys, shard, lease, self.now)
        if not lease:
            assert len(reply.locations) == (present if shard < variant.num_shards else 0)
            assert (reply.lease != 0) == bool(reply.locations)
            assert reply.lease not in self.leases
        chunks: dict[bytes, Places] = {}
        for key, location in zip(keys, reply.locations, strict=False):
            self.verify(variant.namespace, key, shard, location)
            if not any(removing.clears for removing in self.removing):
                chunks[key] = self.places_of(visible[key])
        if reply.lease and not lease:
            assert reply.expires_in == CONFIG["lease_ttl"]
            self.leases[reply.lease] = (client.id, self.now + reply.expires_in, chunks)
        return reply.lease

    def places_of(self, record) -> Places:
        places: Places = {}
        for place in record.places():
            uuid = next(info.uuid for info in self.directory.segments() if info.number == place.segment)
            places[uuid, place.slab, place.slot] = spans_of(slab_geometry(SLAB_BYTES, place.slot_bytes), place.slot)
        return places

    def release(self, number: int) -> None:
        client, _, _ = self.leases.pop(number)
        self.directory.release(client, number, self.now)
        self.directory.release(client, number, self.now)

    def verify(self, namespace: bytes, key: bytes, shard: int, location: SlotLocation) -> None:
        """I1: what a reader would do."""
        info = next(info for info in self.directory.segments() if info.number == location.segment)
        lender = self.lender_of(info.uuid)
        assert lender is not None
        memory = lender.slabs[location.slab]
        geometry = slab_geometry(SLAB_BYTES, location.slot_bytes)
        at, payload = geometry.header_offset(location.slot), geometry.payload_offset(location.slot)
        header = SlotHeader.unpack(memory[at : at + HEADER_BYTES])
        found = (header.key, header.generation) if header is not None else None
        if found != (key, location.generation) and (info.uuid, location.slab, location.slot) in self.unheard:
            return  # Whoever passed the gate before the mount may write after it: a reader finds another header, a miss.
        assert header is not None, "I1: no header"
        assert (header.key, header.namespace, header.shard, header.generation) == (
            key,
            namespace,
            shard,
            location.generation,
        ), "I1"
        assert memory[payload : payload + header.payload_bytes] == payload_of(header), "I1: payload"

    def verify_all(self) -> None:
        for record in self.directory._state.chunks.visible.values():
            assert record.namespace is not None
            for shard, place in enumerate(record.places()):
                self.verify(record.namespace.name, record.key, shard, place)
            assert record.key not in self.banned, "a removed chunk came back"

    # Removing and resizing

    def written(self) -> set[bytes]:
        """Keys that somebody writes with a ticket of this manager: a removal may pass them by. A move is no write: its copy
        must not come back either. Nor must what is written with older tickets."""
        return {flight.header.key for flight in self.flights if flight.source is None and flight.epoch == self.epoch}

    def all_read(self) -> bool:
        """Whether the manager knows what is in all memory there is."""
        slabs = self.directory._state.allocator.slabs.values()
        return not any(slab.unread for slab in slabs) and all(client.connected for client in self.living if client.uuid)

    def begin_removal(self, job: Job, keys: list[bytes], clears: bool, since: int) -> None:
        removing = Removing(job, set(keys) - self.written(), clears, self.all_read(), since)
        self.removing.append(removing)
        if not self.lazy:
            job.finish()
        self.settle()

    def removals(self) -> int:
        return self.directory._removal.event

    def removed(self, removing: Removing) -> None:
        """Removed keys must not come back, unless a write of them was under way. Sure over a restart only if all were there."""
        removing.job.result()
        visible = self.directory._state.chunks.visible
        keys = removing.keys - self.written()
        if removing.clears:
            for _, _, chunks in self.leases.values():
                chunks.clear()
        else:
            forgotten = self.directory._removal._forgotten
            keys = {key for key in keys if forgotten.get(key, 0) > removing.since}
        assert not any(key in visible for key in keys)
        sure = removing.sure and self.all_read()
        for key in keys:
            self.banned[key] = sure

    def remove(self, client: Client, variant: Variant, prompt: int, start: int) -> None:
        keys = variant.keys(prompt, MAX_CHUNKS)[start:]
        visible = self.directory._state.chunks.visible
        leased = {key for key in keys if key in visible and visible[key].leased}
        since = self.removals()
        job = self.directory.begin_remove(client.id, keys, self.now)
        self.begin_removal(job, keys, False, since)
        if not self.lazy:
            assert not any(key in visible for key in keys if key not in leased)

    def clear(self, client: Client, variant: Variant | None) -> None:
        chosen = [variant] if variant else VARIANTS
        keys = [key for each in chosen for prompt in range(4) for key in each.keys(prompt, MAX_CHUNKS)]
        for _, _, chunks in self.leases.values():
            chunks.clear()
        since = self.removals()
        job = self.directory.begin_clear(client.id, variant.namespace if variant else b"", self.now)
        self.begin_removal(job, keys, True, since)
        if not self.lazy:
            assert not any(key in self.directory._state.chunks.visible for key in keys)

    def wipe(self, lender: Client) -> None:
        for push in lender.wipes:
            for slab, offset in push.slots:
                if slab in lender.slabs:
                    for flight in self.flights:
                        if (flight.uuid, flight.slab) == (lender.uuid, slab) and flight.phase:
                            # Under an earlier manager's ticket it is harmless: nobody else gets the slot before it left.
                            old = flight.epoch != self.epoch
                            assert old or not overlap(flight.spans, [(offset, offset + HEADER_BYTES)]), "wiped under a writer"
                    lender.slabs[slab][offset : offset + HEADER_BYTES] = bytes(HEADER_BYTES)
            self.directory.wiped(lender.id, push.token, self.now)
            assert not self.directory.outstanding([push.token])
        lender.wipes.clear()
        self.settle()

    def grow(self, lender: Client) -> None:
        index = self.new_slab(lender)
        for _ in range(2):
            self.directory.add_slabs(lender.id, lender.uuid, [self.slab_info(lender, index)], self.now)
        self.settle()

    def shrink(self, lender: Client, nbytes: int) -> None:
        indices = self.directory.drop_slabs(lender.id, lender.uuid, nbytes, self.now)
        assert len(indices) * SLAB_BYTES >= min(nbytes, len(lender.slabs) * SLAB_BYTES)
        for index in indices:
            self.void_memory(lender.uuid, index)
            del lender.slabs[index]
            self.gone = [flight for flight in self.gone if (flight.uuid, flight.slab) != (lender.uuid, index)]
            for client in self.living:
                client.flights = [f for f in client.flights if (f.uuid, f.slab) != (lender.uuid, index)]
        self.settle()
        # Nothing may be wiped or granted there any more.
        assert set(indices).isdisjoint(
            slab.index for info in self.directory.segments() if info.uuid == lender.uuid for slab in info.slabs
        )
