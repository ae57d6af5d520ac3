"""What interventions import when they are imported, read from the code: to import all that takes half a minute."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import interventions

ROOT = Path(interventions.__file__).parents[1]


def files(package: str) -> dict[str, Path]:
    """The modules of a package."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


MODULES = files("interventions")
OURS = {name: path for package in ("interp", "probes", "interventions") for name, path in files(package).items()}


def test_serving_needs_neither_transformer_lens_nor_sae_lens_nor_what_learns():
    absent = {"transformer_lens", "sae_lens", "polars", "plotly", "interventions.fitting"}
    assert {name: absent & needed(name) for name in MODULES if ".fitting" not in name and absent & needed(name)} == {}
    assert {"torch", "safetensors", "interp.anatomy"} <= needed("interventions.heads") | needed("interventions.config")


def test_what_learns_needs_neither_transformer_lens_nor_sae_lens():
    absent = {"transformer_lens", "sae_lens"}
    learning = [name for name in MODULES if ".fitting" in name]
    assert learning
    assert {name: absent & needed(name) for name in learning if absent & needed(name)} == {}


@cache
def needed(module: str) -> frozenset[str]:
    """All that is imported with one of our modules: ours by their names and those of their packages, others too."""
    found, ahead = set[str](), [module]
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        found.add(name)
        package, _, _ = name.rpartition(".")
        ahead += [package] if package else []
        if name in OURS:
            ahead += imported(OURS[name])
    return frozenset(found)


@cache
def imported(path: Path) -> list[str]:
    """What a module imports itself."""
    return list(imported_at_once(ast.parse(path.read_text(encoding="utf-8"))))


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """What is imported outside of functions, and not for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None
            assert child.level == 0
            yield child.module
            yield from (f"{child.module}.{name.name}" for name in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imported_at_once(ast.Module(child.orelse, []))
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_at_once(child)


def test_imports_go_round_in_no_circle():
    """Also those that only name types."""
    imported = {}
    for name, path in MODULES.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imported[name] = {node.module for node in nodes if node.module in MODULES}
    TopologicalSorter(imported).prepare()
