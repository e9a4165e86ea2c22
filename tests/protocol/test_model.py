"""The write protocol holds in every order of its steps, and each fault that it must not have is found."""

import gc
from pathlib import Path

import model
import pytest
from cases import CLOCK, MUTANTS, WORLDS
from model import Model, World


@pytest.fixture(autouse=True)
def no_collection():
    """Hundreds of thousands of tuples without a cycle among them: looking for one costs a third of the time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.parametrize("title", WORLDS)
def test_protocol_holds(title):
    """No run ends in wrong bytes, with a slab that is never granted again, or with a mount that overlooks a chunk."""
    verdict = Model(WORLDS[title]).check()
    print(verdict)
    assert (verdict.wrong, verdict.stuck, verdict.lost) == ("", "", ""), str(verdict)


@pytest.mark.parametrize("title", MUTANTS)
def test_fault_is_found(title):
    """Each fault leads to what it is said to lead to, in so few steps, and to nothing worse."""
    mutant = MUTANTS[title]
    verdict = Model(mutant.world, *mutant.deviations).check()
    print(verdict)
    findings = [name for name in ("wrong", "stuck", "lost") if getattr(verdict, name)]
    assert findings == [mutant.finding], str(verdict)
    assert len(verdict.trace) <= mutant.steps, str(verdict)


@pytest.mark.parametrize("title", [title for title, mutant in MUTANTS.items() if mutant.harmless])
def test_fence_matters_only_where_memory_reorders(title):
    """What a missing fence leads to is the memory's doing: under a stronger memory the same protocol holds."""
    mutant = MUTANTS[title]
    verdict = Model(mutant.harmless, *mutant.deviations).check()
    assert (verdict.wrong, verdict.stuck, verdict.lost) == ("", "", ""), str(verdict)


def test_an_unknown_signer_that_is_waited_for_does_no_harm():
    """The other half of "headers alone: torn publication": where the signer is waited for, nobody else writes there."""
    verdict = Model(World(settled=True), "no gate").check()
    assert not verdict.wrong, str(verdict)


def test_a_refused_slot_that_keeps_its_bytes_does_no_harm():
    """The other half of "refused slot overwritten": where generations go back, puts are refused for good, no byte is wrong."""
    mutant = MUTANTS["refused slot overwritten"]
    verdict = Model(mutant.world, CLOCK).check()
    assert not verdict.wrong, str(verdict)
    assert "is refused" in verdict.stuck


def test_every_deviation_is_known():
    """A name that no line of the model asks for would be a mutant without a fault."""
    source = Path(model.__file__).read_text()
    for mutant in MUTANTS.values():
        assert all(f'"{name}"' in source for name in mutant.deviations)
