"""`make soak`: real processes, killed, stopped and restarted in the middle of what they do; every byte that a retrieve marks
True is compared.

Rounds follow each other until the time is over. In a directed round a store, retrieve or mount halts at a chosen point (between
its tickets and its first header, after a single store of a header, amid a payload, before the manager hears of it), the manager
or a lender dies and comes back, another writer takes the slots, and both go on. Between them are rounds in which anything
happens in any order. Exit code: 1 after a wrong byte, an exception out of a call, a call that ran for more than 30 s, or a
process that ended although nobody killed it; else 0."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from soak_duels import DUELS
from soak_schedule import schedule
from soak_tally import Tally
from soak_world import World

ROUNDS = {**DUELS, "random": schedule}
WEIGHTS = {"payloads": 3, "torn-headers": 3, "stale-tickets": 3, "announcements": 2, "random": 2, "mounts": 2, "closings": 2}
"""Others: 1."""
PROGRESS = 30.0
"""Seconds between two lines."""


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long new rounds begin (10)")
    parser.add_argument("--seed", type=int, default=None, help="of all choices; default: a new one, which is printed")
    parser.add_argument("--only", choices=sorted(ROUNDS), default="", help="rounds of one kind")
    parser.add_argument("--first", action="store_true", help="end at the first failure")
    parser.add_argument(
        "--without-gate",
        dest="without",
        nargs="?",
        const="gate",
        default="",
        choices=("gate", "fence", "count"),
        help="workers undo the write gate, or one half of it: the soak must fail",
    )
    parser.add_argument("--verbose", action="store_true", help="print what happens in every round, not only in failed ones")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(sys.argv[1:] if arguments is None else arguments)
    seed = random.SystemRandom().randrange(2**32) if chosen.seed is None else chosen.seed
    print(f"seed {seed}, {chosen.minutes:g} minutes", flush=True)
    signal.signal(signal.SIGTERM, _end)
    # Shells have their background jobs ignore it; whoever sends it to this process wants it to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tally, began = Tally(), time.monotonic()
    try:
        soak(tally, seed, began + 60 * chosen.minutes, chosen)
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        print(tally.summary(time.monotonic() - began), flush=True)
        return 130
    print(tally.summary(time.monotonic() - began), flush=True)
    return int(tally.failed)


def soak(tally: Tally, seed: int, until: float, chosen: argparse.Namespace) -> None:
    """Rounds until then, or until the first failure, as `chosen`."""
    told = time.monotonic()
    order = random.Random(seed)
    names = [chosen.only] if chosen.only else list(ROUNDS)
    weights = [WEIGHTS.get(name, 1) for name in names]
    with World(random.Random(seed), tally, without=chosen.without) as world:
        number = 0
        while time.monotonic() < until and not (chosen.first and tally.failed):
            number += 1
            name = order.choices(names, weights)[0]
            world.begin_round(random.Random(f"{seed}/{number}"))
            failures, began = tally.failures, time.monotonic()
            ROUNDS[name](world)
            world.end_round()
            tally.rounds[name] += 1
            if tally.failures > failures or chosen.verbose:
                what = "FAILED" if tally.failures > failures else "clean"
                print(
                    "\n".join(
                        [
                            f"round {number} ({name}): {what}, {time.monotonic() - began:.1f} s",
                            *(f"    {line}" for line in world.log),
                        ]
                    ),
                    flush=True,
                )
            if time.monotonic() > told + PROGRESS:
                told = time.monotonic()
                print(f"{number} rounds, {tally.compared} tokens compared, {tally.wrong} wrong", flush=True)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
