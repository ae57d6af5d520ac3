"""Answers with marked spans, in the form of RAGTruth's two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interp.errors import UserError
from interp.spans import MarkedSpan, load_marked_answers, marked_tokens

FOLDER = Path(__file__).parent / "fixtures" / "ragtruth"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def folder_with(tmp_path: Path, **fields: Any) -> Path:
    """The fixture, with fields of its first answer changed."""
    answers = rows_of("response.jsonl")
    answers[0] |= fields
    for name, rows in (("response.jsonl", answers), ("source_info.jsonl", rows_of("source_info.jsonl"))):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_an_answer_has_its_question_its_passages_and_what_is_marked():
    first = load_marked_answers(FOLDER).answers[0]
    assert first.question == "who painted the ceiling of marlow town hall"
    assert first.documents == (
        "Ida Fenn painted the ceiling, in two summers.\nIt was her last work.",
        "Marlow Town Hall has two towers.",
    )
    assert first.spans == (
        MarkedSpan(8, 18, "Otto Brand", "Evident Conflict"),
        MarkedSpan(27, 31, "1911", "Subtle Baseless Info", True),
    )
    assert [first.answer[span.start : span.end] for span in first.spans] == ["Otto Brand", "1911"]
    assert (first.id, first.source, first.task, first.model, first.split, first.quality) == (
        "1",
        "11",
        "QA",
        "some-7b-chat",
        "test",
        "good",
    )


def test_prompts_show_the_documents_and_bare_prompts_do_not():
    question, summary, data = load_marked_answers(FOLDER).answers
    assert question.bare_prompt == "Question: who painted the ceiling of marlow town hall\nAnswer:"
    assert question.prompt == "\n\n".join((*question.documents, question.bare_prompt))
    assert (summary.prompt, summary.bare_prompt) == (
        "The Sill froze, and the mill stood still.\n\nSummary:",
        "Summary:",
    )
    assert data.prompt == '{"name": "The Quill", "stars": 3.0}\n\nOverview:'


def test_two_files_in_any_order_give_what_their_folder_gives(tmp_path: Path):
    files = [FOLDER / "source_info.jsonl", FOLDER / "response.jsonl"]
    assert load_marked_answers(files) == load_marked_answers(files[::-1]) == load_marked_answers(FOLDER)


def test_spaces_before_an_answer_count_in_its_offsets(tmp_path: Path):
    label = {"start": 2, "end": 4, "text": "No", "label_type": "Evident Conflict"}
    folder = folder_with(tmp_path, response="  No.", labels=[label])
    assert load_marked_answers(folder).answers[0].spans == (MarkedSpan(2, 4, "No", "Evident Conflict"),)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"source_id": "99"}, "'source_id' should be the source_id of a row of source_info.jsonl"),
        ({"response": " "}, "'response' should be a text that is not empty"),
        ({"labels": "none"}, "'labels' should be a list of objects"),
        ({"labels": [{"start": 5, "end": 400, "text": "x"}]}, "within the response of 32 characters"),
        (
            {"labels": [{"start": 0, "end": 3, "text": "Ida"}]},
            "expected the label's text 'Ida' where it is said to stand",
        ),
    ],
)
def test_a_bad_row_is_told_with_its_place_or_skipped_and_reported(tmp_path: Path, fields: dict[str, Any], problem: str):
    folder = folder_with(tmp_path, **fields)
    with pytest.raises(UserError) as caught:
        load_marked_answers(folder)
    assert str(caught.value).startswith(f"{folder / 'response.jsonl'}, line 1: ")
    assert problem in str(caught.value)
    loaded = load_marked_answers(folder, on_error="skip")
    assert [answer.id for answer in loaded.answers] == ["2", "3"]
    assert len(loaded.skipped) == 1
    assert problem in loaded.skipped[0]


def test_a_folder_without_answers_is_told():
    with pytest.raises(
        UserError, match=r"gave no marked answer; give RAGTruth's response\.jsonl and source_info\.jsonl"
    ):
        load_marked_answers(FOLDER / "source_info.jsonl")


def test_a_token_is_marked_if_it_shares_a_character_with_a_span():
    #                 It       was      O       tto       (end)
    offsets = [(0, 2), (3, 6), (7, 8), (8, 11), (11, 11)]
    assert marked_tokens(offsets, [MarkedSpan(7, 11, "Otto", "")]).tolist() == [False, False, True, True, False]
    assert marked_tokens(offsets, []).tolist() == [False] * 5
    # What only touches a span is none of it.
    assert marked_tokens(offsets, [MarkedSpan(2, 7, " was ", "")]).tolist() == [False, True, False, False, False]
