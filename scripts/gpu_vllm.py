"""vLLM on one GPU with VCache: time to first token of instance B for prompts that instance A computed, in one run with
recompute, own prefix hits, vLLM's native CPU offload and LMCache between two instances; overhead with nothing to hit; equal
tokens, and controls that must differ.

usage: python3 scripts/gpu_vllm.py [--out FOLDER] [--budget SECONDS] [--together yes|no|auto] [--only PART,...] [--engines ABCD]
                                   [--lengths TOKENS,...] [--graphs] [--tiny]

Needs vLLM (0.26 or later) importable, one GPU with 80 GB or more, no network. Writes FOLDER/gpu_vllm.json after every part, and
the ends of all logs to FOLDER/logs. `scripts/bench_pages.py vllm FOLDER/gpu_vllm.json` makes a page and a figure of it.
Each engine is a process of its own; all share the one GPU, and only one works at a time. Weights are random (normal, scaled by
fan-in): vLLM's own dummy weights are so small that wrong KV would not show.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_parts import Parts, say
from gpu_parts import chosen as named
from gpu_vllm_world import GIB, MIB, Engine, World, gpu_memory, installed, remove

PARTS = ("pool", "start", "warm-up", "equality", "ttft", "statistics", "overhead", "throughput", "decoding", "lmcache")
LENGTHS = [8192 + 16, 32768 + 16, 65536 + 16]
REPEATS = (7, 7, 3)
_LAST = 600
"""A load that leaves fewer tokens than this to compute counts as a hit: a chunk, a block and the prompt's end."""


