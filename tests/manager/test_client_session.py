"""The client's session: absent, late, stopped, killed and restarted managers; no call outlives its deadline."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from manager_helpers import (
    Recorder,
    ServerProcess,
    ServerThread,
    config,
    key,
    keys,
    put_request,
    segment_of,
    serving,
    store,
    wait_until,
)

from vcache.config import VCacheConfig
from vcache.errors import ArgumentError, DeadlineExceededError, ManagerUnavailableError, ProtocolError
from vcache.manager import wire
from vcache.manager.api import AcquireReply, SegmentGone, SegmentMounted, SessionInfo, Ticket
from vcache.manager.client import Manager
from vcache.manager.connect import connect
from vcache.manager.loopback import Loopback
from vcache.manager.socket_transport import Connection, SocketTransport
from vcache.segment.hostinfo import host_id

SLACK = 0.4
"""Seconds that a loaded machine may add to a bound."""


@contextmanager
def takes(at_most: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < at_most + SLACK


def connection_of(client: Manager) -> Connection | None:
    assert isinstance(client.transport, SocketTransport)
    return client.transport._connection


@contextmanager
def stalled(server: ServerThread, seconds: float) -> Iterator[None]:
    """The server's loop does nothing for that long."""
    began = threading.Event()

    def stall() -> None:
        began.set()
        time.sleep(seconds)

    busy = threading.Thread(target=server.run, args=(stall,))
    busy.start()
    assert began.wait(5)
    yield
    busy.join()


# -- absent and late -------------------------------------------------------------------------------------------------


def test_embedded_is_the_default() -> None:
    manager = connect(VCacheConfig())
    assert isinstance(manager.transport, Loopback)
    manager.close()


