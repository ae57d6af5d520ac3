import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.plots import (
    CONTEXT_COLOUR,
    DARK_THEME,
    LIGHT_THEME,
    MEMORY_COLOUR,
    damage_fronts,
    dial_curve,
    dose_response,
    gain_and_damage,
    head_map,
    percent,
    save_figure,
    top_heads_bars,
    top_heads_by_group,
    usage_bars,
    usage_by_template,
)
from interp.statistics import Estimate


def rates(memory: float, context: float, **more: float) -> dict[str, Estimate]:
    values = {"memory_rate": memory, "context_rate": context, "other_rate": 1 - memory - context, **more}
    return {name: Estimate(value, value - 0.02, value + 0.03, 120) for name, value in values.items()}


def head_scores(mean: list[list[float]]) -> HeadScores:
    """Scores of two subjects that spread by 0.1 around ``mean``."""
    spread = torch.tensor([-0.1, 0.1])[:, None, None]
    return HeadScores(
        torch.tensor(mean) + spread, ("a", "b"), ("A", "B"), "path_patching", "logit_diff", "m", "d", {"unit": "logits"}
    )


MAP = head_scores([[0.0, -3.0], [0.5, 0.05], [0.0, 2.0]])


def trace(figure: Any, **properties: Any) -> Any:
    return next(t for t in figure.data if all(getattr(t, name) == value for name, value in properties.items()))


def test_usage_bars_hold_rate_and_interval_in_the_colour_of_the_source() -> None:
    figure: Any = usage_bars({"unedited": rates(0.27, 0.40), "pruned": rates(0.03, 0.93)})
    memory, context = trace(figure, type="bar", name="memory"), trace(figure, type="bar", name="context")
    assert (list(memory.x), list(context.x)) == ([0.27, 0.03], [0.40, 0.93])
    assert (memory.marker.color, context.marker.color) == (MEMORY_COLOUR, CONTEXT_COLOUR)
    assert list(memory.error_x.array) == pytest.approx([0.03, 0.03])
    assert list(memory.error_x.arrayminus) == pytest.approx([0.02, 0.02])


def test_usage_bars_show_empty_answers_where_there_are_some() -> None:
    some: Any = usage_bars(
        {"unedited": rates(0.27, 0.40, empty_rate=0.0), "pruned": rates(0.03, 0.93, empty_rate=0.02)}
    )
    assert list(trace(some, type="bar", name="empty").x) == [0.0, 0.02]
    none: Any = usage_bars({"unedited": rates(0.27, 0.40, empty_rate=0.0), "pruned": rates(0.03, 0.93, empty_rate=0.0)})
    older: Any = usage_bars({"unedited": rates(0.27, 0.40), "pruned": rates(0.03, 0.93, empty_rate=0.02)})
    for figure in (none, older):
        assert [bar.name for bar in figure.data if bar.type == "bar"] == ["memory", "context", "other"]


def test_usage_bars_put_the_first_condition_on_top() -> None:
    figure: Any = usage_bars({"unedited": rates(0.27, 0.40), "pruned": rates(0.03, 0.93)})
    bottom, top = figure.layout.yaxis.range
    first, second = trace(figure, type="bar", name="memory").y
    assert top < first < second < bottom


def test_usage_bars_say_value_interval_and_n_on_hover() -> None:
    text = trace(usage_bars({"unedited": rates(0.27, 0.40)}), type="bar", name="context").hovertext[0]
    assert "unedited" in text
    assert "context rate 40.0% [38.0, 43.0]" in text
    assert "n = 120 prompts" in text


@pytest.mark.parametrize("plot", [usage_bars, lambda c: usage_by_template({label: {"t": r} for label, r in c.items()})])
def test_estimates_and_their_records_give_the_same_figure(plot: Callable[[Any], Any]) -> None:
    estimates = rates(0.27, 0.40)
    records = {name: estimate.to_record() for name, estimate in estimates.items()}
    assert plot({"unedited": estimates}).to_json() == plot({"unedited": records}).to_json()


def test_a_usage_report_is_plotted_by_its_own_rates() -> None:
    frame = pl.DataFrame(
        {"usage": ["memory", "context", "context", "other"], "subject": list("abcd"), "template": ["s", "s", "q", "q"]}
    )
    report = UsageReport(frame)
    assert list(trace(usage_bars({"unedited": report}), type="bar", name="context").x) == [0.5]
    assert list(trace(usage_by_template({"unedited": report}), name="memory").x) == [0.5, 0.0]


def test_labels_are_not_taken_for_markup() -> None:
    figure: Any = usage_bars({"<b>x</b>": rates(0.27, 0.40)})
    assert figure.layout.annotations[0].text == "<b>&lt;b&gt;x&lt;/b&gt;</b>"


