"""Configuration: one YAML file, every key also as `VCACHE_<SECTION>_<KEY>`, or keyword arguments.

Order, later wins: defaults, file, environment, keywords. Unknown keys and bad values raise `ConfigError` naming the key.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from .errors import ConfigError

T = TypeVar("T")

_FOREVER = sys.float_info.max
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


class ByteSize(int):
    """A number of bytes; in files and environment also `256MiB`, `2G`, `1.5 GiB` (units are powers of 1024)."""

    @classmethod
    def parse(cls, text: str | int) -> ByteSize:
        """Raises `ValueError` when `text` is no size."""
        if isinstance(text, int) and not isinstance(text, bool):
            return cls(text)
        match = _SIZE.fullmatch(str(text))
        if match is None:
            raise ValueError(f"{text!r} is not a size such as 256MiB or 2GiB")
        return cls(float(match[1]) * _UNITS[match[2].upper()])

    def __str__(self) -> str:
        for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if self >= factor and self % factor == 0:
                return f"{self // factor}{unit}"
        return f"{int(self)}B"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def _require(self, low: float, high: float, *names: str, above: bool = False) -> None:
        """`low <= value <= high` (with `above`: `low < value`) for every field named; NaN fails. Raises `ConfigError`."""
        for name in names:
            value = getattr(self, name)
            if not (low <= value <= high) or (above and value == low):
                bound = f"above {low:g}" if above else f"at least {low:g}"
                limit = "" if high == _FOREVER else f" and at most {high:g}"
                raise ConfigError(f"{_section_name(self)}.{name}: must be {bound}{limit}, got {value}")


class ManagerConfig(_Section, frozen=True, kw_only=True):
    address: str = "embedded"
    """`embedded` (inside this process), `unix:///path/to/socket` or `tcp://host:port`."""
    token_file: str = ""
    """File with the shared secret that TCP needs. Read at start, never logged. Or the secret itself in `VCACHE_TOKEN`."""
    deadline: float = 1.0
    """Seconds after which a call to the manager gives up: a miss."""
    connect_timeout: float = 5.0
    """Seconds that the first connection may take before construction goes on without a manager."""
    heartbeat_interval: float = 1.0
    session_timeout: float = 10.0
    """Seconds of silence after which the manager ends a session."""
    lease_ttl: float = 30.0
    """Seconds a lease protects its chunks unless released before."""
    ticket_ttl: float = 30.0
    """Seconds after which an unfinished write no longer blocks others from writing the same chunk."""
    quarantine: float = 2.0
    """Seconds a slot rests after its writer is known to be dead."""
    eviction: Literal["lru", "sieve"] = "lru"
    admission: Literal["all", "reuse"] = "all"
    """Which new chunks may push others out of a full pool: all, or, while that would give more hits, those offered again. Not
    for instances that read what they never store."""
    high_watermark: float = 0.9
    """Part of a host's VRAM whose use starts demotion to host memory, and of its whole pool whose use, as far as it is not
    in storage yet, starts spilling; 1 = never."""
    low_watermark: float = 0.8
    """Part down to which they go on."""
    max_frame: ByteSize = ByteSize(8 * 2**20)
    """Largest frame accepted, in bytes."""
    metrics_port: int = 0
    """HTTP port for Prometheus on the manager; 0 = off."""
    metrics_host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self._require(0, _FOREVER, "deadline", "connect_timeout", "heartbeat_interval", "session_timeout", above=True)
        self._require(0, _FOREVER, "lease_ttl", "ticket_ttl", "max_frame", above=True)
        self._require(0, _FOREVER, "quarantine")
        self._require(0, 65535, "metrics_port")
        self._require(0, 1, "high_watermark", "low_watermark")
        if self.low_watermark > self.high_watermark:
            raise ConfigError(
                f"manager.low_watermark: must be at most manager.high_watermark ({self.high_watermark:g}), "
                f"got {self.low_watermark:g}"
            )
        if self.session_timeout <= self.heartbeat_interval:
            raise ConfigError(
                f"manager.session_timeout: must be above manager.heartbeat_interval ({self.heartbeat_interval} s), "
                f"got {self.session_timeout}"
            )


class SegmentConfig(_Section, frozen=True, kw_only=True):
    lend: bool = True
    """Whether an engine lends a segment of its own."""
    kind: Literal["auto", "cuda", "host"] = "auto"
    """`auto`: CUDA where there is a usable GPU, else host memory."""
    size: ByteSize = ByteSize(256 * 2**20)
    """Payload bytes to lend (headers come on top, below 1%)."""
    slab_size: ByteSize = ByteSize(256 * 2**20)
    """Payload bytes of one slab, the unit of growth and return."""
    broker_dir: str = ""
    """Folder for the lender's unix sockets; default `$XDG_RUNTIME_DIR/vcache` or `/tmp/vcache-<uid>`, mode 0700."""
    unmap_timeout: float = 5.0
    """Seconds that shrinking waits for importers to unmap."""
    remote: Literal["off", "tcp", "rdma"] = "off"
    """How engines on other hosts read what is lent, by Mooncake's transfer engine. Its ports are not authenticated."""
    remote_host: str = ""
    """Address of this host for the others; default: the one from which it reaches the manager."""

    def __post_init__(self) -> None:
        self._require(0, _FOREVER, "size", "slab_size", above=True)
        self._require(0, _FOREVER, "unmap_timeout")


