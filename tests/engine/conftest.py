"""A small cluster of real processes: one manager, one lender of host memory, engines on demand."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.cluster import Command, EngineProcess

from vcache import KVCacheSpec

CHUNK = 16


class Cluster:
    """Starts and ends processes. `address` stays the same over manager restarts."""

    def __init__(self, folder: Path, **manager: Any) -> None:
        self.folder = folder
        self.address = f"unix://{folder}/manager.sock"
        self._manager = {"session_timeout": 2.0, "heartbeat_interval": 0.2, "ticket_ttl": 1.0, "quarantine": 0.3, **manager}
        self._commands: list[Command] = []
        self._engines: list[EngineProcess] = []

    @property
    def env(self) -> dict[str, str]:
        settings = {**self._manager, "address": self.address}
        return {f"VCACHE_MANAGER_{key.upper()}": str(value) for key, value in settings.items()} | {
            "VCACHE_SEGMENT_BROKER_DIR": str(self.folder)
        }

    def serve(self) -> Command:
        command = Command(self.folder, "serve", env=self.env)
        self._commands.append(command)
        command.wait_for("ready")
        return command

    def lend(self, size: str = "4MiB", slab: str = "512KiB") -> Command:
        command = Command(self.folder, "lend", "--kind", "host", "--size", size, "--slab-size", slab, env=self.env)
        self._commands.append(command)
        command.wait_for("lending")
        return command

    def engine(self, spec: KVCacheSpec, *, kind: type | None = None, **sections: Any) -> EngineProcess:
        """`kind`: see `EngineProcess`."""
        config: dict[str, Any] = {
            "manager": {**self._manager, "address": self.address},
            "segment": {"lend": False, "kind": "host", "broker_dir": str(self.folder)},
            "cache": {"chunk_size": CHUNK},
        }
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        engine = EngineProcess(config, msgspec.to_builtins(spec), kind)
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self._engines:
            engine.kill()
        for command in self._commands:
            command.kill()


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(**manager: Any) -> Cluster:
        # Not tmp_path: a unix socket's path must stay short.
        made.append(Cluster(Path(tempfile.mkdtemp(prefix="vc-")), **manager))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = make_cluster()
    cluster.serve()
    return cluster
