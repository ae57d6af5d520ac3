"""Turn texts into what a model reads: every text that is given to a model passes through here.

- A text has the special tokens that the tokenizer puts before it, once: also where the text begins with them itself, as
  chat templates do. Nothing follows its last token, whatever the tokenizer would append: there the model goes on.
- An answer joins its prompt as text does: after a space or a line break, an opening quote or bracket, a script without
  spaces, or a special token (the header of a chat's next turn) at once, else after a space.
- A text that is longer than the model's positions is refused before anything runs.
- Rows of a batch are padded on the left, with an attention mask and the position ids that go with it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from interp.anatomy import transformers_model
from interp.errors import UserError
from interp.linear_maps import device_of
from interp.scripts import is_unspaced

BATCH_TOKENS = 8192
"""Tokens that are run together at most, padding included, where a model's ``batch_tokens`` does not say otherwise."""

INPUTS_VERSION = 1
"""Version of how texts become tokens: raise it when the same texts and answers would get others."""

# What a pass takes besides its tokens, in tokens: reading the weights, starting kernels. As SmolLM2-135M took it on two
# cores; other devices work on many tokens in the time in which they are told to.
_A_PASS = {"cpu": 100}
_A_PASS_ELSEWHERE = 1000
# What opens something where nothing but a space or an opening bracket stands before it; elsewhere it closes something.
_OPENS = re.compile(
    r"(?:^|[\s(\[{<\u2014]|[=:](?![*_]))(?:[\"'`#@]|\*\*|__|[\u2018\u2019\u201c\u201d\u00ab\u00bb\u2039\u203a])+$"
)
# What else goes on at once: an opening tag, a mark of emphasis, a word that is cut short, a hyphen or slash in a word.
_GOES_ON = re.compile(
    r"(?:<[A-Za-z][^<>/]*>|(?:^|[\s:(])[*_]|[\u00bf\u00a1]|\b(?:[cdjlmnst]|qu)['\u2019]|[^\W_][-/]|//)$", re.IGNORECASE
)
_AFTER_NUMBER = re.compile(r"\d\s*.$")


