"""Where the two engines of the demo run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from . import DemoError, model

_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
_ASK = {
    "vllm": "from vllm.platforms import current_platform as p; import torch; print(p.device_type, torch.cuda.device_count())",
    "torch": "import torch; print('cuda' if torch.cuda.is_available() else 'cpu', torch.cuda.device_count())",
}


class Hardware(NamedTuple):
    devices: tuple[str, ...]
    """GPU of each of the two engines, for vLLM as `CUDA_VISIBLE_DEVICES` names it, for torch by its number; empty: CPU."""
    dtype: str
    threads: int
    """Threads of each engine on a CPU; 0: its own choice."""

    @property
    def on_gpu(self) -> bool:
        return bool(self.devices)


def find_hardware(engine: Literal["vllm", "torch"], device: str, env: Mapping[str, str] | None = None) -> Hardware:
    """Find where two engines can run. Imports nothing heavy: asks the engine in another process, where there may be a GPU.

    `device`: `auto`, `cpu` or `cuda`. Raises `DemoError` when the engine cannot run there.
    """
    name = f"the vLLM in {sys.prefix}" if engine == "vllm" else "torch"
    kind, count = "cpu", 0
    if any(Path(file).exists() for file in _GPU_FILES) and (engine, device) != ("torch", "cpu"):
        kind, count = _ask(engine)
    if kind == "cuda" and count:
        if device == "cpu":
            raise DemoError(f"--device cpu: {name} is built for GPUs; leave the option out, or use --engine torch")
        if engine == "torch":
            return Hardware(("0", str(count - 1)), model.choose_dtype("cuda"), 0)
        visible = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES", "")
        return Hardware(pick_gpus(visible, count), "auto", 0)
    if kind != "cpu" or device == "cuda":
        raise DemoError(f"--device {device}: {name} finds no usable GPU, it runs on {kind}; see `vcache doctor`")
    return Hardware((), model.choose_dtype("cpu"), threads() if engine == "vllm" else 0)


def pick_gpus(visible: str, count: int) -> tuple[str, str]:
    """Choose first and last of the visible GPUs, as `CUDA_VISIBLE_DEVICES` names them. Pure."""
    names = [name.strip() for name in visible.split(",") if name.strip()] or [str(number) for number in range(count)]
    usable = names[:count]
    return usable[0], usable[-1]


def describe(hardware: Hardware) -> str:
    """Tell the user what the engines run on. Pure."""
    if not hardware.on_gpu:
        threads_ = f"{hardware.threads} threads each, " if hardware.threads else ""
        return f"CPU, {threads_}{hardware.dtype}"
    return f"GPU {' and '.join(dict.fromkeys(hardware.devices))}"


def threads(cpu_max: str | None = None, cpus: int | None = None) -> int:
    """Count the threads worth having for a small model: the CPUs of this process, within its cgroup's quota, at most 16."""
    if cpus is None:
        cpus = len(os.sched_getaffinity(0))
    if cpu_max is None:
        path = Path("/sys/fs/cgroup/cpu.max")
        cpu_max = path.read_text() if path.exists() else "max"
    quota, _, period = cpu_max.strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return min(16, max(1, cpus))


def _ask(engine: str) -> tuple[str, int]:
    """Ask an engine on what it runs, and how many GPUs there are."""
    asked = subprocess.run([sys.executable, "-c", _ASK[engine]], capture_output=True, text=True, check=False, timeout=180)
    answer = asked.stdout.split()[-2:]
    if asked.returncode or len(answer) != 2:
        last = (asked.stderr.strip() or "it says nothing").splitlines()[-1]
        instead = "without it: --engine torch" if engine == "vllm" else "see `vcache doctor`"
        raise DemoError(f"{'vLLM' if engine == 'vllm' else engine} in {sys.prefix} does not start: {last}; {instead}")
    return answer[0], int(answer[1])
