from typing import Any

import polars as pl
import pytest

from figures.features import difference_bars, feature_view
from figures.theme import CONTEXT_COLOUR, DARK_THEME, MEMORY_COLOUR, OTHER_COLOUR
from probes.feature_views import FeatureView
from tests.figures.samples import trace

LONG = " ".join(f"word{i}" for i in range(100))


def view(prompts: list[dict[str, Any]]) -> FeatureView:
    schema = {"activation": pl.Float64} | dict.fromkeys(("usage", "relation", "template", "text"), pl.String)
    return FeatureView(
        layer=16,
        feature=4026,
        frequency=0.625,
        prompts=pl.DataFrame(prompts, schema=schema),
        by_source=pl.DataFrame(
            {
                "usage": ["memory", "context", "other"],
                "prompts": [90, 70, 8],
                "frequency": [0.5, 0.75, 0.25],
                "mean": [1.0, 3.0, 0.5],
                "low": [0.8, 2.9, 0.0],
                "high": [1.1, 3.3, 1.0],
            }
        ),
        promoted=pl.DataFrame({"token": ["<b>", "yes"], "effect": [2.0, 1.5]}),
        suppressed=pl.DataFrame({"token": ["n" * 40], "effect": [-1.0]}),
    )


PROMPTS = [
    {"activation": 9.0, "usage": "context", "relation": "capital", "template": "note", "text": 'A <"q">\nB'},
    {"activation": 8.5, "usage": "memory", "relation": "capital", "template": "note", "text": LONG},
    {"activation": 4.0, "usage": None, "relation": "capital", "template": "note", "text": "A"},
]


def text_with(figure: Any, part: str) -> str:
    return next(a.text for a in figure.layout.annotations if part in a.text)


@pytest.mark.parametrize(
    ("usage", "colour", "mean", "interval"),
    [("memory", MEMORY_COLOUR, 1.0, (0.2, 0.1)), ("context", CONTEXT_COLOUR, 3.0, (0.1, 0.3))],
)
def test_a_feature_has_its_mean_and_interval_by_source(
    usage: str, colour: str, mean: float, interval: tuple[float, float]
) -> None:
    point = trace(feature_view(view(PROMPTS)), name=usage)
    assert (list(point.x), point.marker.color, point.error_x.color) == ([mean], colour, colour)
    assert (point.error_x.arrayminus[0], point.error_x.array[0]) == pytest.approx(interval)


def test_a_feature_says_how_often_it_fires() -> None:
    figure = feature_view(view(PROMPTS))
    assert "feature 4026</b>, fires for 62%" in text_with(figure, "layer 16")
    assert "fires for 75% of 70 prompts" in text_with(figure, "<b>context</b>")


def test_the_prompts_of_a_feature_lie_on_bars_in_the_colour_of_their_source() -> None:
    bars = trace(feature_view(view(PROMPTS)), name="prompts")
    assert list(bars.x) == [9.0, 8.5, 4.0]
    assert list(bars.marker.line.color) == [CONTEXT_COLOUR, MEMORY_COLOUR, OTHER_COLOUR]


def test_a_short_prompt_is_shown_as_it_is_with_its_line_break() -> None:
    text = text_with(feature_view(view(PROMPTS)), "9.00")
    assert text == '<b>9.00</b> context · capital · note<br>A &lt;"q"&gt; ↵ B'


def test_a_long_prompt_keeps_its_start_and_its_end_and_is_whole_on_hover() -> None:
    figure = feature_view(view(PROMPTS))
    text = text_with(figure, "8.50")
    assert "word0 " in text
    assert text.endswith("word99")
    assert "… " in text
    assert max(len(line) for line in text.split("<br>")) <= 60
    assert all(f"word{i}" in trace(figure, name="prompts").hovertext[1] for i in range(100))


def test_no_two_prompts_of_a_feature_overlap_and_all_lie_in_their_panel() -> None:
    figure: Any = feature_view(view(PROMPTS))
    bars, (bottom, top) = trace(figure, name="prompts"), figure.layout.yaxis2.range
    edges = [edge for y, width in zip(bars.y, bars.width, strict=True) for edge in (y - width / 2, y + width / 2)]
    assert [top, *edges, bottom] == sorted([top, *edges, bottom])


def test_the_panels_of_a_feature_do_not_overlap() -> None:
    layout: Any = feature_view(view(PROMPTS)).layout
    domains = [layout[name].domain for name in ("yaxis3", "yaxis2", "yaxis")]
    edges = [edge for domain in domains for edge in domain]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (0, 1)


def test_a_prompt_without_a_judged_answer_says_so() -> None:
    assert "not judged" in text_with(feature_view(view(PROMPTS)), "4.00")


def test_a_feature_that_never_fires_says_so() -> None:
    figure = feature_view(view([]))
    assert text_with(figure, "none of the prompts")
    assert list(trace(figure, name="prompts").x) == []


def test_tokens_stand_on_the_other_side_of_their_bars() -> None:
    figure = feature_view(view(PROMPTS))
    promoted, suppressed = (trace(figure, name=name, type="bar") for name in ("promoted", "suppressed"))
    assert (list(promoted.x), list(suppressed.x)) == ([2.0, 1.5], [-1.0])
    right, left = (trace(figure, name=name, type="scatter") for name in ("promoted", "suppressed"))
    assert [right.textposition, left.textposition] == ["middle left", "middle right"]
    assert right.text[0] == " &lt;b&gt; "
    assert left.text[0] == f" {'n' * 19}… "
    assert list(right.y) == list(promoted.y)


def test_a_theme_swap_changes_no_data_colour() -> None:
    figure: Any = feature_view(view(PROMPTS))
    before = figure.to_plotly_json()["data"]
    assert figure.update_layout(template=DARK_THEME).to_plotly_json()["data"] == before


def test_differences_reach_to_the_side_on_which_a_feature_is_larger() -> None:
    sides = {"one": [1.0, 3.0], "other": [4.0, 2.0], "fires_one": [0.5, 1.0], "fires_other": [1.0, 1.0]}
    bounds = {"difference": [3.0, -1.0], "low": [2.5, -1.5], "high": [3.5, -0.5]}
    table = pl.DataFrame({"layer": [16, 16], "feature": [7, 9], **sides, **bounds})
    figure: Any = difference_bars(table, "<base>", "tuned")
    bars = trace(figure, type="bar")
    assert list(bars.x) == [3.0, -1.0]
    assert list(bars.y) == ["feature 7", "feature 9"]
    assert bars.marker.color[0] != bars.marker.color[1]
    assert list(bars.error_x.array) == pytest.approx([0.5, 0.5])
    assert "&lt;base&gt;: mean 1.000, fires for 50%" in bars.hovertext[0]
    assert "&lt;base&gt;" in figure.layout.xaxis.title.text
