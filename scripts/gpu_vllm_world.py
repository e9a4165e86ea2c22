"""What the vLLM measurements start: a manager, lenders, and engines of every kind that is compared, each in a process."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import ROOT, SOURCE, python_path, say
from gpu_vllm_model import SHAPE, TINY

sys.path.insert(0, str(SOURCE))

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


class Child:
    """A process that answers by lines on its standard output; what it says otherwise is in `log`."""

    def __init__(self, folder: Path, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self._rest = b""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=python_path(**env)
            )

    def write(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def send(self, do: str, **arguments: Any) -> None:
        self.write({"do": do, "with": arguments})

    def line(self, timeout: float) -> str:
        """The next line. Raises `RuntimeError` with the end of the log when none comes."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.process.stdout.fileno(), 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"{self.name}: {'ended' if ready else f'no answer in {timeout:.0f} s'}\n{self.tail()}")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def take(self, timeout: float) -> dict[str, Any]:
        """The next line as JSON. Raises `RuntimeError` when it says that something went wrong."""
        answer: dict[str, Any] = json.loads(self.line(timeout))
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}\n{self.tail(25)}")
        return answer

    def answer(self, timeout: float = 120.0) -> Any:
        return self.take(timeout)["value"]

    def call(self, do: str, timeout: float = 120.0, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.answer(timeout)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


class World:
    """Everything that one run has started. `children` by name; `close` ends them all."""

    def __init__(self, folder: Path, *, tiny: bool, lengths: list[int], graphs: bool = False) -> None:
        """`folder`: for logs, sockets and the model's configuration. `lengths`: prompts to make room for, rising. `graphs`:
        decode with CUDA graphs."""
        self.folder, self.tiny, self.lengths, self.graphs = folder, tiny, lengths, graphs
        self.children: dict[str, Child] = {}
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
        self._module("manager", "vcache.cli", "serve", "--address", self.address)
        self._wait("manager", self.address)

    def start_lender(self, name: str, nbytes: int, *, kind: str = "cuda", gpu: int = 0) -> None:
        """`kind`: `cuda` or `host`. In the tiny world always `host`."""
        kind, slab = ("host", nbytes) if self.tiny else (kind, 512 * MIB)
        command = ["vcache.cli", "lend", "--address", self.address, "--kind", kind, "--size", str(nbytes)]
        self._module(name, *command, "--slab-size", str(slab), env=self._sees(gpu))
        self._wait(name, "lending")

    def start_lmcache(self, nbytes: int) -> None:
        """LMCache's server over host memory, which several engines share. Raises `RuntimeError` when it does not come up."""
        port, http = free_port(), free_port()
        self._ports["lmcache"] = port
        command = ["lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port), "--chunk-size", "256"]
        command += ["--l1-size-gb", str(nbytes // GIB), "--eviction-policy", "LRU", "--no-l1-use-lazy", "--max-workers", "4"]
        command += ["--http-host", "127.0.0.1", "--http-port", str(http)]
        code = f"import sys; from {command[0]} import main; sys.argv = ['lmcache', *{command[1:]!r}]; sys.exit(main())"
        self.children["lmcache"] = Child(self.folder, "lmcache", [sys.executable, "-c", code], _QUIET)
        deadline = time.monotonic() + 90
        while not _accepts(port):
            if self.children["lmcache"].process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"LMCache's server did not start\n{self.children.pop('lmcache').tail()}")
            time.sleep(0.2)

    def start_engines(self, engines: dict[str, tuple[dict[str, Any] | None, int]], timeout: float = 240.0) -> dict[str, str]:
        """Start engines at the same time: name -> (connector, GPU). Returns why some did not start."""
        failed: dict[str, str] = {}
        for name, (connector, gpu) in engines.items():
            command = [sys.executable, str(ROOT / "scripts" / "gpu_vllm_engine.py")]
            self.children[name] = Child(self.folder, name, command, _QUIET | self._sees(gpu))
            self.children[name].send("start", options=self.options(), connector=connector)
        deadline = time.monotonic() + timeout
        for name in engines:
            try:
                started = self.children[name].answer(max(1.0, deadline - time.monotonic()))
            except RuntimeError as error:
                failed[name] = str(error)[-2500:]
                say("engine", name, "FAILED:", str(error)[:500])
                self.keep_log(name)
                self.children.pop(name).end()
            else:
                say(f"engine {name} ready after {started['seconds']:.0f} s")
        return failed

    def stop(self, *names: str) -> None:
        """End children; unknown names are left out."""
        for name in names:
            if name in self.children:
                self.keep_log(name)
                self.children.pop(name).end()

    def close(self) -> None:
        if self._api is not None:
            self._api.close()
        rest = [name for name in self.children if name not in ("manager", "lmcache")]
        self.stop(*reversed(rest), "lmcache", "manager")

    def keep_log(self, name: str) -> None:
        if self.logs is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                (self.logs / f"{name}.log").write_text(self.children[name].tail(400))

    logs: Path | None = None
    """Where the ends of the children's logs go when they end."""

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
        return all(name in self.children for name in names)

    def prompt(self, length: int) -> list[int]:
        """A prompt that no other one shares anything with."""
        return [self.random.randrange(10, self.vocabulary - 10) for _ in range(length)]

    def one(self, name: str, ids: list[int], tokens: int = 1) -> dict[str, Any]:
        found: dict[str, Any] = self.children[name].call("generate", prompts=[ids], tokens=tokens)
        return found

    def settle(self, name: str, chunks: int = 0, timeout: float = 15.0) -> bool:
        """Let the engine finish its transfers; with `chunks`, until the pool has got so many more than before the call of
        `mark`. Whether it has."""
        deadline = time.monotonic() + timeout
        while True:
            self.children[name].call("settle")
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

    def _module(self, name: str, module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.children[name] = Child(self.folder, name, [sys.executable, "-m", module, *arguments], env or {})

    def _wait(self, name: str, ready: str) -> None:
        """Until its output contains `ready`."""
        deadline = time.monotonic() + 60
        while ready not in self.children[name].line(max(0.1, deadline - time.monotonic())):
            continue


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
