"""Measure, locate, change and verify how a language model chooses between its memory and its context.

What most people need has a name here and is imported when it is first asked for, so that ``import conflictscope`` costs
nothing: ``conflictscope.load_model``, ``conflictscope.path_patching``, ``conflictscope.apply``, ... All else is in the
packages ``interp``, ``probes``, ``interventions`` and ``figures``, and in the application's own modules below this one.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.9.0"

# One table of names: the stub that type checkers read says where each is defined.
_TABLE = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_MODULES = {name.name: str(line.module) for line in _TABLE if isinstance(line, ast.ImportFrom) for name in line.names}
__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__})
