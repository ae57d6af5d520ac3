from typing import Any

import numpy as np
import pytest

from figures.leaderboard import Competitor, critical_differences, gain_against_loss
from interp.ranks import compare_ranks
from interp.statistics import Estimate
from tests.figures.samples import trace


def points() -> list[Competitor]:
    return [
        Competitor("best", Estimate(0.4, 0.3, 0.5, 60), 0.1, 0.8, "front"),
        Competitor("gentle", Estimate(0.1, 0.0, 0.2, 60), -0.02, 1.0, "front"),
        Competitor("beaten <b>", Estimate(0.05, 0.0, 0.1, 60), 0.2, 0.5),
        Competitor("random heads", Estimate(0.0, -0.1, 0.1, 60), 0.15, kind="control"),
    ]


def drawn(figure: Any, symbol: str) -> Any:
    return next(t for t in figure.data if t.marker.symbol == symbol and t.x[0] is not None)


def test_gain_lies_to_the_right_loss_downwards_and_speed_is_the_colour() -> None:
    figure: Any = gain_against_loss(points())
    front = drawn(figure, "diamond")
    assert list(zip(front.text, front.x, front.y, front.marker.color, strict=True)) == [
        ("gentle", 0.1, -0.02, 1.0),
        ("best", 0.4, 0.1, 0.8),
    ]
    assert front.error_x.array == pytest.approx([0.1, 0.1])
    assert figure.layout.yaxis.autorange == "reversed"
    assert drawn(figure, "circle").marker.color == (0.5,)
    assert drawn(figure, "circle").mode == "markers"
    assert (figure.layout.coloraxis2.cmin, figure.layout.coloraxis2.cmax) == (0.5, 1.0)
    hover = drawn(figure, "circle").hovertext[0]
    assert "beaten &lt;b&gt;" in hover
    assert "0.50 times as fast" in hover


def test_without_all_speeds_there_are_no_colours() -> None:
    figure: Any = gain_against_loss([point._replace(speed=None) for point in points()[:1]] + points()[1:])
    assert "coloraxis2" not in figure.layout
    assert trace(figure, name="on the front").marker.color == drawn(figure, "diamond").marker.color


def test_mean_ranks_and_the_groups_that_cannot_be_told_apart_are_drawn() -> None:
    values = {"d": [0, 0, 0, 0], "b": [2, 1, 2, 1], "c": [1, 2, 1, 2], "a": [3, 3, 3, 3]}
    ranks = compare_ranks({name: np.array(own, dtype=float) for name, own in values.items()})
    figure: Any = critical_differences(ranks)
    dots = next(t for t in figure.data if t.mode == "markers")
    assert list(dots.x) == [1, 2.5, 2.5, 4]
    assert [label.split()[0] for label in figure.layout.yaxis.ticktext] == ["critical", "a", "b", "c", "d"]
    bars = [list(t.x) for t in figure.data if t.name and t.name.startswith("cannot be told apart")]
    assert bars == [[1, 2.5], [2.5, 4]]
    (rule,) = (t for t in figure.data if t.mode == "lines+markers")
    assert rule.x[1] - rule.x[0] == pytest.approx(ranks.difference)
