"""Rounds without a script: at each step a random one of the things that can happen now."""

from __future__ import annotations

from collections.abc import Callable

from soak_checker import Read
from soak_windows import HEADER_STORES, Aim, Window
from soak_world import CHUNK, Call, World

STEPS = 80
PROMPTS = 10


class Schedule:
    """One round."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._reads: list[tuple[str, Call]] = []
        self._left = {"manager": 2, "lender": 1, "worker": 1}
        """How often each kind of process may still be killed; starting one takes most of a round's time."""
        for number in range(PROMPTS):
            tokens = world.rng.randint(1, 5 * CHUNK)
            like = f"P{number - 1}" if number % 3 and tokens >= CHUNK else ""
            world.prompt(f"P{number}", tokens, like)

    def run(self) -> None:
        """All steps, then the end of everything that was begun, and a look at all prompts."""
        world = self._world
        steps: list[tuple[int, Callable[[], bool]]] = [
            (24, self._begin),
            (16, self._go_on),
            (14, self._settle),
            (3, self._freeze),
            (5, self._thaw),
            (1, self._freeze_manager),
            (2, self._kill_manager),
            (1, self._kill_lender),
            (1, self._kill_worker),
        ]
        done = 0
        while done < STEPS:
            step = world.rng.choices([what for _, what in steps], [weight for weight, _ in steps])[0]
            done += step()
        world.replenish()
        world.finish_all()
        for name, call in self._reads:
            if isinstance(call.value, Read):
                world.judge(name, call.actor, call.value)
        world.wait_ready()
        world.check()

    def _begin(self) -> bool:
        world, rng = self._world, self._world.rng
        if not (idle := world.free()):
            return self._settle()
        worker, name = rng.choice(idle), rng.choice(list(world.prompts))
        if rng.random() < 0.5:
            world.store(worker, name, self._aims("granted", "begun", "header", "header", "payload", "payload", "landed"))
        else:
            self._reads.append((name, world.retrieve(worker, name, self._aims("leased", "loading", "loaded"))))
        return True

    def _aims(self, *windows: Window) -> list[Aim]:
        rng, aims = self._world.rng, []
        for window in rng.choices(windows, k=rng.choice([0, 0, 1, 2])):
            chunk = 0 if window in ("granted", "begun", "landed", "leased") else rng.randrange(3)
            aims.append(Aim(window, chunk, rng.randint(1, HEADER_STORES) * (window == "header"), rng.random() < 0.5))
        return aims

    def _go_on(self) -> bool:
        halted = self._world.halted()
        if halted:
            self._world.go_on(self._world.rng.choice(halted))
        return bool(halted)

    def _settle(self) -> bool:
        """Wait for one call, or for a halted one to go on when nothing runs."""
        world = self._world
        running = [call for call in world.calls() if call.running]
        if running:
            world.settle(world.rng.choice(running))
        return bool(running)

    def _freeze(self) -> bool:
        world = self._world
        actors = [actor for actor in (*world.workers, *world.lenders) if not actor.frozen]
        if len(actors) > 3:
            world.freeze(world.rng.choice(actors))
        return len(actors) > 3

    def _thaw(self) -> bool:
        world = self._world
        if world.manager_frozen:
            world.freeze_manager(False)
            return True
        stopped = [
            actor
            for actor in (*world.workers, *world.lenders)
            if actor.frozen and not any(call.aim is not None and call.aim.stop for call in actor.calls)
        ]
        if stopped:
            world.thaw(world.rng.choice(stopped))
        return bool(stopped)

    def _freeze_manager(self) -> bool:
        if self._world.manager_frozen:
            return False
        self._world.freeze_manager(True)
        return True

    def _kill_manager(self) -> bool:
        if not self._may("manager"):
            return False
        self._world.restart_manager()
        return True

    def _kill_lender(self) -> bool:
        if not self._may("lender"):
            return False
        self._world.kill(self._world.rng.choice(self._world.lenders))
        self._world.replenish_lenders()
        return True

    def _kill_worker(self) -> bool:
        if not self._may("worker"):
            return False
        self._world.kill(self._world.rng.choice(self._world.workers))
        return True

    def _may(self, kind: str) -> bool:
        self._left[kind] -= 1
        return self._left[kind] >= 0


def schedule(world: World) -> None:
    Schedule(world).run()
