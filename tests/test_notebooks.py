"""Every notebook runs from top to bottom on the real model, with few facts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import plotly.io
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from interp import facts, models
from interp.facts import Fact, load_facts
from interp.fingerprints import fingerprint
from interp.models import DEFAULT_MODEL
from notebooks.render import FOLDER, PLOTLY, executed, page

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# As a user runs it. A kernel, in which all is loaded anew, takes longer than most notebooks: the others run in this
# process, and take it that the model knows a few capitals, four of train, two of dev and of test, in two phrasings.
IN_A_KERNEL = "1_do_they_conflict"
KNOWN = ("France", "Ireland", "Poland", "Turkey", "Iran", "Spain", "Hungary", "Russia")
# What makes a notebook short, by the names of its parameters.
SMALL: dict[str, dict[str, Any]] = {
    "1_do_they_conflict": {"n_facts": 5},
    "2_which_heads_decide": {},
    "3_when_does_the_model_know": {},
    "4_which_features_carry_it": {"relations": ["capital"]},
    "5_change_its_mind": {"doses": [0.0, 1.0], "n_texts": 2},
    "6_ship_it": {},
}


def small(path: Path) -> Any:
    """The notebook with its parameters made small."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    given = SMALL[path.stem]
    assert all(f"{name} =" in parameters.source for name in given), "a parameter that the notebook does not have"
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
    return notebook


def few_facts() -> tuple[Fact, ...]:
    return tuple(fact for fact in load_facts("capital") if fact.subject in KNOWN)


@pytest.fixture(scope="module")
def model() -> Any:
    """What a notebook loads."""
    return models.load_model(DEFAULT_MODEL, device="cpu")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """What a kernel runs its cells with, in this process."""
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    monkeypatch.setitem(sys.modules, "a_notebook", ModuleType("a_notebook"))
    without_history = Config({"HistoryManager": {"enabled": False}})
    yield InteractiveShell.instance(config=without_history, user_module=sys.modules["a_notebook"])
    InteractiveShell.clear_instance()


def run_here(notebook: Any, shell: InteractiveShell) -> Any:
    """The notebook with its outputs. Without a kernel widgets show outside of themselves what they show at first."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with capture_output() as shown:
                result = shell.run_cell(cell.source)
            result.raise_error()
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=shown.stdout)]
            cell.outputs += [nbformat.v4.new_output("display_data", data=output.data) for output in shown.outputs]
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_page_shows_every_figure_and_loads_nothing(
    path: Path, model: Any, shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == IN_A_KERNEL:
        nbformat.write(small(path), tmp_path / path.name)
        notebook = executed(tmp_path / path.name)
    else:
        before = fingerprint(model)
        monkeypatch.setattr(models, "load_model", {DEFAULT_MODEL: model}.__getitem__)
        monkeypatch.setattr(facts, "known_facts", lambda *_, **__: few_facts())
        monkeypatch.setattr(facts, "SEEN_PHRASINGS", facts.SEEN_PHRASINGS[:2])
        notebook = run_here(small(path), shell)
        assert fingerprint(model) == before
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output.data[PLOTLY] for output in outputs if PLOTLY in output.get("data", {})]
    assert figures or path.stem == "6_ship_it"
    assert all(figure["data"] for figure in figures)
    shown = page(notebook)
    assert shown.count('class="plotly-graph-div"') == len(figures)
    assert shown.count('"showSendToCloud": false') == len(figures), "a figure with a button that uploads it"
    loaded = r"""(?:src|href)=["']?(?:https?:)?//(?!arxiv\.org)[^"' >]*\.(?:js|css)|import\(["']https?:"""
    assert not re.findall(loaded, shown)


def test_a_run_with_many_outputs_in_widgets_does_not_wait_for_ever(tmp_path: Path) -> None:
    """Where the kernel was told of them, one in about twelve such cells was never known to have ended."""
    widget = "import ipywidgets\nshown = ipywidgets.Output()\ndisplay(ipywidgets.VBox([shown]))"
    many = "with shown:\n    for number in range(8):\n        print(number, flush=True)\n        display(number)"
    cells = [nbformat.v4.new_code_cell(source) for source in (widget, *[many] * 60)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "many.ipynb")
    notebook = executed(tmp_path / "many.ipynb")
    assert len(notebook.cells[0].outputs) == 60 * 16
    assert all(cell.execution_count for cell in notebook.cells)
