"""Read checkpoints in the forms that people have them: plain, quantised, GGUF, vision-language, adapters.

A model counts as loaded only when every weight of it was in the checkpoint: that is checked on every load.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from interp.anatomy import BLUEPRINTS, UNSUPPORTED, unknown_architecture
from interp.errors import Caution, UserError
from interp.files import read_json
from interp.quiet import quiet_transformers

ADAPTER = "adapter_config.json"
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AssertionError, ImportError, SafetensorError)
# What wrapping a model puts into the names of its weights, and how to save it without.
_WRAPPERS = {
    "_orig_mod.": "torch.compile puts there; save the model inside, model._orig_mod",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel puts there; save its full state dict",
    "module.": "data parallel training puts there; save the model inside, model.module",
    "base_model.model.": "PEFT puts there; merge the adapter with merge_and_unload() and save what that returns",
    "base_layer.": "PEFT puts there; merge the adapter with merge_and_unload() and save what that returns",
    "language_model.": "a vision-language model has there, and its config.json names the text model alone; give the "
    "config.json of the whole",
}


def read_model(name: str, source: str | Path, config: Any, device: torch.device, **options: Any) -> Any:
    """Read a model with all of its weights, on a device or where a ``device_map`` puts it.

    Args:
        name: What people call it.
        source: Directory or hub id.
        config: Its configuration; ``None`` is not known, and nothing unusual.
        device: The device, where ``options`` have no ``device_map``.
        options: What ``from_pretrained`` takes besides.

    Returns:
        A transformers causal language model: of a vision-language checkpoint its text model; of a GGUF file one with
        plain weights.

    Raises:
        UserError: If a weight was not in the checkpoint, or the text model of a checkpoint is none by itself.
    """
    is_whole = config is not None and is_multimodal(config)
    text_class = _text_class(config) if is_whole else None
    # Such models are put together where they are to be.
    if getattr(config, "quantization_config", None) is not None and "gguf_file" not in options:
        options = {"device_map": {"": device}} | options
    network = _read(name, source, is_whole=is_whole, **options)
    if "gguf_file" in options:
        # The weights are plain now; left in place, this would make transformers refuse to save them.
        del network.config.quantization_config
        network.hf_quantizer = None
        network.is_quantized = False
    if text_class is not None:
        network = _text_model(network, text_class)
    return network if "device_map" in options else network.to(device)


def is_multimodal(config: Any) -> bool:
    """Whether a checkpoint with this configuration holds a text model among others."""
    return getattr(config, "text_config", None) is not None and not any(
        name in BLUEPRINTS for name in config.architectures or ()
    )


def check_architecture(config: Any) -> None:
    """Refuse an architecture that cannot be taken apart before its weights are read.

    Raises:
        UserError: If it is one.
    """
    names = [_text_class(config).__name__] if is_multimodal(config) else config.architectures or ()
    for name in names:
        if name in UNSUPPORTED:
            raise UserError(unknown_architecture(name))


def base_of(adapter: str | Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter's ``adapter_config.json`` says it is for.

    Raises:
        UserError: If it names none, or itself.
    """
    record = read_json(adapter)
    base = record.get("base_model_name_or_path") if isinstance(record, dict) else None
    if not isinstance(base, str) or not base or Path(base).resolve() == Path(adapter).resolve().parent:
        raise UserError(
            f"{adapter} does not name the model that the adapter is for; write its path or id there as "
            "base_model_name_or_path."
        )
    return base, record.get("revision")


