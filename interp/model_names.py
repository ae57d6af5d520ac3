"""Tell a model's path from its name on the hub, before a library that loads models is imported."""

from __future__ import annotations

import re
from pathlib import Path

from interp.errors import UserError

# A path as Windows writes it.
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|.*\\")


def check_path(name: str) -> None:
    """Refuse what can only be the path of a model, where nothing lies there.

    Args:
        name: A registered name, a local directory or file, or a hub id.

    Raises:
        UserError: If it is such a path.
    """
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or _WINDOWS.match(name)
    if is_path and not path.exists():
        raise UserError(f"There is no model directory {name}; check the path.")
