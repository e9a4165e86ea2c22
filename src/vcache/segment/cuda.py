"""VRAM slabs: CUDA virtual memory that other processes map by file descriptor, and host slabs made reachable for the GPU."""

from __future__ import annotations

import logging
import os
import threading
import weakref

from ..errors import DeviceUnavailableError, SegmentError
from .backing import MappedSlab, OwnedSlab, SlabBacking, address_of
from .cuda_driver import CudaCallError, CudaDriver, Gpu
from .slots import SegmentKind

logger = logging.getLogger(__name__)

_UNREACHABLE = {
    "CUDA_ERROR_INVALID_DEVICE": "no direct link between the two GPUs (P2P is missing)",
    "CUDA_ERROR_NOT_SUPPORTED": "this process cannot use memory of that GPU (P2P or file descriptor handles are missing)",
    "CUDA_ERROR_NOT_PERMITTED": "the driver does not permit it (another user or container isolation?)",
    "CUDA_ERROR_INVALID_VALUE": "not the slab that was announced, or its GPU cannot be reached from here",
    "CUDA_ERROR_OUT_OF_MEMORY": "no memory left for the mapping",
}


def gpu_uuid(ordinal: int = 0) -> str:
    """`GPU-...` of this process's device `ordinal` (the index that torch uses, too). Raises `DeviceUnavailableError`."""
    driver = CudaDriver()
    if not 0 <= ordinal < driver.device_count:
        raise DeviceUnavailableError(f"no GPU {ordinal}: this process sees {driver.device_count}; check CUDA_VISIBLE_DEVICES")
    return driver.uuid(ordinal)


class CudaBacking(SlabBacking):
    """Slabs in the memory of one GPU.

    The GPU that holds the memory (`device`) need not be visible here in order to map its slabs: they are mapped for the GPU
    `through`, which must be. Only the holder itself can create slabs.
    """

    kind: SegmentKind = "cuda"
    frees_under_importers = False

    def __init__(self, device: str = "", *, through: str = "", driver: CudaDriver | None = None) -> None:
        """`device`: UUID of the GPU that holds the memory; default `through`, else the first visible one. `through`: UUID of
        the GPU that reads and writes it here; default `device` where it is visible, else the first visible one. `driver`:
        default a new one.

        Holds the primary context of `through` until `close`. Raises `DeviceUnavailableError` where the driver, a GPU, virtual
        memory, file descriptor handles or peer access between the two GPUs is missing.
        """
        driver = driver or CudaDriver()
        holder = driver.ordinal(device) if device else -1
        user = driver.ordinal(through) if through else max(holder, 0)
        if user < 0:
            raise DeviceUnavailableError(f"GPU {through} is not visible to this process; check CUDA_VISIBLE_DEVICES")
        self.gpu = Gpu(driver, user)
        self.device = device or self.gpu.uuid
        try:
            self.gpu.require_shareable_memory()
            if holder not in (-1, user) and not driver.can_access(user, holder):
                raise DeviceUnavailableError(f"GPU {self.gpu.uuid} cannot reach GPU {device}: no NVLink or PCIe peer access")
            self._granularity = self.gpu.granularity()
        except (DeviceUnavailableError, CudaCallError):
            self.gpu.close()
            raise
        self._lock = threading.Lock()

    @property
    def granularity(self) -> int:
        return self._granularity

    def available_bytes(self) -> int:
        """Free memory of the GPU, as the driver counts it over all processes; 0 where this process does not hold it."""
        return self.gpu.memory().free if self.device == self.gpu.uuid else 0

    def create(self, nbytes: int) -> OwnedSlab:
        if self.device != self.gpu.uuid:
            raise SegmentError(f"cannot create slabs on GPU {self.device}: it is not visible to this process")
        if nbytes < 1 or nbytes % self._granularity:
            raise SegmentError(f"slab of {nbytes} bytes: must be a multiple of {self._granularity} on GPU {self.device}")
        free, total = self.gpu.memory()
        if nbytes > free:
            raise SegmentError(self._no_memory(nbytes, free, total))
        address, fd = 0, -1
        try:
            handle = self.gpu.create(nbytes)
            try:
                fd = self.gpu.export_fd(handle)
                os.set_inheritable(fd, False)
                address = self.gpu.map(handle, nbytes)
            finally:
                # The mapping and the file descriptor hold the memory; the handle is needed no more.
                self.gpu.release(handle)
            self.gpu.zero(address, nbytes)
        except (CudaCallError, DeviceUnavailableError) as error:
            if address:
                self.gpu.unmap(address, nbytes)
            if fd >= 0:
                os.close(fd)
            if isinstance(error, DeviceUnavailableError):
                raise
            if error.code == "CUDA_ERROR_OUT_OF_MEMORY":
                free, total = self.gpu.memory()
                raise SegmentError(f"{self._no_memory(nbytes, free, total)} ({error})") from None
            raise SegmentError(f"GPU {self.device}: no slab of {nbytes} bytes: {error}") from None
        return OwnedSlab(self.kind, self.device, nbytes, address, fd, device_address=address)

    def map(self, fd: int, nbytes: int) -> MappedSlab:
        """Map a slab of this or another process for the GPU `through`. The driver refuses a mapping larger than the memory."""
        try:
            handle = self.gpu.import_fd(fd)
            try:
                address = self.gpu.map(handle, nbytes)
            finally:
                self.gpu.release(handle)
        except CudaCallError as error:
            reason = _UNREACHABLE.get(error.code, "the slab cannot be mapped")
            raise SegmentError(
                f"slab of {nbytes} bytes on GPU {self.device} from GPU {self.gpu.uuid}: {reason} ({error})"
            ) from None
        return MappedSlab(self.kind, self.device, nbytes, address, device_address=address)

    def unmap(self, slab: MappedSlab) -> None:
        with self._lock:
            address, slab.address, slab.device_address = slab.address, 0, 0
        if address:
            self.gpu.unmap(address, slab.nbytes)

    def release(self, slab: OwnedSlab) -> None:
        self.unmap(slab)
        with self._lock:
            fd, slab.fd = slab.fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, slab: MappedSlab, offset: int, nbytes: int) -> bytes:
        return self.gpu.read(self._address(slab, offset, nbytes), nbytes) if nbytes else b""

    def read_into(self, slab: MappedSlab, offset: int, out: memoryview) -> None:
        """One copy by the GPU's copy engine, behind everything else that it does. At full speed where `out` is pinned (a
        registered host slab or staging buffer), else through the driver's own buffers."""
        source, target = self._address(slab, offset, out.nbytes), address_of(out)
        if out.nbytes:
            self.gpu.copy_to_host(target, source, out.nbytes)

    def write(self, slab: MappedSlab, offset: int, data: bytes) -> None:
        if data:
            self.gpu.write(self._address(slab, offset, len(data)), data)

    def close(self) -> None:
        self.gpu.close()

    def _address(self, slab: MappedSlab, offset: int, nbytes: int) -> int:
        if not 0 <= offset <= offset + nbytes <= slab.nbytes:
            raise SegmentError(f"bytes [{offset}, {offset + nbytes}) lie outside a slab of {slab.nbytes} bytes")
        if not slab.address:
            raise SegmentError("the slab is not mapped any more")
        return slab.address + offset

    def _no_memory(self, nbytes: int, free: int, total: int) -> str:
        gib = 2**30
        return (
            f"GPU {self.device}: no room for a slab of {nbytes / gib:.2f} GiB: {free / gib:.2f} of {total / gib:.2f} GiB "
            "are free; lend less, or leave more to VCache in the engine's memory setting"
        )


