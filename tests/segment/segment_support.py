"""Helpers of the segment tests: polling, a stand-in for the manager, and child processes."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vcache.config import ByteSize, SegmentConfig
from vcache.errors import ManagerUnavailableError
from vcache.manager.api import Listener, Push, SessionInfo
from vcache.segment.slots import SegmentInfo, SlabInfo, SlabInventory
from vcache.worker import Worker

MiB = 2**20
CLIENT = bytes(range(16))


def eventually(condition: Callable[[], Any], timeout: float = 5.0) -> Any:
    """Poll until `condition` holds; fails the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.01)
    return value


def segment_config(folder: Path, size: int = 2 * MiB, slab: int = MiB, unmap_timeout: float = 2.0) -> SegmentConfig:
    return SegmentConfig(
        kind="host", size=ByteSize(size), slab_size=ByteSize(slab), broker_dir=str(folder), unmap_timeout=unmap_timeout
    )


class FakeManager:
    """The lender's view of a manager: remembers what it is told, can be away, drops the newest slabs."""

    def __init__(self, client_id: bytes = CLIENT) -> None:
        self.client_id = client_id
        self.away = False
        self.fail_next: list[Exception] = []
        self.listeners: list[Listener] = []
        self.session: SessionInfo | None = None
        self.gates: list[Any] = []
        self.left: list[Any] = []
        self.undone: list[Any] = []
        self.mounts: list[tuple[SegmentInfo, list[SlabInventory]]] = []
        self.slabs: dict[int, int] = {}
        self.gone: list[tuple[bytes, bytes]] = []
        self.wiped_tokens: list[int] = []
        self.unmounted: list[bytes] = []
        self.calls: list[str] = []
        self._epochs = itertools.count(2, 2)

    def start(self) -> None:
        self.away = False
        self.session = SessionInfo(epoch=next(self._epochs), heartbeat_interval=1.0, session_timeout=10.0)
        for listener in self.listeners:
            listener.on_session(self.session)

    def stop(self) -> None:
        self.away = True
        self.session = None
        for listener in self.listeners:
            listener.on_disconnect()

    def push(self, push: Push) -> None:
        for listener in self.listeners:
            listener.on_push(push)

    def subscribe(self, listener: Listener) -> None:
        self.listeners.append(listener)
        if self.session is not None:
            listener.on_session(self.session)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_next:
            raise self.fail_next.pop(0)
        if self.away or self.session is None:
            raise ManagerUnavailableError("the manager is away")

    def mount(self, info: SegmentInfo, inventory: Any = (), gate: Any = None) -> int:
        self._call("mount")
        self.mounts.append((info, list(inventory)))
        self.gates.append(gate)
        self.slabs = {slab.index: slab.nbytes for slab in info.slabs}
        return 1

    def writers_left(self, uuid: bytes, writers: Any, undone: Any = ()) -> None:
        self._call("writers_left")
        self.left.extend(writers)
        self.undone.extend(undone)

    def unmount(self, uuid: bytes) -> None:
        self._call("unmount")
        self.unmounted.append(uuid)

    def add_slabs(self, uuid: bytes, slabs: Any) -> None:
        self._call("add_slabs")
        self.slabs.update({slab.index: slab.nbytes for slab in slabs})

    def drop_slabs(self, uuid: bytes, nbytes: int) -> list[int]:
        self._call("drop_slabs")
        dropped: list[int] = []
        while self.slabs and nbytes > 0:
            index = max(self.slabs)
            nbytes -= self.slabs.pop(index)
            dropped.append(index)
        return dropped

    def importer_gone(self, uuid: bytes, client: bytes) -> None:
        self._call("importer_gone")
        self.gone.append((uuid, client))

    def wiped(self, token: int) -> None:
        self._call("wiped")
        self.wiped_tokens.append(token)


class Child(Worker):
    """A process with an object of `segment_child.py`."""

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.signal(signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)


@contextmanager
def children(*kinds: type) -> Iterator[list[Child]]:
    started = [Child(kind, timeout=15.0) for kind in kinds]
    try:
        yield started
    finally:
        for child in started:
            child.kill()


def shared_memory_bytes() -> int:
    """Shared memory in use on the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem in /proc/meminfo")


def mapped_slabs() -> int:
    """Slabs mapped in this process now."""
    return Path("/proc/self/maps").read_text().count("vcache-slab")


def info_of(uuid: bytes, broker: str, slabs: dict[int, int], *, host: str = "here", number: int = 1) -> SegmentInfo:
    return SegmentInfo(
        uuid=uuid,
        kind="host",
        host=host,
        device="host",
        broker=broker,
        owner=CLIENT,
        slabs=tuple(SlabInfo(index, nbytes) for index, nbytes in slabs.items()),
        number=number,
    )
