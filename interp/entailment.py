"""Say whether one answer means no more than another, by a model of natural language inference."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from interp.errors import UserError


class Entailment:
    """A classifier of pairs of texts, one of whose labels is entailment.

    Args:
        name: A local directory or a hub id.

    Raises:
        UserError: If it cannot be loaded, or has no such label.
    """

    def __init__(self, name: str | Path) -> None:
        try:
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(name).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"Could not load {name} as a classifier ({reason}); give its directory.") from error
        labels = {str(label).lower(): index for index, label in self._model.config.id2label.items()}
        if "entailment" not in labels:
            raise UserError(f"{name} has the labels {', '.join(labels)}, none of which is entailment; give another.")
        self._label = int(labels["entailment"])
        self._cached = lru_cache(maxsize=2**16)(self._entails)

    def __call__(self, one: str, other: str) -> bool:
        """Whether ``one`` entails ``other``."""
        return one == other or self._cached(one, other)

    def _entails(self, one: str, other: str) -> bool:
        with torch.inference_mode():
            logits = self._model(**self._tokenizer(one, other, return_tensors="pt", truncation=True)).logits
        return int(logits[0].argmax()) == self._label
