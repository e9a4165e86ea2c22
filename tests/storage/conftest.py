"""A real `mooncake_master` and memory lent to it, each a process of its own. Skipped, with a reason, elsewhere."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import Command, eventually, free_port
from support.mooncake import need_mooncake

from vcache.storage.mooncake_master import MooncakeMaster
from vcache.storage.mooncake_options import MooncakeOptions, find_master, reachable


class Store:
    """A Mooncake store on a port of its own. Every process of it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.options = {"master": f"127.0.0.1:{free_port()}", "buffer": "16MiB"}
        """May be changed before anything is started."""
        self.folder = folder
        self.masters: list[MooncakeMaster] = []
        self.donors: list[Command] = []

    @property
    def parsed(self) -> MooncakeOptions:
        return MooncakeOptions.parse(self.options)

    @property
    def env(self) -> dict[str, str]:
        options = ", ".join(f'"{key}": "{value}"' for key, value in self.options.items())
        return {"VCACHE_STORAGE_OPTIONS": f"{{{options}}}", "VCACHE_SEGMENT_BROKER_DIR": str(self.folder)}

    def start_master(self, *, ssd: bool = False) -> MooncakeMaster:
        flags = ["--default_kv_lease_ttl=200", "--client_ttl=2"]
        self.masters.append(MooncakeMaster(self.parsed, flags=flags, ssd=ssd, log=self.folder / "master.log"))
        return self.masters[-1]

    def kill_master(self) -> None:
        """SIGKILL, and nobody starts a new one."""
        self.masters.pop().kill()

    def lend(self, size: str = "64MiB", *more: str) -> Command:
        self.donors.append(Command(self.folder, "lend-storage", "--size", size, *more, env=self.env))
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
    need_mooncake("store")
    if find_master() is None:
        pytest.skip("mooncake_master is not installed: pip install 'vcache[mooncake]'")
    made = Store(Path(tempfile.mkdtemp(prefix="vc-")))
    yield made
    made.close()
    shutil.rmtree(made.folder, ignore_errors=True)
