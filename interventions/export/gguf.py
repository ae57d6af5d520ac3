"""Read and write what llama.cpp keeps in GGUF files.

A GGUF file is a header, metadata by key, descriptions of tensors, and the tensors' numbers. The reader here trusts none
of the lengths and places that a file claims: it reads no further than the file goes.

llama.cpp multiplies what a LoRA adapter adds by its alpha over the rank of each tensor, times the scale that it is
loaded with or a request asks for. Where alpha is 0, it leaves out the first factor, and the adapter goes all the way.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError

# Where llama.cpp calls an architecture otherwise than transformers calls the type of its models.
_OTHER_NAMES = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "llama4_text": "llama4",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}

# Of types of metadata by their numbers: how struct reads them.
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_FLOAT32 = 0
_VERSIONS = (2, 3)


class Gguf(NamedTuple):
    """What a GGUF file says.

    Attributes:
        metadata: By key; lists are left out.
        tensors: By name; those that are not float32 are ``None``.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor | None]


def architecture_name(model: nn.Module) -> str:
    """What llama.cpp calls the architecture of a transformers model or a ``TransformerBridge``."""
    network: Any = transformers_model(model)
    kind: str = network.config.model_type
    return _OTHER_NAMES.get(kind, kind)


def write_gguf_adapter(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], path: Path, *, share: float = 1.0
) -> None:
    """Write a LoRA adapter, which llama.cpp loads with ``--lora``. Its factors are in float32.

    Args:
        model: The base: a transformers model or a ``TransformerBridge``.
        factors: By module path, A ``(r, d_in)`` and B ``(d_out, r)``, all of one rank.
        path: The GGUF file.
        share: How far the adapter goes at scale 1.
    """
    import gguf

    name = architecture_name(model)
    names = _tensor_names(model)
    if names is None:
        raise UserError(f"llama.cpp has no architecture {name!r}; export without --gguf, for engines that know it.")
    writer = gguf.GGUFWriter(path, name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = len(next(iter(factors.values()))[0])
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, (share or 1.0) * rank)
    for module, (down, up) in factors.items():
        # Not an alpha of 0, with which llama.cpp would go all the way.
        for suffix, factor in (("lora_a", down), ("lora_b", up if share else torch.zeros_like(up))):
            weight = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if weight is None:
                raise UserError(f"llama.cpp has no tensor for {module}; export without --gguf, for other engines.")
            writer.add_tensor(f"{weight}.{suffix}", factor.float().contiguous().numpy())
    finish(writer)


def read_gguf_adapter(model: nn.Module, path: Path, file: Gguf) -> dict[str, tuple[Tensor, Tensor]]:
    """What llama.cpp multiplies and adds for a LoRA adapter at scale 1.

    Args:
        model: The base: a transformers model or a ``TransformerBridge``.
        path: The file, to name it.
        file: What it says.

    Returns:
        By module path, A ``(r, d_in)`` and B ``(d_out, r)`` times alpha over the rank.

    Raises:
        UserError: If it is no adapter in float32, or has a tensor for which this model has no module.
    """
    about = file.metadata
    if (about.get("general.type"), about.get("adapter.type")) != ("adapter", "lora"):
        raise UserError(f"{path} is no LoRA adapter; give one, or a control vector.")
    alpha = about.get("adapter.lora.alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{path} says no alpha; write or fetch it again.")
    names = _tensor_names(model)
    modules = (
        {} if names is None else {names.get_name(name): name for name, _ in transformers_model(model).named_modules()}
    )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in file.tensors}):
        down, up = (file.tensors.get(f"{name}.lora_{factor}") for factor in "ab")
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            raise UserError(f"{path} changes {name[:100]!r}, which this model does not have; give its base.")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
            raise UserError(f"{path} has no two float32 factors of {name[:100]!r}; write or fetch it again.")
        # Without an alpha llama.cpp adds the whole product.
        found[module] = (down, up * (alpha / len(down) if alpha else 1.0))
    return found


def _tensor_names(model: nn.Module) -> Any:
    """What llama.cpp calls a model's modules, by transformers' names; ``None`` if it does not have the architecture."""
    import gguf

    name = architecture_name(model)
    kind = next((kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    return None if kind is None else gguf.get_tensor_name_map(kind, Anatomy(model).n_layers)


def finish(writer: Any) -> None:
    """Write what a writer of the gguf package was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: str | Path, *architectures: str) -> Gguf:
    """Read a GGUF file.

    Args:
        path: The file.
        architectures: What its ``general.architecture`` may be; of other files no tensors are read.

    Raises:
        UserError: If it cannot be read, is damaged, or is of another architecture.
    """
    try:
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file; give the path of a GGUF file.")
        with Path(path).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read(path, _Reader(content), architectures)
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror or error}; check the path.") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path} is not a GGUF file as llama.cpp reads it: {error}; write or fetch it again."
        ) from error


def _read(path: str | Path, reader: _Reader, architectures: Sequence[str]) -> Gguf:
    if bytes(reader.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"it has version {version}, not one of {', '.join(map(str, _VERSIONS))}")
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(n_keys):
        key = reader.text()
        if (value := reader.value(reader.number("I"))) is not None:
            metadata[key] = value
    if (found := metadata.get("general.architecture")) not in architectures:
        wanted = " or ".join(map(repr, dict.fromkeys(architectures)))
        raise UserError(f"{path} is a GGUF file of {str(found)[:100]!r}, not of {wanted}; give another file.")
    described = [reader.described() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError("it says no alignment that can be")
    start = math.ceil(reader.place / alignment) * alignment
    if len({name for name, *_ in described}) < len(described):
        raise ValueError("it has two tensors of one name")
    return Gguf(metadata, {name: reader.tensor(shape, kind, start + at) for name, shape, kind, at in described})


class _Reader:
    """Reads one thing after another, and refuses what would go beyond the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.place = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._content) - self.place:
            raise ValueError("it ends too early")
        self.place += count
        return self._content[self.place - count : self.place]

    def number(self, form: str) -> Any:
        """The next number, little-endian."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        """The next string."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """The next value of metadata; ``None`` for a list, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _LIST:
            raise ValueError(f"it has metadata of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _TEXT:
            for _ in range(count):
                self.text()
        else:
            raise ValueError(f"it has a list of type {inner}")
        return None

    def described(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and place of the next tensor; shapes count from the fastest index."""
        name, n_dims = self.text(), self.number("I")
        if n_dims > 4:
            raise ValueError(f"it has a tensor of {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))
        if max(shape, default=0) > len(self._content):
            raise ValueError("it ends too early")
        return name, shape, self.number("I"), self.number("Q")

    def tensor(self, shape: tuple[int, ...], kind: int, place: int) -> Tensor | None:
        """The tensor there, float32; ``None`` if it is of another type."""
        if kind != _FLOAT32:
            return None
        self.place, count = place, math.prod(shape)
        if place > len(self._content):
            raise ValueError("it ends too early")
        values = torch.frombuffer(bytearray(self.take(4 * count) or b"\0\0\0\0"), dtype=torch.float32)[:count]
        return values.reshape(tuple(reversed(shape)))
