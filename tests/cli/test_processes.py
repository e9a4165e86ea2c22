"""The commands as processes: serve, lend, status, resize, clear, Ctrl-C, restarts, and a second manager on one address."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.cluster import eventually
from support.commands import Starter, invoke

pytestmark = pytest.mark.processes


def status() -> dict[str, Any]:
    result = invoke("status", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.fixture
def address(folder: Path) -> str:
    return f"unix://{folder}/manager.sock"


def test_serve_lend_status_and_a_clean_end(start: Starter, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = start("serve")
    manager.wait_for(f"manager ready at {address}")
    assert len(manager.out.splitlines()) == 1
    lender = start("lend", "--kind", "host", "--size", "4MiB", "--slab-size", "1MiB", "--name", "first")
    lender.wait_for("lending 4MiB of host memory in 4 slab(s): segment ")
    assert address in lender.out
    found = status()
    (segment,) = found["segments"]
    assert segment["tier"] == "dram"
    assert segment["slabs_unformatted"] == 4
    assert segment["nbytes"] >= 4 * 2**20
    assert segment["info"]["uuid"] in lender.out
    names = {session["name"]: session["role"] for session in found["sessions"]}
    assert names == {"first": "lender", "status": "tool"}
    table = invoke("status").output
    for word in (segment["info"]["uuid"][:8], "DRAM", "first", "hit ratio"):
        assert word in table
    assert "4 slab" not in invoke("doctor").output.splitlines()[-1]
    assert lender.end(signal.SIGINT) == 0
    assert lender.out.splitlines()[-1] == "stopped lending; the memory is given back"
    assert status()["segments"] == []
    assert manager.end(signal.SIGINT) == 0
    assert not Path(address.removeprefix("unix://")).exists()
    assert (manager.err, lender.err) == ("", "")
    monkeypatch.setenv("VCACHE_MANAGER_CONNECT_TIMEOUT", "0.1")
    assert invoke("status").exit_code == 3


def test_sigterm_is_a_clean_end_too(start: Starter) -> None:
    manager = start("serve")
    manager.wait_for("ready")
    lender = start("lend", "--kind", "host", "--size", "1MiB")
    lender.wait_for("lending")
    assert lender.end(signal.SIGTERM) == 0
    assert manager.end(signal.SIGTERM) == 0
    assert "Traceback" not in manager.err + lender.err


def test_a_manager_that_nobody_uses_ends_by_itself_if_told_so(start: Starter, address: str) -> None:
    manager = start("serve", "--idle-exit", "4")
    manager.wait_for("ready")
    lender = start("lend", "--kind", "host", "--size", "1MiB")
    lender.wait_for("lending")
    with pytest.raises(subprocess.TimeoutExpired):
        manager.process.wait(5.5)
    assert lender.end(signal.SIGTERM) == 0
    assert manager.wait() == 0
    assert manager.out.splitlines()[-1] == "nothing was connected for 4 s, the manager ends"
    assert not Path(address.removeprefix("unix://")).exists()


def test_a_second_manager_on_one_address_is_one_line_and_exit_code_2(start: Starter, address: str) -> None:
    start("serve").wait_for("ready")
    second = start("serve")
    assert second.wait() == 2
    assert second.out == ""
    (line,) = second.err.splitlines()
    assert line == f"error: {address}: another manager serves this address"
    assert status()["sessions"], "the first one is unharmed"


def test_a_used_metrics_port_is_one_line_and_metrics_are_served(start: Starter, folder: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        taken = start("serve", "--metrics-port", str(port))
        probe.listen()
        assert taken.wait() == 2
        assert f"127.0.0.1:{port}" in taken.err
    start("serve", "--metrics-port", str(port)).wait_for("ready")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"vcache_manager_uptime_seconds" in answer.read()


def test_a_lender_survives_the_manager_and_may_come_first(start: Starter) -> None:
    lender = start("lend", "--kind", "host", "--size", "1MiB", env={"VCACHE_MANAGER_CONNECT_TIMEOUT": "0.2"})
    lender.wait_for("not there yet")
    manager = start("serve")
    manager.wait_for("ready")
    eventually(lambda: status()["segments"], what="the lender finds the manager")
    uuid = status()["segments"][0]["info"]["uuid"]
    manager.process.kill()
    manager.wait()
    start("serve").wait_for("ready")
    eventually(lambda: status()["segments"], what="the lender finds the manager again")
    assert status()["segments"][0]["info"]["uuid"] == uuid
    assert lender.end() == 0


def test_a_lender_stops_cleanly_when_the_manager_is_dead(start: Starter) -> None:
    manager = start("serve")
    manager.wait_for("ready")
    lender = start("lend", "--kind", "host", "--size", "1MiB")
    lender.wait_for("lending")
    manager.process.kill()
    manager.wait()
    assert lender.end() == 0
    assert "Traceback" not in lender.err


def test_resize_follows_the_lender_up_and_down(start: Starter) -> None:
    start("serve").wait_for("ready")
    lender = start("lend", "--kind", "host", "--size", "4MiB", "--slab-size", "1MiB")
    lender.wait_for("lending")
    uuid = status()["segments"][0]["info"]["uuid"]
    for size, slabs in (("6MiB", 6), ("2MiB", 2)):
        result = invoke("resize", uuid[:6], "--size", size)
        assert result.exit_code == 0, result.output
        assert f"asked for {size}" in result.output
        assert len(status()["segments"][0]["info"]["slabs"]) == slabs
        lender.wait_for(f"now lending {size}")
    result = invoke("resize", "0" * 40, "--size", "1MiB")
    assert result.exit_code == 2
    assert f"no such segment; known: {uuid[:8]}" in result.output


def test_a_resize_that_cannot_be_done_ends_at_its_timeout(start: Starter) -> None:
    start("serve").wait_for("ready")
    lender = start("lend", "--kind", "host", "--size", "1MiB", "--slab-size", "1MiB")
    lender.wait_for("lending")
    uuid = status()["segments"][0]["info"]["uuid"]
    result = invoke("resize", uuid, "--size", "1TiB", "--timeout", "0.3")
    assert result.exit_code == 1
    assert "not done in time" in result.output
    eventually(lambda: "cannot resize" in lender.err, what="the reason in the log of the lender")
    assert lender.end() == 0


def test_clear_asks_unless_told_not_to(start: Starter) -> None:
    start("serve").wait_for("ready")
    assert invoke("clear", "--all", "--yes").output == "0 chunk(s) forgotten\n"
    assert invoke("clear", "--namespace", "ab" * 16, "-y").output == "0 chunk(s) forgotten\n"
    result = invoke("clear", "--all")
    assert "Forget all chunks in unix://" in result.output
    assert result.exit_code == 1, "no answer on standard input"


def test_watch_refreshes_until_ctrl_c_and_waits_for_a_manager_that_goes_away(start: Starter) -> None:
    manager = start("serve")
    manager.wait_for("ready")
    watch = start("status", "--watch", "--json", "--interval", "0.1")
    eventually(lambda: len(watch.out.splitlines()) >= 3, what="several lines")
    manager.process.kill()
    manager.wait()
    start("serve").wait_for("ready")
    epoch = status()["epoch"]
    eventually(lambda: f'"epoch": {epoch}' in watch.out, what="the new manager shows")
    assert all(json.loads(line)["uptime"] >= 0 for line in watch.out.splitlines())
    assert watch.end(signal.SIGINT) == 0


def test_watch_as_a_table(start: Starter) -> None:
    start("serve").wait_for("ready")
    watch = start("status", "--watch", "--interval", "0.1")
    eventually(lambda: "No segment is lent" in watch.out, what="the table")
    assert watch.end(signal.SIGTERM) == 0
    assert watch.err == ""


def test_ctrl_c_during_a_bench_ends_its_processes(start: Starter, folder: Path) -> None:
    bench = start("bench", "manager", "--chunks", "4096", "--seconds", "60", env={"TMPDIR": str(folder)})
    eventually(lambda: list(folder.glob("vcache-bench-*/manager.sock")), what="the manager of the benchmark")
    assert bench.end(signal.SIGINT) == 130
    assert not list(folder.glob("vcache-bench-*"))


def test_lend_imports_neither_torch_nor_numpy(start: Starter) -> None:
    start("serve").wait_for("ready")
    lender = start("lend", "--kind", "host", "--size", "1MiB")
    lender.wait_for("lending")
    maps = Path(f"/proc/{lender.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "numpy" not in maps


def test_the_manager_imports_neither_torch_nor_numpy(start: Starter) -> None:
    manager = start("serve")
    manager.wait_for("ready")
    maps = Path(f"/proc/{manager.process.pid}/maps").read_text()
    assert "uvloop" in maps, "that a library shows at all"
    assert "libtorch" not in maps
    assert "numpy" not in maps
