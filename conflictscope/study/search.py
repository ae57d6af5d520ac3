"""Search for one edit: methods in order of what they need, their candidates by successive halving on dev.

1. Methods make tiers by their ``needs``, the cheapest first. All candidates of a tier compete together; of a tier whose
   methods learn or search themselves each method is a step of its own.
2. Candidates are asked a quarter of dev's conflict prompts; the better half is asked half of them, and the better half
   of these all (successive halving: Jamieson & Talwalkar 2016). No part has fewer than 16 prompts, so that a small dev
   is asked as a whole.
3. After the first part candidates are asked, from the best on and until half are found that fit, what they should leave
   alone. What leaves the budget of damage is moved back on its line from the unedited model, and compared anew. It is
   taken to have no higher rate then, so that what is behind already need be neither asked nor moved.
4. A step's best takes the place of the best so far if its rate is higher by more than one standard error, paired by
   subject: of two that dev cannot tell apart the cheaper one stays.
5. The search ends where the goal is reached, less one standard error; where, without a goal, a tier is no better than
   the edit that a cheaper one found; or where time is up. Then nothing new is begun, and the best of what was measured
   is measured whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

import numpy as np

from conflictscope.study.choice import Dev, Tried, as_good_as_the_best, moved_back, tried
from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import NEEDS, Method
from conflictscope.study.record import UNEDITED
from conflictscope.study.verdict import SOURCES
from interp.answers import Direction
from interp.errors import UserError
from interp.progress import tracked
from interp.statistics import bootstrap_means

_SHARES, _LEAST = (4, 2), 16
_DEAR = NEEDS.index("learning")
_TIME, _GOAL, _ALL = "Time was up.", "The goal was reached on dev.", "All methods were tried."
_NO_BETTER = "Dearer methods were no better than what a cheaper one had found."


class Found(NamedTuple):
    """What a search found.

    Attributes:
        best: The edit that was chosen, measured on all of dev; where none is better than the unedited model by more
            than one standard error, the one with the highest rate; ``None`` where nothing stays within the budget.
        whole: All that was measured on all of dev, guards too.
        unedited: The unedited model on dev.
        candidates: How many candidates were measured.
        stopped: Why the search ended, as a sentence.
        not_run: Methods that cannot run, or have nothing that is allowed, with the reason.
        not_tried: Methods that the search ended before, or some of whose candidates it did not measure, likewise.
    """

    best: Tried | None
    whole: tuple[Tried, ...]
    unedited: Tried
    candidates: int
    stopped: str
    not_run: dict[str, str]
    not_tried: dict[str, str]

    def to_record(self) -> dict[str, Any]:
        """What a study's record says of it, besides what it chose."""
        return {name: getattr(self, name) for name in ("candidates", "stopped", "not_run", "not_tried")}


