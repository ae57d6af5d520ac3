from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from interp import known as known_module
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.facts import PHRASINGS, build_conflicts, usable_facts
from probes.fitting import _categories, _shuffled, conflicts_for_probes, one_hot

RELATIONS = ("capital", "currency")


# Labels and controls


def index_frame(n: int = 240, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    draw = {"relation": ["capital", "currency"], "template": ["a", "b", "c"], "split": ["train", "dev"]}
    frame = pl.DataFrame({column: rng.choice(choices, n).tolist() for column, choices in draw.items()})
    labels = np.where(rng.random(n) < 0.3, "memory", "context").tolist()
    return frame.with_columns(row=pl.arange(n, eager=True), label=pl.Series(labels))


def test_shuffled_labels_are_permuted_within_relation_phrasing_and_split_only():
    frame = index_frame()
    shuffled = _shuffled(frame, "0/1")
    assert shuffled.drop("label").equals(frame.drop("label"))
    strata = ["relation", "template", "split"]

    def counts(of: pl.DataFrame) -> Counter[Any]:
        return Counter(of.select(*strata, "label").rows())

    assert counts(shuffled) == counts(frame)
    moved = (shuffled["label"] != frame["label"]).mean()
    # Of a random permutation with shares p and 1 - p, 2 p (1 - p) = 0.42 change.
    assert moved == pytest.approx(0.42, abs=0.1)


def test_shuffles_depend_on_their_seed_alone():
    frame = index_frame()
    first, again, other = (_shuffled(frame, seed)["label"].to_list() for seed in ("0/1", "0/1", "0/2"))
    assert first == again
    assert first != other


def test_a_label_that_is_the_same_throughout_a_stratum_stays():
    frame = index_frame().with_columns(label=pl.col("template"))
    assert _shuffled(frame, "0/0").equals(frame)


def test_one_hot_marks_phrasing_and_relation_and_leaves_the_unknown_at_zero():
    known = pl.DataFrame({"template": ["b", "a", "b"], "relation": ["y", "x", "x"]})
    categories = _categories(known, ("template", "relation"))
    assert categories == [["template", "a"], ["template", "b"], ["relation", "x"], ["relation", "y"]]
    new = pl.DataFrame({"template": ["a", "new", "b"], "relation": ["y", "x", "new"]})
    expected = [[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert one_hot(new, categories).tolist() == expected
    assert one_hot(new, categories).dtype == torch.float32


# Which prompts are asked


@pytest.fixture
def knows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every model know ten facts of each relation; the list grows when one is asked."""
    asked: list[str] = []

    def known(model: Any, relation: str, **_: Any) -> Any:
        asked.append(relation)
        return usable_facts(relation)[:10]

    monkeypatch.setattr(known_module, "known_facts", known)
    return asked


def test_prompts_about_known_facts_are_built_once_and_kept(tiny_llama, tmp_path, knows):
    def build() -> ConflictSet:
        return conflicts_for_probes(tiny_llama, RELATIONS, folder=tmp_path, seed=0, kinds=("conflict", "aligned"))

    first = build()
    assert knows == ["capital", "currency"]
    facts = {relation: usable_facts(relation)[:10] for relation in RELATIONS}
    assert first == build_conflicts(facts, kinds=("conflict", "aligned"), phrasings=tuple(PHRASINGS))
    assert build() == first
    assert knows == ["capital", "currency"]


def test_a_model_that_knows_nothing_is_one_sentence(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="too few different answers among the facts of capital, currency"):
        conflicts_for_probes(tiny_llama, RELATIONS, folder=tmp_path, seed=0, kinds=("conflict",))
