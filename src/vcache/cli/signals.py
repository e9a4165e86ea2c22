"""Processes that run until they are told to stop: Ctrl-C and SIGTERM are their normal end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised in the main thread by the first Ctrl-C or SIGTERM, wherever it is. Not an error."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """End the block quietly at the first of `STOP_SIGNALS`, by `Stopped`; later ones are ignored, because what follows (giving
    memory back, goodbye to the manager) is bounded. Main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = [(each, signal.signal(each, stop)) for each in STOP_SIGNALS]
    try:
        yield
    except Stopped:
        pass
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def run_until_stopped(start: Callable[[ExitStack], None]) -> None:
    """Call `start`, which opens things on the stack; wait for a stop signal; close them. A signal during `start` closes what is
    open by then."""
    with stop_signals(), ExitStack() as stack:
        start(stack)
        while True:
            signal.pause()
