"""Progress bars: shown on standard error of a terminal, gone at the end, and all of them can be turned off."""

from __future__ import annotations

import logging

import pytest

from interp.progress import SWITCH, counted, tracked


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich takes for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_a_bar_is_shown_on_standard_error(terminal, capsys):
    assert list(tracked("abc", "Letters")) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert "Letters" in shown.err
    assert not shown.out


def test_work_is_counted_from_where_it_stopped(terminal, capsys):
    with counted("Prompts", 4, done=2) as advance:
        advance(1)
    assert "75%" in capsys.readouterr().err


@pytest.mark.parametrize(("label", "switch"), [(None, "on"), ("Letters", "off")])
def test_a_bar_without_a_label_or_turned_off_is_not_shown(terminal, monkeypatch, capsys, label, switch):
    monkeypatch.setenv(SWITCH, switch)
    assert list(tracked(iter("abc"), label)) == ["a", "b", "c"]
    with counted(label, 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No terminal, and the time in seconds: what stands in the list."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    now = [0.0]
    monkeypatch.setattr("interp.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("interp.progress._Lines.last", 0.0)
    return now


def test_short_work_says_nothing_where_there_is_no_terminal(clock, capsys):
    list(tracked("abc", "Letters"))
    assert capsys.readouterr().err == ""


def test_long_work_says_in_lines_how_far_it_is_where_there_is_no_terminal(clock, capsys):
    for clock[0], letter in zip((0, 20, 31, 40, 61.5), tracked("abcde", "Letters [a/b]"), strict=True):
        assert letter in "abcde"
    with counted("Waiting"):
        clock[0] = 200
    with counted("Waiting still"):
        clock[0] = 300
    with counted("More", 7, done=2) as advance:
        advance(1)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "Letters [a/b]: 3 of 5",
        "Letters [a/b]: 5 of 5",
        "Waiting still",
        "More: 2 of 7",
    ]
    assert not shown.out


def test_what_a_bar_would_say_is_logged(monkeypatch, caplog):
    monkeypatch.setenv(SWITCH, "off")
    with caplog.at_level(logging.INFO, "interp.progress"):
        list(tracked("abc", "Letters"))
    assert [record.getMessage() for record in caplog.records] == ["Letters"]
