"""What `vcache doctor` says of GPUs: features, free memory, and the links between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from ..errors import DeviceUnavailableError
from ..segment.cuda_driver import CudaCallError, CudaDriver, Gpu
from .checks import Check

LinkKind = Literal["same", "nvlink", "pcie", "none"]
"""`same`: one GPU. `nvlink`, `pcie`: one GPU reads the other's memory directly. `none`: no direct way; chunks go through the
DRAM tier."""


class Link(NamedTuple):
    """How GPU `source` reaches the memory of GPU `target` (UUIDs)."""

    source: str
    target: str
    kind: LinkKind
    evidence: str
    """Who says so: `nvml`, or `driver` (peer attributes of the CUDA driver)."""


def checks() -> list[Check]:
    """Check the driver, then every visible GPU: shareable memory, pinned host memory, free memory. Raises nothing: what cannot
    be found out is a line, too. Creates a context on each GPU; takes up to a second."""
    try:
        driver = CudaDriver()
        major, minor = driver.version()
    except (DeviceUnavailableError, CudaCallError) as error:
        return [Check("CUDA", "fail", str(error), advice="without a GPU, VCache lends host memory (`vcache lend --kind host`)")]
    found = [Check("CUDA", "ok", f"driver for CUDA {major}.{minor}, {driver.device_count} GPU(s) visible")]
    for ordinal in range(driver.device_count):
        try:
            found += _device_checks(driver, ordinal)
        except (DeviceUnavailableError, CudaCallError) as error:
            found.append(Check(f"GPU {ordinal}", "fail", str(error), advice="is another process holding the GPU exclusively?"))
    return found


def _device_checks(driver: CudaDriver, ordinal: int) -> Iterator[Check]:
    name = f"GPU {ordinal}"
    gpu = Gpu(driver, ordinal)
    try:
        yield Check(name, "ok", f"{gpu.name}, {gpu.uuid}")
        try:
            gpu.require_shareable_memory()
            gpu.release(gpu.create(gpu.granularity()))
            yield Check(f"{name}: shareable memory", "ok", f"granularity {gpu.granularity() // 2**20} MiB")
        except (DeviceUnavailableError, CudaCallError) as error:
            advice = "this GPU cannot lend VRAM; lend host memory instead"
            yield Check(f"{name}: shareable memory", "fail", str(error), advice=advice)
        if driver.attribute(ordinal, "HOST_REGISTER_SUPPORTED"):
            yield Check(f"{name}: pinned host memory", "ok", "host slabs are read and written in place")
        else:
            advice = "host slabs go through the CPU on this GPU"
            yield Check(f"{name}: pinned host memory", "warn", "not supported", advice=advice)
        free, total = gpu.memory()
        detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        low = free < 2**30
        advice = "leave VCache some: lower the engine's GPU memory utilisation" if low else ""
        yield Check(f"{name}: memory", "warn" if low else "ok", detail, advice=advice)
    finally:
        gpu.close()


def links() -> list[Link]:
    """Find the links between GPUs, as a matrix row by row: over all GPUs of the host where NVML is available (package
    `nvidia-ml-py`), else over the GPUs that this process sees. Empty without a GPU."""
    with _nvml() as nvml:
        if nvml is not None:
            return _nvml_links(nvml)
    try:
        return list(driver_links(CudaDriver()))
    except (DeviceUnavailableError, CudaCallError):
        return []


def link_table(matrix: list[Link]) -> list[list[str]]:
    """Make a table of words of `links()`, headings first: one row for each source GPU. GPUs are named by the first digits of
    their UUIDs."""
    names = list(dict.fromkeys(link.source for link in matrix))
    words = {(link.source, link.target): link.kind for link in matrix}
    short = {name: name[:12] for name in names}
    rows = [["from \\ to", *short.values()]]
    return rows + [[short[a], *(words.get((a, b), "none") for b in names)] for a in names]


@contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML module, initialised, or None where it is missing or does not work."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _nvml_links(nvml: Any) -> list[Link]:
    devices = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        devices[uuid.decode() if isinstance(uuid, bytes) else uuid] = handle

    def status(one: Any, other: Any, capability: int) -> bool:
        try:
            return bool(nvml.nvmlDeviceGetP2PStatus(one, other, capability) == nvml.NVML_P2P_STATUS_OK)
        except nvml.NVMLError:  # not supported on this board: no such capability
            return False

    def kind(source: str, target: str) -> LinkKind:
        if source == target:
            return "same"
        one, other = devices[source], devices[target]
        if status(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK):
            return "nvlink"
        # NVML_P2P_CAPS_INDEX_READ is 0; the Python package defines it as a tuple by mistake.
        return "pcie" if status(one, other, 0) else "none"

    return [Link(a, b, kind(a, b), "nvml") for a in devices for b in devices]


def driver_links(driver: CudaDriver) -> Iterator[Link]:
    """Find the links between the GPUs that this process sees, by asking the driver."""
    uuids = [driver.uuid(i) for i in range(driver.device_count)]
    for i, source in enumerate(uuids):
        for j, target in enumerate(uuids):
            kind: LinkKind = "same" if i == j else "none"
            if i != j and driver.can_access(i, j):
                # Peer atomics exist over NVLink, not over PCIe on the hosts that we know.
                kind = "nvlink" if driver.peer_attribute("NATIVE_ATOMIC_SUPPORTED", i, j) else "pcie"
            yield Link(source, target, kind, "driver")
