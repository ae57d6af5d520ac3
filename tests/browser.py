"""A headless Chromium for the tests of pages.

A test module takes the fixtures by ``chromium, browser_page = browser.chromium, browser.browser_page``. Wait with
locators: a page's security policy may forbid ``wait_for_function``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SCREENSHOTS = os.environ.get("SCREENSHOTS")
"""Folder in which pages are kept as pictures, to look at; drawing them takes longer than all else in a browser."""
WIDTHS = (1280, 390)
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A Chromium, started once a module; tests that need it are skipped where it is missing.

    Not once a session: while it is there, playwright's event loop counts as running, and nothing else may run one.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        pytest.skip(f"there is no browser ({', '.join(_NAMES)}); for example apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def browser_page(chromium: Browser) -> Iterator[Page]:
    """A new page; what it complains about in the console, or throws, fails the test."""
    page = chromium.new_page(viewport={"width": WIDTHS[0], "height": 900})
    with no_complaints(page):
        yield page
    page.close()


@contextmanager
def no_complaints(page: Page) -> Iterator[None]:
    """A context in which a page may neither throw nor write warnings or errors to its console."""
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    yield
    assert not complaints, complaints


def without_figures(path: Path) -> Path:
    """A copy, beside it, of a page without what draws its figures: that takes longer than all else."""
    whole = path.read_text(encoding="utf-8")
    copy = path.with_stem(f"{path.stem}-without-figures")
    copy.write_text(whole.replace(get_plotlyjs(), "const Plotly = {react() {}};"), encoding="utf-8")
    assert copy.stat().st_size < len(whole) / 2
    return copy


def requests_of(page: Page) -> list[str]:
    """A list that fills with the address of everything that the page asks the network for."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    return asked


def check_fits(page: Page, width: int) -> None:
    """See that a page of this width need not be scrolled sideways, once it has settled."""
    page.set_viewport_size({"width": width, "height": 900})
    for _ in range(50):
        if page.evaluate("document.documentElement.scrollWidth") <= width:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"The page is {page.evaluate('document.documentElement.scrollWidth')} px wide, not {width}.")


def screenshots(page: Page, name: str, ready: Callable[[Page], None]) -> None:
    """See that the page fits at every width, light and dark, and keep it as ``$SCREENSHOTS/NAME-WIDTH-SCHEME.png``.

    Args:
        page: The page; it is loaded again for each scheme.
        name: What the files are called.
        ready: Waits until all is drawn.
    """
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        page.reload()
        ready(page)
        for width in WIDTHS:
            check_fits(page, width)
            if SCREENSHOTS:
                page.screenshot(path=Path(SCREENSHOTS, f"{name}-{width}-{scheme}.png"), full_page=True)
