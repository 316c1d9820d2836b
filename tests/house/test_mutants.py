"""The lists of mutants are of the sources as they are; `tests/mutants` runs them."""

import pytest

from tests.mutants.__main__ import changed, read


@pytest.mark.parametrize("engine", ["reference", "triton", "cpu"])
def test_every_mutant_changes_its_source(engine):
    mutants = read(engine)
    assert len(mutants) > 40
    for mutant in mutants:
        changed(mutant)  # says which does not, and ends
        assert mutant.old != mutant.new
