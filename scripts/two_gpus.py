"""What the pool does between two GPUs of one host, beside every other way. Needs two GPUs with peer access, torch, Triton; for
the last parts also Mooncake and vLLM, which are recorded as missing where they are not installed.

usage: python3 scripts/two_gpus.py RESULTS [--only PART,...] [--budget SECONDS] [--dry-run]      under eight minutes

parts: engines (a process on each GPU), sweep (sizes and pages, beside plain copies), grids (programs for 95% of the link),
interference (what both GPUs lose), return (8 GiB, under load), faults, mooncake (over TCP), vllm (an engine on each GPU)

Each part is a process of its own with a time limit; one that fails is recorded, and the others go on. Writes two_gpus.json
after every part, the parts' own files (part_*.json, transfer.csv) and their output (*.txt) into RESULTS.
`scripts/bench_pages.py two-gpus RESULTS/two_gpus.json` makes a page and figures of it. `--dry-run` takes one GPU for both, or
the CPU with small sizes, to try the script. Processes that should see one GPU get CUDA_VISIBLE_DEVICES: each calls it GPU 0.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_parts import SOURCE, Part, Parts, Suite, python_path, say

sys.path.insert(0, str(SOURCE))

if TYPE_CHECKING:
    import subprocess

    from vcache.spec import KVCacheSpec
    from vcache.worker import Worker

MIB = 2**20
GIB = 2**30
GRIDS = (8, 16, 32, 48, 64, 96, 132, 264)


class Place(NamedTuple):
    """Where the two sides are: GPU numbers, and what lends. On a CPU everything is small."""

    gpus: tuple[int, int]
    kind: str = "cuda"
    device: str = "cuda"

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def spec(self) -> KVCacheSpec:
        from vcache.bench.paged_data import LLAMA_8B
        from vcache.bench.transfer import _SMALL_SPEC

        return LLAMA_8B if self.on_gpu else _SMALL_SPEC

    @property
    def long(self) -> int:
        """Tokens: 4 GiB on a GPU."""
        return 32_768 if self.on_gpu else 2_048

    @property
    def short(self) -> int:
        return 8_192 if self.on_gpu else 1_024

    def visible(self, side: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": str(self.gpus[side])} if self.on_gpu else {}

    def uuid(self, side: int) -> str:
        import torch

        from vcache.paged.layout import device_name

        return device_name(torch.device("cuda", self.gpus[side])) if self.on_gpu else ""


def find_place(dry_run: bool) -> Place:
    """Raises `SystemExit` with one line that says what is missing."""
    try:
        import torch
    except ImportError:
        raise SystemExit("two_gpus: torch is not installed for this Python") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count >= 2 and torch.cuda.can_device_access_peer(0, 1):
        return Place((0, 1))
    if dry_run:
        return Place((0, 0)) if count else Place((0, 0), "host", "cpu")
    missing = "the first two cannot access each other's memory" if count >= 2 else f"torch sees {count}"
    raise SystemExit(
        f"two_gpus: needs two GPUs with peer access, but {missing} (see `vcache doctor`; --dry-run tries the script)"
    )


# Parts -----------------------------------------------------------------------------------------------------------------------


def engines(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """A process that sees only GPU 0 stores in VRAM of GPU 0, one that sees only GPU 1 retrieves; the reverse; both at once."""
    from vcache.bench.paged_data import CHUNK, slab_size
    from vcache.bench.pool_worker import PoolEngine
    from vcache.bench.processes import manager_process

    with ExitStack() as stack:
        address = stack.enter_context(manager_process()).address
        for side in (0, 1):
            stack.enter_context(lender(address, place, side, slab_size(place.spec, 3 * place.long // CHUNK)))
        zero, one = (stack.enter_context(worker(address, place, side, place.long)) for side in (0, 1))
        for name, source, target, prompt in (("0 to 1", zero, one, 1), ("1 to 0", one, zero, 2)):
            stored = source.call(PoolEngine.store, prompt=prompt, tokens=place.long)
            first = target.call(PoolEngine.retrieve, prompt=prompt, tokens=place.long, seed=7)
            timed = target.call(PoolEngine.time_retrieve, prompt=prompt, tokens=place.long, runs=42)[2:]
            kernel = target.call(PoolEngine.time_kernels, prompt=prompt, tokens=place.long, runs=12)[2:]
            found[name] = {
                "tokens": place.long,
                "loaded": first.loaded,
                "wrong": first.wrong,
                "store_ms": 1e3 * stored,
                "retrieve_ms": spread(timed),
                "kernel_ms": spread(kernel),
                "gbps": place.spec.payload_bytes(place.long) / sorted(timed)[len(timed) // 2] / 1e9,
            }
            say(f"engines {name}: {found[name]}")
            parts.write()
        both = {
            name: target.begin(PoolEngine.time_retrieve, prompt=prompt, tokens=place.long, runs=60)
            for name, target, prompt in (("0 to 1", one, 1), ("1 to 0", zero, 2))
        }
        found["both at once"] = {name: spread(times.result()[5:-5]) for name, times in both.items()}
        short = []
        for prompt in range(10, 19):
            zero.call(PoolEngine.store, prompt=prompt, tokens=512)
            got = one.call(PoolEngine.retrieve, prompt=prompt, tokens=512, seed=prompt)
            short.append(got.seconds if not got.wrong and got.loaded == 512 else float("nan"))
        found["512 tokens, 0 to 1, retrieve_ms"] = spread(short[2:])
        wrong = sum(found[name]["wrong"] for name in ("0 to 1", "1 to 0"))
        complete = all(found[name]["loaded"] == place.long for name in ("0 to 1", "1 to 0"))
        assert not wrong, f"I1: {wrong} tokens with wrong bytes"
        assert complete, "not everything was loaded"


def sweep(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """`vcache bench transfer` on GPU 0: from and to GPU 1 and the DRAM tier, by size and page, copy engines, plain copies."""
    from vcache.bench.report import save_report
    from vcache.bench.transfer import TransferOptions, run

    options = TransferOptions(
        sizes=[size * MIB for size in (16, 64, 256, 1024, 2048)],
        page_sizes=[page * 1024 for page in (4, 8, 16, 32, 64, 128, 256)],
        paths=("peer", "dram") if place.gpus == (0, 1) else ("vram", "dram"),
        seconds=0.15,
        copy_engines=True,
        command="scripts/two_gpus.py",
    )
    if not place.on_gpu:
        options = options._replace(sizes=[16 * MIB])
    report = run(options, say)
    folder = parts.file.parent
    save_report(report, folder / "transfer.json", folder / "transfer.csv")
    found |= {"rows": report.rows, "notes": report.notes}
    failed = [note for note in report.notes if note.startswith(("NOT MEASURED", "FAILED"))]
    assert not failed, "; ".join(failed)


def grids(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """GB/s from and to the peer by number of programs, 1 GiB, 32 KiB pages: the fewest for 95% of the link."""
    import torch

    from vcache.bench.paged_data import CacheArena
    from vcache.bench.report import Report
    from vcache.bench.transfer import TransferOptions, _pool_path
    from vcache.bench.transfer_rows import COLUMNS

    here, there = (torch.device(place.device, gpu) if place.on_gpu else torch.device("cpu") for gpu in place.gpus)
    size = 1024 * MIB if place.on_gpu else 16 * MIB
    arena = CacheArena(place.spec, size // place.spec.token_bytes, here)
    page = 16 * place.spec.row_bytes
    for grid in GRIDS if place.on_gpu else GRIDS[:2]:
        report = Report(title="", command="", columns=COLUMNS)
        options = TransferOptions(page_sizes=[page], grid=grid, seconds=0.15)
        _pool_path(options, report, arena, "peer", place.kind, there, [size], lambda line: None)
        for row in report.rows:
            if row["mapping"] == "blocks":
                found.setdefault(row["operation"], {})[str(grid)] = round(row["gbps"], 1)
        parts.write()
    for operation in ("store", "retrieve"):
        most = max(found[operation].values())
        found[f"programs for 95%, {operation}"] = next(int(g) for g, rate in found[operation].items() if rate >= 0.95 * most)
    say(str(found))


def interference(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """What a matrix product and decoding lose, on the GPU that reads (0) and on the one that lends (1)."""
    if not place.on_gpu:
        found["left out"] = "needs a GPU"
        return
    import torch

    from vcache.bench.interference import Decoding, Products, Work, measure
    from vcache.bench.moves import Move, RawCopies, copy_engine_moves, mover_moves, plain_moves
    from vcache.bench.paged_data import CHUNK, CacheArena, Slots
    from vcache.bench.transfer import _lent

    nbytes = GIB
    here, there = (torch.device("cuda", gpu) for gpu in place.gpus)
    arena = CacheArena(place.spec, nbytes // place.spec.token_bytes, here)
    with _lent(place.spec, "cuda", there, here, nbytes // place.spec.payload_bytes(CHUNK)) as lent:
        slots = Slots(place.spec, lent.slabs)
        moves: list[Move] = list(mover_moves(arena, "the peer", slots, nbytes, 2, grids=(8, 16, 32, 64, 132)))
        try:
            moves += copy_engine_moves(arena, "the peer", slots, nbytes)
        except Exception as error:  # noqa: BLE001 - the others can do without
            found["copy engines over pages"] = f"{type(error).__name__}: {error}"
        moves += plain_moves(RawCopies(nbytes, there, here), nbytes)[:1]
        works: list[Work] = []
        for device, where in ((here, "reading GPU"), (there, "lending GPU")):
            works += [Products(device, where), Decoding(device, where)]
        found["rows"] = []
        for pair in measure(moves, works, seconds=0.25):
            found["rows"].append(pair.row())
            say(pair.line())
            parts.write()


def give_back(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """Return of 8 GiB to the owner on GPU 0 while two processes on GPU 1 read it."""
    from vcache.bench.give_back import GiveBack, measure

    what = GiveBack(
        nbytes=8 * GIB if place.on_gpu else 64 * MIB,
        kind=place.kind,
        owner=place.uuid(0),
        device=place.device,
        environment=place.visible(1),
        spec=place.spec,
        tokens=place.short,
        rounds=5 if place.on_gpu else 2,
    )
    found |= {"nbytes": what.nbytes, "rounds": measure(what, say)}
    say(str([{name: each[name] for name in ("grown_ms", "shrink_ms", "free_ms")} for each in found["rounds"]]))


def faults(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """SIGKILL of the lender on GPU 0 while GPU 1 reads."""
    from vcache.bench.paged_data import CHUNK, slab_size
    from vcache.bench.pool_worker import PoolEngine
    from vcache.bench.processes import manager_process

    prompts = list(range(1, 9))
    with ExitStack() as stack:
        address = stack.enter_context(manager_process()).address
        slots = len(prompts) * place.short // CHUNK + 8
        lent = stack.enter_context(lender(address, place, 0, slab_size(place.spec, slots)))
        zero, one = (stack.enter_context(worker(address, place, side, place.short)) for side in (0, 1))
        for prompt in prompts:
            zero.call(PoolEngine.store, prompt=prompt, tokens=place.short)
        found["before"] = one.call(PoolEngine.retrieve, prompt=1, tokens=place.short, seed=3)._asdict()
        reading = one.begin(PoolEngine.read_for, prompts=prompts, tokens=place.short, seconds=3.0)
        time.sleep(1.5)  # the length of the load before the death, not a synchronisation
        lent.kill()
        found["reader while the lender died"] = reading.result()._asdict()
        found["after"] = one.call(PoolEngine.retrieve, prompt=1, tokens=place.short, seed=4)._asdict()
        say(str(found))
        assert not found["reader while the lender died"]["wrong"] + found["after"]["wrong"], "I1: wrong bytes"
        assert not found["after"]["loaded"], "a dead lender's chunks were still there"


def mooncake(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """GPU 0 to GPU 1 through Mooncake's store over TCP: down, put, get, up."""
    from mooncake_bounce import measure

    sizes = (16, 64, 256, 1024, 2048) if place.on_gpu else (16,)
    measure([size * MIB for size in sizes], place.visible(0), place.visible(1), place.device, found, parts.write)


