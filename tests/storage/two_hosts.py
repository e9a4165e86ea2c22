"""Two hosts as two network namespaces, joined by two links: one for the manager and the store, one for reads of memory."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.cluster import eventually

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DATA_ADDRESSES = ("10.78.0.1", "10.78.0.2")
ENGINE = str(Path(__file__).with_name("netns_engine.py"))
DEADLINE = 2.0


class Hosts:
    """Names of two namespaces, and what runs in them."""

    def __init__(self) -> None:
        self.names = [f"vc{os.getpid()}{side}" for side in "ab"]
        self._links = {
            addresses: [f"{prefix}{os.getpid()}{side}" for side in "ab"]
            for prefix, addresses in (("ve", ADDRESSES), ("vf", DATA_ADDRESSES))
        }
        self.children: list[Host] = []

    def open(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for addresses, links in self._links.items():
            ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
            for name, link, address in zip(self.names, links, addresses, strict=True):
                ip("link", "set", link, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")

    def link(self, state: str, *, addresses: tuple[str, str] = ADDRESSES) -> None:
        """`up` or `down`."""
        ip("-n", self.names[0], "link", "set", self._links[addresses][0], state)

    def start(self, host: int, env: dict[str, str], *arguments: str, ready: str) -> Host:
        """Does not wait: `Host.wait_ready`."""
        everywhere = {
            "VCACHE_STORAGE_DEADLINE": f"{DEADLINE}",
            "VCACHE_CACHE_CHUNK_SIZE": "16",
            "VCACHE_SEGMENT_KIND": "host",
            "VCACHE_SEGMENT_SIZE": "256KiB",
            "VCACHE_SEGMENT_SLAB_SIZE": "64KiB",
            "VCACHE_HOST_ID": self.names[host],
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the object
        child = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            env={**os.environ, **everywhere, **env},
        )
        self.children.append(Host(child, errors, ready))
        return self.children[-1]

    def close(self) -> None:
        # Engines, the lenders, and last the manager, which ends its master.
        for child in reversed(self.children):
            child.end()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Host:
    """A process on one of them."""

    def __init__(self, child: subprocess.Popen[str], errors: Any, ready: str) -> None:
        self.child = child
        self._errors = errors
        self._ready = ready

    def wait_ready(self) -> Host:
        eventually(lambda: self._ready in self.line(), 60, what=self._ready)
        return self

    def line(self) -> str:
        assert self.child.stdout is not None
        assert select.select([self.child.stdout], [], [], 40)[0], f"no answer; {self.errors()}"
        line = self.child.stdout.readline()
        assert line, f"ended; {self.errors()}"
        return line

    def errors(self) -> str:
        self._errors.seek(0)
        text: str = self._errors.read()
        return text

    def begin(self, what: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(f"{what}\n")

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line())
        return found

    def ask(self, what: str) -> dict[str, Any]:
        self.begin(what)
        return self.answer()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)

    def end(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
