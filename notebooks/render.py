"""Run the notebooks and write them with their outputs as pages that load nothing.

    python -m notebooks.render                       # all of them, into out/notebooks
    python -m notebooks.render notebooks/6_ship_it.ipynb --out elsewhere

plotly.js stands in each page once. Sliders need a kernel, so a page shows what they showed at first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import nbformat
import plotly.io
import typer
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget
from nbconvert import HTMLExporter
from rich.console import Console

from figures.theme import HTML_CONFIG
from interp.files import write_text

FOLDER = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_STATE = "application/vnd.jupyter.widget-state+json"
# Empty scripts: what nbconvert would get from the network is for formulas, widgets and diagrams, and there are none.
_URLS = dict.fromkeys(("require_js_url", "mathjax_url", "mermaid_js_url", "mermaid_layout_elk_js_url"), "data:,")


class _QuietOutput(OutputWidget):
    """A widget's outputs, which the page takes from the client and the kernel is not told.

    nbclient tells it over the socket on which a cell's reply is awaited, past asyncio, which then may never see the
    reply: a run waited for ever.
    """

    def send(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def executed(path: Path) -> Any:
    """A notebook after it ran, its widgets replaced by what they showed."""
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3")
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": _QuietOutput}}
    client.execute()
    widgets = notebook.metadata.pop("widgets", {}).get(_STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [shown for output in cell.outputs for shown in _without_widget(output, widgets)]
    return notebook


def page(notebook: Any) -> str:
    """The notebook as one HTML page."""
    first = True
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if PLOTLY in output.get("data", {}):
                figure = output.data.pop(PLOTLY)
                output.data["text/html"] = plotly.io.to_html(
                    {key: figure[key] for key in ("data", "layout", "frames") if key in figure},
                    config=HTML_CONFIG,
                    include_plotlyjs=first,
                    include_mathjax=False,
                    full_html=False,
                    validate=False,
                )
                first = False
    return HTMLExporter(**_URLS).from_notebook_node(notebook)[0]


def _without_widget(output: Any, widgets: dict[str, Any]) -> list[Any]:
    model = output.get("data", {}).get(_WIDGET, {}).get("model_id")
    if model is None:
        return [output]
    children = [child.removeprefix("IPY_MODEL_") for child in widgets[model]["state"].get("children", ())]
    return [nbformat.from_dict(shown) for child in children for shown in widgets[child]["state"].get("outputs", ())]


def main(
    notebooks: Annotated[list[Path] | None, typer.Argument(help="Which; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pages.")] = Path("out/notebooks"),
) -> None:
    """Run notebooks and write them as HTML."""
    for path in notebooks or sorted(FOLDER.glob("*.ipynb")):
        target = out / f"{path.stem}.html"
        write_text(target, page(executed(path)))
        Console().print(f"{path} ran; its page is {target}", markup=False)


if __name__ == "__main__":
    typer.run(main)
