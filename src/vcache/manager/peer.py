"""One client's connection at the manager: bytes to frames, hello, back-pressure, and the packed verbs."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..errors import ManagerRefusedError, ProtocolError, VCacheError
from . import protocol
from .connection import peer_uid
from .messages import Push

if TYPE_CHECKING:
    from .service import Service

logger = logging.getLogger("vcache.manager")

_HELLO_FRAME = 8192
"""Bytes of the largest frame accepted before hello: a stranger gets no more memory than that."""
_FLUSH = 2**18
"""Bytes of replies gathered before they are written, and checked against back-pressure."""
_HIGH_WATER = 2**20
_TURN_SECONDS = 0.0005
"""How long the requests of one peer that lie ready are answered before it is the others' turn."""
_LINGER = 1.0
"""Seconds that the last words to a peer may take."""
_DECODERS: Mapping[int, Callable[[bytes | bytearray], Any]] = {
    protocol.ACQUIRE: protocol.decode_acquire,
    protocol.LOOKUP: protocol.split_keys,
    protocol.RELEASE: protocol.decode_lease,
    protocol.CALL: protocol.decode_request,
}


class Peer(asyncio.Protocol):
    """Runs on the manager's loop only. Whatever its bytes are, at worst this one connection ends, with one line in the log.

    A peer that does not read its replies is not read from either; when it has not caught up within half the session timeout,
    or what waits for it outgrows the limit, it is disconnected.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._transport: asyncio.Transport | None = None
        self._buffer = protocol.FrameBuffer(min(_HELLO_FRAME, service.max_frame))
        self._where = "?"
        self._paused = False
        self._draining = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Handle | None = None
        """Set while frames wait for this peer's next turn; nothing is read from it then."""
        self.client = b""
        """Client id after hello; empty before, and again once the session is over."""
        self.name = ""

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._service.peers.add(self)
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
        self._arm(self._service.session_timeout, lambda: self.reject(ProtocolError("no hello in time")))

    def data_received(self, data: bytes) -> None:
        if not self._closing:
            self._buffer.feed(data)
            if self._turn is None:
                self._drain()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._turn is not None:
            self._turn.cancel()
        self._closing = True
        self._transport = None
        self._service.peer_gone(self)

    def pause_writing(self) -> None:
        self._paused = True
        if self._transport is not None and not self._closing:
            self._transport.pause_reading()
            self._arm(self._service.session_timeout / 2, self._too_slow)

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None and not self._closing:
            self._disarm()
            if self._turn is None:
                self._next_turn()

    # -- for the service ---------------------------------------------------------------------------------------------

    def push(self, push: Push) -> None:
        self.send(protocol.frame(0, protocol.PUSH, protocol.encode_push(push)))

    def reply(self, request: int, payload: bytes) -> None:
        self.send(self._reply(request, payload))

    def refuse(self, request: int, error: VCacheError) -> None:
        self.send(protocol.frame(request, protocol.ERROR, protocol.encode_error(error)))

    def send(self, data: bytes) -> None:
        """Write, unless too much waits already: then the peer is too slow and is disconnected."""
        transport = self._transport
        if transport is None or self._closing:
            return
        if transport.get_write_buffer_size() + len(data) > _HIGH_WATER + 2 * self._service.max_frame:
            self._too_slow()
        else:
            transport.write(data)

    def close(self, reason: VCacheError | None = None) -> None:
        """Say why, if there is a reason, and close. What is already written still goes out, for a second at most."""
        transport = self._transport
        if self._closing or transport is None:
            return
        if reason is not None and not self._paused:
            transport.write(protocol.frame(0, protocol.ERROR, protocol.encode_error(reason)))
        self._closing = True
        self._disarm()
        transport.close()
        self._timer = asyncio.get_running_loop().call_later(_LINGER, transport.abort)

    def reject(self, reason: VCacheError) -> None:
        """Close for a fault of the peer: counted, and logged once."""
        if not self._closing:
            self._service.count("connections_rejected")
            logger.warning("connection of %s closed: %s", self, reason)
            self.close(reason)

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
                    if self._paused or self._closing:
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
        self._service.settle()

    def _await_turn(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()
        self._turn = asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """Go on where the last turn, or the peer's own slowness, made us stop."""
        self._turn = None
        if self._transport is not None and not self._closing:
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
        decode = _DECODERS.get(code)
        if decode is None:
            raise ProtocolError(f"unknown verb {code}")
        return self._perform(request, code, decode(payload))

    def _perform(self, request: int, code: int, body: Any) -> bytes:
        """`body`: what the decoder of `code` gave."""
        service = self._service
        try:
            if code == protocol.ACQUIRE:
                return self._reply(request, service.acquire(self.client, body.keys, body.shard, body.lease))
            if code == protocol.LOOKUP:
                return self._reply(request, service.lookup(self.client, body))
            if code == protocol.RELEASE:
                service.release(self.client, body)
                return b""
            answer = service.call(self, request, body)
            return b"" if answer is None else self._reply(request, answer)
        except VCacheError as error:
            refusal: VCacheError = error
        except Exception:
            logger.exception("a request of %s failed inside the manager", self)
            refusal = service.failure()
        return b"" if code == protocol.RELEASE else protocol.frame(request, protocol.ERROR, protocol.encode_error(refusal))

    def _reply(self, request: int, payload: bytes) -> bytes:
        if len(payload) + protocol.HEADER_BYTES > self._service.max_frame:
            refusal = ManagerRefusedError(f"an answer of {len(payload)} bytes exceeds manager.max_frame; ask for less at once")
            return protocol.frame(request, protocol.ERROR, protocol.encode_error(refusal))
        return protocol.frame(request, protocol.OK, payload)

    def _hello(self, request: int, code: int, payload: bytes | bytearray) -> bytes:
        if code != protocol.HELLO:
            raise ProtocolError("the first frame must be a hello")
        hello = protocol.decode_hello(payload)
        token = self._service.token
        if token and not hmac.compare_digest(token, hello.token):
            self.reject(ManagerRefusedError("wrong token; set manager.token_file or VCACHE_TOKEN to the manager's secret"))
            return b""
        self._disarm()
        self.name = hello.name
        try:
            answer = self._service.hello(self, hello)
        except VCacheError as error:
            self.reject(error)
            return b""
        self.client = hello.client
        self._buffer.max_frame = self._service.max_frame
        return self._reply(request, answer)

    # -- slow peers --------------------------------------------------------------------------------------------------

    def _arm(self, delay: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(delay, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._service.count("slow_peers")
        logger.warning("connection of %s closed: it does not read what it is sent", self)
        self._closing = True
        self._disarm()
        if self._transport is not None:
            self._transport.abort()
