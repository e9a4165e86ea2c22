"""What tests that need a real Mooncake ask first."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcache.bindings import Part, find_problem

WITHOUT_LIBIBVERBS = Path(__file__).parent / "without_libibverbs"
"""On `PYTHONPATH`: a Mooncake as it is where the system library libibverbs1 is missing, whatever is installed."""


def need_mooncake(part: Part) -> None:
    """Skip the test, with the reason, where that part of Mooncake does not load."""
    problem = find_problem(part)
    if problem is not None:
        pytest.skip(f"Mooncake: {problem}")