@dataclass
class Search:
    """A search for one edit towards a source.

    Attributes:
        lab: The lab.
        towards: The source that is wanted.
        allowed: Which conditions may be chosen.
        goal: The rate of that source that is enough; ``None`` wants as much as there is.
        is_over: Whether time is up.
        told: Takes a sentence about what was found.
    """

    lab: Lab
    towards: Direction
    allowed: Callable[[Condition], bool] = lambda _: True
    goal: float | None = None
    is_over: Callable[[], bool] = lambda: False
    told: Callable[[str], None] = lambda _: None
    _whole: list[Tried] = field(default_factory=list)
    _candidates: int = 0
    _not_run: dict[str, str] = field(default_factory=dict)
    _not_tried: dict[str, str] = field(default_factory=dict)

    def run(self, methods: Sequence[Method]) -> Found:
        """Try methods until more will not help; of equally dear ones the order is kept."""
        best, stopped = self.unedited, ""
        closest: list[Tried] = []
        for tier in tiers_of(methods):
            before, found = best, []
            for step in tier:
                stopped = stopped or self._ended(best)
                if stopped:
                    self._not_tried |= dict.fromkeys((method.name for method in step), stopped)
                    continue
                one = self.halved(self._pool(step))
                self._tell(step, one)
                if one is not None:
                    found.append(one)
                    best = one if self._is_better(one, best) else best
            closest += found
            if found and best is before is not self.unedited and self.goal is None:
                stopped = stopped or _NO_BETTER
        if best is self.unedited:
            best = max(closest, key=lambda one: one.rate(self.towards), default=None)
        stopped = stopped or (self._ended(best) if best else "") or _ALL
        whole = tuple(self._whole)
        return Found(best, whole, self.unedited, self._candidates, stopped, self._not_run, self._not_tried)

    @cached_property
    def pieces(self) -> list[Dev]:
        """Dev's guards, and its conflict prompts in the parts that candidates are asked one after the other."""
        return self.lab.dev.pieces(ends_of(len(self.lab.dev.conflicts)))

    @cached_property
    def unedited(self) -> Tried:
        """The unedited model on all of dev."""
        return tried(self.lab, Condition(UNEDITED), self.pieces)

    def halved(self, conditions: Sequence[Condition]) -> Tried | None:
        """The best of conditions within the budget, by successive halving; ``None`` if nothing stays within it."""
        last = len(self.pieces) - 1
        self._candidates += len(conditions)
        kept: list[Tried] = []
        for rung in range(1, last + 1):
            # When time is up, what is best by then is still measured whole.
            tries = self._measured(conditions, rung)
            keep = 1 if rung == last or self.is_over() else math.ceil(len(tries) / 2)
            if rung == 1:
                kept, guarded = self._within(tries, keep)
            else:
                kept, guarded = sorted(tries, key=lambda one: -one.rate(self.towards))[:keep], tries
            self._whole += guarded if rung == last else []
            conditions = [one.condition for one in kept]
        return kept[0] if kept else None

    def _pool(self, step: Sequence[Method]) -> list[Condition]:
        """The candidates of some methods that are allowed, of methods in turn, each once whatever it is called."""
        found: list[list[Condition]] = []
        for method in step:
            if self.is_over():
                self._not_tried[method.name] = _TIME
                continue
            try:
                candidates = self.lab.candidates(method, self.towards)
            except UserError as error:
                self._not_run[method.name] = str(error)
                continue
            fitting = [condition for condition in candidates if self.allowed(condition)]
            if not fitting:
                self._not_run[method.name] = f"None of its {len(candidates)} candidates is of a kind that is allowed."
            found.append(fitting)
        # In turn, so that each method has had its first ones when time is up.
        turns = (condition for turn in zip_longest(*found) for condition in turn if condition is not None)
        return list({condition.digest: condition for condition in reversed(list(turns))}.values())[::-1]

    def _measured(self, conditions: Sequence[Condition], rung: int) -> list[Tried]:
        """Conditions on the first parts of dev, after the first one with guards; when time is up only those before."""
        found: list[Tried] = []
        label = f"On dev, part {rung} of {len(self.pieces) - 1}" if len(conditions) > 1 else None
        for condition in tracked(conditions, label):
            if self.is_over() and (found or rung == 1):
                break
            found.append(tried(self.lab, condition, self.pieces[int(rung == 1) : rung + 1]))
        left = conditions[len(found) :]
        self._candidates -= len(left) if rung == 1 else 0
        for name, count in Counter(condition.method for condition in left).items():
            self._not_tried[name] = f"{_TIME} {count} of its candidates were not measured, or not on all of dev."
        return found

    def _within(self, tries: Sequence[Tried], keep: int) -> tuple[list[Tried], list[Tried]]:
        """The best so many within the budget, on the first part of dev, and all that were asked guards too."""
        first = self.pieces[:2]
        queue = [(-one.rate(self.towards), number, one, False) for number, one in enumerate(tries)]
        heapify(queue)
        kept, guarded = [], []
        while queue and len(kept) < keep:
            _, number, one, fits = heappop(queue)
            if not fits:
                one = tried(self.lab, one.condition, first)
                guarded.append(one)
            if one.spent(self.lab.budgets) <= 1:
                kept.append(one)
            elif (moved := moved_back(self.lab, one, first[:1])) is not None:
                moved = tried(self.lab, moved.condition, first)
                guarded.append(moved)
                heappush(queue, (-moved.rate(self.towards), number, moved, True))
        return kept, guarded

    def _is_better(self, one: Tried, other: Tried) -> bool:
        """Whether the rate of one is higher by more than one standard error, paired by subject."""
        subjects = [example.subject for example in self.lab.dev.conflicts]
        return as_good_as_the_best([other, one], self.towards, subjects) == [1]

    def _ended(self, best: Tried) -> str:
        """Why the search ends now; nothing if it does not."""
        if self.goal is not None and best is not self.unedited:
            hits = np.array([usage == self.towards for usage in best.usages], dtype=float)
            subjects = [example.subject for example in self.lab.dev.conflicts]
            if hits.mean() - bootstrap_means(hits, subjects).std() >= self.goal:
                return _GOAL
        return _TIME if self.is_over() else ""

    def _tell(self, step: Sequence[Method], one: Tried | None) -> None:
        """Say what came of the methods of a step that were measured."""
        measured = [m for m in step if m.name not in self._not_run and self._not_tried.get(m.name) != _TIME]
        if not measured:
            return
        found = "nothing stays within the budget"
        if one is not None:
            source, was = SOURCES[self.towards], f"{self.unedited.rate(self.towards):.0%} unedited"
            rate = f"{one.rate(self.towards):.0%} of dev's answers start with what {source} says, {was}"
            found = f"best within the budget is {one.condition.method.replace('_', ' ')}: {rate}"
        self.told(f"Tried {', '.join(method.name.replace('_', ' ') for method in measured)}; {found}.")


def ends_of(count: int) -> list[int]:
    """How many of dev's conflict prompts are asked after each round: a quarter, half, all, and never too few to tell.

    Args:
        count: How many there are.
    """
    return [*(count // share for share in _SHARES if count // share >= _LEAST), count]


def tiers_of(methods: Sequence[Method]) -> list[list[list[Method]]]:
    """Methods in tiers by what they need, the cheapest first, each tier as steps: what is tried together.

    Args:
        methods: The methods; of equally dear ones the order is kept.
    """
    order = sorted(methods, key=lambda method: NEEDS.index(method.needs))
    tiers = [(needs, list(members)) for needs, members in groupby(order, key=lambda method: method.needs)]
    return [[[m] for m in tier] if NEEDS.index(needs) >= _DEAR else [tier] for needs, tier in tiers]
