"""Greedy answers and last-token logits of many prompts, in batches.

Prompts of similar length share a batch, padded so that a prompt's answer does not depend on it (up to float rounding).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from interp.anatomy import transformers_model
from interp.answers import first_sentence, is_complete, without_thinking
from interp.errors import UserError
from interp.inputs import check_lengths, padded, padding_id, prompt_batches, token_ids, tokenizer_of
from interp.linear_maps import device_of
from interp.pairs import Combined, generate_pairs
from interp.progress import tracked

BATCH_SIZE = 32
MAX_NEW_TOKENS = 8


class Continuations(NamedTuple):
    """What the model said.

    Attributes:
        answers: The first sentence of each greedy continuation.
        first_tokens: ``(n_prompts,)``: the token that each answer starts with.
        first_logits: ``(n_prompts, n_watched)`` float32: logits of the watched tokens at the first step; with a rule
            for the next token, its scores.
    """

    answers: list[str]
    first_tokens: Tensor
    first_logits: Tensor


def greedy_texts(network: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """What a plain transformers model goes on with, greedily, to each prompt by itself.

    Args:
        network: The transformers model; for answers without what its checkpoint adds to greedy decoding see
            ``interp.models.decode_plainly``.
        tokenizer: Its tokenizer.
        prompts: Texts.
        max_new_tokens: Longest answer, in tokens.
    """
    device = device_of(network.get_input_embeddings())
    answers = []
    for prompt in prompts:
        tokens = token_ids(tokenizer, [prompt])
        check_lengths(network, tokens, new_tokens=max_new_tokens)
        ids = torch.tensor(tokens, device=device)
        with torch.inference_mode():
            written = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=padding_id(network),
            )
        answers.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


class _AllAnswered(StoppingCriteria):
    """Ends a row once its first sentence is complete."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002 (transformers' signature)
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([is_complete(text) for text in texts], device=input_ids.device)


