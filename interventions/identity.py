"""Which model an intervention is for: its architecture and shape, a sample of its weights, and its tokenizer.

The sample tells the same model in another dtype from others of its shape: another checkpoint, or one of which a sampled
weight was changed by fine-tuning or by folding an edit in. Changes of other weights it does not see. It holds a few
numbers of the embedding and of three matrices of every block, and one of each head's output matrix, so that no head is
changed unseen. Their places are hashes of the matrices' names: a file needs no more than the values.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from interp.anatomy import BLUEPRINTS, UNSUPPORTED, Anatomy, Blueprint, unknown_architecture
from interp.errors import UserError

# Rounding to bfloat16 moves a number by 2^-9 of itself at most; float16 by 2^-25 where it has few digits left.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-24
_OF_EMBEDDING, _OF_MATRIX = 32, 2
_FEWEST_READABLE = 16
_WRITTEN = ("Paris", " the capital of France is", "1984 + 2.5%\n\n\tdef f(x):", "naïve Ærøskøbing", "東京 Москва 🙂")

Count = Annotated[int, Field(ge=1, le=2**20)]
Layer = Annotated[int, Field(ge=0, lt=2**12)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=1000)]
"""What errors and tables can show as it is: text without control characters."""


class Strict(BaseModel):
    """What is read from a file: nothing is converted, and nothing unknown is let through."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelIdentity(Strict):
    """Which model an intervention is for.

    Attributes:
        name: What the model was loaded by; for people, not checked.
        architecture: Class name of the transformers model.
        n_layers, n_heads, n_kv_heads, d_head, d_model, d_mlp, d_vocab: Its shapes; ``None`` is not known, in files of
            version 1.
        weights: The sample of its weights: numbers in float32, little-endian, in base64; NaN where a weight was
            quantised. ``None`` is not known.
        tokenizer: Hash of its tokenizer's vocabulary and of what it makes of some texts; ``None`` is not known.
    """

    name: Line
    architecture: Annotated[Line, Field(max_length=200)]
    n_layers: Annotated[int, Field(ge=1, lt=2**12)]
    n_heads: Count
    n_kv_heads: Count | None = None
    d_head: Count
    d_model: Count
    d_mlp: Count | None = None
    d_vocab: Annotated[int, Field(ge=1, le=2**26)] | None = None
    weights: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=2**20)] | None = None
    tokenizer: Digest | None = None

    @classmethod
    def of(cls, model: nn.Module, name: str, tokenizer: Any = None) -> ModelIdentity:
        """The identity of a loaded model.

        Args:
            model: A transformers model or a ``TransformerBridge``.
            name: What it was loaded by.
            tokenizer: Its tokenizer; ``None`` takes the one that it carries, if any.
        """
        anatomy = Anatomy(model)
        own = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        d_vocab = len(anatomy.sampled_weights()[0][1])
        return cls(
            name=name,
            architecture=anatomy.architecture,
            **{field: getattr(anatomy, field) for field in _SHAPES},
            d_vocab=d_vocab,
            weights=base64.b64encode(_sample(anatomy, d_vocab).astype("<f4").tobytes()).decode(),
            tokenizer=None if own is None else tokenizer_hash(own),
        )

    @property
    def is_known(self) -> bool:
        """Whether its architecture is; one that is proposed is known as soon as a model of it was loaded.

        Raises:
            UserError: If no such model can be taken apart.
        """
        if self.architecture in UNSUPPORTED:
            raise UserError(unknown_architecture(self.architecture))
        return self.architecture in BLUEPRINTS

    @property
    def blueprint(self) -> Blueprint:
        """What its architecture looks like.

        Raises:
            UserError: If the architecture is not known.
        """
        if self.architecture not in BLUEPRINTS:
            raise UserError(unknown_architecture(self.architecture))
        return BLUEPRINTS[self.architecture]

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Refuse another model; and another tokenizer, if one is given.

        Raises:
            UserError: If something differs; the message says what.
        """
        anatomy = Anatomy(model)
        for field in ("architecture", *_SHAPES):
            wanted, found = getattr(self, field), getattr(anatomy, field)
            if wanted is not None and wanted != found:
                raise UserError(
                    f"This intervention is for {self.name} ({field} {wanted}), but the model has {field} {found}; "
                    "load the model it was made for."
                )
        if self.weights is not None:
            self._check_weights(anatomy)
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse another tokenizer.

        Raises:
            UserError: If it makes other tokens, or has another vocabulary.
        """
        if self.tokenizer is not None and tokenizer_hash(tokenizer) != self.tokenizer:
            raise UserError(
                f"This intervention is for {self.name} with another tokenizer than the one given; use the tokenizer "
                "that belongs to the model."
            )

    def expected_weights(self) -> np.ndarray:
        """The sample, float32.

        Raises:
            UserError: If there is none, or it is not as long as a sample of this shape.
        """
        count = _OF_EMBEDDING + self.n_layers * (3 * _OF_MATRIX + self.n_heads)
        try:
            values = np.frombuffer(base64.b64decode(self.weights or "", validate=True), "<f4")
        except (binascii.Error, ValueError):
            values = np.zeros(0, "<f4")
        if len(values) != count or np.isinf(values).any() or self.d_vocab is None:
            raise UserError(
                f"The sample of weights of {self.name} is damaged: it should hold {count} numbers; make the "
                "intervention file again."
            )
        return values

    def _check_weights(self, anatomy: Anatomy) -> None:
        expected = self.expected_weights()
        found = _sample(anatomy, self.d_vocab or 0)
        readable = ~(np.isnan(expected) | np.isnan(found))
        if readable.sum() < _FEWEST_READABLE:
            raise UserError(
                f"The weights of this model cannot be read, so that it cannot be told whether it is {self.name}; load "
                "it without offloading."
            )
        expected, found = expected[readable], found[readable]
        differ = np.abs(expected - found) > _ABSOLUTE + _RELATIVE * np.maximum(np.abs(expected), np.abs(found))
        if differ.any():
            raise UserError(
                f"This intervention is for {self.name}, but {differ.sum()} of {len(found)} sampled weights differ: the "
                "model is another one of its shape, fine-tuned, or edited already; load the model it was made for."
            )


