"""What tells weights from others: a fingerprint of what their files hold, not of where they lie or when they were written."""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from ...keys import DIGEST_BYTES
from .kv_group import DeclinedError

SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf"))
ADAPTER_CONFIG = "adapter_config.json"
FROM_FILES = frozenset(
    (
        *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "mistral", "gguf", "bitsandbytes"),
        *("sharded_state", "runai_streamer", "runai_streamer_sharded"),
    )
)
"""Load formats that read the files of the model's folder, and nothing else."""
SAMPLE = 4096
"""Bytes read in each place."""
SAMPLES = 8192
"""Places in all files together, or `MIN_SAMPLES` in each: a second of reading at most from a local disk."""
MIN_SAMPLES = 16
MAX_HEADER = 100_000_000
"""No safetensors header is longer."""
MAX_ADAPTERS = 1024


def of_model(vllm_config: Any, given: str = "") -> str:
    """Name the weights of a vLLM instance, for the namespace. Reads up to some 32 MiB of files.

    `given` by the user goes before everything. Raises `DeclinedError` when the weights cannot be told from others.
    """
    if given:
        return f"given:{given}"
    model, load = vllm_config.model_config, vllm_config.load_config
    found = _of_files(model, load)
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft.model == model.model:
        return found
    return f"{found}+{_of_files(draft, getattr(speculative, 'draft_load_config', None) or load)}"


class Adapters:
    """Names LoRA adapters. Used by one thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, str, str], bytes] = OrderedDict()

    def name(self, lora: Any) -> bytes | None:
        """Tell an adapter from others, on whatever instance it is loaded: empty without one, None when its files are not found.
        They are read at the first request of each adapter that is loaded."""
        if lora is None:
            return b""
        key = lora.lora_int_id, lora.lora_name, lora.lora_path
        if key not in self._known:
            try:
                folder = _folder(lora.lora_path)
                found = fingerprint(folder) if folder is not None else ""
            except OSError:
                found = ""
            if not found:
                return None
            self._known[key] = f"{lora.lora_name}\0{lora.lora_path}\0{found}".encode()
            if len(self._known) > MAX_ADAPTERS:
                self._known.popitem(last=False)
        return self._known[key]

    def forget(self) -> None:
        """Read their files again: they may have been changed in place."""
        self._known.clear()


def fingerprint(path: Path) -> str:
    """Digest a file with weights, or those in a folder, in hex: names, sizes, safetensors headers, and samples. Empty when
    there are none. Equal for equal files, wherever they are. Raises `OSError`."""
    files = sorted(_files(path), key=lambda file: file.name)
    if not any(file.suffix in SUFFIXES for file in files):
        return ""
    state = blake2b(digest_size=DIGEST_BYTES)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            name = file.name.encode()
            state.update(struct.pack("<IQ", len(name), size) + name)
            count = max(MIN_SAMPLES, SAMPLES // len(files))
            header, places = _safetensors(descriptor, size, count) if file.suffix == ".safetensors" else (b"", ())
            state.update(header)
            for offset in places or _evenly(size, count):
                state.update(os.pread(descriptor, SAMPLE, offset))
        finally:
            os.close(descriptor)
    return state.hexdigest()


def _of_files(model: Any, load: Any) -> str:
    """Of one model as vLLM's configuration names it."""
    load_format = getattr(load.load_format, "value", load.load_format)
    if "dummy" in str(load_format):
        return f"dummy:{model.seed}"
    name = str(getattr(model, "model_weights", "") or model.model)
    why = f"the load format {load_format!r} does not take them from files"
    if str(load_format) in FROM_FILES:
        try:
            for commit in (getattr(model.hf_config, "_commit_hash", None), model.revision):
                folder = _folder(name, commit, getattr(load, "download_dir", None))
                found = fingerprint(folder) if folder is not None else ""
                if found:
                    return f"{_commit(folder)}{found}"
            why = "there are no files of weights on this machine"
        except OSError as error:
            why = str(error)
    raise DeclinedError(
        f"the weights of {name} cannot be told from others ({why}); set "
        '"weights" in kv_connector_extra_config to a name of theirs, such as a version or a digest: '
        "equal where they are equal, and different where they differ"
    )


def _folder(name: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Where a model or an adapter lies, by its path or its name on the Hugging Face hub. Asks no network."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or "://" in name:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _commit(folder: Path | None) -> str:
    """The commit of a snapshot in the hub's cache."""
    return f"{folder.name}:" if folder is not None and folder.parent.name == "snapshots" else ""


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for file in path.iterdir():
            if file.suffix in SUFFIXES or file.name == ADAPTER_CONFIG:
                yield file
    else:
        yield path


def _safetensors(descriptor: int, size: int, count: int) -> tuple[bytes, Sequence[int]]:
    """The header of a safetensors file, and where to read: in the middle of its tensors. Nowhere when it is not such a file."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        return b"", ()
    header = os.pread(descriptor, length, 8)
    try:
        tensors = msgspec.json.decode(header)
        spans = sorted(tuple(each["data_offsets"]) for name, each in tensors.items() if name != "__metadata__")
        middles = [8 + length + max(begin, (begin + end - SAMPLE) // 2) for begin, end in spans]
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError):
        return header, ()
    if not middles or min(middles) < 0 or max(middles) >= size:
        return header, ()
    return header, middles[:: -(-len(middles) // count)]


def _evenly(size: int, count: int) -> list[int]:
    """So many places in a file, its beginning and its end among them; fewer when they would overlap."""
    count = min(count, -(-size // SAMPLE))
    return [max(0, size - SAMPLE) * index // max(1, count - 1) for index in range(count)]
