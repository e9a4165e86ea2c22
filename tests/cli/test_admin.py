"""Naming segments by a prefix, and knowing when a resize has arrived."""

from __future__ import annotations

import pytest

from vcache.cli.admin import find_segment, reached
from vcache.errors import ArgumentError
from vcache.lender.slabs import slab_bytes
from vcache.segment.slots import SegmentInfo, SlabInfo

MIB = 2**20


def segment(uuid: str, payloads: list[int], granularity: int = 4096) -> SegmentInfo:
    slabs = tuple(SlabInfo(index, slab_bytes(payload, granularity)) for index, payload in enumerate(payloads))
    return SegmentInfo(
        uuid=bytes.fromhex(uuid), kind="host", host="h", device="host", broker="/b", owner=bytes(16), slabs=slabs
    )


ONE, TWO = segment("aa" * 16, [MIB]), segment("ab" + "00" * 15, [MIB])


@pytest.mark.parametrize(("prefix", "found"), [("aa", ONE), ("AB", TWO), ("aa" * 16, ONE), ("ab0", TWO)])
def test_a_prefix_names_the_one_segment_that_starts_with_it(prefix: str, found: SegmentInfo) -> None:
    assert find_segment([ONE, TWO], prefix) is found


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("a", "segment 'a': several segments begin so; known: aaaaaaaa, ab000000"),
        ("b", "segment 'b': no such segment; known: aaaaaaaa, ab000000"),
        ("", "segment '': no such segment; known: aaaaaaaa, ab000000"),
    ],
)
def test_no_or_several_segments_are_an_error_that_lists_them(prefix: str, text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        find_segment([ONE, TWO], prefix)
    assert str(caught.value) == text


def test_an_empty_pool_says_so() -> None:
    with pytest.raises(ArgumentError, match="known: none is lent"):
        find_segment([], "aa")


@pytest.mark.parametrize("granularity", [4096, 2 * MIB])
@pytest.mark.parametrize(
    ("before", "now", "target", "done"),
    [
        ([256], [256], 512, False),
        ([256], [256, 256], 512, True),
        ([256], [256, 64], 512, False),
        ([256, 256], [256, 256], 256, False),
        ([256, 256], [256], 256, True),
        ([256, 256, 256], [256, 256], 600, True),  # whole slabs: the largest number not above what was asked for
        ([256, 256, 256], [256, 256, 256], 600, False),
        ([256], [256], 256, True),
        ([256, 256], [], 0, True),
    ],
)
def test_a_resize_has_arrived_when_the_payload_is_there(
    before: list[int], now: list[int], target: int, done: bool, granularity: int
) -> None:
    first = segment("aa" * 16, [payload * MIB for payload in before], granularity)
    last = segment("aa" * 16, [payload * MIB for payload in now], granularity)
    assert reached(first, last, target * MIB) is done