def test_usage_by_template_marks_the_held_out_family() -> None:
    by_template = {"statement": rates(0.2, 0.5), "according_to": rates(0.3, 0.4)}
    figure: Any = usage_by_template({"unedited": by_template}, held_out=["according_to"])
    assert [a.text for a in figure.layout.annotations] == ["<b>statement</b>", "<b>according_to (held out)</b>"]
    assert list(trace(figure, name="context").x) == [0.5, 0.4]


def test_head_map_has_layers_as_rows_and_memory_on_the_blue_end() -> None:
    figure: Any = head_map(MAP)
    heat = trace(figure, type="heatmap")
    assert [list(row) for row in heat.z] == [pytest.approx(row) for row in MAP.mean().tolist()]
    assert figure.layout.xaxis.title.text == "head"
    assert figure.layout.yaxis.title.text == "layer"
    colours = figure.layout.template.layout.coloraxis.colorscale
    assert (colours[0], colours[-1]) == ((0, MEMORY_COLOUR), (1, CONTEXT_COLOUR))
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax == pytest.approx(-3.0)


def test_head_map_says_direction_interval_and_n_on_hover() -> None:
    text = trace(head_map(MAP), type="heatmap").hovertext[0][1]
    assert "head 0.1" in text
    assert "towards memory" in text
    assert "-3.000 [-3.100, -2.900]" in text
    assert "logits" in text
    assert "n = 2 examples of 2 subjects" in text


def test_head_map_marks_edited_heads_and_those_whose_interval_excludes_zero() -> None:
    figure: Any = head_map(MAP, highlighted=[(2, 1)])
    edited, certain = trace(figure, name="edited"), trace(figure, name="interval excludes 0")
    assert list(zip(edited.y, edited.x, strict=True)) == [(2, 1)]
    assert set(zip(certain.y, certain.x, strict=True)) == {(0, 1), (1, 0), (2, 1)}


def test_head_map_refuses_a_head_of_another_model() -> None:
    with pytest.raises(UserError, match=r"7\.0 is not among these scores of 3 layers x 2 heads"):
        head_map(MAP, highlighted=[(7, 0)])


def test_top_heads_run_from_context_to_memory() -> None:
    figure: Any = top_heads_bars(MAP, 2)
    bars = trace(figure, type="bar")
    assert list(bars.y) == ["2.1", "1.0", "0.1"]
    assert list(bars.x) == pytest.approx([2.0, 0.5, -3.0])
    assert list(bars.marker.color) == [CONTEXT_COLOUR, CONTEXT_COLOUR, MEMORY_COLOUR]
    assert list(bars.error_x.array) == pytest.approx([0.1] * 3, abs=1e-6)
    assert figure.layout.yaxis.autorange == "reversed"


def test_the_front_steps_between_the_edits_that_no_other_beats() -> None:
    baseline = rates(0.27, 0.40, closed_book_accuracy=0.95)
    edits: dict[str, Any] = {
        "best": {"context": rates(0.0, 0.9, closed_book_accuracy=0.8)},
        "beaten": {"context": rates(0.0, 0.7, closed_book_accuracy=0.75)},
        "gentle": {"context": rates(0.0, 0.6, closed_book_accuracy=0.9)},
    }
    figure: Any = gain_and_damage(baseline, edits)
    front = trace(figure, name="front")
    assert list(zip(front.x, front.y, strict=True)) == [
        (0.9, 0.8),
        (0.9, 0.9),
        (0.6, 0.9),
        (0.6, 0.95),
        (0.4, 0.95),
    ]


def test_less_divergence_is_better_on_the_front_of_neutral_text() -> None:
    baseline = rates(0.27, 0.40, neutral_kl=0.0)
    edits: dict[str, Any] = {
        "far": {"context": rates(0.0, 0.9, neutral_kl=0.1)},
        "worse": {"context": rates(0.0, 0.8, neutral_kl=0.2)},
    }
    figure: Any = gain_and_damage(baseline, edits, guard="neutral_kl")
    front = trace(figure, name="front")
    assert list(zip(front.x, front.y, strict=True)) == [(0.9, 0.1), (0.9, 0.0), (0.4, 0.0)]


def test_a_dose_response_shows_every_measure_that_all_doses_have_in_order_of_the_dose() -> None:
    doses = {
        1.0: rates(0.3, 0.4, closed_book_accuracy=0.95, neutral_kl=0.0),
        0.0: rates(0.0, 0.9, closed_book_accuracy=0.5, neutral_kl=0.1, aligned_accuracy=0.9),
    }
    figure: Any = dose_response(doses, dose="scale of 23.4", neutral=1.0)
    drawn = {t.name: (list(t.x), list(t.y)) for t in figure.data}
    assert drawn == {
        "context rate": ([0.0, 1.0], [0.9, 0.4]),
        "memory rate": ([0.0, 1.0], [0.0, 0.3]),
        "closed book": ([0.0, 1.0], [0.5, 0.95]),
        "neutral kl": ([0.0, 1.0], [0.1, 0.0]),
    }
    assert "scale of 23.4 0</b><br>closed book 50.0% [48.0, 53.0]" in trace(figure, name="closed book").hovertext[0]
    with pytest.raises(UserError, match="two doses or more"):
        dose_response({1.0: doses[1.0]})