class PageLock:
    """Makes host slabs reachable for the GPUs of this process. Thread-safe.

    Pages stay pinned until `unregister`: memory that the owner takes back is free once every process that registered it has
    unregistered (or died). Until then they stay mapped, too, whatever becomes of the slab: to the driver, addresses stay
    registered when the memory behind them is gone, and it refuses the next memory that comes to lie there. What is still
    registered when this object is collected is unregistered then.
    """

    def __init__(self, device: str = "", *, driver: CudaDriver | None = None) -> None:
        """`device`: UUID of any visible GPU; default the first. Raises `DeviceUnavailableError`."""
        driver = driver or CudaDriver()
        ordinal = driver.ordinal(device) if device else 0
        if ordinal < 0:
            raise DeviceUnavailableError(f"GPU {device} is not visible to this process; check CUDA_VISIBLE_DEVICES")
        self.gpu = Gpu(driver, ordinal)
        self._lock = threading.Lock()
        self._registered: dict[int, memoryview | None] = {}
        """By address: what keeps the memory mapped."""
        weakref.finalize(self, _unregister_all, self.gpu, self._registered, os.getpid()).atexit = False

    def register(self, slab: MappedSlab) -> int:
        """Pin the slab's memory once and set its `device_address`, which is returned. Blocks about 0.3 s a GiB."""
        with self._lock:
            if not slab.device_address:
                try:
                    slab.device_address = self.gpu.register_host(slab.address, slab.nbytes)
                except CudaCallError as error:
                    raise SegmentError(
                        f"host slab of {slab.nbytes} bytes: the GPU cannot use it ({error}); check `ulimit -l` and free memory"
                    ) from None
                self._registered[slab.address] = slab.buffer
            return slab.device_address

    def unregister(self, slab: MappedSlab) -> None:
        """Undo `register`; before the slab is unmapped. Idempotent. Possible after `close`, too."""
        with self._lock:
            registered, slab.device_address = slab.device_address, 0
            if registered:
                self.gpu.unregister_host(slab.address)
                self._registered.pop(slab.address, None)

    def close(self) -> None:
        """Register nothing more. What is still registered (a transfer uses it, say) stays so until `unregister`. Idempotent."""
        self.gpu.close()


def _unregister_all(gpu: Gpu, registered: dict[int, memoryview | None], process: int) -> None:
    """Undo what is left of a `PageLock` that is gone. A forked child has only a copy of it, and no say."""
    if os.getpid() != process:
        return
    for address in list(registered):
        try:
            gpu.unregister_host(address)
        except CudaCallError as error:
            logger.warning("host memory at %#x stays registered and mapped: %s", address, error)
            continue
        del registered[address]
    gpu.close()
