"""Choices on dev against direct computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conflictscope.study.choice import Tried, as_good_as_the_best, choose, line, tried
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from interp.anatomy import transformers_model
from interp.conflicts import ConflictExample
from interp.evaluation import answer_token_ids
from interp.inputs import first_token_id, token_ids
from interventions.base import applied
from interventions.decoding import CAD
from interventions.decore import DeCoRe
from interventions.heads import HeadScaling
from interventions.steering import Steering
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("choice"))


def end_logits(lab: Lab, prompt: str) -> torch.Tensor:
    ids = torch.tensor(token_ids(lab.model.tokenizer, [prompt]))
    with torch.no_grad():
        network: Any = transformers_model(lab.model)
        return network(ids).logits[0, -1].float()


@pytest.mark.parametrize("kind", ["everywhere", "at the end", "in two readings"])
def test_dev_is_measured_as_prompt_by_prompt(lab: Lab, kind: str) -> None:
    vector = torch.linspace(-1, 1, lab.anatomy.d_model)
    edit: Any = HeadScaling.of([(1, 0), (2, 2)], -1.0) if kind == "everywhere" else Steering(1, vector, 3.0)
    if kind == "in two readings":
        edit = DeCoRe(((1, 0), (2, 2)), 2.0)
    found = tried(lab, Condition("some", "context", {}, (edit,)))
    dev = lab.dev
    usages, damage, right = [], {}, {}
    for example in dev.conflicts:
        with applied(lab.model, edit):
            token = int(end_logits(lab, example.prompt).argmax())
        pair = answer_token_ids(lab.model, example)
        assert pair is not None
        usages.append("context" if token == pair[0] else "memory" if token == pair[1] else "other")
    guards: dict[str, list[ConflictExample]] = {**dev.guards}
    parts = {guard: [e.prompt for e in some] for guard, some in guards.items()} | {"neutral": dev.texts}
    for guard, prompts in parts.items():
        clean = [end_logits(lab, prompt).log_softmax(-1) for prompt in prompts]
        with applied(lab.model, edit):
            edited = [end_logits(lab, prompt).log_softmax(-1) for prompt in prompts]
        divergences = [(p.exp() * (p - q)).sum() for p, q in zip(clean, edited, strict=True)]
        damage[guard] = float(torch.stack(divergences).mean())
        if guard != "neutral":
            wanted = [first_token_id(lab.model, e.prompt, e.memory_answers[0]) for e in guards[guard]]
            right[guard] = np.mean([int(q.argmax()) == token for q, token in zip(edited, wanted, strict=True)])
    assert list(found.usages) == usages
    assert found.damage == pytest.approx(damage, rel=1e-3, abs=1e-5)
    assert found.right == pytest.approx(right)


def made_up(usages: str, *, kept: float, spent: float) -> Tried:
    names = {"c": "context", "m": "memory", "o": "other"}
    condition = Condition("made_up", "context", {"is": usages})
    return Tried(condition, tuple(names[usage] for usage in usages), {"none": spent * 0.02}, {"none": kept})


def test_of_those_within_one_standard_error_paired_by_subject_all_are_finalists() -> None:
    tries = [
        made_up("cccccccm", kept=0, spent=0),
        made_up("ccccccmm", kept=0, spent=0),
        made_up("mmmmmmmm", kept=0, spent=0),
    ]
    # Behind by one prompt of eight subjects: the mean is 1/8, its standard error sqrt(1/8 * 7/8 / 8) = .117.
    assert as_good_as_the_best(tries, "context", list("abcdefgh")) == [0]
    # The same with the prompts of two subjects: sqrt(1/4 * ... ) is more than 1/8.
    assert as_good_as_the_best(tries, "context", list("aaaabbbb")) == [0]
    close = [made_up("ccccccmc", kept=0, spent=0), made_up("cccccccm", kept=0, spent=0)]
    assert as_good_as_the_best(close, "context", list("abcdefgh")) == [0, 1]


def test_the_best_keeps_most_and_the_budget_s_best_stays_within(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(lab.dev.conflicts)
    made = {
        "much": made_up("c" * n, kept=0.2, spent=30.0),
        "as_much": made_up("c" * n, kept=0.8, spent=10.0),
        "little": made_up("c" + "m" * (n - 1), kept=1.0, spent=0.5),
        "nothing": made_up("m" * n, kept=1.0, spent=0.0),
    }
    for name, one in made.items():
        object.__setattr__(one, "condition", Condition(name, "context", {"name": name}))
    monkeypatch.setattr("conflictscope.study.choice.tried", lambda _, condition, *__: made[condition.method])
    monkeypatch.setattr(Condition, "scaled", lambda _, way: Condition("little", "context", {"moved": way}))
    found = choose(lab, [one.condition for one in made.values()], "context")
    assert found.best is made["as_much"]
    assert found.within_budget is not None
    assert found.within_budget.rate("context") == 1 / n
    assert len(found.tried) == 6, "the two that leave the budget are moved back as well"


def test_what_leaves_the_budget_is_moved_back_until_it_fits(lab: Lab) -> None:
    strong = Condition("strong", "context", {}, (HeadScaling.of([(0, 0), (1, 1)], 8.0),))
    assert tried(lab, strong).spent(lab.budgets) > 1
    found = choose(lab, [strong], "context")
    assert found.within_budget is not None
    assert found.within_budget.spent(lab.budgets) <= 1
    assert 0 < found.within_budget.condition.settings["strength of it"] < 1
    assert found.best.condition is strong


def test_where_nothing_stays_within_the_budget_nothing_is_chosen_within_it(lab: Lab) -> None:
    strong = Condition("strong", "context", {}, (HeadScaling.of([(0, 0), (1, 1)], 8.0),))
    strict = lab.on(lab.prompts)
    strict.budgets = dict.fromkeys(lab.budgets, 1e-12)
    found = choose(strict, [strong], "context")
    assert found.within_budget is None
    assert found.best.condition is strong


def test_a_line_has_the_doses_in_order_and_ends_at_the_unedited_model(lab: Lab) -> None:
    edit = Condition("dose", "context", {}, (HeadScaling.of([(1, 1)], 3.0),))
    points = line(lab, "strength", {1.0: edit, 0.0: edit.scaled(0.0), 0.5: edit.scaled(0.5)})
    assert [point["strength"] for point in points] == [0.0, 0.5, 1.0]
    assert max(points[0]["damage"].values()) == pytest.approx(0, abs=1e-6)


def test_the_same_edit_is_tried_once_whatever_it_is_called(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = HeadScaling.of([(2, 1)], 0.0)
    first = tried(lab, Condition("one", "context", {}, (edit,)))
    for half in lab.dev.halves:
        monkeypatch.setattr(half, "measure", None)
    assert tried(lab, Condition("other", "memory", {"called": "else"}, (edit,))).usages == first.usages


def test_lab_draws_the_same_from_the_same_seed(lab: Lab) -> None:
    assert lab.rng("a", 1).random() == lab.rng("a", 1).random() != lab.rng("a", 2).random()


def test_a_rule_that_needs_a_context_keeps_what_the_unedited_model_knows_and_no_more(lab: Lab) -> None:
    """Without a context it does nothing: it must not win over edits because nothing is asked of it."""
    rule = tried(lab, Condition("cad", "context", decoding=CAD(1.0)))
    unedited = tried(lab, Condition("unedited"))
    assert rule.right["none"] == unedited.right["none"] < 1
    assert "none" not in rule.damage


@pytest.mark.parametrize("edits", [(), (HeadScaling.of([(1, 0), (2, 2)], -1.0),)])
def test_a_rule_is_measured_as_pair_by_pair_and_another_one_reads_nothing_anew(lab: Lab, edits: Any) -> None:
    dev, usages = lab.dev, []
    for example in dev.conflicts:
        with applied(lab.model, *edits):
            with_context, without = end_logits(lab, example.prompt), end_logits(lab, example.bare_prompt)
        token, pair = int((2.5 * with_context - 1.5 * without).argmax()), answer_token_ids(lab.model, example)
        assert pair is not None
        usages.append("context" if token == pair[0] else "memory" if token == pair[1] else "other")
    assert tried(lab, Condition("cad", "context", {}, edits, decoding=CAD(1.5))).usages == tuple(usages)
    passes = []
    handle = transformers_model(lab.model).register_forward_pre_hook(lambda *_: passes.append(1))
    tried(lab, Condition("cad", "context", {}, edits, decoding=CAD(-0.7)))
    handle.remove()
    assert bool(passes) == bool(edits)


def test_a_contrast_of_another_strength_reads_nothing_anew(lab: Lab) -> None:
    heads = ((0, 1), (2, 2))
    tried(lab, Condition("decore", "context", {}, (DeCoRe(heads, 0.5),)))
    passes = []
    handle = transformers_model(lab.model).register_forward_pre_hook(lambda *_: passes.append(1))
    tried(lab, Condition("decore", "context", {}, (DeCoRe(heads, -1.5),)))
    assert not passes
    tried(lab, Condition("decore", "context", {}, (DeCoRe(heads[:1], -1.5),)))
    assert passes
    handle.remove()


def test_nothing_is_moved_back_where_only_the_best_is_wanted(lab: Lab) -> None:
    candidates = [Condition("some", "context", {}, (HeadScaling.of([(layer, 0)], 30.0),)) for layer in (1, 2)]
    found = choose(lab, candidates, "context", within_budget=False)
    assert [one.condition for one in found.tried] == candidates
    assert found.within_budget is None
    assert choose(lab, candidates, "context").best.condition.digest == found.best.condition.digest


class Drawn:
    """Candidates with made-up numbers, who tells which of them were asked guards."""

    def __init__(self, made: dict[str, Tried]) -> None:
        self.made = made
        self.guarded: set[str] = set()

    def tried(self, _: Any, condition: Condition, pieces: Any = ()) -> Tried:
        one = self.made[condition.method]
        if pieces:
            return replace(one, damage={}, right={}, guarded=False)
        self.guarded.add(condition.method)
        return one


def chosen_by_all(lab: Lab, tries: list[Tried]) -> tuple[str, str | None]:
    """The names of what is chosen where all candidates were asked everything, as the module's rules say it."""
    finite = [one for one in tries if np.isfinite(one.spent(lab.budgets))]
    finalists = as_good_as_the_best(finite, "context", [e.subject for e in lab.dev.conflicts])
    best = max((finite[i] for i in finalists), key=lambda one: (one.right["none"], one.rate("context")))
    within = [one for one in finite if one.spent(lab.budgets) <= 1]
    affordable = max(within, key=lambda one: one.rate("context"), default=None)
    return best.condition.method, None if affordable is None else affordable.condition.method


