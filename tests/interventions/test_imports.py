import ast
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import interventions

ROOT = Path(interventions.__file__).parent
MODULES = {
    ".".join(("interventions", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
# One after another, the others in place: that imports go round in no circle is a test of its own.
EACH = """
import sys, traceback
absent, modules = sys.argv[1].split(), sys.argv[2].split()
sys.modules.update(dict.fromkeys(absent))
for module in modules:
    try:
        __import__(module)
    except BaseException:
        print(module)
        traceback.print_exc(file=sys.stderr)
"""


def test_serving_needs_neither_transformer_lens_nor_sae_lens_nor_what_learns():
    absent = ("transformer_lens", "sae_lens", "polars", "plotly", "interventions.fitting")
    assert need_one_of(absent, (name for name in MODULES if ".fitting" not in name)) == []


def test_what_learns_needs_neither_transformer_lens_nor_sae_lens():
    assert need_one_of(("transformer_lens", "sae_lens"), (name for name in MODULES if ".fitting" in name)) == []


def need_one_of(absent: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those modules that cannot be imported where others cannot be."""
    wanted = sorted(modules)
    assert wanted
    command = [sys.executable, "-c", EACH, " ".join(absent), " ".join(wanted)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    print(found.stderr)  # noqa: T201 (pytest shows it where the test fails)
    return found.stdout.split()


def test_imports_go_round_in_no_circle():
    """Also those that only name types."""
    imported = {}
    for name, path in MODULES.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imported[name] = {node.module for node in nodes if node.module in MODULES}
    TopologicalSorter(imported).prepare()
