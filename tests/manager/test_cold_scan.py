"""The search for cold chunks: nothing twice, nothing forgotten, the cold end not again and again."""

from __future__ import annotations

import pytest

from vcache.manager.directory import demoting
from vcache.manager.directory.demoting import ColdScan
from vcache.manager.directory.eviction import EvictionPolicy, make_policy
from vcache.manager.directory.records import Namespace, Record
from vcache.segment.slots import SlotLocation


def policy_of(count: int, name: str = "lru") -> tuple[EvictionPolicy, list[Record]]:
    """`count` records in segment 2, oldest first."""
    policy = make_policy(name)
    records = [Record(b"%d" % number, Namespace(b"n"), 0) for number in range(count)]
    for number, record in enumerate(records):
        record.packed, record.used = SlotLocation(2, 0, 1, number, 256, 2).pack(), number
        policy.add(record, 256)
    return policy, records


def found(policy, clock: int = 1000, host: str = "h", segment: int = 1) -> list[bytes]:
    scan = ColdScan(policy, host, frozenset({segment}), clock)
    keys = []
    while (record := scan.coldest()) is not None:
        keys.append(record.key)
        scan.skip(record)
        policy.check_integrity()
    return keys


def in_vram(record: Record) -> None:
    record.packed = SlotLocation(1, 0, 1, 0, 256, 2).pack()


def test_the_cold_end_is_not_searched_again(monkeypatch):
    """What a scan passes over it does not look at again before it has come round."""
    policy, records = policy_of(400)
    for record in records[-4:]:
        in_vram(record)
    monkeypatch.setattr(demoting, "MAX_STEPS", 100)
    assert [found(policy) for _ in range(4)] == [[], [], [], [b"396", b"397", b"398", b"399"]]
    new = Record(b"new", None, 0)
    in_vram(new)
    policy.add(new, 256)
    assert found(policy) == [b"new"]


@pytest.mark.parametrize("name", ["lru", "sieve"])
def test_a_scan_survives_touches_and_removals_where_it_stands(name):
    policy, records = policy_of(6, name)
    for record in records:
        in_vram(record)
    scan = ColdScan(policy, "h", frozenset({1}), 10)
    for record in records[:2]:
        assert scan.coldest() is record
        scan.skip(record)
    policy.touch([records[2]], 11)
    policy.discard(records[3])
    following = ColdScan(policy, "h", frozenset({1}), 12)
    assert following.coldest() is records[4]
    policy.check_integrity()
    assert [record.key for record in policy.queues[256]][-1] in (b"2", b"5")


def test_a_scan_names_no_chunk_twice():
    policy, records = policy_of(3)
    for record in records:
        in_vram(record)
    scan = ColdScan(policy, "h", frozenset({1}), 10)
    scan.skip(records[0])
    policy.touch([records[0]], 0)  # An eviction in between may turn a queue round as a use does.
    assert scan.coldest() is records[1]
    scan.skip(records[1])
    scan.back(records[1])
    assert ColdScan(policy, "h", frozenset({1}), 10).coldest() is records[1]
    scan.skip(records[1])
    scan.skip(records[2])
    assert scan.coldest() is None


def test_every_host_has_a_scan_of_its_own():
    policy, records = policy_of(4)
    for record in records[:2]:
        in_vram(record)
    assert found(policy) == [b"0", b"1"]
    assert found(policy, host="g", segment=2) == [b"2", b"3"]
    policy.forget_scans("h")
    policy.forget_scans("g")
    assert not policy.queues[256].markers


def test_recovered_chunks_are_found_although_they_are_older_than_where_the_scan_stands():
    policy, _ = policy_of(3)
    assert found(policy) == []
    cold = Record(b"cold", None, 0)
    in_vram(cold)
    policy.add_cold(cold, 256)
    assert list(policy.sort_cold([cold], 256, 10)) == []
    policy.check_integrity()
    assert found(policy) == [b"cold"]


def test_when_everything_was_used_the_least_recently_used_goes():
    policy, records = policy_of(3, "sieve")
    for clock, record in enumerate(records):
        in_vram(record)
        policy.touch([record], 20 + clock)
    assert found(policy, clock=100) == [b"0", b"1", b"2"]
    policy.touch([records[1]], 101)
    assert found(policy, clock=102) == [b"0", b"2"]
    assert found(policy, clock=103) == [b"0", b"1", b"2"]


def test_of_two_slot_sizes_the_colder_chunk_goes_first():
    policy, records = policy_of(2)
    for record in records:
        in_vram(record)
    other = Record(b"other", None, 0)
    in_vram(other)
    other.used = 1
    policy.add(other, 512)
    records[1].used = 2
    assert found(policy) == [b"0", b"other", b"1"]
