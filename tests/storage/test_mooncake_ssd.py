"""An SSD below the memory that a host lends to the store: what memory evicts comes back from disk, also after deaths."""

from __future__ import annotations

import mmap
import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.cluster import eventually
from support.commands import invoke

from vcache.errors import StorageError
from vcache.keys import CacheKey
from vcache.storage.mooncake import MooncakeStorage
from vcache.storage.ssd import Ssd

if TYPE_CHECKING:
    from conftest import Store

pytestmark = pytest.mark.processes
MIB = 2**20


def value(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


def key(number: int) -> CacheKey:
    return CacheKey(bytes(16), number.to_bytes(16, "little"))


def readable(tier: MooncakeStorage, numbers: range) -> int:
    """How many are found; each must be byte-equal."""
    buffer, found = memoryview(mmap.mmap(-1, MIB)), 0
    for number in numbers:
        try:
            got = tier.get([key(number)], 0, [buffer])[0]
        except StorageError:
            return 0  # the master is away for a moment
        if got >= 0:
            assert got == MIB
            assert bytes(buffer) == value(number), "wrong bytes"
            found += 1
    return found


@pytest.mark.slow
def test_what_memory_evicts_comes_back_from_disk(store: Store) -> None:
    master = store.start_master(ssd=True)
    ssd = ("--ssd", str(store.folder / "ssd"), "--ssd-size", "256MiB")
    lender = store.lend("32MiB", *ssd)
    assert "and 256MiB of" in lender.log.read_text()
    tier = MooncakeStorage(store.options)
    buffer, numbers = memoryview(mmap.mmap(-1, MIB)), range(96)
    for number in numbers:
        buffer[:] = value(number)
        assert tier.put([key(number)], 0, [buffer]) == [True], "waits for room while memory goes to disk"
    assert tier.prefix([key(number) for number in numbers], 0) == 96
    assert readable(tier, numbers) == 96, "three times what memory holds"
    assert list((store.folder / "ssd").rglob("*.bucket"))
    # The owner dies: misses, and no error. It comes back with what was on disk.
    lender.signal(signal.SIGKILL)
    lender.process.wait(10)
    assert readable(tier, range(0, 96, 16)) == 0
    store.lend("32MiB", *ssd)
    eventually(lambda: readable(tier, numbers) >= 48, 30, what="values from disk after the lender's death")
    # A new master asks the lenders what their disks hold.
    assert master.pid is not None
    os.kill(master.pid, signal.SIGKILL)
    eventually(lambda: readable(tier, numbers) >= 48, 40, what="values from disk after the master's death")
    tier.close()


def test_a_folder_that_cannot_be_used_is_one_clear_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in store.env.items():
        monkeypatch.setenv(name, setting)
    lend = ("lend", "--tier", "storage", "--size", "16MiB")

    def refused(code: int, text: str, *more: str) -> None:
        result = invoke(*lend, *more)
        assert (result.exit_code, result.output.count("\n")) == (code, 1), result.output
        assert text in result.output

    free = os.statvfs(store.folder)
    too_much = str(free.f_blocks * free.f_frsize)
    refused(1, "can be used there, --ssd-size asks for", "--ssd", str(store.folder), "--ssd-size", too_much)
    refused(1, "cannot write there", "--ssd", "/proc/here", "--ssd-size", "64MiB")
    refused(2, "must be 64MiB or more", "--ssd", str(store.folder), "--ssd-size", "1MiB")
    assert "go together" in invoke(*lend, "--ssd", str(store.folder)).output
    assert "only with --tier storage" in invoke("lend", "--ssd", str(store.folder), "--ssd-size", "1GiB").output
    assert "only with --with-mooncake" in invoke("serve", "--mooncake-ssd").output
    held = Ssd(store.folder / "shared", 64 * MIB).open()
    refused(1, "another lender uses this folder", "--ssd", str(store.folder / "shared"), "--ssd-size", "64MiB")
    os.close(held)
    store.start_master()  # one that takes no SSDs
    lender = (*lend, "--ssd", str(store.folder / "shared"), "--ssd-size", "64MiB")
    result = run_to_the_end(store.folder, *lender)
    assert sum(line.startswith("error: ") for line in result.splitlines()) == 1
    assert "takes no SSDs; start it with: vcache serve --with-mooncake --mooncake-ssd" in result


def run_to_the_end(folder: Path, *arguments: str) -> str:
    """In a process of its own, because Mooncake's `setup` leaves threads behind; what it printed."""
    from support.cluster import Command

    command = Command(folder, *arguments)
    assert command.process.wait(60) == 1
    return command.log.read_text()
