from typing import Any

import pytest
import torch

from figures.prompts import answer_race, answer_view, attention_view
from figures.theme import CONTEXT_COLOUR, MEMORY_COLOUR
from interp.attention import PromptAttention
from interp.errors import UserError
from interp.generation import AnswerStep
from interp.lens import LogitLens

LENS = LogitLens(torch.tensor([[[0.01, 0.02], [0.5, 0.25]], [[0.03, 0.02], [0.1, 0.2]]]).log(), ("a", "b"), ("A", "B"))
ATTENTION = PromptAttention(
    ("Fact", ":", " Lima", "\n"), ((3, 1), (2, 0)), torch.tensor([[0.6, 0.02, 0.3, 0.08], [0.1, 0.1, 0.1, 0.7]])
)
STEPS = [
    AnswerStep(" Tokyo", 0.5, ((" Lima", 0.25), ("<b>", 0.1))),
    AnswerStep(".", 0.9, ((",", 0.05), ("\n", 0.01))),
]


def lines(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if trace.mode == "lines"}


def test_the_race_holds_mean_probabilities_and_the_difference_by_layer() -> None:
    drawn = lines(answer_race({"unedited": LENS}))
    assert list(drawn["context answer, unedited"].y) == pytest.approx([0.02, 0.3])
    assert list(drawn["memory answer, unedited"].y) == pytest.approx([0.02, 0.225])
    assert drawn["context answer, unedited"].line.color == CONTEXT_COLOUR
    assert drawn["memory answer, unedited"].line.color == MEMORY_COLOUR
    expected = torch.log(torch.tensor([[0.01 / 0.02, 2.0], [1.5, 0.5]])).mean(0).tolist()
    assert list(drawn["context - memory, unedited"].y) == pytest.approx(expected, abs=1e-6)


def test_the_race_of_one_prompt_has_no_interval_and_says_so() -> None:
    figure: Any = answer_race({"unedited": LENS.select(["a"])})
    assert [trace.mode for trace in figure.data] == ["lines"] * 3
    assert figure.data[0].hovertext[1].endswith("probability 0.500<br>n = 1 of one subject, no interval")


def test_every_condition_of_a_race_has_a_line_style_of_its_own() -> None:
    drawn = lines(answer_race({"unedited": LENS, "pruned": LENS}))
    assert drawn["memory answer, unedited"].line.dash != drawn["memory answer, pruned"].line.dash


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(UserError, match="no logit lens"):
        answer_race({})
    with pytest.raises(UserError, match="no answer"):
        answer_view({"unedited": []})


def test_attention_is_one_row_for_each_token_and_one_column_for_each_head() -> None:
    figure: Any = attention_view(ATTENTION)
    (heat,) = figure.data
    assert list(heat.x) == ["3.1", "2.0"]
    assert list(figure.layout.yaxis.ticktext) == ["Fact", ":", "␣Lima", "↵"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    # Relative to the strongest token but the first, which is cut at full colour.
    assert [row[0] for row in heat.z] == pytest.approx([1, 0.02 / 0.3, 1, 0.08 / 0.3])
    assert "attention weight 0.300" in heat.hovertext[2][0]
    assert [row[0] for row in heat.text] == ["0.60", "", "0.30", "0.08"]


def test_an_answer_is_shown_with_its_probabilities_and_framed_where_it_differs() -> None:
    figure: Any = answer_view({"unedited": STEPS, "edited": [AnswerStep(" Lima", 0.7, ((" Tokyo", 0.2),)), STEPS[1]]})
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert texts[0].startswith("<b>␣Tokyo</b> 50%<br>")
    assert "&lt;b&gt; 10%" in texts[0]
    assert [shape.line.width for shape in figure.layout.shapes] == [0, 0, 2.5, 0]


def test_the_hover_of_a_step_says_what_else_could_have_been_said() -> None:
    figure: Any = answer_view({"unedited": STEPS, "edited": [AnswerStep(" x", 1.0, ())]})
    assert figure.data[0].hovertext[0] == (
        "<b>unedited, token 1</b><br>␣Tokyo, probability 0.500<br>instead of ␣Lima (0.250), &lt;b&gt; (0.100)"
    )
    assert figure.data[1].hovertext == ("<b>edited, token 1</b><br>␣x, probability 1.000",)
