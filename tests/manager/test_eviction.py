"""Eviction order: LRU and SIEVE, tails before heads, leased records never, bounded work."""

from __future__ import annotations

from itertools import zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.errors import IntegrityError
from vcache.manager.directory import eviction
from vcache.manager.directory.chunks import ChunkTable, deepest_first
from vcache.manager.directory.eviction import EvictionPolicy, LruPolicy, SievePolicy, make_policy
from vcache.manager.directory.records import Namespace, Record
from vcache.segment.slots import SlotLocation

NAMESPACE = Namespace(b"n" * 16)
both = pytest.mark.parametrize("name", ["lru", "sieve"])


def add_chain(policy: EvictionPolicy, name: str, length: int, clock: int = 1, batch: int = 0) -> list[Record]:
    """A prompt's chunks, published in batches of `batch` (0: all at once), linked head to tail."""
    table = ChunkTable(policy)
    records = [Record(f"{name}{index}".encode(), NAMESPACE, index) for index in range(length)]
    for start in range(0, length, batch or length or 1):
        group = records[start : start + (batch or length)]
        for record in group:
            record.packed = SlotLocation(1, 0, 1, 0, 256, 2).pack()
            record.used = clock
            if record.index:
                table.orphans += 1
                table.link(record, records[record.index - 1])
        for record in deepest_first(group):
            policy.add(record, 256)
    policy.check_integrity()
    return records


def evict(policy: EvictionPolicy) -> Record | None:
    record = policy.victim(256, None)
    if record is not None:
        assert not record.leased
        assert not record.children
        policy.discard(record)
        if record.parent is not None:
            record.parent.children -= 1
            if record.parent.child is record:
                record.parent.child = None
        record.packed = b""
    policy.check_integrity()
    return record


def order(policy: EvictionPolicy) -> list[str]:
    names = []
    while (record := evict(policy)) is not None:
        names.append(record.key.decode())
    return names


@both
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_the_tail_of_a_prefix_goes_before_its_head(name, batch):
    policy = make_policy(name)
    add_chain(policy, "a", 5, batch=batch)
    assert order(policy) == ["a4", "a3", "a2", "a1", "a0"]


@both
def test_older_prompts_go_first(name):
    policy = make_policy(name)
    add_chain(policy, "a", 2, clock=1)
    add_chain(policy, "b", 2, clock=2)
    assert order(policy) == ["a1", "a0", "b1", "b0"]


@both
def test_a_lookup_protects_without_making_the_tail_hotter_than_the_head(name):
    policy = make_policy(name)
    a = add_chain(policy, "a", 3, clock=1)
    add_chain(policy, "b", 2, clock=2)
    policy.touch(a, 3)
    assert order(policy) == ["b1", "b0", "a2", "a1", "a0"]


def test_lru_orders_by_last_use():
    policy = LruPolicy()
    chains = [add_chain(policy, name, 1, clock=1) for name in "abcd"]
    policy.touch(chains[0], 2)
    policy.touch(chains[2], 3)
    policy.touch(chains[2], 4)
    assert order(policy) == ["b0", "d0", "a0", "c0"]


def test_lru_parent_is_not_colder_than_a_child_used_alone():
    policy = LruPolicy()
    a = add_chain(policy, "a", 2, clock=1)
    add_chain(policy, "b", 1, clock=2)
    policy.touch(a[1:], 3)
    assert order(policy) == ["b0", "a1", "a0"]


def test_sieve_spares_what_was_visited_once_per_round():
    policy = SievePolicy()
    a, _b, c = (add_chain(policy, name, 1) for name in "abc")
    policy.touch(a, 2)
    policy.touch(c, 2)
    assert evict(policy).key == b"b0"
    # The hand went past a and clears c on its way round; a is unvisited now.
    assert order(policy) == ["a0", "c0"]


def test_sieve_drops_new_records_that_nobody_used_before_old_ones_that_were():
    policy = SievePolicy()
    a, _b, _c = (add_chain(policy, name, 1) for name in "abc")
    policy.touch(a, 2)
    assert evict(policy).key == b"b0"
    add_chain(policy, "d", 1)
    assert order(policy) == ["c0", "d0", "a0"]


@both
def test_pinned_records_stay_and_protect_their_heads(name):
    policy = make_policy(name)
    a = add_chain(policy, "a", 3)
    add_chain(policy, "b", 2)
    a[1].leased = 1
    assert order(policy) == ["a2", "b1", "b0"]
    a[1].leased = 0
    assert order(policy) == ["a1", "a0"]


