from typing import Any

import pytest

from figures.detectors import families_curve
from interp.statistics import Estimate
from tests.figures.samples import trace


def test_the_curve_has_its_draws_and_the_ceiling_its_line() -> None:
    points = [
        {"families": 1, "prompts": 20.0, "auroc": 0.6, "low": 0.5, "high": 0.75, "same_number": 0.7},
        {"families": 8, "prompts": 160.0, "auroc": 0.8, "low": 0.8, "high": 0.8, "same_number": 0.8},
    ]
    figure: Any = families_curve(points, {"z": Estimate(0.9, 0.85, 0.95, 100)})
    curve = trace(figure, name="prompts of so many families, worst to best draw")
    assert (list(curve.x), list(curve.y)) == ([1, 8], [0.6, 0.8])
    assert list(curve.error_y.array) == pytest.approx([0.15, 0])
    assert list(curve.error_y.arrayminus) == pytest.approx([0.1, 0])
    assert list(trace(figure, name="as many prompts of all families").y) == [0.7, 0.8]
    assert [(line.y0, line.y1) for line in figure.layout.shapes] == [(0.9, 0.9)]
