"""What `vcache doctor` looks at. One function for each subject; `CHECKERS` is their order. Nothing heavy is imported."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ..config import ByteSize, VCacheConfig, sections
from ..errors import ConfigError, ManagerUnavailableError, SegmentError, StorageError, VCacheError
from ..manager.address import parse_address
from ..sockets import manager_address, peer_uid, socket_folder
from .checks import Check, Checker, Status

_OTHER_VARIABLES = {"VCACHE_CONFIG", "VCACHE_TOKEN", "VCACHE_LOG_LEVEL"}
_MIB = 2**20
_STORE_TIMEOUT = 15.0


def python(_: VCacheConfig) -> Iterator[Check]:
    """Check the operating system; names Python and the cores."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.platform != "linux":
        why = "VCache shares memory by memfd, SO_PEERCRED and file descriptors over unix sockets"
        yield Check("system", "fail", sys.platform, why, "run VCache on Linux")
        return
    yield Check("system", "ok", f"Linux {os.uname().release}, Python {version}, {len(os.sched_getaffinity(0))} usable cores")


def packages(config: VCacheConfig) -> Iterator[Check]:
    """Check which packages are installed."""
    required = _versions(("vcache", "msgspec", "uvloop", "prometheus-client", "PyYAML", "rich", "typer"))
    yield Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in required.items()))
    optional = _versions(("torch", "numpy", "triton", "cuda-bindings"))
    if "torch" in optional and "numpy" in optional:
        yield Check("tensors", "ok", ", ".join(f"{name} {version}" for name, version in optional.items()))
    else:
        why = "store and retrieve move tensors; the manager and `vcache lend` do without"
        yield Check("tensors", "warn", "torch or numpy is not installed", why, "for engines: pip install 'vcache[torch]'")
    vllm = _versions(("vllm",))
    yield Check("vLLM", "ok", f"vllm {vllm['vllm']}" if vllm else "not installed (needed only where vLLM runs)")


def environment(_: VCacheConfig) -> Iterator[Check]:
    """Look for variables that look like settings and are none."""
    prefixes = tuple(f"VCACHE_{section.upper()}_" for section in sections())
    set_here = sorted(name for name in os.environ if name.startswith("VCACHE_"))
    for name in set_here:
        if name not in _OTHER_VARIABLES and not name.startswith(prefixes):
            known = ", ".join(f"{prefix}*" for prefix in prefixes)
            why = "it looks like a setting, and nothing reads it"
            yield Check("environment", "warn", f"{name} is set", why, f"correct or unset it; known: {known}")
    yield Check("configuration", "ok", f"valid; variables set: {', '.join(set_here) or 'none'}")


def memory(config: VCacheConfig) -> Iterator[Check]:
    """Compare host memory, and `/dev/shm`, with what is to be lent."""
    from ..segment.hostinfo import available_memory

    available = available_memory()
    detail = f"{ByteSize(available.nbytes) / 2**30:.1f} GiB can be had ({available.limit})"
    if available.nbytes < config.segment.size and config.segment.lend:
        why = f"segment.size is {config.segment.size}"
        yield Check(
            "host memory", "warn", detail, why, "lend less, or free memory; a host segment of that size will be refused"
        )
    else:
        yield Check("host memory", "ok", detail)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Check("/dev/shm", "warn", "missing", "PyTorch and NCCL need it; VCache itself does not", "mount a tmpfs there")
        return
    size = os.statvfs(shm)
    free, total = size.f_bavail * size.f_frsize, size.f_blocks * size.f_frsize
    detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < 64 * _MIB:
        why = "PyTorch and NCCL of engines on this host use it (VCache itself uses memfd)"
        yield Check("/dev/shm", "warn", detail, why, "in a container: --shm-size=8g or --ipc=host")
    else:
        yield Check("/dev/shm", "ok", detail)


