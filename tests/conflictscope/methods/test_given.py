import pytest

from conflictscope.methods.given import Given
from interp.answers import DIRECTIONS
from interp.errors import UserError
from interventions.config import InterventionFile, effect_digest
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope.methods.labs import tiny_lab

EDIT = HeadScaling.of([(2, 1), (2, 3)], -3.0)


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def file_of(model, **about):
    return InterventionFile.of([EDIT], name="edit", model=ModelIdentity.of(model, "tiny"), **about)


def test_the_file_is_the_one_candidate_towards_its_source(lab, tiny_llama):
    (condition,) = Given(file_of(tiny_llama, towards="context")).candidates(lab, "context")
    assert condition.digest == effect_digest([EDIT])
    assert (condition.towards, condition.settings) == ("context", {"file": "edit"})


def test_a_file_that_names_no_source_is_tried_towards_both(lab, tiny_llama):
    given = Given(file_of(tiny_llama))
    assert [given.candidates(lab, source)[0].towards for source in DIRECTIONS] == list(DIRECTIONS)


def test_no_file_the_other_source_and_another_model_are_refused(lab, tiny_llama):
    with pytest.raises(UserError, match="no intervention file"):
        Given().candidates(lab, "context")
    with pytest.raises(UserError, match="edit strengthens context, so that it is not tried towards memory"):
        Given(file_of(tiny_llama, towards="context")).candidates(lab, "memory")
    other = ModelIdentity.of(tiny_llama, "tiny").model_copy(update={"d_head": 16})
    with pytest.raises(UserError):
        Given(InterventionFile.of([EDIT], name="edit", model=other)).candidates(lab, "context")
