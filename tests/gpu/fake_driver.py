"""A CUDA driver made of memfds, with the real enums: as much as `vcache.segment.cuda` calls. Knows what is still held, and
fails on request. Not a test of CUDA itself: that is what the tests marked `gpu` are for."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from types import SimpleNamespace
from typing import Any

GRANULARITY = 2 * 2**20


class FakeDriver:
    """`devices`: 16-byte UUIDs of the visible GPUs. `failures`: call name -> CUDA error name."""

    def __init__(self, real: Any, devices: tuple[bytes, ...] = (bytes(range(16)),), *, peers: bool = True) -> None:
        self.real = real
        self.devices = devices
        self.peers = peers
        self.failures: dict[str, str] = {}
        self.missing: set[str] = set()
        """Device attributes (without prefix) that read 0."""
        self.total = 2**30
        self.handles: dict[int, int] = {}
        """Handle -> fd."""
        self.reserved: dict[int, int] = {}
        """Address -> bytes of ranges."""
        self.mapped: dict[int, mmap.mmap] = {}
        self.allowed: dict[int, set[int]] = {}
        """Address -> devices that may access it."""
        self.registered: set[int] = set()
        self.pinned: dict[int, Any] = {}
        self.contexts: list[int] = []
        self.retained = 0
        self.streams = 0
        self.priorities: list[int] = []
        """Of the streams made so far."""
        self.events: dict[int, int] = {}
        """Event -> the stream in which it was recorded."""
        self.under_way: dict[int, list[tuple[int, int, int]]] = {}
        """Stream -> copies to the host that have not landed."""
        self._numbers = itertools.count(1000)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(self.real, name)
        implementation = getattr(type(self), "_" + name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name in self.failures:
                return (getattr(self.real.CUresult, self.failures[name]), None)
            result = implementation(self, *arguments)
            if isinstance(result, self.real.CUresult):
                return (result, None)
            values = result if isinstance(result, tuple) else () if result is None else (result,)
            return (self.real.CUresult.CUDA_SUCCESS, *values)

        return call

    @property
    def used(self) -> int:
        return sum(os.fstat(fd).st_size for fd in self.handles.values()) + sum(len(m) for m in self.mapped.values())

    def _need_context(self) -> None:
        assert self.contexts, "a call that needs a current context was made without one"

    def _cuInit(self, flags: int) -> None: ...

    def _cuDriverGetVersion(self) -> int:
        return 13000

    def _cuDeviceGetCount(self) -> int:
        return len(self.devices)

    def _cuDeviceGet(self, ordinal: int) -> int:
        assert 0 <= ordinal < len(self.devices)
        return ordinal

    def _cuDeviceGetUuid(self, device: int) -> Any:
        return SimpleNamespace(bytes=self.devices[device])

    def _cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Fake GPU\0\0\0"

    def _cuDeviceGetAttribute(self, kind: Any, device: int) -> int:
        missing = {getattr(self.real.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_" + name) for name in self.missing}
        return int(kind not in missing)

    def _cuDeviceGetP2PAttribute(self, kind: Any, source: int, target: int) -> int:
        return 1

    def _cuDeviceCanAccessPeer(self, user: int, holder: int) -> int:
        return int(self.peers)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.retained += 1
        return 500 + device

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.retained -= 1

    def _cuCtxGetCurrent(self) -> int:
        return self.contexts[-1] if self.contexts else 0

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.append(context)

    def _cuCtxPopCurrent(self) -> int:
        return self.contexts.pop()

    def _cuStreamCreateWithPriority(self, flags: int, priority: int) -> int:
        self._need_context()
        self.streams += 1
        self.priorities.append(priority)
        return next(self._numbers)

    def _cuStreamDestroy(self, stream: int) -> None:
        self.streams -= 1

    def _cuStreamSynchronize(self, stream: int) -> None:
        for copy in self.under_way.pop(stream, []):
            ctypes.memmove(*copy)

    def _cuMemGetInfo(self) -> tuple[int, int]:
        self._need_context()
        return self.total - self.used, self.total

    def _cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> int:
        return GRANULARITY

    def _cuMemCreate(self, nbytes: int, properties: Any, flags: int) -> Any:
        assert nbytes % GRANULARITY == 0
        kind = self.real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        assert properties.requestedHandleTypes == kind
        fd = os.memfd_create("fake-vram")
        os.ftruncate(fd, nbytes)
        # VRAM comes dirty.
        os.pwrite(fd, b"\xa5" * 65536, 0)
        handle = next(self._numbers)
        self.handles[handle] = fd
        return handle

    def _cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> int:
        return os.dup(self.handles[handle])

    def _cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> int:
        handle = next(self._numbers)
        self.handles[handle] = os.dup(fd)
        return handle

    def _cuMemRelease(self, handle: int) -> None:
        os.close(self.handles.pop(handle))

    def _cuMemAddressReserve(self, nbytes: int, alignment: int, address: int, flags: int) -> int:
        area = mmap.mmap(-1, nbytes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        self.reserved[start] = nbytes
        self.allowed[start] = set()
        self._areas = {**getattr(self, "_areas", {}), start: area}
        return start

    def _cuMemAddressFree(self, address: int, nbytes: int) -> None:
        assert address not in self.mapped, "address range freed while mapped"
        assert self.reserved.pop(address) == nbytes
        self._areas.pop(address)

    def _cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> Any:
        fd = self.handles[handle]
        if os.fstat(fd).st_size != nbytes:
            return self.real.CUresult.CUDA_ERROR_INVALID_VALUE
        # MAP_FIXED over the reserved range, so that addresses are the mapping's.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        fixed = 0x10
        assert libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, fd, 0) == address
        self.mapped[address] = self._areas[address]
        return None

    def _cuMemUnmap(self, address: int, nbytes: int) -> None:
        assert self.reserved[address] == nbytes
        del self.mapped[address]

    def _cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], count: int) -> None:
        assert len(access) == count
        for entry in access:
            assert entry.location.type == self.real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            self.allowed[address].add(int(entry.location.id))

    def _check(self, address: int, nbytes: int) -> None:
        self._need_context()
        device = self.contexts[-1] - 500
        inside = [a for a, n in self.reserved.items() if a <= address and address + nbytes <= a + n and a in self.mapped]
        assert inside, f"access outside of mapped memory: {address:#x}, {nbytes} bytes"
        assert device in self.allowed[inside[0]], f"device {device} was given no access"

    def _cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self._check(address, nbytes)
        ctypes.memset(address, value, nbytes)

    def _cuMemcpyDtoHAsync(self, target: int, address: int, nbytes: int, stream: int) -> None:
        """Lands when somebody waits for it."""
        self._check(address, nbytes)
        self.under_way.setdefault(stream, []).append((target, address, nbytes))

    def _cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        self._need_context()
        return 0, -5

    def _cuEventCreate(self, flags: int) -> int:
        self._need_context()
        self.events[event := next(self._numbers)] = 0
        return event

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self.events[event] = stream

    def _cuEventSynchronize(self, event: int) -> None:
        self._cuStreamSynchronize(self.events[event])

    def _cuEventDestroy(self, event: int) -> None:
        del self.events[event]

    def _cuMemcpyHtoDAsync(self, address: int, source: int, nbytes: int, stream: int) -> None:
        self._check(address, nbytes)
        ctypes.memmove(address, source, nbytes)

    def _cuMemHostAlloc(self, nbytes: int, flags: int) -> int:
        self._need_context()
        block = ctypes.create_string_buffer(nbytes)
        self.pinned[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cuMemFreeHost(self, address: int) -> None:
        del self.pinned[address]

    def _cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> Any:
        self._need_context()
        if address in self.registered:
            return self.real.CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
        self.registered.add(address)
        return None

    def _cuMemHostUnregister(self, address: int) -> None:
        self.registered.remove(address)

    def _cuMemHostGetDevicePointer(self, address: int, flags: int) -> int:
        assert address in self.registered
        return address + 2**40