def add_adapter(network: Any, source: str, name: str, *, merged: bool, **options: Any) -> Any:
    """Put an adapter's modules into a model, or add what they do to its weights.

    Args:
        network: The transformers model, which is changed.
        source: The adapter's directory or hub id.
        name: What people call it.
        merged: Add to the weights.
        options: Where to find it: what PEFT's ``from_pretrained`` takes besides.

    Raises:
        UserError: If PEFT is not installed, the adapter puts tokens before prompts, or its weights and the places for
            them are not the same, or it cannot be merged.
    """
    try:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise UserError(f"{name} is an adapter; install PEFT with: pip install 'conflictscope[adapters]'") from error
    with warnings.catch_warnings():
        # That the base was named otherwise where the adapter was made.
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(source, **options)
        if config.is_prompt_learning:
            raise UserError(
                f"The adapter {name} puts tokens of its own before each prompt, which no part of the model shows; give "
                "an adapter of its weights such as LoRA."
            )
        config.inference_mode = True
        try:
            wrapped = get_peft_model(network, config)
        except ValueError as error:
            raise UserError(
                f"The adapter {name} does not fit its model: {error}; give the model that it was trained on."
            ) from error
        weights = load_peft_weights(source, device="cpu", **options)
        places = get_peft_model_state_dict(wrapped)
        if missing := sorted(places.keys() - weights.keys()):
            raise UserError(f"Weights of the adapter {name} did not load: it lacks {listed(missing)}; save it again.")
        if shapes := [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(places[key].shape)}"
            for key in sorted(places)
            # PEFT keeps some of them flat.
            if weights[key].numel() != places[key].numel()
        ]:
            raise UserError(
                f"The adapter {name} is for a model of another shape: it has {listed(shapes)}; give the model that it "
                "was trained on as base_model_name_or_path."
            )
        if unexpected := sorted(weights.keys() - places.keys()):
            raise UserError(
                f"The adapter {name} has weights that its model has no place for: {listed(unexpected)}; give the model "
                "that it was trained on as base_model_name_or_path."
            )
        set_peft_model_state_dict(wrapped, weights)
        if not merged:
            return wrapped.get_base_model()
        try:
            return wrapped.merge_and_unload()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"The adapter {name} cannot be merged into the weights ({error}); apply edits while its model runs."
            ) from error


def _text_class(config: Any) -> Any:
    """The class of a vision-language model's text model."""
    from transformers import AutoModelForCausalLM

    text, whole = type(config.get_text_config()), (config.architectures or ["This model"])[0]
    found: Any = AutoModelForCausalLM._model_mapping.get(text, None)
    if found is None or found.__name__ == whole:
        raise UserError(
            f"{whole} is a vision-language model whose text model ({text.__name__.removesuffix('Config')}) is no "
            "causal language model by itself in transformers; choose another one."
        )
    return found


def _text_model(whole: Any, text_class: Any) -> Any:
    """The text model inside a vision-language model, with its weights."""
    config, body = whole.config.get_text_config(), whole.get_decoder()
    with torch.device("meta"):
        text = text_class(config)
    prefix = text.base_model_prefix
    if type(body) is not type(getattr(text, prefix)):
        raise UserError(
            f"The text model inside {type(whole).__name__} is a {type(body).__name__}, not that of "
            f"{text_class.__name__}; choose another one."
        )
    setattr(text, prefix, body)
    text.set_output_embeddings(whole.get_output_embeddings())
    text.generation_config = whole.generation_config
    config._name_or_path, config.architectures = whole.config._name_or_path, [text_class.__name__]
    config.tie_word_embeddings = text.config.tie_word_embeddings = whole.config.tie_word_embeddings
    text.is_quantized = getattr(whole, "is_quantized", False)
    return text.eval()


def _read(name: str, source: str | Path, *, is_whole: bool, **options: Any) -> Any:
    """The transformers model of a checkpoint, which has all of its weights; others are named in a ``Caution``."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Transformers would not name the weights of another shape.
        loaded: Any = loader.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    network, found = loaded
    _check_weights(name, network, found)
    return network


def _check_weights(name: str, network: Any, found: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = [f"{key} {tuple(theirs)} instead of {tuple(ours)}" for key, theirs, ours in found["mismatched_keys"]]
    if missing or shapes:
        what = [f"the checkpoint lacks {listed(missing)}"] if missing else []
        what += [f"it has another shape of {listed(sorted(shapes))}"] if shapes else []
        way_out = _way_out(network, missing, unexpected)
        raise UserError(f"Weights of the model {name!r} did not load: {', and '.join(what)}; {way_out}.")
    if unexpected:
        warnings.warn(
            Caution(
                f"The checkpoint of {name!r} has weights that {type(network).__name__} has no place for, and they were "
                f"left out: {listed(unexpected)}; check that its config.json names the architecture they are from."
            ),
            stacklevel=6,
        )


def _way_out(network: Any, missing: list[str], unexpected: list[str]) -> str:
    def unwrapped(key: str) -> str:
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        return key

    places = {*missing, *(key.removeprefix(f"{network.base_model_prefix}.") for key in missing)}
    theirs = [key for key in unexpected if unwrapped(key) in places]
    for wrapper, how in _WRAPPERS.items():
        if carrying := sum(wrapper in key for key in theirs):
            return f"{carrying} of its names carry {wrapper!r}, which {how}"
    if unexpected:
        return f"it has other names instead, {listed(unexpected)}; give a checkpoint of this architecture"
    return "download or save it again, with the config.json that belongs to it"


def listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