class CacheConfig(_Section, frozen=True, kw_only=True):
    chunk_size: int = 256
    """Tokens in a chunk."""
    save_partial_chunk: bool = True
    placement: Literal["local", "spread"] = "local"
    demote: bool = True
    """Whether this engine moves cold chunks from VRAM to host memory in the background when the manager asks for room."""
    promote: bool = True
    """Whether this engine moves chunks that are read again in host memory to free VRAM, in the background, when the manager
    asks."""
    demote_rate: ByteSize = ByteSize(4 * 2**30)
    """Bytes a second that it moves so at most, down and up together; 0 = no limit."""
    remote: Literal["off", "tcp", "rdma"] = "off"
    """How chunks in memory of other hosts are read, by Mooncake's transfer engine; needs `segment.remote` there."""
    checksum: Literal["off", "sample", "always"] = "off"
    """Whether stores write a checksum behind each chunk in VRAM and DRAM, and which loads verify it: one in 64, or all."""

    def __post_init__(self) -> None:
        self._require(1, 65535, "chunk_size")
        self._require(0, _FOREVER, "demote_rate")


class StorageConfig(_Section, frozen=True, kw_only=True):
    kind: Literal["none", "memory", "mooncake"] = "none"
    """`memory` is a dictionary inside this process, for tests and trials."""
    write: Literal["through", "eviction", "never"] = "through"
    """`through`: every stored chunk, in the background. `eviction`: the coldest ones, when the pool runs full."""
    queue: ByteSize = ByteSize(1 * 2**30)
    """Bytes that may wait for the background writer; beyond it writes are dropped and counted."""
    deadline: float = 5.0
    """Seconds after which reading from the tier gives up: a miss. A look-up gets a fifth of it."""
    promote: bool = False
    """Whether chunks read from storage are put into the pool as well."""
    options: dict[str, str] = {}
    """Passed to the tier's implementation."""

    def __post_init__(self) -> None:
        self._require(0, _FOREVER, "queue", "deadline", above=True)


class TransferConfig(_Section, frozen=True, kw_only=True):
    grid: int = 0
    """Programs of the CUDA mover's launch; 0 = chosen for the link."""
    threads: int = 2
    """Threads for asynchronous transfers on CPU."""
    floor_gbps: float = 0.0
    """Warn when a transfer of 16 MiB or more runs below this many GB/s; 0 = off."""
    staging: ByteSize = ByteSize(384 * 2**20)
    """VRAM through which copy engines move host memory, taken at the first such transfer; 0 = kernels move it in place."""

    def __post_init__(self) -> None:
        self._require(0, _FOREVER, "grid", "floor_gbps", "staging")
        self._require(1, 1024, "threads")


