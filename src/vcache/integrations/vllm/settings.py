"""`kv_connector_extra_config` -> a `VCacheConfig` for the core and `Options` of the connector itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from ...config import ByteSize, VCacheConfig, decode, sections
from ...errors import ConfigError
from ...sockets import manager_address

SOURCE = "kv_connector_extra_config"


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys of `kv_connector_extra_config` that are not a section of the VCache configuration."""

    config: str = ""
    """A VCache configuration file; default: the one that `VCACHE_CONFIG` names, if any."""
    address: str = ""
    """Short for `manager.address`."""
    autostart: bool = True
    """Start a manager on this host when no address is given and none answers at the default socket."""
    lookup_deadline_ms: float = 100.0
    """The scheduler waits no longer than this for the manager: beyond it, a look-up is a miss."""
    sync_load_budget: ByteSize | None = None
    """Loads of at most this many bytes (per worker) run inside the step instead of beside it. Default: 16 MiB where a failed
    one can be recomputed safely (one worker, V1 runner, no async scheduling), else 0."""
    min_load_tokens: int = 32
    """Do not load fewer tokens than this: computing them is quicker."""
    wait_for_prefill_ms: float | None = None
    """How long a request waits for chunks of its prompt that are not there yet. Default: 200 for `kv_consumer`, which gets a
    request when another instance has just computed its prompt; else 0."""
    save_decoded: bool = False
    """Also save what was generated, not only prompts."""
    save_tail: bool = False
    """Also save the blocks after the last whole chunk of a prompt, as a short chunk: a hit for the same prompt only."""
    weights: str = ""
    """A name for the weights: equal where they are equal. Default: a fingerprint of their files."""
    reset: Literal["clear", "keep"] = "clear"
    """What `reset_prefix_cache(reset_connector=True)`, and going to sleep, do with the shared chunks of this model."""
    load_threads: int = 2
    """Threads of a worker for loads that block: from a storage tier, and all of them on a CPU."""
    vram_reserve: ByteSize = ByteSize(1 * 2**30)
    """Bytes of free VRAM that lending leaves alone, for CUDA graphs and the like."""

    def __post_init__(self) -> None:
        for name, low in (("load_threads", 1), ("min_load_tokens", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.lookup_deadline_ms < 1e6:
            raise ConfigError(f"lookup_deadline_ms: must be above 0, got {self.lookup_deadline_ms}")
        if not 0 <= (self.wait_for_prefill_ms or 0) < 1e6:
            raise ConfigError(f"wait_for_prefill_ms: must be at least 0, got {self.wait_for_prefill_ms}")


class Settings(NamedTuple):
    """All that the two sides of the connector are told."""

    config: VCacheConfig
    """Its `manager.address` names a socket, never `embedded`: scheduler and workers are different processes."""
    options: Options
    autostart: bool
    """Whether to start a manager when none answers: nobody said where one is."""
    sized: bool
    """Whether the user said how much to lend."""


def read_settings(extra: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Settings:
    """Read the settings; later wins: defaults, file, environment, `extra`. Raises `ConfigError`, which names the wrong key.

    `extra` holds option names, section names with a mapping (`"segment": {"size": "8GiB"}`) or dotted keys
    (`"segment.size": "8GiB"`).
    """
    env = os.environ if env is None else env
    options, overrides = _split(extra)
    if options.address:
        overrides.setdefault("manager", {}).setdefault("address", options.address)
    if options.config:
        config = VCacheConfig.from_file(options.config, env=env, **overrides)
    else:
        config = VCacheConfig.from_env(env, **overrides)
    # A size from a file or the environment that happens to equal the default counts as not given.
    sized = config.segment.size != VCacheConfig().segment.size or "size" in overrides.get("segment", {})
    autostart = False
    if config.manager.address == "embedded":
        autostart = options.autostart
        manager = msgspec.structs.replace(config.manager, address=manager_address(config.segment.broker_dir))
        config = msgspec.structs.replace(config, manager=manager)
    return Settings(config, options, autostart, sized)


def _split(extra: Mapping[str, Any]) -> tuple[Options, dict[str, dict[str, Any]]]:
    known = sections()
    own: dict[str, Any] = {}
    overrides: dict[str, dict[str, Any]] = {}
    for key, value in extra.items():
        section, dot, name = key.partition(".")
        if section in known and dot:
            overrides.setdefault(section, {})[name] = value
        elif key in known:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{SOURCE}: {key}: expected an object with keys of this section, got {value!r}")
            overrides.setdefault(key, {}).update(value)
        elif key in Options.__struct_fields__:
            own[key] = value
        else:
            names = ", ".join((*Options.__struct_fields__, *known))
            raise ConfigError(f"{SOURCE}: unknown key {key!r}; known: {names}")
    try:
        return decode(own, Options), overrides
    except ConfigError as error:
        raise ConfigError(f"{SOURCE}: {error}") from None
