"""CUDA slabs against a driver made of memfds: what is asked of the driver, what an error says, and that nothing leaks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from fake_driver import GRANULARITY, FakeDriver

from vcache.cli import doctor_gpu
from vcache.errors import DeviceUnavailableError, SegmentError
from vcache.segment.backing import MappedSlab, SlabBacking
from vcache.segment.cuda import CudaBacking, PageLock
from vcache.segment.cuda_driver import CudaCallError, CudaDriver
from vcache.segment.host import HostBacking

real = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

ONE = bytes(range(16))
OTHER = bytes(range(100, 116))
ONE_NAME = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
OTHER_NAME = "GPU-64656667-6869-6a6b-6c6d-6e6f70717273"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_slab_is_zero_shared_and_returned(fake: FakeDriver, backing: CudaBacking) -> None:
    before = open_fds()
    free = backing.available_bytes()
    slab = backing.create(2 * GRANULARITY)
    assert (slab.kind, slab.device, slab.device_address) == ("cuda", ONE_NAME, slab.address)
    assert not any(backing.read(slab, 0, 2 * GRANULARITY))
    assert not os.get_inheritable(slab.fd)

    mapped = backing.map(slab.fd, slab.nbytes)
    backing.write(mapped, 4096, b"header")
    assert backing.read(slab, 4095, 8) == b"\0header\0"

    for each in (slab, mapped):
        each.retire()
    backing.unmap(mapped)
    backing.release(slab)
    backing.unmap(mapped)
    backing.release(slab)
    assert backing.available_bytes() == free
    assert not fake.handles
    assert not fake.reserved
    assert open_fds() == before
    assert not fake.contexts, "the caller's context was not restored"


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemAddressReserve", "cuMemMap"])
@pytest.mark.parametrize("code", ["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_UNKNOWN"])
def test_a_failed_creation_leaves_nothing_behind(fake: FakeDriver, backing: CudaBacking, call: str, code: str) -> None:
    before = open_fds()
    fake.failures[call] = code
    with pytest.raises(SegmentError, match=f"{call}: {code}") as caught:
        backing.create(GRANULARITY)
    assert "\n" not in str(caught.value)
    assert not fake.handles
    assert not fake.reserved
    assert open_fds() == before


@pytest.mark.parametrize("call", ["cuMemSetAccess", "cuMemsetD8Async", "cuStreamSynchronize"])
def test_a_failure_after_mapping_leaves_nothing_behind(fake: FakeDriver, backing: CudaBacking, call: str) -> None:
    before = open_fds()
    fake.failures[call] = "CUDA_ERROR_INVALID_DEVICE"
    with pytest.raises(SegmentError, match=call):
        backing.create(GRANULARITY)
    assert not fake.mapped
    assert not fake.reserved
    assert not fake.handles
    assert open_fds() == before


def test_asks_for_free_memory_first_and_says_what_there_is(fake: FakeDriver, backing: CudaBacking) -> None:
    fake.failures["cuMemCreate"] = "CUDA_ERROR_UNKNOWN"
    with pytest.raises(SegmentError, match=r"slab of 2.00 GiB: 1.00 of 1.00 GiB are free; lend less"):
        backing.create(2**31)


def test_sizes_are_multiples_of_the_granularity(backing: CudaBacking) -> None:
    assert backing.physical_bytes(1) == GRANULARITY
    with pytest.raises(SegmentError, match=f"must be a multiple of {GRANULARITY}"):
        backing.create(GRANULARITY + 4096)


def test_another_size_than_announced_is_refused(fake: FakeDriver, backing: CudaBacking) -> None:
    slab = backing.create(GRANULARITY)
    with pytest.raises(SegmentError, match="not the slab that was announced"):
        backing.map(slab.fd, 2 * GRANULARITY)
    assert len(fake.mapped) == 1
    assert not fake.handles


def test_memory_of_an_invisible_gpu_is_mapped_for_the_own_one() -> None:
    lender = FakeDriver(real, (OTHER,))
    slab = CudaBacking(driver=CudaDriver(lender)).create(GRANULARITY)
    reader = FakeDriver(real, (ONE,))
    backing = CudaBacking(OTHER_NAME, driver=CudaDriver(reader))
    mapped = backing.map(slab.fd, slab.nbytes)
    assert mapped.device == OTHER_NAME
    assert reader.allowed[mapped.address] == {0}
    assert backing.available_bytes() == 0
    with pytest.raises(SegmentError, match="not visible"):
        backing.create(GRANULARITY)
    reader.failures["cuMemSetAccess"] = "CUDA_ERROR_INVALID_DEVICE"
    with pytest.raises(SegmentError, match=r"no direct link .*cuMemSetAccess"):
        backing.map(slab.fd, slab.nbytes)
    assert len(reader.reserved) == 1


def test_two_visible_gpus_need_peer_access() -> None:
    fake = FakeDriver(real, (ONE, OTHER), peers=False)
    assert CudaBacking(OTHER_NAME, driver=CudaDriver(fake)).gpu.ordinal == 1
    held = fake.retained
    with pytest.raises(DeviceUnavailableError, match="no NVLink or PCIe peer access"):
        CudaBacking(OTHER_NAME, through=ONE_NAME, driver=CudaDriver(fake))
    assert fake.retained == held
    fake.peers = True
    backing = CudaBacking(OTHER_NAME, through=ONE_NAME, driver=CudaDriver(fake))
    assert (backing.device, backing.gpu.ordinal) == (OTHER_NAME, 0)


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "virtual memory"),
        ("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED", "file descriptor"),
    ],
)
def test_refuses_with_a_reason(fake: FakeDriver, attribute: str, text: str) -> None:
    fake.missing.add(attribute)
    with pytest.raises(DeviceUnavailableError, match=f"lacks .*{text}"):
        CudaBacking(driver=CudaDriver(fake))
    assert fake.retained == 0
    assert fake.streams == 0


def test_unknown_and_absent_gpus(fake: FakeDriver) -> None:
    with pytest.raises(DeviceUnavailableError, match="GPU-nope is not visible"):
        CudaBacking(through="GPU-nope", driver=CudaDriver(fake))
    with pytest.raises(DeviceUnavailableError, match="CUDA_VISIBLE_DEVICES"):
        CudaDriver(FakeDriver(real, ()))
    fake.failures["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    with pytest.raises(DeviceUnavailableError, match="cuInit: CUDA_ERROR_NO_DEVICE"):
        CudaDriver(fake)


def test_long_reads_and_writes_go_in_pieces(backing: CudaBacking) -> None:
    slab = backing.create(6 * GRANULARITY)
    data = bytes(range(251)) * (6 * GRANULARITY // 251 - 1)
    backing.write(slab, 100, data)
    assert backing.read(slab, 100, len(data)) == data
    assert backing.read(slab, 0, 100) == bytes(100)
    assert backing.read(slab, 7, 0) == b""


def test_reads_and_writes_stay_inside(backing: CudaBacking) -> None:
    slab = backing.create(GRANULARITY)
    for offset, nbytes in ((-1, 4), (GRANULARITY - 3, 4), (2 * GRANULARITY, 1)):
        with pytest.raises(SegmentError, match="outside"):
            backing.read(slab, offset, nbytes)
        with pytest.raises(SegmentError, match="outside"):
            backing.write(slab, offset, bytes(nbytes))
    slab.retire()
    backing.release(slab)
    with pytest.raises(SegmentError, match="not mapped any more"):
        backing.read(slab, 0, 4)


def test_the_callers_context_survives_errors(fake: FakeDriver, backing: CudaBacking) -> None:
    fake.contexts.append(77)
    fake.failures["cuMemsetD8Async"] = "CUDA_ERROR_UNKNOWN"
    with pytest.raises(SegmentError):
        backing.create(GRANULARITY)
    assert fake.contexts == [77]


def test_close_gives_everything_back(fake: FakeDriver, backing: CudaBacking) -> None:
    slab = backing.create(GRANULARITY)
    backing.read(slab, 0, 1)
    assert len(fake.pinned) == 1
    slab.retire()
    backing.release(slab)
    backing.close()
    backing.close()
    assert (fake.retained, fake.streams, fake.pinned) == (0, 0, {})
    with pytest.raises(DeviceUnavailableError, match="already closed"):
        backing.available_bytes()


def test_host_slabs_are_registered_once(fake: FakeDriver) -> None:
    pinning = PageLock(driver=CudaDriver(fake))
    slab = MappedSlab("host", "host", 4096, 2**30)
    assert pinning.register(slab) == slab.device_address == 2**30 + 2**40
    assert pinning.register(slab) == slab.device_address
    pinning.unregister(slab)
    pinning.unregister(slab)
    assert not fake.registered
    assert slab.device_address == 0
    fake.failures["cuMemHostGetDevicePointer"] = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(SegmentError, match="cuMemHostGetDevicePointer"):
        pinning.register(slab)
    assert not fake.registered


def host_backing(pinning: PageLock) -> HostBacking:
    return HostBacking(register=pinning.register, unregister=pinning.unregister)


def mapped_addresses() -> set[int]:
    """Where this process has host slabs mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.partition("-")[0], 16) for line in lines if "vcache-slab" in line}


