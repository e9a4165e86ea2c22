"""Where slabs come from: the interface of slab memory, implemented for host memory (`host.py`) and VRAM (`cuda.py`)."""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from ..errors import SegmentError
from .gate import WriteGate
from .slots import SegmentKind, align_up


class MappedSlab:
    """Memory of one slab, mapped in this process.

    Pins keep it mapped: whoever computes an address from `address`, `device_address` or `buffer` holds a pin until the last
    byte has moved. `retire` refuses new pins and calls back when the last one is gone; only then may a backing unmap.
    Views of `buffer` (memoryviews, tensors) may be kept beyond the pin, but their bytes mean nothing then.
    """

    __slots__ = (
        "_idle",
        "_lock",
        "_pins",
        "_retired",
        "address",
        "buffer",
        "device",
        "device_address",
        "gate",
        "index",
        "kind",
        "nbytes",
        "resource",
    )

    def __init__(
        self,
        kind: SegmentKind,
        device: str,
        nbytes: int,
        address: int,
        *,
        device_address: int = 0,
        buffer: memoryview | None = None,
        resource: object = None,
    ) -> None:
        self.kind: SegmentKind = kind
        self.device = device
        """`"host"`, or the UUID of the GPU in whose memory the slab lies (not necessarily the GPU that maps it)."""
        self.nbytes = nbytes
        """Physical bytes, headers included."""
        self.address = address
        """Host virtual address, or device address of a CUDA slab."""
        self.device_address = device_address
        """Address by which this process's GPU reaches it (CUDA slab, registered host slab); 0 if it cannot."""
        self.buffer = buffer
        """Writable bytes of a host slab, format `B`, `nbytes` long; None for CUDA and after unmapping."""
        self.resource = resource
        """What the backing needs to unmap it; nobody else touches it."""
        self.index = 0
        """In its segment. With `gate` set by who lends or imports it, before anybody else sees the slab."""
        self.gate: WriteGate | None = None
        """That a write must pass; None: nothing may be written (memory of one's own that nobody else sees needs none)."""
        self._lock = threading.Lock()
        self._pins = 0
        self._retired = False
        self._idle: list[Callable[[], None]] = []

    @property
    def pins(self) -> int:
        return self._pins

    @property
    def retired(self) -> bool:
        return self._retired

    def pin(self) -> bool:
        """Keep the slab mapped until `unpin`; False (and no pin) when it is retired. Does not block."""
        with self._lock:
            if self._retired:
                return False
            self._pins += 1
            return True

    def unpin(self) -> None:
        """Undo one `pin`. May run the callbacks of `retire` in this thread."""
        with self._lock:
            if self._pins < 1:
                raise AssertionError("unpin without a pin")
            self._pins -= 1
            calls, self._idle = (self._idle, []) if self._retired and not self._pins else ([], self._idle)
        for call in calls:
            call()

    def retire(self, when_idle: Callable[[], None] | None = None) -> None:
        """Refuse new pins for good. `when_idle` is called once, without locks, when no pin is left: at once, or by the
        thread that drops the last pin; it must be quick and must not raise. Does not block; may be called again."""
        with self._lock:
            self._retired = True
            if self._pins:
                if when_idle is not None:
                    self._idle.append(when_idle)
                return
        if when_idle is not None:
            when_idle()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Retire, then block until no pin is left; False after `timeout` seconds."""
        idle = threading.Event()
        self.retire(idle.set)
        return idle.wait(timeout)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.kind} on {self.device}, {self.nbytes} bytes at {self.address:#x}, {self._pins} pins>"
        )


class OwnedSlab(MappedSlab):
    """A slab that this process allocated: mapped here, and exportable."""

    __slots__ = ("fd",)

    def __init__(
        self,
        kind: SegmentKind,
        device: str,
        nbytes: int,
        address: int,
        fd: int,
        *,
        device_address: int = 0,
        buffer: memoryview | None = None,
        resource: object = None,
    ) -> None:
        super().__init__(kind, device, nbytes, address, device_address=device_address, buffer=buffer, resource=resource)
        self.fd = fd
        """File descriptor that stands for the memory in another process (`SlabBacking.map`). Close-on-exec, owned by the
        slab, closed (-1) by `SlabBacking.release`."""


class SlabBacking(ABC):
    """Allocates, exports and maps slabs on one device. Thread-safe.

    A lender creates and releases; an importer maps and unmaps. Every method may be called from any thread (a CUDA backing
    makes its context current itself). Errors are one-line `SegmentError`s (or `DeviceUnavailableError` where the device
    itself is missing); nothing is left behind after one.
    """

    kind: SegmentKind
    device: str
    """Where the memory lies, in the notation of `SegmentInfo.device`."""
    frees_under_importers: bool
    """Whether `release` is sure to give the memory back while importers still map it, who then read zeros. VRAM: no, it is
    free when the last importer unmaps. Host memory: yes, but for pages that an importer has pinned for its GPU: so only
    where there is none."""

    @property
    @abstractmethod
    def granularity(self) -> int:
        """Physical sizes are multiples of this many bytes."""

    @abstractmethod
    def available_bytes(self) -> int:
        """Bytes that could be allocated now, as far as the system tells. For decisions and error messages, not a promise."""

    @abstractmethod
    def create(self, nbytes: int) -> OwnedSlab:
        """Allocate and map `nbytes` (a multiple of `granularity`), zeroed. The fd is open. Raises `SegmentError`."""

    @abstractmethod
    def map(self, fd: int, nbytes: int) -> MappedSlab:
        """Map another process's slab. Verifies that `fd` really holds `nbytes`. Does not close `fd`: the caller does.
        Raises `SegmentError`."""

    @abstractmethod
    def unmap(self, slab: MappedSlab) -> None:
        """Undo `map`. The slab must be retired and idle. Idempotent."""

    @abstractmethod
    def release(self, slab: OwnedSlab) -> None:
        """Give the memory of an owned slab back to the system (as far as importers allow: host memory that nobody has pinned at
        once, the rest when the last importer unmaps) and close its fd. The slab must be retired and idle. Idempotent."""

    @abstractmethod
    def read(self, slab: MappedSlab, offset: int, nbytes: int) -> bytes:
        """Copy bytes of a mapped slab to host memory; complete when it returns. For headers, not for payloads."""

    @abstractmethod
    def read_into(self, slab: MappedSlab, offset: int, out: memoryview) -> None:
        """Copy `len(out)` bytes of a mapped slab into host memory `out` (bytes, writable, in one piece); complete when it
        returns. For payloads: one copy, during which other Python threads run. Raises `SegmentError`."""

    @abstractmethod
    def write(self, slab: MappedSlab, offset: int, data: bytes) -> None:
        """Write bytes into a mapped slab; visible to all importers when it returns. For headers, not for payloads."""

    def physical_bytes(self, nbytes: int) -> int:
        """`nbytes` rounded up to the granularity."""
        return align_up(nbytes, self.granularity)

    def close(self) -> None:  # noqa: B027 - most backings hold nothing
        """Release what the backing itself holds. All slabs are released or unmapped before. Idempotent."""


def address_of(out: memoryview) -> int:
    """Where the bytes of writable host memory lie. The address is good for as long as the caller keeps the memory alive.
    Raises `SegmentError` for memory that is read-only, not in one piece, or not made of bytes."""
    if out.readonly or not out.c_contiguous or out.itemsize != 1:
        raise SegmentError("host memory to copy to must be writable bytes in one piece")
    return ctypes.addressof(ctypes.c_char.from_buffer(out)) if out.nbytes else 0
