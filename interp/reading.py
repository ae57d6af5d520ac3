"""Read many prompts once, so that what an edit leaves alone is not computed again for every edit.

What an unedited model computes of a prompt stays true under an edit in two cases:

1. An edit of the last token, or of later ones: everything before it. Only that token is left to run, and of it no more
   than the layers from the lowest edited one on, where it was read unedited too.
2. An edit of all tokens in some layers: everything below the lowest of these. The layers above are left to run on the
   residual stream that was kept.

In both cases the cache of keys and values is that of the unedited model where the edit changes nothing.

Where no edit is to follow, what all prompts of a batch begin with (an instruction, answered examples) is read once. Nor
does a rule that chooses next tokens from prompts with and without their contexts change what was read of both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicLayer

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.generation import MAX_NEW_TOKENS, Answered, Continuations, gathered, generated
from interp.inputs import padded, prompt_batches, token_ids, tokenizer_of
from interp.models import device_memory
from interp.pairs import Combined
from interp.progress import tracked

READING_VERSION = 1
"""Version of how kept prompts are gone on with: raise it when the same edit would give other numbers."""


class AtEnd(NamedTuple):
    """Tokens from the last one on, from a layer on.

    Attributes:
        layer: The lowest layer that is edited.
    """

    layer: int


Changed = int | AtEnd | Literal["whole"]
"""What edits change: all tokens from a layer on, only those from the last one on, or anything (``whole``)."""

ALL_LAYERS_AT_END = AtEnd(0)

# One token a prompt is left to run at a time, which pays only for many prompts.
_BATCH_SIZE, _TOKENS_AT_ONCE = 128, 4096
_MOST_KEPT, _MOST_OF_MEMORY = 2**32, 1 / 8
# Tokens that prompts begin with alike, from which on a second pass is worth its overhead.
_LEAST_SHARED = 8


@dataclass(frozen=True)
class _Read:
    """A batch that was read.

    Attributes:
        numbers: Which prompts they are.
        tokens: The ids of each one's tokens; of pairs those of all first prompts, then of all second ones.
        inputs: All tokens, padded.
        cache: Keys and values of all tokens but the last, unedited; ``None`` where a prompt has one token only, or no
            more is kept.
        given: What a block was given at these tokens, as the block below gave it, by layer, of some layers.
    """

    numbers: list[int]
    tokens: list[list[int]]
    inputs: dict[str, Tensor]
    cache: Any
    given: dict[int, Any]


class ReadPrompts:
    """Prompts that were read up to their last token by a model without edits.

    Args:
        model: The model, or a bridge around it, unedited.
        prompts: Full prompts.
        without: The same prompts without their contexts, for a rule that is to choose next tokens from both; no edits
            are to follow then.
        new_tokens: How many tokens are to follow each at most.
        batch_size: Prompts per batch at most; fewer of long ones.
        edited: Whether edits are to follow. Where none is, no residual streams are kept, and what all prompts of a
            batch begin with is read once.
        ends: Whether the last tokens are read too, so that edits of them leave layers below alone.
        most_kept: Bytes that are kept at most: half for residual streams, of which fewer layers are kept where all do
            not fit, half for keys and values. Prompts beyond are read anew each time. ``None`` takes 4 GiB, or an
            eighth of the device's memory where that is less.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If a prompt has no tokens, or it and what follows has more than the model has positions.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        *,
        without: Sequence[str] | None = None,
        new_tokens: int = 0,
        batch_size: int = _BATCH_SIZE,
        edited: bool = True,
        ends: bool = False,
        most_kept: int | None = None,
        progress: str | None = None,
    ) -> None:
        self._model = model
        self._anatomy = Anatomy(model)
        if most_kept is None:
            most_kept = _most_kept(self._anatomy.device)
        self._network: Any = self._anatomy.model
        self._count = len(prompts)
        edited = edited and without is None
        batches = prompt_batches(model, prompts, batch_size, new_tokens=new_tokens, most_tokens=_TOKENS_AT_ONCE)
        if without is not None:
            second = [token_ids(tokenizer_of(model), [without[i] for i in batch.numbers]) for batch in batches]
            batches = [
                batch._replace(tokens=[*batch.tokens, *others]) for batch, others in zip(batches, second, strict=True)
            ]
        tokens = sum(len(batch.tokens) * max(map(len, batch.tokens)) for batch in batches)
        of_a_layer = tokens * self._anatomy.d_model * self._anatomy.dtype.itemsize
        every = max(1, math.ceil(self._anatomy.n_layers * of_a_layer / max(most_kept // 2, 1)))
        layers = range(every, self._anatomy.n_layers, every) if edited else ()
        self._shares, self._is_paired = not edited, without is not None
        self._left = most_kept // 2
        self._batches = [self._read(batch.numbers, batch.tokens, layers) for batch in tracked(batches, progress)]
        # What each block gives at last tokens, unedited, by layer.
        self._given_at_end: list[dict[int, Any]] = [{} for _ in batches]
        if ends:
            self._given_at_end = [{} if read.cache is None else self.ends(i)[1] for i, read in enumerate(self._batches)]

    def next_logits(self, changed: Changed = ALL_LAYERS_AT_END) -> Iterator[tuple[list[int], Tensor]]:
        """Run what is left to the prompts' ends: for each batch the numbers of its prompts and ``(n, d_vocab)`` logits.

        Args:
            changed: What the edits that are applied now change.
        """
        for number, batch in enumerate(self._batches):
            yield batch.numbers, self.batch_logits(number, changed)

    @property
    def batches(self) -> list[list[int]]:
        """The numbers of the prompts that are run together."""
        return [batch.numbers for batch in self._batches]

    def padded_tokens(self, batch: int) -> int:
        """How many tokens one of ``batches`` has, padding included."""
        return self._batches[batch].inputs["input_ids"].numel()

    @torch.inference_mode()
    def batch_logits(self, batch: int, changed: Changed = ALL_LAYERS_AT_END) -> Tensor:
        """Run what is left of the prompts of one of ``batches``, for their ``(n, d_vocab)`` logits at the end.

        Where one token is left of each, modules see that alone; else whole prompts, padded on the left.
        """
        read = self._batches[batch]
        cache = self._cache(read, changed)
        if cache is None or changed == "whole":
            return self._network(**read.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        lowest = changed.layer if isinstance(changed, AtEnd) else changed
        start = lowest if self._given_at_end[batch] else 0
        below = dict.fromkeys(range(start), self._given_at_end[batch].get(start - 1))
        with recalled(self._anatomy, start, below):
            output = self._network(**_last(read.inputs), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def ends(self, batch: int) -> tuple[Tensor, dict[int, Any]]:
        """Run the last tokens of one of ``batches`` unedited.

        Returns:
            ``(n, d_vocab)`` logits, and what each block gives there, by layer, as ``repeated_logits`` takes it.
        """
        given: dict[int, Any] = {}
        with noted(self._anatomy, range(self._anatomy.n_layers), given):
            return self.batch_logits(batch), given

    @torch.inference_mode()
    def repeated_logits(self, batch: int, given: Mapping[int, Any], layer: int, times: int) -> Tensor:
        """Run the last token of each prompt of one of ``batches`` several times, side by side, from a layer on.

        Args:
            batch: The batch.
            given: What ``ends`` gave of it.
            layer: The lowest that is edited now, at the last token alone; every row may be edited differently.
            times: How many rows each prompt has.

        Returns:
            ``(n * times, d_vocab)`` logits at the end, prompt by prompt.
        """
        read = self._batches[batch]
        inputs = {name: values.repeat_interleave(times, 0) for name, values in read.inputs.items()}
        if read.cache is None:
            return self._network(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        cache = copy.copy(read.cache)
        # Blocks below write nothing into theirs.
        cache.layers = [*read.cache.layers[:layer], *(copy.copy(kept) for kept in read.cache.layers[layer:])]
        for kept in cache.layers[layer:]:
            kept.batch_repeat_interleave(times)
        below = dict.fromkeys(range(layer), _repeated(given[layer - 1], times) if layer else None)
        with recalled(self._anatomy, layer, below):
            output = self._network(**_last(inputs), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def continue_greedily(
        self,
        changed: Changed = ALL_LAYERS_AT_END,
        *,
        watch: Tensor | None = None,
        combined: Combined | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: str | None = None,
    ) -> Continuations:
        """Continue each prompt greedily: see ``interp.generation.continue_greedily``, and ``next_logits``.

        Raises:
            UserError: If there is a rule for the next token and prompts were not read ``without`` contexts too, or the
                other way round.
        """
        if (combined is not None) != self._is_paired:
            raise UserError(
                "A rule for the next token goes on from prompts that were read without their contexts too, and only a "
                "rule does; give ReadPrompts without=, or leave it out."
            )
        answered = (
            Answered(
                b.numbers,
                *generated(self._model, b.tokens, max_new_tokens, rule=combined, cache=self._cache(b, changed)),
            )
            for b in tracked(self._batches, progress)
        )
        return gathered(self._model, answered, self._count, watch)

    def _read(self, numbers: list[int], tokens: list[list[int]], layers: Sequence[int]) -> _Read:
        inputs = padded(self._model, tokens)
        if min(map(len, tokens)) < 2 or self._left <= 0:
            return _Read(numbers, tokens, inputs, None, {})
        kept: dict[int, Any] = {}
        with torch.inference_mode(), noted(self._anatomy, [layer - 1 for layer in layers], kept):
            cache = self._cache_from_one_beginning(tokens) if self._shares else None
            if cache is None:
                cache = self._anatomy.body(**_prefix(inputs), use_cache=True).past_key_values
        self._left -= sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        return _Read(numbers, tokens, inputs, cache, {below + 1: output for below, output in kept.items()})

    def _cache_from_one_beginning(self, tokens: Sequence[Sequence[int]]) -> Any:
        """Keys and values of all tokens but the last, of prompts that begin alike; ``None`` where that saves nothing.

        Keys lie where they lie in a batch that is padded on the left: ``[padding, beginning, rest]``.
        """
        # Something is left of each prompt besides its last token.
        most = min(map(len, tokens)) - 2
        differs = (at for at, ids in enumerate(zip(*tokens, strict=False)) if len(set(ids)) > 1)
        shared = min(next(differs, most), most)
        if len(tokens) < 2 or shared < _LEAST_SHARED:
            return None
        body, beginning = self._anatomy.body, padded(self._model, [tokens[0][:shared]])
        cache = body(**beginning, use_cache=True).past_key_values
        # A layer that forgets what is far away cannot be put in another order.
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        cache.batch_repeat_interleave(len(tokens))
        rest = padded(self._model, [ids[shared:-1] for ids in tokens])
        mask, n_rest = rest["attention_mask"], rest["input_ids"].shape[1]
        before = mask.new_ones(len(tokens), shared)
        positions = rest["position_ids"] + shared
        inputs = {"input_ids": rest["input_ids"], "attention_mask": torch.cat([before, mask], 1)}
        body(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        missing = n_rest - mask.sum(1, keepdim=True)
        places = torch.arange(shared + n_rest, device=mask.device)[None]
        # Padding comes from behind the beginning, the beginning moves up, the rest stays.
        order = torch.where(places < missing, places + shared, places - missing)
        order = torch.where(places < missing + shared, order, places)[:, None, :, None]
        for layer in cache.layers:
            for name in ("keys", "values"):
                kept = getattr(layer, name)
                setattr(layer, name, kept.gather(2, order.to(kept.device).expand_as(kept)))
        return cache

    def _cache(self, batch: _Read, changed: Changed) -> Any:
        """Keys and values of all tokens but the last under what is applied now, to write into; ``None`` of no token."""
        if batch.cache is None or changed == "whole":
            return None
        # A pass writes into its cache, and a sliding window forgets what it would take to undo that.
        if isinstance(changed, AtEnd):
            return copy.deepcopy(batch.cache)
        start = max((layer for layer in batch.given if layer <= changed), default=0)
        # All of them give what comes out of the last one.
        below = dict.fromkeys(range(start), batch.given.get(start))
        with torch.inference_mode(), recalled(self._anatomy, start, below):
            cache = self._anatomy.body(**_prefix(batch.inputs), use_cache=True).past_key_values
        cache.layers[:start] = copy.deepcopy(batch.cache.layers[:start])
        return cache


def _most_kept(device: torch.device) -> int:
    memory = device_memory(device)
    return _MOST_KEPT if memory is None else min(_MOST_KEPT, int(memory * _MOST_OF_MEMORY))


def _prefix(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[:, :-1] for name, values in inputs.items()}


def _last(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values if name == "attention_mask" else values[:, -1:] for name, values in inputs.items()}


def _repeated(output: Any, times: int) -> Any:
    """What a block gives, with every row several times."""
    if isinstance(output, tuple):
        return tuple(_repeated(part, times) for part in output)
    return output.repeat_interleave(times, 0) if isinstance(output, Tensor) else output


@contextmanager
def noted(anatomy: Anatomy, layers: Iterable[int], outputs: dict[int, Any]) -> Iterator[None]:
    """Add to ``outputs`` what the blocks of some layers give, by layer."""
    with ExitStack() as stack:
        for layer in layers:
            handle = anatomy.module("block", layer).register_forward_hook(
                lambda _, __, output, layer=layer: outputs.update({layer: output})
            )
            stack.callback(handle.remove)
        yield


@contextmanager
def recalled(anatomy: Anatomy, layer: int, outputs: dict[int, Any]) -> Iterator[None]:
    """Let blocks below ``layer`` return what ``outputs`` has of them; what is missing there they compute and add.

    A hook cannot spare a module its forward pass, so that pass itself is replaced, in the dictionary of the instance:
    a bridge would hand an ordinary assignment on to the module that it wraps.
    """

    def recall(below: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forwarded(*args: Any, **kwargs: Any) -> Any:
            if below not in outputs:
                outputs[below] = forward(*args, **kwargs)
            return outputs[below]

        return forwarded

    with ExitStack() as stack:
        for below in range(layer):
            block = anatomy.module("block", below)
            attributes = vars(block)
            stack.callback(attributes.update, {name: attributes[name] for name in {"forward"} & attributes.keys()})
            stack.callback(attributes.pop, "forward")
            attributes["forward"] = recall(below, block.forward)
        yield
