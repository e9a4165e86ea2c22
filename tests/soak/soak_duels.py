"""Directed rounds: one call is halted inside a window, something happens to the pool, another writer comes, and both go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from soak_windows import HEADER_STORES, Aim
from soak_world import CHUNK, Call, World

Event = Callable[[World, Call], None]


def payloads(world: World) -> None:
    """A put of several chunks: amid one payload the manager restarts, and another writer has a ticket, but has written nothing,
    when the first one comes to the payload of a later chunk."""
    rng = world.rng
    count = min(rng.choice([2, 2, 3, 4]), world.capacity)
    early = rng.randrange(count - 1)
    late = rng.randint(early + 1, count - 1)
    _overtake(world, count, [_aim(rng, "payload", early), _aim(rng, "payload", late)])


def announcements(world: World) -> None:
    """A put between its tickets and its first header."""
    rng = world.rng
    count = rng.randint(1, min(3, world.capacity))
    first = [_aim(rng, rng.choice(["granted", "begun"])), *_points(rng, count, rng.randint(0, 2))]
    _duel(world, count, first, restart)


def stale_tickets(world: World) -> None:
    """As `announcements`, and the first writer comes to a payload while the other one has a ticket and has written nothing."""
    rng = world.rng
    count = rng.randint(1, min(3, world.capacity))
    first = [_aim(rng, rng.choice(["granted", "begun"])), _aim(rng, "payload", rng.randrange(count))]
    _overtake(world, count, first)


def torn_headers(world: World) -> None:
    """A writer after a single store of a header."""
    rng = world.rng
    count = rng.randint(1, min(3, world.capacity))
    first = [_aim(rng, "header", rng.randrange(count), rng.randint(1, HEADER_STORES))]
    if rng.random() < 0.2:
        first.append(_aim(rng, "slab header"))
    _duel(world, count, first, restart, fresh=rng.random() < 0.2)


def landings(world: World) -> None:
    """All bytes are there, and the manager does not know."""
    rng = world.rng
    count = rng.randint(1, min(3, world.capacity))
    _duel(world, count, [_aim(rng, "landed"), *_points(rng, count, 1)], restart)


def closings(world: World) -> None:
    """`close()` in one thread while another stores."""
    rng = world.rng
    count = rng.randint(2, min(4, world.capacity)) if world.capacity > 2 else 2
    first = [aim._replace(stop=False) for aim in (_aim(rng, "payload", rng.randrange(count)), *_points(rng, count, 1))]
    _duel(world, count, first, close)


def mounts(world: World) -> None:
    """A lender halts while it mounts, beside a writer."""
    rng = world.rng
    count = rng.randint(1, min(4, world.capacity))
    _duel(world, count, _points(rng, count, 3), halted_mount)


def deaths(world: World) -> None:
    """The lender that is being written to dies."""
    rng = world.rng
    count = rng.randint(1, min(3, world.capacity))
    _duel(world, count, _points(rng, count, 2), lender_dies)


def readers(world: World) -> None:
    """A retrieve halts amid its chunks while their slots are rewritten."""
    rng = world.rng
    count = rng.randint(1, min(4, world.capacity))
    _prepare(world, fresh=True)
    one, two, three = rng.sample(world.free(), 3)
    world.finish(_store(world, one, "A", count))
    windows: list[Aim] = [_aim(rng, rng.choice(["loading", "loaded"]), rng.randrange(count)) for _ in range(2)]
    a = world.retrieve(two, "A", [*windows, *([_aim(rng, "leased")] if rng.random() < 0.4 else [])])
    world.settle(a)
    rng.choice([restart, restart, lender_dies, nothing])(world, a)
    for name in ("B", "C"):
        world.finish(_store(world, three, name, world.capacity))
    _finish(world, [a])
    if a.value is not None:
        world.judge("A", two, a.value)


# -- what happens in the middle --------------------------------------------------------------------------------------------


def nothing(world: World, call: Call) -> None:
    """No event."""


def restart(world: World, call: Call) -> None:
    """The manager dies and comes back, once or twice."""
    for _ in range(world.rng.choice([1, 1, 1, 2])):
        world.restart_manager()
        world.wait_ready()


def close(world: World, call: Call) -> None:
    """Another thread of the same process closes the engine; what follows may happen meanwhile."""
    if call.over:
        return
    world.say(f"{call.actor.name}: close")
    call.actor.closed = True
    closing = world.begin(call.actor, "close")
    if world.rng.random() < 0.5:
        world.finish(closing)


def halted_mount(world: World, call: Call) -> None:
    """The manager restarts; a lender halts in its mount, the writer may go on meanwhile, and the manager may die again."""
    rng = world.rng
    window = rng.choice(["reading", "mounting", "mounting", "mounted"])
    armed = world.arm(rng.choice(world.lenders), _aim(rng, window))
    world.kill_manager()
    world.start_manager()
    if world.await_mount(armed):
        for _ in range(rng.randint(0, 2)):
            _go_on(world, call)
        what = rng.random()
        if what < 0.3:
            world.kill_manager()
            world.go_on(armed)
            world.start_manager()
        elif what < 0.4:
            world.kill(armed.actor)
            world.replenish_lenders()
        else:
            world.go_on(armed)
    world.wait_ready()


def lender_dies(world: World, call: Call) -> None:
    """One or both lenders are killed, and others come; the manager may restart meanwhile."""
    for lender in world.rng.sample(world.lenders, world.rng.choice([1, 1, 2])):
        world.kill(lender)
    if world.rng.random() < 0.3:
        world.restart_manager()
    world.replenish_lenders()
    world.wait_ready()


# -- parts -------------------------------------------------------------------------------------------------------------------


def _duel(world: World, count: int, first: Sequence[Aim], event: Event, *, fresh: bool | None = None) -> None:
    """Store A, halted; the event; store B, halted as well; both go on in random order; everything is read."""
    rng = world.rng
    _prepare(world, fresh=rng.random() < 0.5 if fresh is None else fresh)
    one, two = rng.sample(world.free(), 2)
    a = _store(world, one, "A", count, first)
    event(world, a)
    size = rng.choice([world.capacity, rng.randint(1, world.capacity)])
    b = _store(world, two, "B", size, _points(rng, min(size, 3), rng.randint(0, 2)))
    _finish(world, [a, b])


def _overtake(world: World, count: int, first: Sequence[Aim]) -> None:
    """Store A, halted; the manager restarts; store B, halted with its tickets; A comes to its next halt; B and then A go on."""
    rng = world.rng
    _prepare(world, fresh=rng.random() < 0.7)
    one, two = rng.sample(world.free(), 2)
    a = _store(world, one, "A", count, first)
    restart(world, a)
    size = rng.choice([world.capacity, rng.randint(1, world.capacity)])
    b = _store(world, two, "B", size, [_aim(rng, rng.choice(["begun", "granted"]))])
    for call in (a, b, a):
        _go_on(world, call)
    _finish(world, [a, b])


def _prepare(world: World, *, fresh: bool) -> None:
    """An empty pool, or one full of older prompts."""
    worker = world.rng.choice(world.free())
    if fresh:
        world.finish(world.begin(worker, "clear"))
    else:
        for name in ("old", "older"):
            world.finish(_store(world, worker, name, world.capacity))


def _store(world: World, worker: object, name: str, chunks: int, aims: Sequence[Aim] = ()) -> Call:
    """Begin it, and wait until it halts or is over. B may begin like A."""
    rng = world.rng
    tokens = max(1, chunks * CHUNK - rng.choice([0, 0, 0, rng.randrange(CHUNK)]))
    like = "A" if name == "B" and "A" in world.prompts and rng.random() < 0.1 else ""
    if like and tokens < CHUNK:
        tokens = CHUNK
    call = world.store(worker, world.prompt(name, tokens, like), aims)  # type: ignore[arg-type]
    world.settle(call)
    return call


def _go_on(world: World, call: Call) -> None:
    if call.aim is not None:
        world.go_on(call)
        world.settle(call)


def _finish(world: World, calls: list[Call]) -> None:
    """Let halted calls go on in random order, kill some, restart the manager now and then; then read everything."""
    rng = world.rng
    while halted := [call for call in calls if call.aim is not None]:
        call, what = rng.choice(halted), rng.random()
        if what < 0.08:
            world.kill(call.actor)
        elif what < 0.16:
            restart(world, call)
        else:
            _go_on(world, call)
    world.finish_all()
    world.replenish()
    world.wait_ready()
    world.check()
    if rng.random() < 0.4:
        restart(world, calls[0])
        world.check()


def _aim(rng: Random, window: str, chunk: int = 0, step: int = 0) -> Aim:
    return Aim(window, chunk, step, stop=rng.random() < 0.6)  # type: ignore[arg-type]


def _points(rng: Random, chunks: int, most: int) -> list[Aim]:
    """Up to `most` points of a put, at random."""
    aims = []
    for _ in range(most):
        window = rng.choice(["granted", "begun", "header", "header", "payload", "payload", "landed"])
        chunk = rng.randrange(chunks) if window in ("header", "payload") else 0
        aims.append(_aim(rng, window, chunk, rng.randint(1, HEADER_STORES) if window == "header" else 0))
    return aims


DUELS: dict[str, Callable[[World], None]] = {
    "payloads": payloads,
    "announcements": announcements,
    "stale-tickets": stale_tickets,
    "torn-headers": torn_headers,
    "landings": landings,
    "closings": closings,
    "mounts": mounts,
    "deaths": deaths,
    "readers": readers,
}
