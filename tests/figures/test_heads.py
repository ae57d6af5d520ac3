from typing import Any

import pytest
import torch

from figures.heads import agreement_map, head_map, layer_lines, top_heads_bars, top_heads_by_group
from figures.theme import CONTEXT_COLOUR, MEMORY_COLOUR
from interp.attribution.scores import HeadScores, LayerScores
from interp.errors import UserError
from tests.figures.samples import MAP, trace


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


def test_layers_are_a_line_with_its_interval() -> None:
    values = torch.tensor([[0.0, 1.0, 4.0], [0.0, 3.0, 6.0]])
    about = {"unit": "degrees", "signed": False}
    scores = LayerScores(values, ("a", "b"), ("A", "B"), "representation_gap", "gap", "m", "d", about)
    figure: Any = layer_lines(scores)
    assert list(trace(figure, mode="lines+markers").y) == [0.0, 2.0, 5.0]
    assert list(trace(figure, fill="toself").y) == pytest.approx([0.0, 3.0, 6.0, 4.0, 1.0, 0.0])
    assert figure.layout.yaxis.title.text == "gap (degrees)"


def test_agreement_is_a_map_with_its_numbers() -> None:
    figure: Any = agreement_map({"exact": {"exact": 1.0, "estimate": 0.5}, "estimate": {"exact": 0.5}})
    heat = trace(figure, type="heatmap")
    assert [list(row) for row in heat.text] == [["1.00", "0.50"], ["0.50", ""]]
    assert list(heat.x) == list(heat.y) == ["exact", "estimate"]


def test_heads_without_a_sign_are_not_said_to_push_towards_a_source() -> None:
    values = torch.tensor([[[0.5, 0.25]]])
    about = {"unit": "share", "signed": False}
    scores = HeadScores(values, ("a",), ("A",), "retrieval", "retrieval", "m", "d", about)
    figure: Any = top_heads_by_group(scores, {"a": "question"}, k=1)
    assert "towards" not in str(figure.layout.annotations)


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


def test_one_subject_has_no_interval() -> None:
    scores = MAP.select([0])
    figure: Any = top_heads_bars(scores)
    assert figure.data[0].error_x.array is None
    assert "of one subject, no interval" in figure.data[0].hovertext[0]
