"""An object in a process of its own: a parent starts a class there, calls its methods, and is told when it dies.

    worker = Worker(Engine, {"address": address}, name="writer")      # a module-level class; does not wait
    with worker:
        worker.ready()                                                # its constructor is through
        stored = worker.call(Engine.store, prompt=3)                  # blocks; mypy sees arguments and result
        reading = worker.begin(Engine.read_for, seconds=2.0)          # does not block ...
        total = reading.result(timeout=10.0)                          # ... and is waited for

Requests and answers are JSON lines over the child's standard input and output. Arguments and results have the types that the
method is annotated with, as far as msgspec can carry them in JSON; paths too. What the child prints goes to its log, as its
standard error does. It sees the same `sys.path` as its parent. It has a session of its own, so that Ctrl-C reaches the parent
alone, and ends when its standard input does: with its parent, whatever happens to that.
"""

from __future__ import annotations

import inspect
import io
import os
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from types import TracebackType
from typing import IO, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, get_type_hints

import msgspec

from .errors import VCacheError

TIMEOUT = 120.0
GRACE = 10.0
_PIECE = 1 << 20
_WORDS = 400
_ERROR = re.compile(r"\b[A-Za-z]*(Error|Exception)\b.*:")

P = ParamSpec("P")
R = TypeVar("R")


class WorkerError(VCacheError):
    """A worker died, did not answer in time, or its method raised. The text is one line."""


class WorkerFailed(WorkerError):
    """The method raised; the worker goes on. `kind`: name of the exception's class; `text`: what it said, in one line. Its
    traceback is in the worker's log."""

    def __init__(self, worker: str, kind: str, text: str) -> None:
        super().__init__(f"{worker}: {kind}: {text}")
        self.kind, self.text = kind, text


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class _Start(_Message, frozen=True):
    arguments: dict[str, Any]
    path: list[str]
    grace: float


class _Call(_Message, frozen=True):
    number: int
    method: str
    positional: list[Any]
    named: dict[str, Any]


class _Note(_Message, frozen=True):
    value: Any


class _Answer(_Message, frozen=True):
    number: int
    value: Any


class _Failed(_Message, frozen=True):
    number: int
    kind: str
    text: str


def _encoded(message: _Message) -> bytes:
    """As a line. Raises `TypeError` for what JSON cannot carry."""

    def other(value: Any) -> str | int | float:
        if isinstance(value, PurePath | str):
            return str(value)
        if isinstance(value, int | float):  # kinds of them, such as a configuration's sizes
            return int(value) if isinstance(value, int) else float(value)
        raise TypeError(f"{type(value).__name__} is nothing that a worker can say")

    return msgspec.json.encode(message, enc_hook=other) + b"\n"


def _typed(value: Any, kind: Any) -> Any:
    """Raises `msgspec.ValidationError`."""

    def other(kind: type, value: Any) -> Any:
        if issubclass(kind, PurePath):
            return kind(value)
        raise TypeError(f"{kind.__name__} is nothing that a worker can hear")

    return msgspec.convert(value, kind, str_keys=True, dec_hook=other)


class Pending(Generic[R]):
    """A call that was begun."""

    def __init__(self, worker: Worker, number: int, method: str, kind: Any) -> None:
        self._worker, self._number, self._method, self._kind = worker, number, method, kind

    def result(self, timeout: float | None = None, on_note: Callable[[Any], None] = lambda note: None) -> R:
        """Wait for what the method returns; once only. `timeout`: the longest silence in seconds, default that of the worker.
        `on_note` gets what the object tells meanwhile. Raises `WorkerFailed` when the method raised, else `WorkerError`."""
        value = self._worker._wait(self._number, self._method, timeout, on_note)
        found: R = _typed(value, self._kind)
        return found


