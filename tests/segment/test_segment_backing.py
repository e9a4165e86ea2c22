"""Host slabs: pins, sharing, seals, giving memory back, and what is said when memory cannot be had."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import pytest
from segment_support import MiB, eventually, mapped_slabs

from vcache.errors import SegmentError
from vcache.lender.slabs import slab_bytes
from vcache.segment.backing import MappedSlab, OwnedSlab
from vcache.segment.host import HostBacking
from vcache.segment.hostinfo import available_memory, host_id
from vcache.segment.shared import Fence
from vcache.segment.slots import slab_geometry


def release(backing: HostBacking, slab: OwnedSlab) -> None:
    slab.retire()
    backing.release(slab)


# -- pins -------------------------------------------------------------------------------------------------------------


def test_retired_slab_refuses_pins_and_calls_back_after_the_last_one() -> None:
    slab = MappedSlab("host", "host", 64, 4096)
    assert slab.pin()
    assert slab.pin()
    called: list[int] = []
    slab.retire(lambda: called.append(slab.pins))
    assert not slab.pin()
    slab.unpin()
    assert called == []
    slab.unpin()
    assert called == [0]
    slab.retire(lambda: called.append(-1))
    assert called == [0, -1]
    with pytest.raises(AssertionError, match="unpin"):
        slab.unpin()


def test_wait_idle_waits_for_a_pin_of_another_thread() -> None:
    slab = MappedSlab("host", "host", 64, 4096)
    assert slab.pin()
    assert not slab.wait_idle(0.05)
    timer = threading.Timer(0.1, slab.unpin)
    timer.start()
    assert slab.wait_idle(5)
    timer.join()


def test_pins_count_right_under_concurrency() -> None:
    slab = MappedSlab("host", "host", 64, 4096)
    idle = threading.Event()

    def use() -> None:
        while slab.pin():
            assert not idle.is_set()
            slab.unpin()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    slab.retire(idle.set)
    for thread in threads:
        thread.join(5)
    assert idle.wait(5)
    assert slab.pins == 0


# -- memory -----------------------------------------------------------------------------------------------------------


def test_importer_sees_the_owners_bytes_and_no_descriptor_is_kept() -> None:
    backing = HostBacking()
    before = len(os.listdir("/proc/self/fd"))
    slab = backing.create(MiB)
    mapped = backing.map(slab.fd, MiB)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert mapped.address != slab.address
    assert slab.buffer is not None
    assert mapped.buffer is not None
    assert (mapped.buffer.format, len(mapped.buffer)) == ("B", MiB)
    backing.write(slab, 100, b"hello")
    assert backing.read(mapped, 98, 9) == b"\0\0hello\0\0"
    mapped.buffer[MiB - 1] = 7
    assert ctypes.c_ubyte.from_address(slab.address + MiB - 1).value == 7
    backing.unmap(mapped)
    assert mapped.buffer is None
    assert mapped.address == 0
    backing.unmap(mapped)
    release(backing, slab)
    backing.release(slab)
    assert len(os.listdir("/proc/self/fd")) == before


def test_unmap_really_unmaps_and_a_view_kept_by_somebody_stays_harmless() -> None:
    backing = HostBacking()
    slab = backing.create(MiB)
    mapped = backing.map(slab.fd, MiB)
    count = mapped_slabs()
    view = mapped.buffer
    backing.unmap(mapped)
    assert mapped_slabs() == count
    assert view is not None
    assert view[0] == 0
    del view
    gc.collect()
    assert mapped_slabs() == count - 1
    release(backing, slab)
    assert mapped_slabs() == count - 2


def test_release_gives_memory_back_while_it_is_still_mapped() -> None:
    backing = HostBacking()
    slab = backing.create(8 * MiB)
    observer = os.dup(slab.fd)
    mapped = backing.map(slab.fd, 8 * MiB)
    assert slab.buffer is not None
    assert mapped.buffer is not None
    slab.buffer[:] = b"\xff" * (8 * MiB)
    assert mapped.buffer[5] == 255
    assert os.fstat(observer).st_blocks * 512 >= 8 * MiB
    release(backing, slab)
    assert os.fstat(observer).st_blocks == 0
    assert bytes(mapped.buffer) == bytes(8 * MiB)
    backing.unmap(mapped)
    os.close(observer)


def test_nobody_can_resize_a_slab() -> None:
    backing = HostBacking()
    slab = backing.create(MiB)
    for size in (0, 2 * MiB):
        with pytest.raises(PermissionError):
            os.ftruncate(slab.fd, size)
    release(backing, slab)


def test_importer_refuses_what_could_crash_it(tmp_path: Path) -> None:
    backing = HostBacking()
    slab = backing.create(MiB)
    with pytest.raises(SegmentError, match="holds 1048576 bytes instead of 2097152"):
        backing.map(slab.fd, 2 * MiB)
    release(backing, slab)
    unsealed = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, MiB)
    with pytest.raises(SegmentError, match="could still be resized"):
        backing.map(unsealed, MiB)
    os.close(unsealed)
    with (tmp_path / "file").open("wb") as file, pytest.raises(SegmentError, match="not a memfd"):
        backing.map(file.fileno(), MiB)


def test_prefault_allocates_at_once_and_lazy_does_not() -> None:
    for prefault, allocated in ((False, 0), (True, 4 * MiB)):
        backing = HostBacking(prefault=prefault)
        slab = backing.create(4 * MiB)
        assert os.fstat(slab.fd).st_blocks * 512 == allocated
        release(backing, slab)


def test_untouched_slabs_count_as_used() -> None:
    backing = HostBacking()
    before = backing.available_bytes()
    slab = backing.create(512 * MiB)
    assert backing.available_bytes() < before - 256 * MiB
    release(backing, slab)


@pytest.mark.parametrize("size", [0, -4096, 4097])
def test_sizes_that_are_no_multiple_of_a_page(size: int) -> None:
    with pytest.raises(SegmentError, match="positive multiple of"):
        HostBacking().create(size)


def test_absurd_size_is_one_clear_line_and_leaves_nothing_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentError, match=r"cannot get 1125899906842624 bytes, only \d+ are available") as caught:
        HostBacking().create(2**50)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_system_failure_is_one_clear_line_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentError, match="cannot get 1048576 bytes: No space left on device"):
        HostBacking(prefault=True).create(MiB)
    assert len(os.listdir("/proc/self/fd")) == before


def test_access_outside_a_slab_is_an_error() -> None:
    backing = HostBacking()
    slab = backing.create(4096)
    for offset, size in ((-1, 1), (4096, 1), (0, 4097), (5000, 0)):
        with pytest.raises(SegmentError, match="not inside"):
            backing.read(slab, offset, size)
    with pytest.raises(SegmentError, match="not inside"):
        backing.write(slab, 4095, b"ab")
    release(backing, slab)
    with pytest.raises(SegmentError, match="not mapped"):
        backing.read(slab, 0, 1)


def test_gpu_hooks_see_every_slab_once() -> None:
    events: list[tuple[str, int]] = []

    def register(slab: MappedSlab) -> int:
        assert slab.buffer is not None
        events.append(("register", slab.address))
        return slab.address + 1

    backing = HostBacking(register=register, unregister=lambda slab: events.append(("unregister", slab.address)))
    slab = backing.create(4096)
    mapped = backing.map(slab.fd, 4096)
    addresses = slab.address, mapped.address
    assert (slab.device_address, mapped.device_address) == (addresses[0] + 1, addresses[1] + 1)
    backing.unmap(mapped)
    release(backing, slab)
    assert events == [
        ("register", addresses[0]),
        ("register", addresses[1]),
        ("unregister", addresses[1]),
        ("unregister", addresses[0]),
    ]


def test_failing_gpu_hook_leaves_nothing_behind() -> None:
    def register(slab: MappedSlab) -> int:
        raise SegmentError("cannot pin")

    before, count = len(os.listdir("/proc/self/fd")), mapped_slabs()
    with pytest.raises(SegmentError, match="cannot pin"):
        HostBacking(register=register).create(4096)
    assert (len(os.listdir("/proc/self/fd")), mapped_slabs()) == (before, count)


def test_concurrent_creation_and_release() -> None:
    backing = HostBacking()
    count = mapped_slabs()

    def churn() -> None:
        for _ in range(50):
            slab = backing.create(8192)
            backing.write(slab, 0, b"x")
            release(backing, slab)

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert mapped_slabs() == count


def test_fence_is_reusable() -> None:
    fence = Fence()
    fence()
    fence()
    assert not fence._lock.locked(), "the next one would wait for ever"


@pytest.mark.parametrize(
    ("payload", "slot"), [(256 * MiB, 32 * MiB), (256 * MiB, 16 * 1024), (MiB, 64 * 1024), (64 * 1024, 16 * 1024), (2**30, MiB)]
)
def test_slab_has_room_for_headers(payload: int, slot: int) -> None:
    size = slab_bytes(payload, 4096)
    assert slab_geometry(size, slot).slots >= payload // slot
    assert size - payload <= max(payload // 100, 4096)


# -- host -------------------------------------------------------------------------------------------------------------


def test_host_id_is_stable() -> None:
    assert host_id() == host_id()
    assert len(host_id()) == 36


def test_available_memory_of_this_machine() -> None:
    assert 0 < available_memory().nbytes < 2**50


def fake_system(folder: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return proc, groups


def test_container_limit_version_2(tmp_path: Path) -> None:
    files = {
        "memory.max": "5000000",
        "memory.current": "4000000",
        "memory.stat": "anon 1\ninactive_file 500000\n",
        "app/memory.max": "max",
        "app/memory.current": "1",
        "app/memory.stat": "",
    }
    found = available_memory(*fake_system(tmp_path, "0::/app\n", files))
    assert (found.nbytes, "cgroup" in found.limit) == (1500000, True)


def test_container_limit_version_1(tmp_path: Path) -> None:
    files = {
        "memory/app/memory.limit_in_bytes": "3000000",
        "memory/app/memory.usage_in_bytes": "1000000",
        "memory/app/memory.stat": "total_inactive_file 5\n",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "memory/memory.usage_in_bytes": "1",
        "memory/memory.stat": "",
    }
    found = available_memory(*fake_system(tmp_path, "5:cpu,memory:/app\n0::/\n", files))
    assert (found.nbytes, "cgroup" in found.limit) == (2000005, True)


def test_no_container_limit(tmp_path: Path) -> None:
    found = available_memory(*fake_system(tmp_path, "0::/not/visible\n", {}))
    assert (found.nbytes, "cgroup" in found.limit) == (8000 * 1024, False)


def test_slab_memory_counts_as_shared_memory_only_when_touched() -> None:
    backing = HostBacking()
    slab = backing.create(16 * MiB)
    assert os.fstat(slab.fd).st_blocks == 0
    ctypes.memset(slab.address, 1, 16 * MiB)
    assert os.fstat(slab.fd).st_blocks * 512 == 16 * MiB
    observer = os.dup(slab.fd)
    release(backing, slab)
    assert eventually(lambda: os.fstat(observer).st_blocks == 0)
    os.close(observer)
