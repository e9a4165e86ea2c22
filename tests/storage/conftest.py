"""A real `mooncake_master` and memory lent to it, each a process of its own. Skipped, with a reason, elsewhere."""

from __future__ import annotations

import ctypes
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.cluster import Command, eventually

from vcache.storage.mooncake_master import MooncakeMaster
from vcache.storage.mooncake_options import MooncakeOptions, find_master, reachable


class Store:
    """A Mooncake store on a port of its own. Every process of it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.options = {"master": f"127.0.0.1:{probe.getsockname()[1]}", "buffer": "16MiB"}
        self.folder = folder
        self.parsed = MooncakeOptions.parse(self.options)
        self.masters: list[MooncakeMaster] = []
        self.donors: list[Command] = []

    @property
    def env(self) -> dict[str, str]:
        options = ", ".join(f'"{key}": "{value}"' for key, value in self.options.items())
        return {"VCACHE_STORAGE_OPTIONS": f"{{{options}}}", "VCACHE_SEGMENT_BROKER_DIR": str(self.folder)}

    def start_master(self) -> MooncakeMaster:
        flags = ["--default_kv_lease_ttl=200", "--client_ttl=2"]
        self.masters.append(MooncakeMaster(self.parsed, flags=flags, log=self.folder / "master.log"))
        return self.masters[-1]

    def lend(self, size: str = "64MiB") -> Command:
        self.donors.append(Command(self.folder, "lend", "--tier", "storage", "--size", size, env=self.env))
        self.donors[-1].wait_for("lending")
        return self.donors[-1]

    def close(self) -> None:
        for donor in self.donors:
            donor.kill()
        for master in self.masters:
            master.close()
        eventually(lambda: not reachable(self.parsed.address), what="the master is gone")


@pytest.fixture
def store() -> Iterator[Store]:
    """Nothing is started yet."""
    if find_spec("mooncake") is None or find_master() is None:
        pytest.skip("Mooncake is not installed: pip install 'vcache[mooncake]'")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        pytest.skip("libibverbs.so.1 is missing: apt install libibverbs1")
    made = Store(Path(tempfile.mkdtemp(prefix="vc-")))
    yield made
    made.close()
    shutil.rmtree(made.folder, ignore_errors=True)
