"""vLLM with an engine on each of two GPUs: time to first token of prompts that the other GPU computed, clients over both, and
prefill apart from decoding. Part of `two_gpus.py`.

Engines: A on GPU 0 and B on GPU 1 share a pool. N on GPU 0 and C on GPU 1 have no connector. D on GPU 1 offloads to DRAM.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu_parts import Parts, say
from gpu_vllm_world import GIB, MIB, Engine, Worker, WorkerError, World, gpu_memory, installed, remove

LENGTHS = [8192 + 16, 32768 + 16, 65536 + 16]
REPEATS = (5, 5, 3)
_LAST = 600


def measure(gpus: tuple[int, int], found: dict[str, Any], parts: Parts, *, tiny: bool) -> None:
    """Everything into `found`; what fails is in `found["failed"]` by name, and the rest goes on. Raises `RuntimeError` at the
    end when something failed, or when vLLM is missing."""
    if not installed("vllm"):
        raise RuntimeError("not installed: vllm")
    folder = Path(tempfile.mkdtemp(prefix="two-gpus-"))
    world = World(folder, tiny=tiny, lengths=[256 + 32, 512 + 32] if tiny else LENGTHS)
    world.logs = parts.file.parent / "logs"
    run = Run(world, found, parts, gpus)
    try:
        run.execute()
    finally:
        world.close()
        remove(folder)
    if found.get("failed"):
        raise RuntimeError("; ".join(f"{name}: {why[:300]}" for name, why in found["failed"].items()))


class Run:
    """The steps, each isolated from the others."""

    def __init__(self, world: World, found: dict[str, Any], parts: Parts, gpus: tuple[int, int]) -> None:
        self.world, self.found, self.parts, self.gpus = world, found, parts, gpus
        self.repeats = (2, 2, 2) if world.tiny else REPEATS
        self.found |= {"ttft_ms": {}, "lengths": world.lengths}

    def execute(self) -> None:
        world = self.world
        small, large = (256 * MIB, 256 * MIB) if world.tiny else (24 * GIB, 12 * GIB)
        memory = gpu_memory()
        roomy = world.tiny or (memory >= 125 * GIB and self.gpus[0] != self.gpus[1])
        self.step("pool", world.start_manager)
        self.step("lend VRAM", lambda: world.start_lender("vram", small if roomy else large, gpu=self.gpus[0]))
        if roomy:
            self.start("ABNCD")
            self.step("warm up", lambda: self.warm_up("ABNCD"), 20)
            self.step("ttft", lambda: self.ttft("ABCD", "VRAM of GPU 0"), 20)
            self.step("clients", lambda: self.clients("AB", "NC"), 30)
            self.step("prefill apart", self.disaggregated, 30)
            world.stop("N", "C", "D")
        else:
            self.start("AB")
            self.step("warm up", lambda: self.warm_up("AB"), 20)
            self.step("ttft", lambda: self.ttft("AB", "VRAM of GPU 0"), 20)
            self.step("clients", lambda: self.clients("AB"), 30)
        world.stop("vram")
        self.step("lend DRAM", lambda: world.start_lender("dram", large, kind="host"), 25)
        self.step("ttft from DRAM", lambda: self.ttft("AB", "DRAM tier", repeats=(3, 3, 2)), 20)
        if not roomy:
            world.stop("A", "B", "dram")
            self.start("NCD")
            self.step("warm up", lambda: self.warm_up("NCD"), 20)
            self.step("ttft of the others", lambda: self.ttft("CD", ""), 20)
            self.step("clients without", lambda: self.clients("NC"), 30)

    # steps

    def step(self, name: str, work: Callable[[], object], need: float = 0.0) -> None:
        """What it raises is recorded; it is left out when fewer than `need` seconds are left."""
        failed: dict[str, str] = self.found.setdefault("failed", {})
        if self.parts.left < need:
            failed[name] = f"left out: {self.parts.left:.0f} s left, {need:.0f} needed"
        else:
            began = time.monotonic()
            try:
                work()
            except Exception as error:  # noqa: BLE001 - recorded, and the others go on
                failed[name] = f"{type(error).__name__}: {error}"[-2500:]
                say(f"vllm, {name} FAILED: {error}")
            self.found.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        self.parts.write()

    def start(self, names: str) -> None:
        world = self.world
        kinds: dict[str, tuple[dict[str, Any] | None, int]] = {
            "A": (world.vcache(), self.gpus[0]),
            "B": (world.vcache(wait_for_prefill_ms=200), self.gpus[1]),
            "N": (None, self.gpus[0]),
            "C": (None, self.gpus[1]),
            "D": (world.native(), self.gpus[1]),
        }

        def work() -> None:
            wanted = {name: kinds[name] for name in names if not (world.tiny and name in "DN")}
            failed = world.start_engines(wanted, max(60.0, min(200.0, self.parts.left - 20)))
            if failed:
                raise RuntimeError("; ".join(f"{name}: {why[-700:]}" for name, why in failed.items()))

        self.step(f"start {names}", work, 60)

    def warm_up(self, names: str) -> None:
        """Every length on every engine; both GPUs at the same time."""
        world = self.world
        for length in world.lengths:
            for side in ("AB", "NC", "D"):
                both = [name for name in side if name in names and world.has(name)]
                for _ in range(2):
                    self.together({name: world.prompt(length) for name in both}, 2)
            self.through("A", "B", length)

    def ttft(self, names: str, source: str, *, repeats: tuple[int, ...] = ()) -> None:
        """`source`: where the pool's memory is. A computes for B, C for itself, at the same time; D alone."""
        world = self.world
        for length, count in zip(world.lengths, repeats or self.repeats, strict=False):
            if source and source not in ("VRAM of GPU 0",):
                self.through("A", "B", length)  # maps and pins
            for repeat in range(count):
                if self.parts.left < 30 and repeat >= 2:
                    break
                if "A" in names and world.has("A", "B"):
                    self.shared(length, source, beside="C" if "C" in names else "")
                elif "C" in names and world.has("C"):
                    self.plain(length)
                if "D" in names and world.has("D"):
                    self.offloaded(length)
            self.parts.write()
        say(
            {
                mode: {length: sorted(some)[len(some) // 2] for length, some in by.items()}
                for mode, by in self.found["ttft_ms"].items()
            }
        )

    def shared(self, length: int, source: str, beside: str) -> None:
        world = self.world
        ids = world.prompt(length)
        prompts = {"A": ids}
        if beside and world.has(beside):
            prompts[beside] = world.prompt(length)
        world.mark()
        cold = self.together(prompts)
        world.settle("A", length // world.chunk)
        loaded, own = world.one("B", ids), world.one("B", ids)
        self.note("GPU 0, recompute while saving", length, cold["A"])
        self.note(f"GPU 1, through VCache, {source}" if hit(loaded, length) else f"GPU 1, missed, {source}", length, loaded)
        self.note("GPU 1, own prefix hit", length, own)
        first = [result["tokens"][0][0] for result in (cold["A"], loaded, own)]
        count = self.found.setdefault("first_tokens", {"prompts": 0, "all equal": 0, "last two equal": 0})
        count["prompts"] += 1
        count["all equal"] += len(set(first)) == 1
        count["last two equal"] += first[1] == first[2]
        if beside in cold:
            self.note("GPU 1, recompute, no connector", length, cold[beside])

    def plain(self, length: int) -> None:
        ids = self.world.prompt(length)
        self.note("GPU 1, recompute, no connector", length, self.world.one("C", ids))

    def offloaded(self, length: int) -> None:
        _, again = self.world.offloaded("D", self.world.prompt(length))
        self.note("GPU 1, native CPU offload" if hit(again, length) else "GPU 1, native CPU offload, missed", length, again)

    def clients(self, *pairs: str) -> None:
        """Eight clients in a closed loop; documents that several requests share; requests go to both engines in turn."""
        tiny = self.world.tiny
        for pair in pairs:
            names = [name for name in pair if self.world.has(name)]
            if not names:
                continue
            rng = random.Random(7)
            documents = [self._tokens(rng, 384 if tiny else 12_288) for _ in range(4 if tiny else 12)]
            count = 2 if tiny else 12
            plan = [
                [documents[rng.randrange(len(documents))] + self._tokens(rng, 32 if tiny else 128) for _ in range(count)]
                for _ in range(8)
            ]
            way = "with VCache" if names[0] in "AB" else "without"
            self.found.setdefault("clients", {})[way] = run_clients(self.world, names, plan, 8 if tiny else 48)
            self.parts.write()
        say(
            {
                way: {key: value for key, value in each.items() if key != "ttfts_ms"}
                for way, each in self.found["clients"].items()
            }
        )

    def disaggregated(self) -> None:
        """The same load twice: prefill on A and decoding on B, and both on each of N and C."""
        tiny = self.world.tiny
        rng = random.Random(9)
        streams = [self._tokens(rng, 96 if tiny else 2048) for _ in range(2 if tiny else 8)]
        long = [self._tokens(rng, 384 if tiny else 16_384) for _ in range(2 if tiny else 10)]
        tokens = (16, 4) if tiny else (256, 16)
        found = self.found.setdefault("prefill and decode", {})
        if self.world.has("A", "B"):
            found["apart"] = mixed_load(self.world, ["A"], ["B"], streams, long, tokens)
        both = [name for name in "NC" if self.world.has(name)]
        if both:
            found["together"] = mixed_load(self.world, both, both, streams, long, tokens)
        say({way: {key: value for key, value in each.items() if key != "gaps_ms"} for way, each in found.items()})

    # helpers

    def together(self, prompts: dict[str, list[int]], tokens: int = 1) -> dict[str, dict[str, Any]]:
        """Ask several engines at the same time."""
        engines = self.world.engines
        begun = {name: engines[name].begin(Engine.generate, prompts=[ids], tokens=tokens) for name, ids in prompts.items()}
        found = {name: answer.result() for name, answer in begun.items()}
        for name in prompts:
            engines[name].call(Engine.settle)
        return found

    def through(self, writer: str, reader: str, length: int) -> None:
        if self.world.has(writer, reader):
            ids = self.world.prompt(length)
            self.world.mark()
            self.world.one(writer, ids, 2)
            self.world.settle(writer, length // self.world.chunk)
            self.world.one(reader, ids, 2)

    def note(self, mode: str, length: int, result: dict[str, Any]) -> None:
        self.found["ttft_ms"].setdefault(mode, {}).setdefault(str(length), []).append(round(result["ms"], 2))

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(10, self.world.vocabulary - 10) for _ in range(count)]


def hit(result: dict[str, Any], length: int) -> bool:
    return bool(result["cached"][0] >= length - _LAST)


class Driver:
    """Serves requests on one engine while they arrive. A context manager; requests must be done before it ends."""

    def __init__(self, engine: Worker) -> None:
        self._engine, self._waiting, self._lock, self._next = engine, dict[int, Future[dict[str, Any]]](), threading.Lock(), 0
        self._driving = engine.begin(Engine.drive)
        self._thread = threading.Thread(target=self._listen, name=f"drive-{engine.name}", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], tokens: int) -> Future[dict[str, Any]]:
        """The future's result has `ttft`, `gaps` (seconds), `cached`, `asked`, `tokens`."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            self._next += 1
            self._waiting[self._next] = future
            self._engine.tell({"id": self._next, "prompt": prompt, "tokens": tokens})
        return future

    def _listen(self) -> None:
        try:
            self._driving.result(120, self._answered)
        except (WorkerError, ValueError, KeyError) as error:
            with self._lock:
                for future in self._waiting.values():
                    future.set_exception(error)
                self._waiting.clear()

    def _answered(self, answer: dict[str, Any]) -> None:
        with self._lock:
            self._waiting.pop(answer["id"]).set_result(answer)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._engine.tell({"end": True})
        self._thread.join(130)


def run_clients(world: World, names: list[str], plan: list[list[list[int]]], tokens: int) -> dict[str, Any]:
    """`plan`: the prompts of each client, one after the other. Request k goes to engine k modulo their number."""
    drivers = [Driver(world.engines[name]) for name in names]
    turn = iter(range(10**9))
    lock = threading.Lock()

    def client(prompts: list[list[int]]) -> list[dict[str, Any]]:
        answers = []
        for prompt in prompts:
            with lock:
                driver = drivers[next(turn) % len(drivers)]
            answers.append(driver.submit(prompt, tokens).result(120))
        return answers

    began = time.monotonic()
    try:
        with ThreadPoolExecutor(len(plan)) as pool:
            answers = [answer for some in pool.map(client, plan) for answer in some]
        seconds = time.monotonic() - began
    finally:
        for driver in drivers:
            driver.__exit__(None, None, None)
    ttfts = sorted(1e3 * answer["ttft"] for answer in answers)
    return {
        "engines": names,
        "clients": len(plan),
        "requests": len(answers),
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(answers) / seconds, 2),
        "prompt_tokens_per_s": round(sum(answer["asked"] for answer in answers) / seconds),
        "new_tokens_per_s": round(sum(answer["tokens"] for answer in answers) / seconds, 1),
        "hit_ratio": round(sum(answer["cached"] for answer in answers) / sum(answer["asked"] for answer in answers), 4),
        "ttft_p50_ms": round(at(ttfts, 0.5), 1),
        "ttft_p99_ms": round(at(ttfts, 0.99), 1),
        "ttfts_ms": [round(value, 1) for value in ttfts],
    }


def mixed_load(
    world: World,
    prefill: list[str],
    decode: list[str],
    streams: list[list[int]],
    long: list[list[int]],
    tokens: tuple[int, int],
) -> dict[str, Any]:
    """Streams that decode `tokens[0]` tokens, while long prompts arrive one after the other, each with `tokens[1]` new tokens.
    Where `prefill` and `decode` differ, a prompt is computed on the first (one token) and then asked of the second."""
    drivers = {name: Driver(world.engines[name]) for name in dict.fromkeys([*prefill, *decode])}
    apart = prefill != decode

    def ask(number: int, prompt: list[int], count: int) -> dict[str, Any]:
        began = time.monotonic()
        if apart:
            drivers[prefill[number % len(prefill)]].submit(prompt, 1).result(120)
        before = time.monotonic() - began
        answer = drivers[decode[number % len(decode)]].submit(prompt, count).result(120)
        return answer | {"whole_ttft": before + answer["ttft"]}

    began = time.monotonic()
    try:
        with ThreadPoolExecutor(len(streams) + 1) as pool:
            running = [pool.submit(ask, number, prompt, tokens[0]) for number, prompt in enumerate(streams)]
            arrived = [ask(number, prompt, tokens[1]) for number, prompt in enumerate(long)]
            decoded = [future.result(120) for future in running]
        seconds = time.monotonic() - began
    finally:
        for driver in drivers.values():
            driver.__exit__(None, None, None)
    gaps = sorted(1e3 * gap for answer in decoded for gap in answer["gaps"])
    first = sorted(1e3 * answer["whole_ttft"] for answer in arrived)
    return {
        "prefill_on": prefill,
        "decode_on": decode,
        "seconds": round(seconds, 2),
        "gap_p50_ms": round(at(gaps, 0.5), 2),
        "gap_p99_ms": round(at(gaps, 0.99), 2),
        "gap_max_ms": round(gaps[-1], 2),
        "long_ttft_p50_ms": round(at(first, 0.5), 1),
        "long_ttft_max_ms": round(first[-1], 1),
        "long_cached_tokens": [answer["cached"] for answer in arrived],
        "streams": len(streams),
        "long_prompts": len(long),
        "lengths": [len(streams[0]), len(long[0])],
    }


def at(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
