"""The leaderboard's page in a real browser, opened from the file system."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

from conflictscope.report import read_runs
from conflictscope.report.board import Board, board_of
from conflictscope.report.board_files import studies_below, write_board
from conflictscope.report.board_page import write_page
from conflictscope.study.record import UNEDITED, read_examples, write_examples
from tests import browser
from tests.browser import WIDTHS, check_fits, requests_of, screenshots, without_figures
from tests.conflictscope.board_samples import METHODS, write_plan, write_study

if TYPE_CHECKING:
    from playwright.sync_api import Page

chromium, browser_page = browser.chromium, browser.browser_page


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def board(plan: Path) -> Board:
    return board_of(read_runs(studies_below([plan])))


@pytest.fixture(scope="module")
def folder(board: Board, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    write_page(folder, board)
    return folder


@pytest.fixture(scope="module")
def undrawn(folder: Path) -> Path:
    return without_figures(folder / "leaderboard.html")


@pytest.fixture
def opened(browser_page: Page, undrawn: Path) -> Page:
    browser_page.goto(undrawn.as_uri())
    return browser_page


def choose(page: Page, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"#filters select[name={name}]").select_option(value)


def ranking(page: Page) -> list[str]:
    rows = page.locator("#ranked tbody").first.locator("tr:not(.group)")
    return rows.evaluate_all("(rows) => rows.map((row) => row.cells[0].firstChild.data)")


def points(share: float) -> str:
    return re.sub("^-", "\N{MINUS SIGN}", f"{round(100 * share) + 0:+d}").replace("+0", "0")


def all_drawn(page: Page) -> None:
    page.locator("figure:not([hidden]) .plot:not(:has(.main-svg))").first.wait_for(state="detached")


VIEWS = [
    {"towards": "context"},
    {"towards": "memory", "choice": "best"},
    {"towards": "context", "model": "tiny"},
    {"towards": "memory", "model": "small", "data": "currency"},
]


@pytest.mark.parametrize("asked", VIEWS, ids=lambda asked: "-".join(asked.values()))
def test_the_filters_show_the_view_that_is_asked_for(opened: Page, board: Board, asked: dict[str, str]) -> None:
    choose(opened, **{name: {"tiny": "1", "small": "0", "currency": "1"}.get(v, v) for name, v in asked.items()})
    view = board.view(**asked)  # type: ignore[arg-type]
    assert view is not None
    wanted = [n for r in view.rows for n in (r.name, *(c.name for c in view.controls if c.control_of == r.method))]
    assert ranking(opened) == wanted
    for number, row in enumerate(row for row in (view.rows[0], view.controls[0])):
        cells = opened.locator("#ranked tbody").first.locator("tr:not(.group)").nth(number).locator("td")
        gain = row.numbers.gain
        assert cells.nth(1).inner_text() == ("\N{EN DASH}" if row.rank is None else str(row.rank))
        said = f"{points(gain.value)} {points(gain.low)} to {points(gain.high)}"
        assert " ".join(cells.nth(2).inner_text().split()) == said
    assert opened.locator("#heat thead th").count() == 1 + len(view.blocks)
    assert opened.locator("#heat tbody th").all_inner_texts() == [row.name for row in view.rows]
    assert opened.locator("#figure-ranks").is_visible() == (not isinstance(view.ranks, str))
    said = opened.locator("#said").inner_text()
    assert said == view.ranks if isinstance(view.ranks, str) else f"p = {view.ranks.p:.3f}" in said


def test_a_reason_is_shown_for_what_did_not_run_and_what_does_not_fit(opened: Page) -> None:
    text = opened.locator("#ranked").inner_text()
    assert "It needs <both> sources & more." in text
    assert "currency, small, seeds 0, 1" in text
    assert "applied in 6 of 8 studies" in text
    assert "ablation of another method" in text
    heat = opened.locator("#heat")
    assert heat.get_by_text("not run").count() == 1
    assert heat.get_by_text("nothing fits: 1 of 2").count() == 2


def test_a_click_on_a_columns_name_sorts_by_it(opened: Page, board: Board) -> None:
    view = board.view("context")
    assert view is not None
    opened.get_by_role("button", name="Gain", exact=True).click()
    order = [name for name in ranking(opened) if "random" not in name]
    assert order == [row.name for row in sorted(view.rows, key=lambda row: -row.numbers.gain.value)]


def answers(plan: Path, study: str, method: str) -> pl.DataFrame:
    examples = read_examples(plan / "studies" / study)
    assert examples is not None
    after = examples.filter(condition=f"{method}, towards context").select("id", after="usage", after_answer="answer")
    rows = examples.filter(condition=UNEDITED, kind="conflict")
    return rows.join(after, on="id", maintain_order="left")


SORTS = {
    "all": pl.lit(True),
    "changed": pl.col("usage") != pl.col("after"),
    "gained": (pl.col("usage") != "context") & (pl.col("after") == "context"),
    "lost": (pl.col("usage") == "context") & (pl.col("after") != "context"),
}


@pytest.mark.parametrize("key", ["Enter", "click"])
def test_a_cell_opens_the_prompts_behind_it(opened: Page, plan: Path, key: str) -> None:
    asked = requests_of(opened)
    cell = opened.get_by_role("button", name=re.compile("caa on capital, tiny: gain"))
    if key == "click":
        cell.click()
    else:
        cell.focus()
        opened.keyboard.press(key)
    dialog = opened.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text() == "caa towards context · tiny · capital"
    for seed in (0, 1):
        dialog.get_by_label("Seed").select_option(label=f"seed {seed}")
        frame = answers(plan, f"tiny/capital/{seed}", "caa")
        dialog.get_by_text(f"of {frame.height} prompts").wait_for()
        for which, fits in SORTS.items():
            dialog.locator("select[name=which]").select_option(which)
            kept = frame.filter(fits)
            assert dialog.locator(".pager span").inner_text().endswith(f"of {kept.height}" if kept.height else "none")
            assert dialog.locator(".prompt").all_inner_texts() == kept["prompt"].to_list()[:20]
    first = frame.row(0, named=True)
    dialog.locator("select[name=which]").select_option("all")
    said = [" ".join(text.split()) for text in dialog.locator("li").first.locator("dd").all_inner_texts()]
    assert said[:2] == [" / ".join(first["memory_answers"]), " / ".join(first["context_answers"])]
    assert said[2].startswith(f"{first['usage']} {first['answer']}")
    assert said[3].startswith(f"{first['after']} {first['after_answer']}")
    opened.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert not asked, "nothing comes over the network"


def test_prompts_without_a_conflict_are_shown_too(opened: Page, plan: Path) -> None:
    opened.get_by_role("button", name=re.compile("pruning on capital, tiny: gain")).click()
    dialog = opened.get_by_role("dialog")
    dialog.locator("select[name=kind] option").nth(1).wait_for(state="attached")
    dialog.get_by_label("Context").select_option("none")
    dialog.locator("select[name=which]").select_option("lost")
    examples = read_examples(plan / "studies/tiny/capital/0")
    assert examples is not None
    after = examples.filter(condition="pruning, towards context").select("id", after="usage")
    lost = examples.filter(condition=UNEDITED, kind="none", usage="memory").join(
        after.filter(pl.col("after") != "memory"), on="id", maintain_order="left"
    )
    assert dialog.locator(".prompt").all_inner_texts() == lost["prompt"].to_list()[:20]
    assert lost.height


def test_where_nothing_fits_the_dialog_says_that_no_answer_changes(opened: Page) -> None:
    opened.get_by_role("button", name=re.compile("^spare on capital, tiny")).click()
    dialog = opened.get_by_role("dialog")
    dialog.get_by_label("Seed").select_option(label="seed 1")
    dialog.get_by_text("Nothing of this method fits the budget here").wait_for()
    assert dialog.locator("li").count() == 0


def test_answers_that_are_not_beside_the_page_are_missed_in_a_sentence(chromium, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "leaderboard.html", tmp_path)
    # A file that is not there is an error in the console, too.
    page = chromium.new_page()
    page.goto((tmp_path / "leaderboard.html").as_uri())
    page.locator("#heat td button").first.click()
    page.get_by_text(re.compile(r"answers-\d+.js is not beside this page; keep them in one folder")).wait_for()
    page.close()


def test_text_of_models_and_data_is_shown_as_it_is(browser_page: Page, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)> &amp; <b>bold</b>"
    study = write_study(
        tmp_path / "study", model="<i>model</i>", not_run={"caa": hostile}, methods={"pruning": METHODS["pruning"]}
    )
    frame = read_examples(study)
    assert frame is not None
    write_examples(study, frame.with_columns(answer=pl.lit(hostile), prompt=pl.lit(hostile)))
    write_board(tmp_path / "out", [study])
    browser_page.goto((tmp_path / "out/leaderboard.html").as_uri())
    assert hostile in browser_page.locator("#ranked").inner_text()
    browser_page.locator("#heat td button").first.click()
    prompt = browser_page.get_by_role("dialog").locator(".prompt").first
    prompt.wait_for()
    assert prompt.inner_text() == hostile
    assert browser_page.locator("dialog q").first.inner_text() == hostile
    assert browser_page.locator("dialog h2").inner_text().startswith("pruning towards context · <i>model</i>")
    assert browser_page.locator("img, b, i").count() == 0


def test_prompts_are_stored_once_a_study_and_not_in_the_page(folder: Path, plan: Path) -> None:
    frame = answers(plan, "small/capital/0", "caa")
    prompt = frame["prompt"][0]
    text = (folder / "answers-0.js").read_text(encoding="ascii")
    found = re.fullmatch(r"\(globalThis\.answers \?\?= \{\}\)\[0\] = (.*);\n", text)
    assert found is not None
    record = json.loads(found[1])
    assert record["prompts"]["prompt"].count(prompt) == 1
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    assert json.dumps(prompt)[1:-1] not in page


def test_the_page_says_what_is_missing_and_not_finished(browser_page: Page, tmp_path: Path) -> None:
    for name, about in {
        "a": {},
        "b": {"seed": 1},
        "c": {"model": "new", "to_come": ("spare",), "quick": False},
    }.items():
        write_study(tmp_path / name, methods={"pruning": METHODS["pruning"]}, **about)
    write_board(tmp_path / "out", [tmp_path])
    browser_page.goto((tmp_path / "out/leaderboard.html").as_uri())
    notes = " ".join(browser_page.locator("header .note").all_inner_texts())
    assert "missing: new on capital with seed 1." in notes
    assert "still to come for new on capital with seed 0." in notes


def test_the_page_fits_its_width_light_and_dark_and_loads_nothing(browser_page: Page, folder: Path) -> None:
    asked = requests_of(browser_page)
    browser_page.goto((folder / "leaderboard.html").as_uri())
    all_drawn(browser_page)
    for width in WIDTHS:
        check_fits(browser_page, width)
    screenshots(browser_page, "leaderboard", all_drawn)
    browser_page.set_viewport_size({"width": WIDTHS[1], "height": 900})
    browser_page.locator("#heat td button").first.click()
    browser_page.get_by_role("dialog").locator(".prompt").first.wait_for()
    box = browser_page.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= WIDTHS[1]
    assert not asked