class Run:
    """One run: what is measured, on a `World`, as parts."""

    def __init__(self, parts: Parts, world: World, *, segment: int, engines: str = "ABCD") -> None:
        """`engines`: which ones are started, if they are started together."""
        self.parts, self.world, self.segment, self.engines = parts, world, segment, engines
        self.results = parts.results
        self.results |= {"ttft_ms": {}, "lengths": world.lengths, "tiny": world.tiny}
        self.repeats = (2, 2, 2) if world.tiny else REPEATS

    # parts

    def execute(self, together: bool) -> None:
        """Everything. `together`: the GPU holds four engines at a time."""
        self.parts.run("pool", self.pool)
        if together:
            self.phase(self.engines)
            self.side_by_side()
            self.world.stop("B", "D")
        else:
            self.phase("AB")
            self.world.stop("B")
            self.phase("C")
            self.side_by_side()
            self.world.stop("A", "C")
            self.phase("D")
            self.world.stop("D")
        self.world.stop("A", "C", "lender")
        if self.parts.wanted("lmcache"):
            self.lmcache()

    def phase(self, names: str) -> None:
        """Start engines and take their times to first token."""
        self.parts.run(f"start {names}", lambda found: self.start(found, names), need=60)
        if not any(self.world.has(name) for name in names):
            return
        self.parts.run(f"warm-up {names}", lambda found: self.warm_up(names), need=20)
        if "B" in names:
            self.parts.run("equality", self.equality, need=15)
        self.parts.run(f"ttft {names}", lambda found: self.ttft(names), need=15)
        if "B" in names:
            self.parts.run("statistics", self.statistics)

    def side_by_side(self) -> None:
        self.parts.run("overhead", self.overhead, need=20)
        self.parts.run("throughput", self.throughput, need=40)
        self.parts.run("decoding", self.decoding, need=40)

    def pool(self, found: dict[str, Any]) -> None:
        self.world.start_manager()
        self.world.start_lender("lender", self.segment)
        found["lent"] = self.segment

    def start(self, found: dict[str, Any], names: str) -> None:
        """A, B: VCache. C: no connector. D: native offload. E, F: LMCache."""
        world = self.world
        kinds = {"A": world.vcache(), "B": world.vcache(), "C": None, "D": world.native(), "E": world.lmcache()}
        kinds["F"] = kinds["E"]
        wanted = {name: (kinds[name], 0) for name in names if not (world.tiny and name in "DEF")}
        failed = world.start_engines(wanted, max(60.0, min(240.0, self.parts.left - 30)))
        for name in wanted:
            if world.has(name):
                found[name] = world.engines[name].call(Engine.device)
        if failed:
            found["failed"] = failed
            raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))

    def warm_up(self, names: str) -> None:
        """Every length on every engine, and over every way that is measured."""
        world = self.world
        for length in world.lengths:
            for name in names:
                if world.has(name):
                    ids = world.prompt(length)
                    for _ in range(2):
                        world.one(name, ids, 2)
                        world.settle(name)
            for writer, reader in ("AB", "EF"):
                if writer in names and reader in names and world.has(writer, reader):
                    ids = world.prompt(length)
                    world.one(writer, ids, 2)
                    world.settle(writer, 0)
                    world.one(reader, ids, 2)
        say("warmed up", names)

    def ttft(self, names: str) -> None:
        world = self.world
        for length, repeats in zip(world.lengths, self.repeats, strict=False):
            for repeat in range(repeats):
                if self.parts.left < 45 and repeat >= 2:
                    say(f"{length}: stopped after {repeat} repeats, for lack of time")
                    break
                if {"A", "B"} <= set(names) and world.has("A", "B"):
                    self.shared(length)
                if "C" in names and world.has("C"):
                    self.plain(length)
                if "D" in names and world.has("D"):
                    self.offloaded(length)
                if {"E", "F"} <= set(names) and world.has("E", "F"):
                    self.through_lmcache(length)
            self.tell(length)
            self.parts.write()

    def shared(self, length: int) -> None:
        """A computes, B loads; then B's own hit. All three give the same first token."""
        world, ids = self.world, self.world.prompt(length)
        world.mark()
        cold = world.one("A", ids)
        complete = world.settle("A", length // world.chunk)
        loaded, own = world.one("B", ids), world.one("B", ids)
        self.note("A, recompute while saving", length, cold)
        self.note("B, through VCache" if loaded["cached"][0] >= length - _LAST else "B, missed", length, loaded)
        self.note("B, own prefix hit", length, own)
        self.first_tokens("VCache", length, cold, loaded, own)
        if not complete:
            self.results.setdefault("notes", []).append(f"{length} tokens: the pool did not get all chunks within 15 s")

    def plain(self, length: int) -> None:
        """No connector: recompute, and own hit."""
        ids = self.world.prompt(length)
        cold, own = self.world.one("C", ids), self.world.one("C", ids)
        self.note("recompute, no connector", length, cold)
        self.note("own prefix hit, no connector", length, own)
        self.first_tokens("no connector", length, cold, own)

    def offloaded(self, length: int) -> None:
        """Native CPU offload: computed, dropped from the prefix cache, loaded back by the same instance."""
        cold, again = self.world.offloaded("D", self.world.prompt(length))
        hit = again["cached"][0] >= length - _LAST
        self.note("native CPU offload" if hit else "native CPU offload, missed", length, again)
        self.first_tokens("native CPU offload", length, cold, again)

    def through_lmcache(self, length: int) -> None:
        world, ids = self.world, self.world.prompt(length)
        cold = world.one("E", ids)
        world.one("E", world.prompt(64), 8)
        world.engines["E"].call(Engine.settle, pause=0.6)
        loaded = world.one("F", ids)
        hit = loaded["cached"][0] >= length - _LAST
        self.note("LMCache, E to F" if hit else "LMCache, missed", length, loaded)
        self.first_tokens("LMCache", length, cold, loaded)

    def equality(self, found: dict[str, Any]) -> None:
        """B's tokens after a load equal those of A, which computed the prompt, on its own prefix hit (the same shapes in both).
        Controls: another beginning gives other tokens, with the same end and the same length."""
        world = self.world
        length = world.lengths[0] if world.tiny else world.lengths[min(1, len(world.lengths) - 1)]
        ids = world.prompt(length)
        world.mark()
        cold = world.one("A", ids, 16)["tokens"][0]
        world.settle("A", length // world.chunk)
        hit_a = world.one("A", ids, 16)["tokens"][0]
        loaded = world.one("B", ids, 16)
        other = world.prompt(length // 2) + ids[length // 2 :]
        changed = world.one("B", other, 16)
        found |= {
            "length": length,
            "cached_on_b": loaded["cached"][0],
            "a_recomputed": cold,
            "a_own_hit": hit_a,
            "b_through_vcache": loaded["tokens"][0],
            "b_other_beginning": changed["tokens"][0],
            "equal": loaded["tokens"][0] == hit_a,
            "equal_to_recompute": loaded["tokens"][0] == cold,
            "control_differs": changed["tokens"][0] != loaded["tokens"][0],
        }
        say("equality", {name: value for name, value in found.items() if isinstance(value, (bool, int))})
        assert found["cached_on_b"] >= length - _LAST, f"B loaded only {found['cached_on_b']} of {length} tokens"
        assert found["equal"], "B's tokens differ from A's"
        assert found["control_differs"], "another prompt gives the same tokens: these weights show nothing"

    def overhead(self, found: dict[str, Any]) -> None:
        """New prompts, nothing to hit: time to first token with (A) and without (C) the connector, taking turns."""
        world = self.world
        found["length"] = length = 64 if world.tiny else 2048
        for turn in range(3 if world.tiny else 30):
            for name in "AC" if turn % 2 else "CA":
                taken = world.one(name, world.prompt(length))["ms"]
                world.settle(name)
                if turn:
                    found.setdefault(name, []).append(round(taken, 3))
        say("nothing to hit, ms", medians(found))

    def throughput(self, found: dict[str, Any]) -> None:
        """Tokens a second of prefill and decode together, all prompts new, A saving them; taking turns."""
        self.generate_in_turns(found, 96 if self.world.tiny else 1024, 16 if self.world.tiny else 96)

    def decoding(self, found: dict[str, Any]) -> None:
        """The same with prompts too short to be saved: what the connector costs a step of decoding."""
        self.generate_in_turns(found, 40, 16 if self.world.tiny else 192)

    def generate_in_turns(self, found: dict[str, Any], length: int, tokens: int) -> None:
        world, requests = self.world, 4 if self.world.tiny else 32
        found |= {"requests": requests, "length": length, "new_tokens": tokens}
        for turn in range(2 if world.tiny else 21 if world.graphs else 7):
            if turn >= 3 and self.parts.left < (30 if world.graphs else 90):
                break
            for name in "AC" if turn % 2 else "CA":
                prompts = [world.prompt(length) for _ in range(requests)]
                taken = world.engines[name].begin(Engine.generate, prompts=prompts, tokens=tokens).result(180)["ms"]
                world.settle(name)
                if turn:
                    found.setdefault(name, []).append(round(requests * tokens / taken * 1e3, 1))
            self.parts.write()
        say("tokens/s", medians(found))

    def statistics(self, found: dict[str, Any]) -> None:
        for name in "AB":
            engine = self.world.engines[name]
            found[name] = engine.call(Engine.worker_stats) | engine.call(Engine.counters)

    def lmcache(self) -> None:
        """LMCache's server process, and two engines that share it."""
        if not installed("lmcache"):
            self.parts.skip("lmcache", "not installed")
            return
        if self.parts.run("lmcache", lambda found: self.world.start_lmcache(24 * GIB), need=100):
            self.phase("EF")

    # helpers

    def note(self, mode: str, length: int, result: dict[str, Any]) -> None:
        self.results["ttft_ms"].setdefault(mode, {}).setdefault(str(length), []).append(round(result["ms"], 2))

    def first_tokens(self, way: str, length: int, *results: dict[str, Any]) -> None:
        """Count how often all of them began with the same token, and how often the last two did: a prompt that was computed in
        other pieces may differ by rounding, two that were read back may not."""
        fresh = {"prompts": 0, "all equal": 0, "last two equal": 0}
        count = self.results.setdefault("first_tokens", {}).setdefault(way, fresh)
        first = [result["tokens"][0][0] for result in results]
        count["prompts"] += 1
        count["all equal"] += len(set(first)) == 1
        count["last two equal"] += first[-1] == first[-2]

    def tell(self, length: int) -> None:
        for mode, values in self.results["ttft_ms"].items():
            if str(length) in values:
                say(f"{length:6d} tokens  {mode:32s} {statistics.median(values[str(length)]):9.1f} ms")


def medians(found: dict[str, Any]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items() if isinstance(values, list) and values}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    made.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    made.add_argument("--budget", type=float, default=470.0, help="seconds; later parts are left out when it runs out")
    made.add_argument("--together", choices=("yes", "no", "auto"), default="auto", help="four engines on the GPU at a time")
    made.add_argument("--segment", type=float, default=12.0, help="GiB of VRAM lent to the pool")
    made.add_argument("--only", default="", help=f"parts, separated by commas, of: {', '.join(PARTS)}")
    made.add_argument("--engines", default="ABCD", help="those that are started together: A, B: VCache, C: none, D: native")
    made.add_argument("--lengths", default="", help="tokens of the prompts, separated by commas, rising")
    made.add_argument("--graphs", action="store_true", help="decode with CUDA graphs, as a server does; default: eager")
    made.add_argument("--tiny", action="store_true", help="a tiny model, to try this script on a CPU")
    return made


def chosen(only: str, engines: str = "ABCD") -> list[str]:
    """The parts of `--only` with those that they stand on. Raises `SystemExit` for an unknown one."""
    names = named("gpu_vllm", only, PARTS)
    if not names:
        return []
    bases = ["pool", f"start {engines}", "start AB", "start C", "start D"]
    phases = (engines, "AB", "C", "D", "EF")
    return [*bases, *names, *(f"{name} {phase}" for name in (*names, "warm-up") for phase in phases), "start EF"]


def main() -> int:
    arguments = parser().parse_args()
    only = chosen(arguments.only, arguments.engines)
    if not installed("vllm"):
        print("gpu_vllm: vLLM cannot be imported by this Python; set PYTHONPATH to where it is", file=sys.stderr)
        return 2
    memory = gpu_memory()
    if not memory and not arguments.tiny:
        print("gpu_vllm: torch sees no GPU; --tiny tries this script on a CPU", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="gpu-vllm-"))
    lengths = [int(length) for length in arguments.lengths.split(",") if length] or LENGTHS
    lengths = [256 + 32, 512 + 32] if arguments.tiny else lengths
    world = World(folder, tiny=arguments.tiny, lengths=lengths, graphs=arguments.graphs)
    world.logs = arguments.out / "logs"
    parts = Parts(arguments.out / "gpu_vllm.json", arguments.budget, only)
    together = arguments.tiny or memory >= 125 * GIB if arguments.together == "auto" else arguments.together == "yes"
    parts.results |= {"together": together, "gpu_bytes": memory, "graphs": arguments.graphs}
    say("memory of the GPU:", memory // GIB, "GiB; four engines at a time:", together)
    run = Run(parts, world, segment=256 * MIB if arguments.tiny else int(arguments.segment * GIB), engines=arguments.engines)
    try:
        run.execute(together)
    finally:
        world.close()
        parts.write()
        remove(folder)
    print(parts.summary(), flush=True)
    return 1 if parts.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
