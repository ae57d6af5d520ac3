"""Say which words of an answer come from the context: what it adds to each token's probability.

For each token of a greedy answer, or of one that somebody else gave, with the same tokens forced after the prompt and
after the bare prompt:

    gain        log p(token | with the context) - log p(token | without), nats: pointwise mutual information;
                its mean over answers is P-CXMI (Fernandes et al. 2023, arXiv 2109.07446)
    divergence  KL of the whole next-token distributions, with || without, nats
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import torch
from torch import nn

from interp.anatomy import Anatomy
from interp.answers import is_complete
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.generation import generated
from interp.inputs import check_lengths, continuation_ids, joined, prompt_batches, token_ids, token_spans, tokenizer_of
from interp.progress import tracked
from interp.teacher_forcing import Continued, item_residuals

_BATCH_SIZE = 32


def token_reliance(
    model: nn.Module, conflicts: ConflictSet, *, max_new_tokens: int = 24, progress: str | None = None
) -> pl.DataFrame:
    """Measure every token of every greedy answer with the context against the same token without.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        conflicts: The prompts; those without a context, or without a bare prompt, are left out.
        max_new_tokens: Longest answer, in tokens; it ends with its first sentence.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        A row a token: ``id, subject, kind, template``, ``position`` (from 0), ``token``, ``log_p`` and
        ``log_p_without`` (nats), ``gain`` and ``divergence``.

    Raises:
        UserError: If there is nothing to measure.
    """
    examples = [e for e in conflicts if e.contexts and e.bare_prompt]
    if not examples:
        raise UserError(f"{conflicts.name} has no prompt with a context that can be asked without it; give other data.")
    tokenizer = tokenizer_of(model)
    prompts = [e.prompt for e in examples]
    before, bare = token_ids(tokenizer, prompts), token_ids(tokenizer, [e.bare_prompt for e in examples])
    answers: list[list[int]] = [[] for _ in examples]
    network: Any = Anatomy(model).model
    ends = network.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for batch in tracked(prompt_batches(model, prompts, _BATCH_SIZE, new_tokens=max_new_tokens), progress):
        said, _ = generated(model, batch.tokens, max_new_tokens)
        for number, row in zip(batch.numbers, said.tolist(), strict=True):
            answers[number] = _until_end(tokenizer, row, ends)
    told = [i for i, answer in enumerate(answers) if answer]
    pairs = [(before[i], bare[i], answers[i]) for i in told]
    rows = []
    for index, measured in zip(told, _measured(model, pairs), strict=True):
        about = {name: getattr(examples[index], name) for name in ("id", "subject", "kind", "template")}
        rows += [{**about, "position": position, **row} for position, row in enumerate(measured)]
    if not rows:
        raise UserError(f"The model answers nothing to the {len(examples)} prompts of {conflicts.name}; ask otherwise.")
    return pl.DataFrame(rows)


def forced_reliance(
    model: nn.Module,
    prompts: Sequence[str],
    bare_prompts: Sequence[str],
    answers: Sequence[str],
    *,
    progress: str | None = None,
) -> pl.DataFrame:
    """Measure every token of given answers with the context against the same token without.

    Of answers with marked spans: ``forced_reliance(model, [a.prompt for a in marked], [a.bare_prompt for a in marked],
    [a.answer for a in marked])``, see ``interp.spans``.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        prompts: The prompts with a context.
        bare_prompts: The same without it.
        answers: What follows each; all of it is measured.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        A row a token: ``answer`` (number, from 0), ``position`` (from 0), ``start`` and ``end`` (the characters of the
        answer that it covers: the first, and the one after the last), ``token``, ``log_p`` and ``log_p_without``
        (nats), ``gain`` and ``divergence``.

    Raises:
        UserError: If there is nothing to measure, there are not as many of each, an answer is empty, or a prompt with
            its answer is longer than the model's positions.
    """
    if not answers or not len(prompts) == len(bare_prompts) == len(answers):
        raise UserError(
            f"Got {len(prompts)} prompts, {len(bare_prompts)} bare prompts and {len(answers)} answers; give as many of "
            "each, and one at least."
        )
    if empty := [number for number, answer in enumerate(answers) if not answer.strip()]:
        raise UserError(f"Answer {empty[0]} is empty; leave it out.")
    tokenizer = tokenizer_of(model)
    pairs, places = [], []
    for prompt, bare, answer in zip(prompts, bare_prompts, answers, strict=True):
        before, after = continuation_ids(model, prompt, answer)
        without = token_ids(tokenizer, [bare])[0]
        check_lengths(model, [before, without], new_tokens=len(after))
        pairs.append((before, without, after))
        places.append(_offsets(tokenizer, prompt, answer, after))
    rows = []
    for start in tracked(range(0, len(pairs), _BATCH_SIZE), progress):
        chosen = range(start, min(start + _BATCH_SIZE, len(pairs)))
        for number, measured in zip(chosen, _measured(model, [pairs[i] for i in chosen]), strict=True):
            rows += [
                {"answer": number, "position": position, "start": place[0], "end": place[1], **row}
                for position, (row, place) in enumerate(zip(measured, places[number], strict=True))
            ]
    return pl.DataFrame(rows)


def _measured(
    model: nn.Module, items: Sequence[tuple[list[int], list[int], list[int]]]
) -> Iterator[list[dict[str, Any]]]:
    """For each prompt, bare prompt and answer, all token ids, the numbers of the answer's tokens."""
    tokenizer = tokenizer_of(model)
    with_context, without = (
        item_residuals(model, [Continued((*item[which], *item[2]), len(item[2])) for item in items]) for which in (0, 1)
    )
    for (_, _, tokens), residuals, bare in zip(items, with_context, without, strict=True):
        log_p, log_q = (_log_probabilities(model, part) for part in (residuals, bare))
        divergences = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        rows = []
        for position, (token, divergence) in enumerate(zip(tokens, divergences, strict=True)):
            own, other = log_p[position, token].item(), log_q[position, token].item()
            numbers = {"log_p": own, "log_p_without": other, "gain": own - other, "divergence": divergence}
            rows.append({"token": tokenizer.decode([token]), **numbers})
        yield rows


