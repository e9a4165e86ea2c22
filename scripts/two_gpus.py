"""What the pool does between two GPUs of one host, beside every other way. Needs two GPUs with peer access, torch, Triton.

usage: PYTHONPATH=src python3 scripts/two_gpus.py RESULTS [--quick]      about four minutes

Writes transfer.csv, transfer.json, transfer.png and two_gpus.json into RESULTS. A part that fails is recorded;
the others go on.
Processes that should see one GPU get CUDA_VISIBLE_DEVICES, so each calls its GPU 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from vcache.bench.paged_data import CHUNK, LLAMA_8B, CacheArena, slab_size
from vcache.bench.pool_worker import PoolWorker, WorkerSettings
from vcache.bench.processes import manager_process, running

MIB = 2**20
LONG = 32_768
GRIDS = (8, 16, 32, 64, 96, 132, 264)


def visible(gpu: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": str(gpu)}


@contextmanager
def lender(address: str, gpu: int, nbytes: int) -> Iterator[Any]:
    command = [sys.executable, "-m", "vcache.cli", "lend", "--address", address, "--kind", "cuda", "--size", str(nbytes)]
    with running(command, "lending ", env={**os.environ, **visible(gpu)}) as process:
        yield process


def worker(address: str, gpu: int, name: str, tokens: int = LONG) -> PoolWorker:
    config: dict[str, dict[str, Any]] = {"manager": {"address": address}, "segment": {"lend": False}}
    settings = WorkerSettings(config=config, spec=LLAMA_8B, blocks=tokens // 16, device="cuda", name=name)
    return PoolWorker(settings, visible(gpu))


def sweep(results: Path, quick: bool) -> dict[str, Any]:
    """`vcache bench transfer` on GPU 0, with the peer path from GPU 1."""
    from vcache.bench.report import save_report
    from vcache.bench.transfer import TransferOptions, curves, run

    sizes = [16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB] + ([] if quick else [2048 * MIB])
    pages = [16 * 1024, 32 * 1024] if quick else [4 * 1024, 16 * 1024, 32 * 1024, 256 * 1024]
    report = run(TransferOptions(sizes=sizes, page_sizes=pages, command="scripts/two_gpus.py"), say)
    save_report(report, results / "transfer.json", results / "transfer.csv")
    try:
        from vcache.bench.plot import draw

        draw(
            curves(report.rows),
            results / "transfer.png",
            title=f"Moving KV between two GPUs, and through DRAM\n{report.machine['gpu']}",
        )
    except ImportError as error:
        say(f"no plot: {error}")
    ratios = {}
    raw = {row["size"]: row["gbps"] for row in report.rows if row["path"] == "peer copy"}
    for row in report.rows:
        if row["path"] == "peer":
            label = f"{row['operation']} {row['mapping']} {row['size']} pages {row['page']}"
            ratios[label] = [round(row["gbps"], 1), round(row["gbps"] / raw[row["size"]], 3)]
    return {"notes": report.notes, "raw peer copy GB/s": raw, "peer path: GB/s, share of the raw peer copy": ratios}


def grids() -> dict[str, Any]:
    """GB/s from and to the peer by number of programs, 1 GiB, 32 KiB pages."""
    import torch

    from vcache.bench.report import Report
    from vcache.bench.transfer import COLUMNS, TransferOptions, _pool_path

    found = {}
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    arena = CacheArena(LLAMA_8B, 1024 * MIB // LLAMA_8B.token_bytes, here)
    for grid in GRIDS:
        report = Report(title="", command="", columns=COLUMNS)
        options = TransferOptions(page_sizes=[16 * 1024], grid=grid)
        _pool_path(options, report, arena, "peer", "cuda", there, [1024 * MIB], lambda line: None)
        found[grid] = {row["operation"]: round(row["gbps"], 1) for row in report.rows}
    return found


def engines() -> dict[str, Any]:
    """A process that sees only GPU 0 stores in VRAM of GPU 0, one that sees only GPU 1 retrieves; the reverse; both at once."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        address = stack.enter_context(manager_process()).address
        for gpu in (0, 1):
            stack.enter_context(lender(address, gpu, slab_size(LLAMA_8B, 3 * LONG // CHUNK)))
        zero, one = (stack.enter_context(worker(address, gpu, f"gpu{gpu}")) for gpu in (0, 1))
        for name, source, target, prompt in (("0 to 1", zero, one, 1), ("1 to 0", one, zero, 2)):
            stored = source.ask("store", prompt=prompt, tokens=LONG)
            first = target.ask("retrieve", prompt=prompt, tokens=LONG, seed=7)
            timed = target.ask("time_retrieve", prompt=prompt, tokens=LONG, runs=12)["seconds"][2:]
            kernel = target.ask("time_kernels", prompt=prompt, tokens=LONG, runs=12)["seconds"][2:]
            found[name] = {
                "loaded": first["loaded"],
                "wrong": first["wrong"],
                "store_ms": 1e3 * stored["seconds"],
                "retrieve_ms": spread(timed),
                "kernel_ms": spread(kernel),
                "gbps": LLAMA_8B.payload_bytes(LONG) / sorted(timed)[len(timed) // 2] / 1e9,
            }
            say(f"engines {name}: {found[name]}")
        both: dict[str, list[float]] = {}

        def loop(name: str, target: PoolWorker, prompt: int) -> None:
            both[name] = target.ask("time_retrieve", prompt=prompt, tokens=LONG, runs=40)["seconds"][5:-5]

        threads = [threading.Thread(target=loop, args=args) for args in (("0 to 1", one, 1), ("1 to 0", zero, 2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found["both at once"] = {name: spread(seconds) for name, seconds in both.items()}
        short = []
        for prompt in range(10, 19):
            zero.ask("store", prompt=prompt, tokens=512)
            got = one.ask("retrieve", prompt=prompt, tokens=512, seed=prompt)
            short.append(got["seconds"] if not got["wrong"] and got["loaded"] == 512 else float("nan"))
        found["512 tokens, 0 to 1, retrieve_ms"] = spread(short[2:])
    return found


def faults() -> dict[str, Any]:
    """SIGKILL of the lender on GPU 0 while GPU 1 reads; return of 8 GiB to the owner while GPU 1 reads."""
    import subprocess

    found: dict[str, Any] = {}
    with ExitStack() as stack:
        address = stack.enter_context(manager_process()).address
        lent = stack.enter_context(lender(address, 0, slab_size(LLAMA_8B, 320)))
        zero, one = (stack.enter_context(worker(address, gpu, f"gpu{gpu}", 8192)) for gpu in (0, 1))
        prompts = list(range(1, 9))
        for prompt in prompts:
            zero.ask("store", prompt=prompt, tokens=8192)
        one.tell("read_for", prompts=prompts, tokens=8192, seconds=6.0)
        time.sleep(2.0)
        listing = subprocess.run(
            [sys.executable, "-m", "vcache.cli", "status", "--address", address, "--json"], capture_output=True, text=True
        )
        segment = json.loads(listing.stdout)["segments"][0]["info"]["uuid"] if listing.returncode == 0 else ""
        began = time.monotonic()
        shrink = subprocess.run(
            [sys.executable, "-m", "vcache.cli", "resize", str(segment)[:8], "--size", "2GiB", "--address", address],
            capture_output=True,
            text=True,
        )
        found["resize to 2 GiB"] = {
            "command_ms": 1e3 * (time.monotonic() - began),
            "said": (shrink.stdout + shrink.stderr).strip()[-300:],
        }
        lent.kill()
        found["reader while it shrank and died"] = one.answer()
        found["after"] = one.ask("retrieve", prompt=1, tokens=8192, seed=3)
    return found


def spread(seconds: list[float]) -> list[float]:
    """Median, least, most in milliseconds."""
    ordered = sorted(seconds)
    return [round(1e3 * value, 3) for value in (ordered[len(ordered) // 2], ordered[0], ordered[-1])]


def say(line: str) -> None:
    print(f"{time.monotonic() - START:7.1f} s  {line}", flush=True)


START = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    import torch

    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        print("two_gpus: needs two GPUs that can access each other; see `vcache doctor`", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "engines": engines,
        "grids": grids,
        "sweep": lambda: sweep(options.results, options.quick),
        "faults": faults,
    }
    for name, part in parts.items():
        say(name)
        try:
            results[name] = part()
        except Exception as error:  # noqa: BLE001 - recorded, and the others go on
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        (options.results / "two_gpus.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    return 1 if any("error" in found for found in results.values() if isinstance(found, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
