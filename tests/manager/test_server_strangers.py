"""Strangers, guessers and those who never finish: they cost others little, and the log is not flooded."""

from __future__ import annotations

import logging
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
from manager_helpers import RawClient, key, serving, wait_until

from vcache.config import ByteSize
from vcache.manager import wire
from vcache.manager.server import session, sessions
from vcache.manager.server.strangers import LOG_INTERVAL, Budget, LogThrottle
from vcache.segment.hostinfo import raise_file_limit

SECRET = "a secret of this test"


def test_rejected_connections_share_log_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each was a line of its own: whoever could connect wrote thousands of lines a second into the log."""
    caplog.set_level(logging.WARNING)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        for _ in range(30):
            raw = RawClient(server.address)
            raw.send(b"GET / HTTP/1.1\r\n\r\n")
            raw.last_words()
            raw.close()
        assert server.counter("connections_rejected") == 30
    assert len([record for record in caplog.records if "closed" in record.message]) == 1


def test_lines_left_out_are_counted_in_the_next_one() -> None:
    now = 0.0
    throttle = LogThrottle(lambda: now)
    assert [throttle.allows("a"), throttle.allows("a"), throttle.allows("a"), throttle.allows("b")] == [0, None, None, 0]
    now += LOG_INTERVAL
    assert [throttle.allows("a"), throttle.allows("b"), throttle.allows("a")] == [2, 0, None]


def test_a_wrong_token_is_refused_after_a_pause_and_there_is_no_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guesser was told at once that the token was wrong, as often as the manager could answer."""
    monkeypatch.setenv("VCACHE_TOKEN", SECRET)
    with serving("tcp://127.0.0.1:0") as server:
        raw = RawClient(server.address)
        hellos = [
            wire.frame(1, wire.HELLO, wire.encode_hello(wire.Hello(b"r" * 16, "raw", "tool", token)))
            for token in (b"wrong", SECRET.encode())
        ]
        began = time.monotonic()
        raw.send(b"".join(hellos))
        assert "wrong token" in raw.last_words()
        assert time.monotonic() - began >= session._WRONG_TOKEN_SECONDS
        assert server.gauge("sessions") == 0
        client = server.client()
        assert client.lookup([key(1)]) == 0
        client.close()
        raw.close()


def test_newcomers_get_in_however_many_connections_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 1,024 open files, as many idle connections kept every new client out for ten seconds."""
    monkeypatch.setattr(sessions, "MAX_STRANGERS", 4)
    with serving(f"unix://{tmp_path}/m.sock") as server:
        known = server.client()
        idle = [RawClient(server.address) for _ in range(12)]
        for raw in idle:
            with suppress(BrokenPipeError):  # It was closed already.
                raw.send(b"\1")
        wait_until(lambda: server.gauge("connections") <= 1 + 4, what="the oldest were closed")
        assert "do not say hello" in idle[0].last_words()
        newcomer = server.client()
        assert newcomer.lookup([key(1)]) == known.lookup([key(1)]) == 0
        for each in (known, newcomer, *idle):
            each.close()


def test_frames_that_never_end_take_a_bounded_amount_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each session could keep a frame of 8 MiB waiting for its last byte, and nothing bounded how many did."""
    monkeypatch.setattr(sessions, "MAX_UNFINISHED", 5 * 2**19)
    with serving(f"unix://{tmp_path}/m.sock", max_frame=ByteSize(2**20)) as server:
        slow = []
        for number in range(4):
            raw = RawClient(server.address)
            raw.hello(client=bytes([65 + number]) * 16)
            raw.send(wire.frame(2, wire.LOOKUP, bytes(2**20 - 16))[: 2**20 - 2**10])
            slow.append(raw)
            wait_until(lambda: server.gauge("connections") == min(len(slow), 2), what="at most two are unfinished")
        assert "in part only" in slow[0].last_words()
        # Whoever goes on is served.
        slow[3].send(bytes(2**20 - 7 - (2**20 - 2**10)))
        frame = slow[3].receive()
        assert frame is not None
        assert (frame.request, frame.code) == (2, wire.OK)
        for each in slow:
            each.close()


def test_a_budget_ends_the_oldest_holders() -> None:
    budget: Budget[str] = Budget(10)
    assert [budget.set("a", 4), budget.set("b", 4), budget.set("a", 6), budget.set("c", 1)] == [[], [], [], ["a"]]
    assert [budget.set("b", 0), budget.set("b", 0), budget.set("d", 9), budget.set("d", 10)] == [[], [], [], ["c"]]


def test_the_soft_limit_of_open_files_is_raised() -> None:
    """A lender could lend about a thousand slabs, because nobody raised the usual soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        assert raise_file_limit() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
