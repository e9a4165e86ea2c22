"""The CUDA slab layer on a machine with a GPU: two processes, bytes, errors, times, free memory. Under a minute."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from gpu_pool import Place
from slab_child import MIB, Child, milliseconds, pattern

from vcache.errors import VCacheError
from vcache.segment.backing import MappedSlab
from vcache.segment.cuda import CudaBacking, PageLock, gpu_uuid
from vcache.segment.cuda_driver import CudaDriver

pytestmark = [pytest.mark.gpu, pytest.mark.processes]


def environment() -> dict[str, Any]:
    driver = CudaDriver()
    backing = CudaBacking()
    return {
        "python": sys.version.split()[0],
        "driver": driver.version(),
        "devices": [driver.uuid(i) for i in range(driver.device_count)],
        "name": backing.gpu.name,
        "granularity": backing.granularity,
        "free": backing.gpu.memory().free,
        "total": backing.gpu.memory().total,
        "fabric": driver.attribute(0, "HANDLE_TYPE_FABRIC_SUPPORTED"),
        "host_register": driver.attribute(0, "HOST_REGISTER_SUPPORTED"),
        "can_use_host_pointer": driver.attribute(0, "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"),
    }


def two_processes(**environment: str) -> dict[str, Any]:
    backing = CudaBacking()
    free = [backing.available_bytes()]
    create_ms, slab = milliseconds(lambda: backing.create(1024 * MIB))
    free.append(backing.available_bytes())
    zero = backing.read(slab, 0, MIB) == bytes(MIB)
    backing.write(slab, 256, pattern(MIB, 1))
    child = Child("import", **environment)
    child.send({"device": backing.device, "nbytes": slab.nbytes, "offset": 256}, (slab.fd,))
    answer, _ = child.receive()
    if "error" in answer:
        slab.retire()
        backing.release(slab)
        return answer | {"child": child.end()}
    sees_write = backing.read(slab, 4 * MIB, MIB) == pattern(MIB, 2)
    slab.retire()
    release_ms, _ = milliseconds(lambda: backing.release(slab))
    free.append(backing.available_bytes())
    child.send({})
    unmapped, _ = child.receive()
    free.append(backing.available_bytes())
    child.send({})
    code = child.end()
    assert zero, "a new slab is not zero"
    assert answer["same"], "the importer read other bytes"
    assert sees_write, "the owner does not see the importer's write"
    return (
        answer
        | unmapped
        | {
            "create_ms": create_ms,
            "release_ms": release_ms,
            "free_MiB_before_created_released_importerunmapped": [n // MIB for n in free],
            "child": code,
        }
    )


def sizes_refused() -> dict[str, Any]:
    backing = CudaBacking()
    slab = backing.create(64 * MIB)
    results: dict[str, Any] = {}
    for name, nbytes in (("same", 64 * MIB), ("double", 128 * MIB), ("half", 32 * MIB)):
        try:
            mapped = backing.map(slab.fd, nbytes)
            mapped.retire()
            backing.unmap(mapped)
            results[name] = "mapped"
        except VCacheError as error:
            results[name] = f"{type(error).__name__}: {error}"
    for name, nbytes in (("odd", 1000), ("too_much", 1 << 50)):
        try:
            backing.create(nbytes)
            results[name] = "created"
        except VCacheError as error:
            results[name] = f"{type(error).__name__}: {error}"
    file = os.memfd_create("not-vram")
    os.ftruncate(file, 64 * MIB)
    try:
        backing.map(file, 64 * MIB)
        results["memfd"] = "mapped"
    except VCacheError as error:
        results["memfd"] = f"{type(error).__name__}: {error}"
    os.close(file)
    slab.retire()
    backing.release(slab)
    return results


def owner_killed() -> dict[str, Any]:
    backing = CudaBacking()
    before = backing.available_bytes()
    child = Child("own")
    message, fds = child.receive()
    slab = backing.map(fds[0], message["nbytes"])
    os.close(fds[0])
    os.kill(child.process.pid, signal.SIGKILL)
    child.end()
    same = backing.read(slab, 0, MIB) == pattern(MIB, 1)
    held = backing.available_bytes()
    slab.retire()
    backing.unmap(slab)
    deadline = time.monotonic() + 10
    start = time.perf_counter()
    while (after := backing.available_bytes()) < before - 64 * MIB and time.monotonic() < deadline:
        time.sleep(0.001)
    assert same, "other bytes after the owner's death"
    took = round((time.perf_counter() - start) * 1e3, 1)
    return {"free_MiB": [before // MIB, held // MIB, after // MIB], "free_after_ms": took}


def grow_and_shrink() -> dict[str, Any]:
    backing = CudaBacking()
    slabs: list[Any] = []
    grow, _ = milliseconds(lambda: slabs.extend(backing.create(256 * MIB) for _ in range(16)))

    def shrink() -> None:
        for slab in slabs:
            slab.retire()
            backing.release(slab)

    taken, _ = milliseconds(shrink)
    return {"grow_16_x_256MiB_ms": grow, "shrink_ms": taken}


def host_slab() -> dict[str, Any]:
    backing, nbytes = CudaBacking(), 256 * MIB
    fd = os.memfd_create("slab")
    os.ftruncate(fd, nbytes)
    memory = mmap.mmap(fd, nbytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    slab = MappedSlab("host", "host", nbytes, address, buffer=memoryview(memory))
    pinning = PageLock()
    first, device_address = milliseconds(lambda: pinning.register(slab))
    again, same = milliseconds(lambda: pinning.register(slab))
    memory[0:MIB] = pattern(MIB, 1)
    seen = backing.gpu.read(device_address, MIB) == pattern(MIB, 1)
    vram = backing.create(nbytes)
    backing.write(vram, 0, pattern(MIB, 2))
    with backing.gpu.current():
        backing.gpu.driver.call("cuMemcpyDtoD", device_address, vram.address, MIB)
    landed = memory[0:MIB] == pattern(MIB, 2)
    vram.retire()
    backing.release(vram)
    undo, _ = milliseconds(lambda: pinning.unregister(slab))
    assert seen, "the GPU reads other bytes from the host slab"
    assert landed, "the GPU's bytes are not in the host slab"
    return {
        "register_256MiB_ms": first,
        "again_ms": again,
        "unregister_ms": undo,
        "same_pointer_as_host": device_address == address,
        "same": same == device_address,
    }


def with_torch() -> dict[str, Any]:
    import torch

    torch.cuda.init()
    backing = CudaBacking()
    slab = backing.create(256 * MIB)

    class View:
        __cuda_array_interface__ = {"shape": (256 * MIB,), "typestr": "|u1", "data": (slab.address, False), "version": 3}  # noqa: RUF012

    view = torch.as_tensor(View(), device="cuda")
    zero = int(view.count_nonzero()) == 0
    view[:MIB].fill_(7)
    torch.cuda.current_stream().synchronize()
    seen = backing.read(slab, 0, MIB) == b"\7" * MIB
    x = torch.ones(1024, device="cuda") * 2
    assert float(x.sum()) == 2048
    del view
    slab.retire()
    backing.release(slab)
    backing.close()
    assert float(x.sum()) == 2048, "torch lost its context"
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return {"zero": zero, "seen": seen, "torch_uuid": uuid, "our_uuid": gpu_uuid(), "same": gpu_uuid().endswith(uuid)}


def links() -> Any:
    from vcache.cli import doctor_gpu

    return {"checks": [str(c) for c in doctor_gpu.checks()], "links": [str(link) for link in doctor_gpu.links()]}


def mover() -> dict[str, Any]:
    """One small store and retrieve between a paged cache and another process's slabs, bytes checked, beside a plain copy."""
    import torch

    from vcache.bench.mover_runs import MoverRuns
    from vcache.bench.moves import RawCopies
    from vcache.bench.paged_data import LLAMA_8B, CacheArena, Slots, slab_size
    from vcache.bench.remote_slab import RemoteSlabs
    from vcache.config import TransferConfig
    from vcache.paged.select import mover_for

    nbytes, device = 256 * MIB, torch.device("cuda", 0)
    arena = CacheArena(LLAMA_8B, nbytes // LLAMA_8B.token_bytes, device)
    cache = arena.cache(16)
    found: dict[str, Any] = {}
    for kind in ("cuda", "host"):
        place = gpu_uuid() if kind == "cuda" else "host"
        with RemoteSlabs(kind, slab_size(LLAMA_8B, 8), 1, device=place, through=gpu_uuid()) as lent:
            runs = MoverRuns(arena, Slots(LLAMA_8B, lent.slabs), cache, mover_for(cache, TransferConfig()), 2)
            for result in runs.measure(nbytes, "blocks"):
                found[f"{kind} {result.operation} GB/s"] = round(result.device.gbps(nbytes), 1)
                found[f"{kind} {result.operation} call ms"] = round(result.call.median * 1e3, 3)
    for copy in RawCopies(nbytes, device, device).measure(nbytes, pageable=False):
        found[f"plain {copy.path} GB/s"] = round(copy.seconds.gbps(nbytes), 1)
    return found


SECTIONS: list[tuple[str, Callable[[], Any]]] = [
    ("environment", environment),
    ("two_processes", two_processes),
    ("two_processes_visible_by_uuid", lambda: two_processes(CUDA_VISIBLE_DEVICES=gpu_uuid())),
    ("two_processes_importer_sees_no_gpu", lambda: two_processes(CUDA_VISIBLE_DEVICES="")),
    ("sizes_refused", sizes_refused),
    ("owner_killed", owner_killed),
    ("grow_and_shrink", grow_and_shrink),
    ("host_slab", host_slab),
    ("with_torch", with_torch),
    ("doctor", links),
    ("mover", mover),
]


@pytest.mark.parametrize("name", [name for name, _ in SECTIONS])
def test_section(name: str, place: Place, record: object) -> None:
    if not place.on_gpu:
        pytest.skip("needs a CUDA GPU")
    found = dict(SECTIONS)[name]()
    record(section=name, found=found)  # type: ignore[operator]
    if name.endswith("sees_no_gpu"):
        assert "DeviceUnavailableError" in found["error"]
    if name == "sizes_refused":
        assert found["same"] == "mapped"
        for refused in ("double", "odd", "too_much", "memfd"):
            assert found[refused].startswith("SegmentError"), found
