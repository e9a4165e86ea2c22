"""Chunk keys: published vectors, the chain, prefixes, partial chunks, masks, and every kind of token sequence."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.errors import ArgumentError, SpecError
from vcache.keys import DIGEST_BYTES, MAX_TOKEN, CacheKey, TokenDatabase, skipped_tokens, token_array
from vcache.spec import DTYPE_BYTES, KVCacheSpec

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "key_vectors.json").read_text())
NAMESPACE = bytes(range(DIGEST_BYTES))
TOKENS = st.lists(st.integers(0, MAX_TOKEN), max_size=60)
SIZES = st.integers(1, 9)
UNTIMED = settings(deadline=None)


def digests(tokens: Any, size: int = 4, *, partial: bool = True, namespace: bytes = NAMESPACE) -> list[bytes]:
    return [span.digest for span in TokenDatabase(namespace, size, partial=partial).spans(tokens)]


def formula(namespace: bytes, size: int, tokens: list[int]) -> list[str]:
    """The definition, written a second time with nothing of ours."""
    previous, found = namespace, []
    for start in range(0, len(tokens), size):
        chunk = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + size])
        previous = hashlib.blake2b(previous + chunk, digest_size=16, person=b"vcache-chunk-v1").digest()
        found.append(previous.hex())
    return found


# --- published vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["namespaces"], ids=lambda vector: vector["name"])
def test_namespace_vectors(vector: dict[str, Any]) -> None:
    assert KVCacheSpec(**vector["spec"]).namespace(vector["chunk_size"]).hex() == vector["namespace"]


@pytest.mark.parametrize("vector", VECTORS["chunks"], ids=lambda vector: vector["name"])
def test_chunk_vectors(vector: dict[str, Any]) -> None:
    namespace = bytes.fromhex(vector["namespace"])
    database = TokenDatabase(namespace, vector["chunk_size"], partial=vector["partial"])
    spans = database.spans(vector["tokens"])
    assert [span.digest.hex() for span in spans] == vector["digests"]
    assert [str(database.key(span.digest)) for span in spans] == vector["keys"]
    assert formula(namespace, vector["chunk_size"], vector["tokens"])[: len(spans)] == vector["digests"]


def test_vectors_cover_partial_and_extreme_tokens() -> None:
    chunks = VECTORS["chunks"]
    assert {vector["partial"] for vector in chunks} == {True, False}
    assert any(len(vector["tokens"]) % vector["chunk_size"] for vector in chunks)
    assert any(MAX_TOKEN in vector["tokens"] for vector in chunks)


def test_keys_do_not_depend_on_the_process_or_its_hash_seed() -> None:
    script = (
        "from vcache.keys import TokenDatabase; from vcache.spec import KVCacheSpec;"
        "s = KVCacheSpec(model='m', dtype='bfloat16', num_layers=2, num_kv_heads=2, head_size=8, extra={'b': '2', 'a': '1'});"
        "d = TokenDatabase(s.namespace(16), 16); print(*(d.key(x.digest) for x in d.spans(range(100))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        for seed in ("0", "1", "4294967295", "random")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 7


# --- the chain --------------------------------------------------------------------------------------------------------


@UNTIMED
@given(TOKENS, SIZES, st.booleans())
def test_spans_tile_the_prompt_from_its_start(tokens: list[int], size: int, partial: bool) -> None:
    spans = TokenDatabase(NAMESPACE, size, partial=partial).spans(tokens)
    covered = len(tokens) if partial else len(tokens) - len(tokens) % size
    assert [span.start for span in spans] == list(range(0, covered, size))
    assert [span.end for span in spans] == [min(start + size, len(tokens)) for start in range(0, covered, size)]
    assert [span.digest.hex() for span in spans] == formula(NAMESPACE, size, tokens[:covered])
    assert len({span.digest for span in spans}) == len(spans)


@UNTIMED
@given(TOKENS, TOKENS, TOKENS, SIZES)
def test_a_common_prefix_gives_common_keys_and_nothing_more(
    prefix: list[int], left: list[int], right: list[int], size: int
) -> None:
    one, two = prefix + left, prefix + right
    shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    a, b = digests(one, size, partial=False), digests(two, size, partial=False)
    whole = shared // size
    assert a[:whole] == b[:whole]
    assert not set(a[whole:]) & set(b[whole:])


@UNTIMED
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 39), SIZES)
def test_changing_one_token_changes_every_key_from_its_chunk_on(tokens: list[int], place: int, size: int) -> None:
    place %= len(tokens)
    changed = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    before, after = digests(tokens, size), digests(changed, size)
    assert before[: place // size] == after[: place // size]
    assert all(x != y for x, y in zip(before[place // size :], after[place // size :], strict=True))


@UNTIMED
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), SIZES)
def test_a_partial_chunk_is_found_by_exactly_its_own_tokens(tokens: list[int], size: int) -> None:
    rest = len(tokens) % size
    named = digests(tokens, size)
    if rest == 0:
        assert named == digests(tokens, size, partial=False)
        return
    assert named[:-1] == digests(tokens, size, partial=False)
    assert named[-1] not in digests([*tokens, 7], size)
    assert named[-1] not in digests(tokens[:-1], size)


def test_namespaces_never_share_a_key() -> None:
    assert not set(digests(range(20))) & set(digests(range(20), namespace=bytes(16)))


def test_chunk_sizes_of_one_model_never_share_a_namespace() -> None:
    spec = KVCacheSpec(model="m", dtype="float16", num_layers=1, num_kv_heads=1, head_size=8)
    assert len({spec.namespace(size) for size in (16, 64, 256)}) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("revision", "r2"),
        ("dtype", "bfloat16"),
        ("quantization", "fp8"),
        ("num_layers", 3),
        ("num_kv_heads", 2),
        ("head_size", 16),
        ("row_format", "fused"),
        ("world_size", 2),
        ("cache_salt", "tenant"),
        ("lora", "adapter"),
        ("extra", {"rope": "yarn"}),
    ],
)
def test_everything_that_decides_the_bytes_is_in_the_namespace(field: str, value: Any) -> None:
    base: dict[str, Any] = {"model": "m", "dtype": "float16", "num_layers": 1, "num_kv_heads": 1, "head_size": 8}
    assert KVCacheSpec(**base).namespace(256) != KVCacheSpec(**{**base, field: value}).namespace(256)


def test_the_rank_is_not_in_the_namespace() -> None:
    ranks = [
        KVCacheSpec(model="m", dtype="float16", num_layers=1, num_kv_heads=1, head_size=8, world_size=4, rank=rank)
        for rank in range(4)
    ]
    assert len({spec.namespace(256) for spec in ranks}) == 1


def test_namespace_fields_cannot_run_into_each_other() -> None:
    base: dict[str, Any] = {"dtype": "float16", "num_layers": 1, "num_kv_heads": 1, "head_size": 8}
    one = KVCacheSpec(model="ab", revision="c", **base)
    two = KVCacheSpec(model="a", revision="bc", **base)
    assert one.namespace(256) != two.namespace(256)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "float13"}, "spec.dtype: 'float13' is not one of"),
        ({"dtype": 16}, "spec.dtype: 16 is not one of bfloat16, float16"),
        ({"dtype": None}, "spec.dtype: None is not one of"),
        ({"num_layers": 0}, "spec.num_layers: must be at least 1, got 0"),
        ({"world_size": 2, "rank": 2}, "spec.rank: must be in [0, world_size=2), got 2"),
        ({"row_format": "mla", "num_kv_heads": 2}, "spec.num_kv_heads: must be 1 for row_format 'mla', got 2"),
    ],
)
def test_an_impossible_spec_names_its_field(change: dict[str, Any], text: str) -> None:
    base: dict[str, Any] = {"model": "m", "dtype": "float16", "num_layers": 1, "num_kv_heads": 1, "head_size": 8}
    with pytest.raises(SpecError) as caught:
        KVCacheSpec(**{**base, **change})
    assert text in str(caught.value)


def test_a_torch_dtype_is_as_good_as_its_name() -> None:
    torch = pytest.importorskip("torch")
    base: dict[str, Any] = {"model": "m", "num_layers": 1, "num_kv_heads": 1, "head_size": 8}
    for name in DTYPE_BYTES:
        spec, named = KVCacheSpec(dtype=getattr(torch, name), **base), KVCacheSpec(dtype=name, **base)
        assert (spec, hash(str(spec)), spec.dtype) == (named, hash(str(named)), name)
        assert spec.namespace(256) == named.namespace(256)
        assert msgspec.json.decode(msgspec.json.encode(spec), type=KVCacheSpec) == named
        assert spec.element_bytes == getattr(torch, name).itemsize
    for other in (torch.float64, torch.Tensor, torch.zeros(1)):
        with pytest.raises(SpecError, match=r"spec\.dtype: .* is not one of bfloat16, .*, or a torch.dtype of them"):
            KVCacheSpec(dtype=other, **base)


# --- kinds of token sequences -----------------------------------------------------------------------------------------


@UNTIMED
@given(st.lists(st.integers(0, 2**31 - 1), max_size=40))
def test_every_kind_of_sequence_gives_the_same_keys(tokens: list[int]) -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    expected = digests(tokens)
    same: list[Any] = [
        tuple(tokens),
        array("I", tokens),
        array("q", tokens),
        numpy.array(tokens, dtype=numpy.int64),
        numpy.array(tokens, dtype=numpy.uint32),
        numpy.array([[token, 0] for token in tokens], dtype=numpy.int32).reshape(-1, 2)[:, 0],
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor([[token, 0] for token in tokens], dtype=torch.int64).reshape(-1, 2)[:, 0],
    ]
    assert [digests(kind) for kind in same] == [expected] * len(same)


def test_the_input_is_not_changed() -> None:
    tokens = array("I", range(10))
    digests(tokens)
    assert tokens == array("I", range(10))


def test_an_array_is_copied() -> None:
    """Whoever names its chunks later named those of the caller's next prompt."""
    tokens = array("I", range(10))
    ids = token_array(tokens)
    tokens[0] = 7
    assert ids == array("I", range(10))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([1, -1], "every id must be an int in [0, 4294967295]"),
        ([2**32], "every id must be an int in [0, 4294967295]"),
        ([1.5], "every id must be an int in [0, 4294967295]"),
        ([None], "every id must be an int in [0, 4294967295]"),
        (["1"], "every id must be an int in [0, 4294967295]"),
        (7, "every id must be an int in [0, 4294967295]"),
        ("hello", "expected token ids, got str"),
        (b"abcd", "expected token ids, got bytes"),
    ],
)
def test_what_is_no_token_sequence_is_refused(tokens: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^tokens: ") as caught:
        token_array(tokens)
    assert text in str(caught.value)


def test_more_than_one_dimension_is_refused() -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    for tokens in (numpy.zeros((2, 3), dtype=int), torch.zeros((2, 3), dtype=torch.int64)):
        with pytest.raises(ArgumentError, match="tokens: expected one dimension, got 2"):
            token_array(tokens)
    with pytest.raises(ArgumentError, match="tokens: expected one dimension, got 0"):
        token_array(torch.tensor(3))
    with pytest.raises(ArgumentError, match="tokens: every id"):
        token_array(torch.zeros(3))


@pytest.mark.parametrize("size", [0, -1, 65536])
def test_an_impossible_chunk_size_is_refused(size: int) -> None:
    with pytest.raises(ArgumentError, match=r"chunk_size: expected 1\.\.65535"):
        TokenDatabase(NAMESPACE, size)


def test_a_namespace_of_another_length_is_refused() -> None:
    with pytest.raises(ArgumentError, match="namespace: expected 16 bytes, got 3"):
        TokenDatabase(b"abc", 4)


# --- keys as text -----------------------------------------------------------------------------------------------------


@UNTIMED
@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_a_key_survives_text(namespace: bytes, digest: bytes) -> None:
    key = CacheKey(namespace, digest)
    assert CacheKey.parse(str(key)) == key
    assert hash(CacheKey.parse(str(key))) == hash(key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vc1",
        "vc1-00-00",
        f"vc2-{'0' * 32}-{'0' * 32}",
        f"vc1-{'0' * 32}-{'g' * 32}",
        f"vc1-{'A' * 32}-{'0' * 32}",
        f"vc1-{'0' * 32}-{'0' * 32}-",
        f" vc1-{'0' * 32}-{'0' * 32}",
        f"vc1-{' 0' * 16}{'0' * 16}-{'0' * 32}",
    ],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="not a cache key"):
        CacheKey.parse(text)


