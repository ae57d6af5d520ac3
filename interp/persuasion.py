"""Measure how far a context moves what a model answers, and how sure it is: DYNAMICQA's measures.

Answers are sampled to each prompt with its context and without. Two samples belong together if they say the same.

    coherent persuasion   a sample's distribution is the mean of its tokens' next-token distributions, a cluster's the
                          mean of its samples'; the score is the mean KL(with || without), nats, over all pairs of a
                          cluster with the context and one without (Marjanovic et al. 2024, arXiv 2407.17023)
    semantic entropy      -mean over clusters of log p(cluster), where a cluster's probability is the sum of its
                          samples', each the geometric mean of its tokens' (Kuhn et al. 2023, arXiv 2302.09664)
    confidence gain       entropy of the first token without the context, minus that with it, nats
    divergence            Jensen-Shannon divergence of these two distributions, nats
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from interp.anatomy import transformers_model
from interp.answers import abstains, contains_answer, first_sentence, normalise
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.inputs import check_lengths, padded, padding_id, token_ids, tokenizer_of
from interp.progress import tracked

SAMPLES, TEMPERATURE, NEW_TOKENS = 10, 0.5, 20
"""What DYNAMICQA's authors took."""

Same = Callable[[str, str], bool]
"""Says whether the first answer means no more than the second."""

_ABSTAINED = "\0abstained"


class Sampled(NamedTuple):
    """Answers that were sampled to one prompt.

    Attributes:
        answers: The first sentence of each.
        distributions: For each the mean of its tokens' next-token distributions, ``(n_samples, d_vocab)``.
        log_likelihoods: For each the mean log probability of its tokens, ``(n_samples,)``.
        first: The distribution of the first token, ``(d_vocab,)``.
    """

    answers: list[str]
    distributions: Tensor
    log_likelihoods: Tensor
    first: Tensor


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        samples: How many to a prompt.
        temperature: Of the sampling; probabilities are measured without it.
        new_tokens: Longest answer, in tokens.
        seed: Of the sampling; a prompt's samples do not depend on other prompts.
    """

    samples: int = SAMPLES
    temperature: float = TEMPERATURE
    new_tokens: int = NEW_TOKENS
    seed: int = 0

    def sampled(self, model: nn.Module, prompt: str) -> Sampled:
        """Sample answers to a prompt.

        Raises:
            UserError: If it has no tokens, or is too long.
        """
        tokens = token_ids(tokenizer_of(model), [prompt])
        check_lengths(model, tokens, new_tokens=self.new_tokens)
        inputs = padded(model, tokens * self.samples)
        network: Any = transformers_model(model)
        key = hashlib.sha256(f"{self.seed}/{prompt}".encode()).digest()
        devices = [inputs["input_ids"].device] if inputs["input_ids"].device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(key[:7], "big"))
            output = network.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=padding_id(model),
                return_dict_in_generate=True,
                output_logits=True,
            )
        said = output.sequences[:, inputs["input_ids"].shape[1] :]
        log_p = torch.stack(output.logits, 1).float().log_softmax(-1).cpu()
        return _summed_up(model, said.cpu(), log_p)


def _summed_up(model: nn.Module, said: Tensor, log_p: Tensor) -> Sampled:
    """Samples of tokens ``(n, n_new)`` and log probabilities ``(n, n_new, d_vocab)``; ends count, padding not."""
    network: Any = transformers_model(model)
    ends = network.generation_config.eos_token_id
    is_end = torch.isin(said, torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends]))
    counts = (is_end.cumsum(-1) - is_end.long() == 0).float()
    length = counts.sum(-1, keepdim=True)
    chosen = log_p.gather(-1, said[..., None]).squeeze(-1)
    texts = tokenizer_of(model).batch_decode(said, skip_special_tokens=True)
    return Sampled(
        answers=[first_sentence(text) for text in texts],
        distributions=(log_p.exp() * counts[..., None]).sum(1) / length,
        log_likelihoods=(chosen * counts).sum(-1) / length.squeeze(-1),
        first=log_p[0, 0].exp(),
    )


def clustered(answers: Sequence[str], known: Sequence[Sequence[str]] = (), same: Same | None = None) -> list[list[int]]:
    """Numbers of the answers that belong together.

    Args:
        answers: The answers.
        known: Answers with their aliases: what names one of these, and none of the others, says that.
        same: Says whether one answer means no more than another; two that do so both ways belong together. ``None``
            compares texts: a known answer, an abstention, else the same words.
    """
    groups: list[list[int]] = []
    if same is None:
        by_meaning: dict[str, list[int]] = {}
        for number, answer in enumerate(answers):
            by_meaning.setdefault(_meaning(answer, known), []).append(number)
        return list(by_meaning.values())
    for number, answer in enumerate(answers):
        group = next((g for g in groups if all(same(answer, answers[i]) and same(answers[i], answer) for i in g)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups


def _meaning(answer: str, known: Sequence[Sequence[str]]) -> str:
    named = [aliases[0] for aliases in known if aliases and contains_answer(answer, aliases)]
    if len(named) == 1:
        return normalise(named[0])
    return _ABSTAINED if abstains(answer) else normalise(answer)


def coherent_persuasion(
    with_context: Sampled,
    without: Sampled,
    clusters_with: Sequence[Sequence[int]],
    clusters_without: Sequence[Sequence[int]],
) -> float:
    """The mean KL divergence between every cluster with the context and every one without, nats."""
    p = torch.stack([with_context.distributions[list(group)].mean(0) for group in clusters_with]).double()
    q = torch.stack([without.distributions[list(group)].mean(0) for group in clusters_without]).double()
    # What has no probability with the context adds nothing.
    own = torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)
    crossed = p @ q.clamp(min=1e-300).log().T
    return float((own[:, None] - crossed).mean())


def semantic_entropy(sampled: Sampled, clusters: Sequence[Sequence[int]]) -> float:
    """How spread a model's answers are over meanings, nats."""
    log_p = sampled.log_likelihoods.double()
    return -sum(float(log_p[list(group)].logsumexp(0)) for group in clusters) / len(clusters)


