"""Handles of asynchronous stores and retrieves."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


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