def vllm(place: Place, found: dict[str, Any], parts: Parts) -> None:
    """An engine of vLLM on each GPU."""
    from two_gpus_vllm import measure

    measure(place.gpus, found, parts, tiny=not place.on_gpu)


def lender(address: str, place: Place, side: int, nbytes: int) -> AbstractContextManager[subprocess.Popen[str]]:
    """`vcache lend` on one of the sides."""
    from vcache.bench.processes import lender_process

    return lender_process(address, place.kind, nbytes, env=python_path(**place.visible(side)))


def worker(address: str, place: Place, side: int, tokens: int) -> Worker:
    from vcache.bench.pool_worker import WorkerSettings, pool_worker

    config: dict[str, dict[str, Any]] = {"manager": {"address": address}, "segment": {"lend": False}}
    settings = WorkerSettings(config=config, spec=place.spec, blocks=tokens // 16, device=place.device, name=f"gpu{side}")
    return pool_worker(settings, place.visible(side))


def spread(seconds: list[float]) -> list[float]:
    """Median, least, most in milliseconds."""
    ordered = sorted(seconds)
    return [round(1e3 * value, 3) for value in (ordered[len(ordered) // 2], ordered[0], ordered[-1])]


SUITE = Suite(
    "two_gpus",
    __doc__,
    {
        "engines": Part(engines, 70),
        "sweep": Part(sweep, 130, least=40),
        "grids": Part(grids, 60),
        "interference": Part(interference, 110, least=40),
        "return": Part(give_back, 80),
        "faults": Part(faults, 60),
        "mooncake": Part(mooncake, 70),
        "vllm": Part(vllm, 330, least=90),
    },
    lambda arguments: find_place(arguments.dry_run),
    {"dry-run": "one GPU for both, or the CPU"},
)


if __name__ == "__main__":
    sys.exit(SUITE.main())