def persuasion(
    model: nn.Module,
    conflicts: ConflictSet,
    sampling: Sampling | None = None,
    *,
    same: Same | None = None,
    progress: str | None = None,
) -> pl.DataFrame:
    """Measure each prompt with a context against the same one without.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        conflicts: The prompts; those without a context, or without a bare prompt, are not measured themselves.
        sampling: How answers are sampled.
        same: Tells which answers belong together; see ``clustered``.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        A row a prompt: ``id, subject, relation, template, kind``, ``coherent_persuasion``, ``semantic_entropy`` (with
        the context), ``semantic_entropy_without``, ``confidence_gain``, ``divergence``, ``clusters`` and
        ``clusters_without`` (how many meanings), ``answers`` and ``answers_without``.

    Raises:
        UserError: If there is nothing to measure.
    """
    sampling = sampling or Sampling()
    measured = [e for e in conflicts if e.contexts and e.bare_prompt]
    if not measured:
        raise UserError(f"{conflicts.name} has no prompt with a context that can be asked without it; give other data.")
    bare: dict[str, Sampled] = {}
    rows = []
    for example in tracked(measured, progress):
        if example.bare_prompt not in bare:
            bare[example.bare_prompt] = sampling.sampled(model, example.bare_prompt)
        rows.append(_row(example, sampling.sampled(model, example.prompt), bare[example.bare_prompt], same))
    return pl.DataFrame(rows)


def _row(example: ConflictExample, with_context: Sampled, without: Sampled, same: Same | None) -> dict[str, Any]:
    known = (example.memory_answers, () if example.kind == "aligned" else example.context_answers)
    one, other = (clustered(sampled.answers, known, same) for sampled in (with_context, without))
    gain = _entropy(without.first) - _entropy(with_context.first)
    mean = (with_context.first + without.first) / 2
    return {
        **{name: getattr(example, name) for name in ("id", "subject", "relation", "template", "kind")},
        "coherent_persuasion": coherent_persuasion(with_context, without, one, other),
        "semantic_entropy": semantic_entropy(with_context, one),
        "semantic_entropy_without": semantic_entropy(without, other),
        "confidence_gain": gain,
        "divergence": _entropy(mean) - (_entropy(with_context.first) + _entropy(without.first)) / 2,
        "clusters": len(one),
        "clusters_without": len(other),
        "answers": with_context.answers,
        "answers_without": without.answers,
    }


def _entropy(p: Tensor) -> float:
    """The entropy of a distribution, nats."""
    p = p.double()
    return max(0.0, -float(torch.where(p > 0, p * p.clamp(min=math.ulp(0.0)).log(), 0.0).sum()))
