"""`vcache bench serve` for one GPU, with the settings of docs/benchmarks/loaded.md and a model that needs no download.

usage: python3 scripts/gpu_serve.py [--case loaded|single|fits] [--way none|native|lmcache|vcache ...] [--loads N] [--discard N]
                                    [--pool-memory SIZE] [--out FOLDER] [--name NAME] [--budget SECONDS] [--tiny]

loaded: two instances on the GPU. single: one instance whose own cache is too small. fits: all that is asked fits into the
instances' own caches. Needs vLLM (0.26 or later) importable, LMCache for its way, one GPU with 80 GB or more, no network. The
model is an 8B Llama shape with dummy weights and no tokenizer: prompts and answers are token ids. Below 100 GB of GPU memory,
the cases of two instances are scaled down: memory, conversations and system prompts alike.

Writes FOLDER/NAME.json after every load, and FOLDER/NAME-logs.txt, the ends of all logs, at the end. When the budget runs out
it keeps what was measured by then. `scripts/loaded_page.py` makes a page of such files.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_parts import SOURCE, say
from gpu_vllm_model import SHAPE, TINY

sys.path.insert(0, str(SOURCE))

from vcache.bench.report import Report, save_report
from vcache.bench.serve import Loads, bench_ways, describe, find_devices
from vcache.bench.serve_load import Load, Routing, Shape
from vcache.bench.serve_ways import WAYS, Setup, Way, option
from vcache.children.stops import stop_signals
from vcache.config import ByteSize
from vcache.errors import VCacheError

MIB, GIB = 2**20, 2**30
WHOLE = 100 * GIB
"""GPU memory from which on nothing is scaled down."""
SCALE = 36 / 64
"""What of everything is left below: two times 16 GB of weights and 36 GiB of KV go into 80 GB."""
_LOG_LINES = 80
_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
"""Graphs for decoding, without compilation, which would take a minute of every start."""
_SERVE = ("--load-format", "dummy", "--skip-tokenizer-init")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""For the servers, unless the user set it. The sampler would be compiled at the start."""


class Case(NamedTuple):
    """What is started, and the load on it."""

    instances: int
    kv_memory: int
    host_memory: int
    pool_memory: int
    shape: Shape
    routing: Routing = "random"
    ways: tuple[Way, ...] = WAYS

    def scaled(self, factor: float) -> Case:
        """With less memory, and as much less to remember; as many conversations at a time."""

        def less(count: int) -> int:
            return max(1, round(count * factor))

        conversations, systems = less(self.shape.conversations), less(self.shape.systems)
        return self._replace(
            kv_memory=less(self.kv_memory),
            host_memory=less(self.host_memory),
            pool_memory=int(self.pool_memory * factor),
            shape=self.shape._replace(conversations=conversations, systems=systems),
        )


CASES = {
    "loaded": Case(2, 64 * GIB, 48 * GIB, 32 * GIB, Shape(48, 5, 12, 6000, 1500, 64, concurrency=12)),
    "single": Case(1, 16 * GIB, 48 * GIB, 0, Shape(32, 5, 12, 6000, 1500, 64, concurrency=6)),
    "fits": Case(2, 64 * GIB, 48 * GIB, 0, Shape(20, 5, 4, 6000, 1500, 64, concurrency=12), "prefix-aware", ("none", "vcache")),
}
_TINY = Case(2, 128 * MIB, GIB, 0, Shape(4, 2, 2, 256, 64, 8, concurrency=2))
"""For a trial on a CPU; LMCache takes whole GiB."""


