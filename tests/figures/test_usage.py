from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from figures.theme import CONTEXT_COLOUR, MEMORY_COLOUR
from figures.usage import usage_bars, usage_by_template
from interp.evaluation import UsageReport
from tests.figures.samples import rates, trace


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
