from __future__ import annotations

import http.client
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from conflictscope.cli.explore import Explored, explore
from conflictscope.cli.options import Form
from conflictscope.explore.looks import Asked, Edit, Explorer, examples
from conflictscope.explore.page import Listening, build_app, listening
from figures.theme import percent
from interp.errors import UserError
from tests.browser import requests_of, screenshots
from tests.conflictscope.explore.test_looks import explorer_of

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["tests.browser"]

FIRST = next(iter(examples().values()))
ASKED = Asked("The capital of Norway is", "The capital of Norway is Quito.", "Oslo", "Quito")
NO_DETECTOR = "There is no conflict detector here."


@pytest.fixture(scope="module")
def explorer(tiny_llama: Any) -> Explorer:
    return explorer_of(tiny_llama)


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    with listening(build_app(explorer), "127.0.0.1", 0) as server:
        yield server.address


@pytest.fixture
def page(browser_page: Page, address: str) -> Page:
    """The page after its first look."""
    browser_page.goto(address)
    browser_page.locator("#answers table").wait_for()
    return browser_page


def until(read: Callable[[], Any], expected: Any) -> None:
    """Wait for what the page shows to be right; what it shows after ten seconds must be."""
    end = time.monotonic() + 10
    while time.monotonic() < end and read() != expected:
        time.sleep(0.1)
    assert read() == expected


def answers(page: Page) -> list[list[str]]:
    """The cells of the table of answers."""
    rows = page.locator("#answers tbody tr").all()
    return [row.locator("td").all_inner_texts() for row in rows]


def expected_answers(explorer: Explorer, asked: Asked, edit: Edit | None = None) -> list[list[str]]:
    look = explorer.look(asked, edit)
    readings = [r for r in (look.unedited, look.edited) if r]
    closed = [f"{r.closed_book or '(nothing)'}{r.closed_book_usage}" for r in readings]
    read = [f"{r.with_context or '(nothing)'}{r.with_context_usage}" for r in readings]
    shares = [[percent(r.lens.log_probabilities[0, -1, i].exp().item()) for r in readings if r.lens] for i in (0, 1)]
    return [closed, read, *(shares if look.unedited.lens else [])]


def same_text(page: Page, explorer: Explorer, asked: Asked, edit: Edit | None = None) -> None:
    """The page shows these answers; how browsers write white space does not matter."""

    def bare(rows: list[list[str]]) -> list[list[str]]:
        return [[re.sub(r"\s", "", cell) for cell in row] for row in rows]

    until(lambda: bare(answers(page)), bare(expected_answers(explorer, asked, edit)))


def traces(page: Page, figure: str) -> list[dict[str, Any]]:
    """What plotly was given to draw."""
    script = f"""() => (document.querySelector('#{figure} .js-plotly-plot').data || []).map(
        t => ({{name: t.name, y: t.y && [...t.y], z: t.z && t.z.map(row => [...row]), x: t.x && [...t.x]}}))"""
    return page.evaluate(script)


def race(page: Page) -> dict[str, list[float]]:
    return {trace["name"]: [round(y, 5) for y in trace["y"]] for trace in traces(page, "race")}


def expected_race(explorer: Explorer, asked: Asked, edit: Edit | None = None) -> dict[str, list[float]]:
    look = explorer.look(asked, edit)
    lines: dict[str, list[float]] = {}
    for label, reading in {"unedited": look.unedited, "edited": look.edited}.items():
        if reading is not None and reading.lens is not None:
            logs = reading.lens.log_probabilities[0].double()
            for number, source in enumerate(("context", "memory")):
                lines[f"{source} answer, {label}"] = [round(p, 5) for p in logs[:, number].exp().tolist()]
            difference = (logs[:, 0] - logs[:, 1]).tolist()
            lines[f"context - memory, {label}"] = [round(d, 5) for d in difference]
    return lines


def said(page: Page) -> list[str]:
    """The tokens that the token-by-token view shows, in bold."""
    script = "document.querySelector('#steps .js-plotly-plot').layout.annotations.map(a => a.text)"
    return [re.findall("<b>(.*?)</b> (.*?)<br>", text)[0][1] for text in page.evaluate(script)]


def expected_said(explorer: Explorer, asked: Asked, edit: Edit | None = None) -> list[str]:
    look = explorer.look(asked, edit)
    return [percent(step.probability) for r in (look.unedited, look.edited) if r for step in r.steps]