# --- masks ------------------------------------------------------------------------------------------------------------


@UNTIMED
@given(st.integers(0, 5), st.integers(0, 30), SIZES)
def test_a_mask_counts_its_leading_false(chunks: int, true: int, size: int) -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    mask = [False] * (chunks * size) + [True] * true
    for kind in (mask, tuple(mask), numpy.array(mask, dtype=bool), torch.tensor(mask, dtype=torch.bool)):
        assert skipped_tokens(kind, len(mask), size) == chunks * size


def test_no_mask_skips_nothing() -> None:
    assert skipped_tokens(None, 100, 16) == 0


@pytest.mark.parametrize(
    ("mask", "count", "text"),
    [
        ([True], 2, "mask: 1 entries for 2 tokens"),
        ([True, False], 2, "mask: expected the form F...FT...T, found a False after a True"),
        ([False] * 4 + [True, False, True, True], 8, "mask: expected the form F...FT...T, found a False after a True"),
        ([False, True], 2, "mask: the number of False (1) must be a multiple of chunk_size (4)"),
        ([False] * 6, 6, "mask: the number of False (6) must be a multiple of chunk_size (4)"),
    ],
)
def test_a_wrong_mask_is_a_value_error(mask: list[bool], count: int, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        skipped_tokens(mask, count, 4)
    assert isinstance(caught.value, ArgumentError)
    assert str(caught.value) == text