_SHAPES = ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp")


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and of what it makes of some texts, whatever its files look like."""
    encoded = [tokenizer(text)["input_ids"] for text in _WRITTEN]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), encoded], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _sample(anatomy: Anatomy, d_vocab: int) -> np.ndarray:
    """The sampled weights, float32; NaN where a weight has no plain numbers."""
    values = []
    for number, (name, weight) in enumerate(anatomy.sampled_weights()):
        # Query, value, output projection and the MLP's last map of every block follow each other.
        of_heads = number % 4 == 3
        count = anatomy.n_heads if of_heads else _OF_MATRIX if number else _OF_EMBEDDING
        # An embedding may have got rows for new tokens since; its first rows are what they were.
        size = max(weight.numel(), 1) if number else d_vocab * anatomy.d_model
        if not weight.is_floating_point() or weight.is_meta or weight.numel() < size or weight.element_size() < 2:
            values.append(torch.full((count,), math.nan))
            continue
        hashes = (hashlib.sha256(f"{name}/{i}".encode()).digest()[:8] for i in range(count))
        # Of a head the numbers are its own matrix's.
        size = size // count if of_heads else size
        places = torch.tensor([int.from_bytes(h, "big") % size for h in hashes], device=weight.device)
        if of_heads:
            # From a place in each head's matrix (d_head, d_model) to one in the weight.
            heads = torch.arange(count, device=weight.device)
            rows, columns = heads * anatomy.d_head + places // anatomy.d_model, places % anatomy.d_model
            width = anatomy.n_heads * anatomy.d_head
            places = rows * anatomy.d_model + columns if anatomy.transposed else columns * width + rows
        values.append(anatomy.weight_entries(name, weight, places))
    return torch.cat(values).numpy()