def continue_greedily(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    watch: Tensor | None = None,
    without: Sequence[str] | None = None,
    combined: Combined | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    whole: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> Continuations:
    """Continue each prompt greedily, with a KV cache, until its first sentence is complete.

    Args:
        model: The model, or a bridge around it.
        prompts: Full prompts.
        watch: Token ids ``(n_prompts, n_watched)`` whose first-step logits are wanted; ``None`` watches nothing.
        without: The same prompts without their contexts, for ``combined``; where one is the same nothing is combined.
        combined: Chooses the next token from both prompts, which are read side by side, each with a cache of its own.
        max_new_tokens: Longest answer, in tokens.
        whole: Take all that the model says as its answer, not only the first sentence.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If a prompt has no tokens, or is too long to be answered.
    """
    if (without is None) != (combined is None):
        raise UserError("A rule for the next token needs the prompts without their contexts, and these need a rule.")

    tokenizer = tokenizer_of(model)

    def answered() -> Iterator[Answered]:
        for numbers, tokens in tracked(prompt_batches(model, prompts, batch_size, new_tokens=max_new_tokens), progress):
            if without is None or combined is None:
                yield Answered(numbers, *generated(model, tokens, max_new_tokens, whole=whole))
                continue
            pairs = [*tokens, *token_ids(tokenizer, [without[i] for i in numbers])]
            yield Answered(numbers, *generated(model, pairs, max_new_tokens, rule=combined, whole=whole))

    return gathered(model, answered(), len(prompts), watch, whole=whole)


class Answered(NamedTuple):
    """What a batch was answered.

    Attributes:
        numbers: Which prompts they are.
        sequences: The tokens of each answer, ``(n, n_new)``.
        scores: Of each step, ``(n, d_vocab)``.
    """

    numbers: Sequence[int]
    sequences: Tensor
    scores: Sequence[Tensor]


def gathered(
    model: Any, batches: Iterable[Answered], count: int, watch: Tensor | None, *, whole: bool = False
) -> Continuations:
    """Put answers of batches in the order of their prompts; ``watch`` and ``whole`` are ``continue_greedily``'s."""
    tokenizer = tokenizer_of(model)
    answers = [""] * count
    watched = torch.zeros(count, 0, dtype=torch.long) if watch is None else watch.cpu()
    first_tokens = torch.zeros(count, dtype=torch.long)
    first_logits = torch.zeros(watched.shape)
    for numbers, sequences, scores in batches:
        numbers = list(numbers)
        first_tokens[numbers] = sequences[:, 0].cpu()
        first_logits[numbers] = scores[0].float().cpu().gather(1, watched[numbers])
        texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        for index, text in zip(numbers, texts, strict=True):
            answers[index] = without_thinking(text).strip() if whole else first_sentence(text)
    return Continuations(answers, first_tokens, first_logits)


def _where_they_differ(combined: Combined, tokens: Sequence[Sequence[int]]) -> Combined:
    """The rule where a pair's prompts differ; where both are the same there is nothing to weigh."""
    count = len(tokens) // 2
    is_pair = torch.tensor([first != second for first, second in zip(tokens[:count], tokens[count:], strict=True)])
    return lambda first, second: torch.where(is_pair[:, None].to(first.device), combined(first, second), first)


def generated(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    rule: Combined | None = None,
    cache: Any = None,
    whole: bool = False,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Let the model go on until first sentences are complete.

    Args:
        model: The model, or a bridge around it.
        tokens: The ids of each prompt's tokens; with a rule those of the first prompts of all pairs, then the second.
        max_new_tokens: Longest answer, in tokens.
        rule: Chooses the next token of both prompts of each pair, where these differ; ``None`` takes the most
            probable one.
        cache: Keys and values of all tokens but the last; ``None`` reads the prompts.
        whole: Go on until the model ends by itself.

    Returns:
        The tokens of each answer, ``(n, n_new)``, and each step's scores, ``(n, d_vocab)``; ``n`` counts pairs, if any.
    """
    inputs = padded(model, tokens)
    prompt_length = inputs["input_ids"].shape[1]
    network: Any = transformers_model(model)
    # transformers derives position ids from the mask itself here
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {
        "past_key_values": cache,
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": padding_id(model),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    if not whole:
        options["stopping_criteria"] = StoppingCriteriaList([_AllAnswered(tokenizer_of(model), prompt_length)])
    with torch.inference_mode():
        if rule is None:
            output = network.generate(**prompts, **options)
        else:
            output = generate_pairs(network, prompts, _where_they_differ(rule, tokens), **options)
    return output.sequences[:, prompt_length:], output.scores


class AnswerStep(NamedTuple):
    """One token of a greedy answer.

    Attributes:
        token: Its text.
        probability: Of this token, given all before it.
        alternatives: The next most probable tokens and their probabilities, most probable first.
    """

    token: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]


def answer_steps(
    model: nn.Module, prompt: str, *, max_new_tokens: int = MAX_NEW_TOKENS, alternatives: int = 3
) -> list[AnswerStep]:
    """How a greedy answer comes about, token by token, until its first sentence is complete.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        prompt: The whole prompt.
        max_new_tokens: Longest answer, in tokens.
        alternatives: How many tokens that were not chosen to tell of at each step.
    """
    (batch,) = prompt_batches(model, [prompt], 1, new_tokens=max_new_tokens)
    sequences, logits = generated(model, batch.tokens, max_new_tokens)
    steps = []
    for token, scores in zip(sequences[0].tolist(), logits, strict=True):
        probabilities = scores[0].float().softmax(-1)
        others = probabilities.clone()
        others[token] = -1
        next_best = others.topk(alternatives)
        decoded = [tokenizer_of(model).decode([i]) for i in (token, *next_best.indices.tolist())]
        ranked = zip(decoded[1:], next_best.values.tolist(), strict=True)
        steps.append(AnswerStep(decoded[0], probabilities[token].item(), tuple(ranked)))
    return steps


def next_logits(
    model: nn.Module, prompts: Sequence[str], *, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[list[int], Tensor]]:
    """Read prompts to their ends: for each batch the numbers of its prompts and their next logits ``(n, d_vocab)``.

    Raises:
        UserError: If a prompt has no tokens, or more than the model has positions.
    """
    network: Any = transformers_model(model)
    for batch in prompt_batches(model, prompts, batch_size):
        with torch.inference_mode():
            yield batch.numbers, network(**padded(model, batch.tokens), logits_to_keep=1).logits[:, -1]


def gathered_logits(batches: Iterable[tuple[list[int], Tensor]], count: int) -> Tensor:
    """Logits of all batches in the order of their prompts, ``(count, d_vocab)`` float32."""
    rows: dict[int, Tensor] = {}
    for numbers, logits in batches:
        rows.update(zip(numbers, logits.float(), strict=True))
    return torch.stack([rows[i] for i in range(count)])
