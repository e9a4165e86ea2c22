"""Demotion goes at a bounded rate, and not in front of a load."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from support.room_maker_world import DRAM, SLOT_BYTES, VRAM, Pause, World

from vcache.cache import room_maker
from vcache.cache.pace import Pace
from vcache.cache.pool import Lease


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


class VirtualTime:
    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_a_pace_is_kept_over_any_time() -> None:
    chosen, pace, now, moved = random.Random(1), Pace(1000.0, 0.0, 0.25), 0.0, 0
    for _ in range(2000):
        now += pace.delay(now)
        assert pace.delay(now) == 0
        assert moved <= 1000 * (now + 0.25) + 1e-6, "what was begun is paid for"
        nbytes = chosen.choice([1, 50, 400])
        moved += nbytes
        now += chosen.choice([0.0, 0.0, 0.001, 0.3])
        pace.moved(nbytes, now)
    busy = Pace(1000.0, 0.0)
    now = 0.0
    for _ in range(100):
        now += busy.delay(now)
        busy.moved(100, now)
    assert now == pytest.approx(99 * 0.1 - 0.25, abs=0.11), "it is no slower than it may be"


def test_idle_time_is_not_saved_up_without_end() -> None:
    pace = Pace(1000.0, 0.0, 0.25)
    pace.moved(500, 1000.0)
    assert pace.delay(1000.0) == 0.25


def test_without_a_limit_nothing_waits() -> None:
    pace = Pace(0.0, 0.0)
    pace.moved(10**15, 0.0)
    assert pace.delay(0.0) == 0


def test_plans_are_short_and_wait_for_their_turn(world: World) -> None:
    """Nothing is leased, and the write gate is open, while it waits."""
    time, rate = VirtualTime(), 4 * SLOT_BYTES
    open_gates: list[bool] = []

    def pause(seconds: float) -> None:
        open_gates.append(world.pool.no_writes())
        assert len(world.manager.of("release")) == len(world.manager.of("demote"))
        time.pause(seconds)

    maker = world.maker(rate=rate, clock=lambda: time.now, pause=pause)
    for slot in range(6):
        world.plan_moves(world.move(world.fill(VRAM, slot), slot, slot))
    began = time.now
    world.make_room(maker)
    assert world.count("demoted_chunks") == 6
    assert {nbytes for nbytes, _ in world.manager.of("demote")} == {rate // 4}
    moved = sum(header.payload_bytes for slot in range(6) if (header := world.header(DRAM, slot)) is not None)
    assert time.now - began >= moved / rate - 0.25 - SLOT_BYTES / rate
    assert time.now > began
    assert open_gates
    assert all(open_gates)


def test_the_default_has_no_limit(world: World) -> None:
    time = VirtualTime()
    maker = world.maker(clock=lambda: time.now, pause=time.pause)
    world.plan_moves(*(world.move(world.fill(VRAM, slot), slot, slot) for slot in range(4)))
    world.make_room(maker)
    assert (world.count("demoted_chunks"), time.pauses) == (4, [])


def test_it_waits_for_a_load_that_is_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_maker, "PATIENCE", 60.0)
    maker = world.maker()
    load = world.pool.load(Lease(0, []), [], None)  # type: ignore[arg-type]
    asked = Pause()
    monkeypatch.setattr(world.pool, "wait_loads", lambda timeout=None, real=world.pool.wait_loads: wait(real, timeout))

    def wait(real, timeout):  # type: ignore[no-untyped-def]
        if timeout:
            asked.reached.set()
        return real(timeout)

    world.plan_moves(world.move(world.fill(VRAM, 0), 0, 0))
    world.manager.want_room()
    assert asked.reached.wait(10)
    assert not world.manager.of("demote")
    assert world.pool.no_writes()
    load.result()
    assert maker.wait_idle(10)
    assert world.count("demoted_chunks") == 1


def test_a_load_that_never_ends_does_not_stop_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_maker, "PATIENCE", 0.01)
    maker = world.maker()
    load = world.pool.load(Lease(0, []), [], None)  # type: ignore[arg-type]
    world.plan_moves(*(world.move(world.fill(VRAM, slot), slot, slot) for slot in range(4)))
    world.make_room(maker)
    assert world.count("demoted_chunks") == 4
    assert not world.pool.wait_loads(0)
    load.result()
    assert world.pool.wait_loads(0)
