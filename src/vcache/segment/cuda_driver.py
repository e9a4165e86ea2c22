"""A thin, checked layer over the CUDA driver API: every call's result is looked at, and a failure is one line that names
the call and the error. Imports `cuda.bindings` when first used.

Contexts: everything runs in a device's *primary* context, the one that frameworks use too, pushed around each call and
popped again; the caller's current context is never replaced.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import DeviceUnavailableError, SegmentError

_HOST_REGISTER_PORTABLE = 1
_HOST_REGISTER_DEVICEMAP = 2
_STREAM_NON_BLOCKING = 1
_NAME_BYTES = 128
_BUFFER_BYTES = 4 * 2**20
"""Of the pinned buffer through which headers, and payloads on their way to storage, come and go."""


class CudaCallError(SegmentError):
    """A driver call failed. `call` is its name, `code` the name of the CUDA error."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call}: {code}")
        self.call = call
        self.code = code


class MemoryInfo(NamedTuple):
    """Bytes of device memory, as the driver counts them for the whole GPU (all processes)."""

    free: int
    total: int


class CudaDriver:
    """The initialised driver API. Cheap to create; thread-safe."""

    def __init__(self, api: Any = None) -> None:
        """`api`: default the module `cuda.bindings.driver`. Raises `DeviceUnavailableError` without `cuda-bindings`, without a
        driver or without a GPU."""
        try:
            self.api: Any = api or import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DeviceUnavailableError(f"cuda-bindings cannot be imported ({error}); install vcache[cuda]") from None
        try:
            self.call("cuInit", 0)
            self.device_count = int(self.call("cuDeviceGetCount"))
        except CudaCallError as error:
            raise DeviceUnavailableError(f"no usable CUDA driver or GPU ({error})") from None
        except RuntimeError as error:  # the loader of cuda-bindings: no libcuda on this machine
            raise DeviceUnavailableError(f"no CUDA driver on this machine ({' '.join(str(error).split())})") from None
        if not self.device_count:
            raise DeviceUnavailableError("no GPU is visible to this process; check CUDA_VISIBLE_DEVICES")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the driver function `name`; its single result, a tuple of them, or None. Raises `CudaCallError`."""
        status, *results = getattr(self.api, name)(*arguments)
        if int(status) != 0:
            raise CudaCallError(name, getattr(status, "name", str(status)))
        return results[0] if len(results) == 1 else tuple(results) or None

    def version(self) -> tuple[int, int]:
        """CUDA version that the driver supports: (major, minor)."""
        value = int(self.call("cuDriverGetVersion"))
        return value // 1000, value % 1000 // 10

    def uuid(self, ordinal: int) -> str:
        """`GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` of a visible device: the same name in every process."""
        raw = bytes(self.call("cuDeviceGetUuid", self.call("cuDeviceGet", ordinal)).bytes).hex()
        return f"GPU-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"

    def ordinal(self, uuid: str) -> int:
        """Index of the visible device of that UUID; -1 when this process cannot see it."""
        return next((i for i in range(self.device_count) if self.uuid(i) == uuid), -1)

    def attribute(self, ordinal: int, name: str) -> int:
        """`CU_DEVICE_ATTRIBUTE_<name>` of a visible device."""
        kind = getattr(self.api.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_" + name)
        return int(self.call("cuDeviceGetAttribute", kind, self.call("cuDeviceGet", ordinal)))

    def can_access(self, user: int, holder: int) -> bool:
        """Whether one visible device can read and write another one's memory directly."""
        return bool(self.call("cuDeviceCanAccessPeer", self.call("cuDeviceGet", user), self.call("cuDeviceGet", holder)))

    def peer_attribute(self, name: str, source: int, target: int) -> int:
        """`CU_DEVICE_P2P_ATTRIBUTE_<name>` from one visible device to another."""
        kind = getattr(self.api.CUdevice_P2PAttribute, "CU_DEVICE_P2P_ATTRIBUTE_" + name)
        devices = (self.call("cuDeviceGet", source), self.call("cuDeviceGet", target))
        return int(self.call("cuDeviceGetP2PAttribute", kind, *devices))


