"""Ctrl-C, SIGTERM and a closed terminal: a process ends what it started, then itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals() -> Iterator[None]:
    """In the block the first of `STOP_SIGNALS` raises `KeyboardInterrupt`; later ones are ignored, so that nothing interrupts
    the end of the processes. Does nothing outside the main thread, where Python has no signals."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(each, signal.signal(each, stop)) for each in STOP_SIGNALS]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)
