"""Every method's candidates in bfloat16, as dev measures them on CPUs that multiply it, against float32."""

import contextlib
import math
from typing import Any

import pytest
import torch

from conflictscope.methods import ALL
from conflictscope.study.choice import Dev
from conflictscope.study.condition import Condition
from interp import precision
from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.precision import can_be_rough
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from tests.conflictscope.methods.answered_lab import answered_lab
from tests.conflictscope.methods.labs import tiny_lab
from tests.conflictscope.methods.test_spare import SAES

# No detector can be fitted to a random model: a gate is measured by itself, below.
NAMES = [method.name for method in ALL if method.name != "gate"]


@pytest.fixture(scope="module")
def labs(tiny_plain, tmp_path_factory):
    """One with prompts of every kind, and one whose prompts count as answered, with autoencoders."""
    model = tiny_plain("llama")
    folders = [tmp_path_factory.mktemp(name) for name in ("facts", "answered")]
    return tiny_lab(model, folders[0]), answered_lab(model, folders[1], lambda: SAES)


def candidates(method, labs):
    """The first lab that a method can run in, and some of its candidates towards either source."""
    for lab in labs:
        tries: list[Any] = []
        for towards in ("context", "memory"):
            with contextlib.suppress(UserError):
                tries += method.candidates(lab, towards)[:2]
        if tries:
            return lab, tries
    raise AssertionError(f"{method.name} can run in neither lab")


@pytest.mark.parametrize("name", NAMES)
def test_dev_measures_roughly_what_it_measures_exactly(name, labs, monkeypatch):
    lab, tries = candidates(next(method() for method in ALL if method.name == name), labs)
    assert_roughly_the_same(lab, tries, monkeypatch)


def test_an_edit_behind_a_gate_is_measured_roughly_too(labs, monkeypatch):
    vector = torch.randn(Anatomy(labs[0].model).d_model, generator=torch.Generator().manual_seed(0))
    gate = ConflictGate("block", 0, vector, 0.0, 0.0, (HeadScaling.of([(1, 0)], 0.0),))
    assert_roughly_the_same(labs[0], [Condition("gate", "context", edits=(gate,))], monkeypatch)


def assert_roughly_the_same(lab, tries, monkeypatch):
    exact = [lab.dev.measure(condition) for condition in tries]
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: True)
    assert can_be_rough(lab.model)
    dev = Dev.of(lab.model, lab.prompts.dev, lab.texts("dev"), seed=lab.seed, few=True)
    for condition, expected in zip(tries, exact, strict=True):
        found = dev.measure(condition)["damage"]
        assert found.keys() == expected["damage"].keys() != set()
        for guard, damage in found.items():
            assert math.isfinite(damage)
            assert damage == pytest.approx(expected["damage"][guard], rel=0.25, abs=0.03)
