"""Generate from pairs of prompts that are read side by side and go on with the same token.

1. The first prompts of all pairs and then the second ones are the rows of one batch, with one KV cache.
2. At each step a rule makes scores of both rows' logits. Whatever ``generate`` does to scores (temperature, top-p,
   penalties, ...) is done to these; what depends on the text so far looks at the first prompt's.
3. One token is chosen from them, which both rows go on with, so that a pair ends as one; other pairs go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from interp.errors import UserError

Combined = Callable[[Tensor, Tensor], Tensor]
"""A rule for the next token: its scores from the logits of two prompts, with and without context, ``(n, d_vocab)``."""


def generate_pairs(
    network: Any, pairs: Mapping[str, Tensor], combined: Combined, *, streamer: Any = None, **options: Any
) -> Any:
    """Generate with a transformers model, whose next tokens a rule chooses for the two prompts of each pair.

    Args:
        network: The transformers model.
        pairs: Left-padded inputs ``(2 * n, n_tokens)``: the rows of the first prompts, then of the second ones.
        combined: The rule.
        streamer: What is told of new tokens, as ``generate`` would.
        options: Others of ``generate``, except beams and assistants.

    Returns:
        What ``generate`` does for the first prompts, without a cache. Scores are those that tokens are chosen by.

    Raises:
        UserError: If text is to be found in another way than greedily or by sampling.
    """
    if options.get("assistant_model") is not None:
        raise UserError(_refused("with an assistant model"))

    # transformers looks at the parameters' names.
    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UserError(_refused(f"by {mode.value.replace('_', ' ')}"))
        count = len(input_ids) // 2
        if streamer is not None:
            streamer.put(input_ids[:count].cpu())
        choice = _Choice(sampled=generation_config.do_sample)
        output = model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([_Rule(combined), *logits_processor, choice]),
            stopping_criteria=_OfFirst(stopping_criteria),
            generation_config=generation_config,
            streamer=None if streamer is None else _ToFirst(streamer),
            **model_kwargs,
        )
        if isinstance(output, Tensor):
            return output[:count]
        halves = {name: _half(value, count) for name, value in output.items()}
        if choice.scores and output.scores is not None:
            halves["scores"] = tuple(choice.scores[: len(output.scores)])
        return type(output)(**halves)

    return network.generate(**pairs, custom_generate=loop, **options)


def weighed(combined: Combined, logits: Tensor) -> Tensor:
    """What a rule makes of the logits of the first prompts of all pairs and then the second ones.

    Args:
        combined: The rule.
        logits: ``(2 * n, d_vocab)`` float32.

    Returns:
        Scores of the next tokens, ``(n, d_vocab)``.

    Raises:
        UserError: If an edit leaves tokens out.
    """
    if logits.isneginf().any():
        raise UserError(
            "An edit such as DoLa leaves tokens out, which a rule for two prompts cannot weigh; apply one of them."
        )
    return combined(*logits.chunk(2))


class _Rule(LogitsProcessor):
    """Gives both rows of a pair the rule's scores."""

    def __init__(self, combined: Combined) -> None:
        self.combined = combined

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002 (transformers' signature)
        return weighed(self.combined, scores).repeat(2, 1)


class _Choice(LogitsProcessor):
    """Leaves both rows of a pair the same token to choose."""

    def __init__(self, *, sampled: bool) -> None:
        self.sampled = sampled
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002 (transformers' signature)
        first, _ = scores.chunk(2)
        if self.sampled:
            self.scores.append(first)
            token = torch.multinomial(first.softmax(-1), 1)
            first = torch.full_like(first, -torch.inf).scatter(1, token, 0.0)
        return first.repeat(2, 1)


class _OfFirst(StoppingCriteriaList):
    """Ends both rows of a pair when the first one's text ends."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done: Any = super().__call__(input_ids, scores, **kwargs)
        return done[: len(done) // 2].repeat(2)


class _ToFirst(BaseStreamer):
    """Tells a streamer of the first rows' tokens."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer

    def put(self, value: Any) -> None:
        self.streamer.put(value[: len(value) // 2])

    def end(self) -> None:
        self.streamer.end()


def _half(value: Any, count: int) -> Any:
    """The first rows of tensors; a cache, which both halves share, is left out."""
    if isinstance(value, Tensor):
        return value[:count]
    return tuple(_half(part, count) for part in value) if isinstance(value, tuple) else None


def _refused(how: str) -> str:
    return f"Two prompts side by side are continued greedily or by sampling, not {how}; generate without."
