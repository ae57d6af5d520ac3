"""The documentation: built without a warning, no broken link, and nothing that is loaded from the network."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import typer
from bs4 import BeautifulSoup
from bs4.filter import SoupStrainer
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config

import conflictscope
from conflictscope.cli import app

pytest_plugins = ["tests.browser"]

ROOT = Path(__file__).parents[1]
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
WRITTEN = [*OUTSIDE, *sorted((ROOT / "docs").rglob("*.md"))]
# Attributes by which a page loads something without being asked to; links in <a> are followed by readers only.
_LOADING = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src",
    "object": "data",
}  # fmt: skip
_LOADING_RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}


class Warned(logging.Handler):
    """Keeps what the build warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def warned() -> Warned:
    return Warned()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, warned: Warned) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    loggers = [logging.getLogger(name) for name in ("mkdocs", "mkdocs.plugins", "griffe")]
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    for logger in loggers:
        logger.addHandler(warned)
    try:
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        config.plugins.on_shutdown()
        for logger in loggers:
            logger.removeHandler(warned)
    return folder


class Tags(HTMLParser):
    """Keeps a page's tags with their attributes: where only these are looked at, a tree takes several times as long."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


@pytest.fixture(scope="module")
def tags(site: Path) -> dict[Path, list[tuple[str, dict[str, str]]]]:
    """The tags of the built pages."""
    return {path: Tags(path).found for path in site.rglob("*.html")}


def parsed(path: Path, only: str | None = None) -> Any:
    """A built page, or all of one kind that is on it."""
    return BeautifulSoup(
        path.read_text(encoding="utf-8"), "html.parser", parse_only=SoupStrainer(only) if only else None
    )


def test_the_site_is_built_without_a_warning(site, warned):
    assert (site / "index.html").is_file()
    assert warned.messages == []


def test_every_link_of_the_site_leads_somewhere(site, tags):
    anchors = {path: {attributes.get("id") for _, attributes in found} for path, found in tags.items()}
    broken, followed = [], 0
    for path, found in tags.items():
        if path.name == "404.html":
            # It is shown at any address, so its links start at the root.
            continue
        for link in (attributes[name] for _, attributes in found for name in ("href", "src") if name in attributes):
            target, anchor = urldefrag(link)
            if urlparse(target).scheme:
                continue
            place = (path.parent / unquote(target)).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            followed += 1
            if not place.is_file() or (anchor and place in anchors and unquote(anchor) not in anchors[place]):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert followed > 1000


def test_pages_load_nothing_from_the_network(site, tags):
    loaded = []
    for path, found in tags.items():
        for tag, attributes in found:
            if tag in _LOADING:
                loaded.append((path, attributes.get(_LOADING[tag])))
            elif tag == "link" and _LOADING_RELATIONS & set(attributes.get("rel", "").split()):
                loaded.append((path, attributes.get("href")))
    assert loaded
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        loaded += [(path, url) for url in re.findall(r"(?:url\(|@import )['\"]?([^'\")\s]+)", text)]
    assert [(path.name, url) for path, url in loaded if url and re.match(r"(https?:)?//", url)] == []


def test_pages_and_search_work_from_the_file_system(site, browser_page):
    asked: list[str] = []
    browser_page.on("request", lambda request: asked.append(request.url))
    for name in ("index.html", "methods/path_patching.html", "api/interp.html"):
        browser_page.goto((site / name).as_uri())
    # The search listens to keys; what is filled in without any is not asked.
    browser_page.locator("input.md-search__input").press_sequentially("memorisation ratio")
    browser_page.locator(".md-search-result__article").first.wait_for(timeout=60_000)
    assert [url for url in asked if url.startswith("http")] == []


def test_formulas_are_mathml(site):
    page = parsed(site / "methods" / "path_patching.html")
    assert len(page.find_all("math")) > 3
    assert not re.search(r"\\\(|\\\[|\$\$|\\frac", page.get_text())


def test_every_command_is_in_the_reference(site):
    def names(command, name) -> Iterator[str]:
        for part, inner in getattr(command, "commands", {}).items():
            yield from names(inner, f"{name} {part}") if hasattr(inner, "commands") else [f"{name} {part}"]

    headings = {tag.get_text().rstrip("¶") for tag in parsed(site / "commands.html").find_all("h2")}
    assert set(names(typer.main.get_command(app), "conflictscope")) == headings


def test_every_public_module_is_in_the_reference(site, tags):
    for package in ("interp", "probes", "interventions", "conflictscope"):
        documented = {attributes.get("id") for tag, attributes in tags[site / "api" / f"{package}.html"] if tag == "h2"}
        modules = {
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in (ROOT / package).rglob("*.py")
            if not path.name.startswith("_")
        }
        assert modules <= documented


def test_every_module_is_on_the_map_and_says_what_it_does(site):
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in parsed(site / "map.html").find_all("tr")]
    modules = {
        path.name
        for package in ("interp", "probes", "interventions", "figures", "conflictscope")
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules - {"__init__.py"} <= {row[0] for row in rows if row}
    assert [row for row in rows if row and not row[1]] == []


def test_every_name_of_the_package_is_in_its_reference(site):
    rows = parsed(site / "api" / "conflictscope.html", only="table").find("table").find_all("tr")[1:]
    assert [row.find("code").get_text() for row in rows] == conflictscope.__all__


def test_every_extra_is_on_the_page_about_installing():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert {*project["optional-dependencies"]} == {*re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)}


@pytest.mark.parametrize("document", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere_where_the_text_is_read_as_it_is(document):
    """On a code host, where README and docs are read without being built."""
    tokens = [
        child for token in MarkdownIt().parse(document.read_text(encoding="utf-8")) for child in token.children or []
    ]
    links = [str(token.attrs.get("href", token.attrs.get("src", ""))) for token in tokens]
    broken = []
    for link in filter(None, links):
        target, anchor = urldefrag(link)
        if urlparse(target).scheme:
            continue
        place = (document.parent / unquote(target)).resolve() if target else document
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in _headings(place)):
            broken.append(link)
    assert broken == []


def _headings(path: Path) -> set[str]:
    """The anchors that a code host gives the headings of a text."""
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