def _offsets(tokenizer: Any, prompt: str, answer: str, tokens: list[int]) -> list[tuple[int, int]]:
    """The characters of an answer that each of its tokens covers, white space before a word left out."""
    whole = joined(tokenizer, prompt, answer)
    said = whole[len(prompt) :]
    # A piece of text that a tokenizer would merge with what stands before it is tokenised after a line break instead.
    for text in (whole, f"\n{said}", f"a{said}", said):
        ids, spans = token_spans(tokenizer, text)
        if ids[-len(tokens) :] == tokens:
            shift = len(text) - len(answer)
            found = [(start - shift, end - shift) for start, end in spans[-len(tokens) :]]
            return [_trimmed(answer, max(start, 0), max(end, 0)) for start, end in found]
    raise UserError(f"Where the tokens of the answer {answer[:40]!r} stand in it cannot be told; leave it out.")


def _trimmed(answer: str, start: int, end: int) -> tuple[int, int]:
    word = answer[start:end]
    start += len(word) - len(word.lstrip())
    return start, max(start, end)


def _until_end(tokenizer: Any, tokens: list[int], ends: set[int | None]) -> list[int]:
    """The tokens of an answer's first sentence, without the end of the text."""
    kept: list[int] = []
    for token in tokens:
        # What makes the sentence complete, a line break for example, is no part of it.
        if token in ends or is_complete(tokenizer.decode([*kept, token])):
            break
        kept.append(token)
    return kept


def _log_probabilities(model: nn.Module, residuals: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return Anatomy(model).logits(residuals).float().log_softmax(-1).cpu()
