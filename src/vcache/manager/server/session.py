"""One client's connection at the manager: bytes to frames, hello, back-pressure, and its requests."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import cast

from ...errors import ManagerRefusedError, ProtocolError, VCacheError
from ...sockets import peer_uid
from .. import wire
from ..api import Push
from .sessions import OWED, Sessions

logger = logging.getLogger("vcache.manager")

_HELLO_FRAME = 8192
"""Bytes of the largest frame accepted before hello: a stranger gets no more memory than that."""
_FLUSH = 2**18
"""Bytes of replies gathered before they are written, and checked against back-pressure."""
_HIGH_WATER = 2**20
_TURN_SECONDS = 0.0005
"""How long the requests of one peer that lie ready are answered before it is the others' turn."""
_SMALL_FRAME = 2**16
"""Bytes of a frame whose rest may be waited for without being counted."""
_WRONG_TOKEN_SECONDS = 0.25
"""How long a peer with a wrong token waits for the refusal, so that it cannot try many; less than a client's deadline."""
_LINGER = 1.0
"""Seconds that the last words to a peer may take."""


class Session(asyncio.Protocol):
    """Runs on the manager's loop only. Whatever its bytes are, at worst this one connection ends, with one line in the log.

    A client that does not read its replies is not read from either; when it has not caught up within half the session timeout,
    or what waits for it outgrows the limit, it is disconnected.
    """

    def __init__(self, sessions: Sessions) -> None:
        """`sessions`: all of them, to which it adds itself."""
        self._all = sessions
        self._handle, self._clock = sessions.directory.handle, sessions.clock
        self._transport: asyncio.Transport | None = None
        self._buffer = wire.FrameBuffer(min(_HELLO_FRAME, sessions.max_frame))
        self._where = "?"
        self._paused = False
        self._draining = False
        self._closing = False
        self._refused = False
        """It had a wrong token, and will be told so; nothing of what it says counts any more."""
        self._timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Handle | None = None
        """Set while frames wait for this client's next turn; nothing is read from it then."""
        self.client = b""
        """Client id after hello; empty before, and again once the session is over."""
        self.name = ""

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._all.came(self)
        sock: socket.socket = transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            uid = peer_uid(sock)
            self._where = f"user {uid}"
            if uid != os.geteuid():
                self.reject(ManagerRefusedError(f"user {uid} may not use the manager of user {os.geteuid()}"))
                return
        else:
            self._where = str(transport.get_extra_info("peername"))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arm(self._all.session_timeout, lambda: self.reject(ProtocolError("no hello in time")))

    def data_received(self, data: bytes) -> None:
        if not self._closing and not self._refused:
            self._buffer.feed(data)
            if self._turn is None:
                self._drain()
            if not self._closing:
                self._all.waits(self, len(self._buffer) if len(self._buffer) > _SMALL_FRAME else 0)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._turn is not None:
            self._turn.cancel()
        self._closing = True
        self._transport = None
        self._all.gone(self)

    def pause_writing(self) -> None:
        self._paused = True
        if self._transport is not None and not self._closing:
            self._transport.pause_reading()
            self._arm(self._all.session_timeout / 2, self._too_slow)

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None and not self._closing:
            self._disarm()
            if self._turn is None:
                self._next_turn()

    # -- for `Sessions` ------------------------------------------------------------------------------------------------

    def push(self, push: Push) -> None:
        self.send(wire.frame(0, wire.PUSH, wire.encode_push(push)))

    def answer(self, request: int, reply: object) -> None:
        self.send(self._reply(request, wire.CODECS[wire.CALL].encode_reply(reply)))

    def refuse(self, request: int, error: Exception) -> None:
        self.send(self._refusal(request, error))

    def send(self, data: bytes) -> None:
        """Write, unless too much waits already: then the peer is too slow and is disconnected."""
        transport = self._transport
        if transport is None or self._closing:
            return
        if transport.get_write_buffer_size() + len(data) > _HIGH_WATER + 2 * self._all.max_frame:
            self._too_slow()
        else:
            transport.write(data)

    def close(self, reason: VCacheError | None = None) -> None:
        """Say why, if there is a reason, and close. What is already written still goes out, for a second at most."""
        transport = self._transport
        if self._closing or transport is None:
            return
        if reason is not None and not self._paused:
            transport.write(wire.frame(0, wire.ERROR, wire.encode_error(reason)))
        self._closing = True
        self._disarm()
        self._buffer = wire.FrameBuffer(_HELLO_FRAME)
        transport.close()
        self._timer = asyncio.get_running_loop().call_later(_LINGER, transport.abort)

    def reject(self, reason: VCacheError) -> None:
        """Close for a fault of the peer: counted, and logged unless there were many of late."""
        if not self._closing:
            self._all.count("connections_rejected")
            self._log_end(type(reason).__name__, str(reason))
            self.close(reason)

    def _log_end(self, kind: str, reason: str) -> None:
        left_out = self._all.log_throttle.allows(kind)
        if left_out is not None:
            more = f" (and {left_out} more in a similar way since the last such line)" if left_out else ""
            logger.warning("connection of %s closed: %s%s", self, reason, more)

    def __str__(self) -> str:
        return f"{self.name!r} ({self._where})"

    # -- frames ------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Answer complete frames for as long as this turn is, and as the peer takes the answers."""
        if self._draining:
            return
        self._draining = True
        out: list[bytes] = []
        size = 0
        end = time.perf_counter() + _TURN_SECONDS
        try:
            if not self._paused:
                for request, code, payload in self._buffer.frames():
                    answer = self._answer(request, code, payload)
                    if answer:
                        out.append(answer)
                        size += len(answer)
                    if size > _FLUSH:
                        self._write(out)
                        out, size = [], 0
                    if self._paused or self._closing or self._refused:
                        break
                    if time.perf_counter() >= end:
                        self._await_turn()
                        break
        except ProtocolError as error:
            self._write(out)
            out = []
            self.reject(error)
        finally:
            self._draining = False
        self._write(out)
        self._all.settle()

    def _await_turn(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()
        self._turn = asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """Go on where the last turn, or the client's own slowness, made us stop."""
        self._turn = None
        # A peer that takes no answers is not read from: `resume_writing` goes on here.
        if self._transport is not None and not self._closing and not self._paused:
            self._transport.resume_reading()
            self._drain()

    def _write(self, out: list[bytes]) -> None:
        if out and self._transport is not None and not self._closing:
            self._transport.write(b"".join(out))

    def _answer(self, request: int, code: int, payload: bytes | bytearray) -> bytes:
        """The reply frame; empty when there is none, or none yet. Raises `ProtocolError` for what is no request."""
        if not self.client:
            return self._hello(request, code, payload)
        if not request:
            raise ProtocolError("request id 0")
        codec = wire.CODECS.get(code)
        if codec is None:
            raise ProtocolError(f"unknown verb {code}")
        verb = codec.decode(payload)
        try:
            reply = self._handle(self.client, verb, self._clock())
            if code == wire.CALL:
                reply = self._all.finish(self, request, verb, reply)
            if reply is OWED or code == wire.RELEASE:
                return b""
            return self._reply(request, codec.encode_reply(reply))
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, it is this request that failed
            refusal = self._refusal(request, error)
            return b"" if code == wire.RELEASE else refusal

    def _refusal(self, request: int, error: Exception) -> bytes:
        if not isinstance(error, VCacheError):
            logger.error("a request of %s failed inside the manager", self, exc_info=error)
            self._all.count("internal_errors")
            error = ManagerRefusedError("the manager failed at this request; its log has the details")
        return wire.frame(request, wire.ERROR, wire.encode_error(error))

    def _reply(self, request: int, payload: bytes) -> bytes:
        if len(payload) + wire.HEADER_BYTES > self._all.max_frame:
            refusal = ManagerRefusedError(f"an answer of {len(payload)} bytes exceeds manager.max_frame; ask for less at once")
            return wire.frame(request, wire.ERROR, wire.encode_error(refusal))
        return wire.frame(request, wire.OK, payload)

    def _hello(self, request: int, code: int, payload: bytes | bytearray) -> bytes:
        if code != wire.HELLO:
            raise ProtocolError("the first frame must be a hello")
        hello = wire.decode_hello(payload)
        token = self._all.token
        if token and not hmac.compare_digest(token, hello.token):
            refusal = ManagerRefusedError("wrong token; set manager.token_file or VCACHE_TOKEN to the manager's secret")
            self._refused = True
            self._arm(_WRONG_TOKEN_SECONDS, lambda: self.reject(refusal))
            return b""
        self._disarm()
        self.name = hello.name
        try:
            reply = self._all.hello(self, hello)
        except VCacheError as error:
            self.reject(error)
            return b""
        self.client = hello.client
        self._buffer.max_frame = self._all.max_frame
        return self._reply(request, wire.encode_hello_reply(reply))

    # -- slow peers --------------------------------------------------------------------------------------------------

    def _arm(self, delay: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(delay, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._all.count("slow_peers")
        self._log_end("too slow", "it does not read what it is sent")
        self._closing = True
        self._disarm()
        if self._transport is not None:
            self._transport.abort()
