"""Each command without a manager: help, options, exit codes, one line for each mistake, no heavy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import invoke

import vcache
from vcache.config import VCacheConfig

COMMANDS = [
    (),
    ("serve",),
    ("lend",),
    ("lend-storage",),
    ("status",),
    ("story",),
    ("resize",),
    ("clear",),
    ("doctor",),
    ("demo",),
    ("bench",),
    ("bench", "manager"),
    ("bench", "memory"),
    ("bench", "lookup"),
    ("bench", "engine"),
    ("bench", "transfer"),
    ("bench", "serve"),
]


def error_line(output: str) -> str:
    """The one line that a failed command may say."""
    (line,) = output.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "vcache")
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        result = invoke(*command, flag)
        assert result.exit_code == 0
        assert "Usage: " in result.output
        assert "--help" in result.output


def test_help_lists_every_command_with_a_full_sentence() -> None:
    lines = invoke("--help").output.splitlines()
    for command in COMMANDS:
        if len(command) == 1:
            (line,) = [line for line in lines if line.split()[:1] == [command[0]]]
            assert line.endswith(".")
            assert not line.endswith("...")


@pytest.mark.parametrize(
    ("called", "now"),
    [
        (["--size", "1GiB"], "lend"),
        (["--tier", "pool", "--kind", "host", "--size", "1GiB"], "lend"),
        (["--tier", "storage", "--size", "1GiB"], "lend-storage"),
        (["--size", "1GiB", "--tier=storage", "-a", "unix:///nowhere"], "lend-storage"),
        (["--ssd", "/tmp", "--ssd-size=1GiB", "--size", "1GiB", "--tier", "storage"], "lend-storage"),
    ],
)
def test_lend_with_a_tier_is_the_command_for_it(called: list[str], now: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, VCacheConfig]] = []
    monkeypatch.setattr("vcache.cli.lend.lend_until_stopped", lambda config, **_: ended.append(("lend", config)))
    monkeypatch.setattr(
        "vcache.cli.lend_storage.lend_storage_until_stopped", lambda config, _: ended.append(("lend-storage", config))
    )
    result = invoke("lend", *called)
    assert result.exit_code == 0, result.output
    ((command, config),) = ended
    assert (command, config.segment.size) == (now, 2**30)


def test_version() -> None:
    assert invoke("--version").output == f"vcache {vcache.__version__}\n"


def test_the_package_runs_as_the_command() -> None:
    """`python -m vcache` said "'vcache' is a package and cannot be directly executed"."""
    for arguments in (["--version"], ["--help"], ["serve", "--port", "1"]):
        done = subprocess.run(
            [sys.executable, "-m", "vcache", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        same = invoke(*arguments)
        assert (done.returncode, done.stdout) == (same.exit_code, same.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("serve", "--nonsense"),
        ("serve", "--eviction", "mru"),
        ("lend", "--size", "lots"),
        ("lend", "--size", "0"),
        ("lend", "--size", "1000TiB"),
        ("lend", "--tier"),
        ("lend", "--tier", "ssd"),
        ("lend", "--ssd", "/tmp", "--ssd-size", "1GiB"),
        ("lend", "--tier=storage", "--kind", "host"),
        ("lend-storage", "--kind", "host"),
        ("lend-storage", "--ssd", "/tmp"),
        ("resize", "ab"),
        ("resize", "ab", "--size", "-1GiB"),
        ("clear",),
        ("clear", "--all", "--namespace", "00"),
        ("status", "--watch", "--interval", "0"),
    ],
)
def test_wrong_options_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [("serve",), ("lend",), ("status",), ("clear", "--all", "--yes"), ("doctor",)])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("manager: {adress: x}", "unknown key 'manager.adress'; known: address,"),
        ("segment: {size: lots}", "segment.size: 'lots' is not a size such as 256MiB or 2GiB"),
        ("manager: [", "not valid YAML"),
    ],
)
def test_a_bad_config_file_is_one_line_and_exit_code_2(
    tmp_path: Path, command: tuple[str, ...], text: str, expected: str
) -> None:
    path = tmp_path / "vcache.yaml"
    path.write_text(text)
    result = invoke(*command, "--config", str(path))
    assert result.exit_code == 2
    assert expected in error_line(result.output)
    assert str(path) in result.output


def test_a_missing_config_file_and_a_bad_variable_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("status", "--config", "/nowhere.yaml")
    assert result.exit_code == 2
    assert error_line(result.output) == "config file /nowhere.yaml: No such file or directory"
    monkeypatch.setenv("VCACHE_MANAGER_DEADLINE", "soon")
    result = invoke("status")
    assert result.exit_code == 2
    assert error_line(result.output) == "environment: manager.deadline: Expected `float`, got `str`"


def test_a_bad_log_level_lists_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_LOG_LEVEL", "LOUD")
    result = invoke("status")
    assert result.exit_code == 2
    assert "'LOUD' is no log level; use one of DEBUG, INFO" in error_line(result.output)


@pytest.mark.parametrize("address", ["http://x", "unix://relative", "tcp://host", "tcp://host:99999"])
def test_a_bad_address_is_one_line_and_exit_code_2(address: str) -> None:
    for command in ("serve", "status", "lend"):
        arguments = ["--kind", "host", "--size", "1MiB"] if command == "lend" else []
        result = invoke(command, "--address", address, *arguments)
        assert result.exit_code == 2, result.output
        assert "manager.address" in error_line(result.output)


@pytest.mark.parametrize(
    "command",
    [("status",), ("status", "--json"), ("status", "--watch"), ("clear", "--all", "--yes"), ("resize", "ab", "--size", "1M")],
)
def test_without_a_manager_commands_say_so_with_exit_code_3(
    command: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_MANAGER_CONNECT_TIMEOUT", "0.2")
    result = invoke(*command)
    assert result.exit_code == 3, result.output
    assert f"unix://{folder}/manager.sock" in error_line(result.output)


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_LOG_LEVEL", "DEBUG")
    result = invoke("status", "--config", "/nowhere.yaml")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.output
    assert result.output.splitlines()[-1] == "error: config file /nowhere.yaml: No such file or directory"


def test_an_unexpected_exception_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("vcache.cli.status.show_status", broken)
    result = invoke("status")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vcache.cli.status.show_status", interrupted)
    assert invoke("status").exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("lend", "--kind", "host", "--device", "0"), "--device 0: host memory has no device"),
        (("lend", "--kind", "cuda", "--device", "first"), "--device first: expected the number of a GPU or its UUID"),
        (("clear", "--namespace", "xyz", "--yes"), "--namespace 'xyz': expected 32 hex digits"),
        (("clear", "--namespace", "00", "--yes"), "--namespace '00': expected 32 hex digits"),
        (("bench", "engine", "--bytes", "1MiB"), "--bytes 1MiB: a chunk of the model measured is 32MiB"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(arguments: tuple[str, ...], text: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert text in error_line(result.output)


def test_more_memory_than_there_is_cannot_be_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_MANAGER_CONNECT_TIMEOUT", "0.1")
    monkeypatch.setenv("VCACHE_LOG_LEVEL", "ERROR")  # there is no manager either, which is a warning
    result = invoke("lend", "--kind", "host", "--size", "100TiB")
    assert result.exit_code == 1
    assert "available" in error_line(result.output)


# --- what is imported -------------------------------------------------------------------------------------------------


def imported_by(*command: str) -> set[str]:
    """Names of all modules that a fresh Python has loaded after `command`."""
    script = f"import runpy, sys, json, atexit; atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); {command[0]}"
    done = subprocess.run([sys.executable, "-c", script, *command[1:]], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


RUN = "sys.argv[0] = 'vcache'; runpy.run_module('vcache.cli', run_name='__main__')"


def test_importing_vcache_loads_next_to_nothing() -> None:
    loaded = imported_by("import vcache")
    assert not loaded & {"torch", "numpy", "typer", "rich", "msgspec", "yaml", "uvloop", "prometheus_client", "vcache.engine"}


def test_config_keys_and_errors_load_without_torch() -> None:
    loaded = imported_by("import vcache; vcache.VCacheConfig(); vcache.KVCacheSpec; vcache.CacheKey; vcache.errors")
    assert not loaded & {"torch", "numpy", "typer", "rich"}


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("bench", "--help"), ("bench", "engine", "--help")])
def test_help_loads_neither_torch_nor_numpy_nor_rich(arguments: tuple[str, ...]) -> None:
    loaded = imported_by(RUN, *arguments)
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "triton", "rich", "yaml", "uvloop", "prometheus_client", "vcache.manager.client"}


def test_the_public_names_exist_and_no_others() -> None:
    assert set(dir(vcache)) == set(vcache.__all__)
    for name in vcache.__all__:
        assert getattr(vcache, name) is not None
    with pytest.raises(AttributeError, match="module 'vcache' has no attribute 'VCacheEngin'"):
        _ = vcache.VCacheEngin
