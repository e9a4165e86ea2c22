"""The circuit breaker, driven by a clock that the test moves."""

from __future__ import annotations

from vcache.guard import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_opens_after_consecutive_failures_only() -> None:
    breaker = CircuitBreaker(Clock(), threshold=3)
    assert breaker.failure() is False
    assert breaker.failure() is False
    breaker.success()
    assert breaker.failures == 0
    assert breaker.failure() is False
    assert breaker.failure() is False
    assert breaker.allow()
    assert breaker.failure() is True
    assert breaker.state == "open"
    assert not breaker.allow()


def test_lets_one_probe_through_after_the_cooldown() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, threshold=1, cooldown=2.0)
    breaker.failure()
    assert breaker.retry_in() == 2.0
    clock.now += 1.9
    assert not breaker.allow()
    clock.now += 0.1
    assert breaker.state == "half_open"
    assert breaker.retry_in() == 0.0
    assert breaker.allow()
    assert not breaker.allow(), "one probe at a time"
    breaker.success()
    assert breaker.state == "closed"
    assert breaker.allow()
    assert breaker.allow()


def test_cooldown_doubles_up_to_its_cap_and_starts_over_after_success() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, threshold=1, cooldown=1.0, max_cooldown=5.0)
    pauses = []
    for _ in range(5):
        breaker.failure()
        pauses.append(breaker.retry_in())
        clock.now += breaker.retry_in()
        assert breaker.allow()
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    breaker.success()
    breaker.failure()
    assert breaker.retry_in() == 1.0


def test_stragglers_of_an_open_breaker_do_not_lengthen_it() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, threshold=2, cooldown=1.0)
    for _ in range(10):
        breaker.failure()
    assert breaker.retry_in() == 1.0
    breaker.trip()
    assert breaker.retry_in() == 1.0


def test_probe_that_never_reports_is_forgotten() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, threshold=1, cooldown=1.0)
    breaker.failure()
    clock.now += 1.0
    assert breaker.allow()
    clock.now += 0.5
    assert not breaker.allow()
    assert breaker.retry_in() == 0.5
    clock.now += 0.5
    assert breaker.allow()


def test_trip_opens_at_once_and_jitter_only_lengthens() -> None:
    clock = Clock()
    values = iter([0.0, 0.5])
    breaker = CircuitBreaker(clock, cooldown=1.0, jitter=lambda: next(values))
    breaker.trip()
    assert breaker.retry_in() == 1.0
    clock.now += 1.0
    assert breaker.allow()
    breaker.trip()
    assert breaker.retry_in() == 2.5
