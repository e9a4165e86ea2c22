"""What is special about the embedded manager; what it shares with the remote client is in `test_client_verbs.py`."""

from __future__ import annotations

import threading
import time

import pytest
from manager_helpers import Recorder, keys, put_request, segment_of, store, wait_until

from vcache.config import ManagerConfig
from vcache.errors import ManagerUnavailableError
from vcache.manager.api import SegmentMounted, SessionInfo, Ticket, WipeSlots
from vcache.manager.client import Manager
from vcache.manager.loopback import Loopback


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_leases_and_tickets_expire_without_any_thread() -> None:
    clock = Clock()
    before = threading.active_count()
    loopback = Loopback(ManagerConfig(lease_ttl=30, ticket_ttl=20), clock=clock)
    manager = Manager(loopback)
    manager.mount(segment_of(manager))
    store(manager, keys(1, 2))
    lease = manager.acquire(keys(1, 2))
    grant = manager.put_start(put_request(keys(5, 1)))[0]
    assert grant.location is not None
    assert manager.remove(keys(1, 2)) == 0, "leased"
    clock.now += 21
    assert manager.stats().counters["ticket_expiries"] == 1
    assert manager.put_end([Ticket(keys(5, 1)[0], 0, grant.location.generation)]) == [False]
    clock.now += 10
    assert manager.acquire(keys(1, 1), lease=lease.lease).locations == []
    assert manager.remove(keys(1, 2)) == 2
    assert threading.active_count() == before
    loopback.check_integrity()
    manager.close()


def test_idle_for_longer_than_the_session_timeout() -> None:
    clock = Clock()
    manager = Manager(Loopback(ManagerConfig(session_timeout=10), clock=clock))
    manager.mount(segment_of(manager))
    store(manager, keys(1, 2))
    clock.now += 3600
    assert manager.lookup(keys(1, 2)) == 2
    assert manager.stats().counters["session_timeouts"] == 0
    manager.close()


def test_instances_share_nothing() -> None:
    one, two = Manager(Loopback(ManagerConfig())), Manager(Loopback(ManagerConfig()))
    assert one.client_id != two.client_id
    one.mount(segment_of(one))
    store(one, keys(1, 2))
    assert (one.lookup(keys(1, 2)), two.lookup(keys(1, 2))) == (2, 0)
    assert two.segments() == []
    one.close()
    two.close()


def test_lender_mounts_in_on_session_and_wipes_in_on_push() -> None:
    manager = Manager(Loopback(ManagerConfig()))

    def lend(event: object) -> None:
        if isinstance(event, SessionInfo):
            manager.mount(segment_of(manager))
        elif isinstance(event, WipeSlots):
            manager.wiped(event.token)

    lender = Recorder(lend)
    manager.subscribe(lender)
    wait_until(lambda: bool(lender.of(SegmentMounted)))
    store(manager, keys(1, 3))
    assert manager.clear() == 3
    assert manager.stats().gauges["wipes_outstanding"] == 0, "the answer came after the wipe"
    manager.close()


def test_removal_is_bounded_when_nobody_wipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.manager.loopback.WIPE_TIMEOUT", 0.1)
    manager = Manager(Loopback(ManagerConfig()))
    manager.mount(segment_of(manager))
    store(manager, keys(1, 3))
    manager.subscribe(Recorder())
    began = time.monotonic()
    assert manager.remove(keys(1, 1)) == 1
    assert 0.1 <= time.monotonic() - began < 1.0
    manager.close()


def test_removal_inside_a_listener_does_not_wait_for_itself() -> None:
    manager = Manager(Loopback(ManagerConfig()))
    manager.mount(segment_of(manager))
    store(manager, keys(1, 3))
    removed: list[int] = []
    began = time.monotonic()
    manager.subscribe(Recorder(lambda event: removed.append(manager.clear()) if isinstance(event, SessionInfo) else None))
    wait_until(lambda: removed == [3])
    assert time.monotonic() - began < 1.0
    manager.close()


def test_close_wakes_a_waiting_removal_and_ends_everything() -> None:
    manager = Manager(Loopback(ManagerConfig()))
    manager.mount(segment_of(manager))
    store(manager, keys(1, 3))
    manager.subscribe(Recorder(lambda event: manager.close() if isinstance(event, WipeSlots) else None))
    began = time.monotonic()
    assert manager.clear() == 3
    assert time.monotonic() - began < 1.0
    with pytest.raises(ManagerUnavailableError, match="closed"):
        manager.put_start(put_request(keys(9, 1)))
    assert manager.epoch == 0


def test_long_requests_leave_nothing_behind() -> None:
    """Each store of more than a slice of chunks, each `remove` and `clear`, kept its job and its answer for good."""
    loopback = Loopback(ManagerConfig())
    manager = Manager(loopback)
    manager.mount(segment_of(manager, slots=2000))
    for _ in range(5):
        manager.put_revoke([Ticket(key, 0, 0) for key in keys(1, 600)])
        manager.put_start(put_request(keys(1, 600)))
        manager.tiers(keys(1, 600))
        manager.clear()
    assert len(loopback._directory._state.jobs._waiting) <= 1
    manager.close()
