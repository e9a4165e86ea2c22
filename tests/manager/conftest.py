"""Worlds that several tests of the directory begin with; every rule is checked when they end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from directory_world import World


@pytest.fixture
def world() -> Iterator[World]:
    """Two engines (0, 1) and one lender (2) with two slabs of four small slots."""
    yield from checked(World("lru", engines=2, lenders=1, slabs=2))


@pytest.fixture(params=["lru", "sieve"])
def tiered_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Two engines (0, 1), VRAM (2) and host memory (3), two slabs of four small slots each."""
    yield from checked(World(request.param, engines=2, lenders=2, slabs=2))


def checked(world: World) -> Iterator[World]:
    yield world
    world.directory.check_integrity()
    world.verify_all()