@pytest.mark.parametrize("address", ["unix://{}/none.sock", "tcp://127.0.0.1:1"])
def test_absent_manager_costs_the_timeout_once_then_nothing(
    tmp_path: Path, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    where = address.format(tmp_path)
    with takes(0.2):
        manager = connect(VCacheConfig(manager=config(where, connect_timeout=0.2)))
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert where in warnings[0]
    assert "vcache serve --address" in warnings[0]
    with takes(0.0):
        for call in (lambda: manager.lookup([key(1)]), lambda: manager.acquire([key(1)]), manager.stats, manager.segments):
            with pytest.raises(ManagerUnavailableError):
                call()
        manager.release(5)
    assert manager.epoch == 0
    with takes(0.2):
        manager.close()


def test_absent_manager_that_is_required(tmp_path: Path) -> None:
    with takes(0.2), pytest.raises(ManagerUnavailableError, match=r"No such file.*vcache serve --address unix://"):
        connect(VCacheConfig(manager=config(f"unix://{tmp_path}/none.sock")), require=True, timeout=0.2)


def test_manager_that_starts_later_is_found(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/m.sock"
    client = Manager(SocketTransport(config(address)))
    listener = Recorder()
    client.subscribe(listener)
    with pytest.raises(ManagerUnavailableError):
        client.lookup([key(1)])
    with serving(address):
        assert client.wait_connected(5)
        assert client.lookup([key(1)]) == 0
        wait_until(lambda: listener.epochs == [client.epoch])
        client.close()


# -- deadlines -------------------------------------------------------------------------------------------------------


def test_late_plans_are_undone(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        lender = server.client()
        lender.mount(segment_of(lender, 1, slots=10, kind="cuda"))
        lender.mount(segment_of(lender, 2, slots=10))
        store(lender, keys(1, 16))
        store(lender, keys(100, 16))
        client = server.client(deadline=0.1, heartbeat_interval=5, host=host_id())
        with stalled(server, 0.4):
            with takes(0.1), pytest.raises(DeadlineExceededError):
                client.spill(4096)
            with takes(0.1), pytest.raises(DeadlineExceededError):
                client.demote(4096)
        wait_until(lambda: server.counter("leases") == 2 and server.gauge("leases") == 0, what="leases released")
        wait_until(lambda: server.gauge("slots_processing") == 0, what="tickets given back")
        assert server.counter("revocations") == 1
        assert client.lookup(keys(1, 16)) == 16
        for each in (client, lender):
            each.close()


def test_late_answers_are_undone(tmp_path: Path) -> None:
    """A lease or a ticket that arrives after its caller gave up would otherwise be held for nothing."""
    with serving(f"unix://{tmp_path}/m.sock") as server:
        lender = server.client()
        lender.mount(segment_of(lender))
        store(lender, keys(1, 2))
        client = server.client(deadline=0.1, heartbeat_interval=5)
        with stalled(server, 0.4):
            with takes(0.05), pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
                client.acquire(keys(1, 2), within=0.05)
            with takes(0.1), pytest.raises(DeadlineExceededError):
                client.put_start(put_request(keys(10, 3)))
        wait_until(lambda: server.counter("leases") == 1 and server.gauge("leases") == 0, what="lease released")
        wait_until(lambda: server.counter("puts") == 5 and server.gauge("slots_processing") == 0, what="tickets given back")
        assert client.lookup(keys(1, 2)) == 2, "a late answer is a sign of life: the connection stays"
        assert server.counter("sessions") == 2
        for each in (client, lender):
            each.close()


def test_three_missed_deadlines_reopen_the_connection(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client(deadline=0.1, heartbeat_interval=5)
        listener = Recorder()
        client.subscribe(listener)
        with stalled(server, 0.8):
            for _ in range(3):
                with pytest.raises(DeadlineExceededError):
                    client.lookup([key(1)])
            with takes(0.0), pytest.raises(ManagerUnavailableError):
                client.lookup([key(1)])
        wait_until(lambda: client.epoch != 0, what="reconnected")
        assert client.lookup([key(1)]) == 0
        wait_until(lambda: len(listener.epochs) == 2)
        assert "disconnect" in listener.events
        client.close()


def test_stopped_manager_is_noticed_without_any_call(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock", heartbeat_interval=0.05) as server:
        client = server.client(deadline=0.1)
        with stalled(server, 1.2):
            wait_until(lambda: client.epoch == 0, timeout=1.0, what="heartbeats missed")
        wait_until(lambda: client.epoch != 0)
        client.close()


@pytest.mark.processes
def test_sigstopped_manager_never_holds_a_call_beyond_its_deadline(tmp_path: Path) -> None:
    server = ServerProcess(config(f"unix://{tmp_path}/m.sock"))
    try:
        client = Manager(SocketTransport(config(server.address, deadline=0.2)))
        assert client.wait_connected(5)
        large = put_request(keys(1, 100_000))
        server.process.send_signal(signal.SIGSTOP)
        with takes(0.2), pytest.raises(ManagerUnavailableError):
            client.put_start(large)  # Larger than the socket's buffer: sending blocks too.
        for _ in range(4):
            with takes(0.2), pytest.raises(ManagerUnavailableError):
                client.lookup([key(1)])
        with takes(0.2), pytest.raises(ManagerUnavailableError):
            connect(VCacheConfig(manager=config(server.address)), require=True, timeout=0.2)
        server.process.send_signal(signal.SIGCONT)
        assert client.wait_connected(10)
        assert client.lookup([key(1)]) == 0
        server.process.send_signal(signal.SIGSTOP)
        with takes(0.2):
            client.close()
    finally:
        server.kill()


# -- restart -----------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_manager_killed_during_calls_and_restarted(tmp_path: Path) -> None:
    where = config(f"unix://{tmp_path}/m.sock", deadline=0.5)
    server = ServerProcess(where)
    client = Manager(SocketTransport(where, name="survivor"))
    assert client.wait_connected(5)
    listener = Recorder(lambda event: client.mount(segment_of(client)) if isinstance(event, SessionInfo) else None)
    client.subscribe(listener)
    wait_until(lambda: len(listener.of(SegmentMounted)) >= 1)
    store(client, keys(1, 8))
    stop = threading.Event()
    slowest: list[float] = []
    surprises: list[BaseException] = []

    def work(thread: int) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: client.lookup(keys(1, 8)),
            lambda: client.release(client.acquire(keys(1, 8)).lease),
            lambda: client.put_revoke([]),
            client.stats,
        ]
        while not stop.is_set():
            began = time.monotonic()
            try:
                calls[thread % len(calls)]()
            except ManagerUnavailableError:
                stop.wait(0.01)
            except BaseException as error:  # noqa: BLE001 - reported by the main thread
                surprises.append(error)
            slowest.append(time.monotonic() - began)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(slowest) > 200)
        server.process.kill()
        wait_until(lambda: client.epoch == 0, timeout=1.0, what="noticed at once")
        server.kill()
        server = ServerProcess(where)  # The socket file of the dead one is stale.
        wait_until(lambda: client.epoch != 0, timeout=10, what="reconnected")
        wait_until(lambda: len(listener.of(SegmentMounted)) >= 2, what="mounted again")
        already = len(slowest)
        wait_until(lambda: len(slowest) > already + 200)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        server.kill()
    assert not surprises
    assert max(slowest) < 0.5 + SLACK
    first, second = listener.epochs
    assert second > first
    order = [event for event in listener.events if event == "disconnect" or isinstance(event, SessionInfo)]
    assert [type(event) for event in order[:3]] == [SessionInfo, str, SessionInfo]
    client.close()


def test_numbers_of_an_earlier_manager_mean_nothing(tmp_path: Path) -> None:
    """Segments were counted from 1 by every manager, so a location of the new one was looked up among the old one's segments
    by whoever had not heard of the new ones yet, and found a wrong one."""
    address = f"unix://{tmp_path}/m.sock"
    with serving(address) as server:
        client = server.client()
        number = client.mount(segment_of(client))
        store(client, keys(1, 2))
        old = client.acquire(keys(1, 2))
    wait_until(lambda: client.epoch == 0)
    with serving(address) as server:
        assert client.wait_connected(5)
        assert client.mount(segment_of(client)) != number, "a number of one epoch stands for another segment in the next"
        store(client, keys(1, 2))
        new = client.acquire(keys(1, 2))
        assert new.lease != old.lease
        assert client.acquire(keys(1, 2), lease=old.lease) == AcquireReply(0, 0.0, [])
        client.release(old.lease)
        assert client.acquire(keys(1, 1), lease=new.lease).locations == new.locations[:1]
        assert server.gauge("leases") == 1, "the old number did not end the new lease"
        client.close()


def test_answer_is_not_returned_across_a_reconnect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Connection.call

    def lose(self: Connection, *args: Any, **kwargs: Any) -> bytes | bytearray:
        answer = call(self, *args, **kwargs)
        self.shut("lost between the answer and its return")
        return answer

    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()
        client.mount(segment_of(client))
        store(client, keys(1, 2))
        monkeypatch.setattr(Connection, "call", lose)
        with pytest.raises(ManagerUnavailableError, match="session of this answer is over"):
            client.acquire(keys(1, 2))
        monkeypatch.undo()
        client.close()


def test_pending_calls_fail_at_once_when_the_connection_is_lost(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client(deadline=5.0)
        failures: list[Exception] = []

        def call() -> None:
            try:
                client.stats()
            except ManagerUnavailableError as error:
                failures.append(error)

        with stalled(server, 1.0):
            threads = [threading.Thread(target=call) for _ in range(4)]
            for thread in threads:
                thread.start()
            connection = connection_of(client)
            assert connection is not None
            wait_until(lambda: len(connection._pending) == 4)
            with takes(0.1):
                connection = connection_of(client)
                assert connection is not None
                connection.shut("cut by the test")
                for thread in threads:
                    thread.join(5)
        assert len(failures) == 4
        assert not any(isinstance(failure, DeadlineExceededError) for failure in failures)
        client.close()


def test_hello_waits_for_unfinished_writes(tmp_path: Path) -> None:
    """Hello says 'I have no unfinished writes'; the manager frees their slots on that word (rule I3)."""
    address = f"unix://{tmp_path}/m.sock"
    writing = threading.Condition()
    idle = False
    asked = threading.Event()

    def wait_idle(timeout: float) -> bool:
        asked.set()
        with writing:
            return writing.wait_for(lambda: idle, timeout)

    with serving(address) as server:
        client = server.client()
        client.set_write_gate(wait_idle)
        client.mount(segment_of(client))
        assert client.put_start(put_request(keys(1, 1)))[0].status == "granted"
        connection = connection_of(client)
        assert connection is not None
        connection.shut("cut by the test")
        assert asked.wait(5)
        assert not client.wait_connected(0.3)
        assert server.counter("sessions") == 1
        with writing:
            idle = True
            writing.notify_all()
        assert client.wait_connected(5)
        client.close()


def test_gate_that_raises_holds_the_hello_back_and_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[float] = []

    def wait_idle(timeout: float) -> bool:
        asked.append(timeout)
        if len(asked) == 1:
            raise RuntimeError("broken gate")
        return True

    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()
        client.set_write_gate(wait_idle)
        connection = connection_of(client)
        assert connection is not None
        connection.shut("cut by the test")
        wait_until(lambda: client.epoch != 0 and len(asked) == 2)
        assert "broken gate" in caplog.text
        client.close()


# -- listeners ---------------------------------------------------------------------------------------------------------


def test_listener_may_call_back_and_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()

        def fail(event: object) -> None:
            raise RuntimeError("listener is broken")

        client.subscribe(Recorder(fail))
        mounting = Recorder(lambda event: client.mount(segment_of(client)) if isinstance(event, SessionInfo) else None)
        client.subscribe(mounting)
        wait_until(lambda: bool(mounting.of(SegmentMounted)))
        assert "listener is broken" in caplog.text
        client.close()


def test_loss_of_a_lender_reaches_the_others(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        reader, lender = server.client(), server.client(role="lender")
        listener = Recorder()
        reader.subscribe(listener)
        number = lender.mount(segment_of(lender))
        store(lender, keys(1, 4))
        assert reader.lookup(keys(1, 4)) == 4
        lender.close()
        wait_until(lambda: SegmentGone(number, segment_of(lender).uuid) in listener.events)
        assert reader.lookup(keys(1, 4)) == 0
        reader.close()


# -- misuse ------------------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_sent_harm_nothing(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock", max_frame=65536) as server:
        client = server.client()
        with pytest.raises(ProtocolError, match=r"manager\.max_frame"):
            client.lookup(keys(1, 5000))
        with pytest.raises(ArgumentError, match="16 bytes"):
            client.lookup([b"short"])
        with pytest.raises(ArgumentError, match="shard"):
            client.acquire([key(1)], shard=-1)
        assert client.lookup([key(1)]) == 0
        client.close()


@pytest.mark.processes
def test_forked_child_is_told_and_the_parent_is_unharmed(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        client = server.client()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.close()
                for call in (lambda: client.lookup([key(1)]), lambda: client.release(1), lambda: client.subscribe(Recorder())):
                    try:
                        call()
                    except ManagerUnavailableError as error:
                        status = 0 if "forked child" in str(error) else 2
                    else:
                        status = 3
                        break
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert client.lookup([key(1)]) == 0
        assert server.counter("sessions") == 1
        client.close()


@pytest.mark.processes
def test_child_does_not_keep_the_session_of_a_dead_parent(tmp_path: Path) -> None:
    """The descriptor is inherited; were it kept, the manager would not see the parent die until the session times out."""
    with serving(f"unix://{tmp_path}/m.sock") as server:
        ready, signal_ready = os.pipe()
        parent = os.fork()
        if parent == 0:
            client = Manager(SocketTransport(config(server.address)))
            client.wait_connected(5)
            child = os.fork()
            if child == 0:
                signal.pause()
            os.write(signal_ready, child.to_bytes(4, "little"))
            signal.pause()
        child = int.from_bytes(os.read(ready, 4), "little")
        try:
            assert server.gauge("sessions") == 1
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            wait_until(lambda: server.gauge("sessions") == 0, timeout=3)
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(ready)
            os.close(signal_ready)


@pytest.mark.parametrize("verb", ["put_end", "put_revoke"])
def test_the_end_of_a_write_that_could_not_be_sent_is_settled_by_the_next_hello(tmp_path: Path, verb: str) -> None:
    """The manager never heard that the write was over, and kept its slot out of use for as long as the session lasted."""
    stuck = threading.Event()
    with serving(f"unix://{tmp_path}/m.sock", heartbeat_interval=30.0, session_timeout=60.0) as server:
        client = server.client(deadline=0.2, heartbeat_interval=30.0)
        client.mount(segment_of(client))
        (grant,) = client.put_start(put_request([key(1)]))
        assert grant.location is not None
        assert server.gauge("slots_processing") == 1
        connection = connection_of(client)
        assert connection is not None
        server._loop.call_soon_threadsafe(stuck.wait)
        try:
            with suppress(ManagerUnavailableError):
                while True:
                    connection.send(wire.RELEASE, wire.encode_lease(9), 0.2)
            assert not connection.closed
            with pytest.raises(ManagerUnavailableError, match="does not take requests"):
                getattr(client, verb)([Ticket(key(1), 0, grant.location.generation)])
        finally:
            stuck.set()
        wait_until(lambda: connection_of(client) not in (None, connection), what="connected again")
        assert server.gauge("slots_processing") == server.gauge("slots_quarantined") == 0
        client.close()
