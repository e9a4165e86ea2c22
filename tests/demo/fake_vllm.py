"""Stands for a vLLM server with the connector: same socket, same URLs, same counters; no model. Not a test.

The pool is a file that all fakes share: a line for each prefix stored. `FAKE_*` variables make it faulty.
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

CHUNK = 256
POOL = Path(os.environ.get("FAKE_POOL", "/dev/null"))
FAULT = os.environ.get("FAKE_FAULT", "")
counters = {"prefix_cache_queries": 0, "prefix_cache_hits": 0, "external_prefix_cache_hits": 0}
counters |= {f"vcache_{name}": 0 for name in ("hit_tokens", "loads", "load_tokens", "load_bytes", "load_seconds")}
own: set[str] = set()


def answer(request: dict[str, Any]) -> tuple[str, int]:
    words = request["messages"][0]["content"].split()
    whole = len(words) // CHUNK * CHUNK
    key = request.get("cache_salt", "") + " ".join(words[:whole])
    counters["prefix_cache_queries"] += len(words)
    stored = POOL.read_text().splitlines() if POOL.exists() else []
    if whole and key in own:
        counters["prefix_cache_hits"] += whole
    elif whole and key in stored and FAULT != "off":
        counters["external_prefix_cache_hits"] += whole
        counters["vcache_hit_tokens"] += whole
        counters["vcache_loads"] += 1
        counters["vcache_load_tokens"] += 0 if FAULT == "load" else whole
        counters["vcache_load_bytes"] += whole * 1000
        counters["vcache_load_seconds"] += 0.25  # type: ignore[assignment]
        if FAULT == "text":
            return "something else", len(words)
    elif FAULT != "off":
        with POOL.open("a") as file:
            file.write(f"{key}\n")
    own.add(key)
    return f"the answer to {words[-1]}", len(words)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/metrics":
            lines = [f'vllm:{name}_total{{engine="0",model_name="demo"}} {float(value)}' for name, value in counters.items()]
            self.reply("\n".join(["# HELP vllm:prefix_cache_hits_total x", *lines]).encode())
        else:
            self.reply({"/health": b""}[self.path])

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply(json.dumps({"count": len(request["prompt"].split())}).encode())
            return
        if "die" in request["messages"][0]["content"]:
            print("ValueError: told to die", file=sys.stderr, flush=True)
            os._exit(7)
        if "refuse" in request["messages"][0]["content"]:
            self.reply(b'{"error":"too long"}', 400)
            return
        text, tokens = answer(request)
        self.send_response(200)
        self.end_headers()
        pieces = [{"delta": {"role": "assistant", "content": ""}}]
        pieces += [{"delta": {"content": word + " "}, "token_ids": [len(word)]} for word in text.split()]
        # As vLLM does: the prompt's tokens in the first event only.
        prompt = {"prompt_token_ids": [len(word) for word in request["messages"][0]["content"].split()]}
        for number, piece in enumerate(pieces):
            self.event({"choices": [piece], "usage": None} | ({} if number else prompt))
        self.event({"choices": [], "usage": {"prompt_tokens": tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def reply(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    print(json.dumps(sys.argv), file=sys.stderr, flush=True)
    # As vLLM has: a process of its own behind the server.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with Server(sys.argv[sys.argv.index("--uds") + 1], Handler) as server:
        server.serve_forever()
