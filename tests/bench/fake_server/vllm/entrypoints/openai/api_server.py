"""Stands for a vLLM server: OpenAI completions as a stream, `/metrics` with vLLM's counters; no model. Not a test.

A prompt's blocks that it has seen are its own hits. With a connector, blocks that any server of the same run has seen are
hits of that: they are in a file. `FAKE_FAULT` makes it faulty: `connector:fault`, `none:fault` for servers without one.
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

BLOCK = 16
BYTES = 1000
FLAGS = ("--skip-tokenizer-init", "--enforce-eager")
PREFIX = {"VCacheConnector": "vllm:vcache_{}_bytes_total", "OffloadingConnector": "vllm:kv_offload_{}_bytes_total"}
WORDS = {"load": {"VCacheConnector": "load"}, "save": {"VCacheConnector": "save", "OffloadingConnector": "store"}}


class Fake:
    def __init__(self, connector: str = "", pool: Path | None = None, fault: str = "") -> None:
        self.connector, self.pool, self.fault = connector, pool, fault
        self.own: set[int] = set()
        self.counters = dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_hits"), 0)
        self.bytes = {"load": 0, "save": 0}
        self.prompts: list[list[int]] = []
        self.lock = threading.Lock()

    def take(self, prompt: list[int]) -> None:
        """Count what of a prompt is cached, then cache it."""
        with self.lock:
            self.prompts.append(prompt)
            keys = [hash(tuple(prompt[:end])) for end in range(BLOCK, len(prompt) + 1, BLOCK)]
            pooled = set(map(int, self.pool.read_text().split())) if self.pool and self.pool.exists() else set()
            own = next((n for n, key in enumerate(keys) if key not in self.own), len(keys))
            found = next((n for n, key in enumerate(keys) if n >= own and key not in pooled), len(keys)) - own
            found = found if self.connector else 0
            self.counters["prefix_cache_queries"] += len(prompt)
            self.counters["prefix_cache_hits"] += own * BLOCK
            self.counters["external_prefix_cache_hits"] += found * BLOCK
            self.bytes["load"] += found * BLOCK * BYTES
            new = keys[own + found :]
            self.bytes["save"] += len(new) * BLOCK * BYTES if self.connector else 0
            self.own |= set(keys)
            if self.pool and self.connector:
                with self.pool.open("a") as file:
                    file.write("".join(f"{key}\n" for key in new))

    def metrics(self) -> str:
        lines = ["# HELP vllm:prefix_cache_hits_total x", "# TYPE vllm:prefix_cache_hits_total counter"]
        lines += [f'vllm:{name}_total{{engine="0"}} {float(value)}' for name, value in self.counters.items()]
        if self.connector in PREFIX:
            for word, value in self.bytes.items():
                name = PREFIX[self.connector].format(WORDS[word].get(self.connector, word))
                lines.append(f'{name}{{engine="0"}} {float(value)}')
        if self.connector == "VCacheConnector":  # a quarter of what it loads comes from VRAM
            for tier, share in (("vram", 0.25), ("dram", 0.75)):
                lines.append(f'vllm:vcache_load_bytes_{tier}_total{{engine="0"}} {self.bytes["load"] * share}')
            loads = self.counters["external_prefix_cache_hits"] // BLOCK
            lines += [f"vllm:vcache_loads_total {loads}.0", f"vllm:vcache_load_seconds_total {loads * 0.004}"]
        for name, seconds in (("request_queue_time", 0.01), ("request_prefill_time", 0.02), ("time_to_first_token", 0.03)):
            lines += [f"# TYPE vllm:{name}_seconds histogram", f'vllm:{name}_seconds_bucket{{le="+Inf"}} {len(self.prompts)}']
            lines += [
                f"vllm:{name}_seconds_sum {len(self.prompts) * seconds}",
                f"vllm:{name}_seconds_count {len(self.prompts)}",
            ]
        return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.fake.fault != "no metrics":
            self.reply(self.fake.metrics().encode())
        elif self.path == "/v1/models":
            self.reply(json.dumps({"data": [{"id": "the-model"}]}).encode())
        else:
            self.reply(b"", 200 if self.path == "/health" else 404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        fault = self.fake.fault
        if fault == "refuse":
            self.reply(b'{"error": "the prompt is\\n too long"}', 400)
            return
        if fault.startswith("die") and len(self.fake.prompts) >= int(fault.split()[1]):
            print("ValueError: told to die", file=sys.stderr, flush=True)
            os._exit(7)
        self.fake.take(request["prompt"])
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(request["max_tokens"]):
            ids = {} if fault == "no ids" else {"token_ids": [300 + number]}
            self.event({"choices": [{"text": "x", **ids}]})
            if fault == "cut" and number == 1:
                self.close_connection = True
                return
        self.event({"choices": [], "usage": {"completion_tokens": request["max_tokens"]}})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, data: Any) -> None:
        text = f"data: {json.dumps(data)}\n\n".encode()
        self.chunk(text[:9])  # the pieces of a stream end anywhere
        self.chunk(text[9:])

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def reply(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "somebody"

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def main() -> None:
    print(json.dumps(sys.argv), file=sys.stderr, flush=True)
    words = [word for word in sys.argv[1:] if word not in FLAGS]
    options = dict(zip(words[::2], words[1::2], strict=True))
    connector = json.loads(options.get("--kv-transfer-config", '{"kv_connector": ""}'))["kv_connector"]
    way, _, fault = os.environ.get("FAKE_FAULT", "").partition(":")
    fault = fault if way == (connector or "none") else ""
    if fault == "start":
        raise ValueError("this model is not for me")
    if fault == "hang":
        threading.Event().wait()
    # As vLLM has: a process of its own behind the server, which ends when that does.
    behind = [sys.executable, "-c", f"import sys; sys.stdin.read()  # {options['--uds']}"]
    process = subprocess.Popen(behind, stdin=subprocess.PIPE)
    Handler.fake = Fake(connector, Path(options["--uds"]).parent / "pool", fault)
    with UnixServer(options["--uds"], Handler) as server:
        assert process.poll() is None
        server.serve_forever()


if __name__ == "__main__":
    main()
