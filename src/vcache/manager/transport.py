"""How a verb reaches a manager: the narrow interface between `Manager` and what carries its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..errors import VCacheError
from .api import Listener, R, Verb


class Transport(Protocol):
    """A session with a manager, over reconnects. Thread-safe.

    Implemented by `SocketTransport` (a manager in another process) and `Loopback` (a directory in this one).
    """

    @property
    def client_id(self) -> bytes:
        """16 random bytes that name this client for its life, over reconnects and manager restarts."""

    @property
    def epoch(self) -> int:
        """Epoch of the current session; 0 without one."""

    @property
    def last_failure(self) -> VCacheError | None:
        """Why there is no session, as far as is known; None with one. `ManagerRefusedError` and `ProtocolError` will stay."""

    def wait_connected(self, timeout: float) -> bool:
        """Block until there is a session, at most `timeout` seconds. Returns early, with False, when the manager refuses."""

    def call(self, verb: Verb[R], late: Callable[[R], None] | None = None, within: float | None = None) -> R:
        """Ask, and wait for the reply: at most for the verb's deadline, or `within` seconds, then raises
        `DeadlineExceededError`; without a session raises `ManagerUnavailableError` at once. What the manager raises is raised
        here.

        `late` gets the reply that comes after the deadline, in a thread that may call the manager.
        """

    def tell(self, verb: Verb[None]) -> None:
        """Say what has no answer. Does nothing without a session; in a forked child raises as `call` does."""

    def subscribe(self, listener: Listener) -> None:
        """Add a listener; if a session exists, `on_session` and the mounted segments are delivered to it at once."""

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        """Set how to learn that this process has no unfinished write, which every hello after the first promises.

        `wait_idle(timeout)` blocks for at most `timeout` seconds and returns whether no write is in flight; it is called from
        the transport's own thread while there is no session. A write is in flight from **before** its `put_start` until its
        `put_end` or `put_revoke` returned or raised. A process that writes sets the gate before its first `put_start`.
        """

    def close(self) -> None:
        """Say goodbye and stop. Idempotent. Blocks at most for one deadline."""