class Gpu:
    """One visible device: its primary context and a stream of its own for headers, held until `close` and until the last
    memory that was mapped or registered through this object is undone. Thread-safe."""

    def __init__(self, driver: CudaDriver, ordinal: int) -> None:
        self.driver = driver
        self.ordinal = ordinal
        self.uuid = driver.uuid(ordinal)
        self._device = driver.call("cuDeviceGet", ordinal)
        self.name = driver.call("cuDeviceGetName", _NAME_BYTES, self._device).split(b"\0")[0].decode()
        self._context = driver.call("cuDevicePrimaryCtxRetain", self._device)
        self._lock = threading.Lock()
        self._closing = False
        self._closed = False
        self._in_use = 0
        """Mappings and registrations not undone yet."""
        self._pinned = 0
        self._background: Any = None
        with self.current():
            self._stream = driver.call("cuStreamCreateWithPriority", _STREAM_NON_BLOCKING, 0)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside, this device's primary context is current on the calling thread; afterwards what was before."""
        if self._closed:
            raise DeviceUnavailableError(f"GPU {self.uuid}: already closed in this process")
        call = self.driver.call
        if int(call("cuCtxGetCurrent")) == int(self._context):
            yield
            return
        call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")

    def memory(self) -> MemoryInfo:
        with self.current():
            free, total = self.driver.call("cuMemGetInfo")
        return MemoryInfo(int(free), int(total))

    def require_shareable_memory(self) -> None:
        """Raises `DeviceUnavailableError` naming what the device lacks for slabs that other processes can map."""
        needs = {
            "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": "virtual memory management (cuMemCreate)",
            "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": "export of memory as a POSIX file descriptor",
        }
        missing = [text for name, text in needs.items() if not self.driver.attribute(self.ordinal, name)]
        if missing:
            raise DeviceUnavailableError(
                f"GPU {self.uuid} ({self.name}) lacks {' and '.join(missing)}; lend host memory instead"
            )

    # Virtual memory -----------------------------------------------------------------------------------------------------

    def granularity(self) -> int:
        """Bytes that allocations and mappings are multiples of."""
        option = self.driver.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        with self.current():
            return int(self.driver.call("cuMemGetAllocationGranularity", self._properties(), option))

    def create(self, nbytes: int) -> Any:
        """Physical memory of `nbytes` (a multiple of the granularity), exportable as a file descriptor: its handle."""
        with self.current():
            return self.driver.call("cuMemCreate", nbytes, self._properties(), 0)

    def export_fd(self, handle: Any) -> int:
        """A new file descriptor for the memory; the caller closes it."""
        with self.current():
            return int(self.driver.call("cuMemExportToShareableHandle", handle, self._fd_type(), 0))

    def import_fd(self, fd: int) -> Any:
        """Handle of the memory that another process exported. Does not take over `fd`."""
        with self.current():
            return self.driver.call("cuMemImportFromShareableHandle", fd, self._fd_type())

    def map(self, handle: Any, nbytes: int) -> int:
        """Map the memory into this process, readable and writable by this device: its address."""
        call = self.driver.call
        with self._one_more(), self.current():
            address = int(call("cuMemAddressReserve", nbytes, 0, 0, 0))
            try:
                call("cuMemMap", address, nbytes, 0, handle, 0)
                try:
                    self._grant(address, nbytes)
                except CudaCallError:
                    call("cuMemUnmap", address, nbytes)
                    raise
            except CudaCallError:
                call("cuMemAddressFree", address, nbytes)
                raise
        return address

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo `map`. Work that uses the address must be done."""
        with self.current():
            self.driver.call("cuMemUnmap", address, nbytes)
            self.driver.call("cuMemAddressFree", address, nbytes)
        self._one_less()

    def release(self, handle: Any) -> None:
        """Drop a handle; the memory is free once nobody maps it, holds a handle or a file descriptor of it."""
        with self.current():
            self.driver.call("cuMemRelease", handle)

    def grant(self, address: int, nbytes: int) -> None:
        """Let this device, too, read and write a range that was mapped through another device of this process."""
        with self.current():
            self._grant(address, nbytes)

    def _grant(self, address: int, nbytes: int) -> None:
        api = self.driver.api
        access = api.CUmemAccessDesc()
        access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.ordinal
        access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.driver.call("cuMemSetAccess", address, nbytes, [access], 1)

    def _properties(self) -> Any:
        api = self.driver.api
        properties = api.CUmemAllocationProp()
        properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._fd_type()
        properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.ordinal
        return properties

    def _fd_type(self) -> Any:
        return self.driver.api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    # Transfers ---------------------------------------------------------------------------------------------------------

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy device memory to the host, through a pinned buffer. Blocks on this object's stream only."""
        pieces = []
        with self._lock, self.current():
            buffer = self._buffer()
            for start in range(0, nbytes, _BUFFER_BYTES):
                count = min(_BUFFER_BYTES, nbytes - start)
                self.driver.call("cuMemcpyDtoHAsync", buffer, address + start, count, self._stream)
                self.driver.call("cuStreamSynchronize", self._stream)
                pieces.append(ctypes.string_at(buffer, count))
        return b"".join(pieces)

    def copy_to_host(self, target: int, address: int, nbytes: int) -> None:
        """Copy device memory to host memory on a low-priority stream of its own. Blocks until it is there, on its event, not
        on the device; calls may overlap."""
        call, flags = self.driver.call, self.driver.api.CUevent_flags
        with self.current():
            stream = self._background_stream()
            event = call("cuEventCreate", flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value)
            try:
                call("cuMemcpyDtoHAsync", target, address, nbytes, stream)
                try:
                    call("cuEventRecord", event, stream)
                    call("cuEventSynchronize", event)
                except CudaCallError:
                    # The caller may unmap once this has returned: nothing may still be under way.
                    call("cuStreamSynchronize", stream)
                    raise
            finally:
                call("cuEventDestroy", event)

    def write(self, address: int, data: bytes) -> None:
        """Copy host bytes to device memory, through a pinned buffer. Blocks on this object's stream only."""
        with self._lock, self.current():
            buffer = self._buffer()
            for start in range(0, len(data), _BUFFER_BYTES):
                piece = data[start : start + _BUFFER_BYTES]
                ctypes.memmove(buffer, piece, len(piece))
                self.driver.call("cuMemcpyHtoDAsync", address + start, buffer, len(piece), self._stream)
                self.driver.call("cuStreamSynchronize", self._stream)

    def zero(self, address: int, nbytes: int) -> None:
        """Fill device memory with zeros. Blocks on this object's stream only."""
        with self._lock, self.current():
            self.driver.call("cuMemsetD8Async", address, 0, nbytes, self._stream)
            self.driver.call("cuStreamSynchronize", self._stream)

    def _background_stream(self) -> Any:
        """The stream for copies that nobody waits for, made when it is first needed."""
        with self._lock:
            if self._background is None:
                lowest, _ = self.driver.call("cuCtxGetStreamPriorityRange")
                self._background = self.driver.call("cuStreamCreateWithPriority", _STREAM_NON_BLOCKING, lowest)
            return self._background

    def _buffer(self) -> int:
        """Address of the pinned buffer, made when it is first needed."""
        if not self._pinned:
            self._pinned = int(self.driver.call("cuMemHostAlloc", _BUFFER_BYTES, _HOST_REGISTER_PORTABLE))
        return self._pinned

    # Host memory --------------------------------------------------------------------------------------------------------

    def register_host(self, address: int, nbytes: int) -> int:
        """Pin host memory (page-aligned) for every GPU of this process; the address by which they reach it. It must stay mapped
        until `unregister_host`: the driver would refuse whatever is mapped at these addresses later."""
        with self._one_more(), self.current():
            self.driver.call("cuMemHostRegister", address, nbytes, _HOST_REGISTER_PORTABLE | _HOST_REGISTER_DEVICEMAP)
            try:
                return int(self.driver.call("cuMemHostGetDevicePointer", address, 0))
            except CudaCallError:
                self.driver.call("cuMemHostUnregister", address)
                raise

    def unregister_host(self, address: int) -> None:
        """Undo `register_host`. Work that uses the memory must be done."""
        with self.current():
            self.driver.call("cuMemHostUnregister", address)
        self._one_less()

    # End ----------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Map and register nothing more, and give the primary context back: at once, or when the last memory is unmapped and
        unregistered (what a transfer still uses is, when that ends). Idempotent."""
        with self._lock:
            self._closing = True
            self._end_if_unused()

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        """Inside, memory is mapped or registered; it counts when nothing is raised. Raises `DeviceUnavailableError` after
        `close`."""
        with self._lock:
            if self._closing:
                raise DeviceUnavailableError(f"GPU {self.uuid}: already closed in this process")
            self._in_use += 1
        try:
            yield
        except BaseException:
            self._one_less()
            raise

    def _one_less(self) -> None:
        with self._lock:
            self._in_use -= 1
            self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self._closed or not self._closing or self._in_use:
            return
        with self.current():
            self.driver.call("cuStreamDestroy", self._stream)
            if self._background is not None:
                self.driver.call("cuStreamDestroy", self._background)
            if self._pinned:
                self.driver.call("cuMemFreeHost", self._pinned)
        self._closed = True
        self.driver.call("cuDevicePrimaryCtxRelease", self._device)
