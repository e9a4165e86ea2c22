"""Transfers under way: several as one, one with what is left to do at its end, and the handle of an asynchronous call."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import TRANSFER_ERRORS
from ..paged.mover import Transfer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vcache.pool")

T = TypeVar("T")


class JoinedTransfer(Transfer):
    """Several transfers as one, each of them with the places of its slots in the whole."""

    def __init__(self, mapped: Sequence[tuple[Transfer, Sequence[int]]], remote: tuple[Transfer, Sequence[int]] | None) -> None:
        """`remote` comes last, because it takes longest."""
        self._parts = [*mapped, remote] if remote is not None else list(mapped)
        self._mapped = len(mapped)
        self.mapped_at = 0.0
        """When the mapped part had arrived, by `time.perf_counter`, once that was seen."""

    def done(self) -> bool:
        for number, (part, _) in enumerate(self._parts, start=1):
            if not part.done():
                return False
            if number == self._mapped:
                self.mapped_at = self.mapped_at or time.perf_counter()
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """All of them, also when one breaks: what is still under way writes to the paged cache."""
        deadline = None if timeout is None else time.monotonic() + timeout
        failure: Exception | None = None
        for number, (part, _) in enumerate(self._parts, start=1):
            try:
                if not part.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    return False
            except TRANSFER_ERRORS as error:
                failure = failure or error
            if number == self._mapped:
                self.mapped_at = self.mapped_at or time.perf_counter()
        if failure is not None:
            raise failure
        return True

    def damaged(self) -> list[int]:
        return [places[index] for part, places in self._parts for index in part.damaged()]

    def verified(self) -> list[bool]:
        if len(self._parts) == self._mapped:
            return [flag for part, _ in self._parts for flag in part.verified()]
        flags = {place: flag for part, places in self._parts for place, flag in zip(places, part.verified(), strict=True)}
        return [flags.get(place, False) for place in range(max(flags, default=-1) + 1)]


class PoolTransfer(Generic[T]):
    """A batch under way. Its result is settled exactly once, by whoever waits first. Thread-safe."""

    def __init__(self, transfer: Transfer | None, settle: Callable[[list[bool]], T]) -> None:
        """`settle` gets one flag per transfer and runs once; all False when the transfer broke or is None."""
        self.transfer = transfer
        self._settle = settle
        self._lock = threading.Lock()
        self._results: list[T] = []

    def done(self) -> bool:
        """Whether the bytes landed. Does not block."""
        return self.transfer is None or self.transfer.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until settled; False on timeout (seconds)."""
        if self.transfer is not None and not self._results:
            try:
                if not self.transfer.wait(timeout):
                    return False
            except TRANSFER_ERRORS:
                pass  # `result` asks again and reports it.
        self.result()
        return True

    def result(self) -> T:
        """Settle if nobody has, and return the result. Blocks until the bytes landed; raises nothing."""
        with self._lock:
            if not self._results:
                verified: list[bool] = []
                if self.transfer is not None:
                    try:
                        self.transfer.wait()
                        verified = self.transfer.verified()
                    except TRANSFER_ERRORS as error:
                        logger.warning("transfer failed, treated as a miss: %s", error)
                self._results.append(self._settle(verified))
            return self._results[0]


class TransferHandle(Generic[T]):
    """A store or retrieve that runs in the background. Thread-safe.

    On CUDA the work follows the stream that was current at the call: it reads and writes the paged cache only after what that
    stream had queued. When `done()` is True, everything has landed and no stream needs to wait for it.
    """

    def __init__(self, future: concurrent.futures.Future[T]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether it is over. Does not block."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is over; False on timeout (seconds)."""
        concurrent.futures.wait([self._future], timeout)
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """What the synchronous call would have returned. Raises `TimeoutError` after `timeout` seconds."""
        return self._future.result(timeout)


class StreamFollower:
    """Carries "the caller's stream" into another thread: work done under `run` starts after what that stream had queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = None
        if device.type == "cuda":
            import torch

            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` in this thread, on a stream of its own that waits for the caller's. Blocks as `work` does."""
        if self._event is None:
            return work()
        import torch

        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(self._event)
            return work()
