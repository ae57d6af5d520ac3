"""Minimal pairs: what each asks for has one right answer, which is found here in another way."""

import calendar
from typing import Any

import torch

from interp.abilities import ability_items, first_tokens
from interp.generation import gathered_logits, next_logits

ITEMS = ability_items(each=40)
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
NUMBERS = {word: number for number, word in enumerate([*SMALL.split(), "eighteen"])}


def of(ability: str) -> list[Any]:
    return [item for item in ITEMS if item.ability == ability]


def test_there_are_as_many_of_each_and_no_two_are_the_same():
    assert len(set(ITEMS)) == len(ITEMS) == 160
    assert all(item.right != item.wrong and item.right.startswith(" ") for item in ITEMS)
    assert ability_items(each=40) == ITEMS != ability_items(each=40, seed=1)


def test_the_verb_agrees_with_the_first_noun_and_not_with_the_last():
    for item in of("agreement"):
        first, last = item.prompt.split()[1], item.prompt.split()[-1]
        plural = {True: (" are", " were", " have"), False: (" is", " was", " has")}
        many = {noun: noun.endswith("s") or noun == "children" for noun in (first, last)}
        assert many[first] != many[last]
        assert item.right in plural[many[first]]
        assert item.wrong in plural[many[last]]


def test_a_series_goes_on_with_what_comes_next():
    months, days = (list(names) for names in (calendar.month_name, calendar.day_name))
    for item in of("order"):
        *_, last = item.prompt.rstrip(",").split(", ")
        for series in (months, days, list(NUMBERS)):
            if last in series:
                assert series.index(item.right.strip()) == series.index(last) + 1
                assert item.wrong.strip() in series
        assert item.wrong.strip() not in item.prompt


def test_what_is_copied_stood_there_twice_after_the_same_word():
    for item in of("copying"):
        last = item.prompt.split()[-1]
        assert item.prompt.count(f"{last}{item.right}") == 2
        assert item.wrong in f" {item.prompt}"
        assert f"{last}{item.wrong}" not in item.prompt


def test_sums_are_sums():
    for item in of("sums"):
        first, _, second, _ = item.prompt.lower().split()
        assert NUMBERS[item.right.strip()] == NUMBERS[first] + NUMBERS[second] != NUMBERS[item.wrong.strip()]


def test_a_real_model_agrees_puts_in_order_and_copies(smollm2):
    tokens = first_tokens(smollm2, ITEMS)
    assert (tokens[:, 0] != tokens[:, 1]).all()
    assert [smollm2.tokenizer.decode(token) for token in tokens[:, 0]] == [item.right for item in ITEMS]
    logits = gathered_logits(next_logits(smollm2, [item.prompt for item in ITEMS]), len(ITEMS)).gather(1, tokens)
    right = {item: bool(first > last) for item, (first, last) in zip(ITEMS, logits.tolist(), strict=True)}
    for ability in ("agreement", "order", "copying"):
        assert torch.tensor([right[item] for item in of(ability)]).float().mean() > 0.8
