"""Configuration: file, environment and arguments, their order, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.config import ByteSize, CacheConfig, ManagerConfig, SegmentConfig, TransferConfig, VCacheConfig, sections
from vcache.errors import ConfigError


def from_text(tmp_path: Path, text: str, env: dict[str, str] | None = None, **overrides: Any) -> VCacheConfig:
    path = tmp_path / "vcache.yaml"
    path.write_text(text)
    return VCacheConfig.from_file(path, env=env or {}, **overrides)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("17", 17),
        (17, 17),
        ("17B", 17),
        ("1K", 1024),
        ("1kb", 1024),
        ("256MiB", 256 * 2**20),
        ("2G", 2 * 2**30),
        (" 1.5 GiB ", 3 * 2**29),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_powers_of_1024(text: str | int, nbytes: int) -> None:
    assert ByteSize.parse(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1e9", "1,5G", "1GiBs", True])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a size such as 256MiB"):
        ByteSize.parse(text)


@settings(deadline=None)
@given(st.integers(0, 2**50))
def test_a_size_survives_text(nbytes: int) -> None:
    assert ByteSize.parse(str(ByteSize(nbytes))) == nbytes


# --- sources and their order ------------------------------------------------------------------------------------------


def test_defaults_are_a_working_embedded_set_up() -> None:
    config = VCacheConfig()
    assert config == VCacheConfig.from_env({})
    assert config.manager.address == "embedded"
    assert config.segment.lend
    assert config.cache.chunk_size == 256
    assert config.storage.kind == "none"


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    text = "manager: {deadline: 2, lease_ttl: 3}\nsegment: {size: 1GiB}\n"
    config = from_text(
        tmp_path, text, {"VCACHE_MANAGER_DEADLINE": "4", "VCACHE_CACHE_CHUNK_SIZE": "64"}, cache={"chunk_size": 32}
    )
    assert config.manager.deadline == 4
    assert config.manager.lease_ttl == 3
    assert config.segment.size == 2**30
    assert config.cache.chunk_size == 32
    assert config.segment.slab_size == VCacheConfig().segment.slab_size


def test_a_section_may_be_given_as_a_struct() -> None:
    config = VCacheConfig.from_env({"VCACHE_CACHE_CHUNK_SIZE": "64"}, cache=CacheConfig(chunk_size=16))
    assert config.cache == CacheConfig(chunk_size=16)


def test_environment_values_are_converted() -> None:
    config = VCacheConfig.from_env(
        {
            "VCACHE_SEGMENT_LEND": "false",
            "VCACHE_SEGMENT_SIZE": "1.5GiB",
            "VCACHE_SEGMENT_KIND": "host",
            "VCACHE_TRANSFER_FLOOR_GBPS": "12.5",
            "VCACHE_MANAGER_METRICS_PORT": "9100",
            "VCACHE_STORAGE_OPTIONS": '{"master": "127.0.0.1:50051"}',
        }
    )
    assert not config.segment.lend
    assert config.segment.size == 3 * 2**29
    assert config.segment.kind == "host"
    assert config.transfer.floor_gbps == 12.5
    assert config.manager.metrics_port == 9100
    assert config.storage.options == {"master": "127.0.0.1:50051"}


def test_every_key_has_an_environment_variable() -> None:
    for section, kind in sections().items():
        for name, default in msgspec.structs.asdict(kind()).items():
            text = msgspec.json.encode(default).decode() if isinstance(default, dict) else str(default)
            config = VCacheConfig.from_env({f"VCACHE_{section.upper()}_{name.upper()}": text})
            assert getattr(getattr(config, section), name) == default


def test_vcache_config_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "named.yaml"
    path.write_text("cache: {chunk_size: 8}")
    assert VCacheConfig.from_env({"VCACHE_CONFIG": str(path)}).cache.chunk_size == 8


def test_foreign_variables_are_left_alone() -> None:
    assert VCacheConfig.from_env({"VCACHE_LOG_LEVEL": "DEBUG", "VCACHE_TOKEN": "secret", "PATH": "/bin"}) == VCacheConfig()


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "{}"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, text) == VCacheConfig()


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_off_needs_no_quotes_in_a_file(tmp_path: Path) -> None:
    """YAML takes it for False, so a file with `remote: off` was refused: "Expected `str`, got `bool`"."""
    config = from_text(tmp_path, "cache: {remote: off, checksum: off, demote: off}\nsegment: {remote: tcp}")
    assert (config.cache.remote, config.cache.checksum, config.cache.demote) == ("off", "off", False)
    assert config.segment.remote == "tcp"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("manager: {adress: x}", "unknown key 'manager.adress'; known: address,"),
        ("manger: {address: x}", "unknown section 'manger'; known: manager, segment, cache, storage, transfer"),
        ("1: {address: x}", "unknown section '1'"),
        ("manager: 5", "manager: expected keys with values, got 5"),
        ("manager:", "manager: expected keys with values, got None"),
        ("- manager", "expected sections with keys, got list"),
        ("manager: {deadline: soon}", "manager.deadline: Expected `float`, got `str`"),
        ("manager: {deadline: 0}", "manager.deadline: must be above 0, got 0.0"),
        ("manager: {deadline: -1}", "manager.deadline: must be above 0, got -1.0"),
        ("manager: {deadline: .nan}", "manager.deadline: must be above 0, got nan"),
        ("manager: {deadline: .inf}", "manager.deadline: must be above 0, got inf"),
        ("manager: {quarantine: -1}", "manager.quarantine: must be at least 0, got -1.0"),
        ("manager: {metrics_port: 70000}", "manager.metrics_port: must be at least 0 and at most 65535, got 70000"),
        ("manager: {session_timeout: 1}", "manager.session_timeout: must be above manager.heartbeat_interval (1.0 s), got 1.0"),
        ("manager: {eviction: mru}", "manager.eviction: Invalid enum value 'mru'"),
        ("segment: {size: lots}", "segment.size: 'lots' is not a size such as 256MiB or 2GiB"),
        ("segment: {size: 0}", "segment.size: must be above 0, got 0"),
        ("segment: {size: -5}", "segment.size: must be above 0, got -5"),
        ("segment: {lend: maybe}", "segment.lend: Expected `bool`, got `str`"),
        ("cache: {chunk_size: 0}", "cache.chunk_size: must be at least 1 and at most 65535, got 0"),
        ("transfer: {threads: 0}", "transfer.threads: must be at least 1 and at most 1024, got 0"),
        ("storage: {options: {a: [1]}}", "storage.options[...]: Expected `str`, got `array`"),
        ("manager: {a: b", "not valid YAML"),
    ],
)
def test_a_bad_file_gives_one_line_that_names_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text)
    message = str(caught.value)
    assert expected in message
    assert str(tmp_path / "vcache.yaml") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"VCACHE_MANAGER_ADRESS": "x"}, "environment: VCACHE_MANAGER_ADRESS: unknown key 'manager.adress'; known: address,"),
        ({"VCACHE_MANAGER_DEADLINE": "abc"}, "environment: manager.deadline: Expected `float`, got `str`"),
        ({"VCACHE_SEGMENT_SIZE": ""}, "environment: segment.size: '' is not a size"),
        ({"VCACHE_STORAGE_OPTIONS": "a=b"}, "environment: VCACHE_STORAGE_OPTIONS: expected a JSON object"),
        ({"VCACHE_STORAGE_OPTIONS": "[1]"}, "environment: VCACHE_STORAGE_OPTIONS: expected a JSON object, got '[1]'"),
        ({"VCACHE_CONFIG": "/nowhere/vcache.yaml"}, "config file /nowhere/vcache.yaml: No such file or directory"),
    ],
)
def test_a_bad_environment_gives_one_line_that_names_the_variable_or_key(env: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VCacheConfig.from_env(env)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_the_source_of_a_bad_value_is_named_not_the_file_below_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^environment: segment\.size: "):
        from_text(tmp_path, "segment: {size: 1GiB}", {"VCACHE_SEGMENT_SIZE": "x"})
    with pytest.raises(ConfigError, match=r"^arguments: segment\.size: "):
        from_text(tmp_path, "segment: {size: x}", segment={"size": "y"})


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        VCacheConfig.from_file(tmp_path, env={})


@pytest.mark.parametrize(
    "build",
    [
        lambda: ManagerConfig(deadline=0),
        lambda: ManagerConfig(max_frame=ByteSize(-1)),
        lambda: SegmentConfig(size=ByteSize(0)),
        lambda: CacheConfig(chunk_size=70000),
        lambda: TransferConfig(grid=-1),
    ],
)
def test_sections_built_by_hand_are_checked_too(build: Any) -> None:
    with pytest.raises(ConfigError, match="must be"):
        build()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        VCacheConfig().cache.chunk_size = 5  # type: ignore[misc]
