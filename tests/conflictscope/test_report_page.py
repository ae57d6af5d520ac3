"""The report in a real browser: what it shows, what its filters do, and that nothing goes wrong meanwhile."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

from conflictscope.report import read_runs, write_report
from conflictscope.study.record import UNEDITED, StudyRecord, read_examples, write_examples
from figures.theme import percent
from interp.facts import HELD_OUT_PHRASING
from tests import browser
from tests.browser import SCREENSHOTS, WIDTHS, check_fits, requests_of, screenshots, without_figures
from tests.conflictscope.report_samples import WRITERS, write_demo, write_gate

if TYPE_CHECKING:
    from playwright.sync_api import Page

chromium, browser_page = browser.chromium, browser.browser_page

# Two seconds where nothing else runs.
BUDGET = 5.0
AFTER = "pruning, towards context"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_demo(tmp_path_factory.mktemp("demo"))
    write_report(folder / "report.html", read_runs([folder]))
    return folder


@pytest.fixture(scope="module")
def frame(folder: Path) -> pl.DataFrame:
    """A row a prompt of the sample, with what was answered before and after."""
    examples = read_examples(folder)
    assert examples is not None
    after = examples.filter(condition=AFTER).select("id", after="usage", after_answer="answer")
    return examples.filter(condition=UNEDITED).join(after, on="id")


@pytest.fixture(scope="module")
def undrawn(folder: Path) -> Path:
    return without_figures(folder / "report.html")


@pytest.fixture
def opened(browser_page: Page, undrawn: Path) -> Page:
    return show(browser_page, undrawn)


@pytest.fixture
def drawn(browser_page: Page, folder: Path) -> Page:
    show(browser_page, folder / "report.html")
    all_drawn(browser_page)
    return browser_page


def show(page: Page, path: Path) -> Page:
    page.goto(path.as_uri())
    return page


def all_drawn(page: Page) -> None:
    page.locator(".plot:not(:has(.main-svg))").first.wait_for(state="detached")


def choose(page: Page, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"select[name={name}]").select_option(value)


def found(page: Page) -> int:
    match = re.match(r"(\d+) of \d+ prompts", page.locator(".found").inner_text())
    assert match is not None
    return int(match[1])


def test_a_thousand_prompts_under_nine_conditions_and_270_heads_load_in_time(
    browser_page: Page, folder: Path, frame: pl.DataFrame, record_property
) -> None:
    asked = requests_of(browser_page)
    started = time.perf_counter()
    show(browser_page, folder / "report.html")
    assert browser_page.locator(".examples li").count() == 20
    took = time.perf_counter() - started
    record_property("seconds", took)
    all_drawn(browser_page)
    print(f"\nloaded in {took:.2f} s, all figures after {time.perf_counter() - started:.2f} s")  # noqa: T201
    assert frame.height > 1000
    assert took < BUDGET
    assert not asked


def test_the_cards_show_the_numbers_of_the_record(opened: Page, folder: Path) -> None:
    record = StudyRecord.load(folder)
    for d in ("context", "memory"):
        winner = record.winner(d)
        assert winner is not None
        before, after = (test[f"{d}_rate"]["value"] for test in (record.unedited.test, winner.test))
        card = opened.locator(f".card.{d} .big").inner_text()
        assert card == f"{percent(before)} → {percent(after)}"


def test_the_counts_without_other_filters_are_the_rates_of_the_record(opened: Page, folder: Path) -> None:
    record = StudyRecord.load(folder)
    before, after = record.unedited.test, next(c.test for c in record.conditions if c.name == AFTER)
    choose(opened, after=AFTER)
    said = opened.locator(".found").inner_text()
    assert found(opened) == before["context_rate"]["n"]
    for part, test in zip(said.split("After"), (before, after), strict=True):
        for usage in ("memory", "context", "other"):
            rate = test[f"{usage}_rate"]
            count = round(rate["value"] * rate["n"])
            assert f"{usage} {count} ({100 * rate['value']:.1f}%)" in part


def test_a_click_sorts_each_direction_and_leaves_controls_below_theirs(opened: Page, folder: Path) -> None:
    record = StudyRecord.load(folder)
    named = "(rows) => rows.map((row) => row.querySelector('th').firstChild.data.trim())"
    for button, wanted in (("Wanted rate", True), ("Wanted rate", False)):
        opened.get_by_role("button", name=button).click()
        order = opened.locator(".conditions tbody").first.locator("tr:not(.group)").evaluate_all(named)
        edits = [record.unedited, *record.chosen("context")]
        edits.sort(key=lambda c: c.test["context_rate"]["value"], reverse=wanted)
        assert order == [c.name for edit in edits for c in (edit, *record.controls_of(edit))]
    opened.get_by_role("button", name="Condition").click()
    order = opened.locator(".conditions tbody").last.locator("tr:not(.group, .control)").evaluate_all(named)
    assert order == sorted(order)


FILTERS = {
    "kind": ("aligned", pl.col("kind") == "aligned"),
    "relation": ("currency", pl.col("relation") == "currency"),
    "template": ("question", pl.col("template") == "question"),
    "held_out": ("yes", pl.col("template") == HELD_OUT_PHRASING),
    "before_usage": ("memory", pl.col("usage") == "memory"),
    "after_usage": ("other", pl.col("after") == "other"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_what_fits(opened: Page, frame: pl.DataFrame, name: str) -> None:
    value, fits = FILTERS[name]
    choose(opened, after=AFTER, **{"kind": "", name: value})
    kept = frame.filter(fits)
    assert found(opened) == kept.height > 0
    assert opened.locator(".examples .prompt").all_inner_texts() == kept["prompt"].to_list()[:20]


def test_filters_add_up_and_reset_takes_them_back(opened: Page, frame: pl.DataFrame) -> None:
    everything = found(opened)
    choose(opened, after=AFTER, before_usage="memory", after_usage="context", held_out="no", relation="capital")
    kept = frame.filter(
        pl.col("template") != HELD_OUT_PHRASING, kind="conflict", usage="memory", after="context", relation="capital"
    )
    assert found(opened) == kept.height > 0
    opened.get_by_role("button", name="Reset").click()
    opened.get_by_text(f"{everything} of {frame.height} prompts").wait_for()


def test_text_is_searched_in_prompts_and_answers(opened: Page, frame: pl.DataFrame) -> None:
    choose(opened, kind="")
    name = frame["subject"][-1].lower()
    opened.get_by_role("searchbox").fill(name.upper())
    texts = [pl.col(c).str.to_lowercase() for c in ("prompt", "subject", "answer", "after_answer")]
    fits = pl.any_horizontal(text.str.contains(name, literal=True) for text in texts)
    assert found(opened) == frame.filter(fits).height > 0
    opened.get_by_role("searchbox").fill("<nowhere>")
    assert found(opened) == 0
    assert "Nothing fits" in opened.locator(".found").inner_text()
    assert opened.locator(".examples li").count() == 0


def test_an_example_shows_what_was_expected_and_answered(opened: Page, folder: Path) -> None:
    examples = read_examples(folder)
    assert examples is not None
    choose(opened, after="learned gates, towards memory")
    shown = opened.locator(".examples li").first.locator("dd").all_inner_texts()
    ids = examples.filter(condition=UNEDITED, kind="conflict")["id"]
    before, after = (
        examples.filter(condition=name, id=ids[0]).row(0, named=True)
        for name in (UNEDITED, "learned gates, towards memory")
    )
    assert shown[:2] == [" / ".join(before["memory_answers"]), " / ".join(before["context_answers"])]
    for text, row in zip(shown[2:], (before, after), strict=True):
        difference = f"{row['logit_difference']:+.2f}".replace("-", "\N{MINUS SIGN}")
        assert " ".join(text.split()) == f"{row['usage']} {row['answer']} logit difference {difference}"


def test_pages_are_turned_by_keyboard(opened: Page, frame: pl.DataFrame) -> None:
    prompts = frame.filter(kind="conflict")["prompt"].to_list()
    opened.get_by_role("searchbox").focus()
    for key in ("Tab", "Tab", "Enter"):
        opened.keyboard.press(key)
    assert opened.locator(".pager span").inner_text() == f"21 to 40 of {len(prompts)}"
    assert opened.locator(".examples .prompt").all_inner_texts() == prompts[20:40]
    assert opened.evaluate("document.activeElement.textContent") == "Next"
    opened.keyboard.press("Shift+Tab")
    opened.keyboard.press("Space")
    assert opened.locator(".pager span").inner_text() == f"1 to 20 of {len(prompts)}"
    assert opened.get_by_role("button", name="Previous").is_disabled()


def test_filters_are_set_by_keyboard(opened: Page, frame: pl.DataFrame) -> None:
    opened.get_by_label("Relation").focus()
    opened.keyboard.press("ArrowDown")
    assert found(opened) == frame.filter(kind="conflict", relation="capital").height


def test_every_field_has_a_name_and_everything_scrollable_can_be_focused(drawn: Page) -> None:
    assert drawn.locator("form :is(select, input)").evaluate_all("(fields) => fields.every((f) => f.labels.length)")
    drawn.set_viewport_size({"width": 390, "height": 900})
    assert drawn.evaluate(
        "[...document.querySelectorAll('.scroll, pre')].filter((e) => e.scrollWidth > e.clientWidth)"
        ".every((e) => e.tabIndex === 0)"
    )


def test_text_has_contrast_in_light_and_dark(opened: Page) -> None:
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        assert opened.evaluate(_LOW_CONTRAST) == []


_LOW_CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return parts(colour)[3] === 0 && e.parentElement ? behind(e.parentElement) : colour;
  };
  const texts = [...document.body.querySelectorAll("*")].filter((e) =>
    !e.closest("script, .plot, :disabled") && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return texts.filter((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map((e) => e.tagName + " " + e.className);
}"""


