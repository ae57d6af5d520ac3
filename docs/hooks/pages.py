"""Pages that are written while the site is built: commands, modules, and what lies outside of docs/.

- ``CONTRIBUTING.md`` and ``CHANGELOG.md`` become pages, the schema of intervention files and the notebooks are copied.
  Links to them are mended: as they are read on a code host they lead out of docs/. What ``make notebooks`` made is
  copied too.
- ``<!-- commands -->`` becomes the reference of the command line, ``<!-- modules of PACKAGE -->`` that of a package,
  ``<!-- map of FOLDERS -->`` tables of what their modules do, ``<!-- names -->`` one of what ``conflictscope`` itself
  names, ``<!-- rendered notebooks -->`` a list of the pages that there are.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

import conflictscope

_ROOT = Path(__file__).parents[2]
_NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.ipynb"))
_OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "interventions/schema.json": "schema.json",
    **{f"notebooks/{path.name}": f"notebooks/{path.name}" for path in _NOTEBOOKS},
}
_WRITTEN: dict[str, Callable[..., Iterator[str]]] = {}


def on_files(files: Files, config: Any) -> None:
    """Add the pages and files that lie outside of docs/."""
    for source, name in _OUTSIDE.items():
        text = (_ROOT / source).read_text(encoding="utf-8")
        if name.endswith(".md"):
            text = text.replace("](docs/", "](")
            for other, page in _OUTSIDE.items():
                text = text.replace(f"]({other}", f"]({page}")
        files.append(File.generated(config, name, content=text))
    for path in _rendered():
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend links that lead out of docs/, and write what is generated."""
    up = "../" * page.file.src_uri.count("/")
    for source, name in _OUTSIDE.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{name}")
    for mark, write in _WRITTEN.items():
        markdown = re.sub(f"<!-- {mark} -->", lambda found, write=write: "\n".join(write(*found.groups())), markdown)
    return markdown


def _rendered() -> list[Path]:
    """The notebooks' pages with their outputs that ``make notebooks`` left."""
    pages = [_ROOT / "out/notebooks" / f"{path.stem}.html" for path in _NOTEBOOKS]
    return [page for page in pages if page.exists()]


def _notebook_pages() -> Iterator[str]:
    if not _rendered():
        yield "None was there when this site was built: run `make notebooks` before `make docs`."
    yield from (f"- [{page.stem[2:].replace('_', ' ').capitalize()}](notebooks/{page.name})" for page in _rendered())


def _map(folders: str) -> Iterator[str]:
    for top in folders.split(", "):
        for folder in sorted({path.parent for path in (_ROOT / top).rglob("*.py")}):
            modules = {path: _docstring(path) for path in sorted(folder.glob("*.py"))}
            about = modules.pop(folder / "__init__.py", "")
            yield f"{'##' if folder.name == top else '###'} {folder.relative_to(_ROOT)}/\n\n{_summary(about)}\n"
            yield "| file | what it does |\n| --- | --- |"
            yield from (f"| {_reference(path)} | {_summary(text)} |" for path, text in modules.items())
            yield ""


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _reference(path: Path) -> str:
    """The name of a module's file, with a link to its reference if it has one."""
    package, *_ = parts = path.relative_to(_ROOT).with_suffix("").parts
    has_reference = (_ROOT / "docs/api" / f"{package}.md").exists() and not path.name.startswith("_")
    return f"[{path.name}](api/{package}.md#{'.'.join(parts)})" if has_reference else f"`{path.name}`"


def _names() -> Iterator[str]:
    yield "| name | what it does |\n| --- | --- |"
    for name in conflictscope.__all__:
        named = getattr(conflictscope, name)
        place = f"../api/{named.__module__.partition('.')[0]}.md#{named.__module__}.{name}"
        yield f"| [`{name}`]({place}) | {_summary(inspect.getdoc(named) or '')} |"


def _summary(docstring: str) -> str:
    """The first line of a docstring, as a cell of a table."""
    return _bars(_text(docstring.partition("\n")[0].replace("``", "`")))


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


_WRITTEN |= {
    "commands": _commands,
    r"modules of (\w+)": _modules,
    r"map of ([\w, ]+)": _map,
    "names": _names,
    "rendered notebooks": _notebook_pages,
}
