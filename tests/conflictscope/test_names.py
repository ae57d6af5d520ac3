"""What ``conflictscope`` itself names: imported when asked for, and seen by type checkers."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import assert_type

import pytest

import conflictscope


def test_importing_the_package_imports_no_other():
    code = "import sys; import conflictscope; dir(conflictscope); print(*sys.modules)"
    alone = [sys.executable, "-S", "-c", code]
    ran = subprocess.run(alone, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    packages = {name.partition(".")[0] for name in ran.stdout.split()} - {"conflictscope"}
    assert packages <= {*sys.stdlib_module_names, "__main__"}


@pytest.mark.parametrize("name", conflictscope.__all__)
def test_a_name_is_what_its_module_calls_so(name):
    named = getattr(conflictscope, name)
    module = import_module(named.__module__)
    assert getattr(module, name) is named
    assert named.__doc__
    assert module.__doc__


def test_names_are_listed():
    assert {*conflictscope.__all__, "__version__"} <= {*dir(conflictscope)}


def test_few_names_are_what_most_people_need():
    assert len(conflictscope.__all__) <= 25


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'load_modl'"):
        _ = conflictscope.load_modl  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_types():
    """The type checker, which reads tests too, fails where they differ; it would also call an ``ignore`` needless."""
    assert_type(conflictscope.top_heads([], 1), list[tuple[int, int]])
    assert_type(conflictscope.HeadScaling.of([(0, 1)], 0.0), conflictscope.HeadScaling)
