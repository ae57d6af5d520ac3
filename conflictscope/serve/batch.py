"""Answers that share a model's passes: rows join between two steps, and leave when they end.

1. New answers are read together, padded on the left, each with its own edits (``interventions.rows``), into a cache of
   their own, which is then joined to the others'. An answer whose next token a rule chooses from two prompts has a row
   for each.
2. A step is one pass by one token of all rows. Rows have positions and a mask of their own, so that a row gets what it
   would get alone, up to the rounding of sums.
3. Rows that ended are taken out, and with them the padding that all others share.

All rows end in the same column, so that keys and values of a layer with a sliding window can be joined like others.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from conflictscope.serve.answers import Answer
from interp.inputs import padded
from interp.pairs import weighed
from interventions.base import Acting, Handle, RowFollower
from interventions.rows import RowGroup


def can_batch(model: Any) -> bool:
    """Whether rows of a model's cache can be joined: it holds keys and values alone, and rows have positions."""
    if getattr(model, "_is_stateful", False) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _cache(model).layers)


class Batch:
    """The answers that share passes, and their cache.

    Attributes:
        answers: Those that go on.

    Args:
        model: A transformers model for which ``can_batch`` holds.
    """

    def __init__(self, model: Any) -> None:
        self.answers: list[Answer] = []
        self._model = model
        self._cache: Any = None
        # Of all rows, in the order of the answers: which columns of the cache hold their tokens, (n_rows, n_columns);
        # how many these are; and what is kept about each of them.
        self._mask = torch.empty(0)
        self._lengths: list[int] = []
        self._kept: list[dict[RowFollower, Tensor]] = []
        self._groups: list[tuple[Acting, RowGroup]] = []
        self._attached: list[Handle] = []

    @property
    def n_rows(self) -> int:
        """How many rows a step has."""
        return len(self._lengths)

    @torch.inference_mode()
    def join(self, answers: Sequence[Answer]) -> None:
        """Read the prompts of new answers, choose their first tokens, and let those that go on take part from now on.

        Whatever fails, the others' rows are as they were.
        """
        self.pause()
        prompts = [prompt for answer in answers for prompt in answer.job.prompts]
        inputs = padded(self._model, prompts)
        cache = _cache(self._model)
        real = inputs["attention_mask"].bool()
        try:
            self._attach(answers)
            for _, group in self._groups:
                group.tell(real[group.rows])
            output = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            kept: list[dict[RowFollower, Tensor]] = [{} for _ in prompts]
            for _, group in self._groups:
                for row, found in zip(group.rows.tolist(), group.keep(), strict=True):
                    kept[row] = found
            self._choose(answers, output.logits[:, -1])
        finally:
            self.pause()
        mask = inputs["attention_mask"]
        if self.answers:
            columns = max(self._mask.shape[1], mask.shape[1])
            _join(self._cache, cache)
            mask = torch.cat([_widened(self._mask, columns, -1), _widened(mask, columns, -1)])
        else:
            self._cache = cache
        self._mask = mask
        self._lengths += map(len, prompts)
        self._kept += kept
        self.answers += answers

    @torch.inference_mode()
    def step(self) -> None:
        """Go on with one token of each answer."""
        if not self._attached:
            self._attach(self.answers)
            real = torch.ones(self.n_rows, 1, dtype=torch.bool, device=self._mask.device)
            for _, group in self._groups:
                group.tell(real[group.rows], [self._kept[row] for row in group.rows.tolist()])
        last = [[answer.tokens[-1]] for answer in self.answers for _ in answer.job.prompts]
        device = self._mask.device
        self._mask = pad(self._mask, (0, 1), value=1)
        output = self._model(
            input_ids=torch.tensor(last, device=device),
            attention_mask=self._mask,
            position_ids=torch.tensor(self._lengths, device=device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._lengths = [length + 1 for length in self._lengths]
        self._choose(self.answers, output.logits[:, -1])

    def leave(self) -> list[Answer]:
        """Take out the answers that have ended."""
        # Looked at once: who wants an answer no longer says so at any time.
        ended = [answer for answer in self.answers if answer.ended]
        if ended:
            self.pause()
            stays = [answer not in ended for answer in self.answers for _ in answer.job.prompts]
            rows = [row for row, stay in enumerate(stays) if stay]
            self.answers = [answer for answer in self.answers if answer not in ended]
            self._lengths = [self._lengths[row] for row in rows]
            self._kept = [self._kept[row] for row in rows]
            if rows:
                columns = max(self._lengths)
                index = torch.tensor(rows, device=self._mask.device)
                self._mask = self._mask[index, -columns:]
                _select(self._cache, index, columns)
            else:
                self._cache = None
        return ended

    def pause(self) -> None:
        """Leave the model without edits until the next step, for passes that are not the batch's."""
        while self._attached:
            self._attached.pop().remove()
        while self._groups:
            self._groups.pop()[1].leave()

    def _attach(self, answers: Sequence[Answer]) -> None:
        """Attach the edits of answers, which are all rows of the next passes."""
        rows: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        actings: dict[int, Acting] = {}
        row = 0
        for answer in answers:
            acting = answer.job.acting
            actings[id(acting)] = acting
            for of_kind, _ in zip(rows[id(acting)], answer.job.prompts, strict=False):
                of_kind.append(row)
                row += 1
        device = self._model.device
        for key, (first, second) in rows.items():
            # As rules take them: first prompts of all pairs, then second ones.
            group = RowGroup(actings[key].patches, torch.tensor(first + second, device=device))
            self._groups.append((actings[key], group))
            self._attached.append(group.attach(self._model))

    def _choose(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Go on with a token each, or fail."""
        scores = logits.float()
        errors: dict[int, Exception] = {}
        for acting, group in self._groups:
            try:
                if group.error is not None:
                    raise group.error
                if acting.rule is not None:
                    first = group.rows[: len(group.rows) // 2]
                    scores = scores.index_copy(0, first, weighed(acting.rule, scores[group.rows]))
            except Exception as error:
                errors[id(acting)] = error
        best: list[int] = scores.argmax(-1).tolist()
        row = 0
        for answer in answers:
            answer.error = errors.get(id(answer.job.acting))
            try:
                if answer.error is None:
                    answer.take(scores[row], best[row])
            except Exception as error:
                answer.error = error
            row += len(answer.job.prompts)


def _cache(model: Any) -> Any:
    return DynamicCache(config=model.config)


def _widened(values: Tensor, size: int, axis: int) -> Tensor:
    """Values with zeros put before them along an axis, counted from the end."""
    return pad(values, (0, 0) * (-axis - 1) + (size - values.shape[axis], 0))


def _join(cache: Any, other: Any) -> None:
    """Put the rows of another cache after those of one."""

    def joined(some: Tensor, added: Tensor) -> Tensor:
        columns = max(some.shape[-2], added.shape[-2])
        return torch.cat([_widened(some, columns, -2), _widened(added, columns, -2)])

    # One layer may take another's.
    pairs = [pair for pair in zip(cache.layers, other.layers, strict=True) if pair[0].keys is not None]
    # All of them before any is put in place: memory may not suffice.
    made = [(joined(layer.keys, added.keys), joined(layer.values, added.values)) for layer, added in pairs]
    for (layer, added), (keys, values) in zip(pairs, made, strict=True):
        layer.keys, layer.values = keys, values
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, added.cumulative_length)


def _select(cache: Any, rows: Tensor, columns: int) -> None:
    """Leave some rows and the last columns of a cache."""
    for layer in cache.layers:
        if layer.keys is None:
            continue
        layer.keys = layer.keys[rows][..., -columns:, :]
        layer.values = layer.values[rows][..., -columns:, :]
        if layer.is_sliding:
            layer.cumulative_length = columns
