"""Do stores of a killed process still land in memory that another process maps, after the killed one's socket hung up?

usage: python3 scripts/gpu_kill_stores.py [RESULTS.json] [--trials 50] [--budget 170] [--dry-run]      under three minutes

Needs one GPU, `cuda-bindings` and this folder; neither torch nor Triton. `--dry-run` tries the script with stores of a CPU.

A lender frees a writer's slots when that writer's socket hangs up, so no store may land later than it waits. Each trial: this
process owns a slab of VRAM and one of host memory, as `vcache lend` makes them. Another process maps both (the host slab
pinned) and keeps all of them changing by kernels. It is killed with SIGKILL at a random moment; from the moment its socket
hangs up both slabs are read again and again (VRAM by a copy in this process's own context, host memory by the CPU), until
nothing has changed for a while.

    endless   two kernels that never end by themselves, one for each slab, and a hundred more of each queued behind
    backlog   short kernels, queued as fast as the driver takes them
    first     the socket is opened before CUDA: a dead process's descriptors are closed in an order that depends on their
    last      numbers; here the socket's is above all others

`proven`: milliseconds after the hang-up at which a look began that was untrue later: a store landed then, or after it. `quiet`:
when the first look ended that held for good: no store landed later. Both are the latest of all trials.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import itertools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from gpu_parts import SOURCE, machine_facts, say

sys.path.insert(0, str(SOURCE))

from vcache.errors import VCacheError
from vcache.segment.backing import MappedSlab, SlabBacking
from vcache.segment.host import HostBacking

CASES = [(load, order) for load in ("endless", "backlog") for order in ("first", "last")]
BYTES = 2 * 2**20
"""Of each slab: the least that VRAM is mapped in. Small, so that it is read often."""
BLOCKS, THREADS = 132, 256
HIGH_FD = 900
START, HANG_UP, WATCH = 60.0, 20.0, 10.0
"""Seconds after which a trial is given up: until the writer runs, until its socket hangs up, until its stores have ended."""
QUIET, LONG_QUIET, LONG_EACH = 0.5, 3.0, 10
"""Seconds without a change after which a trial ends; in each tenth round more."""
PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry count_up(.param .u64 p_base, .param .u64 p_words, .param .u64 p_value, .param .u64 p_steps)
{
    .reg .pred %p<3>;
    .reg .b32 %r<6>;
    .reg .b64 %d<10>;
    ld.param.u64 %d1, [p_base];
    ld.param.u64 %d2, [p_words];
    ld.param.u64 %d3, [p_value];
    ld.param.u64 %d4, [p_steps];
    cvta.to.global.u64 %d1, %d1;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, %nctaid.x;
    mad.lo.u32 %r5, %r1, %r2, %r3;
    mul.lo.u32 %r2, %r2, %r4;
    cvt.u64.u32 %d5, %r5;
    cvt.u64.u32 %d6, %r2;
    mov.u64 %d7, 0;
again:
    setp.ge.u64 %p1, %d7, %d4;
    @%p1 bra done;
    shl.b64 %d8, %d5, 3;
    add.u64 %d8, %d1, %d8;
    add.u64 %d9, %d3, %d7;
    st.volatile.global.u64 [%d8], %d9;
    add.u64 %d5, %d5, %d6;
    setp.ge.u64 %p2, %d5, %d2;
    @%p2 sub.u64 %d5, %d5, %d2;
    add.u64 %d7, %d7, 1;
    bra again;
done:
    ret;
}
\0"""
"""Every thread stores its own count of steps to one word after the other, around and around."""


class TrialError(Exception):
    """A trial that shows nothing, and why."""


# The process that is killed -----------------------------------------------------------------------------------------------