@both
def test_everything_pinned_ends_in_bounded_work(name, monkeypatch):
    policy = make_policy(name)
    records = add_chain(policy, "a", 300)
    records[-1].leased = 1
    policy.touch(records, 2)
    assert policy.victim(256, None) is None
    monkeypatch.setattr(eviction, "MAX_STEPS", 50)
    assert policy.victim(256, None) is None
    policy.check_integrity()


@both
def test_a_search_cut_short_goes_on_where_it_ended(name, monkeypatch):
    policy = make_policy(name)
    for record in [record for i in range(100) for record in add_chain(policy, f"p{i}-", 1)]:
        record.leased = 1
    add_chain(policy, "free", 1, clock=5)
    monkeypatch.setattr(eviction, "MAX_STEPS", 30)
    found = [policy.victim(256, None) for _ in range(8)]
    assert b"free0" in [record.key for record in found if record is not None]


@both
def test_only_allowed_segments_count(name):
    policy = make_policy(name)
    add_chain(policy, "a", 1)
    b = add_chain(policy, "b", 1)
    b[0].packed = SlotLocation(2, 0, 1, 0, 256, 2).pack()
    assert policy.victim(256, frozenset({2})) is b[0]
    assert policy.victim(256, frozenset({3})) is None


@both
def test_slot_sizes_have_queues_of_their_own(name):
    policy = make_policy(name)
    record = Record(b"x", NAMESPACE, 0)
    record.packed = SlotLocation(1, 0, 1, 0, 512, 2).pack()
    policy.add(record, 512)
    assert policy.victim(256, None) is None
    assert policy.victim(512, None) is record


@both
def test_recovered_records_are_the_coldest_and_deep_ones_go_first(name):
    policy = make_policy(name)
    add_chain(policy, "new", 1, clock=4)

    def recovered(*indices: int) -> list[Record]:
        records = [Record(f"r{index}".encode(), NAMESPACE, index) for index in indices]
        for record in records:
            record.packed = SlotLocation(1, 0, 1, 0, 256, 2).pack()
        return records

    sorts = []
    for records in recovered(7, 4, 0), recovered(9, 5, 1):
        for record in records:
            policy.add_cold(record, 256)
            policy.check_integrity()
        sorts.append(policy.sort_cold(records, 256, 1))
    # Sorted bit by bit, both at a time, while others look for victims.
    for pauses in zip_longest(*sorts):
        assert pauses == (None, None)
        assert policy.victim(256, None) is not None
        policy.check_integrity()
    assert order(policy) == ["r9", "r7", "r5", "r4", "r1", "r0", "new0"]


@both
def test_check_integrity_sees_broken_lists(name):
    policy = make_policy(name)
    records = add_chain(policy, "a", 3)
    records[1].older = records[1]
    with pytest.raises(IntegrityError, match="broken link"):
        policy.check_integrity()
    records[1].older = records[2]
    policy.queues[256].size = 7
    with pytest.raises(IntegrityError, match="size 7"):
        policy.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["lru", "sieve"]), st.data())
def test_random_forests_are_emptied_leaf_by_leaf(name, data):
    """Whatever the shape, the use and the leases: victims are leaves, and all that is not held goes."""
    policy, table = make_policy(name), None
    table = ChunkTable(policy)
    records: list[Record] = []
    for number in range(data.draw(st.integers(1, 25))):
        parent = data.draw(st.sampled_from([None, *records]))
        record = Record(bytes([number]), NAMESPACE, parent.index + 1 if parent else 0)
        record.packed = SlotLocation(1, 0, 1, 0, 256, 2).pack()
        record.used = number
        if parent is not None:
            table.orphans += 1
            table.link(record, parent)
        policy.add(record, 256)
        records.append(record)
    for clock in range(data.draw(st.integers(0, 10))):
        policy.touch(data.draw(st.lists(st.sampled_from(records), max_size=4, unique=True)), 100 + clock)
    held = set()
    for record in data.draw(st.lists(st.sampled_from(records), max_size=3, unique=True)):
        record.leased = 1
        while record is not None:
            held.add(record.key)
            record = record.parent
    gone = set()
    while (record := evict(policy)) is not None:
        gone.add(record.key)
    assert gone == {record.key for record in records} - held