class VCacheConfig(_Section, frozen=True, kw_only=True):
    """Everything an engine, lender or manager can be told. Immutable. `VCacheConfig()` is a working embedded set-up."""

    manager: ManagerConfig = ManagerConfig()
    segment: SegmentConfig = SegmentConfig()
    cache: CacheConfig = CacheConfig()
    storage: StorageConfig = StorageConfig()
    transfer: TransferConfig = TransferConfig()

    @classmethod
    def from_file(cls, path: str | Path, *, env: Mapping[str, str] | None = None, **overrides: Any) -> VCacheConfig:
        """Read YAML, then environment, then `overrides` (`section=dict(key=value)`)."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"config file {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path}: not valid YAML ({' '.join(str(error).split())})") from None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise ConfigError(f"config file {path}: expected sections with keys, got {type(data).__name__}")
        return cls._build(str(path), data, os.environ if env is None else env, overrides)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **overrides: Any) -> VCacheConfig:
        """`VCACHE_CONFIG` names a file to start from, when set."""
        env = os.environ if env is None else env
        if env.get("VCACHE_CONFIG"):
            return cls.from_file(env["VCACHE_CONFIG"], env=env, **overrides)
        return cls._build("environment", {}, env, overrides)

    @classmethod
    def _build(cls, source: str, data: dict[str, Any], env: Mapping[str, str], overrides: dict[str, Any]) -> VCacheConfig:
        merged: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for where, layer in ((source, data), ("environment", _from_environment(env)), ("arguments", overrides)):
            for section, values in layer.items():
                if isinstance(values, msgspec.Struct):
                    values = msgspec.structs.asdict(values)
                if not isinstance(values, dict):
                    raise ConfigError(f"{where}: {section}: expected keys with values, got {values!r}")
                known = sections().get(str(section))
                if known is None:
                    raise ConfigError(f"{where}: unknown section '{section}'; known: {', '.join(sections())}")
                for key in values:
                    if key not in known.__struct_fields__:
                        raise ConfigError(
                            f"{where}: unknown key '{section}.{key}'; known: {', '.join(known.__struct_fields__)}"
                        )
                    origin[f"{section}.{key}"] = where
                hints = get_type_hints(known)
                # YAML reads an unquoted `off` as False.
                plain = {
                    key: "off" if value is False and "off" in get_args(hints[key]) else value for key, value in values.items()
                }
                merged.setdefault(section, {}).update(plain)
        try:
            return decode(merged, cls)
        except ConfigError as error:
            key = re.match(r"\w+\.\w+", str(error))
            raise ConfigError(f"{origin.get(key[0], source) if key else source}: {error}") from None


def sections() -> dict[str, type[msgspec.Struct]]:
    """Section name -> its struct, for documentation and the environment."""
    return get_type_hints(VCacheConfig)


def _from_environment(env: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for section, kind in sections().items():
        prefix = f"VCACHE_{section.upper()}_"
        for name, value in env.items():
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix).lower()
            if key not in kind.__struct_fields__:
                raise ConfigError(
                    f"environment: {name}: unknown key '{section}.{key}'; known: {', '.join(kind.__struct_fields__)}"
                )
            found.setdefault(section, {})[key] = _parse_mapping(name, value) if key == "options" else value
    return found


def _parse_mapping(name: str, value: str) -> dict[str, Any]:
    try:
        parsed = msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        raise ConfigError(f"environment: {name}: expected a JSON object ({error})") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"environment: {name}: expected a JSON object, got {value!r}")
    return parsed


def decode(data: Mapping[str, Any], kind: type[T]) -> T:
    """Make a struct of plain data, as files and environment hold it. Raises `ConfigError`; its text begins with the key.

    msgspec says "... - at `$.segment.size`", with the key at the end; what a struct checks itself names its key already.
    """
    try:
        return msgspec.convert(data, kind, strict=False, dec_hook=_decode_size)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        path = path.rstrip("`")
        raise ConfigError(text if not path or text.startswith(f"{path}.") else f"{path}: {text}") from None


def _decode_size(kind: type, value: Any) -> Any:
    if kind is ByteSize:
        return ByteSize.parse(value)
    raise NotImplementedError(kind)


def _section_name(section: msgspec.Struct) -> str:
    return next(name for name, kind in sections().items() if isinstance(section, kind))
