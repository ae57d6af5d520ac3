"""Library code logs and warns; only the command line, and what is run by hand, talks to people."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARS = ROOT / "interp/progress.py"
CALLS = {"print", "input", "typer.echo", "sys.stdout.write", "sys.stderr.write", "logging.basicConfig"}
CONSOLES = {"rich", "tqdm"}


def library() -> Iterator[Path]:
    for package in ("interp", "probes", "interventions", "figures", "conflictscope"):
        paths = sorted((ROOT / package).rglob("*.py"))
        yield from (path for path in paths if ROOT / "conflictscope/cli" not in path.parents)


def talk(code: str) -> Iterator[str]:
    """What in the code talks to people, or warns of what is no caution."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            kinds = (ast.unparse(argument).partition("(")[0] for argument in node.args)
            if name in CALLS or (name == "warnings.warn" and not {"Caution", "DeprecationWarning"} & {*kinds}):
                yield f"{name} in line {node.lineno}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (f"{module} in line {node.lineno}" for module in modules if module.split(".")[0] in CONSOLES)


def test_library_code_is_quiet_but_for_one_module_of_bars():
    found = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in library()
        if path != BARS
        for what in talk(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "def f():\n    from rich.console import Console",
        "import tqdm.auto",
        "sys.stderr.write('x')",
        "warnings.warn('x')",
        "warnings.warn('x', UserWarning)",
    ],
)
def test_talk_is_found(code):
    assert [*talk(code)]


def test_cautions_and_logs_are_no_talk():
    assert not [*talk("import logging\n_log.info('x')\nwarnings.warn(Caution('x'), stacklevel=2)")]
