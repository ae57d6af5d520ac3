"""Tell models apart by what they compute: one hash of configuration, dtype and weights."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from interp.anatomy import named_weights, transformers_model
from interp.linear_maps import offloaded_weights

_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], str]] = weakref.WeakKeyDictionary()
_SAMPLED = 1024
# What changes what PEFT's modules do, and is no weight.
_OF_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
# Of a configuration, what changes no number that the model computes.
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "output_attentions"}


def fingerprint(model: nn.Module) -> str:
    """A hash of configuration, dtype and every weight: models with the same fingerprint compute the same.

    A model, a copy of it and a bridge around it have the same one. The weights are read once for each loaded model, and
    again when they were replaced or written to. What is written through ``.data``, which PyTorch does not count, is
    seen where it changes one of a thousand numbers of a weight.
    """
    network: Any = transformers_model(model)
    config = {key: value for key, value in network.config.to_diff_dict().items() if key not in _NOT_COMPUTED_WITH}
    adapters = _adapters(network)
    about = json.dumps([config, *adapters] if adapters else config, sort_keys=True, default=str)
    held = sorted(named_weights(network).items())
    weights = {name: part for whole, weight in held for name, part in _parts(whole, weight)}
    # What lies elsewhere is a tensor of its own each time it is looked at.
    places = [_written_state(weight) for weight in weights.values() if not weight.is_meta]
    weights |= offloaded_weights(network)
    state = (about, *places, _sampled(list(weights.values())))
    kept = _FINGERPRINTS.get(network)
    if kept is None or kept[0] != state:
        kept = _FINGERPRINTS[network] = (state, _weights_hash(about, weights))
    return kept[1]


def _adapters(network: nn.Module) -> list[Any]:
    """How far each of the modules that adapters put into a model acts."""
    return [
        (
            name,
            *(getattr(module, about, None) for about in _OF_ADAPTERS),
        )
        for name, module in network.named_modules()
        if type(module).__module__.startswith("peft.")
    ]


def _parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a weight is made of: of a quantised one its numbers and their scales."""
    if is_traceable_wrapper_subclass(weight):
        for part in weight.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(weight, part))
        return
    yield name, weight
    # Where bitsandbytes keeps the scales of a weight.
    for scales in (getattr(getattr(weight, "quant_state", None), "absmax", None), getattr(weight, "SCB", None)):
        if scales is not None:
            yield f"{name}.scales", scales


def _weights_hash(about: str, weights: Mapping[str, Tensor]) -> str:
    # A bridge gives the unembedding a bias of zeros, which is none.
    weights = {name: weight for name, weight in weights.items() if not name.endswith("bias") or weight.any()}
    # Tied weights are one tensor under several names, and are read once. Hashing lets other threads run.
    distinct = {(w.device, w.data_ptr(), w.shape, w.stride()): w for w in weights.values()}
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(distinct, pool.map(_numbers_hash, distinct.values()), strict=True))
    digest = hashlib.sha256(about.encode())
    for name, w in weights.items():
        numbers = hashes[w.device, w.data_ptr(), w.shape, w.stride()]
        digest.update(f"{name}{tuple(w.shape)}{w.dtype}{numbers}".encode())
    return digest.hexdigest()


def _numbers_hash(weight: Tensor) -> str:
    numbers = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(numbers.data).hexdigest()


def _written_state(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight is replaced or written to."""
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.dtype, weight.device


def _sampled(weights: Sequence[Tensor]) -> bytes:
    """Numbers of each weight, from all over it; on an accelerator they are fetched together."""
    # Multiples of a large prime: a fixed step would stay in the same columns.
    steps = torch.arange(_SAMPLED) * 2_147_483_647
    parts = [w.detach().flatten()[(steps % w.numel()).to(w.device)].float() for w in weights if w.numel()]
    return torch.cat([part.to(weights[0].device) for part in parts]).cpu().numpy().tobytes()
