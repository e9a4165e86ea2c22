"""Which new chunks may push others out of a full pool (`manager.admission`)."""

from __future__ import annotations

import itertools
import random
from hashlib import blake2b

import pytest

from vcache.bench.trace import Replay, policy_of
from vcache.errors import IntegrityError
from vcache.manager.api import Lookup, PutEnd, PutRequest, PutStart, Story, Ticket
from vcache.manager.directory.admission import MAX_GENERATION, Admission, OfferMemory
from vcache.segment.slots import ALIGNMENT

CHUNKS = 64
CLIENT = b"engine".ljust(16)


def key(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def prompt(name: object, length: int = 4) -> list[bytes]:
    return [key(name, index) for index in range(length)]


class Load:
    """One-off prompts, and a set that comes again and again, too rarely for an LRU."""

    def __init__(self, admission: str, wanted: int = 12) -> None:
        self.pool = Replay(policy_of(f"lru+{admission}").config, CHUNKS)
        self.wanted = [prompt(("wanted", number)) for number in range(wanted)]
        self.now, self.hits, self.number = 0.0, 0, itertools.count()

    def ask(self, keys: list[bytes]) -> int:
        self.now += 2.0
        return self.pool.request(self.now, keys)

    def play(self, rounds: int, one_offs: int = 2) -> int:
        """Hits of the prompts that are wanted."""
        hits = 0
        for _ in range(rounds):
            for keys in self.wanted:
                hits += self.ask(keys)
                for _ in range(one_offs):
                    self.ask(prompt(next(self.number)))
        self.pool.directory.check_integrity()
        return hits

    @property
    def counters(self) -> dict[str, int]:
        return self.pool.directory.stats(self.now).counters

    @property
    def selective(self) -> int:
        return self.pool.directory.stats(self.now).gauges["admission_selective"]


def test_one_off_prompts_do_not_push_out_what_is_wanted() -> None:
    everything, reuse = Load("all"), Load("reuse")
    assert everything.play(20) == 0  # 48 chunks that are wanted and 96 others a round, in 64
    assert everything.counters["puts_not_admitted"] == 0
    reuse.play(20)
    assert reuse.selective
    assert reuse.play(5) == 5 * 12 * 4
    assert reuse.counters["puts_not_admitted"] > 0
    assert reuse.counters["puts_no_space"] == 0


def test_second_turns_are_served_where_the_pool_is_large_enough_for_them() -> None:
    """Each prompt comes twice, soon: to let in only what was offered before would lose half of all hits there are."""
    load = Load("reuse")
    hits = 0
    for number in range(600):
        load.ask(prompt(number))
        hits += load.ask(prompt(number - 5)) if number >= 5 else 0
    assert not load.selective
    assert hits == 595 * 4


def test_a_load_that_changes_is_followed() -> None:
    load = Load("reuse")
    load.play(20)
    assert load.selective
    for number in range(600):
        load.ask(prompt(("turn", number)))
        load.ask(prompt(("turn", number - 5)))
    assert not load.selective
    assert sum(load.ask(prompt(("turn", number))) for number in range(595, 600)) == 20


def selective_pool() -> Load:
    load = Load("reuse")
    load.play(20)
    assert load.selective
    return load


def offer(load: Load, keys: list[bytes], shard: int = 0, num_shards: int = 1) -> list[str]:
    load.now += 2.0
    request = PutRequest(
        keys=keys,
        namespace=bytes(16),
        parent=b"",
        first_index=0,
        tokens=[1] * len(keys),
        slot_bytes=ALIGNMENT,
        shard=shard,
        num_shards=num_shards,
    )
    directory = load.pool.directory
    directory.heartbeat(CLIENT, load.now)
    directory.heartbeat(b"lender".ljust(16), load.now)
    grants = directory.handle(CLIENT, PutStart(request), load.now).finish()  # type: ignore[attr-defined]
    tickets = [
        Ticket(name, shard, grant.location.generation)
        for name, grant in zip(keys, grants, strict=True)
        if grant.location is not None
    ]
    assert all(directory.handle(CLIENT, PutEnd(tickets), load.now))  # type: ignore[call-overload]
    directory.check_integrity()
    return [grant.status for grant in grants]


def test_the_second_offer_is_let_in_and_a_look_up_is_none() -> None:
    load = selective_pool()
    keys = prompt("new")
    evictions = load.counters["evictions"]
    for _ in range(3):
        assert load.pool.directory.handle(CLIENT, Lookup(keys), load.now) == 0
    assert offer(load, keys) == ["no_space"] * 4
    assert load.counters["evictions"] == evictions
    assert offer(load, keys) == ["granted"] * 4


def test_what_follows_on_a_refused_chunk_is_refused() -> None:
    load = selective_pool()
    tail = prompt("known")
    offer(load, tail)
    assert offer(load, [key("unknown"), *tail]) == ["no_space"] * 5


def test_each_shard_of_a_chunk_is_offered_for_itself() -> None:
    """The shards of one first offer are refused all, those of the second let in all."""
    load = selective_pool()
    keys = prompt("sharded", 2)
    assert [offer(load, keys, shard, 2) for shard in (0, 1)] == [["no_space"] * 2] * 2
    assert [offer(load, keys, shard, 2) for shard in (1, 0)] == [["granted"] * 2] * 2
    assert load.ask(keys) == 2


def test_a_chunk_that_has_a_shard_gets_the_others() -> None:
    load = selective_pool()
    keys = prompt("half", 1)
    offer(load, keys, 0, 2)
    assert offer(load, keys, 0, 2) == ["granted"]
    assert offer(load, keys, 1, 2) == ["granted"]


def test_where_there_is_room_everything_is_let_in() -> None:
    load = selective_pool()
    visible = load.pool.directory._state.chunks.visible
    victim = next(record for record in visible.values() if not record.children)
    load.pool.directory._state.evict(victim, "test")
    assert offer(load, prompt("first", 2)) == ["granted", "no_space"]


def test_the_story_of_a_refused_chunk() -> None:
    load = selective_pool()
    name = key("told")
    offer(load, [name])
    entries = load.pool.directory.handle(CLIENT, Story(name), load.now)
    assert [(entry.what, entry.detail) for entry in entries][:1] == [("not granted", "not admitted")]  # type: ignore[attr-defined]


def test_a_pool_that_was_never_full_keeps_nothing() -> None:
    load = Load("reuse", wanted=4)
    load.play(3, one_offs=0)
    assert not load.pool.directory._state.admission.follows


# -- what it is made of ------------------------------------------------------------------------------------------------


def test_offers_are_remembered_for_one_generation_at_least() -> None:
    memory = OfferMemory(1000)
    keys = [key(number) for number in range(5000)]
    assert sum(memory.offer(name, 0) for name in keys) < 0.05 * len(keys)
    assert all(memory.offer(name, 0) for name in keys[-1000:])
    again = [memory.offer(key("other", number), 0) for number in range(2000)]
    assert sum(again) < 100
    assert sum(memory.offer(name, 0) for name in keys[:1000]) < 50


def test_the_memory_has_a_bound() -> None:
    assert OfferMemory(10**12).nbytes == OfferMemory(MAX_GENERATION).nbytes <= 2**23


def test_uses_of_one_prompt_count_once() -> None:
    admission = Admission("reuse")
    admission.full(CHUNKS)
    names = [key(number) for number in range(CHUNKS)]
    for clock in range(7):
        admission.used(names, 100 + clock)
    duel = admission._duel
    assert duel is not None
    assert (duel.uses, duel.hits_all, duel.hits_again) == (CHUNKS, 0, 0)
    admission.used(names, 108)
    assert (duel.hits_all, duel.hits_again) == (CHUNKS, CHUNKS)


def test_what_is_found_and_what_is_offered_counts_as_use_once_for_all_shards() -> None:
    load = selective_pool()
    duel = load.pool.directory._state.admission._duel
    assert duel is not None
    while duel.uses > 100:  # not just before a judgement, which begins to count anew
        load.ask(prompt(next(load.number)))
    before = duel.uses
    assert load.ask(load.wanted[0]) == 4
    assert duel.uses == before + 4
    offer(load, prompt("offered", 2), 0, 2)
    load.now += 2
    offer(load, prompt("offered", 2), 1, 2)
    assert duel.uses == before + 6


@pytest.mark.parametrize("name", ["all", "reuse"])
def test_sizes_follow_the_pool_and_stay_bounded(name: str) -> None:
    chosen, admission = random.Random(3), Admission(name)  # type: ignore[arg-type]
    for chunks in (0, 1, 3, 64, 5000, 4000, 3, 100_000, 90_000, 2_000_000, 100):
        admission.full(chunks)
        for clock in range(30):
            keys = [key(chosen.randrange(3000)) for _ in range(100)]
            admission.used(keys, clock * 10)
            admission.offered(keys, 0)
        admission.check_integrity()
    assert admission.follows == (name == "reuse")


def test_integrity_is_checked() -> None:
    admission = Admission("reuse")
    admission.selective = True
    with pytest.raises(IntegrityError, match="selective"):
        admission.check_integrity()
    admission.full(4)
    assert admission._duel is not None
    admission._duel.all |= {key(number): 0 for number in range(5)}
    with pytest.raises(IntegrityError, match="admission: shadows"):
        admission.check_integrity()
    admission._duel.all.clear()
    admission._duel.again[key(1)] = admission._duel.once[key(1)] = None
    with pytest.raises(IntegrityError, match="waits"):
        admission.check_integrity()