class Spans(NamedTuple):
    """A text's tokens and where they stand in it.

    Attributes:
        ids: Token ids.
        spans: For each its first character and the one after its last; ``(0, 0)`` for tokens that are put before.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that a model carries.

    Args:
        model: The model, or a bridge around it.

    Raises:
        UserError: If it carries none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise UserError(
            "The model carries no tokenizer; load it with interp.models.load_model, or set model.tokenizer to the one "
            "that belongs to it."
        )
    return tokenizer


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text's tokens as a model reads them, with what belongs before the text, once.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Texts.
    """
    if not texts:
        return []
    before = _put_before(tokenizer)
    return [_begun(ids, before) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def token_spans(tokenizer: Any, text: str) -> Spans:
    """Like ``token_ids``, with the characters that each token covers."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = _begun(found["input_ids"], _put_before(tokenizer))
    return Spans(ids, [(0, 0)] * (len(ids) - len(found["input_ids"])) + [*found["offset_mapping"]])


def _put_before(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    alone, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(alone) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(alone)] == alone), [])


def _begun(ids: list[int], before: list[int]) -> list[int]:
    return ids if ids[: len(before)] == before else [*before, *ids]


class Batch(NamedTuple):
    """Prompts that run together.

    Attributes:
        numbers: Which prompts they are.
        tokens: The ids of each one's tokens.
    """

    numbers: list[int]
    tokens: list[list[int]]


def prompt_batches(
    model: Any, prompts: Sequence[str], batch_size: int, *, new_tokens: int = 0, most_tokens: int | None = None
) -> list[Batch]:
    """Prompts in batches of similar length, longest first.

    Args:
        model: The model, or a bridge around it.
        prompts: Full prompts.
        batch_size: Prompts per batch.
        new_tokens: How many tokens are to follow each.
        most_tokens: Tokens per batch, those that are to follow and padding included, that no batch of several prompts
            exceeds; more than the model's ``batch_tokens`` are never taken.

    Raises:
        UserError: If a prompt has no tokens, or it and what follows is longer than the model's positions.
    """
    tokens = token_ids(tokenizer_of(model), prompts)
    check_lengths(model, tokens, new_tokens=new_tokens)
    bound = batch_tokens_of(model)
    bound = bound if most_tokens is None else min(bound, most_tokens)
    lengths = {i: len(ids) + new_tokens for i, ids in enumerate(tokens)}
    batches = together(lengths, batch_size, bound, pass_tokens(model))
    return [Batch(rows, [tokens[i] for i in rows]) for rows in batches]


def batch_tokens_of(model: Any) -> int:
    """How many tokens are run together at most, padding included; a longer prompt runs alone."""
    return getattr(transformers_model(model), "batch_tokens", BATCH_TOKENS)


def pass_tokens(model: nn.Module) -> int:
    """How many tokens take as long as a forward pass takes besides its tokens."""
    network: Any = transformers_model(model)
    return _A_PASS.get(device_of(network.get_input_embeddings()).type, _A_PASS_ELSEWHERE)


def together(lengths: Mapping[int, int], most_rows: int, most_tokens: int, a_pass: int) -> list[list[int]]:
    """Numbers of rows of similar length, longest first, that run together, such that all take the least time.

    Padding takes as long as other tokens do, and so does each pass as ``a_pass`` of them.

    Args:
        lengths: For each number how many tokens it has.
        most_rows: Rows that run together at most.
        most_tokens: Tokens that run together at most, padding included; a longer row runs alone.
        a_pass: How many tokens take as long as a pass takes besides.
    """
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    # Of the rows from each on: how long they take, and how many of them run together first.
    least, first = np.zeros(len(order) + 1), [0] * len(order)
    for start in reversed(range(len(order))):
        longest = max(lengths[order[start]], 1)
        most = min(most_rows, max(most_tokens // longest, 1), len(order) - start)
        takes = least[start + 1 : start + most + 1] + longest * np.arange(1, most + 1) + a_pass
        # Of several that take the same, the most rows.
        first[start] = most - int(takes[::-1].argmin())
        least[start] = takes[first[start] - 1]
    batches, start = [], 0
    while start < len(order):
        batches.append(order[start : start + first[start]])
        start += first[start]
    return batches


def check_lengths(
    model: Any, tokens: Sequence[Sequence[int]], *, new_tokens: int = 0, numbers: Sequence[int] | None = None
) -> None:
    """Refuse prompts without tokens, and those that do not fit into a model.

    Args:
        model: The model, or a bridge around it.
        tokens: The ids of each prompt's tokens.
        new_tokens: How many are to follow.
        numbers: What the prompts' numbers are, for the message; ``None`` counts from 0.

    Raises:
        UserError: For the first empty prompt, else the longest one if it does not fit; the message has both counts.
    """
    if not tokens:
        return
    lengths = [len(ids) for ids in tokens]
    shortest, longest = min(lengths), max(lengths)
    extreme = lengths.index(longest if shortest else 0)
    number = extreme if numbers is None else numbers[extreme]
    if not shortest:
        raise UserError(f"Prompt {number} has no tokens; leave out empty prompts.")
    positions = most_positions(model)
    if positions is not None and longest + new_tokens > positions:
        follows = f" and {new_tokens} are to follow" if new_tokens else ""
        raise UserError(
            f"Prompt {number} has {longest} tokens{follows}, but the model has {positions} positions; shorten it or "
            "leave it out."
        )


def most_positions(model: Any) -> int | None:
    """How many tokens a model can read; ``None`` where its configuration names no limit."""
    return getattr(transformers_model(model).config, "max_position_embeddings", None)


def padded(model: Any, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Left-padded model inputs on the model's device.

    Args:
        model: The model, or a bridge around it.
        tokens: The ids of each row's tokens.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids``, each ``(n_rows, n_tokens)``.
    """
    network: Any = transformers_model(model)
    device = device_of(network.get_input_embeddings())
    width = max(map(len, tokens), default=0)
    pad = padding_id(model)
    ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in tokens], dtype=torch.long, device=device)
    missing = torch.tensor([width - len(row) for row in tokens], device=device)
    mask = (torch.arange(width, device=device) >= missing[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def padding_id(model: Any) -> int:
    """A token for places that hold none: the tokenizer's padding if the model embeds it, else an end, else 0."""
    network: Any = transformers_model(model)
    tokenizer: Any = getattr(model, "tokenizer", None)
    ends = network.generation_config.eos_token_id
    candidates = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    candidates += ends if isinstance(ends, list) else [ends]
    n_embedded = network.get_input_embeddings().weight.shape[0]
    return next((i for i in candidates if i is not None and 0 <= i < n_embedded), 0)


def encode(model: nn.Module, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Left-padded model inputs of a few prompts on the model's device; see ``padded``.

    Raises:
        UserError: If a prompt has no tokens or is longer than the model's positions.
    """
    tokens = token_ids(tokenizer_of(model), prompts)
    check_lengths(model, tokens)
    return padded(model, tokens)


def continuation_ids(model: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt's tokens, and those of the tokens with which ``answer`` continues it."""
    before, after = _continued(tokenizer_of(model), prompt, answer)
    return [*before], [*after]


def first_token_id(model: Any, prompt: str, answer: str) -> int:
    """The id of the first token with which ``answer`` continues ``prompt``."""
    return _continued(tokenizer_of(model), prompt, answer)[1][0]


def joined(tokenizer: Any, prompt: str, answer: str) -> str:
    """A prompt and the answer that continues it, as one text."""
    at_once = joins_at_once(prompt) or answer[:1].isspace() or _ends_in_control(tokenizer, prompt)
    return prompt + answer if at_once else f"{prompt} {answer}"


def joins_at_once(prompt: str) -> bool:
    """Whether what continues a text follows its last character without a space."""
    if not prompt or prompt[-1].isspace() or is_unspaced(prompt[-1]):
        return True
    last = unicodedata.category(prompt[-1])
    if last == "Ps" or (last == "Sc" and not _AFTER_NUMBER.search(prompt)):
        return True
    line = prompt.rpartition("\n")[2]
    if prompt[-1] == '"':
        return line.count('"') % 2 == 1
    if _OPENS.search(line) or _GOES_ON.search(line):
        return True
    # Punctuation that a script without spaces shares with others.
    letters = (character for character in reversed(line) if character.isalnum())
    return not prompt[-1].isalnum() and is_unspaced(next(letters, " "))


# The same prompts are continued for every candidate that is compared.
@lru_cache(maxsize=2**16)
def _continued(tokenizer: Any, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    whole_text = joined(tokenizer, prompt, answer)
    before, whole = token_ids(tokenizer, [prompt, whole_text])
    if whole[: len(before)] == before and len(whole) > len(before):
        return tuple(before), tuple(whole[len(before) :])
    # The tokenizer merges across the border, which a model that writes token by token does not.
    return tuple(before), tuple(_inside_text(tokenizer, whole_text[len(prompt) :]))


def _inside_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece of text that does not begin one; alone, some tokenizers would put a space before it."""
    for anchor in ("\n", "a"):
        head, both = tokenizer([anchor, anchor + text], add_special_tokens=False)["input_ids"]
        if both[: len(head)] == head and len(both) > len(head):
            return both[len(head) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ends_in_control(tokenizer: Any, prompt: str) -> bool:
    """Whether a text's last token is one that was added to the vocabulary, as control tokens are."""
    return prompt.endswith(_added_tokens(tokenizer, len(tokenizer)))


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: Any, _: int) -> tuple[str, ...]:
    """The texts of the tokens that were added to a vocabulary of this size."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    # Words that were added for a domain are words.
    return tuple(text for text in added if text and not text[-1].isalnum())
