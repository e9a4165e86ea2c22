"""A small world around a `Directory`: lenders with real bytes in their slabs, writers that follow the header protocol step by
step, readers that verify. It checks the rules as it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from vcache.config import ManagerConfig
from vcache.manager.directory import Directory
from vcache.manager.messages import PutGrant, PutRequest, SegmentGone, SegmentMounted, Ticket, WipeSlots, WriterLost
from vcache.segment.slots import (
    HEADER_BYTES,
    SegmentInfo,
    SlabHeader,
    SlabInfo,
    SlabInventory,
    SlotHeader,
    SlotLocation,
    slab_bytes_for,
    slab_geometry,
)

SLAB_BYTES = slab_bytes_for(256, 4)
TOKENS = 4
MAX_CHUNKS = 9
CONFIG = {"lease_ttl": 8.0, "ticket_ttl": 8.0, "quarantine": 2.0, "session_timeout": 10.0}

Places = dict[tuple[bytes, int, int], list[tuple[int, int]]]
"""(segment, slab, slot) -> its bytes in the slab, as spans."""


@dataclass(frozen=True)
class Variant:
    """A model: its namespace, shards of a chunk, and slot size."""

    name: str
    num_shards: int
    slot_bytes: int

    @property
    def namespace(self) -> bytes:
        return digest("space", self.name)

    def keys(self, prompt: int, count: int) -> list[bytes]:
        """Prompts 0 and 1 share their first two chunks."""
        return [digest(self.name, prompt if prompt > 1 or i > 1 else 0, i) for i in range(count)]


VARIANTS = (Variant("one", 1, 256), Variant("two", 2, 250), Variant("big", 1, 512))


def digest(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def payload_of(header: SlotHeader) -> bytes:
    return (blake2b(header.key + bytes([header.shard])).digest() * 8)[: header.payload_bytes]


@dataclass(eq=False)
class Flight:
    """A granted write and how far its writer has come."""

    client: bytes
    uuid: bytes
    header: SlotHeader
    slab_header: SlabHeader
    slab: int
    slot: int
    epoch: int
    phase: int = 0  # 0 nothing, 1 odd header, 2 half of the payload, 3 all of it, 4 even header: done

    @property
    def ticket(self) -> Ticket:
        return Ticket(self.header.key, self.header.shard, self.header.generation)

    @property
    def spans(self) -> list[tuple[int, int]]:
        geometry = slab_geometry(SLAB_BYTES, self.slab_header.slot_bytes)
        return spans_of(geometry, self.slot)


def spans_of(geometry, slot: int) -> list[tuple[int, int]]:
    """Bytes of a slab that belong to a slot."""
    header, payload = geometry.header_offset(slot), geometry.payload_offset(slot)
    return [(header, header + HEADER_BYTES), (payload, payload + geometry.slot_bytes)]


def overlap(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)


@dataclass(eq=False)
class Client:
    id: bytes
    alive: bool = True
    connected: bool = False
    silent: bool = False
    epoch: int = 0
    flights: list[Flight] = field(default_factory=list)
    uuid: bytes = b""
    kind: str = "host"
    slabs: dict[int, bytearray] = field(default_factory=dict)
    next_slab: int = 0
    wipes: list[WipeSlots] = field(default_factory=list)
    lost: dict[bytes, None] = field(default_factory=dict)


class World:
    def __init__(self, eviction: str = "sieve", engines: int = 2, lenders: int = 2, slabs: int = 2) -> None:
        self.eviction = eviction
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
        self.start_manager()
        for _ in range(engines):
            self.new_client()
        for number in range(lenders):
            self.new_lender("cuda" if number % 2 == 0 else "host", slabs)
        for client in self.clients:
            self.connect(client)

    # People

    def new_client(self) -> Client:
        self.serial += 1
        client = Client(digest("client", self.serial))
        self.clients.append(client)
        return client

    def new_lender(self, kind: str, slabs: int) -> Client:
        client = self.new_client()
        client.uuid, client.kind = digest("segment", self.serial), kind
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
            host="h",
            device="host" if lender.kind == "host" else f"GPU-{lender.uuid.hex()[:4]}",
            broker="/b",
            owner=lender.id,
            slabs=tuple(SlabInfo(index, len(memory)) for index, memory in lender.slabs.items()),
        )

    def inventory(self, lender: Client) -> list[SlabInventory]:
        found = []
        for index, memory in lender.slabs.items():
            header = SlabHeader.unpack(memory[:HEADER_BYTES])
            slots = header.slots if header is not None else 0
            found.append(
                SlabInventory(index, bytes(memory[:HEADER_BYTES]), bytes(memory[HEADER_BYTES : HEADER_BYTES * (1 + slots)]))
            )
        return found

    # Manager and sessions

    def start_manager(self) -> None:
        self.epoch += 1_000_000
        self.directory = Directory(ManagerConfig(eviction=self.eviction, **CONFIG), epoch=self.epoch, now=self.now)

    def restart_manager(self) -> None:
        if self.directory.stats(self.now).gauges["wipes_outstanding"]:
            self.banned.clear()  # the answer to the removal said nothing yet
        self.banned = {key: sure for key, sure in self.banned.items() if sure}
        self.start_manager()
        self.leases.clear()
        # Nobody begins to write for a manager that is gone; what is written stays a complete chunk.
        self.gone = [flight for flight in self.gone if 0 < flight.phase < 4]
        for client in self.living:
            client.flights = [flight for flight in client.flights if 0 < flight.phase < 4]
            client.connected = False
            client.wipes.clear()

    def settle(self) -> None:
        """Carry out what the directory instructs."""
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
            if flight.phase:
                while self.write(flight):
                    pass
        client.flights.clear()
        client.silent = False
        self.directory.open_session(client.id, "c", "lender" if client.uuid else "engine", self.now)
        client.connected, client.epoch = True, self.epoch
        self.settle()
        if client.uuid:
            self.mount(client)

    def mount(self, lender: Client) -> None:
        self.void_memory(lender.uuid)
        lender.wipes.clear()
        number = self.directory.mount(lender.id, self.info(lender), self.inventory(lender), self.now)
        assert number > 0
        self.settle()

    def disconnect(self, client: Client) -> None:
        self.directory.close_session(client.id, self.now)
        self.lost_session(client)
        self.settle()

    def goodbye(self, client: Client) -> None:
        for flight in client.flights:
            if flight.phase:
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
        grants = self.directory.put_start(client.id, request, self.now)
        assert len(grants) == count
        for offset, grant in enumerate(grants):
            assert (grant.location is not None) == (grant.status == "granted")
            if grant.location is not None:
                self.banned.pop(request.keys[offset], None)
                client.flights.append(self.flight(client, variant, request.keys[offset], start + offset, shard, grant))
        self.settle()
        return grants

    def flight(self, client: Client, variant: Variant, key: bytes, index: int, shard: int, grant: PutGrant) -> Flight:
        location = grant.location
        assert location is not None
        info = next(info for info in self.directory.segments() if info.number == location.segment)
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
        slab_header = SlabHeader(grant.format_generation, location.slot_bytes, grant.slots)
        flight = Flight(client.id, info.uuid, header, slab_header, location.slab, location.slot, self.epoch)
        assert slab_geometry(SLAB_BYTES, location.slot_bytes).slots == grant.slots
        assert location.tokens == TOKENS
        # I3: nobody else may be writing there, and no lease may protect it.
        for other in self.flights:
            if (other.uuid, other.slab) == (flight.uuid, flight.slab):
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
        content = payload_of(flight.header)
        half = len(content) // 2
        if flight.phase == 0:
            if not writer.connected or flight.epoch != writer.epoch:
                return False  # nothing is begun for a session that is over
            if memory[:HEADER_BYTES] != flight.slab_header.pack():
                memory[:HEADER_BYTES] = flight.slab_header.pack()
            there = SlotHeader.unpack(memory[at : at + HEADER_BYTES])
            if there is not None and there.generation > flight.header.generation - 1:
                raise AssertionError("a higher generation stands where we may write")
            memory[at : at + HEADER_BYTES] = odd
        elif flight.phase == 1:
            memory[payload : payload + half] = content[:half]
        elif flight.phase == 2:
            memory[payload + half : payload + len(content)] = content[half:]
        else:
            assert memory[at : at + HEADER_BYTES] == odd, "I3: our header was overwritten while we wrote"
            memory[at : at + HEADER_BYTES] = flight.header.pack()
        flight.phase += 1
        return True

    def finish(self, client: Client, flights: list[Flight]) -> list[bool]:
        """Write all that is left and publish what landed."""
        for flight in flights:
            while self.write(flight):
                pass
        landed = [flight for flight in flights if flight.phase == 4]
        client.flights = [flight for flight in client.flights if flight not in landed]
        results = self.directory.put_end(client.id, [flight.ticket for flight in landed], self.now)
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
        visible = self.directory._core.chunks.visible
        present = next((i for i, key in enumerate(keys) if key not in visible), len(keys))
        reply = self.directory.acquire(client.id, keys, shard, lease, self.now)
        if not lease:
            assert len(reply.locations) == (present if shard < variant.num_shards else 0)
            assert (reply.lease != 0) == bool(reply.locations)
            assert reply.lease not in self.leases
        chunks: dict[bytes, Places] = {}
        for key, location in zip(keys, reply.locations, strict=False):
            self.verify(variant.namespace, key, shard, location)
            for place in visible[key].places():
                uuid = next(info.uuid for info in self.directory.segments() if info.number == place.segment)
                geometry = slab_geometry(SLAB_BYTES, place.slot_bytes)
                chunks.setdefault(key, {})[uuid, place.slab, place.slot] = spans_of(geometry, place.slot)
        if reply.lease and not lease:
            assert reply.expires_in == CONFIG["lease_ttl"]
            self.leases[reply.lease] = (client.id, self.now + reply.expires_in, chunks)
        return reply.lease

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
        assert header is not None, "I1: no header"
        assert (header.key, header.namespace, header.shard, header.generation) == (
            key,
            namespace,
            shard,
            location.generation,
        ), "I1"
        assert memory[payload : payload + header.payload_bytes] == payload_of(header), "I1: payload"

    def verify_all(self) -> None:
        for record in self.directory._core.chunks.visible.values():
            assert record.space is not None
            for shard, place in enumerate(record.places()):
                self.verify(record.space.name, record.key, shard, place)
            assert record.key not in self.banned, "a removed chunk came back"

    # Removing and resizing

    def ban(self, keys: list[bytes]) -> None:
        """Removed keys must not come back, unless a write of them was under way. Sure over a restart only if all were there."""
        writing = {flight.header.key for flight in self.flights}
        sure = all(client.connected for client in self.living if client.uuid)
        for key in keys:
            if key not in writing:
                self.banned[key] = sure

    def remove(self, client: Client, variant: Variant, prompt: int, start: int) -> None:
        keys = variant.keys(prompt, MAX_CHUNKS)[start:]
        visible = self.directory._core.chunks.visible
        leased = {key for key in keys if key in visible and visible[key].pins}
        self.directory.remove(client.id, keys, self.now)
        assert not any(key in visible for key in keys if key not in leased)
        self.ban([key for key in keys if key not in leased])
        self.settle()

    def clear(self, client: Client, variant: Variant | None) -> None:
        self.directory.clear(client.id, variant.namespace if variant else b"", self.now)
        chosen = [variant] if variant else VARIANTS
        keys = [key for each in chosen for prompt in range(4) for key in each.keys(prompt, MAX_CHUNKS)]
        assert not any(key in self.directory._core.chunks.visible for key in keys)
        for _, _, chunks in self.leases.values():
            chunks.clear()
        self.ban(keys)
        self.settle()

    def wipe(self, lender: Client) -> None:
        for push in lender.wipes:
            for slab, offset in push.slots:
                if slab in lender.slabs:
                    for flight in self.flights:
                        if (flight.uuid, flight.slab) == (lender.uuid, slab) and flight.phase:
                            assert not overlap(flight.spans, [(offset, offset + HEADER_BYTES)]), "wiped under a writer"
                    lender.slabs[slab][offset : offset + HEADER_BYTES] = bytes(HEADER_BYTES)
            self.directory.wiped(lender.id, push.token, self.now)
            assert not self.directory.outstanding([push.token])
        lender.wipes.clear()
        self.settle()

    def grow(self, lender: Client) -> None:
        index = self.new_slab(lender)
        for _ in range(2):
            self.directory.add_slabs(lender.id, lender.uuid, [(index, SLAB_BYTES)], self.now)
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