def write_model(folder: Path, tiny: bool = False) -> Path:
    """A model's folder, with nothing but the shape. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | (TINY if tiny else {})))
    return folder


def serve_args(tiny: bool) -> tuple[str, ...]:
    """Arguments of every server."""
    if tiny:
        return (*_SERVE, "--enforce-eager", "--block-size", "32")
    return (*_SERVE, "--max-num-batched-tokens", "8192", "--compilation-config", json.dumps(_GRAPHS))


def chosen_case(arguments: argparse.Namespace, gpu_bytes: int) -> Case:
    """The case with what the options change of it."""
    case = _TINY if arguments.tiny else CASES[arguments.case]
    if not arguments.tiny and gpu_bytes < WHOLE and case.instances > 1:
        case = case.scaled(SCALE)
        say(f"a GPU of {gpu_bytes / GIB:.0f} GiB: memory and load scaled by {SCALE:.2f}")
    given = {name: getattr(arguments, name) for name in ("kv_memory", "host_memory", "pool_memory")}
    changes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
    ways = tuple(way for way in case.ways if not arguments.way or way in arguments.way)
    return case._replace(ways=ways, **changes)


def setup_of(case: Case, model: Path, arguments: argparse.Namespace, devices: tuple[str, ...]) -> Setup:
    longest = Load(case.shape, case.instances, case.routing).longest
    options = dict(map(option, arguments.vcache_option or (["cache.chunk_size=64"] if arguments.tiny else [])))
    return Setup(
        str(model),
        case.instances,
        case.kv_memory,
        case.host_memory,
        case.pool_memory,
        longest,
        devices[:1],
        (*serve_args(arguments.tiny), *(arguments.serve_arg or ())),
        options,
    )


def measure(case: Case, setup: Setup, arguments: argparse.Namespace, file: Path, logs: Path) -> Report | None:
    """Run it, and write and tell what there is after each load. None when it was interrupted."""
    shape = case.shape._replace(seed=arguments.seed)
    loads = Loads(
        lambda number: Load(shape._replace(seed=shape.seed + number), case.instances, case.routing),
        arguments.loads,
        arguments.discard,
    )

    def keep(report: Report) -> None:
        save_report(report, file)
        tell(report)

    try:
        return bench_ways(
            case.ways,
            setup,
            loads,
            steps(say),
            command=" ".join(["python3", *sys.argv]),
            title=f"{arguments.name or arguments.case}: {describe(shape, case.routing, case.instances)}",
            repeats=arguments.repeats,
            explain=True,
            start_timeout=300.0,
            logs=logs,
            on_load=keep,
            on_interrupt=lambda report: save_report(report, file),
        )
    except KeyboardInterrupt:
        say("interrupted: out of time, or told to stop")
        return None


def tell(report: Report) -> None:
    """One line for each way that has been measured so far."""
    for row in report.rows:
        later = ", ".join(f"{share} {row[f'later_{share}_ms']:,.0f}" for share in ("mean", "p50", "p90", "p99"))
        hit = "-" if row["hit_ratio"] is None else f"{row['hit_ratio']:.3f}"
        rate = f"{row['requests_per_second']:.2f} req/s"
        say(f"{row['way']:8s} {row['runs_done']} loads: later turns {later} ms; hit {hit}; {rate}")


def steps(print_line: Callable[[str], None]) -> Callable[[str], None]:
    """Progress without a line for each request."""
    return lambda step: None if step.endswith(" requests") else print_line(step)


def log_ends(folder: Path) -> str:
    """The ends of all logs, one behind the other."""
    parts = []
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        parts.append("\n".join([f"=== {log.name}", *lines, ""]))
    return "\n".join(parts)


def size(text: str) -> int:
    """Bytes. Raises `ValueError`."""
    return 0 if text == "0" else int(ByteSize.parse(text))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    made.add_argument("--case", choices=CASES, default="loaded")
    made.add_argument("--way", action="append", choices=WAYS, help="may be repeated; default: all of the case")
    made.add_argument("--loads", type=int, default=4, help="on the same servers, one after the other (4)")
    made.add_argument("--discard", type=int, default=1, help="of these, the first ones only fill the caches (1)")
    made.add_argument("--repeats", type=int, default=1, help="of all that, on new servers (1)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--kv-memory", type=size, metavar="SIZE", help="VRAM for KV in all")
    made.add_argument("--host-memory", type=size, metavar="SIZE")
    made.add_argument("--pool-memory", type=size, metavar="SIZE", help="of --kv-memory, what VCache lends")
    made.add_argument("--vcache-option", action="append", metavar="KEY=VALUE", help="may be repeated")
    made.add_argument("--serve-arg", action="append", metavar="ARG", help="further argument of vLLM; may be repeated")
    made.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    made.add_argument("--name", default="", help="of the files; default: the case")
    made.add_argument("--budget", type=float, default=560.0, help="seconds after which it stops")
    made.add_argument("--tiny", action="store_true", help="a tiny model and load, to try this script on a CPU")
    return made


def main() -> int:
    from gpu_vllm_world import gpu_memory, installed

    arguments = parser().parse_args()
    if not installed("vllm"):
        print("gpu_serve: vLLM cannot be imported by this Python; set PYTHONPATH to where it is", file=sys.stderr)
        return 2
    memory = gpu_memory()
    if not memory and not arguments.tiny:
        print("gpu_serve: torch sees no GPU; --tiny tries this script on a CPU", file=sys.stderr)
        return 2
    for name, value in (_ENVIRONMENT | ({} if arguments.tiny else {"VLLM_USE_V2_MODEL_RUNNER": "1"})).items():
        os.environ.setdefault(name, value)
    # Whatever this process starts finds VCache, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    devices = () if arguments.tiny else find_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.name or ("tiny" if arguments.tiny else arguments.case)
    with tempfile.TemporaryDirectory(prefix="gpu-serve-") as made:
        logs = Path(made) / "logs"
        try:
            case = chosen_case(arguments, memory)
            setup = setup_of(case, write_model(Path(made) / "model", arguments.tiny), arguments, devices)
            with stop_signals():
                signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
                signal.setitimer(signal.ITIMER_REAL, arguments.budget)
                report = measure(case, setup, arguments, arguments.out / f"{name}.json", logs)
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        except VCacheError as error:
            print(f"gpu_serve: {error}", file=sys.stderr)
            return 1
        finally:
            (arguments.out / f"{name}-logs.txt").write_text(log_ends(logs))
    if report is None:
        return 3
    save_report(report, arguments.out / f"{name}.json")
    for note in report.notes:
        print(f"  {note}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
