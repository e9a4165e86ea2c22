"""Slabs in host memory: a sealed `memfd` each, mapped shared by the lender and every importer."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import SegmentError
from .backing import MappedSlab, OwnedSlab, SlabBacking, address_of
from .hostinfo import available_memory
from .shared import Fence, map_shared
from .slots import SegmentKind

RegisterHook = Callable[[MappedSlab], int]
"""Pins a freshly mapped slab for the GPU and returns its device address (0: the GPU cannot reach it). Raises `SegmentError`."""
UnregisterHook = Callable[[MappedSlab], None]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
_GPU_DRIVER = (Path("/sys/module/nvidia"), Path("/dev/nvidiactl"))
"""One of them is there where a process could register host memory with a GPU."""


class HostBacking(SlabBacking):
    """Host memory of this machine. Needs neither torch nor a GPU.

    Pages are allocated (and zeroed) when they are first touched: the first write to a slab takes about 0.6 s per GiB, the
    first in another process that maps it 0.3 s, later ones 0.03 s. `prefault` allocates at creation, and so turns a lack of
    memory into an error there; without it a machine that runs out later kills a process. The size of /dev/shm is no limit.

    Why header, payload, header is seen in that order by another process: each is written by its own call into C, with a
    `Fence` between (`write` ends with one). Stores are then ordered on x86-64 and aarch64; readers do the same.
    """

    kind: SegmentKind = "host"
    device = "host"

    def __init__(
        self,
        *,
        prefault: bool = False,
        register: RegisterHook | None = None,
        unregister: UnregisterHook | None = None,
    ) -> None:
        """`register`/`unregister`: called after a slab was mapped and before it is unmapped, own slabs and imported ones."""
        # A GPU's process pins what it maps, and nobody tells the lender who has a GPU.
        self.frees_under_importers = not any(path.exists() for path in _GPU_DRIVER)
        self._prefault = prefault
        self._register = register
        self._unregister = unregister
        self._fence = Fence()
        self._lock = threading.Lock()
        self._owned: dict[int, OwnedSlab] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

    @property
    def granularity(self) -> int:
        return mmap.PAGESIZE

    def available_bytes(self) -> int:
        """Available memory, less what this process has lent but nobody has touched yet. Reads a few files."""
        with self._lock:
            untouched = sum(slab.nbytes - os.fstat(slab.fd).st_blocks * 512 for slab in self._owned.values())
        return max(0, available_memory().nbytes - max(0, untouched))

    def create(self, nbytes: int) -> OwnedSlab:
        if nbytes < 1 or nbytes % self.granularity:
            raise SegmentError(f"host slab: size must be a positive multiple of {self.granularity} bytes, got {nbytes}")
        available = self.available_bytes()
        if nbytes > available:
            raise SegmentError(
                f"host slab: cannot get {nbytes} bytes, only {available} are available ({available_memory().limit}); lend less"
            )
        try:
            fd = os.memfd_create("vcache-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise SegmentError(f"host slab: cannot create a memfd: {error.strerror}") from None
        try:
            os.ftruncate(fd, nbytes)
            if self._prefault:
                os.posix_fallocate(fd, 0, nbytes)
            # Nobody can resize it from now on: no importer can ever be hit by SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            address, buffer = map_shared(fd, nbytes)
            slab = OwnedSlab(self.kind, self.device, nbytes, address, fd, buffer=buffer)
            self._pin_for_gpu(slab)
        except OSError as error:
            os.close(fd)
            raise SegmentError(f"host slab: cannot get {nbytes} bytes: {error.strerror}") from None
        except BaseException:
            os.close(fd)
            raise
        with self._lock:
            self._owned[fd] = slab
        return slab

    def map(self, fd: int, nbytes: int) -> MappedSlab:
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise SegmentError(f"host slab: the file descriptor received is not a memfd ({error.strerror})") from None
        if size != nbytes or nbytes < 1:
            raise SegmentError(f"host slab: the memfd received holds {size} bytes instead of {nbytes}")
        if seals & _SEALS != _SEALS:
            raise SegmentError("host slab: the memfd received could still be resized; refused")
        try:
            address, buffer = map_shared(fd, nbytes)
        except OSError as error:
            raise SegmentError(f"host slab: cannot map {nbytes} bytes: {error.strerror}") from None
        slab = MappedSlab(self.kind, self.device, nbytes, address, buffer=buffer)
        self._pin_for_gpu(slab)
        return slab

    def unmap(self, slab: MappedSlab) -> None:
        if slab.buffer is None:
            return
        try:
            if self._unregister is not None and slab.device_address:
                self._unregister(slab)
        finally:
            # The last reference to the mmap object unmaps. A view that somebody still keeps stays harmless instead of dangling.
            slab.buffer = None
            slab.address = slab.device_address = 0

    def release(self, slab: OwnedSlab) -> None:
        with self._lock:
            if self._owned.pop(slab.fd, None) is not slab:
                return
        fd, slab.fd = slab.fd, -1
        try:
            self.unmap(slab)
        finally:
            self._give_back(fd, slab.nbytes)

    def read(self, slab: MappedSlab, offset: int, nbytes: int) -> bytes:
        data = bytes(_buffer(slab, offset, nbytes))
        self._fence()
        return data

    def read_into(self, slab: MappedSlab, offset: int, out: memoryview) -> None:
        source, target = _buffer(slab, offset, out.nbytes), address_of(out)
        # Unlike a slice assignment, a call through ctypes lets other Python threads run.
        ctypes.memmove(target, address_of(source), out.nbytes)
        self._fence()

    def write(self, slab: MappedSlab, offset: int, data: bytes) -> None:
        self._fence()
        _buffer(slab, offset, len(data))[:] = data
        self._fence()

    def _give_back(self, fd: int, nbytes: int) -> None:
        """Free the pages and close `fd`. Raises `SegmentError`."""
        try:
            # Importers keep their mapping and read zeros from now on, which no reader takes for a chunk.
            if self._libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, 0, nbytes):
                code = ctypes.get_errno()
                raise SegmentError(f"host slab: cannot free {nbytes} bytes: {os.strerror(code)}")
        finally:
            os.close(fd)

    def _pin_for_gpu(self, slab: MappedSlab) -> None:
        if self._register is None:
            return
        try:
            slab.device_address = self._register(slab)
        except BaseException:
            slab.buffer = None
            raise


def _buffer(slab: MappedSlab, offset: int, nbytes: int) -> memoryview:
    if slab.buffer is None:
        raise SegmentError("host slab: it is not mapped any more")
    if not 0 <= offset <= offset + nbytes <= slab.nbytes:
        raise SegmentError(f"host slab: bytes [{offset}, {offset + nbytes}) are not inside its {slab.nbytes}")
    return slab.buffer[offset : offset + nbytes]
