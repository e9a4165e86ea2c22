"""`vcache doctor` on this machine, and on machines that lack something."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from support.commands import invoke

from vcache import bindings
from vcache.bindings import Problem
from vcache.cli import doctor
from vcache.cli.checks import Check, as_json, print_check, summary
from vcache.config import VCacheConfig


def config(**sections: Any) -> VCacheConfig:
    return VCacheConfig.from_env(**sections)


def found(checker: Any, settings: VCacheConfig | None = None) -> dict[str, Check]:
    return {check.name: check for check in checker(settings or config())}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_MANAGER_CONNECT_TIMEOUT", "0.2")


def test_this_machine_passes() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1].endswith(", 0 fail")
    for name in (
        "system",
        "packages",
        "configuration",
        "host memory",
        "memfd",
        "unix sockets",
        "socket folder",
        "GPU",
        "Mooncake",
    ):
        assert any(line[6:].startswith(f"{name}") for line in lines), name


def test_json_holds_every_line() -> None:
    result = invoke("doctor", "--json")
    report = json.loads(result.output)
    assert report["failed"] is False
    assert {check["name"] for check in report["checks"]} >= {"system", "memfd", "manager"}
    assert all(check["status"] in ("ok", "warn", "fail") for check in report["checks"])


def test_an_absent_manager_warns_and_fails_only_when_it_was_configured(folder: Path) -> None:
    result = invoke("doctor")
    assert f"warn  manager: manager unix://{folder}/manager.sock" in result.output
    assert f"do: start it: vcache serve --address unix://{folder}/manager.sock" in result.output
    result = invoke("doctor", "--address", f"unix://{folder}/other.sock")
    assert result.exit_code == 1
    assert "fail  manager: " in result.output
    assert result.output.splitlines()[-1].endswith(", 1 fail")


def test_a_variable_that_nothing_reads_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_MANGER_ADDRESS", "unix:///x")
    monkeypatch.setenv("VCACHE_TOKEN", "secret")
    checks = list(doctor.environment(config()))
    assert [check.status for check in checks] == ["warn", "ok"]
    assert "VCACHE_MANGER_ADDRESS is set" in checks[0].detail
    assert not any("secret" in field for check in checks for field in check)


def test_a_segment_larger_than_memory_is_reported() -> None:
    checks = found(doctor.memory, config(segment={"size": "1000TiB"}))
    assert checks["host memory"].status == "warn"
    assert "segment.size is 1000TiB" in checks["host memory"].why


def test_small_limits_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_MEMLOCK: (65536, 65536), resource.RLIMIT_NOFILE: (128, 128)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert found(doctor.limits)["locked memory"].status == "ok", "only RDMA needs it"
    checks = found(doctor.limits, config(storage={"kind": "mooncake"}))
    assert [check.status for check in checks.values()] == ["warn", "warn"]
    assert all(check.why and check.advice for check in checks.values())


def test_a_kernel_without_memfd_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refused)
    check = found(doctor.shared_memory)["memfd"]
    assert check.status == "fail"
    assert "Function not implemented" in check.detail
    assert check.advice


def test_an_open_socket_folder_fails(folder: Path) -> None:
    folder.chmod(0o755)
    check = found(doctor.sockets)["socket folder"]
    assert check.status == "fail"
    assert f"chmod 700 {folder}" in check.detail
    folder.chmod(0o700)
    assert found(doctor.sockets)["socket folder"].status == "ok"


def test_a_socket_folder_that_is_not_there_yet_is_fine(folder: Path) -> None:
    check = found(doctor.sockets, config(segment={"broker_dir": str(folder / "new")}))["socket folder"]
    assert check.status == "ok"
    assert not (folder / "new").exists()


def test_what_was_asked_for_and_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_versions", lambda names: {})
    assert found(doctor.mooncake)["Mooncake"].status == "ok"
    check = found(doctor.mooncake, config(storage={"kind": "mooncake"}))["Mooncake"]
    assert check.status == "fail"
    assert "vcache[mooncake]" in check.advice
    if not Path("/proc/driver/nvidia/version").exists():
        assert found(doctor.gpu)["GPU"].status == "ok"
        assert found(doctor.gpu, config(segment={"kind": "cuda"}))["GPU"].status == "fail"


def test_mooncake_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides is whether it loads, not which libraries are there."""
    monkeypatch.setattr(doctor, "_versions", lambda names: {names[0]: "0.3.13"})
    monkeypatch.setattr(bindings, "find_problem", lambda part: Problem("libnuma.so.1 is missing", "apt install libnuma1"))
    check = found(doctor.mooncake)["Mooncake"]
    assert check.status == "warn"
    assert check.detail.endswith("0.3.13, but libnuma.so.1 is missing")
    assert check.advice == "apt install libnuma1"
    for asked in ({"storage": {"kind": "mooncake"}}, {"segment": {"remote": "tcp"}}, {"cache": {"remote": "tcp"}}):
        assert found(doctor.mooncake, config(**asked))["Mooncake"].status == "fail"


def test_what_to_do_is_said_of_what_is_not_well(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("GPU 0", "warn", "busy", advice="wait")]
    print_check(checks[0])
    print_check(Check("x", "ok", "fine", why="hidden"))
    assert capsys.readouterr().out == "warn  GPU 0: busy\n        do: wait\nok    x: fine\n"
    assert summary(checks) == "0 ok, 1 warn, 0 fail"
    assert as_json([Check("x", "fail", "no")])["failed"] is True
