"""Hypothesis strategies for round trips."""

from __future__ import annotations

from hypothesis import strategies as st
from paged_world import DTYPES, MLA_ORDERS, ORDERS, Case, make_spec


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 40, max_layers: int = 3) -> Case:
    row_format = draw(st.sampled_from(("planes", "fused", "mla")))
    orders = st.sampled_from(MLA_ORDERS if row_format == "mla" else ORDERS)
    spec = make_spec(
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, max_layers)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from((1, 3, 5, 8, 16, 24))),
        row_format,
    )
    blocks = st.sampled_from((1, 2, 3, 4, 8, 16))
    return Case(
        spec,
        draw(orders),
        draw(orders),
        draw(blocks),
        draw(blocks),
        tuple(draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=3))),
        draw(st.integers(0, max_tokens)),
        draw(st.integers(0, 5)),
        draw(st.sampled_from((0, 1, 7, 16))),
        draw(st.sampled_from(("consecutive", "blocks", "random"))),
        draw(st.integers(0, 1000)),
    )
