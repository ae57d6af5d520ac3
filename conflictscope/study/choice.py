"""Choose among a method's candidates on dev.

Candidates are asked dev's conflict prompts, and guards that they should leave alone: prompts without a context, with
one that agrees and one about something else, and ordinary text. The next token at each prompt's end says which source
the answer starts with, and how far the distribution moved, in nats of KL divergence. Two choices are made:

    best            of those whose rate is within one standard error of the best one's (Breiman et al. 1984), paired by
                    subject, the one that keeps most facts closed-book
    within_budget   the highest rate among those that stay within the budget of every guard; what leaves it is moved
                    back on its line from the unedited model until it fits

Candidates are asked guards in the order of their rates, and only until both choices are made: what no damage could make
the choice is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from conflictscope.study.condition import AS_IS, Condition
from interp.answers import Direction
from interp.conflicts import ConflictExample, ConflictSet, ContextKind, evenly
from interp.errors import UserError
from interp.evaluation import ANSWERS_VERSION, answer_token_ids, divergence
from interp.generation import gathered_logits, next_logits
from interp.inputs import first_token_id
from interp.precision import rough, rounding
from interp.progress import tracked
from interp.reading import READING_VERSION, ReadPrompts
from interp.statistics import bootstrap_means
from interventions.base import EDITS_VERSION, Intervention, applied, changed_by

if TYPE_CHECKING:
    from conflictscope.study.lab import Lab

DEV_VERSION = 3
"""Version of what is measured on dev: raise it when the same condition would get other numbers."""

_CONFLICTS, _GUARDS = 96, {"none": 32, "aligned": 16, "irrelevant": 16}
_FEW = 6
_FEW_GUARDS = 3
_MOVED_BACK, _TRIES, _MARGIN, _LEAST = 2, 4, 0.97, 0.01


@dataclass(frozen=True)
class Tried:
    """What a condition does on dev.

    Attributes:
        condition: The condition.
        usages: For each conflict prompt the source that its answer starts with: context, memory or other.
        damage: For each guard that applies the mean KL divergence from the unedited model, nats.
        right: For each guard but text the share of prompts whose answer starts right.
        guarded: Whether guards were asked at all.
    """

    condition: Condition
    usages: tuple[str, ...]
    damage: Mapping[str, float]
    right: Mapping[str, float]
    guarded: bool = True

    def rate(self, towards: str | None) -> float:
        """Share of conflict prompts whose answer starts with that source's."""
        return self.usages.count(str(towards)) / len(self.usages)

    def spent(self, budgets: Mapping[str, float]) -> float:
        """The largest share of a guard's budget that is used; infinite if a divergence is no number."""
        shares = [self.damage[guard] / budgets[guard] for guard in self.damage]
        return max((math.inf if math.isnan(share) else share for share in shares), default=0.0)

    def to_record(self, budgets: Mapping[str, float]) -> dict[str, Any]:
        """What a study's record says about it."""
        condition = self.condition
        about = {name: getattr(condition, name) for name in ("method", "towards", "does", "moved")}
        spent = self.spent(budgets) if self.guarded else None
        return {**about, "settings": dict(condition.settings), **self.numbers, "spent": spent}

    @property
    def numbers(self) -> dict[str, Any]:
        """The rate of the wanted source, the share of facts that are kept closed-book, and the damage by guard."""
        return {
            "rate": self.rate(self.condition.towards),
            "kept": self.right.get("none"),
            "damage": dict(self.damage) if self.guarded else None,
        }


@dataclass(frozen=True)
class Chosen:
    """What dev chose of one method towards one source.

    Attributes:
        best: The best, whatever it damages.
        within_budget: The best within the budget; ``None`` where nothing fits, also moved back, or none is wanted.
        tried: All that was tried; guards were asked of what could be chosen.
    """

    best: Tried
    within_budget: Tried | None
    tried: tuple[Tried, ...]


