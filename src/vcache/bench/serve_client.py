"""A client of OpenAI completions that takes the times: streams over TCP, TLS or a unix socket, many at once in one thread.

By hand, because no client library is in every environment with a vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from ..errors import ArgumentError, VCacheError
from .serve_load import Request

SILENCE = 600.0
"""Seconds without a byte after which a server counts as hung."""
_SHORT = 10.0
_EXCERPT = 300


class ServerError(VCacheError):
    """A server is gone, silent, or refused a request."""


class RefusedError(ServerError):
    """A server answered with anything but a 200."""


class Endpoint(NamedTuple):
    """Where a server listens: `socket`, a path, or `host` and `port`."""

    url: str
    host: str = ""
    port: int = 0
    tls: bool = False
    socket: str = ""
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Take `http://host:port`, `https://...` or `unix:///path`; a final `/v1` may be there. Raises `ArgumentError`."""
        parts = urlsplit(url)
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme == "unix" and parts.path:
            return cls(url, socket=parts.path)
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ArgumentError(f"{url!r} is no URL of a server, such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        return cls(url, parts.hostname, port or (443 if tls else 80), tls, "", prefix)


class Sample(NamedTuple):
    """What one request took, in seconds."""

    turn: int
    prompt_tokens: int
    answer: list[int]
    """Token ids; empty if the server does not tell them."""
    tokens: int
    """Generated."""
    first: float
    """From sending the request to the first token."""
    gaps: list[float]
    """Between the events that brought tokens, one or more each."""


async def complete(endpoint: Endpoint, model: str, request: Request, silence: float = SILENCE) -> Sample:
    """Send one request and read its stream to the end. Raises `ServerError`."""
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    answer: list[int] = []
    times: list[float] = []
    counted, done = 0, False
    began = time.perf_counter()
    async with aclosing(_lines(endpoint, "POST", "/v1/completions", msgspec.json.encode(body), silence)) as lines:
        async for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                break
            event = _decode(endpoint, data)
            if error := event.get("error"):
                raise ServerError(f"{endpoint.url}: {error}")
            for choice in event.get("choices") or ():
                ids = choice.get("token_ids") or []
                if ids or choice.get("text"):
                    times.append(time.perf_counter())
                answer += ids
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if not done:
        raise ServerError(f"{endpoint.url} closed the connection amid an answer")
    if not times:
        raise ServerError(f"{endpoint.url} answered with no token")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    tokens = len(answer) or counted or len(times)
    return Sample(request.turn, len(request.prompt), answer, tokens, times[0] - began, gaps)


async def get(endpoint: Endpoint, path: str) -> str:
    """Body of an answer. Raises `ServerError`."""
    async with aclosing(_lines(endpoint, "GET", path, b"", _SHORT)) as lines:
        return "\n".join([line.decode(errors="replace") async for line in lines])


async def first_model(endpoint: Endpoint) -> str:
    """Name of the first model that a server offers. Raises `ServerError`."""
    models = _decode(endpoint, (await get(endpoint, "/v1/models")).encode()).get("data") or []
    if not models:
        raise ServerError(f"{endpoint.url} offers no model")
    return str(models[0]["id"])


def _decode(endpoint: Endpoint, data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ServerError(f"{endpoint.url} sends no JSON: {error}") from None


async def _lines(endpoint: Endpoint, method: str, path: str, body: bytes, silence: float) -> AsyncGenerator[bytes, None]:
    """Lines of the body as they arrive. Raises `ServerError` when it is not a 200, nobody answers, or nobody says anything for
    `silence` seconds. Closes the connection at its end, however it ends."""
    try:
        async with aclosing(_body(endpoint, method, path, body, silence)) as pieces:
            rest = b""
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield line
            if rest:
                yield rest
    except TimeoutError:
        raise ServerError(f"{endpoint.url} said nothing for {silence:.0f} s") from None
    except (OSError, EOFError, ValueError) as error:
        raise ServerError(f"{endpoint.url}: {type(error).__name__}: {error}") from None


async def _body(endpoint: Endpoint, method: str, path: str, body: bytes, silence: float) -> AsyncGenerator[bytes, None]:
    try:
        reader, writer = await asyncio.wait_for(_connect(endpoint), _SHORT)
    except TimeoutError:
        raise ConnectionError(f"takes no connection within {_SHORT:.0f} s") from None
    try:
        head = (
            f"{method} {endpoint.prefix}{path} HTTP/1.1\r\nHost: {endpoint.host or 'localhost'}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status, headers = await asyncio.wait_for(_head(reader), silence)
        pieces = _chunks(reader, silence) if "chunked" in headers.get("transfer-encoding", "") else _plain(reader, silence)
        async with aclosing(pieces):
            if status != 200:
                text = b"".join([piece async for piece in pieces]).decode(errors="replace")
                raise RefusedError(f"{endpoint.url}{path} answered {status}: {' '.join(text.split())[:_EXCERPT]}")
            async for piece in pieces:
                yield piece
    finally:
        writer.close()


async def _connect(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if endpoint.socket:
        return await asyncio.open_unix_connection(endpoint.socket)
    return await asyncio.open_connection(endpoint.host, endpoint.port, ssl=endpoint.tls or None)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, their names in lower case. Raises `ValueError` for anything but HTTP."""
    words = (await reader.readline()).split()
    if not words:
        raise ConnectionResetError("closed the connection without an answer")
    if len(words) < 2 or not words[0].startswith(b"HTTP/"):
        raise ValueError(f"no HTTP answer: {b' '.join(words)[:80]!r}")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(words[1]), headers


async def _chunks(reader: asyncio.StreamReader, silence: float) -> AsyncGenerator[bytes, None]:
    while line := await asyncio.wait_for(reader.readline(), silence):
        size = int(line.partition(b";")[0], 16)
        if not size:
            return
        yield await asyncio.wait_for(reader.readexactly(size), silence)
        await reader.readexactly(2)
    raise ConnectionResetError("closed the connection amid an answer")


async def _plain(reader: asyncio.StreamReader, silence: float) -> AsyncGenerator[bytes, None]:
    """Until the server closes, which it was asked to."""
    while piece := await asyncio.wait_for(reader.read(1 << 16), silence):
        yield piece
