"""The worlds in which the protocol is tried, and protocols with one fault each that must be found.

`python tests/protocol/cases.py matrix` tries the protocol in larger worlds, for minutes and in gigabytes of memory;
`python tests/protocol/cases.py trace NAME` prints what a fault leads to.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

from model import Model, World


class Mutant(NamedTuple):
    """`deviations` from the protocol lead to `finding` in `world`."""

    finding: str
    """"wrong": wrong bytes. "stuck": something never works again. "lost": a complete chunk is overlooked, bytes are right."""
    steps: int
    """Of the shortest way there."""
    world: World
    deviations: tuple[str, ...]
    harmless: World | None = None
    """A world in which nothing comes of it: of a stronger memory."""


LANDED = ("no gate", "identity before the odd generation", "unknown signer taken for ended")
"""Headers alone, as they were before there was a gate."""

CLOCK = "the clock alone says where generations start"

SC, TSO, WEAK = World(), World(memory="TSO"), World(memory="WEAK")


def _one(finding: str, steps: int, world: World, deviation: str, harmless: World | None = None) -> tuple[str, Mutant]:
    return deviation, Mutant(finding, steps, world, (deviation,), harmless)


MUTANTS: dict[str, Mutant] = dict(
    [
        # The writer's gate.
        _one("wrong", 27, SC, "no gate"),
        _one("wrong", 31, SC, "F not compared"),
        _one("wrong", 33, SC, "U set after F is compared"),
        ("no fence between U and F: writer", Mutant("wrong", 48, TSO, ("no fence between U and F: writer",), SC)),
        _one("wrong", 34, SC, "U cleared when queued"),
        _one("stuck", 18, World(fail=True), "U not cleared after an exception"),
        _one("wrong", 35, World(visitor=True), "U cleared while another thread writes"),
        _one("wrong", 34, World(relink=True), "row tied to a connection"),
        _one("wrong", 30, World(formats=True), "slab formatted before the gate"),
        # The lender's mount.
        _one("wrong", 41, World(late=True), "F is the epoch"),
        _one("wrong", 33, SC, "F is constant"),
        _one("wrong", 33, SC, "U read before F is written"),
        _one("wrong", 33, SC, "U and headers read before F is written"),
        _one("lost", 23, SC, "headers read before F is written"),
        _one("wrong", 48, TSO, "no fence between F and U: lender", SC),
        _one("lost", 33, WEAK, "no fence between U and the headers", TSO),
        _one("stuck", 15, World(stop=True), "busy words not looked at again"),
        # The manager.
        _one("wrong", 33, SC, "granted in spite of `wait`"),
        _one("wrong", 34, SC, "`wait` cleared by a clock"),
        _one("stuck", 18, World(managers=1, remount=True), "grants carry the F of an earlier mount"),
        _one("stuck", 32, World(floors=(20, 4)), "the clock alone says where generations start"),
        # Coming and going.
        _one("wrong", 40, World(memory="TSO", kill=True), "hang-up told before the last store has landed", World(kill=True)),
        _one("wrong", 34, SC, "hello amid a write"),
        _one("wrong", 25, World(managers=1, close=True), "Goodbye amid a write"),
        # The header.
        _one("wrong", 13, SC, "identity before the odd generation"),
        _one("wrong", 17, WEAK, "no fence after the odd generation", TSO),
        _one("wrong", 20, SC, "even generation before the payload"),
        _one("wrong", 29, WEAK, "no fence between the payload and the even generation", TSO),
        _one("wrong", 10, World(managers=1, reader=True), "reader looks at the header once"),
        # A ring before the slots.
        (
            "refused slot overwritten",
            Mutant("wrong", 40, World(managers=3, floors=(20, 4, 4), ring=True), (CLOCK, "refused slot overwritten")),
        ),
        # What was there before the gate: headers alone, each fault by itself.
        ("headers alone: F1", Mutant("wrong", 27, SC, ("no gate",))),
        ("headers alone: torn announcement", Mutant("wrong", 9, SC, LANDED)),
        (
            "headers alone: torn publication",
            Mutant("wrong", 22, World(settled=True), ("no gate", "unknown signer taken for ended")),
        ),
        (
            "headers alone: close amid a write",
            Mutant("wrong", 22, World(managers=1, close=True), (*LANDED, "Goodbye amid a write")),
        ),
    ]
)

WORLDS: dict[str, World] = {
    "one restart": SC,
    "reader": World(reader=True),
    "reader, a writer dies": World(reader=True, kill=True, lapse=True),
    "reader, TSO": World(memory="TSO", reader=True),
    "two restarts, all faults of a client, equal clocks": World(
        managers=3, kill=True, close=True, lapse=True, fail=True, relink=True, floors=(10, 10, 10)
    ),
    "an idle client stops": World(stop=True, lapse=True),
    "an idle client stops, TSO": World(memory="TSO", stop=True, lapse=True),
    "slabs formatted anew": World(managers=3, formats=True),
    "lender mounts again": World(remount=True, kill=True, formats=True),
    "two threads in a slab": World(visitor=True, remount=True, fail=True),
    "two threads in a slab, TSO": World(memory="TSO", visitor=True, kill=True),
    "two threads in a slab, WEAK": World(memory="WEAK", visitor=True),
    "segment numbers swap, late": World(late=True),
    "two restarts, clock goes back, TSO": World(memory="TSO", managers=3, kill=True, lapse=True, floors=(10, 4, 4)),
    "puts follow each other, TSO": World(memory="TSO", puts=(2, 2)),
    "close and death, clock goes back, WEAK": World(
        memory="WEAK", kill=True, close=True, lapse=True, fail=True, floors=(10, 4), formats=True
    ),
    "ring, clock goes back": World(managers=3, floors=(20, 4, 4), ring=True, kill=True, lapse=True, formats=True),
    "ring, TSO": World(memory="TSO", ring=True, reader=True, lapse=True),
    "ring, WEAK": World(memory="WEAK", managers=1, puts=(2, 1), ring=True, reader=True),
    "two restarts, WEAK": World(memory="WEAK", managers=3, relink=True),
}
"""All together well under a minute."""

_CLIENT = World(kill=True, close=True, lapse=True, fail=True, stop=True, relink=True, visitor=True, remount=True, formats=True)
MATRIX: dict[str, World] = {
    f"{title}, {memory}": world._replace(memory=memory)
    for title, world in {
        "all faults, equal clocks": _CLIENT._replace(floors=(10, 10)),
        "all faults, clock goes back": _CLIENT._replace(floors=(10, 4)),
        "two restarts, two puts, equal clocks": World(
            managers=3, puts=(2, 1), kill=True, close=True, lapse=True, fail=True, floors=(10, 10, 10)
        ),
        "two restarts, clock goes back": World(managers=3, kill=True, close=True, lapse=True, formats=True, floors=(10, 4, 4)),
        "reader, two restarts": World(managers=3, reader=True, kill=True, lapse=True),
        "segment numbers swap, late, a writer dies": World(late=True, kill=True),
        "two puts each": World(puts=(2, 2), lapse=True),
    }.items()
    for memory in ("SC", "TSO", "WEAK")
}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["trace"]:
        mutant = MUTANTS[" ".join(arguments[1:])]
        print(Model(mutant.world, *mutant.deviations).check())
    elif arguments == ["matrix"]:
        for title, world in (WORLDS | MATRIX).items():
            began = time.monotonic()
            try:
                verdict = str(Model(world).check())
            except RuntimeError as error:
                verdict = f"no fault so far, {error}"
            print(f"{title}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)
    else:
        raise SystemExit("cases.py matrix | trace NAME")


if __name__ == "__main__":
    main(sys.argv[1:])