class Dev:
    """Prompts and texts of dev, and what the unedited model says at their ends.

    Args:
        model: The model, or a bridge around it, unedited.
        conflicts: Conflict prompts whose two answers start with different tokens.
        guards: By kind the prompts that are to be left alone.
        texts: Ordinary text.
    """

    def __init__(
        self,
        model: nn.Module,
        conflicts: Sequence[ConflictExample],
        guards: Mapping[ContextKind, Sequence[ConflictExample]],
        texts: Sequence[str],
    ) -> None:
        self.model = model
        self.conflicts = list(conflicts)
        self.guards: dict[ContextKind, list[ConflictExample]] = {
            kind: list(some) for kind, some in guards.items() if some
        }
        self.texts = list(texts)
        self.examples: list[ConflictExample] = [*self.conflicts, *(e for some in self.guards.values() for e in some)]
        self.digest = [ConflictSet("dev", tuple(self.examples)).digest, self.texts, *rounding(model)]
        # The last second reading that was contrasted with the unedited one; others differ from it in strength alone.
        self._second: tuple[Intervention, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, model: nn.Module, examples: ConflictSet, texts: Sequence[str], *, seed: int, few: bool = False) -> Dev:
        """Take some of dev's prompts of every kind, of relations and phrasings in turn.

        Args:
            model: The model, or a bridge around it, unedited.
            examples: Dev's prompts.
            texts: Ordinary text.
            seed: Decides which prompts are used.
            few: Whether to use few of them.

        Raises:
            UserError: If no conflict prompt can tell its two answers apart.
        """
        told_apart = [e for e in examples.select(kind="conflict") if answer_token_ids(model, e) is not None]
        conflicts = evenly(told_apart, _FEW if few else _CONFLICTS, seed)
        if not conflicts:
            raise UserError(
                "Dev has no conflict prompt whose two answers start with different tokens; give other data."
            )
        kinds: tuple[ContextKind, ...] = ("none", "aligned", "irrelevant")
        guards: dict[ContextKind, Sequence[ConflictExample]] = {
            kind: evenly(examples.select(kind=kind), _FEW_GUARDS if few else _GUARDS[kind], seed) for kind in kinds
        }
        return cls(model, conflicts, guards, texts)

    def pieces(self, ends: Sequence[int]) -> list[Dev]:
        """Take guards and texts alone, and cut the conflict prompts at some ends.

        Args:
            ends: How many conflict prompts the first cut has, the first two together, and so on to all.

        Returns:
            The guards with the texts, then the conflict prompts cut by cut.
        """
        cuts = [self.conflicts[start:end] for start, end in pairwise((0, *ends))]
        return [Dev(self.model, (), self.guards, self.texts), *(Dev(self.model, cut, {}, ()) for cut in cuts)]

    @cached_property
    def halves(self) -> tuple[Dev, Dev]:
        """Guards with the texts, and the conflict prompts."""
        guards, conflicts = self.pieces([len(self.conflicts)])
        return guards, conflicts

    def measure(self, condition: Condition) -> dict[str, Any]:
        """What ``Tried`` holds of a condition besides itself, as JSON."""
        ends, texts = self._ends(condition)
        first, n = ends.argmax(-1).tolist(), len(self.conflicts)
        usages = [
            "context" if token == context else "memory" if token == memory else "other"
            for token, (context, memory) in zip(first[:n], self._pairs, strict=True)
        ]
        moved = divergence(self._unedited[0][n:], ends[n:]) if self.guards else ends[n:, 0]
        is_right = [token == wanted for token, wanted in zip(first[n:], self._right, strict=True)]
        damage, right, start = {}, {}, 0
        for kind, some in self.guards.items():
            part = slice(start, start := start + len(some))
            # Without a context a rule has nothing to combine: what is right is what the unedited model has right.
            if applies := kind != "none" or condition.decoding is None:
                damage[kind] = moved[part].mean().item()
            right[kind] = sum((is_right if applies else self._right_unedited)[part]) / len(some)
        if texts is not None and self.texts:
            damage["neutral"] = divergence(self._unedited[1], texts).mean().item()
        return {"usages": usages, "damage": damage, "right": right}

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        pairs = [answer_token_ids(self.model, example) for example in self.conflicts]
        return [pair for pair in pairs if pair is not None]

    @cached_property
    def _right(self) -> list[int]:
        """The first token of the right answer to each guard's prompts."""
        guards = self.examples[len(self.conflicts) :]
        return [first_token_id(self.model, example.prompt, example.memory_answers[0]) for example in guards]

    @cached_property
    def _right_unedited(self) -> list[bool]:
        first = self._unedited[0][len(self.conflicts) :].argmax(-1).tolist()
        return [token == wanted for token, wanted in zip(first, self._right, strict=True)]

    @cached_property
    def _unedited(self) -> tuple[Tensor, Tensor]:
        """The unedited model's logits at the ends of prompts and texts, ``(n, d_vocab)`` each."""
        return self._edited(())

    @cached_property
    def _unedited_bare(self) -> Tensor:
        """The same at the ends of the prompts without their contexts."""
        with rough(self.model):
            return _bare_logits(self.model, self.examples)

    @cached_property
    def _read(self) -> ReadPrompts:
        with rough(self.model):
            prompts = [*(example.prompt for example in self.examples), *self.texts]
            return ReadPrompts(self.model, prompts, ends=True, progress="Reading dev's prompts")

    def _ends(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Logits at the ends of prompts and texts, ``(n, d_vocab)`` each; texts where the condition applies to them."""
        if condition.changes_text:
            contrast = condition.edits[0].contrast if len(condition.edits) == 1 else None
            if contrast is None:
                return self._edited(condition.edits)
            second, combined = contrast
            if self._second is None or self._second[0] != second:
                self._second = second, self._edited([second])
            first, last = zip(self._unedited, self._second[1], strict=True)
            return combined(*first), combined(*last)
        examples = list(condition.asked(ConflictSet("dev", tuple(self.examples))))
        if not condition.edits and condition.prompting == AS_IS:
            # Rules of decoding differ in what they make of the same two readings.
            logits, bare = self._unedited[0], None if condition.combined is None else self._unedited_bare
        else:
            with rough(self.model), applied(self.model, *condition.edits):
                logits = _logits(self.model, [example.prompt for example in examples], edited=bool(condition.edits))
                bare = None if condition.combined is None else _bare_logits(self.model, examples)
        if condition.combined is not None and bare is not None:
            is_pair = torch.tensor([bool(e.bare_prompt) and e.bare_prompt != e.prompt for e in examples])
            logits = torch.where(is_pair.to(logits.device)[:, None], condition.combined(logits, bare), logits)
        return logits, None

    def _edited(self, edits: Sequence[Intervention]) -> tuple[Tensor, Tensor]:
        """Logits at the ends of prompts and texts under edits."""
        # Made without edits, whoever asks first.
        read, count = self._read, len(self.examples)
        with rough(self.model), applied(self.model, *edits):
            logits = gathered_logits(read.next_logits(changed_by(edits)), count + len(self.texts))
        return logits[:count], logits[count:]


def _logits(model: nn.Module, prompts: Sequence[str], *, edited: bool) -> Tensor:
    batches = next_logits(model, prompts) if edited else ReadPrompts(model, prompts, edited=False).next_logits()
    return gathered_logits(batches, len(prompts))


def _bare_logits(model: nn.Module, examples: Sequence[ConflictExample]) -> Tensor:
    return _logits(model, [example.bare_prompt or example.prompt for example in examples], edited=True)


def tried(lab: Lab, condition: Condition, pieces: Sequence[Dev] = ()) -> Tried:
    """Measure a condition on dev; what does the same is measured once.

    Args:
        lab: The lab.
        condition: The condition.
        pieces: Pieces of dev; without them both of its halves.
    """
    pieces = pieces or lab.dev.halves

    def measured(dev: Dev) -> dict[str, Any]:
        version = (DEV_VERSION, ANSWERS_VERSION, EDITS_VERSION, READING_VERSION)
        basis = [dev.digest, condition.digest]
        return lab.records.json("dev", basis, lambda: dev.measure(condition), version=version)

    found = [measured(dev) for dev in pieces]
    usages = tuple(usage for part in found for usage in part["usages"])
    damage, right = ({k: v for part in found for k, v in part[about].items()} for about in ("damage", "right"))
    return Tried(condition, usages, damage, right, any(dev.guards or dev.texts for dev in pieces))


def choose(lab: Lab, candidates: Sequence[Condition], towards: Direction, *, within_budget: bool = True) -> Chosen:
    """Let candidates compete on dev; the module says by which rules.

    Args:
        lab: The lab.
        candidates: What competes.
        towards: The source that is wanted.
        within_budget: Whether the best within the budget is wanted too, for which some candidates are moved back.

    Raises:
        UserError: If all candidates leave the range of the model's dtype.
    """
    label, (_, conflicts) = f"On dev: {candidates[0].name}", lab.dev.halves
    asked = tracked(candidates, label if len(candidates) > 1 else None)
    contest = _Contest(lab, [tried(lab, condition, [conflicts]) for condition in asked], towards)
    best = contest.best()
    affordable, fitted = contest.within_budget() if within_budget else (None, [])
    return Chosen(best, affordable, (*contest.left.values(), *fitted))


class _Contest:
    """Ask candidates guards as far as the choices depend on it.

    Args:
        lab: The lab.
        tries: The candidates, which were asked dev's conflict prompts.
        towards: The source that is wanted.

    Attributes:
        left: By number the candidates, but for those that left the range of the model's dtype.
    """

    def __init__(self, lab: Lab, tries: Sequence[Tried], towards: Direction) -> None:
        self.lab = lab
        self.towards: Direction = towards
        self.left = dict(enumerate(tries))

    def best(self) -> Tried:
        """Of those that are as good as the best the one that keeps most facts closed-book."""
        subjects = [example.subject for example in self.lab.dev.conflicts]
        while self.left:
            numbers, tries = list(self.left), list(self.left.values())
            finalists = [self._guarded(numbers[place]) for place in as_good_as_the_best(tries, self.towards, subjects)]
            # Without those that are out others may be as good.
            if None not in finalists:
                return best_of(self.lab, list(self.left.values()), self.towards)
        raise UserError("Every edit leaves the range of the model's dtype; load the model with --dtype float32.")

    def within_budget(self) -> tuple[Tried | None, list[Tried]]:
        """The highest rate within the budget, if any, and what was moved back into it of those with higher rates."""
        guards, _ = self.lab.dev.halves
        fitted: list[Tried] = []
        outside = 0
        for number in sorted(self.left, key=lambda number: -self._rate(self.left[number])):
            one = self._guarded(number)
            if one is None:
                continue
            if one.spent(self.lab.budgets) <= 1:
                return max([one, *fitted], key=self._rate), fitted
            if outside < _MOVED_BACK and (moved := moved_back(self.lab, one, [guards])) is not None:
                fitted.append(tried(self.lab, moved.condition))
            outside += 1
        return max(fitted, key=self._rate, default=None), fitted

    def _rate(self, one: Tried) -> float:
        return one.rate(self.towards)

    def _guarded(self, number: int) -> Tried | None:
        """A candidate that was asked guards too; ``None`` if it leaves the dtype's range, and is out."""
        one = self.left[number]
        if not one.guarded:
            one = self.left[number] = tried(self.lab, one.condition)
        if not math.isfinite(one.spent(self.lab.budgets)):
            del self.left[number]
            return None
        return one


def best_of(lab: Lab, tries: Sequence[Tried], towards: Direction) -> Tried:
    """Of those that are as good as the best the one that keeps most facts closed-book."""
    finalists = as_good_as_the_best(tries, towards, [e.subject for e in lab.dev.conflicts])
    return max((tries[i] for i in finalists), key=lambda one: (one.right.get("none", 0.0), one.rate(towards)))


def as_good_as_the_best(tries: Sequence[Tried], towards: Direction, subjects: Sequence[str]) -> list[int]:
    """Indices of those whose rate is within one standard error of the best one's, paired by subject."""
    hits = np.array([[usage == towards for usage in one.usages] for one in tries], dtype=float)
    behind_best = (hits[hits.mean(1).argmax()] - hits).T
    standard_error = bootstrap_means(behind_best, subjects).std(0)
    return np.flatnonzero(behind_best.mean(0) <= standard_error).tolist()


def line(lab: Lab, name: str, doses: Mapping[float, Condition]) -> list[dict[str, Any]]:
    """What dev measures at each dose, by rising dose: rates, kept facts, damage by guard."""
    found = []
    for dose, condition in sorted(doses.items()):
        one = tried(lab, condition)
        rates = {f"{source}_rate": one.rate(source) for source in ("memory", "context")}
        found.append({name: dose, **rates, "kept": one.right.get("none"), "damage": dict(one.damage)})
    return found


def moved_back(lab: Lab, one: Tried, pieces: Sequence[Dev] = ()) -> Tried | None:
    """Move a condition back on its line from the unedited model, as far as the budgets allow.

    Args:
        lab: The lab.
        one: The condition as it is, measured on the same pieces.
        pieces: As for ``tried``.

    Returns:
        It where it fits; ``None`` if it has no strength or never does.
    """
    way, spent = 1.0, one.spent(lab.budgets)
    for _ in range(_TRIES):
        # Divergence grows about with the square of the way.
        way *= _MARGIN / math.sqrt(spent)
        # So near to the unedited model it is no longer an edit.
        if way < _LEAST:
            return None
        try:
            moved = tried(lab, one.condition.scaled(way), pieces)
        except UserError:
            return None
        if (spent := moved.spent(lab.budgets)) <= 1:
            return moved
    return None
