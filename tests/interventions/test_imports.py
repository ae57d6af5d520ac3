import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import interventions

ROOT = Path(interventions.__file__).parent
MODULES = {
    ".".join(("interventions", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if ".fitting" not in name))
def test_serving_needs_neither_transformer_lens_nor_sae_lens_nor_what_learns(module):
    without("transformer_lens", "sae_lens", "polars", "plotly", "interventions.fitting", module=module)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if ".fitting" in name))
def test_what_learns_needs_neither_transformer_lens_nor_sae_lens(module):
    without("transformer_lens", "sae_lens", module=module)


def without(*absent: str, module: str) -> None:
    """Import a module in a fresh process in which others cannot be imported."""
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport {module}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_imports_go_round_in_no_circle():
    """Also those that only name types."""
    imported = {}
    for name, path in MODULES.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imported[name] = {node.module for node in nodes if node.module in MODULES}
    TopologicalSorter(imported).prepare()
