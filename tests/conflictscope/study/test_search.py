"""Successive halving and its stop rules on made-up numbers, against what sorting everything gives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conflictscope.study import choice
from conflictscope.study import search as job
from conflictscope.study.choice import Tried
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method, Needs
from conflictscope.study.record import UNEDITED
from conflictscope.study.search import Search, ends_of, tiers_of
from interp.answers import Direction
from interp.errors import UserError

BUDGETS = {"none": 1.0}


@dataclass(frozen=True)
class Numbers:
    """What a condition does, as far as it is moved."""

    hits: tuple[bool, ...]
    spent: float = 0.0
    way: float = 1.0

    @property
    def kept(self) -> tuple[bool, ...]:
        """Of the hits the share that is left on the way back, the first ones."""
        count = math.ceil(sum(self.hits) * min(self.way, 1.0))
        places = [i for i, hit in enumerate(self.hits) if hit][:count]
        return tuple(i in places for i in range(len(self.hits)))


class MadeUp(Condition):
    """A condition whose numbers are given."""

    @property
    def numbers(self) -> Numbers:
        return cast(Numbers, self.settings["numbers"])

    @property
    def digest(self) -> str:
        return repr((self.method, self.numbers))

    def scaled(self, strength: float) -> MadeUp:
        numbers = replace(self.numbers, way=self.numbers.way * strength)
        return MadeUp(self.method, self.towards, {"numbers": numbers})


class Named(Method):
    """A method whose candidates are given."""

    def __init__(self, name: str, needs: Needs, candidates: Sequence[Condition] = (), refusal: str = "") -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self.needs = needs  # pyright: ignore[reportAttributeAccessIssue]
        self.given, self.refusal, self.asked = list(candidates), refusal, 0

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        del lab, towards
        self.asked += 1
        if self.refusal:
            raise UserError(self.refusal)
        return self.given


class Made:
    """A lab on which everything has the numbers that it is given; counts what is measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.n = n
        self.measured: list[tuple[str | None, int]] = []
        pieces = [SimpleNamespace(count=end) for end in (0, *ends_of(n))]
        examples = [SimpleNamespace(subject=str(i)) for i in range(n)]
        dev = SimpleNamespace(conflicts=examples, pieces=lambda _: pieces)
        self.lab: Any = SimpleNamespace(
            dev=dev, budgets=BUDGETS, candidates=lambda method, towards: method.candidates(self.lab, towards)
        )
        for module in (job, choice):
            monkeypatch.setattr(module, "tried", self.tried)

    def tried(self, lab: Any, condition: Condition, pieces: Sequence[Any] = ()) -> Tried:
        assert lab is self.lab
        count, is_guarded = pieces[-1].count, pieces[0].count == 0
        self.measured.append((condition.digest, count))
        numbers = condition.numbers if isinstance(condition, MadeUp) else Numbers((False,) * self.n)
        usages = tuple("context" if hit else "memory" for hit in numbers.kept[:count])
        return Tried(condition, usages, {"none": numbers.spent * numbers.way**2} if is_guarded else {}, {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Made]:
    return lambda n: Made(monkeypatch, n)


def edit(method: str, hits: Sequence[bool], spent: float = 0.0) -> MadeUp:
    return MadeUp(method, "context", {"numbers": Numbers(tuple(hits), spent)})


def some(method: str, rate: float, n: int, spent: float = 0.0) -> MadeUp:
    """A condition that hits so many prompts of any part."""
    return edit(method, [(i * 7919) % n < rate * n for i in range(n)], spent)


@pytest.mark.parametrize(
    ("count", "ends"), [(5, [5]), (31, [31]), (32, [16, 32]), (64, [16, 32, 64]), (96, [24, 48, 96])]
)
def test_parts_are_a_quarter_half_and_all_and_never_too_few(count: int, ends: list[int]) -> None:
    assert ends_of(count) == ends


@pytest.mark.parametrize("seed", range(8))
def test_halving_keeps_what_sorting_everything_that_was_moved_back_keeps(
    made: Callable[[int], Made], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world, rng = made(64), random.Random(seed)
    pool = [
        edit("some", [rng.random() < rate for _ in range(64)], rng.choice([0.2, 0.9, 3.0, 20.0]))
        for rate in (rng.random() for _ in range(11))
    ]
    search = Search(world.lab, "context")
    found = search.halved(pool)
    measured = set(world.measured)

    def fits(condition: Condition) -> Condition:
        """Moved back by the formula of the divergence, which is exact here: its square."""
        assert isinstance(condition, MadeUp)
        spent = condition.numbers.spent
        return condition if spent <= 1 else condition.scaled(0.97 / math.sqrt(spent))

    def rate(condition: Condition, count: int) -> float:
        assert isinstance(condition, MadeUp)
        return sum(condition.numbers.kept[:count]) / count

    left: list[Condition] = [fits(condition) for condition in pool]
    for count, keep in ((16, 6), (32, 3), (64, 1)):
        left = sorted(left, key=lambda condition: -rate(condition, count))[:keep]
    assert found is not None
    assert found.condition.digest == left[0].digest
    assert len(found.usages) == 64
    of_part = {count: {digest for digest, part in measured if part == count} for count in (16, 32, 64)}
    assert {len(of_part[32]), len(of_part[64])} == {6, 3}
    assert of_part[64] <= of_part[32] <= of_part[16]


def test_what_is_behind_already_is_asked_no_guards_and_not_moved_back(made: Callable[[int], Made]) -> None:
    world = made(12)
    good, poor = some("good", 0.9, 12), [some(f"poor{i}", 0.1, 12, spent=9) for i in range(5)]
    found = Search(world.lab, "context").halved([*poor, good])
    assert found is not None
    assert found.condition is good
    assert found.damage == {"none": 0.0}
    assert len(world.measured) == 6 + 1


def test_what_never_fits_is_dropped(made: Callable[[int], Made]) -> None:
    world = made(12)
    assert Search(world.lab, "context").halved([some("wild", 0.9, 12, spent=math.nan)]) is None
    found = Search(world.lab, "context").run([Named("wild", "nothing", [some("wild", 0.9, 12, spent=math.inf)])])
    assert found.best is None
    assert found.candidates == 1


def test_methods_are_tried_in_order_of_what_they_need_and_dear_ones_one_by_one() -> None:
    needs: list[Needs] = ["unknown", "learning", "nothing", "learning", "states", "nothing"]
    methods = [Named(str(i), need) for i, need in enumerate(needs)]
    names = [[[method.name for method in step] for step in tier] for tier in tiers_of(methods)]
    assert names == [[["2", "5"]], [["4"]], [["1"], ["3"]], [["0"]]]


def test_a_method_that_says_nothing_goes_last() -> None:
    class Elsewhere(Method):
        name = "elsewhere"

        def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
            raise AssertionError

    assert tiers_of([Elsewhere(), Named("learns", "learning")])[-1][0][0].name == "elsewhere"


def test_the_search_ends_where_a_dearer_tier_is_no_better(made: Callable[[int], Made]) -> None:
    world = made(40)
    cheap = Named("cheap", "nothing", [some("cheap", 0.6, 40)])
    dearer = Named("dearer", "head_scores", [some("dearer", 0.6, 40)])
    dearest = Named("dearest", "learning", [some("dearest", 1.0, 40)])
    found = Search(world.lab, "context").run([dearest, dearer, cheap])
    assert found.best is not None
    assert found.best.condition.method == "cheap", "of two that dev cannot tell apart the cheaper one stays"
    assert found.stopped == "Dearer methods were no better than what a cheaper one had found."
    assert (dearest.asked, set(found.not_tried)) == (0, {"dearest"})


def test_a_first_tier_that_does_not_help_ends_nothing(made: Callable[[int], Made]) -> None:
    world = made(40)
    methods = [
        Named("words", "nothing", [some("words", 0.0, 40)]),
        Named("heads", "head_scores", [some("heads", 0.0, 40)]),
    ]
    found = Search(world.lab, "context").run([*methods, Named("learns", "learning", [some("learns", 0.7, 40)])])
    assert found.best is not None
    assert found.best.condition.method == "learns"


def test_where_nothing_beats_the_unedited_model_the_nearest_is_given(made: Callable[[int], Made]) -> None:
    world = made(40)
    hits = [i == 0 for i in range(40)]
    found = Search(world.lab, "context").run([Named("weak", "nothing", [edit("weak", hits), some("none", 0, 40)])])
    assert found.best is not None
    assert found.best.condition.method == "weak"
    assert found.unedited.condition.method == UNEDITED


@pytest.mark.parametrize(("goal", "tried_too"), [(0.5, False), (0.79, True)])
def test_the_search_ends_where_the_goal_is_reached_less_a_standard_error(
    made: Callable[[int], Made], goal: float, tried_too: bool
) -> None:
    world = made(40)
    first = Named("first", "nothing", [some("first", 0.8, 40)])
    second = Named("second", "learning", [some("second", 0.8, 40)])
    found = Search(world.lab, "context", goal=goal).run([first, second])
    assert bool(second.asked) == tried_too
    assert (found.stopped == "The goal was reached on dev.") != tried_too


def test_what_a_goal_still_lacks_is_looked_for_further(made: Callable[[int], Made]) -> None:
    world = made(40)
    kinds: list[Needs] = ["nothing", "head_scores", "learning"]
    same = [Named(needs, needs, [some(needs, 0.5, 40)]) for needs in kinds]
    assert Search(world.lab, "context", goal=0.9).run(same).stopped == "All methods were tried."


def test_when_time_is_up_the_best_so_far_is_measured_whole_and_the_rest_is_named(made: Callable[[int], Made]) -> None:
    world = made(64)
    cheap = Named("cheap", "nothing", [some("cheap", 0.1 * i, 64) for i in range(1, 9)])
    dear = Named("dear", "learning", [some("dear", 1.0, 64)])
    # Three are measured on the first part.
    search = Search(world.lab, "context", is_over=lambda: len(world.measured) > 3)
    found = search.run([cheap, dear])
    assert found.best is not None
    assert len(found.best.usages) == 64
    assert found.best.rate("context") == pytest.approx(0.3, abs=0.02)
    assert (found.candidates, found.stopped) == (3, "Time was up.")
    assert found.not_tried["cheap"].startswith("Time was up. 5 of its candidates")
    assert (found.not_tried["dear"], dear.asked) == ("Time was up.", 0)


def test_only_what_is_allowed_is_measured(made: Callable[[int], Made]) -> None:
    world = made(12)
    both = Named("both", "nothing", [some("good", 0.9, 12), some("better", 1.0, 12)])
    none = Named("none", "head_scores", [some("other", 1.0, 12)])
    broken = Named("broken", "states", refusal="There is no such thing; take another.")
    found = Search(world.lab, "context", allowed=lambda c: c.method == "good").run([both, none, broken])
    assert found.best is not None
    assert found.best.condition.method == "good"
    assert found.candidates == 1
    assert found.not_run == {
        "none": "None of its 1 candidates is of a kind that is allowed.",
        "broken": "There is no such thing; take another.",
    }
