"""Pages that are written while the site is built: commands, modules, and what lies outside of docs/.

- ``README.md`` becomes the page ``results.md``; the schema of intervention files and the notebooks are copied. Links to
  them are mended: as they are read on a code host they lead out of docs/.
- ``<!-- commands -->`` becomes the reference of the command line, ``<!-- modules of PACKAGE -->`` that of a package.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[2]
_OUTSIDE = {
    "README.md": "results.md",
    "interventions/schema.json": "schema.json",
    **{f"notebooks/{path.name}": f"notebooks/{path.name}" for path in sorted((_ROOT / "notebooks").glob("*.ipynb"))},
}


def on_files(files: Files, config: Any) -> None:
    """Add the pages and files that lie outside of docs/."""
    for source, name in _OUTSIDE.items():
        text = (_ROOT / source).read_text(encoding="utf-8")
        if name.endswith(".md"):
            text = text.replace("](docs/", "](")
            for other, page in _OUTSIDE.items():
                text = text.replace(f"]({other}", f"]({page}")
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend links that lead out of docs/, and write what is generated."""
    up = "../" * page.file.src_uri.count("/")
    for source, name in _OUTSIDE.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{name}")
    markdown = re.sub("<!-- commands -->", lambda _: "\n".join(_commands()), markdown)
    return re.sub(r"<!-- modules of (\w+) -->", lambda found: "\n".join(_modules(found[1])), markdown)


def _modules(package: str) -> Iterator[str]:
    root = import_module(package)
    for module in sorted(pkgutil.walk_packages(root.__path__, f"{package}."), key=lambda module: module.name):
        if not module.ispkg and not module.name.rpartition(".")[2].startswith("_"):
            yield f"::: {module.name}\n"


def _commands() -> Iterator[str]:
    from conflictscope.cli import app

    for name, command in _walked("conflictscope", typer.main.get_command(app)):
        yield from _described(name, command)


def _walked(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command under ``command`` with its whole name, groups left out."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from _walked(f"{name} {part}", inner)


def _described(name: str, command: Any) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"## {name}\n\n{_text(inspect.cleandoc(command.help))}\n\n```text\n{usage}\n```\n"
    records = [parameter.get_help_record(context) for parameter in command.params]
    if records:
        yield "| name | what it says |\n| --- | --- |"
    yield from (f"| `{names}` | {_bars(_text(about))} |" for names, about in filter(None, records))
    yield ""


def _text(help_text: str) -> str:
    """A help text in Markdown, in which it says the same; what it puts in backticks stays code."""
    return re.sub(r"(`[^`]*`)|([*_<\[\]])", lambda found: found[1] or f"\\{found[2]}", help_text)


def _bars(cell: str) -> str:
    return cell.replace("|", r"\|")
