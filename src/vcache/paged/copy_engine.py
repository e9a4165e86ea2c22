"""Queues of device work as a ring needs them: copies by the GPU's copy engines on a stream, and who waits for whom.

`InstantQueue` does the same on host memory at once: how the ring is tested under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..errors import DeviceUnavailableError

_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: the source is read in the stream's order."""
_SINCE = 12080
"""The CUDA version whose signature of cuMemcpyBatchAsync is called, the one with `failIdx`; later drivers keep it."""


class WorkQueue(Protocol):
    """Work of a device, done in the order in which it is queued. Nothing here but `drain` blocks."""

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        """Queue copies of `sizes` bytes between these addresses, which overlap nowhere; they end in any order. Raises
        `DeviceUnavailableError`."""
        ...

    def mark(self, event: Any = None) -> Any:
        """An event behind everything queued here; `event`: one to use again, of a queue of the same kind."""
        ...

    def wait(self, event: Any) -> None:
        """What is queued here from now on comes after what `event` was last marked behind."""
        ...

    def drain(self) -> None:
        """Block until all that is queued here is over."""
        ...


class StreamQueue:
    """A CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream, copies: Copies | None = None) -> None:
        """`copies`: None where nothing is to be copied."""
        self.stream = stream
        self._handle = stream.cuda_stream
        self._copies = copies

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        assert self._copies is not None
        self._copies(targets, sources, sizes, self._handle)

    def mark(self, event: Any = None) -> Any:
        event = event or torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, event: Any) -> None:
        self.stream.wait_event(event)

    def drain(self) -> None:
        self.stream.synchronize()


class InstantQueue:
    """Host memory: all is done when the call returns, and there is nothing to wait for."""

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        for target, source, nbytes in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, nbytes)

    def mark(self, event: Any = None) -> Any:
        return event

    def wait(self, event: Any) -> None:
        pass

    def drain(self) -> None:
        pass


class Copies:
    """Copies between pinned host memory and VRAM in one call of the driver, or one each where it is older than CUDA 12.8. The
    device's primary context must be current in every call."""

    def __init__(self) -> None:
        """Raises `DeviceUnavailableError` without cuda-bindings."""
        try:
            from cuda.bindings import driver
        except ImportError:
            raise DeviceUnavailableError("kvcaches on a GPU need cuda-bindings: pip install 'vcache[cuda]'") from None
        self._single = driver.cuMemcpyAsync
        self._batch = batch_function()

    def __call__(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> None:
        """Queue them on the stream of that handle."""
        if self._batch is None or len(sizes) == 1:
            for target, source, nbytes in zip(targets, sources, sizes, strict=True):
                (status,) = self._single(target, source, nbytes, stream)
                if status:
                    raise DeviceUnavailableError(f"cuMemcpyAsync of {nbytes} bytes: {status!r}")
            return
        words = ctypes.c_uint64 * len(sizes)
        there, here, lengths = words(*targets), words(*sources), words(*sizes)
        self._batch(ctypes.addressof(there), ctypes.addressof(here), ctypes.addressof(lengths), len(sizes), stream)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (("order", ctypes.c_uint), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint))


def batch_function() -> Callable[[int, int, int, int, int], None] | None:
    """cuMemcpyBatchAsync as a function of `(targets, sources, sizes, count, stream)`: the first three are addresses of arrays
    of 64-bit words, read before it returns. It raises `DeviceUnavailableError`. None where the driver has no such call."""
    from cuda.bindings import driver

    error, address, _ = driver.cuGetProcAddress(b"cuMemcpyBatchAsync", _SINCE, 0)
    if int(error) or not address:
        return None
    word, size = ctypes.c_void_p, ctypes.c_size_t
    kind = ctypes.CFUNCTYPE(ctypes.c_uint, word, word, word, size, word, word, size, word, word)
    call, attributes = kind(int(address)), _Attributes(order=_STREAM_ORDER)

    def copy(targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
        first, failed = size(0), size(0)
        code = call(
            targets,
            sources,
            sizes,
            count,
            ctypes.addressof(attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(failed),
            stream,
        )
        if code:
            raise DeviceUnavailableError(f"cuMemcpyBatchAsync: error {code} at entry {failed.value} of {count}")

    return copy