def writer(number: int, load: str, order: str, dry: bool) -> None:
    """Map the slabs that come over socket `number`, say so, and store until killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays behind
    # The lowest free number, below all that CUDA opens.
    link = socket.socket(fileno=os.dup(number))
    os.close(number)
    _, fds, _, _ = socket.recv_fds(link, 16, 2)
    stores = cpu_stores(fds) if dry else gpu_stores(fds, load)
    next(stores)
    if order == "last":
        high = fcntl.fcntl(link.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
        link.close()
        link = socket.socket(fileno=high)
    link.send(b"ready")
    link.recv(16)
    next(stores)
    link.send(b"running")
    for _ in stores:
        pass
    while True:
        signal.pause()


def gpu_stores(fds: list[int], load: str) -> Iterator[None]:
    """First gets ready; then, for each step, queues two kernels, which store to VRAM `fds[0]` and to host memory `fds[1]`."""
    from vcache.segment.cuda import CudaBacking, PageLock

    backing = CudaBacking()
    pinning = PageLock()
    host = HostBacking(register=pinning.register, unregister=pinning.unregister)
    slabs = [backing.map(fds[0], BYTES), host.map(fds[1], BYTES)]
    call = backing.gpu.driver.call
    image = ctypes.create_string_buffer(PTX)
    with backing.gpu.current():
        function = call("cuModuleGetFunction", call("cuModuleLoadData", ctypes.addressof(image)), b"count_up")
        streams = [call("cuStreamCreateWithPriority", 1, 0) for _ in slabs]
    yield
    # About a millisecond each: host memory takes stores more slowly.
    steps = [2**62, 2**62] if load == "endless" else [4000, 200]
    value = random.getrandbits(32) << 24
    for number in range(100) if load == "endless" else itertools.count():
        with backing.gpu.current():
            for slab, stream, count in zip(slabs, streams, steps, strict=True):
                values = (slab.device_address, BYTES // 8, value + number * 4096, count)
                arguments = (values, (ctypes.c_uint64,) * 4)
                call("cuLaunchKernel", function, BLOCKS, 1, 1, THREADS, 1, 1, 0, stream, arguments, 0)
        yield


def cpu_stores(fds: list[int]) -> Iterator[None]:
    """First gets ready; then fills both slabs anew for each step."""
    backing = HostBacking()
    slabs = [backing.map(fd, BYTES) for fd in fds]
    yield
    for value in itertools.count(1):
        for slab in slabs:
            backing.write(slab, 0, value.to_bytes(8, "little") * (BYTES // 8))
        yield


# The owner ----------------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at one slab again and again. Times are of `time.perf_counter`."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._data: bytes | None = None
        self._began = 0.0
        self.proven: float | None = None
        """When the last look began that was untrue later."""
        self.quiet = 0.0
        """When the first look ended that has been true since."""
        self.looks = 0
        self.longest = 0.0
        """Seconds from the beginning of one look to the end of the next, at most."""

    def look(self) -> bool:
        """Whether something has changed since the look before."""
        began = time.perf_counter()
        data = self._read()
        ended = time.perf_counter()
        first, changed = self._data is None, data != self._data
        if changed:
            self.quiet = ended
            if not first:
                self.proven = self._began
        if not first:
            self.longest = max(self.longest, ended - self._began)
        self._data, self._began = data, began
        self.looks += 1
        return changed and not first


class Writer(NamedTuple):
    load: str
    order: str
    process: subprocess.Popen[bytes]
    link: socket.socket

    def wait(self, word: bytes) -> None:
        self.link.settimeout(START)
        try:
            answer = self.link.recv(16)
        except TimeoutError:
            answer = b"nothing"
        if answer != word:
            raise TrialError(f"the writer does not say {word.decode()!r} within {START:g} s, but {answer.decode()!r}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(HANG_UP)
        self.link.close()


class Slabs:
    """The two that every trial uses, and how they are read. A context manager."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self._stack = ExitStack()
        self._slabs: dict[str, tuple[SlabBacking, MappedSlab]] = {}
        self.fds: list[int] = []
        self.gpu = ""

    def __enter__(self) -> Slabs:
        backings: dict[str, SlabBacking] = {"vram": HostBacking() if self.dry else self._cuda(), "host": HostBacking()}
        for name, backing in backings.items():
            slab = backing.create(BYTES)
            self._slabs[name] = backing, slab
            self.fds.append(slab.fd)
            self._stack.callback(backing.close)
            self._stack.callback(backing.release, slab)
            self._stack.callback(slab.retire)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def watches(self) -> dict[str, Watch]:
        def reader(backing: SlabBacking, slab: MappedSlab) -> Callable[[], bytes]:
            return lambda: backing.read(slab, 0, BYTES)

        return {name: Watch(reader(*found)) for name, found in self._slabs.items()}

    def _cuda(self) -> SlabBacking:
        from vcache.segment.cuda import CudaBacking

        backing = CudaBacking()
        major, minor = backing.gpu.driver.version()
        self.gpu = f"{backing.gpu.name}, CUDA {major}.{minor} of the driver"
        return backing


def start(slabs: Slabs, load: str, order: str) -> Writer:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, "--writer", str(theirs.fileno()), load, order, *["--dry-run"] * slabs.dry]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    socket.send_fds(ours, [b"slabs"], slabs.fds)
    return Writer(load, order, process, ours)


