"""Give vLLM the settings of exported edits on demand: ``"model": "dial@0.5"`` in a request.

A plugin of vLLM, through its public points: the entry point ``vllm.general_plugins`` and a ``LoRAResolver``, which vLLM
asks for adapters that it does not know. It needs vLLM and the standard library only, so that ``pip install --no-deps``
puts it into the environment of an engine. ``CONFLICTSCOPE_ADAPTERS`` names the folder of adapters, which is only read.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

FOLDER, BASE = "CONFLICTSCOPE_ADAPTERS", "CONFLICTSCOPE_BASE"
"""The variables that name the folder of adapters, and what their base is loaded from: else vLLM's name of the model."""
_UNEDITED = "none"
_FURTHEST, _LONGEST = 100.0, 200


class Found(NamedTuple):
    """The adapter that a name stands for.

    Attributes:
        folder: Whose tensors it has.
        share: How far it goes: its alpha is as many times that of the folder.
    """

    folder: Path
    share: float


def find(adapters: Path, name: str, base: str) -> Found | None:
    """Find the adapter that a name stands for: a folder, ``NAME@SETTING``, or ``none``, which changes nothing.

    A dial has folders for both of its ends, ``NAME@1`` and ``NAME@-1``; a setting between them is a share of the end on
    its side. An edit that scales heads has the folder ``NAME``, and a setting is how far it goes. Edits that consist of
    several have the settings that they were exported at only.

    Args:
        adapters: The folder of adapters.
        name: What a request calls its model. A setting is written as ``format(setting, "g")`` does.
        base: What the base is loaded from; adapters of others are not found.

    Returns:
        ``None`` if there is no such adapter, or the setting is out of range.
    """
    if not _is_name(name):
        return None
    if _is_for(adapters / name, base):
        return Found(adapters / name, 1.0)
    if name == _UNEDITED:
        some = next((folder for folder in sorted(adapters.iterdir()) if _is_for(folder, base)), None)
        return None if some is None else Found(some, 0.0)
    edit, _, setting = name.rpartition("@")
    try:
        value = float(setting)
    except ValueError:
        return None
    if not _is_name(edit) or not math.isfinite(value) or f"{value:g}" != setting:
        return None
    if abs(value) <= 1:
        for side in ("1", "-1") if value == 0 else ("1",) if value > 0 else ("-1",):
            if _is_for(end := adapters / f"{edit}@{side}", base) and _kinds(end) == ["trust_dial"]:
                return Found(end, abs(value))
    is_single = _is_for(adapters / edit, base) and _kinds(adapters / edit) == ["head_scaling"]
    return Found(adapters / edit, value) if is_single and abs(value) <= _FURTHEST else None


def at_setting(found: Found, folder: Path) -> Path:
    """Write the adapter at its setting into a folder, which links to its tensors; at a share of 1 take its own."""
    if found.share == 1:
        return found.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((found.folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] *= found.share
    tensors = folder / "adapter_model.safetensors"
    if not tensors.exists():
        tensors.symlink_to((found.folder / tensors.name).resolve())
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def register() -> None:
    """Let vLLM ask for settings, where ``CONFLICTSCOPE_ADAPTERS`` names a folder. vLLM calls this in each process."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    class Settings(LoRAResolver):
        """Resolves ``NAME@SETTING``."""

        def __init__(self, adapters: Path) -> None:
            self._adapters = adapters
            self._written: tempfile.TemporaryDirectory[str] | None = None

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            found = find(self._adapters, lora_name, os.environ.get(BASE, base_model_name))
            if found is None:
                return None
            if self._written is None:
                self._written = tempfile.TemporaryDirectory(prefix="conflictscope-settings-")
            # vLLM numbers adapters that it is started with from 1 on.
            number = zlib.crc32(lora_name.encode()) + 2**20
            return LoRARequest(lora_name, number, str(at_setting(found, Path(self._written.name) / lora_name)))

    LoRAResolverRegistry.register_resolver("ConflictScope settings", Settings(Path(folder)))


def _is_name(text: str) -> bool:
    """Whether a text can be the name of a folder in the folder of adapters."""
    return text.strip(".") != "" and len(text) <= _LONGEST and not {"/", "\\", "\0"} & set(text)


def _is_for(folder: Path, base: str) -> bool:
    """Whether a folder holds an adapter for a base."""
    config = _read(folder / "adapter_config.json")
    return config.get("base_model_name_or_path") == base


def _kinds(folder: Path) -> list[str]:
    """The kinds of the interventions that an adapter was exported of."""
    return [str(entry.get("kind")) for entry in _read(folder / "intervention.json").get("interventions", [])]


def _read(path: Path) -> dict[str, Any]:
    """An object of JSON; an empty one where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
