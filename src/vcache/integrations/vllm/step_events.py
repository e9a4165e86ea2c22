"""Where the steps of the engine begin on the GPU, and how work is launched that comes after one of them."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .threads import Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

KEPT = 8
"""Steps that are remembered: vLLM has fewer under way."""


class Event(Protocol):
    """A point in what the GPU was told to do."""

    def query(self) -> bool:
        """Whether the GPU has reached it. Does not block. Raises when the GPU failed."""


class SideStream(Protocol):
    """A stream beside the one that computes. Thread-safe."""

    def record(self) -> Event:
        """An event behind all that the caller's current stream has queued. Does not block."""

    def behind(self, event: Event) -> AbstractContextManager[object]:
        """A context: what is launched in it comes after `event`, whatever the caller's stream has queued. Does not block."""


class CudaSideStream:
    """`SideStream` of a GPU. One stream for its whole life: PyTorch's pool of streams hands out those of others again."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device)

    def record(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def behind(self, event: Any) -> Iterator[None]:
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            yield


def side_stream(device: torch.device) -> SideStream | None:
    """Open a stream beside the current one; None on a CPU, where what was launched is over."""
    return CudaSideStream(device) if device.type == "cuda" else None


class After(NamedTuple):
    """What work has to come after."""

    stream: SideStream | None = None
    """None: nothing."""
    event: Event | None = None

    def run(self, work: Work) -> None:
        """Do work in this thread that launches what comes after it. Does not wait itself. Fails, if it does, before or after
        the work."""
        if self.stream is None or self.event is None:
            work()
            return
        with self.stream.behind(self.event):
            work()

    def over(self) -> bool:
        """Whether it is over. Does not block."""
        return self.event is None or self.event.query()


def after_now(stream: SideStream | None) -> After:
    """After all that the current stream has queued. Does not block."""
    return After(stream, stream.record()) if stream is not None else After()


class StepEvents:
    """Events where the last steps begin on the GPU. Used by the runner's thread only."""

    def __init__(self, stream: SideStream | None) -> None:
        """`stream`: for what follows them; None where there is nothing to follow."""
        self._stream = stream
        self._events: OrderedDict[int, Event] = OrderedDict()

    def record(self, step: int) -> None:
        """A step begins. Does not block."""
        if self._stream is not None:
            self._events[step] = self._stream.record()
            if len(self._events) > KEPT:
                self._events.popitem(last=False)

    def after(self, step: int) -> After:
        """After all that was queued before that step began. Where that is not remembered: after the beginning of the last one,
        which is later. Does not block."""
        if self._stream is None:
            return After()
        event = self._events.get(step)
        if event is None:
            event = next(reversed(self._events.values()), None) or self._stream.record()
        return After(self._stream, event)