def trial(slabs: Slabs, victim: Writer, quiet: float) -> dict[str, Any]:
    """Let it store, kill it, look. Times in milliseconds after the hang-up. Raises `TrialError`."""
    victim.link.send(b"go")
    victim.wait(b"running")
    deadline = time.perf_counter() + START
    for name, watch in slabs.watches().items():
        while not watch.look():
            if time.perf_counter() > deadline:
                raise TrialError(f"no store lands in {name} while the writer lives")
    time.sleep(random.uniform(0, 0.2))  # a random moment, not a synchronisation
    poll = select.poll()
    poll.register(victim.link, select.POLLIN)
    watches = slabs.watches()
    order = random.sample(sorted(watches), len(watches))
    killed = time.perf_counter()
    victim.process.kill()
    if not poll.poll(HANG_UP * 1000):
        raise TrialError(f"the socket does not hang up within {HANG_UP:g} s of the kill")
    hung_up = time.perf_counter()
    reaped = None
    last = hung_up
    while (now := time.perf_counter()) - last < quiet and now - hung_up < WATCH:
        for name in order:
            if watches[name].look():
                last = watches[name].quiet
        if reaped is None and victim.process.poll() is not None:
            reaped = time.perf_counter()

    def after(moment: float | None) -> float | None:
        return None if moment is None else round((moment - hung_up) * 1e3, 3)

    return {
        "load": victim.load,
        "socket": victim.order,
        "hang_up_after_kill_ms": round((hung_up - killed) * 1e3, 3),
        "exit_ms": after(reaped),
        "ended": now - hung_up < WATCH,
        "slabs": {
            name: {
                "proven_ms": after(watch.proven),
                "quiet_ms": after(watch.quiet),
                "looks": watch.looks,
                "longest_look_ms": round(watch.longest * 1e3, 3),
            }
            for name, watch in watches.items()
        },
    }


def rounds(slabs: Slabs, trials: int, budget: float, result: dict[str, Any], save: Callable[[], None]) -> None:
    """One trial of each case a round, for as long as there is time."""
    began = time.monotonic()
    for number in range(trials):
        quiet = LONG_QUIET if number % LONG_EACH == LONG_EACH - 1 else QUIET
        if time.monotonic() - began > budget - len(CASES) * quiet - 5:
            break
        # Starting CUDA takes longest: all at once, and nobody is starting while another one is watched.
        victims = [start(slabs, *case) for case in CASES]
        try:
            for victim in victims:
                victim.wait(b"ready")
            for victim in random.sample(victims, len(victims)):
                result["trials"].append(trial(slabs, victim, quiet))
        except (TrialError, OSError) as error:
            result["given_up"].append(f"round {number}: {error}")
            say(result["given_up"][-1])
            if len(result["given_up"]) == 3:
                break
        finally:
            for victim in victims:
                victim.end()
        save()
        if number % 5 == 0:
            say(f"round {number + 1}: {len(result['trials'])} trials")


def summary(trials: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for load, order in CASES:
        chosen = [row for row in trials if (row["load"], row["socket"]) == (load, order)]
        for slab in ("vram", "host") if chosen else ():
            seen = [row["slabs"][slab] for row in chosen]
            proven = [one["proven_ms"] for one in seen if one["proven_ms"] is not None]
            yield {
                "load": load,
                "socket": order,
                "slab": slab,
                "trials": len(chosen),
                "hang_up_after_kill_ms": max(row["hang_up_after_kill_ms"] for row in chosen),
                "exit_ms": max(row["exit_ms"] or 0.0 for row in chosen),
                "with_stores_after": len(proven),
                "proven_ms": max(proven, default=None),
                "quiet_ms": max(one["quiet_ms"] for one in seen),
                "longest_look_ms": max(one["longest_look_ms"] for one in seen),
                "not_ended": sum(not row["ended"] for row in chosen),
            }


def show(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0]) if rows else []
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join("-" if value is None else str(value) for value in row.values()) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--trials", type=int, default=50, help="of each case, if there is time")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds")
    parser.add_argument("--dry-run", action="store_true", help="stores of a CPU in place of a GPU's")
    parser.add_argument("--writer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.writer:
        number, load, order = arguments.writer
        writer(int(number), load, order, arguments.dry_run)
    # Whatever hangs: the end of this process is that of its writers.
    signal.alarm(round(arguments.budget + 60))
    result: dict[str, Any] = {"script": "gpu_kill_stores", "dry_run": arguments.dry_run, "bytes": BYTES}
    result |= {"machine": machine_facts(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    result |= {"trials": [], "given_up": [], "summary": []}
    print(json.dumps(result["machine"], indent=1))

    def save() -> None:
        result["summary"] = list(summary(result["trials"]))
        if arguments.results:
            arguments.results.write_text(json.dumps(result, indent=1) + "\n")

    try:
        with Slabs(arguments.dry_run) as slabs:
            result["gpu"] = slabs.gpu
            say(slabs.gpu or "no GPU: a dry run")
            rounds(slabs, arguments.trials, arguments.budget, result, save)
    except VCacheError as error:
        print(f"gpu_kill_stores: {error}", file=sys.stderr)
        return 1
    save()
    show(result["summary"])
    return 1 if result["given_up"] or not result["trials"] else 0


if __name__ == "__main__":
    sys.exit(main())
