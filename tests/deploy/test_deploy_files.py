"""Unit files and container file: every command line in them is one that the programs accept."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from vcache.bindings import LIBRARIES
from vcache.cli.app import app
from vcache.config import VCacheConfig
from vcache.storage.mooncake_options import MooncakeOptions, find_master

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
USAGE_ERROR = typer.BadParameter.__bases__[0]
BIN = "/opt/vcache/bin/"


def unit(path: Path) -> dict[str, list[str]]:
    """Values by key, in order; sections do not matter here."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def container() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "Containerfile").read_text().splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest)
    return found


def in_comments() -> Iterator[str]:
    """Options named in comments of the units, completed to the command that they belong to."""
    for path in UNITS:
        command = unit(path)["ExecStart"][0]
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                yield from (f"{command} {more}" for more in re.findall(r"--[\w-]+[= ][^,.;:)]*(?= *[,.;:)]|$)", line))


def docker_runs() -> Iterator[list[str]]:
    """Arguments after the image's name, with the program in front."""
    for line in (DEPLOY / "Containerfile").read_text().splitlines():
        words = shlex.split(line.lstrip("#"))
        if words[:2] == ["docker", "run"]:
            image = words.index("vcache")
            options = words[2:image]
            program = options[options.index("--entrypoint") + 1] if "--entrypoint" in options else "vcache"
            yield [program, *words[image + 1 :]]


def accept(words: list[str]) -> None:
    """Parse, and run nothing. Raises `USAGE_ERROR` for what the program would refuse."""
    if words[0] == "mooncake_master":
        accept_master(words[1:])
        return
    assert words[0] == "vcache", words
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in commands, f"no command {words[1]}"
    commands[words[1]].make_context(words[1], words[2:]).close()


def accept_master(flags: list[str]) -> None:
    program = find_master()
    if program is None:
        pytest.skip("mooncake_master is not installed")
    known = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30, check=False).stdout
    if "-rpc_port" not in known:
        pytest.skip("mooncake_master does not run here")
    for flag in flags:
        name = flag.lstrip("-").partition("=")[0]
        assert re.search(rf"^ +-{name} \(", known, re.MULTILINE), f"mooncake_master does not know {flag}"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_what_the_programs_accept(path: Path) -> None:
    keys = unit(path)
    (start,) = keys["ExecStart"]
    words = shlex.split(start)
    assert words[0].startswith(BIN)
    accept([words[0].removeprefix(BIN), *words[1:]])
    assert keys["Restart"] == ["always"]
    environment = dict(assignment.split("=", 1) for value in keys.get("Environment", []) for assignment in shlex.split(value))
    config = VCacheConfig.from_env(environment)
    MooncakeOptions.parse(config.storage.options)
    if config.segment.broker_dir:
        # Sockets of lenders must not vanish when the manager's unit stops.
        assert f"/run/{keys['RuntimeDirectory'][0]}" == config.segment.broker_dir
        assert (keys["RuntimeDirectoryMode"], keys["RuntimeDirectoryPreserve"]) == (["0700"], ["yes"])


def test_options_named_in_comments_are_accepted() -> None:
    lines = list(in_comments())
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)
        accept([words[0].removeprefix(BIN), *words[1:]])


def test_container_runs_what_the_programs_accept() -> None:
    runs = list(docker_runs())
    assert {tuple(run[:2]) for run in runs} >= {("vcache", "serve"), ("vcache", "lend")}
    for words in runs:
        accept(words)
    keys = container()
    assert keys["ENTRYPOINT"] == ['["vcache"]']
    environment = dict(value.split("=", 1) for value in keys["ENV"])
    assert VCacheConfig.from_env(environment).segment.broker_dir == "/run/vcache"
    packages = next(line for line in keys["RUN"] if "apt-get" in line).split()
    assert set(LIBRARIES.values()) <= set(packages), "Mooncake's wheels do not load without these"
    for source in (word for line in keys["COPY"] for word in line.split()[:-1]):
        assert (DEPLOY.parent / source).exists()


def test_a_wrong_command_line_is_noticed() -> None:
    with pytest.raises(USAGE_ERROR):
        accept(["vcache", "lend", "--sizes", "1GiB"])
    with pytest.raises(USAGE_ERROR):
        accept(["vcache", "lend", "--size", "lots"])
    with pytest.raises(AssertionError):
        accept(["vcache", "borrow"])


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    root = tmp_path / "root"
    for program in ("vcache", "mooncake_master"):
        (root / "opt/vcache/bin").mkdir(parents=True, exist_ok=True)
        (root / "opt/vcache/bin" / program).write_text("#!/bin/sh\n")
        (root / "opt/vcache/bin" / program).chmod(0o755)
    units = root / "etc/systemd/system"
    units.mkdir(parents=True)
    for path in UNITS:
        shutil.copy(path, units)
    for name in ("sysinit", "basic", "network", "network-online", "multi-user", "shutdown"):
        (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\n")
    for path in UNITS:
        command = ["systemd-analyze", "verify", f"--root={root}", f"/etc/systemd/system/{path.name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if "--root" in done.stderr and "not supported" in done.stderr:
            pytest.skip("this systemd-analyze cannot verify under a root")
        assert (done.returncode, done.stderr.strip()) == (0, ""), done.stderr
