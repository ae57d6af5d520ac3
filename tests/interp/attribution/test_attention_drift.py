"""Attention drift against the formula in numpy, from transformers' own attention, one prompt at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.anatomy import Anatomy
from interp.attribution.attention_drift import attention_drift, drift
from interp.attribution.scores import HeadScores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_model


@pytest.fixture(scope="module")
def conflicts(capital_conflicts) -> ConflictSet:
    """Prompts of three subjects in two phrasings."""
    kept = capital_conflicts.subjects[:3]
    templates = sorted({e.template for e in capital_conflicts})[:2]
    some = [e for e in capital_conflicts if e.subject in kept and e.template in templates]
    return ConflictSet("some", tuple(some))


def rows(model: Any, prompt: str) -> np.ndarray:
    """Attention of the last token, ``(n_layers, n_heads, n_tokens)``."""
    with Anatomy(model).eager_attention(), torch.inference_mode():
        attentions = model(**encode(model, [prompt]), output_attentions=True).attentions
    return torch.stack([weights[0, :, -1] for weights in attentions]).double().numpy()


def by_hand(n: np.ndarray, c: np.ndarray) -> np.ndarray:
    length = max(n.shape[-1], c.shape[-1])
    n, c = (np.pad(x, [(0, 0), (0, 0), (0, length - x.shape[-1])]) for x in (n, c))
    parts = np.zeros((3, *n.shape[:2]))
    for place in np.ndindex(*n.shape[:2]):
        a, b = n[place], c[place]
        safe_a, safe_b = np.maximum(a, 1e-9), np.maximum(b, 1e-9)
        parts[0][place] = np.abs(a - b).mean()
        parts[1][place] = 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        parts[2][place] = (a * np.log(safe_a / safe_b)).sum() + (b * np.log(safe_b / safe_a)).sum()
    low, high = parts.min((1, 2), keepdims=True), parts.max((1, 2), keepdims=True)
    return np.tensordot([0.4, 0.3, 0.3], (parts - low) / (high - low), 1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-neox"])
def test_scores_are_those_of_the_formula(tiny_model, tiny_directories, conflicts, architecture):
    plain = load_model(str(tiny_directories[architecture]), device="cpu")
    found = attention_drift(tiny_model(architecture), conflicts, name="tiny")
    examples = {e.id: e for e in conflicts}
    assert len(found.example_ids) > 1
    for values, name in zip(found.values, found.example_ids, strict=True):
        example = examples[name]
        (aligned,) = [
            e
            for e in conflicts.select(kind="aligned")
            if (e.subject, e.relation, e.template) == (example.subject, example.relation, example.template)
        ]
        expected = by_hand(rows(plain, aligned.prompt), rows(plain, example.prompt))
        np.testing.assert_allclose(values.numpy(), expected, atol=2e-3)


def test_nothing_drifts_between_equal_rows_and_scores_are_between_0_and_1():
    torch.manual_seed(0)
    same = torch.rand(3, 4, 7).softmax(-1)
    assert torch.equal(drift(same, same), torch.zeros(3, 4))
    other = drift(same, torch.rand(3, 4, 9).softmax(-1))
    assert other.min() >= 0
    assert other.max() <= 1


def test_conflicts_without_their_like_are_refused(tiny_llama, conflicts):
    with pytest.raises(UserError, match="give both for the same subjects and phrasings"):
        attention_drift(tiny_llama, conflicts.select(kind="conflict"), name="tiny")


def test_scores_without_a_sign_say_so_where_they_are_saved(tiny_llama, conflicts, tmp_path):
    found = attention_drift(tiny_llama, conflicts, name="tiny")
    found.save(tmp_path / "drift.parquet")
    assert "none: scores do not tell" in (tmp_path / "drift.json").read_text()
    assert not HeadScores.load(tmp_path / "drift.parquet").signed