def test_heads_are_compared_between_groups_by_the_groups_own_means() -> None:
    values = torch.tensor([[[1.0, -2.0]], [[3.0, -2.0]], [[0.5, -1.0]]])
    scores = HeadScores(values, ("a", "b", "c"), ("A", "B", "C"), "path_patching", "logit_diff", "m", "d")
    figure: Any = top_heads_by_group(scores, {"a": "question", "b": "question", "c": "statement"}, k=2)
    assert [list(t.x) for t in figure.data] == [[2.0, 0.5], [-2.0, -1.0]]
    assert [t.marker.color for t in figure.data] == [CONTEXT_COLOUR, MEMORY_COLOUR]
    assert list(figure.layout.yaxis.ticktext) == ["question", "statement"] * 2
    assert "n = 2 examples of 2 subjects" in figure.data[0].hovertext[0]
    with pytest.raises(UserError, match="example c has no group"):
        top_heads_by_group(scores, {"a": "question", "b": "question"})


def test_gain_and_damage_plots_the_wanted_rate_against_the_guard() -> None:
    baseline, pruned = (rates(0.27, 0.40, closed_book_accuracy=0.95), rates(0.03, 0.93, closed_book_accuracy=0.91))
    random = rates(0.26, 0.41, closed_book_accuracy=0.94)
    control: Any = {"context": random, "memory": baseline}
    figure: Any = gain_and_damage(baseline, {"pruning": {"context": pruned}}, control=control)
    points = [(t.name, t.x[0], t.y[0]) for t in figure.data if t.x[0] is not None and t.name != "front"]
    assert points == [
        ("pruning", 0.93, 0.91),
        ("random heads", 0.41, 0.94),
        ("unedited", 0.40, 0.95),
        ("random heads", 0.27, 0.95),
        ("unedited", 0.27, 0.95),
    ]


def test_gain_and_damage_gives_divergence_in_nats() -> None:
    record = rates(0.27, 0.40, neutral_kl=0.03)
    figure: Any = gain_and_damage(record, {"pruning": {"memory": record}}, guard="neutral_kl")
    assert "nats" in figure.layout.yaxis.title.text
    assert "0.030 [0.010, 0.060]" in trace(figure, name="pruning").hovertext[0]


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


def test_damage_fronts_show_each_method_s_candidates_by_rising_rate() -> None:
    def candidate(method: str, towards: str, rate: float, text: float | None, kept: float) -> dict[str, Any]:
        damage = {"none": 0.5, "aligned": 0.5, "irrelevant": 0.5, "neutral": text}
        return {"method": method, "towards": towards, "does": "<i>", "rate": rate, "damage": damage, "kept": kept}

    context = [("learned_gates", "context", 0.8, 0.02, 0.9), ("learned_gates", "context", 0.6, 0.005, 0.95)]
    memory = [("pruning", "memory", 0.5, None, 0.7)]
    figure: Any = damage_fronts([candidate(*of) for of in (*context, *memory)])
    drawn = {(t.name, t.xaxis, t.yaxis): (list(t.x), list(t.y)) for t in figure.data if len(t.x) and t.x[0] is not None}
    assert drawn == {
        ("learned gates", "x", "y"): ([0.6, 0.8], [0.005, 0.02]),
        ("learned gates", "x3", "y3"): ([0.6, 0.8], [0.95, 0.9]),
        ("pruning", "x2", "y2"): ([0.5], [None]),
        ("pruning", "x4", "y4"): ([0.5], [0.7]),
    }
    assert all("<i>" not in text for t in figure.data for text in t.hovertext or ())


def test_a_dial_s_curve_has_both_rates_in_their_colours() -> None:
    points = [{"trust": t, "memory_rate": 0.4 - 0.3 * t, "context_rate": 0.5 + 0.4 * t} for t in (-1.0, 0.0, 1.0)]
    figure: Any = dial_curve(points)
    assert [(list(t.x), list(t.y), t.line.color) for t in figure.data] == [
        ([-1.0, 0.0, 1.0], [p["memory_rate"] for p in points], MEMORY_COLOUR),
        ([-1.0, 0.0, 1.0], [p["context_rate"] for p in points], CONTEXT_COLOUR),
    ]


def test_one_subject_has_no_interval() -> None:
    scores = MAP.select([0])
    figure: Any = top_heads_bars(scores)
    assert figure.data[0].error_x.array is None
    assert "of one subject, no interval" in figure.data[0].hovertext[0]


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
