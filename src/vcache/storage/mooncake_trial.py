"""Does a Mooncake store work? Tried out in a process of its own, because Mooncake's `setup` holds the interpreter lock.

With a master that accepts connections and then says nothing, `setup` stops every thread of its process, for up to 90
seconds. An engine must not risk that: it first lets a child do it, which can be killed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from ..errors import StorageError
from .mooncake_options import MooncakeOptions, load_store

_VALUE = b"vcache trial"


def try_store(options: MooncakeOptions, timeout: float, *, transfer: bool = False) -> None:
    """Join the store in a child process; with `transfer`, also put, get and remove a small value.

    Blocks up to `timeout` seconds. Raises `StorageError` with the reason when anything fails.
    """
    command = [sys.executable, "-m", __name__, msgspec.json.encode(options._asdict()).decode(), str(int(transfer))]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False, env=_environment()
        )
    except subprocess.TimeoutExpired:
        raise StorageError(f"mooncake: the master at {options.master} did not answer within {timeout:g} s") from None
    if done.returncode:
        said = next((line for line in done.stdout.splitlines() if line.startswith("mooncake: ")), "")
        raise StorageError(said or f"mooncake: the trial ended with {done.returncode}: {' '.join(done.stderr.split()[-30:])}")


def _environment() -> dict[str, str]:
    """Ours, with the package findable where it is not installed."""
    path = [entry for entry in sys.path if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _trial(options: MooncakeOptions, transfer: bool) -> str:
    """Empty when it works, else the reason."""
    store = load_store()()
    code = options.setup(store)
    if code:
        return f"mooncake: cannot join the store of master {options.master} (error {code})"
    if not transfer:
        return ""
    key = f"{options.prefix}/trial/{os.getpid()}"
    code = store.put(key, _VALUE)
    if code == -200:
        return "mooncake: no room: nobody lends memory to the store, or it is full"
    if code:
        return f"mooncake: a put failed (error {code})"
    got = store.get(key)
    store.remove(key, True)
    return "" if got == _VALUE else "mooncake: a get did not return what was put"


if __name__ == "__main__":
    found = _trial(MooncakeOptions(**msgspec.json.decode(sys.argv[1])), sys.argv[2] == "1")
    print(found, flush=True)
    os._exit(bool(found))  # no clean-up: Mooncake's would wait for the master
