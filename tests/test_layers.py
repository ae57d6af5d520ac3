"""Imports point one way, between the packages and within the application."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each part must not import.
ABOVE = {
    "interp": ("probes", "interventions", "figures", "conflictscope"),
    "probes": ("interventions", "figures", "conflictscope"),
    "interventions": ("figures", "conflictscope"),
    "figures": ("conflictscope",),
    "conflictscope/report": ("conflictscope.cli", "conflictscope.explore", "conflictscope.serve"),
    "conflictscope/explore": ("conflictscope.cli", "conflictscope.report", "conflictscope.serve"),
    "conflictscope/elsewhere": ("conflictscope.cli", "conflictscope.report", "conflictscope.explore", "figures"),
    "conflictscope/serve": ("conflictscope.cli", "conflictscope.report", "conflictscope.explore", "figures"),
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("part", ABOVE)
def test_no_part_imports_what_stands_above_it(part):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / part).rglob("*.py"))
        for module in imported(path)
        if any(module == above or module.startswith(f"{above}.") for above in ABOVE[part])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "where"),
    [("transformer_lens", {"interp/bridges.py"}), ("sae_lens", {"interp/sae.py", "probes/sae_training.py"})],
)
def test_a_library_that_takes_seconds_to_import_is_imported_where_it_is_needed(package, where):
    packages = ("interp", "probes", "interventions", "figures", "conflictscope")
    paths = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    found = {str(p.relative_to(ROOT)) for p in paths for module in imported(p) if module.split(".")[0] == package}
    assert found == where


def test_nothing_but_its_entry_points_imports_the_command_line():
    root = ROOT / "conflictscope"
    others = [path for path in root.rglob("*.py") if root / "cli" not in path.parents and path.name != "__main__.py"]
    found = [str(path) for path in others for module in imported(path) if module.startswith("conflictscope.cli")]
    assert others
    assert found == []
