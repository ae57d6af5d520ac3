"""Ask for what an edit of facts should leave alone: agreement, order, copying and small sums, without a download.

Each item is a text that two words may follow, of which one is right: minimal pairs, as agreement is tested since Linzen
et al. 2016 ("Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies", arXiv 1611.01368). Whether the
right one is the more probable next token needs no generation, and is the same however long a model's answers are.

agreement  the verb after a noun phrase whose last noun has another number    the keys to the cabinet: are, is
order      what comes next in a series that is known by heart                 Monday, Tuesday,: Wednesday, Friday
copying    what followed the same words before                                lamp river stone, lamp river: stone, lamp
sums       the sum of two small numbers, in words                             two plus three is: five, six
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from interp.inputs import continuation_ids

Ability = Literal["agreement", "order", "copying", "sums"]
ABILITIES_VERSION = 1
"""Version of the items: raise it when the same seed would make others."""
EACH = 50
"""How many items of each ability are asked."""

_NOUNS = (
    ("key", "keys"), ("letter", "letters"), ("door", "doors"), ("picture", "pictures"), ("child", "children"),
    ("teacher", "teachers"), ("window", "windows"), ("friend", "friends"), ("house", "houses"), ("bird", "birds"),
)  # fmt: skip
_LINKS = ("near", "behind", "beside", "next to", "in front of")
_VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
_SERIES = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
)
_WORDS = (
    "lamp", "river", "stone", "paper", "green", "table", "music", "winter", "bread", "glass", "garden", "silver",
    "horse", "cloud", "street", "coffee", "spoon", "island", "mirror", "salt",
)  # fmt: skip
_NUMBERS = ("zero", *_SERIES[2], "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")


class AbilityItem(NamedTuple):
    """A text, and two words that may follow it.

    Attributes:
        ability: What it asks for.
        prompt: The text.
        right: What should follow, with its space.
        wrong: What should not.
    """

    ability: Ability
    prompt: str
    right: str
    wrong: str


def ability_items(*, each: int = EACH, seed: int = 0) -> tuple[AbilityItem, ...]:
    """Make items of every ability.

    Args:
        each: How many of each; no two are the same.
        seed: Of the draws.
    """
    found: list[AbilityItem] = []
    for ability in get_args(Ability):
        rng, drawn = random.Random(f"{seed}/{ability}"), dict[AbilityItem, None]()
        while len(drawn) < each:
            prompt, right, wrong = _MAKERS[ability](rng)
            drawn[AbilityItem(ability, prompt, f" {right}", f" {wrong}")] = None
        found += drawn
    return tuple(found)


def first_tokens(model: Any, items: Sequence[AbilityItem]) -> Tensor:
    """The first tokens of what may follow each item, right and wrong, ``(n, 2)``.

    They may be the same, where a tokenizer cuts words into small parts: then the right one is never the more probable.

    Args:
        model: The model, or a bridge around it.
        items: The items.
    """

    def first(item: AbilityItem, word: str) -> int:
        return continuation_ids(model, item.prompt, word)[1][0]

    return torch.tensor([[first(item, item.right), first(item, item.wrong)] for item in items])


def _agreement(rng: random.Random) -> tuple[str, str, str]:
    subject, other = rng.sample(_NOUNS, 2)
    plural, verbs = rng.randrange(2), rng.choice(_VERBS)
    # The noun next to the verb has the other number.
    return f"The {subject[plural]} {rng.choice(_LINKS)} the {other[1 - plural]}", verbs[plural], verbs[1 - plural]


def _order(rng: random.Random) -> tuple[str, str, str]:
    series = rng.choice(_SERIES)
    start, length = rng.randrange(len(series) - 3), rng.randrange(2, 4)
    before, right = series[start : start + length], series[start + length]
    wrong = rng.choice([word for word in series if word not in (*before, right)])
    return f"{', '.join(before)},", right, wrong


def _copying(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(_WORDS, 5)
    place = rng.randrange(1, 5)
    wrong = rng.choice([word for word in words if word not in words[place - 1 : place + 1]])
    return f"{' '.join(words)}, {' '.join(words)}, {' '.join(words[:place])}", words[place], wrong


def _sums(rng: random.Random) -> tuple[str, str, str]:
    first, second = rng.randrange(1, 10), rng.randrange(1, 10)
    total = first + second
    near = [number for number in range(total - 3, total + 4) if number not in (total, first, second)]
    wrong = rng.choice([number for number in near if 0 < number < len(_NUMBERS)])
    return f"{_NUMBERS[first].capitalize()} plus {_NUMBERS[second]} is", _NUMBERS[total], _NUMBERS[wrong]


_MAKERS: dict[Ability, Callable[[random.Random], tuple[str, str, str]]] = {
    "agreement": _agreement,
    "order": _order,
    "copying": _copying,
    "sums": _sums,
}
