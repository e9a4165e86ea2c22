"""Random histories over the directory; rules I1-I5, I9 and I10 are checked after every step."""

from __future__ import annotations

import os
from typing import ClassVar

from directory_world import MAX_CHUNKS, SLAB_BYTES, VARIANTS, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

EXAMPLES = int(os.environ.get("VCACHE_MACHINE_EXAMPLES", "0"))
"""So many new random histories; 0: a few hundred, the same in every run."""

picks = st.integers(0, 1000)
EVENTS = ["read", "remove", "clear", "release", "lapse", "lender", "mover", "shrink", "again"]
"""What may disturb a move."""


def pick(options: list, number: int):
    return options[number % len(options)] if options else None


class DirectoryMachine(RuleBasedStateMachine):
    promoted: ClassVar[set[tuple[str, bool]]] = set()
    """What disturbed promotions of all histories, and whether their copies were taken."""

    @initialize(
        eviction=st.sampled_from(["lru", "sieve"]),
        slabs=st.integers(1, 3),
        lenders=st.integers(1, 3),
        other=st.sampled_from(["", "", "x", "ex", "er"]),
        admission=st.sampled_from(["all", "reuse"]),
        low=st.sampled_from([0.2, 0.5, 0.5]),
    )
    def begin(self, eviction, slabs, lenders, other, admission, low) -> None:
        """`other`: what there is on another host: a lender (x) with (e) a transfer engine, and an engine that uses it (r)."""
        self.world = World(
            eviction, engines=2, lenders=lenders, slabs=slabs, slice_size=2, admission=admission, low_watermark=low
        )
        if other:
            endpoint = "other:1" if "e" in other else ""
            self.world.connect(self.world.new_client("g", remote="r" in other))
            self.world.connect(self.world.new_lender("host", slabs, "g", endpoint))
            self.world.clients[0].remote = "r" in other
            self.world.connect(self.world.clients[0])

    def connected(self) -> list:
        return [client for client in self.world.living if client.connected]

    def lenders(self) -> list:
        return [client for client in self.connected() if client.uuid]

    @precondition(lambda self: self.connected())
    @rule(
        who=picks,
        variant=st.sampled_from(VARIANTS),
        prompt=st.integers(0, 2),
        start=st.sampled_from([0, 0, 0, 1, 2, 3]),
        count=st.integers(1, 6),
        shard=picks,
        placement=st.sampled_from(["local", "spread"]),
        avoid=st.sampled_from([[], [], [], [1], [2]]),
        finish=st.sampled_from([True, True, False]),
    )
    def put(self, who, variant, prompt, start, count, shard, placement, avoid, finish) -> None:
        client = pick(self.connected(), who)
        before = list(client.flights)
        grants = self.world.put(
            client, variant, prompt, start, count, shard % variant.num_shards, placement=placement, avoid=avoid
        )
        assert not any(grant.location is not None and grant.location.segment in avoid for grant in grants)
        if finish:
            results = self.world.finish(client, [flight for flight in client.flights if flight not in before])
            assert all(results)

    @precondition(lambda self: self.connected())
    @rule(who=st.tuples(picks, picks), variant=st.sampled_from(VARIANTS), prompt=st.integers(0, 2), count=st.integers(1, 6))
    def store(self, who, variant, prompt, count) -> None:
        """All shards of a prompt, from different clients."""
        for shard in range(variant.num_shards):
            client = pick(self.connected(), who[shard])
            before = list(client.flights)
            self.world.put(client, variant, prompt, 0, count, shard)
            assert all(self.world.finish(client, [flight for flight in client.flights if flight not in before]))

    @precondition(lambda self: any(client.flights for client in self.connected()))
    @rule(who=picks, first=picks, count=st.integers(1, 4))
    def finish_some(self, who, first, count) -> None:
        client = pick([client for client in self.connected() if client.flights], who)
        begin = first % len(client.flights)
        self.world.finish(client, client.flights[begin : begin + count])

    @precondition(lambda self: self.world.flights)
    @rule(which=picks, steps=st.integers(1, 4))
    def write_some(self, which, steps) -> None:
        """Also of clients whose session has ended meanwhile."""
        flight = pick([flight for client in self.world.living for flight in client.flights], which)
        for _ in range(steps):
            if flight is not None:
                self.world.write(flight)

    @precondition(lambda self: self.world.flights)
    @rule(which=picks)
    def enter(self, which) -> None:
        """A writer passes the gate and is stopped before it writes anything."""
        flight = pick([flight for client in self.world.living for flight in client.flights], which)
        if flight is not None:
            self.world.enter(flight)

    @precondition(lambda self: any(client.flights for client in self.connected()))
    @rule(who=picks, which=picks)
    def revoke(self, who, which) -> None:
        client = pick([client for client in self.connected() if client.flights], who)
        flight = pick(client.flights, which)
        if flight.phase < 4:
            self.world.revoke(client, flight)

    @precondition(lambda self: self.connected())
    @rule(
        who=picks,
        variant=st.sampled_from(VARIANTS),
        prompt=st.integers(0, 2),
        start=st.sampled_from([0, 0, 0, 1, 2]),
        count=st.integers(1, 6),
        shard=st.integers(0, 2),
        keep=st.booleans(),
    )
    def read(self, who, variant, prompt, start, count, shard, keep) -> None:
        client = pick(self.connected(), who)
        lease = self.world.acquire(client, variant, prompt, start, count, shard % (variant.num_shards + 1))
        if lease:
            assert self.world.acquire(client, variant, prompt, start, count, variant.num_shards - 1, lease) == lease
            if not keep:
                self.world.release(lease)

    @precondition(lambda self: self.world.leases)
    @rule(which=picks)
    def release(self, which) -> None:
        self.world.release(pick(list(self.world.leases), which))

    @precondition(lambda self: self.connected())
    @rule(who=picks, variant=st.sampled_from(VARIANTS), prompt=st.integers(0, 2), count=st.integers(1, 6))
    def lookup(self, who, variant, prompt, count) -> None:
        client, keys = pick(self.connected(), who), variant.keys(prompt, count)
        found = self.world.directory.lookup(client.id, keys, self.world.now)
        tiers = self.world.directory.tiers(client.id, keys, self.world.now)
        assert [*tiers, -1].index(-1) == found

    @precondition(lambda self: self.connected() and self.world.directory._state.chunks.visible)
    @rule(who=picks, which=picks, shard=picks, keep=st.booleans())
    def read_present(self, who, which, shard, keep) -> None:
        """The whole prompt of some chunk that is there, or what follows its first missing one."""
        visible = self.world.directory._state.chunks.visible
        places = []
        for candidate in VARIANTS:
            for number in range(3):
                keys = candidate.keys(number, MAX_CHUNKS)
                places += [(candidate, number, index) for index, key in enumerate(keys) if key in visible]
        if not places:
            return  # all that is there are one-off prompts
        variant, prompt, index = pick(places, which)
        start = index
        while start and variant.keys(prompt, start)[-1] in visible:
            start -= 1
        client = pick(self.connected(), who)
        lease = self.world.acquire(client, variant, prompt, start, index + 2 - start, shard % variant.num_shards)
        assert bool(lease) == self.world.reads(client, visible[variant.keys(prompt, start + 1)[-1]])
        if lease and not keep:
            self.world.release(lease)

    @precondition(lambda self: self.connected())
    @rule(
        who=picks,
        nbytes=st.sampled_from([0, 256, 600, 10_000]),
        avoid=st.sampled_from([[], [], [], [1], [2]]),
        end=st.sampled_from(["publish", "publish", "keep lease", "leave"]),
    )
    def demote(self, who, nbytes, avoid, end) -> None:
        client = pick(self.connected(), who)
        before = list(client.flights)
        plan = self.world.demote(client, nbytes, avoid)
        if plan.lease and end != "leave":
            results = self.world.finish(client, [flight for flight in client.flights if flight not in before])
            assert all(results)
            if end == "publish":
                self.world.release(plan.lease)

    def disturb(self, event, who, mover, what, lease, moves, steps) -> None:
        """Some bytes of the moves land, and something happens."""
        world, other, (variant, prompt) = self.world, pick(self.connected(), who), what
        for flight in moves:
            for _ in range(steps):
                world.write(flight)
        if event == "read":
            world.acquire(other, variant, prompt, 0, 2)
        elif event in ("remove", "release") and lease:
            world.release(lease)
            if event == "remove":
                world.remove(other, variant, prompt, 0)
        elif event == "clear":
            world.clear(other, variant)
        elif event == "lapse":
            world.advance(9.0)
        elif event == "lender" and self.lenders():
            world.connect(pick(self.lenders(), who))
        elif event == "mover":
            world.disconnect(mover)
        elif event == "shrink" and self.lenders():
            world.shrink(pick(self.lenders(), who), SLAB_BYTES)

    def conclude(self, mover, moves, wipe) -> list[bool]:
        """The moves end after what disturbed them; which of them were taken."""
        self.world.directory.check_integrity()
        taken = []
        if mover.connected:
            taken = self.world.finish(mover, [flight for flight in moves if flight in mover.flights])
        if wipe:
            self.wipe_all()
        return taken

    @precondition(lambda self: self.connected())
    @rule(
        who=st.tuples(picks, picks),
        variant=st.sampled_from(VARIANTS),
        prompt=st.integers(0, 2),
        event=st.sampled_from(EVENTS),
        steps=st.integers(0, 4),
        wipe=st.booleans(),
    )
    def disturb_demotion(self, who, variant, prompt, event, steps, wipe) -> None:
        """Chunks come, their move begins, and something happens before it ends."""
        world = self.world
        for shard in range(variant.num_shards):
            writer = pick(self.connected(), who[shard])
            before = list(writer.flights)
            world.put(writer, variant, prompt, 0, 3, shard)
            world.finish(writer, [flight for flight in writer.flights if flight not in before])
        mover, other = pick(self.connected(), who[0]), pick(self.connected(), who[1])
        before = list(mover.flights)
        plan = world.demote(mover, 2000)
        moves = [flight for flight in mover.flights if flight not in before]
        self.disturb(event, who[1], mover, (variant, prompt), plan.lease, moves, steps)
        if event == "again":
            world.demote(other, 2000)
        self.conclude(mover, moves, wipe)

    @precondition(lambda self: self.connected())
    @rule(
        who=picks,
        nbytes=st.sampled_from([0, 256, 600, 10_000]),
        avoid=st.sampled_from([[], [], [], [1], [2]]),
        end=st.sampled_from(["publish", "publish", "keep lease", "leave"]),
    )
    def promote(self, who, nbytes, avoid, end) -> None:
        client = pick(self.connected(), who)
        before = list(client.flights)
        plan = self.world.promote(client, nbytes, avoid)
        if plan.lease and end != "leave":
            results = self.world.finish(client, [flight for flight in client.flights if flight not in before])
            assert all(results)
            if end == "publish":
                self.world.release(plan.lease)

    @precondition(lambda self: self.connected())
    @rule(
        who=st.tuples(picks, picks),
        variant=st.sampled_from(VARIANTS),
        prompt=st.integers(0, 2),
        event=st.sampled_from(EVENTS),
        steps=st.integers(0, 4),
        wipe=st.booleans(),
    )
    def disturb_promotion(self, who, variant, prompt, event, steps, wipe) -> None:
        """Chunks come to host memory and are read there, their move up begins, and something happens before it ends."""
        world = self.world
        mover, other = pick(self.connected(), who[0]), pick(self.connected(), who[1])
        vram = [info.number for info in world.directory.segments() if info.kind == "cuda"]
        for shard in range(variant.num_shards):
            before = list(mover.flights)
            world.put(mover, variant, prompt, 0, 3, shard, avoid=vram)
            world.finish(mover, [flight for flight in mover.flights if flight not in before])
        for _ in range(2):
            lease = world.acquire(mover, variant, prompt, 0, 3)
            if lease:
                world.release(lease)
        before = list(mover.flights)
        plan = world.promote(mover, 2000)
        moves = [flight for flight in mover.flights if flight not in before]
        self.disturb(event, who[1], mover, (variant, prompt), plan.lease, moves, steps)
        if event == "again":
            world.promote(other, 2000)
        self.promoted |= {(event, taken) for taken in self.conclude(mover, moves, wipe)}

    @precondition(lambda self: self.connected())
    @rule(
        who=picks,
        nbytes=st.sampled_from([0, 256, 600, 10_000]),
        avoid=st.sampled_from([[], [], [], [1], [2]]),
        written=st.sampled_from([0, 1, 99, 99, None]),
        seconds=st.sampled_from([0.0, 0.5]),
    )
    def spill(self, who, nbytes, avoid, written, seconds) -> None:
        """Some of the planned chunks are written, or the spiller says nothing more."""
        client = pick(self.connected(), who)
        plan = self.world.spill(client, nbytes, avoid)
        self.world.advance(seconds)
        if written is not None and client.connected:
            keys = list(dict.fromkeys(spill.key for spill in plan.spills))[:written]
            self.world.spilled(client, plan.lease, keys)

    @precondition(lambda self: self.world.directory._state.admission.follows)
    @rule(selective=st.booleans())
    def judge(self, selective) -> None:
        """As the hits of the shadows would have it after a longer history than this one."""
        self.world.directory._state.admission.selective = selective

    @precondition(lambda self: self.connected() and self.world.directory._state.admission.follows)
    @rule(who=picks, count=st.integers(1, 4), selective=st.sampled_from([True, True, False]))
    def one_off(self, who, count, selective) -> None:
        """A prompt that nobody knows is offered to a pool that was full before."""
        self.world.directory._state.admission.selective = selective
        self.world.serial += 1
        client = pick(self.connected(), who)
        before = list(client.flights)
        self.world.put(client, VARIANTS[0], 1000 + self.world.serial, 0, count)
        assert all(self.world.finish(client, [flight for flight in client.flights if flight not in before]))

    @rule(lazy=st.booleans())
    def leave_unfinished(self, lazy) -> None:
        """From now on mounts and removals go on bit by bit, or in one go again."""
        self.world.lazy = lazy

    @precondition(lambda self: self.world.directory.has_work)
    @rule(slices=st.integers(1, 5))
    def work(self, slices) -> None:
        self.world.work(slices)

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5, 9.0]))
    def wait(self, seconds) -> None:
        self.world.advance(seconds)

    @precondition(lambda self: self.lenders())
    @rule(who=picks, grow=st.booleans(), nbytes=st.sampled_from([0, 1, SLAB_BYTES, SLAB_BYTES + 1, 100 * SLAB_BYTES]))
    def resize(self, who, grow, nbytes) -> None:
        lender = pick(self.lenders(), who)
        if not grow:
            self.world.shrink(lender, nbytes)
        elif len(lender.slabs) < 4:
            self.world.grow(lender)

    @precondition(lambda self: any(not client.uuid for client in self.connected()))
    @rule(
        who=picks,
        variant=st.sampled_from(VARIANTS),
        prompt=st.integers(0, 2),
        steps=st.integers(0, 4),
        renewal=st.sampled_from(["manager", "manager", "lenders"]),
        removal=st.sampled_from(["clear", "remove", None]),
        rest=st.integers(0, 4),
        told=st.booleans(),
        again=st.sampled_from(["manager", "lenders", None]),
    )
    def outlive(self, who, variant, prompt, steps, renewal, removal, rest, told, again) -> None:
        """Writes have passed the gate when the manager is replaced, or lenders mount again; something is removed, the writes go
        on, and perhaps the headers are read once more."""
        world = self.world
        client = pick([client for client in self.connected() if not client.uuid], who)
        before = list(client.flights)
        for shard in range(variant.num_shards):
            world.put(client, variant, prompt, 0, 3, shard)
        flights = [flight for flight in client.flights if flight not in before]

        def go_on(steps: int) -> None:
            for flight in flights:
                world.enter(flight)
                for _ in range(steps):
                    world.write(flight)

        def renew(what: str | None) -> None:
            if what == "manager":
                world.restart_manager()
            for other in world.living:
                if what and other is not client and (what == "manager" or other.uuid):
                    world.connect(other)
            world.work()

        go_on(steps)
        renew(renewal)
        if self.connected() and removal == "clear":
            world.clear(pick(self.connected(), who), variant)
        elif self.connected() and removal == "remove":
            world.remove(pick(self.connected(), who), variant, prompt, 0)
        self.wipe_all()
        go_on(rest)
        if told:
            world.look_at_gates()
        renew(again)

    @precondition(lambda self: self.connected())
    @rule(who=picks, variant=st.sampled_from(VARIANTS), prompt=st.integers(0, 2), start=st.integers(0, 4), wipe=st.booleans())
    def remove(self, who, variant, prompt, start, wipe) -> None:
        self.world.remove(pick(self.connected(), who), variant, prompt, start)
        if wipe:
            self.wipe_all()

    @precondition(lambda self: self.connected())
    @rule(who=picks, variant=st.sampled_from([*VARIANTS, None]), wipe=st.booleans())
    def clear(self, who, variant, wipe) -> None:
        self.world.clear(pick(self.connected(), who), variant)
        if wipe:
            self.wipe_all()

    @precondition(lambda self: any(lender.wipes for lender in self.lenders()))
    @rule()
    def wipe_all(self) -> None:
        for lender in self.lenders():
            self.world.wipe(lender)

    @rule(
        event=st.sampled_from(
            ["silent", "disconnect", "connect", "connect", "mount", "goodbye", "kill", "new", "gone", "gone"]
        ),
        who=picks,
        which=picks,
    )
    def somebody(self, event, who, which) -> None:
        """Something happens to one of the processes."""
        world = self.world
        anyone, someone, lender = pick(world.living, who), pick(self.connected(), who), pick(self.lenders(), who)
        if event == "silent" and someone:
            someone.silent = True
        elif event == "disconnect" and someone:
            world.disconnect(someone)
        elif event == "connect" and anyone:
            # Also over a session that the manager believes to be alive.
            world.connect(anyone)
        elif event == "mount" and lender:
            world.mount(lender)
        elif event == "goodbye" and someone and len(world.living) > 2:
            world.goodbye(someone)
        elif event == "kill" and len(world.living) > 2:
            world.kill(anyone)
        elif event == "new" and len(world.living) < 6:
            host = "g" if which % 7 == 0 else "h"
            kind, endpoint = ("cuda", "host")[which % 2], "engine:1" if which % 5 == 0 else ""
            world.connect(
                world.new_client(host, which % 5 == 0) if which % 3 == 0 else world.new_lender(kind, 2, host, endpoint)
            )
        elif event == "gone" and lender and world.gone:
            world.importer_gone(lender, pick(world.gone, which).client)

    @rule(order=st.randoms(use_true_random=False), everybody=st.booleans())
    def restart(self, order, everybody) -> None:
        """The manager. If everybody comes back, nothing is lost."""
        before = list(self.world.directory._state.chunks.visible.keys() - self.world.at_risk())
        wiping = any(lender.wipes for lender in self.lenders())
        self.world.restart_manager()
        clients = self.world.living
        order.shuffle(clients)
        for client in clients if everybody else clients[1:]:
            self.world.connect(client)
        if everybody:
            self.world.work()
        lost = [key for key in before if key not in self.world.directory._state.chunks.visible]
        assert wiping or not lost or not everybody

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.directory.check_integrity()
            self.world.verify_all()

    def teardown(self) -> None:
        """All memory comes back once all writers are gone."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.lazy = False
        world.work()
        for client in list(world.living):
            if not client.uuid:
                world.kill(client)
        for lender in world.living:
            world.connect(lender)
        for lender in world.living:
            for client in [*lender.lost, *(flight.client for flight in world.gone)]:
                if client not in [other.id for other in world.living]:
                    world.importer_gone(lender, client)
        world.advance(9.0)
        for lender in world.living:
            world.wipe(lender)
        world.directory.check_integrity()
        gauges = world.directory.stats(world.now).gauges
        assert gauges["slots_processing"] == gauges["slots_quarantined"] == gauges["chunks_pending"] == gauges["leases"] == 0


DirectoryMachine.TestCase.settings = settings(
    max_examples=EXAMPLES or 300,
    derandomize=not EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


class TestDirectoryMachine(DirectoryMachine.TestCase):
    def runTest(self) -> None:
        DirectoryMachine.promoted.clear()
        super().runTest()
        if not EXAMPLES:
            assert {taken for _, taken in DirectoryMachine.promoted} == {True, False}
            assert {("clear", False), ("again", True)} <= DirectoryMachine.promoted