class Worker:
    """The parent's side. A context manager: the process is gone after it. One thread at a time waits for answers; any may begin
    calls or tell."""

    def __init__(
        self,
        kind: type,
        arguments: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        python: Sequence[str] = (sys.executable,),
        timeout: float = TIMEOUT,
        grace: float = GRACE,
    ) -> None:
        """Start a process and have it make a `kind` of `arguments`. Does not wait for that.

        `env`: its whole environment, default that of this process. `log`: where its words are appended, default a file that
        goes with it. `python`: the command that runs Python there. `timeout`: seconds of silence that a call bears. `grace`:
        seconds that a call and the object's `close` may still take after the input's end."""
        self.name, self.timeout, self.grace = name or kind.__name__, timeout, grace
        self.log = log
        self._log: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("ab+")  # noqa: SIM115 - closed by `kill`
        path = [str(Path(entry).resolve()) for entry in sys.path]
        self._process = subprocess.Popen(
            [*python, "-m", __name__, kind.__module__, kind.__qualname__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**(os.environ if env is None else env), "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        self._writing = threading.Lock()
        self._numbers = 0
        self._made = False
        self._words = ""
        self._rest = b""
        self._answers: dict[int, _Answer | _Failed] = {}
        self._send(_Start(dict(arguments or {}), path, grace), "the start")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ready(self, timeout: float | None = None) -> Self:
        """Wait until the object is made. Raises `WorkerError`, after ending the process, when it cannot be. Idempotent."""
        if not self._made:
            try:
                self._wait(0, "the start", timeout, lambda note: None)
            except WorkerError:
                self.kill()
                raise
        return self

    def call(self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the object and wait for what it returns. Raises as `Pending.result`."""
        return self.begin(method, *args, **kwargs).result()

    def begin(self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        """Have a method called after those that were begun before. Does not wait. Raises `WorkerError` when it is gone."""
        with self._writing:
            self._numbers += 1
            number = self._numbers
        self._send(_Call(number, method.__name__, list(args), dict(kwargs)), method.__name__)
        return Pending(self, number, method.__name__, get_type_hints(method).get("return", Any))

    def tell(self, note: Any) -> None:
        """Say something to the object while a call runs: what `Line.heard` returns there."""
        self._send(_Note(note), "a note")

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log; of a process that was ended, not more than 400."""
        if self._log.closed:
            return "\n".join(self._words.splitlines()[-lines:])
        size = os.fstat(self._log.fileno()).st_size
        words = os.pread(self._log.fileno(), _PIECE, max(0, size - _PIECE)).decode(errors="replace")
        return "\n".join(words.splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL for it and what it started in its process group; returns when it is gone. Idempotent."""
        if not self._log.closed:
            with suppress(ProcessLookupError):  # all of them have ended by themselves
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if not self._log.closed:
            self._words = self.tail(_WORDS)
            self._log.close()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # a request that it did not read any more
                stream.close()

    def close(self) -> None:
        """End its input: it finishes what was begun, closes its object and goes. After the grace, SIGKILL. Idempotent."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self.grace + 1.0)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _send(self, message: _Message, what: str) -> None:
        line = _encoded(message)
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: closed here
            raise self._gone(what) from None

    def _wait(self, number: int, method: str, timeout: float | None, on_note: Callable[[Any], None]) -> Any:
        while number not in self._answers:
            message = msgspec.json.decode(self._line(method, timeout), type=_Note | _Answer | _Failed)
            if isinstance(message, _Note):
                on_note(message.value)
            elif message.number == 0 and isinstance(message, _Failed):
                raise WorkerFailed(self.name, message.kind, message.text)
            else:
                self._answers[message.number] = message
                self._made = True
        answer = self._answers.pop(number)
        if isinstance(answer, _Failed):
            raise WorkerFailed(self.name, answer.kind, answer.text)
        return answer.value

    def _line(self, method: str, timeout: float | None) -> bytes:
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            raise self._gone(method)
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._rest:
            if not poll.poll(1e3 * max(0.0, deadline - time.monotonic())):
                raise WorkerError(
                    f"{self.name} (pid {self.pid}): no answer to {method} within {seconds:g} s; {self._evidence()}"
                )
            piece = os.read(self._process.stdout.fileno(), _PIECE)
            if not piece:
                raise self._gone(method)
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _gone(self, method: str) -> WorkerError:
        with suppress(subprocess.TimeoutExpired):  # it closed its output, and lives: told without a code
            self._process.wait(self.grace)
        code = self._process.poll()
        return WorkerError(f"{self.name} (pid {self.pid}) ended with code {code} during {method}; {self._evidence()}")

    def _evidence(self) -> str:
        """The last error in the log, else its last line."""
        lines = [line.strip() for line in self.tail(200).splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.search(line)]
        return (errors or lines or ["it logged nothing"])[-1] + (f" (log: {self.log})" if self.log is not None else "")


class Line:
    """The object's way to its parent beside answers. A constructor gets it by a parameter annotated with `Line`."""

    def __init__(self, replies: IO[bytes]) -> None:
        self._replies, self._writing = replies, threading.Lock()
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def tell(self, note: Any) -> None:
        """Give the parent's `on_note` something amid a call. Any thread may."""
        self._send(_Note(note))

    def heard(self, timeout: float | None = None) -> Any:
        """The next thing that the parent's `tell` said. Raises `queue.Empty` when there is none for `timeout` seconds."""
        return self._heard.get(timeout=timeout) if timeout is None or timeout > 0 else self._heard.get_nowait()

    def _send(self, message: _Message) -> None:
        line = _encoded(message)
        with self._writing:
            self._replies.write(line)
            self._replies.flush()


class _Served:
    """The object, once it is made."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._object: Any = None

    def make(self, module: str, name: str, arguments: dict[str, Any]) -> None:
        self._object = _call(_found(module, name), [], arguments, self._line)

    def call(self, request: _Call) -> Any:
        if request.method.startswith("_") or not callable(getattr(type(self._object), request.method, None)):
            raise AttributeError(f"{type(self._object).__name__} serves no {request.method!r}")
        return _call(getattr(self._object, request.method), request.positional, request.named)

    def close(self) -> None:
        if callable(close := getattr(self._object, "close", None)):
            close()


def serve(module: str, name: str, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Make the object that the first request asks for, call its public methods until the requests end, then its `close`, if
    any. Blocks. When that takes longer than the grace, the process and its group end by SIGKILL."""
    start = msgspec.json.decode(requests.readline(), type=_Start)
    sys.path[:] = start.path
    line, calls, done = Line(replies), queue.SimpleQueue[_Call | None](), threading.Event()

    def listen() -> None:
        for request in requests:
            message = msgspec.json.decode(request, type=_Call | _Note)
            if isinstance(message, _Note):
                line._heard.put(message.value)
            else:
                calls.put(message)
        calls.put(None)
        if not done.wait(start.grace):
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=listen, name="vcache-worker-requests", daemon=True).start()
    served = _Served(line)
    with suppress(BrokenPipeError):  # the parent is gone: nobody is left to be told
        made = _perform(line, 0, partial(served.make, module, name, start.arguments))
        while made and (call := calls.get()) is not None:
            _perform(line, call.number, partial(served.call, call))
    served.close()
    done.set()


def _perform(line: Line, number: int, work: Callable[[], Any]) -> bool:
    """Answer with what `work` returns, or with what it raises; whether it returned."""
    try:
        line._send(_Answer(number, work()))
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - told to the parent, and to the log
        traceback.print_exc()
        line._send(_Failed(number, type(error).__name__, " ".join(str(error).split())))
        return False
    return True


def _found(module: str, name: str) -> Any:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _call(function: Any, positional: list[Any], named: dict[str, Any], line: Line | None = None) -> Any:
    """Call with arguments of the types that `function` is annotated with. `line`: for parameters of that type."""
    signature = inspect.signature(function)
    hints = get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    lines = {name: line for name in signature.parameters if line is not None and hints.get(name) is Line}
    bound = signature.bind(*positional, **named, **lines)
    for name, value in bound.arguments.items():
        variable = signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if name in hints and name not in lines and not variable:
            bound.arguments[name] = _typed(value, hints[name])
    return function(*bound.args, **bound.kwargs)


def main() -> None:
    """Serve until the input ends. Requests and answers get descriptors of their own, which no process started here inherits."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # or what was printed before a SIGKILL is lost
    serve(sys.argv[1], sys.argv[2], requests, replies)


if __name__ == "__main__":
    from vcache.worker import main as serve_under_its_name  # once only: `Line` must be the one that served classes know

    serve_under_its_name()
