import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from figures.heads import head_map
from figures.theme import DARK_THEME, LIGHT_THEME, percent, save_figure
from figures.usage import usage_bars
from interp.errors import UserError
from tests.figures.samples import MAP, rates


def test_a_theme_swap_changes_paper_and_text_but_no_data_colour() -> None:
    figure: Any = usage_bars({"unedited": rates(0.27, 0.40)})
    before = figure.to_plotly_json()["data"]
    assert figure.update_layout(template=DARK_THEME).to_plotly_json()["data"] == before
    light, dark = (theme.to_plotly_json()["layout"] for theme in (LIGHT_THEME, DARK_THEME))
    assert light["paper_bgcolor"] != dark["paper_bgcolor"]
    assert light["font"]["color"] != dark["font"]["color"]


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.004, "0.4%"), (0.266, "27%"), (0.9962, "99.6%"), (1.0, "100%")]
)
def test_percent_never_rounds_to_none_or_all(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [(".html", b"<!doctype html>|<html>"), (".png", b"\x89PNG"), (".svg", b"<svg"), (".pdf", b"%PDF")],
)
def test_a_figure_is_saved_as_what_its_name_says(tmp_path: Path, suffix: str, begins: bytes) -> None:
    if suffix != ".html" and not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("images need Chrome or Chromium")
    save_figure(head_map(MAP), tmp_path / f"map{suffix}")
    saved = (tmp_path / f"map{suffix}").read_bytes()
    assert re.match(begins, saved)
    assert suffix != ".html" or b'"showSendToCloud": false' in saved, "a button that uploads the figure"


def test_what_cannot_be_drawn_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"end the name in \.html"):
        save_figure(head_map(MAP), tmp_path / "map.txt")

    def no_browser(*_: Any, **__: Any) -> bytes:
        raise RuntimeError("Chrome is missing\nand more")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", no_browser)
    with pytest.raises(UserError, match=r"map.png cannot be drawn \(Chrome is missing\); install Chrome"):
        save_figure(head_map(MAP), tmp_path / "map.png")
    assert not list(tmp_path.iterdir())
