"""HTTP over a unix socket, as far as a vLLM server needs it: no port to reserve, and nobody else's business.

By hand, because no client library is in every environment with a vLLM: releases bring httpx, or httpx2, or both.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from . import DemoError


class UnixConnection(http.client.HTTPConnection):
    """One connection to a server that listens on a unix socket. `timeout`: seconds of silence before `TimeoutError`."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(path: Path, url: str, timeout: float = 10.0) -> str:
    """Body of the answer. Raises `OSError` when nobody answers, `DemoError` when it is not a 200."""
    with closing(UnixConnection(path, timeout)) as connection:
        connection.request("GET", url)
        return _body(connection.getresponse(), url)


def post(path: Path, url: str, body: Any, timeout: float = 10.0) -> Any:
    """Send and receive JSON. Raises like `get`."""
    with closing(UnixConnection(path, timeout)) as connection:
        _send(connection, url, body)
        return msgspec.json.decode(_body(connection.getresponse(), url))


def stream(path: Path, url: str, body: Any, timeout: float) -> Iterator[Any]:
    """Send JSON; yield the data of each server-sent event as it arrives. Raises like `get`."""
    with closing(UnixConnection(path, timeout)) as connection:
        _send(connection, url, body)
        response = connection.getresponse()
        if response.status != 200:
            _body(response, url)
        for line in response:
            data = line.strip().removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield msgspec.json.decode(data)


def _send(connection: UnixConnection, url: str, body: Any) -> None:
    connection.request("POST", url, msgspec.json.encode(body), {"Content-Type": "application/json"})


def _body(response: http.client.HTTPResponse, url: str) -> str:
    text = response.read().decode(errors="replace")
    if response.status != 200:
        raise DemoError(f"{url} answered {response.status}: {' '.join(text.split())[:300]}")
    return text