def test_registered_memory_stays_mapped_until_it_is_unregistered(fake: FakeDriver) -> None:
    """A slab that was dropped without being released was unmapped while the driver still had it registered; the next slab
    that came to lie there was refused: CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED."""
    pinning = PageLock(driver=CudaDriver(fake))
    owner, importer = HostBacking(), host_backing(pinning)
    slab = owner.create(4096)
    for _ in range(3):
        importer.map(slab.fd, slab.nbytes)  # and dropped
        gc.collect()
        assert fake.registered <= mapped_addresses()
    assert len(fake.registered) == 3
    del pinning, importer
    gc.collect()
    assert not fake.registered
    assert fake.retained == 0
    assert mapped_addresses() == {slab.address}
    slab.retire()
    owner.release(slab)


def test_a_driver_that_refuses_to_unregister_costs_memory_and_nothing_else(fake: FakeDriver) -> None:
    """The slab's descriptor and pages were kept for good, and its memory went as soon as the slab was dropped, registered as
    it was."""
    before = open_fds()
    pinning = PageLock(driver=CudaDriver(fake))
    backing = host_backing(pinning)
    slab = backing.create(4096)
    address, observer = slab.address, os.dup(slab.fd)
    backing.write(slab, 0, b"bytes")
    fake.failures["cuMemHostUnregister"] = "CUDA_ERROR_UNKNOWN"
    slab.retire()
    with pytest.raises(SegmentError, match="cuMemHostUnregister"):
        backing.release(slab)
    del slab
    assert os.fstat(observer).st_blocks == 0
    os.close(observer)
    assert open_fds() == before
    assert address in mapped_addresses()


