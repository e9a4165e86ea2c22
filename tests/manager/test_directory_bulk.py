"""Very many keys, leases and tickets at once: nobody stands still meanwhile, and nobody gets them without end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from directory_cases import ME, header, lone, slab_of

from vcache.config import ManagerConfig
from vcache.errors import ManagerRefusedError
from vcache.manager.api import PutRequest, Ticket
from vcache.manager.directory import leases
from vcache.segment.slots import slab_bytes_for


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of this thread: what else runs on the machine does not count."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


STANDSTILL = 2.0
"""Processor seconds for what takes about 0.2 s, and took 10 s and more when the cost grew with the square of the number."""


def test_removing_very_many_keys_does_not_stand_still():
    """The oldest of the remembered removals was looked for behind the gaps that all before it had left in the table: beyond
    65,536 remembered keys each further one cost more than the one before, 25 s for 400,000."""
    directory, _ = lone()
    names = [number.to_bytes(16, "little") for number in range(600_000)]
    assert cpu_seconds(lambda: directory.remove(ME, names, 0.0)) < STANDSTILL


def test_leases_and_tickets_that_expire_together_do_not_stand_still(monkeypatch):
    """The same: 80,000 leases that ran out together kept everybody waiting for 4.5 s."""
    monkeypatch.setattr(leases, "MAX_LEASES", 10**9)
    count = 150_000
    nbytes = slab_bytes_for(256, count)
    directory, info = lone(nbytes=nbytes)
    directory.mount(ME, info, [], 0.0)
    names = [number.to_bytes(16, "little") for number in range(1, count + 1)]
    request = PutRequest(keys=names, namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4] * count, slot_bytes=256)
    (first, *_) = directory.put_start(ME, request, 0.0)
    assert directory.put_end(ME, [Ticket(names[0], 0, first.location.generation)], 0.0) == [True]
    for _ in range(count):
        directory.acquire_packed(ME, names[:1], 0, 0, 0.0)
    late = max(ManagerConfig().lease_ttl, ManagerConfig().ticket_ttl)
    directory.heartbeat(ME, late)
    assert cpu_seconds(lambda: directory.tick(late)) < STANDSTILL
    counters = directory.stats(late).counters
    assert (counters["lease_expiries"], counters["ticket_expiries"]) == (count, count - 1)


@pytest.mark.parametrize(("limit", "per_lease"), [("MAX_LEASES", 1), ("MAX_LEASED", 2)])
def test_a_session_holds_a_bounded_number_of_leases(monkeypatch, limit, per_lease):
    """One client could take leases without end: 940,000 in 8 s, and the manager's memory with them."""
    monkeypatch.setattr(leases, limit, 4)
    directory, info = lone()
    directory.open_session(b"o" * 16, "o", "engine", 0.0)
    directory.mount(ME, info, [slab_of(header(key=b"a" * 16), header(key=b"b" * 16, generation=22))], 0.0)
    wanted = [b"a" * 16, b"b" * 16][:per_lease]
    held = [directory.acquire(ME, wanted, 0, 0, 0.0).lease for _ in range(4 // per_lease)]
    with pytest.raises(ManagerRefusedError, match="too many leases"):
        directory.acquire(ME, wanted, 0, 0, 0.0)
    stats = directory.stats(0.0)
    assert stats.counters["leases_refused"] == 1
    assert [session.leases for session in stats.sessions] == [len(held), 0]
    # Others are not concerned, nor is what lies under a lease that it has.
    assert directory.acquire(b"o" * 16, wanted, 0, 0, 0.0).lease
    assert directory.acquire(ME, wanted, 0, held[0], 0.0).lease == held[0]
    directory.release(ME, held[0], 0.0)
    assert directory.acquire(ME, wanted, 0, 0, 0.0).lease
    directory.check_integrity()
