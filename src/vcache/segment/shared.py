"""Shared memory as this process sees it: a mapping that holds no descriptor, and a barrier between accesses."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000


class Fence:
    """A full memory barrier for code that can only make Python calls.

    Two uncontended lock rounds: releasing the first and then acquiring the second keeps every access before the call before
    every access after it, on aarch64 too (a load-acquire is never moved before an earlier store-release; neither lets the
    accesses outside pass). On x86-64 stores are seen in program order, and loads made in order, anyway.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            pass
        with self._lock:
            pass


def map_shared(fd: int, nbytes: int) -> tuple[int, memoryview]:
    """Address and bytes of a shared mapping of a file; its lifetime is that of the bytes. Raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    # An `mmap` object of a file keeps a duplicate of its descriptor for as long as it lives: one per slab, hundreds in a
    # big pool. So the object gets a private range of addresses, over which the file is then mapped.
    holder = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(holder))
    flags = mmap.MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE
    if libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != address:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    return address, memoryview(holder)
