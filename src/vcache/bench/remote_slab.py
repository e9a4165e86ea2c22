"""Slabs lent by another process, without a manager: what a transfer benchmark reads and writes.

`RemoteSlabs` starts `python -m vcache.bench.remote_slab`, which allocates, passes the file descriptors over an inherited
socket, and gives everything back when that socket closes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import SegmentError, VCacheError

if TYPE_CHECKING:
    from ..segment.backing import MappedSlab, SlabBacking

_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 20.0
_ANSWER_BYTES = 4096


def open_backing(kind: str, device: str, through: str = "") -> SlabBacking:
    """Backing for slabs of `kind` (`cuda` or `host`) on `device`, used by the GPU `through`."""
    if kind == "cuda":
        from ..segment.cuda import CudaBacking

        return CudaBacking(device, through=through)
    from ..segment.host import HostBacking

    if not through.startswith("GPU-"):
        return HostBacking()
    from ..segment.cuda import PageLock

    pinning = PageLock(through)
    return HostBacking(register=pinning.register, unregister=pinning.unregister)


class RemoteSlabs:
    """`count` slabs of `nbytes` in another process, mapped here. A context manager; unpinned use must end inside."""

    def __init__(self, kind: str, nbytes: int, count: int, *, device: str = "", through: str = "") -> None:
        """`device`: UUID of the GPU that lends (empty: the first visible; meaningless for `host`). `through`: UUID of the GPU
        of this process that reaches the slabs. Raises `SegmentError` with the other process's reason."""
        self.backing = open_backing(kind, device, through)
        self.slabs: list[MappedSlab] = []
        ours, theirs = socket.socketpair()
        self._socket = ours
        arguments = [str(theirs.fileno()), kind, device or "-", str(self.backing.physical_bytes(nbytes)), str(count)]
        command = [sys.executable, "-m", "vcache.bench.remote_slab", *arguments]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(_START_TIMEOUT)
        try:
            for _ in range(count):
                self._receive()
        except VCacheError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the lender."""
        return self._process.pid

    def _receive(self) -> None:
        answer, fds, _, _ = socket.recv_fds(self._socket, _ANSWER_BYTES, 1)
        try:
            if not fds:
                raise SegmentError(f"the lending process failed: {answer.decode() or 'it ended'}")
            self.slabs.append(self.backing.map(fds[0], int(answer)))
        finally:
            for fd in fds:
                os.close(fd)
        self._socket.sendall(b"\n")

    def close(self) -> None:
        """Unmap, and end the other process. Idempotent."""
        for slab in self.slabs:
            slab.retire()
            self.backing.unmap(slab)
        self.slabs.clear()
        self._socket.close()
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.backing.close()

    def __enter__(self) -> RemoteSlabs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lend(sock: socket.socket, kind: str, device: str, nbytes: int, count: int) -> None:
    """The other process: allocate, pass on, wait until the socket closes."""
    try:
        backing = open_backing(kind, device)
        slabs = []
        for _ in range(count):
            slab = backing.create(nbytes)
            slabs.append(slab)
            socket.send_fds(sock, [str(nbytes).encode()], [slab.fd])
            if not sock.recv(1):
                return
    except VCacheError as error:
        sock.sendall(str(error).encode()[:_ANSWER_BYTES])
        return
    sock.recv(1)
    for slab in slabs:
        slab.retire()
        backing.release(slab)
    backing.close()


def main(arguments: list[str]) -> None:
    descriptor, kind, device, nbytes, count = arguments
    with socket.socket(fileno=int(descriptor)) as sock:
        lend(sock, kind, "" if device == "-" else device, int(nbytes), int(count))


if __name__ == "__main__":
    main(sys.argv[1:])
