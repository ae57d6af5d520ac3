import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interp import corpus
from interp.conflicts import split_of
from interp.corpus import TEMPERATURE, sampled_texts
from interp.errors import UserError
from interp.facts import relations, usable_facts
from interp.inputs import encode
from interp.models import load_model


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(corpus, "_BATCH_SIZE", 4)


def test_a_second_call_reads_what_the_first_sampled(tiny_llama, tmp_path, monkeypatch):
    texts = sampled_texts(tiny_llama, 8, tmp_path, split="train", seed=0, new_tokens=5)
    assert len(texts) == 8
    monkeypatch.setattr(corpus, "_sampled", None)
    assert sampled_texts(tiny_llama, 8, tmp_path, split="train", seed=0, new_tokens=5) == texts


def test_a_batch_that_is_missing_is_sampled_as_it_was(tiny_llama, tmp_path):
    texts = sampled_texts(tiny_llama, 12, tmp_path, split="train", seed=0, new_tokens=5)
    (batch,) = tmp_path.glob("train-*/00001.json")
    batch.unlink()
    assert sampled_texts(tiny_llama, 12, tmp_path, split="train", seed=0, new_tokens=5) == texts


def test_fewer_texts_are_the_first_of_more(tiny_llama, tmp_path):
    few = sampled_texts(tiny_llama, 6, tmp_path / "few", split="train", seed=0, new_tokens=5)
    assert sampled_texts(tiny_llama, 12, tmp_path / "more", split="train", seed=0, new_tokens=5)[:6] == few


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "dev"}])
def test_another_seed_or_split_gives_other_texts(tiny_llama, tmp_path, other):
    arguments = {"split": "train", "seed": 0, "new_tokens": 5}
    first = sampled_texts(tiny_llama, 8, tmp_path / "a", **arguments)
    assert not set(first) & set(sampled_texts(tiny_llama, 8, tmp_path / "b", **{**arguments, **other}))


def test_sampling_leaves_the_random_state_alone(tiny_llama, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    sampled_texts(tiny_llama, 4, tmp_path, split="train", seed=0, new_tokens=5)
    assert torch.equal(torch.rand(3), expected)


def test_half_of_the_texts_start_from_subjects_of_the_split_and_half_from_nothing(smollm2):
    for split in ("train", "dev"):
        starts = corpus._starts(smollm2, split, 0)
        subjects = {fact.subject for name in relations() for fact in usable_facts(name)}
        assert set(starts[::2]) == {smollm2.tokenizer.bos_token}
        assert set(starts[1::2]) == {subject for subject in subjects if split_of(subject, 0) == split}
        assert max(Counter(starts[1::2]).values()) == 1


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax_at_that_temperature(tiny_llama):
    """1,200 first tokens against the model's own logits; a chi-squared statistic within four standard deviations."""
    start = "Rome Paris"
    drawn = corpus._sampled(tiny_llama, [start] * 1200, 1, 0)
    with torch.inference_mode():
        logits = tiny_llama.original_model(**encode(tiny_llama, [start])).logits[0, -1]
    probabilities = (logits.double() / TEMPERATURE).softmax(-1)
    expected: Counter[str] = Counter()
    for token, probability in enumerate(probabilities.tolist()):
        expected[tiny_llama.tokenizer.decode([token])] += probability * len(drawn)
    counted = Counter(text.removeprefix(start) for text in drawn)
    # Texts that are rare share one cell.
    common = [text for text, count in expected.items() if count >= 5]
    assert set(counted) <= set(expected)
    cells = [(counted[text], expected[text]) for text in common]
    cells.append((len(drawn) - sum(c for c, _ in cells), len(drawn) - sum(e for _, e in cells)))
    statistic = sum((c - e) ** 2 / max(e, 1e-9) for c, e in cells)
    degrees = len(cells) - 1
    assert degrees > 10
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_tokenizer_without_a_first_token_is_refused(tmp_path):
    bare: Any = SimpleNamespace(tokenizer=SimpleNamespace(bos_token=None, eos_token=None))
    with pytest.raises(UserError, match="neither a first nor a last token"):
        sampled_texts(bare, 4, tmp_path, split="train", seed=0)
    assert not list(tmp_path.iterdir())


def test_batches_are_plain_json(tiny_llama, tmp_path):
    texts = sampled_texts(tiny_llama, 4, tmp_path, split="train", seed=0, new_tokens=3)
    (batch,) = tmp_path.glob("train-*/00000.json")
    assert json.loads(batch.read_text()) == texts


def test_texts_of_another_model_or_seed_in_the_same_folder_are_not_taken(tiny_llama, tiny_directories, tmp_path):
    other = load_model(str(tiny_directories["mistral"]), device="cpu")
    for model, seed in ((tiny_llama, 0), (other, 0), (tiny_llama, 1)):
        fresh = sampled_texts(model, 4, tmp_path / f"alone {id(model)} {seed}", split="train", seed=seed, new_tokens=3)
        assert sampled_texts(model, 4, tmp_path / "shared", split="train", seed=seed, new_tokens=3) == fresh
