"""Ways of sharing KV between vLLM instances, as command lines: what each gets of the same VRAM and the same host memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

from ..config import ByteSize, TransferConfig
from ..errors import ArgumentError, ConfigError

Way = Literal["none", "native", "lmcache", "vcache"]
WAYS: tuple[Way, ...] = get_args(Way)
MODEL = "bench"
"""The name under which a started server offers the model."""
SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs."""
_GIB = 2**30
_LMCACHE_CHUNK = 256


class Setup(NamedTuple):
    """What is started, whichever way it shares."""

    model: str
    instances: int
    kv_memory: int
    """Bytes for KV in all: the caches of the instances, and VRAM lent to the pool."""
    host_memory: int
    """Bytes of host memory for KV in all, for the ways that use it."""
    pool_memory: int
    """Of `kv_memory`, what VCache lends; the instances have so much less."""
    max_model_len: int
    devices: tuple[str, ...]
    """GPUs, as `CUDA_VISIBLE_DEVICES` names them; instances take them in turn. Empty: a CPU."""
    serve_args: tuple[str, ...] = ()
    """Further arguments of every server."""
    vcache_options: Mapping[str, Any] = {}
    """Further `kv_connector_extra_config` of VCache."""

    def check(self) -> None:
        """Raises `ArgumentError` when the pool leaves nothing to the instances."""
        if not 0 <= self.pool_memory < self.kv_memory:
            raise ArgumentError(f"a pool of {self.pool_memory} bytes leaves nothing of {self.kv_memory} to the instances")
        if self.instances < 1:
            raise ArgumentError("at least one instance")

    def used_devices(self) -> tuple[str, ...]:
        return self.devices[: self.instances]


class Split(NamedTuple):
    """Bytes for KV under one way."""

    engine: int
    """Each instance's own cache."""
    engine_host: int = 0
    """Host memory of each instance."""
    shared_host: int = 0
    """Host memory that all share."""
    shared_vram: int = 0
    """VRAM that all share, on each GPU in use."""


def chosen_ways(names: Sequence[str]) -> list[Way]:
    """The ways of these names, all if there is none. Raises `ArgumentError` for an unknown one."""
    if unknown := [name for name in names if name not in WAYS]:
        raise ArgumentError(f"--way {unknown[0]}: must be one of {', '.join(WAYS)}")
    return [way for way in WAYS if not names or way in names]


def option(text: str) -> tuple[str, Any]:
    """Take `key=value`; the value is JSON, or else the text itself. Raises `ArgumentError`."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ArgumentError(f"{text!r}: an option is KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def split(way: Way, setup: Setup) -> Split:
    """Divide the memory: the same VRAM for all ways, the same host memory for all but `none`."""
    whole = setup.kv_memory // setup.instances
    match way:
        case "none":
            return Split(whole)
        case "native":
            return Split(whole, engine_host=setup.host_memory // setup.instances)
        case "lmcache":
            # Its server takes whole GiB.
            return Split(whole, shared_host=setup.host_memory // _GIB * _GIB)
        case "vcache":
            own = (setup.kv_memory - setup.pool_memory) // setup.instances - staging(setup)
            lent = setup.pool_memory // max(1, len(setup.used_devices()))
            return Split(own, shared_host=setup.host_memory, shared_vram=lent)


def staging(setup: Setup) -> int:
    """Bytes of VRAM that VCache takes in each instance to reach host memory: they are not the instance's own."""
    if not setup.devices or not setup.host_memory:
        return 0
    wanted = setup.vcache_options.get("transfer.staging")
    return int(TransferConfig().staging if wanted is None else ByteSize.parse(wanted))


def unavailable(way: Way, setup: Setup) -> str:
    """Say in one line why a way cannot be tried here; empty if it can."""
    if way == "lmcache" and find_spec("lmcache") is None:
        return "not installed here (pip install lmcache)"
    if way == "lmcache" and setup.host_memory < _GIB:
        return "its server takes whole GiB of host memory, and there is less than one"
    return ""


def require_vllm() -> None:
    """Raises `ConfigError` when this Python has no vLLM."""
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed in this environment; install it, or name servers that run with --url")


def connector(way: Way, setup: Setup, *, address: str = "", port: int = 0) -> dict[str, Any] | None:
    """`--kv-transfer-config` of a way. `address`: VCache's manager; `port`: LMCache's server."""
    # The same for all: a load that fails costs a computation, not the request.
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    extra: dict[str, Any]
    match way:
        case "none":
            return None
        case "native":
            name, extra = "OffloadingConnector", {"cpu_bytes_to_use": split(way, setup).engine_host}
        case "lmcache":
            name, extra = "LMCacheMPConnector", {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        case "vcache":
            common["kv_connector_module_path"] = "vcache.integrations.vllm.connector"
            # Answers are part of the next prompt: they are worth saving.
            name = "VCacheConnector"
            extra = {"address": address, "segment.lend": False, "save_decoded": True, **setup.vcache_options}
    return {"kv_connector": name, **common, "kv_connector_extra_config": extra}


def arguments(setup: Setup, socket: str, kv_bytes: int, transfer: Mapping[str, Any] | None) -> list[str]:
    """Arguments of a server on a unix socket that keeps `kv_bytes` of KV.

    The utilization is then only what must be free when an instance starts; it limits nothing.
    """
    memory = ["--gpu-memory-utilization", "0.1"] if setup.devices else []
    return [
        *("--model", setup.model, "--served-model-name", MODEL, "--uds", socket),
        *("--max-model-len", str(setup.max_model_len), "--kv-cache-memory-bytes", str(kv_bytes), *memory),
        *(() if transfer is None else ("--kv-transfer-config", json.dumps(transfer))),
        *setup.serve_args,
    ]


def environment(setup: Setup, number: int) -> dict[str, str]:
    """What instance `number` (from 0) finds in its environment besides the user's."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false", "TOKENIZERS_PARALLELISM": "false"}
    if setup.devices:
        return quiet | {"CUDA_VISIBLE_DEVICES": setup.devices[number % len(setup.devices)]}
    return quiet | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}


def lmcache_server(setup: Setup, port: int, http_port: int) -> Sequence[str]:
    """Arguments of `lmcache`: a server over all of the host memory, which all instances share."""
    return [
        *("server", "--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(http_port)),
        *("--chunk-size", str(_LMCACHE_CHUNK), "--l1-size-gb", str(split("lmcache", setup).shared_host // _GIB)),
        *("--eviction-policy", "LRU", "--no-l1-use-lazy", "--max-workers", "4"),
    ]
