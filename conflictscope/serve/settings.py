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
from typing import NamedTuple

FOLDER = "CONFLICTSCOPE_ADAPTERS"
_FURTHEST = 100.0


class Found(NamedTuple):
    """The adapter that a name stands for.

    Attributes:
        folder: Whose tensors it has.
        share: How far it goes: its alpha is as many times that of the folder.
    """

    folder: Path
    share: float


def find(adapters: Path, name: str) -> Found | None:
    """Find the adapter that a name stands for: a folder, or ``NAME@SETTING``.

    A dial has folders for both of its ends, ``NAME@1`` and ``NAME@-1``; a setting between them is a share of the end on
    its side. Another edit has the folder ``NAME``, and a setting is how far it goes.

    Args:
        adapters: The folder of adapters.
        name: What a request calls its model.

    Returns:
        ``None`` if there is no such adapter, or the setting is out of range.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return None
    if _is_adapter(adapters / name):
        return Found(adapters / name, 1.0)
    edit, at, setting = name.rpartition("@")
    try:
        value = float(setting)
    except ValueError:
        return None
    if not at or not edit or not math.isfinite(value):
        return None
    sides = ("1", "-1") if value == 0 else ("1",) if value > 0 else ("-1",)
    if abs(value) <= 1:
        for side in sides:
            if _is_adapter(end := adapters / f"{edit}@{side}"):
                return Found(end, abs(value))
    is_single = _is_adapter(adapters / edit) and not any(_is_adapter(adapters / f"{edit}@{end}") for end in ("1", "-1"))
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

    adapters, written = Path(folder), Path(tempfile.mkdtemp(prefix="conflictscope-settings-"))

    class Settings(LoRAResolver):
        """Resolves ``NAME@SETTING``."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:  # noqa: ARG002
            found = find(adapters, lora_name)
            if found is None:
                return None
            # vLLM numbers adapters that it is started with from 1 on.
            number = zlib.crc32(lora_name.encode()) + 2**20
            return LoRARequest(lora_name, number, str(at_setting(found, written / lora_name)))

    LoRAResolverRegistry.register_resolver("ConflictScope settings", Settings())


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
