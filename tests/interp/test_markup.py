"""Markup and split punctuation, written out by hand before and after."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from interp.answers import contains_answer
from interp.formats import convert_dataset, load_dataset
from interp.formats.markup import cleaned

FIXTURES = Path(__file__).parent / "fixtures" / "formats"
NQ_SWAP = Path(__file__).resolve().parents[3] / "shared" / "data" / "nq-swap" / "dev.parquet"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<P> Quill lies on the Ombra . </P>", "Quill lies on the Ombra."),
        ("<Ul> <Li> Ida Fenn </Li> <Li> Otto Brandt </Li> </Ul>", "Ida Fenn\nOtto Brandt"),
        ('<Tr> <Th> Town </Th> <Td colspan="2"> Quill </Td> </Tr> <Tr> <Td> 3 </Td> </Tr>', "Town | Quill\n3"),
        ("<Td> </Td> <Td> b </Td> <Td> </Td> <Td> d </Td>", "| b | | d"),
        ("a<b>bold</b> word<br/>and <a href='x'>a link</a>", "abold word\nand a link"),
        ("&lt;P&gt; Tom &amp; Ida &#233;t&eacute; &quot;so&quot;", '<P> Tom & Ida été "so"'),
        ("-LRB- 1975 -RRB- and -LSB- a -RSB-", "(1975) and [a]"),
        ("7003112000000000000 ♠ 1,120 km", "1,120 km"),
        ("zero\u200bwidth\ufeff and\u00a0wide", "zerowidth and wide"),
    ],
)
def test_markup_goes_and_what_it_marks_stays(text: str, expected: str) -> None:
    assert cleaned(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He said , `` no '' , and left .", 'He said, "no", and left.'),
        ("'' Rip It Up '' is a song", '"Rip It Up" is a song'),
        ("He is 5 ' 6 '' tall", "He is 5 ' 6\" tall"),
        ("( Oh , What a Night ) [ 1975 ] ;", "(Oh, What a Night) [1975];"),
        ("the band 's and the players ' song ca n't", "the band's and the players' song can't"),
        ("no . 8 in the chart !", "no. 8 in the chart!"),
        ("It costs $ 3.50 or 20 % .", "It costs $3.50 or 20%."),
        ("at 10 : 30 p.m. , 1 : 24 : 27.6 , odds of 3 : 1", "at 10:30 p.m., 1:24:27.6, odds of 3:1"),
        ("Season 2 : 13 episodes", "Season 2: 13 episodes"),
        ("born ( 1985 - 02 - 05 )", "born (1985-02-05)"),
        ("  two   spaces \n\n\n\n a line  ", "two spaces\n\na line"),
    ],
)
def test_spaces_around_punctuation_are_mended(text: str, expected: str) -> None:
    assert cleaned(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The U.S. grew 3.5 percent, e.g. in Washington, D.C., at 10:30 a.m.",
        "Write to <http://example.org/a?b=1&lt=2> or <me@example.org>.",
        "if a < b and c > d: x = y[0] - 1",
        "a list<string> of T<p1>",
        "AT&T, R&B and Q&A;s",
        "a .38 revolver, and so on ... until 1,000",
        "the present - day state -- or 'so' they say",
        "First paragraph.\n\nSecond paragraph.\nIts second line.",
        'She said: "no" (twice).',
        "",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert cleaned(text) == text


def nq_row(**fields: object) -> dict[str, object]:
    return {
        "question": "who sang `` rip it up ''",
        "org_context": "<P> `` Rip It Up '' is by Ida 's Band , L.L.C . </P>",
        "sub_context": "<P> `` Rip It Up '' is by the Fenn , Brandt Four . </P>",
        "org_answer": ["Ida 's Band"],
        "sub_answer": ["Fenn , Brandt Four"],
    } | fields


def test_contexts_questions_and_answers_are_cleaned_alike(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(nq_row()))
    examples = {e.kind: e for e in load_dataset(tmp_path / "rows.jsonl", "nq-swap", markup="clean").conflicts}
    assert examples["conflict"].prompt == (
        '"Rip It Up" is by the Fenn, Brandt Four.\n\nQuestion: who sang "rip it up"\nAnswer:'
    )
    assert examples["conflict"].context_answers == ("Fenn, Brandt Four",)
    assert examples["conflict"].memory_answers == ("Ida's Band",)
    assert examples["aligned"].context == '"Rip It Up" is by Ida\'s Band, L.L.C.'
    kept = load_dataset(tmp_path / "rows.jsonl", "nq-swap").conflicts.examples[0]
    assert kept.contexts == ("<P> `` Rip It Up '' is by the Fenn , Brandt Four . </P>",)
    assert kept.id == examples["conflict"].id


def test_a_text_of_markup_alone_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(nq_row(sub_context="<P> </P>")))
    assert load_dataset(tmp_path / "rows.jsonl", "nq-swap", markup="clean").conflicts.examples[0].context == "<P> </P>"


@pytest.mark.parametrize("format", ["counterfact", "dynamicqa", "conflictnq", "cad", "cub"])
def test_what_is_converted_clean_is_what_is_loaded_clean(tmp_path: Path, format: str) -> None:
    (path,) = FIXTURES.glob(f"{format}.*")
    convert_dataset(path, format, tmp_path / "out.jsonl", markup="clean")
    load_dataset(path, format, markup="clean").conflicts.save(tmp_path / "saved.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "saved.jsonl").read_bytes()


def test_every_answer_of_nq_swap_is_still_found_in_its_context() -> None:
    if not NQ_SWAP.exists():
        pytest.skip("the published file is not here")
    # A tenth is enough to find what one rule breaks; of all 9,492 contexts none loses its answer.
    rows = pl.read_parquet(NQ_SWAP).gather_every(10).to_dicts()
    pairs = [(row[f"{side}_context"], row[f"{side}_answer"]) for row in rows for side in ("org", "sub")]
    found = [(context, answers) for context, answers in pairs if contains_answer(context, answers)]
    assert len(found) > 900
    assert [a for c, a in found if not contains_answer(cleaned(c), [cleaned(one) for one in a])] == []
