"""Text to train on where nothing can be downloaded: sampled from the model itself, with a seed.

Half of the texts start from nothing but the model's first token, the other half from the name of a subject of the
fact tables, so that what the model says about such subjects is well represented.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.anatomy import transformers_model
from interp.conflicts import Split, split_of
from interp.errors import UserError
from interp.facts import relations, usable_facts
from interp.files import read_json, write_json
from interp.fingerprints import fingerprint
from interp.inputs import check_lengths, padded, padding_id, token_ids, tokenizer_of
from interp.progress import tracked

NEW_TOKENS = 96
TEMPERATURE = 0.8
TEXTS_VERSION = 1
"""Version of how texts are sampled: raise it when the same arguments would give others."""

_BATCH_SIZE = 128


def sampled_texts(
    model: nn.Module,
    count: int,
    folder: Path,
    *,
    split: Split,
    seed: int,
    new_tokens: int = NEW_TOKENS,
    batch_size: int | None = None,
    progress: str | None = None,
) -> list[str]:
    """Texts that the model writes when nobody asks, sampled at temperature 0.8.

    Each batch has a seed of its own and is kept below ``folder``, in a place that belongs to the model and the other
    arguments: a repeated call goes on where it stopped, and the first texts are the same whatever the ``count``.

    Args:
        model: The model, or a bridge around it.
        count: How many texts.
        folder: Below it batches are kept.
        split: The texts that start from a subject's name start from subjects of this split.
        seed: Decides the split, the subjects and the texts.
        new_tokens: Sampled tokens of each text; a text does not stop before.
        batch_size: Texts that are sampled at once, and kept, however many are wanted of the last of them.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If the model's tokenizer has no special token that a text can start with.
    """
    starts = _starts(model, split, seed)
    size = batch_size or _BATCH_SIZE
    decided_by = [TEXTS_VERSION, fingerprint(model), split, seed, new_tokens, TEMPERATURE, size]
    place = folder / f"{split}-{hashlib.sha256(json.dumps(decided_by).encode()).hexdigest()[:12]}"
    batches: list[list[str]] = []
    for number in tracked(range(-(-count // size)), progress):
        path = place / f"{number:05d}.json"
        if not path.exists():
            chosen = list(itertools.islice(itertools.cycle(starts), number * size, (number + 1) * size))
            write_json(path, _sampled(model, chosen, new_tokens, hash_seed(seed, split, number)))
        batches.append(read_json(path))
    return list(itertools.chain.from_iterable(batches))[:count]


def hash_seed(*parts: object) -> int:
    """A seed for torch that depends on all of ``parts``."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def _starts(model: nn.Module, split: Split, seed: int) -> list[str]:
    """Alternately the model's first token and a subject's name, in a random order of subjects."""
    tokenizer = tokenizer_of(model)
    first = tokenizer.bos_token or tokenizer.eos_token
    if first is None:
        raise UserError("The model's tokenizer has neither a first nor a last token to start texts with; give texts.")
    subjects = sorted({fact.subject for relation in relations() for fact in usable_facts(relation)})
    subjects = [subject for subject in subjects if split_of(subject, seed) == split]
    random.Random(hash_seed(seed, split)).shuffle(subjects)
    return [start for subject in subjects for start in (first, subject)]


def _sampled(model: nn.Module, starts: Sequence[str], new_tokens: int, seed: int) -> list[str]:
    tokenizer = tokenizer_of(model)
    tokens = token_ids(tokenizer, starts)
    check_lengths(model, tokens, new_tokens=new_tokens)
    inputs = padded(model, tokens)
    network: Any = transformers_model(model)
    device = inputs["input_ids"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.inference_mode():
            sequences = network.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                max_new_tokens=new_tokens,
                # One text after another, as in the training of the model, until there are enough tokens.
                eos_token_id=[],
                pad_token_id=padding_id(model),
            )
    length = inputs["input_ids"].shape[1]
    new = tokenizer.batch_decode(sequences[:, length:])
    return [start + text for start, text in zip(starts, new, strict=True)]
