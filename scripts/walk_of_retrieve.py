"""Trace the walk of one `retrieve` through the source: which functions in which files, in the order in which they are entered.

usage: walk_of_retrieve.py [--functions]    PYTHONPATH chooses the source: another tree is measured with the same script

An engine with a manager of its own in this process retrieves 600 tokens from its pool into a paged cache in host memory; what
the calling thread does is counted, from arguments to result, the manager's side included. A **station** is a file that leads
on: one of its functions calls another file, which is entered for the first time. Other files are **helpers**: records,
arithmetic and memory accesses, which are called and return. Needs torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

import vcache
from vcache import KVCacheSpec, VCacheConfig, VCacheEngine

SOURCE = Path(vcache.__file__).parent


class Call(NamedTuple):
    """One function that was entered from another file."""

    caller: str
    file: str
    function: str


def trace_retrieve() -> list[Call]:
    """Calls from file to file during one retrieve, in order."""
    spec = KVCacheSpec(model="walk", dtype="float32", num_layers=2, num_kv_heads=2, head_size=64)
    paged = [torch.randn(2, 40, 16, 2, 64) for _ in range(2)]
    prompt, slots, calls = list(range(600)), torch.arange(600), list[Call]()

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not (file := _file(frame)):
            return
        caller, back = "", frame.f_back
        while back is not None and not (caller := _file(back)):
            back = back.f_back
        if caller != file:
            calls.append(Call(caller, file, frame.f_code.co_qualname))

    with VCacheEngine(VCacheConfig(), spec, device="cpu") as engine:
        engine.store(prompt, kvcaches=paged, slot_mapping=slots)
        engine.retrieve(prompt, kvcaches=paged, slot_mapping=slots)  # imports, layouts and mappings are there now
        sys.setprofile(record)
        try:
            there = engine.retrieve(prompt, kvcaches=paged, slot_mapping=slots)
        finally:
            sys.setprofile(None)
        assert there.all()
    return calls


def _file(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(SOURCE).with_suffix("").as_posix() if path.is_relative_to(SOURCE) else ""


def main() -> None:
    """Print stations, helpers and, if asked for, functions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--functions", action="store_true", help="list each function entered from another file")
    arguments = parser.parse_args()
    calls = trace_retrieve()
    files = list(dict.fromkeys(call.file for call in calls))
    first = {file: next(call.caller for call in calls if call.file == file) for file in files}
    stations = [file for file in files if file in first.values()]
    print(f"{len(stations)} stations: {' > '.join(stations)}")
    helpers = [file for file in files if file not in stations]
    print(f"{len(helpers)} helpers: {', '.join(helpers)}")
    print(f"{len(files)} files, {len(calls)} calls from file to file")
    if arguments.functions:
        for call in dict.fromkeys(calls):
            print(f"  {call.caller or 'caller':32} > {call.file}: {call.function}")


if __name__ == "__main__":
    main()
