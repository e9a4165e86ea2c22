"""`run_server` as a process: signals, a second manager, and the Prometheus endpoint."""

from __future__ import annotations

import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from manager_helpers import ServerProcess, config, keys, segment_of, serving, store

from vcache.errors import AddressInUseError
from vcache.manager.client import Manager
from vcache.manager.server.exporter import Exporter
from vcache.manager.socket_transport import SocketTransport

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_cleanly_with_clients_connected(tmp_path: Path, number: int) -> None:
    server = ServerProcess(config(f"unix://{tmp_path}/m.sock"))
    try:
        client = Manager(SocketTransport(config(server.address)))
        assert client.wait_connected(5)
        status, errors = server.stop(number)
        assert (status, errors) == (0, "")
        assert list(tmp_path.iterdir()) == []
        client.close()
    finally:
        server.kill()


def test_second_process_on_one_address_says_so(tmp_path: Path) -> None:
    server = ServerProcess(config(f"unix://{tmp_path}/m.sock"))
    try:
        with pytest.raises(AssertionError, match=r"AddressInUseError: unix://.*another manager serves this address"):
            ServerProcess(config(server.address))
        server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(AssertionError, match="AddressInUseError"):
            ServerProcess(config(server.address))
    finally:
        server.kill()


def test_process_does_not_import_torch_or_numpy(tmp_path: Path) -> None:
    server = ServerProcess(config(f"unix://{tmp_path}/m.sock"))
    try:
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "torch" not in maps
        assert "numpy" not in maps
    finally:
        server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_metrics_endpoint(tmp_path: Path) -> None:
    port = free_port()
    with serving(f"unix://{tmp_path}/m.sock", metrics_port=port) as server:
        client = server.client()
        client.mount(segment_of(client, slots=16))
        store(client, keys(1, 3))
        client.lookup(keys(1, 5))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server.metrics_port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["vcache_manager_lookups_total"]) == 5
        assert float(values["vcache_manager_hits_total"]) == 3
        assert float(values["vcache_manager_chunks"]) == 3
        assert float(values['vcache_manager_sessions_by_role{role="engine"}']) == 1
        slots = {name: value for name, value in values.items() if name.startswith("vcache_manager_segment_slots")}
        assert [value for name, value in slots.items() if 'state="used"' in name] == ["3.0"]
        assert all(name.startswith("vcache_manager_") for name in values), "no metric of another registry"
        with pytest.raises(AddressInUseError, match="metrics_port"):
            Exporter("127.0.0.1", port, client.stats)
        client.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