def choose(page: Page, dropdown: str, option: str) -> None:
    page.locator(f"#{dropdown}").click()
    page.get_by_role("option", name=option, exact=True).click()


def press(page: Page, slider: str, key: str, times: int) -> None:
    page.locator(f"#{slider} [role=slider]").focus()
    for _ in range(times):
        page.keyboard.press(key)


def test_the_page_shows_its_first_example_and_asks_no_other_host(browser_page, address, explorer):
    asked = requests_of(browser_page)
    browser_page.goto(address)
    browser_page.locator("#answers table").wait_for()
    same_text(browser_page, explorer, FIRST)
    until(lambda: race(browser_page), expected_race(explorer, FIRST))
    assert asked
    assert not [url for url in asked if not url.startswith(f"{address}/")]
    detection = explorer.look(FIRST).detection
    assert browser_page.locator("#conflict-probability").inner_text() == percent(detection.conflict_probability)


def test_typing_and_looking_shows_what_the_library_says(page, explorer):
    for name, text in vars(ASKED).items():
        page.locator(f"#{name}").fill(text)
    page.get_by_role("button", name="Look").click()
    same_text(page, explorer, ASKED)
    until(lambda: race(page), expected_race(explorer, ASKED))
    assert said(page) == expected_said(explorer, ASKED)
    heads = explorer.look(ASKED).heads
    assert traces(page, "head-map")[0]["z"] == [pytest.approx(row, abs=1e-6) for row in heads.mean().tolist()]
    assert page.locator("#prompt").inner_text() == explorer.look(ASKED).example.prompt


def test_an_example_is_filled_in_and_asked_by_one_click(page, explorer):
    label, asked = list(examples().items())[1]
    page.get_by_role("button", name=label).click()
    same_text(page, explorer, asked)
    for name, text in vars(asked).items():
        assert page.locator(f"#{name}").input_value() == text


def test_an_intervention_and_its_slider_change_answers_race_and_tokens(page, explorer):
    choose(page, "intervention", "heads")
    same_text(page, explorer, FIRST, Edit("heads", 1.0))
    assert page.locator("#dose-label").inner_text() == "Strength"
    press(page, "dose", "ArrowLeft", 10)
    until(lambda: race(page), expected_race(explorer, FIRST, Edit("heads", 0.5)))
    same_text(page, explorer, FIRST, Edit("heads", 0.5))
    assert said(page) == expected_said(explorer, FIRST, Edit("heads", 0.5))
    choose(page, "intervention", "dial")
    same_text(page, explorer, FIRST, Edit("dial", 0.5))
    assert page.locator("#dose-label").inner_text() == "Trust"
    press(page, "dose", "Home", 1)
    until(lambda: race(page), expected_race(explorer, FIRST, Edit("dial", -1.0)))


def test_a_chosen_head_shows_its_attention_and_is_scaled(page, explorer):
    choose(page, "head", "2.1")
    weights = explorer.attention(FIRST, [(2, 1)]).weights[0]
    relative = (weights / weights[1:].max()).clamp(max=1).tolist()
    until(lambda: traces(page, "attention")[0]["x"], ["2.1"])
    shown = [row[0] for row in traces(page, "attention")[0]["z"]]
    assert shown == pytest.approx(relative, abs=1e-6)
    assert "Head 2.1" in page.locator("#attention-of").inner_text()
    press(page, "scale", "ArrowLeft", 10)
    until(lambda: race(page), expected_race(explorer, FIRST, Edit(head=(2, 1), scale=0.0)))
    same_text(page, explorer, FIRST, Edit(head=(2, 1), scale=0.0))


