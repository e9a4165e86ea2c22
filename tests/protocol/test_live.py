"""The real code under every access one by one: random orders, and the orders that once led to wrong bytes."""

from __future__ import annotations

import random

import pytest
from live_world import World, Writer
from stepping import Agent

from vcache.cache.pool import ChunkPool
from vcache.lender import orphans
from vcache.lender.orphans import Orphans
from vcache.manager.directory.allocator import Allocator
from vcache.paged import cpu_mover
from vcache.segment import slot_protocol
from vcache.segment.gate import Gate, Passage, WriteGate


@pytest.fixture
def make_world(monkeypatch):
    """Makes worlds; payloads are copied in two steps."""
    worlds = []
    copy = cpu_mover._copy

    def stepped_copy(*arguments):
        worlds[-1].scheduler.pause("copies a part of the payload")
        copy(*arguments)

    monkeypatch.setattr(cpu_mover, "_copy", stepped_copy)

    def make(**options):
        if worlds:
            worlds[-1].scheduler.end()
        worlds.append(World(**options))
        return worlds[-1]

    yield make
    for world in worlds[-1:]:
        world.scheduler.end()


def run(world: World, seed: int) -> None:
    """Rounds in which one writer is stopped somewhere in a write; then the manager is replaced (its clock may be set back), or
    the writer is killed, or closes; the others go on, and another writer comes somewhere in a write; then they mix, a few steps
    each. Some writers copy slots."""
    chance = random.Random(seed)

    def some(agents: list[Agent], most: float) -> None:
        agent = chance.choice(agents)
        for _ in range(int(2 ** chance.uniform(0, most))):
            if agent.ready:
                world.step(agent)

    def into_a_write(writer: Writer) -> None:
        writer.budget = chance.randrange(1, 3)
        while writer.agent.ready and writer.pool.no_writes():
            world.step(writer.agent)
        # The gate is passed within the first few steps.
        for _ in range(chance.randrange(12 if chance.random() < 0.3 else 70)):
            if writer.agent.ready and not writer.pool.no_writes():
                world.step(writer.agent)

    for number in range(1, 6):
        world.writer(f"W{number}", 0, copies=chance.random() < 0.3)
    for _ in range(4):
        living = [writer for writer in world.writers if writer.alive and not writer.closed]
        if chance.random() < 0.7:
            world.settle()
        first, second = chance.sample(living, 2)
        into_a_write(first)
        event = chance.random()
        if event < 0.75:
            world.start_manager(chance.choice((1_000_000, 1_000_000, 1_000_000, -999_000)))
        elif event < 0.85:
            world.kill(first)
        elif event < 0.95:
            world.close(first)
        others = [agent for agent in world.scheduler.agents if agent is not first.agent]
        if chance.random() < 0.7:
            world.settle(*others)
        else:
            for _ in range(30):
                some(others, 6)
        world.advance(chance.choice((0.01, 0.01, 1.5, 40.0)))
        into_a_write(second)
        for _ in range(chance.randrange(40)):
            some([first.agent, second.agent, first.agent, second.agent, *world.scheduler.agents], 4)
        if chance.random() < 0.2:
            world.start_manager()
    world.check_alive()


