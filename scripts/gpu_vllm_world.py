"""What the vLLM measurements start: a manager, lenders, and engines of every kind that is compared, each in a process."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import SOURCE, python_path, say
from gpu_vllm_model import SHAPE, TINY

sys.path.insert(0, str(SOURCE))

from gpu_vllm_engine import Engine

from vcache.worker import Worker, WorkerError

MIB, GIB = 2**20, 2**30
TOKEN_BYTES = 128 * 1024
"""KV of one token of the 8B shape in bf16."""
_QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class Service:
    """A process that runs beside the engines; what it says is in `log`."""

    def __init__(self, folder: Path, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=python_path(**env)
            )

    def wait(self, ready: Callable[[], bool], timeout: float) -> None:
        """Poll until `ready()`. Raises `RuntimeError` with the end of the log when it ends before, or takes longer."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start\n{self.tail()}")
            time.sleep(0.05)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


class World:
    """Everything that one run has started, by name; `close` ends it all."""

    def __init__(self, folder: Path, *, tiny: bool, lengths: list[int], graphs: bool = False) -> None:
        """`folder`: for logs, sockets and the model's configuration. `lengths`: prompts to make room for, rising. `graphs`:
        decode with CUDA graphs."""
        self.folder, self.tiny, self.lengths, self.graphs = folder, tiny, lengths, graphs
        self.engines: dict[str, Worker] = {}
        self.services: dict[str, Service] = {}
        self.random = random.Random(20251)
        shape = SHAPE | (TINY if tiny else {})
        self.vocabulary: int = shape["vocab_size"]  # type: ignore[assignment]
        self.model = folder / "model"
        self.model.mkdir(parents=True)
        (self.model / "config.json").write_text(json.dumps(shape))
        self.address = f"unix://{folder}/manager.sock"
        self.chunk = 64 if tiny else 256
        self._ports: dict[str, int] = {}
        self._api: Any = None

    # what runs

    def start_manager(self) -> None:
        self._vcache("manager", self.address, "serve", "--address", self.address)

    def start_lender(self, name: str, nbytes: int, *, kind: str = "cuda", gpu: int = 0) -> None:
        """`kind`: `cuda` or `host`. In the tiny world always `host`."""
        kind, slab = ("host", nbytes) if self.tiny else (kind, 512 * MIB)
        command = ["lend", "--address", self.address, "--kind", kind, "--size", str(nbytes), "--slab-size", str(slab)]
        self._vcache(name, "lending", *command, env=self._sees(gpu))

    def start_lmcache(self, nbytes: int) -> None:
        """LMCache's server over host memory, which several engines share. Raises `RuntimeError` when it does not come up."""
        port, http = free_port(), free_port()
        self._ports["lmcache"] = port
        command = ["lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port), "--chunk-size", "256"]
        command += ["--l1-size-gb", str(nbytes // GIB), "--eviction-policy", "LRU", "--no-l1-use-lazy", "--max-workers", "4"]
        command += ["--http-host", "127.0.0.1", "--http-port", str(http)]
        code = f"import sys; from {command[0]} import main; sys.argv = ['lmcache', *{command[1:]!r}]; sys.exit(main())"
        self._serve("lmcache", [sys.executable, "-c", code], _QUIET, lambda service: _accepts(port), 90)

    def start_engines(self, engines: dict[str, tuple[dict[str, Any] | None, int]], timeout: float = 240.0) -> dict[str, str]:
        """Start engines at the same time: name -> (connector, GPU). Returns why some did not start."""
        failed: dict[str, str] = {}
        for name, (connector, gpu) in engines.items():
            arguments, env = {"options": self.options(), "connector": connector}, python_path(**_QUIET, **self._sees(gpu))
            log = self.folder / f"{name}.log"
            self.engines[name] = Worker(Engine, arguments, name=name, env=env, log=log, grace=5.0)
        deadline = time.monotonic() + timeout
        for name in engines:
            try:
                started = self.engines[name].ready(max(1.0, deadline - time.monotonic())).call(Engine.started)
            except WorkerError as error:
                failed[name] = f"{error}\n{self.engines[name].tail()}"[-2500:]
                say("engine", name, "FAILED:", str(error)[:500])
                self.stop(name)
            else:
                say(f"engine {name} ready after {started:.0f} s")
        return failed

    def stop(self, *names: str) -> None:
        """End engines and services; unknown names are left out."""
        for name in names:
            if (running := self._running(name)) is not None:
                self._keep_log(name, running)
                running.close()
            self.engines.pop(name, None)
            self.services.pop(name, None)

    def close(self) -> None:
        if self._api is not None:
            self._api.close()
        lenders = [name for name in self.services if name not in ("manager", "lmcache")]
        self.stop(*reversed(self.engines), *reversed(lenders), "lmcache", "manager")

    def _keep_log(self, name: str, running: Worker | Service) -> None:
        if self.logs is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                (self.logs / f"{name}.log").write_text(running.tail(400))

    logs: Path | None = None
    """Where the ends of all logs go when what wrote them ends."""

    # how engines are set up

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model": str(self.model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "seed": 0,
            "disable_log_stats": False,
            "max_num_seqs": 64,
        }
        if self.tiny:
            return options | {"dtype": "float32", "max_model_len": 1024, "block_size": 32}
        if self.graphs:  # captured for the number of requests that is measured, without compilation
            compilation = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 32]}
            options |= {"enforce_eager": False, "compilation_config": compilation}
        tokens = self.lengths[-1] + 2048
        return options | {
            "dtype": "bfloat16",
            "max_model_len": tokens,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": 0.1,  # only checked against what is free: the next line decides
            "kv_cache_memory_bytes": max(tokens + 6 * 1024, 44 * 1024) * TOKEN_BYTES,
        }

    def vcache(self, **more: Any) -> dict[str, Any]:
        """`more`: further options of the connector."""
        extra = {
            "address": self.address,
            "cache.chunk_size": self.chunk,
            "segment.lend": False,
            "lookup_deadline_ms": 1000,
        } | more
        return {
            "kv_connector": "VCacheConnector",
            "kv_connector_module_path": "vcache.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }

    def native(self) -> dict[str, Any]:
        """vLLM's own offload to host memory."""
        extra = {"cpu_bytes_to_use": 24 * GIB}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def lmcache(self) -> dict[str, Any]:
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._ports.get("lmcache", 5555)}
        return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    # what is asked of them

    def has(self, *names: str) -> bool:
        return all(self._running(name) is not None for name in names)

    def prompt(self, length: int) -> list[int]:
        """A prompt that no other one shares anything with."""
        return [self.random.randrange(10, self.vocabulary - 10) for _ in range(length)]

    def one(self, name: str, ids: list[int], tokens: int = 1) -> dict[str, Any]:
        return self.engines[name].call(Engine.generate, prompts=[ids], tokens=tokens)

    def offloaded(self, name: str, ids: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """An engine computes a prompt, drops it from its prefix cache, and is asked again: both answers."""
        engine, cold = self.engines[name], self.one(name, ids)
        self.one(name, self.prompt(64), 8)
        engine.call(Engine.settle, pause=0.4)
        if not engine.call(Engine.reset):
            self.one(name, self.prompt(64), 8)
            engine.call(Engine.settle, pause=0.4)
            engine.call(Engine.reset)
        return cold, self.one(name, ids)

    def settle(self, name: str, chunks: int = 0, timeout: float = 15.0) -> bool:
        """Let the engine finish its transfers; with `chunks`, until the pool has got so many more than before the call of
        `mark`. Whether it has."""
        deadline = time.monotonic() + timeout
        while True:
            self.engines[name].call(Engine.settle)
            if not chunks or self._stored() - self._marked >= chunks:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)

    def mark(self) -> None:
        """Remember how many chunks the pool has been given so far."""
        self._marked = self._stored()

    _marked = 0

    def _stored(self) -> int:
        if self._api is None:
            from vcache.config import VCacheConfig
            from vcache.manager.connect import connect

            config = VCacheConfig.from_env({}, manager={"address": self.address})
            self._api = connect(config, name="measure", role="tool", require=True)
        return int(self._api.stats().counters["stored"])

    # helpers

    def _sees(self, gpu: int) -> dict[str, str]:
        return {} if self.tiny else {"CUDA_VISIBLE_DEVICES": str(gpu)}

    def _running(self, name: str) -> Worker | Service | None:
        return self.engines.get(name) or self.services.get(name)

    def _vcache(self, name: str, ready: str, *command: str, env: dict[str, str] | None = None) -> None:
        """Start a `vcache` command; until its output contains `ready`."""
        arguments = [sys.executable, "-m", "vcache.cli", *command]
        self._serve(name, arguments, env or {}, lambda service: ready in service.tail(), 60)

    def _serve(
        self, name: str, command: list[str], env: dict[str, str], ready: Callable[[Service], bool], timeout: float
    ) -> None:
        service = self.services[name] = Service(self.folder, name, command, env)
        service.wait(lambda: ready(service), timeout)


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def gpu_memory() -> int:
    """Bytes of the first GPU; 0 without one. In a process of its own, so that this one holds no context."""
    code = "import torch; print(torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return int(result.stdout.strip() or 0)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.3).close()
    except OSError:
        return False
    return True
