from importlib.metadata import EntryPoint

import pytest

from conflictscope.methods import ALL
from conflictscope.methods.value_scaling import ValueScaling
from conflictscope.study import method as job
from conflictscope.study.condition import Condition
from conflictscope.study.method import Method, method_named, registered
from interp.errors import UserError


class Elsewhere(Method):
    """A method of another package."""

    name = "elsewhere"

    def candidates(self, lab, towards):
        return [Condition(self.name, towards, {"seed": lab.seed})]


class Impostor(Elsewhere):
    name = ValueScaling.name


@pytest.fixture
def installed(monkeypatch):
    """Another package that names both by entry points."""
    entries = [EntryPoint(name, f"{__name__}:{name}", job.ENTRY_POINTS) for name in ("Elsewhere", "Impostor")]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda *, group: [entry for entry in entries if entry.group == group]
    )
    registered.cache_clear()
    yield
    registered.cache_clear()


def test_a_method_of_another_package_is_found_by_its_entry_point(installed):
    assert isinstance(method_named("elsewhere"), Elsewhere)
    assert list(registered())[-1] == "elsewhere"


def test_no_other_package_takes_the_place_of_a_method_of_this_one(installed):
    assert type(method_named("value_scaling")) is ValueScaling


def test_every_method_is_made_without_arguments_and_names_are_unique():
    assert [method().name for method in ALL] == list(dict.fromkeys(method.name for method in ALL))


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"no method 'magic'; choose among .*cad"):
        method_named("magic")