def test_a_forked_child_unregisters_nothing(fake: FakeDriver) -> None:
    """The child's copies are dropped, too, but CUDA cannot be called there."""
    pinning = PageLock(driver=CudaDriver(fake))
    backing = host_backing(pinning)
    backing.create(4096)
    child = os.fork()
    if not child:
        fake.failures["cuMemHostUnregister"] = "CUDA_ERROR_NOT_INITIALIZED"
        del pinning, backing
        os._exit(0 if fake.retained else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["cuda", "host"])
def test_slabs_that_a_transfer_still_uses_outlive_close(fake: FakeDriver, kind: str) -> None:
    """Closing waits for transfers, but not for ever. What was unmapped or unregistered after it failed, the context being
    gone: VRAM and descriptors were never given back, and host memory was unmapped while it was registered."""
    before = open_fds()
    if kind == "cuda":
        backing: SlabBacking = CudaBacking(driver=CudaDriver(fake))
        gpu_user: CudaBacking | PageLock = backing  # type: ignore[assignment]
    else:
        gpu_user = PageLock(driver=CudaDriver(fake))
        backing = host_backing(gpu_user)
    slab = backing.create(GRANULARITY)
    gpu_user.close()
    assert fake.retained == 1
    with pytest.raises(DeviceUnavailableError, match="already closed"):
        backing.create(GRANULARITY)
    slab.retire()
    backing.release(slab)
    assert not fake.registered
    assert not fake.mapped
    assert (fake.retained, fake.streams) == (0, 0)
    assert open_fds() == before
    gpu_user.close()


def test_a_call_error_names_call_and_code(fake: FakeDriver) -> None:
    driver = CudaDriver(fake)
    fake.failures["cuDriverGetVersion"] = "CUDA_ERROR_DEINITIALIZED"
    with pytest.raises(CudaCallError) as caught:
        driver.version()
    assert str(caught.value) == "cuDriverGetVersion: CUDA_ERROR_DEINITIALIZED"
    assert (caught.value.call, caught.value.code) == ("cuDriverGetVersion", "CUDA_ERROR_DEINITIALIZED")


def test_link_table() -> None:
    link = doctor_gpu.Link
    matrix = [
        link("GPU-aaaaaaaa-1", "GPU-aaaaaaaa-1", "same", "nvml"),
        link("GPU-aaaaaaaa-1", "GPU-bbbbbbbb-2", "nvlink", "nvml"),
        link("GPU-bbbbbbbb-2", "GPU-aaaaaaaa-1", "pcie", "nvml"),
        link("GPU-bbbbbbbb-2", "GPU-bbbbbbbb-2", "same", "nvml"),
    ]
    assert doctor_gpu.link_table(matrix)[1:] == [["GPU-aaaaaaaa", "same", "nvlink"], ["GPU-bbbbbbbb", "pcie", "same"]]
    assert doctor_gpu.link_table([]) == [["from \\ to"]]


def test_doctor_lists_links_from_the_driver() -> None:
    fake = FakeDriver(real, (ONE, OTHER))
    kinds = [link.kind for link in doctor_gpu.driver_links(CudaDriver(fake))]
    assert kinds == ["same", "nvlink", "nvlink", "same"]
    fake.peers = False
    assert [link.kind for link in doctor_gpu.driver_links(CudaDriver(fake))] == ["same", "none", "none", "same"]
