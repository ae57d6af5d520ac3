from math import log10
from typing import Any

from figures.gain import Point, damage_fronts, gain_and_damage
from tests.figures.samples import rates, trace


def test_the_front_steps_between_the_edits_that_no_other_beats() -> None:
    points = [
        Point("unedited", rates(0.27, 0.40, closed_book_accuracy=0.95), kind="unedited"),
        Point("best", rates(0.0, 0.9, closed_book_accuracy=0.8), "context"),
        Point("beaten", rates(0.0, 0.7, closed_book_accuracy=0.75), "context"),
        Point("gentle", rates(0.0, 0.6, closed_book_accuracy=0.9), "context"),
        Point("random", rates(0.0, 0.99, closed_book_accuracy=0.99), "context", "control"),
    ]
    figure: Any = gain_and_damage({"edits": points})
    front = trace(figure, name="front")
    assert list(zip(front.x, front.y, strict=True)) == [
        (0.9, 0.8),
        (0.9, 0.9),
        (0.6, 0.9),
        (0.6, 0.95),
        (0.4, 0.95),
    ]


def test_less_divergence_is_better_on_the_front_of_neutral_text() -> None:
    points = [
        Point("unedited", rates(0.27, 0.40, neutral_kl=0.0), kind="unedited"),
        Point("far", rates(0.0, 0.9, neutral_kl=0.1), "context"),
        Point("worse", rates(0.0, 0.8, neutral_kl=0.2), "context"),
    ]
    figure: Any = gain_and_damage({"edits": points}, guard="neutral_kl")
    front = trace(figure, name="front")
    assert list(zip(front.x, front.y, strict=True)) == [(0.9, 0.1), (0.9, 0.0), (0.4, 0.0)]


def test_gain_and_damage_plots_the_wanted_rate_against_the_guard_in_the_panels_that_a_point_belongs_to() -> None:
    unedited, pruned = rates(0.27, 0.40, closed_book_accuracy=0.95), rates(0.03, 0.93, closed_book_accuracy=0.91)
    random = rates(0.26, 0.41, closed_book_accuracy=0.94)
    pruning = [Point("pruning", pruned, "context"), Point("random heads", random, "context", "control")]
    figure: Any = gain_and_damage({"unedited": [Point("unedited", unedited, kind="unedited")], "pruning": pruning})
    points = [
        (t.name, t.xaxis, *point)
        for t in figure.data
        if t.name != "front" and t.x and t.x[0] is not None
        for point in zip(t.x, t.y, t.marker.symbol, strict=True)
    ]
    assert points == [
        ("unedited", "x", 0.40, 0.95, "circle-open"),
        ("unedited", "x2", 0.27, 0.95, "circle-open"),
        ("pruning", "x", 0.93, 0.91, "square"),
        ("pruning", "x", 0.41, 0.94, "square-open-dot"),
    ]


def test_gain_and_damage_gives_divergence_in_nats() -> None:
    point = Point("pruning", rates(0.27, 0.40, neutral_kl=0.03), "memory")
    figure: Any = gain_and_damage({"pruning": [point]}, guard="neutral_kl")
    assert "nats" in figure.layout.yaxis.title.text
    hover = [text for t in figure.data if t.name == "pruning" for text in t.hovertext or ()]
    assert "0.030 [0.010, 0.060]" in hover[0]


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
    # Both columns of a row have one scale.
    assert figure.layout.yaxis.type == figure.layout.yaxis2.type == "log"
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range
    assert figure.layout.yaxis.range[0] < log10(0.005) < log10(0.02) < figure.layout.yaxis.range[1]
    assert figure.layout.yaxis3.range == figure.layout.yaxis4.range
