"""An answer that cannot share passes: its edits read every prompt twice, say, or the model has a cache of its own."""

from __future__ import annotations

from typing import Any

import torch

from conflictscope.serve.answers import Answer
from interp.inputs import padded
from interp.pairs import weighed
from interventions.base import attach_patches


class Alone:
    """One answer, token by token; between two tokens the model is as it was.

    Attributes:
        answer: The answer.

    Args:
        model: The transformers model.
        answer: The answer.
    """

    def __init__(self, model: Any, answer: Answer) -> None:
        self.answer = answer
        self._model = model
        self._cache: Any = None
        self._inputs = padded(model, answer.job.prompts)

    @torch.inference_mode()
    def step(self) -> None:
        """Go on with one token: the first call reads the prompt."""
        acting = self.answer.job.acting
        with attach_patches(self._model, acting.patches):
            output = self._model(**self._inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        scores = output.logits[:, -1].float()
        if acting.rule is not None:
            scores = weighed(acting.rule, scores)
        self.answer.take(scores[0], int(scores[0].argmax()))
        mask, positions = self._inputs["attention_mask"], self._inputs["position_ids"]
        self._inputs = {
            "input_ids": torch.full_like(mask[:, :1], self.answer.tokens[-1]),
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], -1),
            "position_ids": positions[:, -1:] + 1,
        }
