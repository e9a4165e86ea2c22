"""`Loopback`: the directory inside this process, for one engine or for tests."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from ..config import ManagerConfig
from ..errors import ManagerUnavailableError, VCacheError
from .api import WIPE_TIMEOUT, Listener, R, Role, Verb
from .directory.directory import Directory, random_first_segment
from .directory.jobs import Job
from .directory.reading import PackedReply
from .directory.removal import RemovalReply
from .listeners import Audience, Dispatcher


class Loopback:
    """`Transport` to a `Directory` of its own, with one session: this client's. Thread-safe.

    No thread watches the clock: every call first does what is due (expired leases and tickets, quarantines over). Listeners
    are called from a thread of their own. Two instances share nothing.
    """

    last_failure: VCacheError | None = None

    def __init__(
        self,
        config: ManagerConfig,
        *,
        client_id: bytes | None = None,
        name: str = "",
        role: Role = "engine",
        host: str = "",
        remote: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`client_id`: 16 bytes, random by default. `host`, `remote`: as in `wire.Hello`. `clock`: seconds, never backwards."""
        self.client_id = client_id or secrets.token_bytes(16)
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        """Calls that wait for wipes."""
        self._closed = False
        self._dispatcher = Dispatcher("vcache-manager-events")
        self._audience = Audience(self._dispatcher)
        self._directory = Directory(config, epoch=time.time_ns() & ~1, now=clock(), first_segment=random_first_segment())
        session = self._directory.open_session(self.client_id, name, role, clock(), host=host, remote=remote)
        self._audience.session_began(session)

    @property
    def epoch(self) -> int:
        return 0 if self._closed else self._directory.epoch

    def wait_connected(self, timeout: float) -> bool:
        return not self._closed

    def subscribe(self, listener: Listener) -> None:
        self._audience.subscribe(listener)

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        """Nothing to do: this session is never lost, so it never says hello again."""

    def call(self, verb: Verb[R], late: Callable[[R], None] | None = None, within: float | None = None) -> R:
        """Never late, and has no deadline. `Remove` and `Clear` block at most `WIPE_TIMEOUT` for the lender in this process,
        but not inside a listener: it would wait for itself."""
        with self._lock:
            if self._closed:
                raise ManagerUnavailableError("manager embedded: this client is closed")
            answer: Any = self._turn(verb)
            if isinstance(answer, RemovalReply):
                self._await_wipes(answer.tokens)
                answer = answer.removed
            if isinstance(answer, PackedReply):
                answer = answer.unpack()
        reply: R = answer
        return reply

    def tell(self, verb: Verb[None]) -> None:
        with self._lock:
            if not self._closed:
                self._turn(verb)

    def close(self) -> None:
        """The chunks are forgotten with the directory. Blocks until listeners have heard what is queued, at most a second."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._dispatcher.close(timeout=1.0)

    def check_integrity(self) -> None:
        """For tests. Raises `IntegrityError` naming the rule that does not hold."""
        with self._lock:
            self._directory.check_integrity()

    def _turn(self, verb: Verb[Any]) -> object:
        """One step of the directory: what is due first, then the verb, then the pushes that came of both."""
        now = self._clock()
        self._directory.heartbeat(self.client_id, now)  # First: while this process lives, its session does.
        self._directory.tick(now)
        try:
            answer = self._directory.handle(self.client_id, verb, now)
            return answer.finish() if isinstance(answer, Job) else answer
        finally:
            for target, push in self._directory.take_instructions():
                if push is not None and target in (None, self.client_id):
                    self._audience.push(push)
            if self._waiting:
                self._changed.notify_all()

    def _await_wipes(self, tokens: list[int]) -> None:
        if tokens and self._audience.listens() and not self._dispatcher.is_current():
            self._waiting += 1
            self._changed.wait_for(lambda: self._closed or not self._directory.outstanding(tokens), WIPE_TIMEOUT)
            self._waiting -= 1
