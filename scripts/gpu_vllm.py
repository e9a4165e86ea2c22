"""vLLM on a GPU with VCache: time to first token of instance B for prompts that instance A computed, in one run with recompute,
own prefix hits and vLLM's native CPU offload; overhead with nothing to hit; equal tokens, and controls that must differ.

usage: python3 scripts/gpu_vllm.py [--out FOLDER] [--budget SECONDS] [--together yes|no|auto] [--only SECTION,...]

Needs vLLM (0.26 or later) importable, one GPU, no network. Writes FOLDER/gpu_vllm.json after every section, prints a table.
Each engine is a process of its own; all share the one GPU, and only one works at a time. Weights are random (normal, scaled by
fan-in): vLLM's own dummy weights are so small that wrong KV would not show.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_vllm_model import SHAPE, TINY, strong_weights

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


class Engine:
    """Commands of the engine process."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, options: dict[str, Any], connector: dict[str, Any] | None) -> dict[str, Any]:
        began = time.perf_counter()
        import vllm
        from vllm import LLM
        from vllm.config import KVTransferConfig

        strong_weights()
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(**connector)
        self.llm = LLM(**options)
        return {"seconds": time.perf_counter() - began, "vllm": vllm.__version__}

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {
            "ms": 1e3 * seconds,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }

    def settle(self, pause: float = 0.0) -> None:
        """Step the idle engine until its transfers are over."""
        core = self.llm.llm_engine.engine_core.engine_core
        deadline = time.monotonic() + 30
        time.sleep(pause)
        while core.scheduler.has_requests() and time.monotonic() < deadline:
            core.step_fn()

    def reset(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", None)
            if value and ("vcache" in metric.name or "external" in metric.name or "preemption" in metric.name):
                found[metric.name] = found.get(metric.name, 0) + value
        return found

    def worker_stats(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        store = get_kv_transfer_group()._worker._store
        return {"metrics": store.metrics.snapshot(), "segments": store._resources.describe(), "layout": store.cache.layout}

    def device(self) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {"name": "cpu"}
        free, total = torch.cuda.mem_get_info()
        return {"name": torch.cuda.get_device_name(), "free": free, "total": total, "torch": torch.__version__}


def serve_commands() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            value = getattr(engine, command["do"])(**command["with"])
        except Exception as error:  # noqa: BLE001 - sent to the parent
            traceback.print_exc()
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        else:
            answers.write(json.dumps({"value": value}) + "\n")


def serve_manager(address: str) -> None:
    from vcache.config import VCacheConfig
    from vcache.manager.server import run_server

    run_server(VCacheConfig.from_env({}, manager={"address": address}), ready=lambda where: print("ready", where, flush=True))


def lend(address: str, kind: str, nbytes: int, slab: int) -> None:
    from vcache.config import VCacheConfig
    from vcache.manager.connect import connect
    from vcache.segment.lender import Lender

    config = VCacheConfig.from_env({}, manager={"address": address}, segment={"kind": kind, "size": nbytes, "slab_size": slab})
    if kind == "cuda":
        from vcache.segment.cuda import CudaBacking

        backing: Any = CudaBacking()
    else:
        from vcache.segment.host import HostBacking

        backing = HostBacking()
    manager = connect(config, name="lender", role="lender", require=True)
    lender = Lender(manager, backing, config.segment)
    if not lender.wait_mounted(10):
        raise SystemExit("not mounted")
    print("ready", lender.payload_bytes, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    lender.close()
    manager.close()


# -- the parent ----------------------------------------------------------------------------------------------------------------


def say(*what: Any) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}s]", *what, flush=True)


class Child:
    """This script in another process."""

    def __init__(self, folder: Path, name: str, *arguments: str, **env: str) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path} | env,
            )

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def line(self, timeout: float) -> str:
        assert self.process.stdout is not None
        text, deadline = b"", time.monotonic() + timeout
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.process.stdout.fileno(), 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"{self.name}: {'ended' if ready else f'no answer in {timeout:.0f} s'}\n{self.tail()}")
            text += part
        return text.decode()

    def answer(self, timeout: float = 120.0) -> Any:
        answer = json.loads(self.line(timeout))
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}\n{self.tail(25)}")
        return answer["value"]

    def call(self, do: str, timeout: float = 120.0, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.answer(timeout)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


class Run:
    """State of one run: children, results, time left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tiny: bool = arguments.tiny
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-vllm-"))
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.children: dict[str, Child] = {}
        self.results: dict[str, Any] = {"errors": {}, "ttft_ms": {}}
        self.random = random.Random(20251)
        self.model = self.folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(SHAPE | (TINY if self.tiny else {})))
        self.vocabulary = (SHAPE | (TINY if self.tiny else {}))["vocab_size"]
        self.lengths = [256 + 32, 512 + 32] if self.tiny else [8192 + 16, 32768 + 16, 65536 + 16]
        self.address = f"unix://{self.folder}/manager.sock"

    def left(self) -> float:
        return float(self.arguments.budget) - (time.monotonic() - BEGAN)

    def section(self, name: str, work: Callable[[], None], need: float = 0.0) -> None:
        """Run a part; a failure is recorded and does not stop the others."""
        wanted = self.arguments.only
        if wanted and name not in wanted.split(","):
            return
        if self.left() < need:
            self.results["errors"][name] = f"skipped: {self.left():.0f} s left, {need:.0f} needed"
            say(name, self.results["errors"][name])
            return
        began = time.monotonic()
        try:
            work()
        except Exception as error:  # noqa: BLE001 - recorded
            self.results["errors"][name] = f"{type(error).__name__}: {error}"
            say(name, "FAILED:", error)
        self.results.setdefault("section_seconds", {})[name] = round(time.monotonic() - began, 1)
        self.write()

    def write(self) -> None:
        (self.out / "gpu_vllm.json").write_text(json.dumps(self.results, indent=1))

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(10, self.vocabulary - 10) for _ in range(length)]

    # engines

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model": str(self.model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "seed": 0,
            "disable_log_stats": False,
            "max_num_seqs": 64,
        }
        if self.tiny:
            return options | {"dtype": "float32", "max_model_len": 1024, "block_size": 32}
        tokens = self.lengths[-1] + 2048
        return options | {
            "dtype": "bfloat16",
            "max_model_len": tokens,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": 0.1,  # only checked against what is free: the next line decides
            "kv_cache_memory_bytes": (tokens + 6 * 1024) * 128 * 1024,
        }

    def vcache(self) -> dict[str, Any]:
        extra = {
            "address": self.address,
            "cache.chunk_size": 64 if self.tiny else 256,
            "segment.lend": False,
            "lookup_deadline_ms": 1000,
        }
        return {
            "kv_connector": "VCacheConnector",
            "kv_connector_module_path": "vcache.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }

    def native(self) -> dict[str, Any]:
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 24 * GIB},
        }

    def start_pool(self) -> None:
        manager = self.children["manager"] = Child(self.folder, "manager", "--manager", self.address)
        manager.line(60)
        kind, size = ("host", 256 * 2**20) if self.tiny else ("cuda", int(self.arguments.segment * GIB))
        lender = self.children["lender"] = Child(
            self.folder, "lender", "--lend", self.address, kind, str(size), str(size if self.tiny else 512 * 2**20)
        )
        say("lent", lender.line(60).strip())

    def start_engines(self, names: str) -> None:
        """Start engines at the same time. A, B: VCache. C: no connector. D: native offload."""
        connectors = {"A": self.vcache(), "B": self.vcache(), "C": None, "D": self.native()}
        env = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        for name in names:
            if self.tiny and name == "D":
                continue
            self.children[name] = Child(self.folder, name, "--engine", **env)
            self.children[name].send("start", options=self.options(), connector=connectors[name])
        for name in names:
            if name not in self.children:
                continue
            try:
                started = self.children[name].answer(240)
            except RuntimeError as error:
                self.results["errors"][f"start {name}"] = str(error)
                say("engine", name, "FAILED:", error)
                self.children.pop(name).end()
                continue
            self.results["vllm"] = started["vllm"]
            say(f"engine {name} ready after {started['seconds']:.0f} s")
            self.results["device"] = self.children[name].call("device")

    def stop(self, *names: str) -> None:
        for name in names:
            if name in self.children:
                self.children.pop(name).end()

    def one(self, name: str, ids: list[int], tokens: int = 1) -> dict[str, Any]:
        return self.children[name].call("generate", prompts=[ids], tokens=tokens)

    def note(self, mode: str, length: int, milliseconds: float) -> None:
        self.results["ttft_ms"].setdefault(mode, {}).setdefault(str(length), []).append(round(milliseconds, 2))

    # what is measured

    def warm_up(self, names: str) -> None:
        for name in names:
            if name in self.children:
                for length in self.lengths:
                    ids = self.prompt(length)
                    for _ in range(2):
                        self.one(name, ids, 2)
                        self.children[name].call("settle")
        if "B" in names and {"A", "B"} <= set(self.children):
            for length in self.lengths:
                ids = self.prompt(length)
                self.one("A", ids, 2)
                self.children["A"].call("settle")
                self.one("B", ids, 2)
        say("warmed up", names)

    def shared(self, length: int, repeat: int) -> None:
        """A computes, B loads; then B's own hit."""
        ids = self.prompt(length)
        cold = self.one("A", ids)
        self.children["A"].call("settle")
        loaded = self.one("B", ids)
        own = self.one("B", ids)
        if repeat < 0:
            return
        self.note("A, recompute while saving", length, cold["ms"])
        enough = loaded["cached"][0] >= length - 600
        self.note("B, through VCache" if enough else "B, missed", length, loaded["ms"])
        self.note("B, own prefix hit", length, own["ms"])

    def plain(self, length: int, repeat: int) -> None:
        """No connector: recompute, and own hit."""
        ids = self.prompt(length)
        cold, own = self.one("C", ids), self.one("C", ids)
        if repeat >= 0:
            self.note("recompute, no connector", length, cold["ms"])
            self.note("own prefix hit, no connector", length, own["ms"])

    def offloaded(self, length: int, repeat: int) -> None:
        """Native CPU offload: computed, pushed out of the prefix cache, loaded back."""
        ids = self.prompt(length)
        self.one("D", ids)
        self.one("D", self.prompt(64), 8)
        self.children["D"].call("settle", pause=0.5)
        if not self.children["D"].call("reset"):
            self.one("D", self.prompt(64), 8)
            self.children["D"].call("settle", pause=0.5)
            self.children["D"].call("reset")
        again = self.one("D", ids)
        if repeat >= 0:
            enough = again["cached"][0] >= length - 600
            self.note("native CPU offload" if enough else "native CPU offload, missed", length, again["ms"])

    def ttft(self, names: str) -> None:
        for length, repeats in zip(self.lengths, (7, 6, 3), strict=False):
            for repeat in range(repeats):
                if self.left() < 60 and repeat >= 2:
                    say(f"{length}: stopped after {repeat} repeats, for lack of time")
                    break
                if {"A", "B"} <= set(self.children) and "A" in names:
                    self.shared(length, repeat)
                if "C" in self.children and "C" in names:
                    self.plain(length, repeat)
                if "D" in self.children and "D" in names:
                    self.offloaded(length, repeat)
            for mode, values in self.results["ttft_ms"].items():
                if str(length) in values:
                    say(f"{length:6d} tokens  {mode:32s} {statistics.median(values[str(length)]):9.1f} ms")
            self.write()

    def equality(self) -> None:
        """B's tokens after a load equal those of A, which computed the prompt, on its own prefix hit (the same shapes in both).
        Controls: another beginning gives other tokens, with the same end and the same length."""
        length = self.lengths[1] if not self.tiny else self.lengths[0]
        ids = self.prompt(length)
        cold = self.one("A", ids, 16)["tokens"][0]
        self.children["A"].call("settle")
        hit_a = self.one("A", ids, 16)["tokens"][0]
        found = self.one("B", ids, 16)
        other = self.prompt(length // 2) + ids[length // 2 :]
        changed = self.one("B", other, 16)
        self.results["equality"] = {
            "cached_on_b": found["cached"][0],
            "a_recomputed": cold,
            "a_own_hit": hit_a,
            "b_through_vcache": found["tokens"][0],
            "b_other_beginning": changed["tokens"][0],
            "equal": found["tokens"][0] == hit_a,
            "equal_to_recompute": found["tokens"][0] == cold,
            "control_differs": changed["tokens"][0] != found["tokens"][0],
        }
        say("equality", {k: v for k, v in self.results["equality"].items() if isinstance(v, (bool, int))})

    def load(self, name: str) -> float:
        """Tokens a second of a mix of prefill and decode, all prompts new."""
        requests, length, tokens = (4, 96, 16) if self.tiny else (32, 1024, 192)
        prompts = [self.prompt(length) for _ in range(requests)]
        result = self.children[name].call("generate", prompts=prompts, tokens=tokens, timeout=180)
        return requests * tokens / result["ms"] * 1e3

    def throughput(self, names: str) -> None:
        found = self.results.setdefault("tokens_per_second", {})
        for _ in range(4 if not self.tiny else 1):
            for name in names:
                if name in self.children:
                    found.setdefault(name, []).append(round(self.load(name), 1))
                    self.children[name].call("settle")
        say("tokens/s", {name: statistics.median(values) for name, values in found.items()})

    def overhead(self, names: str) -> None:
        """Short new prompts, nothing to hit: time to first token with and without the connector, taking turns."""
        length = 64 if self.tiny else 2048
        found = self.results.setdefault("nothing_to_hit_ms", {})
        for _ in range(24 if not self.tiny else 2):
            for name in names:
                if name in self.children:
                    found.setdefault(name, []).append(round(self.one(name, self.prompt(length))["ms"], 3))
                    self.children[name].call("settle")
        say("nothing to hit, ms", {name: statistics.median(values) for name, values in found.items()})

    def table(self) -> str:
        modes = self.results["ttft_ms"]
        lines = ["| ms, median [min-max] | " + " | ".join(f"{length:,}" for length in self.lengths) + " |"]
        lines.append("|---|" + "---|" * len(self.lengths))
        for mode, values in modes.items():
            cells = []
            for length in self.lengths:
                some = values.get(str(length))
                cells.append(f"{statistics.median(some):.1f} [{min(some):.1f}-{max(some):.1f}]" if some else "")
            lines.append(f"| {mode} | " + " | ".join(cells) + " |")
        for key, unit in (
            ("nothing_to_hit_ms", "ms, 2,048 tokens, nothing to hit"),
            ("tokens_per_second", "tokens/s while saving"),
        ):
            found = {name: statistics.median(values) for name, values in self.results.get(key, {}).items()}
            if found:
                lines.append(f"| {unit} | " + ", ".join(f"{name}: {value:.2f}" for name, value in found.items()) + " |")
            if "A" in found and "C" in found:
                lines.append(f"| {unit}: A (VCache) / C (no connector) | {found['A'] / found['C']:.4f} |")
        return "\n".join(lines)

    def execute(self) -> None:
        together = self.arguments.together
        if together == "auto":
            together = "yes" if self.tiny or gpu_memory() >= 125 * GIB else "no"
        self.results["together"] = together
        say("memory of the GPU:", gpu_memory() // GIB, "GiB; all engines together:", together)
        self.section("pool", self.start_pool)
        if together == "yes":
            self.measure("ABCD")
        else:
            # A stays, so that overheads are compared side by side.
            self.measure("AB")
            self.stop("B")
            self.measure("C")
            self.section("overhead", lambda: self.overhead("AC"), 30)
            self.section("throughput", lambda: self.throughput("AC"), 30)
            self.stop("A", "C")
            self.measure("D")
        if together == "yes":
            self.section("overhead", lambda: self.overhead("AC"), 30)
            self.section("throughput", lambda: self.throughput("AC"), 30)

    def measure(self, names: str) -> None:
        self.section(f"start {names}", lambda: self.start_engines(names), 60)
        self.section(f"warm-up {names}", lambda: self.warm_up(names), 30)
        if "B" in names:
            self.section("equality", self.equality, 20)
        self.section(f"ttft {names}", lambda: self.ttft(names), 20)
        if "B" in names and "B" in self.children:
            self.section("statistics", self.statistics)

    def statistics(self) -> None:
        for name in "AB":
            self.results[f"stats_{name}"] = self.children[name].call("worker_stats") | self.children[name].call("counters")

    def close(self) -> None:
        for name in ("A", "B", "C", "D", "lender", "manager"):
            self.stop(name)


def gpu_memory() -> int:
    """Bytes of the first GPU; 0 without one. In a process of its own, so that this one holds no context."""
    code = "import torch; print(torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return int(result.stdout.strip() or 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--budget", type=float, default=470.0, help="seconds; later sections are skipped when it runs out")
    parser.add_argument(
        "--together", choices=("yes", "no", "auto"), default="auto", help="all engines on the GPU at the same time"
    )
    parser.add_argument("--segment", type=float, default=12.0, help="GiB of VRAM lent to the pool")
    parser.add_argument("--only", default="", help="names of sections, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script on a CPU")
    run = Run(parser.parse_args())
    try:
        run.execute()
    finally:
        for name, child in run.children.items():
            (run.out / f"{name}.log").write_text(child.tail(400))
        run.close()
        run.write()
    table = run.table()
    (run.out / "gpu_vllm.md").write_text(table + "\n")
    print(table, flush=True)
    for name, error in run.results["errors"].items():
        print(f"ERROR {name}: {error[:2000]}", flush=True)
    say("done")
    return 1 if run.results["errors"] else 0


BEGAN = time.monotonic()

if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        serve_commands()
    elif sys.argv[1:2] == ["--manager"]:
        serve_manager(sys.argv[2])
    elif sys.argv[1:2] == ["--lend"]:
        lend(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        raise SystemExit(main())