def test_text_of_models_is_shown_as_it_is(browser_page: Page, tmp_path: Path) -> None:
    folder = write_gate(tmp_path)
    frame = read_examples(folder)
    assert frame is not None
    hostile = "</script><img src=x onerror=alert(1)> &amp; <b>bold</b>"
    write_examples(folder, frame.with_columns(answer=pl.lit(hostile), prompt=pl.lit(hostile)))
    write_report(folder / "report.html", read_runs([folder]))
    show(browser_page, folder / "report.html")
    assert browser_page.locator(".examples .prompt").first.inner_text() == hostile
    assert browser_page.locator(".examples q").first.inner_text() == hostile
    assert browser_page.locator("img, b").count() == 0


@pytest.mark.parametrize("kinds", [*((kind,) for kind in WRITERS), ("demo", "gate")], ids="+".join)
def test_a_page_draws_everything_fits_its_width_and_asks_the_network_for_nothing(
    browser_page: Page, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    asked = requests_of(browser_page)
    write_report(tmp_path / "report.html", read_runs([WRITERS[kind](tmp_path / kind) for kind in kinds]))
    show(browser_page, tmp_path / "report.html")
    all_drawn(browser_page)
    for width in WIDTHS:
        check_fits(browser_page, width)
    if kinds == ("demo",) or SCREENSHOTS:
        screenshots(browser_page, f"report-{'-'.join(kinds)}", all_drawn)
    assert not asked


def test_with_several_runs_the_browser_shows_the_chosen_one(browser_page: Page, tmp_path: Path) -> None:
    folders = [WRITERS[kind](tmp_path / kind) for kind in ("demo", "gate", "probes")]
    write_report(tmp_path / "report.html", read_runs(folders))
    show(browser_page, tmp_path / "report.html")
    choose(browser_page, relation="currency", run="gate", after="random gate, towards context", after_usage="context")
    frame = read_examples(folders[1])
    assert frame is not None
    kept = frame.filter(condition="random gate, towards context", kind="conflict", relation="currency", usage="context")
    assert found(browser_page) == kept.height > 0
    browser_page.get_by_role("link", name="gate").click()
    assert browser_page.url.endswith("#run2-headline")


def test_paper_has_all_tables_and_no_controls(drawn: Page) -> None:
    drawn.emulate_media(media="print")
    drawn.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert drawn.locator("details").evaluate_all("(all) => all.every((details) => details.open)")
    assert not drawn.locator(".filters, .pager button").first.is_visible()
    assert drawn.locator(".plot .main-svg").first.evaluate("(svg) => svg.clientWidth") == 660
    drawn.evaluate("dispatchEvent(new Event('afterprint'))")
    assert drawn.locator("details[open]").count() == 0