def limits(config: VCacheConfig) -> Iterator[Check]:
    """Compare limits on locked memory and open files with what is to be lent."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    detail = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / _MIB:.0f} MiB"
    if config.storage.kind != "mooncake" or soft == resource.RLIM_INFINITY or soft >= config.storage.queue:
        yield Check("locked memory", "ok", detail)
    else:
        why = "Mooncake over RDMA registers (locks) the memory it moves; over TCP it does not need it"
        yield Check(
            "locked memory", "warn", detail, why, "for RDMA: ulimit -l unlimited, or --ulimit memlock=-1 for a container"
        )
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    slabs = -(-config.segment.size // config.segment.slab_size)
    detail = f"{files} at once (limit may be raised to {most})"
    if files < 256 + 2 * slabs:
        why = f"a lender holds one for each slab, and segment.size makes {slabs}"
        yield Check("open files", "warn", detail, why, "ulimit -n 4096, or a larger segment.slab_size")
    else:
        yield Check("open files", "ok", detail)


def shared_memory(_: VCacheConfig) -> Iterator[Check]:
    """Try a slab of host memory: create it, map it twice, free it."""
    from ..segment.host import HostBacking

    why = "host segments are memfd slabs, handed to other processes as file descriptors"
    try:
        backing = HostBacking()
        slab = backing.create(backing.granularity)
        try:
            backing.write(slab, 0, b"vcache")
            other = backing.map(slab.fd, slab.nbytes)
            same = backing.read(other, 0, 6) == b"vcache"
            backing.unmap(other)
        finally:
            backing.release(slab)
    except SegmentError as error:
        yield Check(
            "memfd", "fail", str(error), why, "use a kernel and a container profile that allow memfd_create and fallocate"
        )
        return
    if same:
        yield Check("memfd", "ok", "created, sealed, mapped twice, freed")
    else:
        yield Check("memfd", "fail", "a second mapping does not show what the first one wrote", why, "report this machine")


def sockets(config: VCacheConfig) -> Iterator[Check]:
    """Try what unix sockets pass on; check the folder for them."""
    why = "peers are recognised by the kernel's word (SO_PEERCRED), and memory travels as file descriptors (SCM_RIGHTS)"
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        try:
            user = peer_uid(left)
            socket.send_fds(left, [b"x"], [left.fileno()])
            _, fds, _, _ = socket.recv_fds(right, 1, 1)
            for fd in fds:
                os.close(fd)
        except OSError as error:
            yield Check("unix sockets", "fail", str(error), why, "use a container profile that allows them")
            return
    if user == os.geteuid() and len(fds) == 1:
        yield Check("unix sockets", "ok", "peer credentials and file descriptors pass")
    else:
        detail = f"peer shows as user {user} instead of {os.geteuid()}, {len(fds)} descriptors came through"
        yield Check("unix sockets", "fail", detail, why, "run all VCache processes in one user namespace")
    yield _folder(config)


def _folder(config: VCacheConfig) -> Check:
    from ..segment.handover import prepare_broker_dir

    folder = socket_folder(config.segment.broker_dir)
    if not folder.exists():
        return Check("socket folder", "ok", f"{folder} (will be created)")
    try:
        prepare_broker_dir(str(folder))
    except SegmentError as error:
        why = "the manager and every lender put their sockets there; nobody else may"
        return Check("socket folder", "fail", str(error), why, "set segment.broker_dir to a folder of your own, mode 0700")
    return Check("socket folder", "ok", f"{folder}, mode {folder.stat().st_mode & 0o7777:04o}")


def manager(config: VCacheConfig) -> Iterator[Check]:
    """Ask the manager who lends what."""
    from .session import tool_session

    address, name = config.manager.address, "manager"
    why = "without it every look-up is a miss"
    try:
        tcp = parse_address(address).kind == "tcp"
        with tool_session(config) as api:
            stats = api.stats()
    except ManagerUnavailableError as error:
        chosen = address != manager_address(config.segment.broker_dir)
        yield Check(
            name,
            "fail" if chosen else "warn",
            str(error).partition("; is it running")[0],
            why,
            f"start it: vcache serve --address {address}",
        )
        return
    except VCacheError as error:
        yield Check(name, "fail", str(error), why, "see the message")
        return
    lent = sum(segment.info.nbytes for segment in stats.segments)
    detail = f"{address} answers: {len(stats.segments)} segment(s), {lent / 2**30:.2f} GiB, {len(stats.sessions)} session(s)"
    if not stats.segments:
        yield Check(
            name, "warn", detail, "nobody lends memory, so nothing can be stored", "vcache lend --kind host --size 2GiB"
        )
    elif tcp:
        yield Check(name, "warn", detail, "TCP is not encrypted", "keep it inside a trusted network; use unix:// on one host")
    else:
        yield Check(name, "ok", detail)


def gpu(config: VCacheConfig) -> Iterator[Check]:
    """Check the driver and every GPU, and the links between them."""
    from . import doctor_gpu

    driver = Path("/proc/driver/nvidia/version")
    if not driver.exists():
        wanted = config.segment.kind == "cuda"
        advice = "set segment.kind to host, or give the container a GPU" if wanted else ""
        why = "segment.kind is cuda" if wanted else ""
        yield Check("GPU", "fail" if wanted else "ok", "no NVIDIA driver here: the pool is made of host memory", why, advice)
        return
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        why = "lending VRAM needs it; without it the pool is made of host memory"
        yield Check("GPU", "warn", "package cuda-bindings is not installed", why, "pip install 'vcache[cuda]'")
        return
    yield from doctor_gpu.checks()
    heads, *rows = doctor_gpu.link_table(doctor_gpu.links())
    for row in rows:
        pairs = ", ".join(f"{target} {kind}" for target, kind in zip(heads[1:], row[1:], strict=True))
        yield Check(f"links from {row[0]}", "ok", pairs)


def mooncake(config: VCacheConfig) -> Iterator[Check]:
    """Check whether Mooncake is installed and loads, and its store if one is named."""
    from ..bindings import MISSING, find_problem
    from ..storage.mooncake_options import find_master

    name, store = "Mooncake", config.storage.kind == "mooncake"
    wanted = store or config.segment.remote != "off" or config.cache.remote != "off"
    why = "it is the storage tier (DRAM and SSD of this and other hosts), and reads memory of other hosts"
    wheels = _versions(("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine-cuda13"))
    if not wheels:
        detail = "not installed (needed only for storage.kind mooncake, segment.remote and cache.remote)"
        yield Check(name, "fail", "not installed", why, MISSING) if wanted else Check(name, "ok", detail)
        return
    detail = ", ".join(f"{wheel} {version}" for wheel, version in wheels.items())
    problem = find_problem("store") or find_problem("engine")
    if problem is not None:
        yield Check(name, "fail" if wanted else "warn", f"{detail}, but {problem.detail}", why, problem.advice)
        return
    master = find_master()
    yield Check(name, "ok", f"{detail}, its libraries, mooncake_master {'at ' + master if master else 'not on the path'}")
    yield from _mooncake_store(config, store)


def _mooncake_store(config: VCacheConfig, wanted: bool) -> Iterator[Check]:
    """The master, and a put and a get. Asks nobody unless the configuration says so: `storage.kind`, or a master is named."""
    from ..storage.mooncake_options import MooncakeOptions, reachable
    from ..storage.mooncake_trial import try_store

    if not wanted and "master" not in config.storage.options:
        return
    name = "Mooncake store"
    bad: Status = "fail" if wanted else "warn"
    why = "chunks of the storage tier are misses"
    try:
        options = MooncakeOptions.parse(config.storage.options)
        if not reachable(options.address):
            advice = "start it: vcache serve --with-mooncake (or mooncake_master), and check storage.options.master"
            yield Check(name, bad, f"no master answers at {options.master}", why, advice)
            return
        try_store(options, _STORE_TIMEOUT, transfer=True)
    except ConfigError as error:
        yield Check(name, "fail", str(error), why, "correct storage.options")
    except StorageError as error:
        advice = "look at the output of the master and of those who lend to it; restart what does not answer"
        if "no room" in str(error):
            advice = "lend memory to it: vcache lend-storage --size SIZE"
        yield Check(name, bad, str(error), why, advice)
    else:
        yield Check(name, "ok", f"master at {options.master}: a put and a get work")


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


CHECKERS: tuple[Checker, ...] = (
    python,
    packages,
    environment,
    memory,
    limits,
    shared_memory,
    sockets,
    manager,
    gpu,
    mooncake,
)
