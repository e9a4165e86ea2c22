"""Moves and spilling in the world around a directory."""

from __future__ import annotations

from directory_model import CONFIG, SLAB_BYTES, Client, Flight, Slot

from vcache.manager.api import MovePlan, SpillPlan
from vcache.manager.directory.slabs import VRAM
from vcache.segment.slots import HEADER_BYTES, SlotHeader, slab_geometry


class MakingRoom:
    """Part of `World`. Checks every plan against what the world knows."""

    def leased_by_plan(self, client: Client, lease: int, keys: list[bytes]) -> None:
        """A plan's lease covers these, and nobody else's does yet."""
        for _, _, chunks in self.leases.values():
            assert not set(keys) & set(chunks), "I3: planned although leased"
        visible = self.directory._state.chunks.visible
        places = {key: self.places_of(visible[key]) for key in keys}
        self.leases[lease] = client.id, self.now + CONFIG["lease_ttl"], places

    def demote(self, client: Client, nbytes: int, avoid: list[int] | None = None) -> MovePlan:
        avoid = [*(avoid or []), *self.foreign(client)]
        plan = self.directory.demote(client.id, nbytes, avoid, self.now)
        self._planned(client, plan, nbytes, avoid, ("cuda", "host"))
        return plan

    def promote(self, client: Client, nbytes: int, avoid: list[int] | None = None) -> MovePlan:
        avoid = [*(avoid or []), *self.foreign(client)]
        before = self.directory.stats(self.now).counters
        plan = self.directory.promote(client.id, nbytes, avoid, self.now)
        self._planned(client, plan, nbytes, avoid, ("host", "cuda"))
        assert self.directory.stats(self.now).counters["evictions"] == before["evictions"]
        if plan.moves:
            memory = self.directory._state.allocator.hosts[client.host]
            assert memory.busy[VRAM] <= self.directory._state.config.low_watermark * memory.nbytes[VRAM]
        return plan

    def _planned(self, client: Client, plan: MovePlan, nbytes: int, avoid: list[int], way: tuple[str, str]) -> None:
        """Check a plan of moves from one kind of memory to the other, and begin them."""
        assert (plan.lease != 0) == bool(plan.moves)
        infos = {info.number: info for info in self.directory.segments()}
        visible = self.directory._state.chunks.visible
        if plan.lease:
            self.leased_by_plan(client, plan.lease, list(dict.fromkeys(move.key for move in plan.moves)))
        for move in plan.moves:
            record, target = visible[move.key], move.grant.location
            assert move.source == record.places()[move.shard]
            assert target is not None
            assert not {move.source.segment, target.segment} & set(avoid)
            assert [(infos[place.segment].kind, infos[place.segment].host) for place in (move.source, target)] == [
                (way[0], client.host),
                (way[1], client.host),
            ]
            uuid = infos[move.source.segment].uuid
            lender = self.lender_of(uuid)
            assert lender is not None
            at = slab_geometry(SLAB_BYTES, move.source.slot_bytes).header_offset(move.source.slot)
            header = SlotHeader.unpack(lender.slabs[move.source.slab][at : at + HEADER_BYTES])
            assert header is not None
            flight = self.granted(client, header._replace(generation=target.generation), move.grant)
            flight.source = Slot(uuid, move.source.slab, move.source.slot, move.source.slot_bytes, header)
            flight.lease = plan.lease
            client.flights.append(flight)
        assert len({(move.key, move.shard) for move in plan.moves}) == len(plan.moves)
        if len(plan.moves) > 1:
            assert sum(move.source.slot_bytes for move in plan.moves) <= max(nbytes, 2 * 256)
        self.settle()

    def spill(self, client: Client, nbytes: int, avoid: list[int] | None = None) -> SpillPlan:
        avoid = [*(avoid or []), *self.foreign(client)]
        plan = self.directory.spill(client.id, nbytes, avoid, self.now)
        assert (plan.lease != 0) == bool(plan.spills)
        infos = {info.number: info for info in self.directory.segments()}
        visible = self.directory._state.chunks.visible
        lowest = (
            "host"
            if any(info.kind == "host" and info.host == client.host and info.slabs for info in infos.values())
            else "cuda"
        )
        keys = list(dict.fromkeys(spill.key for spill in plan.spills))
        if plan.lease:
            self.leased_by_plan(client, plan.lease, keys)
        assert [(spill.key, spill.shard, spill.source) for spill in plan.spills] == [
            (key, shard, place) for key in keys for shard, place in enumerate(visible[key].places())
        ]
        for spill in plan.spills:
            info = infos[spill.source.segment]
            assert (info.host, info.kind) == (client.host, lowest)
            assert spill.source.segment not in avoid
            assert not visible[spill.key].spilled
        self.settle()
        return plan

    def spilled(self, client: Client, lease: int, keys: list[bytes]) -> None:
        self.directory.spilled(client.id, lease, keys, self.now)
        self.leases.pop(lease, None)
        self.settle()

    def moved(self, flight: Flight, source: Slot) -> None:
        """I3: nobody but the mover itself may have leased the place that is free now."""
        place = source.uuid, source.slab, source.slot
        for number, (client, _, chunks) in self.leases.items():
            protected = place in chunks.get(flight.header.key, {})
            assert not protected or (number, client) == (flight.lease, flight.client), "I3: moved under a reader"
            if protected:
                del chunks[flight.header.key][place]
                chunks[flight.header.key][flight.uuid, flight.slab, flight.slot] = flight.spans