def run_all(make_world, seeds) -> None:
    for seed in seeds:
        run(make_world(slots=1 + seed % 2, segments=1 + seed // 2 % 2), seed)


@pytest.mark.parametrize("batch", range(4))
def test_random_orders(make_world, batch):
    """No chunk ever has other bytes than its own, and whatever happened, a new client can put in every segment."""
    run_all(make_world, range(batch * 25, batch * 25 + 25))


PAYLOAD = "copies a part of the payload"


def two_writers(make_world, **options) -> tuple[World, Writer, Writer]:
    """All are at work, and there is a chunk in every slot."""
    world = make_world(**options)
    first, second = world.writer("W1", len(world.lenders)), world.writer("W2", 0)
    world.settle()
    assert first.stored == len(world.lenders)
    return world, first, second


def mixed(world: World, first: Writer, second: Writer) -> None:
    """The first has announced its write, if it may; the second has written its payload; the first does all that it still may;
    the second ends."""
    while first.agent.ready and first.agent.at not in (PAYLOAD, "put_revoke", "put_end"):
        world.step(first.agent)
    second.budget += 1
    others = [agent for agent in world.scheduler.agents if agent is not first.agent]
    parts = 0
    while second.agent.ready and parts < 2:
        parts += second.agent.at == PAYLOAD
        world.step(second.agent)
    world.settle(first.agent)
    world.settle(*others)


def stopped_anywhere(make_world):
    """A writer is stopped after each of its steps in turn; the manager is replaced, and again when the other has written. Where
    headers alone are looked at, the second manager believes a torn announcement, or gives the slot to two."""
    number, going = 0, True
    while going:
        world, first, second = two_writers(make_world)
        first.budget = 1
        for _ in range(number):
            if first.agent.ready:
                world.step(first.agent)
        going = first.agent.ready
        number += 1
        world.start_manager()
        world.settle(*[agent for agent in world.scheduler.agents if agent is not first.agent])
        mixed(world, first, second)
        world.start_manager()
        world.check_alive()
    assert number > 40


def entered_amid_a_mount(make_world):
    """A writer with a ticket of the old manager comes to the gate after each step of the lender's mount in turn."""
    number, going = 0, True
    while going:
        world, first, second = two_writers(make_world)
        first.budget = 1
        world.until(first.agent, "hears the answer to put_start")
        world.start_manager()
        lender = world.lenders[0]
        for _ in range(number):
            if lender.agent.ready:
                world.step(lender.agent)
        going = lender.agent.ready
        number += 1
        while first.agent.ready and first.agent.at not in ("writes slab0+72", "put_revoke"):
            world.step(first.agent)
        world.settle(*[agent for agent in world.scheduler.agents if agent is not first.agent])
        mixed(world, first, second)
        world.check_alive()
    assert number > 20


def closed_amid_a_write(make_world):
    """A client closes while its payload is on its way. It was told Goodbye for, and its slot given to the next writer."""
    world, first, second = two_writers(make_world)
    first.budget = 1
    world.until(first.agent, PAYLOAD)
    world.close(first)
    mixed(world, first, second)
    world.check_alive()


def map_of_segments_is_late(make_world):
    """Two segments; a client has said hello to a new manager, but still takes numbers for what they meant before: a ticket for
    one segment leads it to the other, where somebody writes."""
    world, first, second = two_writers(make_world, segments=2)
    world.start_manager()
    world.settle()
    first.budget = second.budget = 1
    while not (first.agent.at.startswith("writes slab") and first.agent.at.endswith("+64")):
        world.step(first.agent)  # up to and with its odd generation
    second.numbers = {number: 1 - which for number, which in second.numbers.items()}
    while second.agent.ready and second.agent.at not in (PAYLOAD, "put_revoke"):
        world.step(second.agent)
    world.settle(first.agent)
    world.settle(second.agent)
    world.check_alive()


def read_again_and_again(make_world):
    """A writer is stopped after each of its steps in turn; the manager is replaced, the writer does as many steps more, the
    manager is replaced once more before or after it ends, and again."""
    number, going = 0, True
    while going:
        for more in (3, 20, 1000):
            world, first, _ = two_writers(make_world, slots=2)
            first.budget = 1
            for _ in range(number):
                if first.agent.ready:
                    world.step(first.agent)
            going = first.agent.ready
            others = [agent for agent in world.scheduler.agents if agent is not first.agent]
            for _ in range(2):
                world.start_manager()
                world.settle(*others)
                for _ in range(more):
                    if first.agent.ready and not first.pool.no_writes():
                        world.step(first.agent)
            world.start_manager()
            world.check_alive()
        number += 4
    assert number > 40


SCENARIOS = [read_again_and_again, stopped_anywhere, entered_amid_a_mount, closed_amid_a_write, map_of_segments_is_late]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_orders_that_led_to_wrong_bytes(make_world, scenario):
    """Each of these ended in wrong bytes when there was no gate, or announcements were written in another order."""
    scenario(make_world)


def no_gate(patch):
    patch.setattr(Passage, "admits", lambda self, slab, fence: True)


def fence_not_compared(patch):
    def enter(self, slab, fence):
        with self._lock:
            self._add(slab, 1)
        return True

    patch.setattr(WriteGate, "enter", enter)


def counted_after_the_fence_is_compared(patch):
    def enter(self, slab, fence):
        if self._words[0] != fence:
            return False
        with self._lock:
            self._add(slab, 1)
        return True

    patch.setattr(WriteGate, "enter", enter)


def left_when_queued(patch):
    enter = WriteGate.enter

    def brief(self, slab, fence):
        admitted = enter(self, slab, fence)
        if admitted:
            self.leave(slab)
        return admitted

    patch.setattr(WriteGate, "enter", brief)
    patch.setattr(Passage, "leave", lambda self: None)


def fence_is_constant(patch):
    patch.setattr("secrets.randbits", lambda bits: 7)


def rows_read_before_the_fence_is_renewed(patch):
    renew, writers = Gate.renew, Gate.writers

    def early(self):
        self.early = writers(self, [0])
        return renew(self)

    patch.setattr(Gate, "renew", early)
    patch.setattr(
        Gate, "writers", lambda self, slabs: vars(self).pop("early") if "early" in vars(self) else writers(self, slabs)
    )


def granted_where_somebody_writes(patch):
    patch.setattr(Allocator, "await_writer", lambda self, slab, client: None)


def goodbye_amid_a_write(patch):
    patch.setattr(ChunkPool, "no_writes", lambda self: True)


def identity_before_the_odd_generation(patch):
    assert set(slot_protocol.ANNOUNCED) == {(0, 8), (8, 16), (16, 64)}
    patch.setattr(slot_protocol, "ANNOUNCED", ((0, 8), (16, 64), (8, 16)))


FAULTS = [
    (no_gate, stopped_anywhere),
    (no_gate, map_of_segments_is_late),
    (fence_not_compared, entered_amid_a_mount),
    (counted_after_the_fence_is_compared, stopped_anywhere),
    (left_when_queued, stopped_anywhere),
    (fence_is_constant, map_of_segments_is_late),
    (rows_read_before_the_fence_is_renewed, entered_amid_a_mount),
    (granted_where_somebody_writes, stopped_anywhere),
    (goodbye_amid_a_write, closed_amid_a_write),
    (identity_before_the_odd_generation, stopped_anywhere),
]


@pytest.mark.parametrize(("fault", "scenario"), FAULTS)
def test_fault_is_found(make_world, monkeypatch, fault, scenario):
    """These tests find what they are for: the same code with one fault gives wrong bytes."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="has the bytes of"):
        scenario(make_world)


@pytest.mark.parametrize("fault", [no_gate, identity_before_the_odd_generation])
def test_random_orders_find_faults(make_world, monkeypatch, fault):
    fault(monkeypatch)
    monkeypatch.setattr(World, "complete", lambda world: set(world.values))  # what counts here is bytes, not whose they are
    with pytest.raises(AssertionError, match="has the bytes of"):
        run_all(make_world, range(60))


def nothing_is_undone(patch):
    patch.setattr(Orphans, "undo", lambda self, slab: [])
    patch.setattr(Orphans, "inventory", lambda self, indices, busy: self._lent.inventory(indices))


def undone_at_mounts_only(patch):
    patch.setattr(Orphans, "undo", lambda self, slab: [])


def later_mounts_tell_all(patch):
    patch.setattr(orphans, "undisturbed", lambda told, found: found)


def told_before_it_is_undone(patch):
    undo = Orphans.undo

    def late(self, slab):
        due, self.due = vars(self).get("due"), slab
        return undo(self, due) if due is not None else []

    patch.setattr(Orphans, "undo", late)


@pytest.mark.parametrize("fault", [nothing_is_undone, undone_at_mounts_only, later_mounts_tell_all, told_before_it_is_undone])
def test_chunks_of_void_tickets_are_found(make_world, monkeypatch, fault):
    """Nobody could remove them while they were unknown."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="chunk of a void ticket"):
        read_again_and_again(make_world)