def test_a_click_on_the_map_chooses_that_head(page):
    area = page.locator("#head-map .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    # Three layers of four heads: the third head of the lowest layer.
    page.mouse.click(box["x"] + box["width"] * 2.5 / 4, box["y"] + box["height"] * 2.5 / 3)
    until(lambda: page.locator("#head-value").inner_text(), "0.2")
    until(lambda: traces(page, "attention")[0]["x"], ["0.2"])


def test_wrong_input_is_answered_by_a_sentence_and_right_input_after_it_by_a_look(page, explorer):
    page.locator("#context").fill("")
    page.locator("#question").press("Enter")
    until(lambda: page.get_by_role("alert").inner_text()[:20], "There is no context;")
    assert page.locator("#results").is_hidden()
    page.locator("#context").fill(FIRST.context)
    page.locator("#question").press("Enter")
    until(lambda: page.locator("#message").inner_text(), "")
    same_text(page, explorer, FIRST)
    assert page.locator("#results").is_visible()


def test_answers_that_cannot_race_leave_the_rest_of_the_page(page):
    page.locator("#context_answer").fill(FIRST.memory_answer)
    page.locator("#context_answer").press("Enter")
    page.get_by_text("Memory and context both answer").wait_for()
    assert page.locator("#race").is_hidden()
    assert page.locator("#head-map").is_hidden()
    assert page.locator("#steps").is_visible()
    page.get_by_text("Choose a head to see").wait_for()
    choose(page, "head", "1.2")
    page.locator("#attention").wait_for()


def test_what_fails_unexpectedly_is_said_without_a_traceback(page, explorer, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(explorer, "look", fail)
    page.get_by_role("button", name="Look").click()
    until(lambda: page.get_by_role("alert").inner_text(), "That could not be computed; the terminal says why.")


def test_every_input_has_a_name(page):
    for name in ("Question", "Context", "Context answer", "Memory answer"):
        assert page.get_by_role("textbox", name=name, exact=True).is_visible()
    for name in ("Strength", "Scale of that head"):
        assert page.get_by_role("slider", name=name).is_visible()
        assert page.get_by_role("spinbutton", name=name).is_visible()
    for name in ("Intervention", "Head (layer.head)"):
        assert page.get_by_role("group", name=name).is_visible()


def test_screenshots(page, explorer):
    def edit(page: Page) -> None:
        choose(page, "intervention", "heads")
        choose(page, "head", "2.1")
        until(lambda: race(page), expected_race(explorer, FIRST, Edit("heads", 1.0)))
        until(lambda: traces(page, "attention")[0]["x"], ["2.1"])

    screenshots(page, "explore", edit)


def test_without_a_detector_the_page_says_how_to_get_one(tiny_llama, browser_page):
    app = build_app(Explorer(tiny_llama, name="tiny"), no_detector=NO_DETECTOR)
    with listening(app, "127.0.0.1", 0) as server:
        browser_page.goto(server.address)
        browser_page.get_by_text(NO_DETECTOR).wait_for()
        assert browser_page.get_by_text("No file is loaded; start with --config FILE").is_visible()


# The server


def test_what_names_another_host_is_refused(address):
    assert httpx.get(address).status_code == 200
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{address}/_dash-layout", headers={"Host": "evil.example:8050"}).status_code == 403


def test_a_page_for_others_takes_any_host(explorer):
    with listening(build_app(explorer, local_only=False), "127.0.0.1", 0) as server:
        assert httpx.get(server.address, headers={"Host": "studio.example"}).status_code == 200


def test_the_browser_is_told_to_load_nothing_from_elsewhere(address):
    policy = httpx.get(address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; script-src 'self' 'sha256-")
    assert "http" not in policy
    assert "'unsafe-inline'" not in policy.split(";")[1]


def test_bodies_that_are_too_large_are_refused(address):
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.putrequest("POST", "/_dash-update-component")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(2**30))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_port_that_is_taken_is_said_in_a_sentence(explorer, address):
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(UserError, match="give another --port"), listening(build_app(explorer), "127.0.0.1", port):
        pass


# The command


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "studio.example"])
def test_an_address_that_others_reach_is_refused_unless_it_is_meant(host):
    with pytest.raises(UserError, match="add --public if that is meant"):
        explore(host=host, form=Form(), explored=Explored())


def test_the_command_serves_the_page_until_it_is_interrupted(tiny_directories, monkeypatch):
    found: list[str] = []
    waits, wait = threading.Event(), Listening.wait

    def ask_and_interrupt(said: str) -> None:
        try:
            found.append(httpx.get(said.split()[1]).text)
        finally:
            waits.wait(60)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def say(said: str) -> None:
        threading.Thread(target=ask_and_interrupt, args=(said,)).start()

    def waiting(server: Listening) -> None:
        waits.set()
        wait(server)

    monkeypatch.setattr("conflictscope.cli.explore.say", say)
    monkeypatch.setattr(Listening, "wait", waiting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        explore(port=0, form=Form(), explored=Explored(str(tiny_directories["llama"]), device="cpu"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert "ConflictScope" in found[0]
