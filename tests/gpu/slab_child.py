"""Another process with a slab of VRAM: one that maps the slab it is sent, or one that lends a slab and waits to be killed.

File descriptors go over a socket, which `vcache.worker` has none of. Not a test.
"""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from vcache.errors import VCacheError
from vcache.segment.cuda import CudaBacking

MIB = 2**20
CHILD_TIMEOUT = 60


def pattern(nbytes: int, seed: int) -> bytes:
    import random

    return random.Random(seed).randbytes(nbytes)


def milliseconds(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return round((time.perf_counter() - start) * 1e3, 3), result


class Child:
    """This file in another process, one role per child; speaks JSON lines and passes file descriptors over a socket."""

    def __init__(self, role: str, **environment: str) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, role, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | environment)
        theirs.close()
        ours.settimeout(CHILD_TIMEOUT)
        self.socket = ours

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        send(self.socket, message, fds)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        return receive(self.socket)

    def end(self) -> int:
        self.socket.close()
        return self.process.wait(CHILD_TIMEOUT)


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode() + b"\n"], ancillary)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds = b"", []
    while not data.endswith(b"\n"):
        part, found, _, _ = socket.recv_fds(sock, 65536, 8)
        if not part:
            raise EOFError("the other process closed its end")
        data += part
        fds += found
    return json.loads(data), fds


def child_import(sock: socket.socket) -> None:
    """Map the slab that comes, say what its bytes are, change them, unmap."""
    message, fds = receive(sock)
    try:
        backing = CudaBacking(message["device"])
        took, slab = milliseconds(lambda: backing.map(fds[0], message["nbytes"]))
    except VCacheError as error:
        send(sock, {"error": f"{type(error).__name__}: {error}"})
        return
    finally:
        for fd in fds:
            os.close(fd)
    same = backing.read(slab, message["offset"], MIB) == pattern(MIB, 1)
    backing.write(slab, 4 * MIB, pattern(MIB, 2))
    send(sock, {"same": same, "map_ms": took, "visible": backing.gpu.driver.device_count, "through": backing.gpu.uuid})
    receive(sock)
    slab.retire()
    unmap_ms, _ = milliseconds(lambda: backing.unmap(slab))
    send(sock, {"unmap_ms": unmap_ms})
    receive(sock)


def child_own(sock: socket.socket) -> None:
    """Lend one slab, then wait to be killed."""
    backing = CudaBacking()
    slab = backing.create(1024 * MIB)
    backing.write(slab, 0, pattern(MIB, 1))
    send(sock, {"nbytes": slab.nbytes, "device": backing.device}, (slab.fd,))
    receive(sock)


def main() -> int:
    roles = {"import": child_import, "own": child_own}
    with socket.socket(fileno=int(sys.argv[2])) as sock:
        try:
            roles[sys.argv[1]](sock)
        except EOFError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
