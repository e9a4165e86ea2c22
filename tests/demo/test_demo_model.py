"""The converted model's cache: made once, complete or made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcache.demo import DemoError, model


class Converter:
    """Stands for the real conversion: two files, and a count."""

    def __init__(self) -> None:
        self.calls = 0
        self.breaks = False

    def convert(self, source: Path, out: Path) -> None:
        self.calls += 1
        (out / "weights").write_bytes(source.read_bytes() * 2)
        if self.breaks:
            raise KeyboardInterrupt
        (out / "config").write_text("{}")

    def prepare(self, cache: Path, source: Path) -> tuple[Path, str]:
        return model.prepare(cache, source, self.convert)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights of a model")
    return file


def test_it_converts_once(tmp_path: Path, source: Path) -> None:
    converter = Converter()
    folder, revision = converter.prepare(tmp_path / "cache", source)
    assert converter.prepare(tmp_path / "cache", source) == (folder, revision)
    assert converter.calls == 1
    assert (folder / "weights").read_bytes() == b"weights of a model" * 2


def test_another_source_gets_another_folder(tmp_path: Path, source: Path) -> None:
    converter = Converter()
    first = converter.prepare(tmp_path / "cache", source)
    source.write_bytes(b"other weights")
    assert converter.prepare(tmp_path / "cache", source) != first
    assert converter.calls == 2


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(tmp_path: Path, source: Path) -> None:
    converter = Converter()
    converter.breaks = True
    with pytest.raises(KeyboardInterrupt):
        converter.prepare(tmp_path / "cache", source)
    assert list((tmp_path / "cache").iterdir()) == []
    converter.breaks = False
    folder, _ = converter.prepare(tmp_path / "cache", source)
    assert sorted(file.name for file in folder.iterdir()) == ["complete.json", "config", "weights"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "no manifest"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, source: Path, damage: str) -> None:
    converter = Converter()
    folder, _ = converter.prepare(tmp_path / "cache", source)
    if damage == "missing":
        (folder / "config").unlink()
    elif damage == "shorter":
        (folder / "weights").write_bytes(b"")
    else:
        (folder / "complete.json").unlink()
    converter.prepare(tmp_path / "cache", source)
    assert converter.calls == 2
    assert (folder / "weights").read_bytes() == b"weights of a model" * 2
    assert (folder / "config").exists()


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path, source: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DemoError, match=r"cannot write the converted model to .*cache: .*; set XDG_CACHE_HOME"):
        Converter().prepare(tmp_path / "cache", source)


def test_where_the_cache_lies(tmp_path: Path) -> None:
    assert model.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "vcache"
    assert model.cache_folder({}) == Path.home() / ".cache" / "vcache"


@pytest.mark.parametrize(
    ("device", "flags", "dtype"),
    [
        ("cuda:0", "", "bfloat16"),
        ("cpu", "flags : sse2 avx512_bf16", "bfloat16"),
        ("cpu", "flags : amx_bf16 avx2", "bfloat16"),
        ("cpu", "Features : asimd bf16", "bfloat16"),
        ("cpu", "flags : avx2 avx512f", "float32"),
    ],
)
def test_choice_of_dtype(device: str, flags: str, dtype: str) -> None:
    assert model.choose_dtype(device, flags) == dtype