@pytest.mark.parametrize("seed", range(20))
def test_guards_are_asked_of_few_and_the_choices_are_those_of_asking_all(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng, n = np.random.default_rng(seed), len(lab.dev.conflicts)
    monkeypatch.setattr("conflictscope.study.choice.moved_back", lambda *_: None)
    made = {}
    for name in map(str, range(12)):
        hits = rng.random(n) < rng.random()
        spent = rng.choice([0.5, 2.0, np.nan], p=[0.3, 0.65, 0.05])
        one = made_up("".join("c" if hit else "m" for hit in hits), kept=round(rng.random(), 1), spent=spent)
        made[name] = replace(one, condition=Condition(name, "context"))
    drawn = Drawn(made)
    monkeypatch.setattr("conflictscope.study.choice.tried", drawn.tried)
    expected = chosen_by_all(lab, list(made.values()))
    found = choose(lab, [one.condition for one in made.values()], "context")
    affordable = found.within_budget and found.within_budget.condition.method
    assert (found.best.condition.method, affordable) == expected
    assert drawn.guarded >= {name for name in expected if name}
    told = {one.condition.method: one.guarded for one in found.tried}
    assert {name for name, asked in told.items() if asked} == {name for name in drawn.guarded if name in told}
    if affordable is not None and all(np.isfinite(one.spent(lab.budgets)) for one in made.values()):
        lower = {name for name, one in made.items() if one.rate("context") < made[affordable].rate("context")}
        finalists = as_good_as_the_best(list(made.values()), "context", [e.subject for e in lab.dev.conflicts])
        assert not drawn.guarded & lower - {str(number) for number in finalists}


def test_a_record_says_of_which_candidates_no_damage_is_known(lab: Lab) -> None:
    candidates = [Condition("some", "context", {}, (Steering(1, torch.ones(32), s),)) for s in (0.5, 1.0)]
    one = tried(lab, candidates[0], [lab.dev.halves[1]])
    record = one.to_record(lab.budgets)
    assert (record["kept"], record["damage"], record["spent"]) == (None, None, None)
    assert record["rate"] == tried(lab, candidates[0]).to_record(lab.budgets)["rate"]
