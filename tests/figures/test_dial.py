from typing import Any

import pytest

from figures.dial import dial_curve, dose_response
from figures.theme import CONTEXT_COLOUR, MEMORY_COLOUR
from interp.errors import UserError
from tests.figures.samples import rates, trace


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


def test_a_dial_s_curve_has_both_rates_in_their_colours() -> None:
    points = [{"trust": t, "memory_rate": 0.4 - 0.3 * t, "context_rate": 0.5 + 0.4 * t} for t in (-1.0, 0.0, 1.0)]
    figure: Any = dial_curve(points)
    assert [(list(t.x), list(t.y), t.line.color) for t in figure.data] == [
        ([-1.0, 0.0, 1.0], [p["memory_rate"] for p in points], MEMORY_COLOUR),
        ([-1.0, 0.0, 1.0], [p["context_rate"] for p in points], CONTEXT_COLOUR),
    ]
