"""Paged memory under a small transformers model: same numbers as an ordinary cache, and faults show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'demo'")

from vcache.demo.pager import PagedMemory  # noqa: E402
from vcache.demo.runner import Generation, generate, steps  # noqa: E402
from vcache.spec import KVCacheSpec  # noqa: E402

STEP = 16
PROMPT = [(7 * i + i * i) % 97 for i in range(75)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that a second thread would only wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.12,
    )
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).to(getattr(torch, request.param)).eval()


def memory(model: Any, block_size: int = 8, seed: int = 3) -> PagedMemory:
    dtype = str(model.dtype).removeprefix("torch.")
    spec = KVCacheSpec(model="tiny", dtype=dtype, num_layers=3, num_kv_heads=2, head_size=16)
    return PagedMemory(spec, len(PROMPT) + 12, block_size, seed=seed)


def run(model: Any, pages: PagedMemory, present: int = 0) -> Generation:
    return generate(model, PROMPT, pages, present=present, step=STEP, max_tokens=12, end_token=-1)


def copy_rows(source: PagedMemory, target: PagedMemory, tokens: int) -> None:
    for ours, theirs in zip(source.tensors, target.tensors, strict=True):
        theirs.flatten(1, 2)[:, target.slot_mapping[:tokens]] = ours.flatten(1, 2)[:, source.slot_mapping[:tokens]]


def test_same_tokens_as_an_ordinary_cache(model: Any) -> None:
    cache = transformers.DynamicCache()
    ids, made = torch.tensor([PROMPT]), []
    with torch.inference_mode():
        for start, end in steps(0, len(PROMPT), STEP):
            logits = model(input_ids=ids[:, start:end], past_key_values=cache).logits[0, -1]
        for _ in range(12):
            made.append(int(logits.argmax()))
            logits = model(input_ids=torch.tensor([[made[-1]]]), past_key_values=cache).logits[0, -1]
    assert run(model, memory(model)).ids == made


@pytest.mark.parametrize("block_size", [1, 7, 8, 200])
def test_block_size_and_order_change_no_bit(model: Any, block_size: int) -> None:
    assert run(model, memory(model, block_size, seed=9))[::2] == run(model, memory(model))[::2]


@pytest.mark.parametrize("present", [16, 64, 74])
def test_going_on_from_copied_rows_gives_the_same_tokens(model: Any, present: int) -> None:
    source = memory(model)
    whole = run(model, source)
    target = memory(model, block_size=5, seed=4)
    copy_rows(source, target, present)
    rest = run(model, target, present)
    assert rest.ids == whole.ids
    if present % STEP == 0:
        assert rest.logits_digest == whole.logits_digest


def test_one_wrong_byte_shows(model: Any) -> None:
    """The negative control of every 'equal' that the demo prints."""
    source = memory(model)
    whole = run(model, source)
    for layer in range(3):
        target = memory(model, seed=4)
        copy_rows(source, target, 64)
        row = target.tensors[layer].flatten(1, 2)[1, target.slot_mapping[2]].view(torch.uint8)
        row[0, 2 * target.tensors[0].element_size() - 1] ^= 0x41
        assert run(model, target, 64).logits_digest != whole.logits_digest


def test_a_token_that_was_not_retrieved_cannot_pass(model: Any) -> None:
    source = memory(model)
    assert all(bool(tensor.isnan().all()) for tensor in source.tensors)
    whole = run(model, source)
    target = memory(model, seed=4)
    copy_rows(source, target, 63)
    assert run(model, target, 64).ids != whole.ids


def test_the_block_order_is_shuffled_and_slots_are_distinct(model: Any) -> None:
    slots = memory(model).slot_mapping.tolist()
    assert len(set(slots)) == len(slots) == len(PROMPT) + 12
    assert slots != sorted(slots)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 10, [(0, 10)]),
        (0, 40, [(0, 16), (16, 32), (32, 40)]),
        (16, 32, [(16, 32)]),
        (20, 40, [(20, 32), (32, 40)]),
        (39, 40, [(39, 40)]),
    ],
)
def test_steps_are_cut_at_the_same_places(start: int, end: int, expected: list[tuple[int, int]]) -> None:
    assert steps(start, end, 16) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_real_engine_between_two_paged_memories(model: Any, device: str) -> None:
    """The demo in small: what one paged memory holds goes through the pool into another one with other blocks."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from vcache import VCacheEngine
    from vcache.config import ByteSize, CacheConfig, SegmentConfig, VCacheConfig

    dtype = str(model.dtype).removeprefix("torch.")
    spec = KVCacheSpec(model="tiny", dtype=dtype, num_layers=3, num_kv_heads=2, head_size=16)
    network = copy.deepcopy(model).to(device)
    source, target = (PagedMemory(spec, len(PROMPT) + 12, size, device=device, seed=size) for size in (8, 5))
    whole = run(network, source)
    segment = SegmentConfig(kind="host" if device == "cpu" else "cuda", size=ByteSize(4 << 20), slab_size=ByteSize(4 << 20))
    with VCacheEngine(VCacheConfig(segment=segment, cache=CacheConfig(chunk_size=STEP)), spec) as engine:
        engine.store(PROMPT, kvcaches=source.tensors, slot_mapping=source.slot_mapping[: len(PROMPT)])
        other = PROMPT[:70]
        assert engine.lookup(other) == 64
        loaded = engine.retrieve(other, kvcaches=target.tensors, slot_mapping=target.slot_mapping[:70])
        assert loaded.tolist() == [True] * 64 + [False] * 6
    assert run(network, target, 64)[::2] == whole[::2]
