"""Engines of vLLM in processes of their own, for tests."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
START = 120.0
CHUNK = 64


def require_vllm() -> None:
    """Skip the module that calls this when its tests cannot run."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this interpreter; make test-vllm", allow_module_level=True)


def connector(address: str, role: str = "kv_both", **extra: Any) -> dict[str, Any]:
    """A `--kv-transfer-config` for a manager."""
    return {
        "kv_connector": "VCacheConnector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "address": address,
            "cache.chunk_size": CHUNK,
            "segment.size": "64MiB",
            "segment.kind": "host",
            "lookup_deadline_ms": 2000,
        }
        | extra,
    }


def managers(address: str) -> list[int]:
    """Processes that serve an address."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if b"serve" in command and address.encode() in command:
            found.append(int(folder.name))
    return found


class EngineProcess:
    """`engine_process.py` as a child. Calls block until it answers or `timeout` seconds are over."""

    def __init__(self, folder: Path, name: str, *arguments: str, **env: str) -> None:
        self.log = folder / f"{name}.log"
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "INFO",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "engine_process.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | settings | env,
                start_new_session=True,
            )

    def call(self, do: str, timeout: float = 60.0, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.answer(timeout)

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout: float) -> Any:
        pipe = self.process.stdout
        assert pipe is not None
        line, deadline = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(pipe.fileno(), 1 << 20) if ready else b""
            if not piece:
                raise AssertionError(f"no answer ({'ended' if ready else 'timeout'}):\n{self.tail()}")
            line += piece
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(f"{answer['error']}\n{self.tail()}")
        return answer["value"]

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """End it and the workers it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
