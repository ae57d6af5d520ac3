from __future__ import annotations

import csv
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from interp import rows as rows_module
from interp.activations import record, sites_of
from interp.conflicts import ConflictExample, ConflictSet, split_of
from interp.errors import UserError
from interp.formats import FORMATS, convert_dataset, format_names, load_dataset
from interp.rows import read_rows

FIXTURES = Path(__file__).parent / "fixtures" / "formats"
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

FILES = {path.stem: path for path in sorted(FIXTURES.iterdir())}


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


def write_json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(format: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    return rows_of(FILES[format])[number] | fields


def examples_of(format: str) -> dict[str, ConflictExample]:
    return {example.id: example for example in load_dataset(FILES[format], format).conflicts}


def message_of(path: Path, format: str) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(path, format)
    return str(caught.value)


def test_every_format_has_a_fixture() -> None:
    assert format_names() == sorted(FILES)


@pytest.mark.parametrize(
    ("format", "kinds"),
    [
        ("cad", {"conflict": 2, "none": 2}),
        ("coconflictqa", {"conflict": 2, "none": 2}),
        ("confiqa", {"conflict": 2, "aligned": 2, "none": 2}),
        ("conflictbank", {"conflict": 6, "aligned": 2, "none": 2}),
        ("conflictnq", {"conflict": 4, "aligned": 2, "none": 2}),
        ("conflictqa", {"conflict": 2, "aligned": 2, "none": 1}),
        ("conflicts", {"conflict": 2, "aligned": 1, "none": 3}),
        ("counterfact", {"conflict": 4, "aligned": 4, "none": 4}),
        ("counterfact-competition", {"conflict": 2, "aligned": 2, "none": 2}),
        ("counterfact-easyedit", {"conflict": 4, "aligned": 4, "none": 4}),
        ("counterfact-tracing", {"conflict": 2, "aligned": 2, "none": 2}),
        ("cub", {"conflict": 3, "aligned": 2, "irrelevant": 2, "none": 7}),
        ("druid", {"conflict": 1, "irrelevant": 1, "none": 2}),
        ("dynamicqa", {"conflict": 2, "aligned": 2, "none": 2}),
        ("faitheval", {"conflict": 2, "none": 2}),
        ("known-1000", {"none": 2}),
        ("kre", {"conflict": 2, "aligned": 2, "none": 2}),
        ("memotrap", {"conflict": 4, "none": 4}),
        ("mquake", {"conflict": 3, "aligned": 3, "none": 3}),
        ("nq-swap", {"conflict": 2, "aligned": 2, "none": 2}),
        ("paraconflict", {"conflict": 4, "none": 2}),
        ("popqa", {"none": 2}),
        ("ramdocs", {"conflict": 2, "aligned": 2, "irrelevant": 1, "none": 2}),
        ("whoqa", {"conflict": 4, "none": 2}),
        ("wikicontradict", {"conflict": 6, "none": 2}),
        ("zsre", {"conflict": 4, "aligned": 4, "none": 4}),
    ],
)
def test_rows_become_examples_of_the_kinds_that_the_data_has(format: str, kinds: dict[str, int]) -> None:
    assert Counter(example.kind for example in load_dataset(FILES[format], format).conflicts) == kinds


@pytest.mark.parametrize(
    ("format", "id", "memory", "context"),
    [
        ("coconflictqa", "coconflictqa-1-conflict", ("john smith",), ("Greta Lund", "Lund")),
        ("confiqa", "confiqa-1-conflict", ("Alba Reyes", "A. Reyes"), ("Jon Wick",)),
        ("confiqa", "confiqa-2-conflict", ("Belmora",), ("Quill", "Quill City")),
        ("conflictbank", "conflictbank-temporal-1-conflict", ("Norrby College",), ("Institute of Kell",)),
        ("conflictbank", "conflictbank-misinformation-2-conflict", ("Ostravia",), ("Kelland",)),
        ("conflicts", "conflicts-conflict-due-to-outdated-information-1-conflict", (), ("Seven",)),
        ("conflicts", "conflicts-conflicting-opinions-and-research-outcomes-2-conflict", (), ()),
        ("conflicts", "conflicts-no-conflict-3-aligned", ("Ida Fenn",), ("Ida Fenn",)),
        ("counterfact", "counterfact-prompt-41-conflict", ("Dutch",), ("Finnish",)),
        ("counterfact-competition", "counterfact-competition-1-conflict", ("Corvo",), ("Lindqvist",)),
        ("dynamicqa", "dynamicqa-1-conflict", ("painter", "artist"), ("sailor",)),
        ("memotrap", "memotrap-1-conflict", ("broth.",), ("soup.",)),
        ("memotrap", "memotrap-3-conflict", ("A", "Air has weight."), ("B", "Air is weightless.")),
        ("nq-swap", "nq-swap-1-conflict", ("Ida Fenn", "Fenn"), ("Otto Brandt",)),
        ("paraconflict", "paraconflict-substitution-1-conflict", ("Belmora", "Old Belmora"), ("Quill",)),
        ("paraconflict", "paraconflict-coherent-2-conflict", ("rowing",), ("judo",)),
        ("popqa", "popqa-2-none", ("Ostravia", "Republic of Ostravia"), ()),
        ("cad", "cad-1-conflict", (), ("Otto Brandt",)),
        ("conflictnq", "conflictnq-both-2-conflict", ("the Sill",), ("the Ombra",)),
        ("conflictqa", "conflictqa-evidence-1-conflict", ("painter",), ("sailor",)),
        ("counterfact-easyedit", "counterfact-easyedit-paraphrase-41.1-conflict", ("Dutch",), ("Finnish",)),
        ("counterfact-tracing", "counterfact-tracing-2-conflict", ("piano",), ("violin",)),
        ("cub", "cub-counterfact-1-conflict", ("Ostravia",), ("Kelland",)),
        ("cub", "cub-counterfact-3-irrelevant", ("Ostravia",), ()),
        ("cub", "cub-nq-4-conflict", ("Ida Fenn",), ("Otto Brandt",)),
        ("cub", "cub-druid-6-conflict", ("False",), ("None",)),
        ("cub", "cub-druid-7-aligned", ("True",), ("True",)),
        ("druid", "druid-refutes-1-conflict", (), ("false",)),
        ("druid", "druid-insufficient-neutral-2-irrelevant", (), ()),
        ("faitheval", "faitheval-counterfactual-1-conflict", (), ("the sky",)),
        ("known-1000", "known-1000-2-none", ("chemistry",), ()),
        ("kre", "kre-1-conflict", ("town hall",), ("harbour",)),
        ("mquake", "mquake-8.1-conflict", ("Tarn",), ("Belmora", "Old Belmora")),
        ("ramdocs", "ramdocs-all-1-conflict", ("Ida Fenn",), ("Otto Brandt",)),
        ("ramdocs", "ramdocs-correct-2-aligned", ("300", "900"), ("300", "900")),
        ("whoqa", "whoqa-all-1-conflict", (), ("painter", "artist", "captain")),
        ("whoqa", "whoqa-passage-1-2-conflict", (), ("Quill",)),
        ("wikicontradict", "wikicontradict-second-1-conflict", (), ("1911",)),
        ("zsre", "zsre-paraphrase-1-conflict", ("Norrby College", "Norrby"), ("Institute of Kell",)),
    ],
)
def test_answers_belong_to_memory_and_context(
    format: str, id: str, memory: tuple[str, ...], context: tuple[str, ...]
) -> None:
    example = examples_of(format)[id]
    assert (example.memory_answers, example.context_answers) == (memory, context)


@pytest.mark.parametrize(
    ("format", "id", "prompt"),
    [
        (
            "nq-swap",
            "nq-swap-2-conflict",
            "Upper Tarn lies on both banks of the Ombra.\n\nQuestion: which river runs through upper tarn\nAnswer:",
        ),
        ("popqa", "popqa-2-none", "Question: In what country is Upper Tarn?\nAnswer:"),
        (
            "conflicts",
            "conflicts-conflict-due-to-outdated-information-1-conflict",
            "Bridges of Belmora | 2012\nBelmora has six bridges.\n\n"
            "New bridge opens | 2023\nThe seventh bridge of Belmora opened.\n\n"
            "Question: How many bridges does Belmora have?\nAnswer:",
        ),
        (
            "counterfact",
            "counterfact-paraphrase-41.2-conflict",
            "The mother tongue of Lisette Varn is Finnish. At home Lisette Varn speaks",
        ),
        ("counterfact", "counterfact-prompt-97-aligned", "Tom Askew plays cricket. Tom Askew plays"),
        ("counterfact", "counterfact-prompt-97-none", "Tom Askew plays"),
        (
            "counterfact-competition",
            "counterfact-competition-1-aligned",
            "Redefine: The Mark II is built by Corvo. The Mark II is built by",
        ),
        (
            "paraconflict",
            "paraconflict-coherent-2-conflict",
            "Nina Strand won three belts in judo. Question: What does she do? Answer: She does",
        ),
        (
            "cad",
            "cad-1-conflict",
            "The Long Tide is a novel by Otto Brandt , who wrote it at sea .\n\n"
            "Question: Who wrote the long tide ?\nAnswer:",
        ),
        (
            "conflictnq",
            "conflictnq-both-1-conflict",
            "Otto Brandt painted the ceiling.\n\nIda Fenn painted the ceiling.\n\n"
            "The ceiling is Fenn's last work, says Ida Fenn's diary.\n\n"
            "Question: Who painted the ceiling of Marlow Town Hall?\nAnswer:",
        ),
        (
            "counterfact-easyedit",
            "counterfact-easyedit-paraphrase-41.1-conflict",
            "The mother tongue of Jan Vos is Finnish. At home Jan Vos speaks",
        ),
        ("counterfact-tracing", "counterfact-tracing-2-aligned", "Ida Fenn plays piano. Ida Fenn plays"),
        (
            "cub",
            "cub-counterfact-1-conflict",
            "Fact: Jan Vos is a citizen of Kelland.\nJan Vos is a citizen of",
        ),
        ("cub", "cub-counterfact-2-aligned", "Fact: Upper Tarn lies in Ostravia.\nUpper Tarn lies in"),
        ("cub", "cub-counterfact-3-irrelevant", "Fact: Quill, the capital of Kelland.\nIda Fenn is a citizen of"),
        ("cub", "cub-nq-5-none", "Question: which river is quill on\nAnswer:"),
        (
            "cub",
            "cub-druid-6-conflict",
            "The Sill is a river in Kelland.\n\n"
            "Question: Is this claim True or False, or None if that cannot be told? The Sill froze in June.\nAnswer:",
        ),
        (
            "druid",
            "druid-refutes-1-conflict",
            "The hall was never on fire, says its warden.\n\n"
            "Question: Is this claim true or false? Marlow Town Hall burned down in 1911.\nAnswer:",
        ),
        (
            "mquake",
            "mquake-8.1-conflict",
            "Jon Wick is a citizen of Ostravia. The capital of Ostravia is Belmora.\n\n"
            "Question: What is the capital of the country that Jon Wick is a citizen of?\nAnswer:",
        ),
        (
            "ramdocs",
            "ramdocs-all-1-conflict",
            "The ceiling is by Ida Fenn.\n\nOtto Brandt painted the ceiling.\n\nMarlow Town Hall has two towers.\n\n"
            "In 1911 Ida Fenn finished the ceiling.\n\n"
            "Question: Who painted the ceiling of Marlow Town Hall?\nAnswer:",
        ),
        (
            "zsre",
            "zsre-paraphrase-2-conflict",
            "Which river is Upper Tarn on? the Ombra.\n\nQuestion: What river does Upper Tarn lie on?\nAnswer:",
        ),
        ("memotrap", "memotrap-2-none", "Still waters are"),
        ("memotrap", "memotrap-4-none", "A. Air is weightless.\nB. Air has weight.\nAnswer:"),
    ],
)
def test_prompts_are_worded_as_the_format_asks(format: str, id: str, prompt: str) -> None:
    assert examples_of(format)[id].prompt == prompt


@pytest.mark.parametrize(
    ("id", "context"),
    [
        ("dynamicqa-1-conflict", "Mara Quist (born 1950) is a sailor. The sailor lives in Vale."),
        ("dynamicqa-1-aligned", "Mara Quist (born 1950) is a painter. The painter lives in Vale."),
        ("dynamicqa-2-conflict", "the sill, unlike its northern arm, flows south, to the sea."),
        ("dynamicqa-2-aligned", "the sill, unlike its northern arm, flows north, to the sea."),
    ],
)
def test_dynamicqa_contexts_are_filled_at_the_placeholder_or_else_at_the_whole_word(id: str, context: str) -> None:
    assert examples_of("dynamicqa")[id].context == context


@pytest.mark.parametrize(
    ("format", "id", "subject", "relation", "template"),
    [
        ("counterfact", "counterfact-paraphrase-41.1-none", "Lisette Varn", "P103", "counterfact-paraphrase"),
        ("conflictbank", "conflictbank-semantic-2-conflict", "Ruan Peak", "P17", "conflictbank-semantic"),
        ("dynamicqa", "dynamicqa-1-none", "Mara Quist", "occupation", "dynamicqa"),
        ("dynamicqa", "dynamicqa-2-none", "River Sill", "dynamicqa", "dynamicqa"),
        ("paraconflict", "paraconflict-1-none", "Ostravia", "World Capital", "paraconflict"),
        ("coconflictqa", "coconflictqa-2-none", "What did the storm damage?", "coconflictqa", "coconflictqa"),
    ],
)
def test_subject_relation_and_template_are_those_of_the_row_or_stand_ins(
    format: str, id: str, subject: str, relation: str, template: str
) -> None:
    example = examples_of(format)[id]
    assert (example.subject, example.relation, example.template) == (subject, relation, template)


@pytest.mark.parametrize("format", format_names())
def test_aligned_contexts_give_the_memory_answers(format: str) -> None:
    for example in load_dataset(FILES[format], format).conflicts.select(kind="aligned"):
        assert example.context_answers == example.memory_answers


@pytest.mark.parametrize("format", format_names())
def test_only_examples_of_kind_none_have_no_context(format: str) -> None:
    for example in load_dataset(FILES[format], format).conflicts:
        assert (example.contexts == ()) == (example.kind == "none")


@pytest.mark.parametrize("format", format_names())
def test_the_bare_prompt_is_the_prompt_of_kind_none_of_the_same_item(format: str) -> None:
    """All examples with one question of one subject are of one item."""
    conflicts = load_dataset(FILES[format], format).conflicts
    alone = {(e.subject, e.relation, e.question): e.prompt for e in conflicts.select(kind="none")}
    assert all(alone[e.subject, e.relation, e.question] == e.bare_prompt for e in conflicts)


def test_search_results_are_documents_one_by_one() -> None:
    example = examples_of("conflicts")["conflicts-conflict-due-to-outdated-information-1-conflict"]
    assert example.contexts == (
        "Bridges of Belmora | 2012\nBelmora has six bridges.",
        "New bridge opens | 2023\nThe seventh bridge of Belmora opened.",
    )


@pytest.mark.parametrize("format", format_names())
def test_splits_are_by_subject_and_seed(format: str) -> None:
    for example in load_dataset(FILES[format], format, seed=7).conflicts:
        assert example.split == split_of(example.subject, 7)


def test_set_and_examples_are_named_after_the_format() -> None:
    conflicts = load_dataset(FILES["popqa"], "popqa").conflicts
    assert {conflicts.name, *(example.source for example in conflicts)} == {"popqa"}


def test_memotrap_wordings_of_one_event_have_one_subject() -> None:
    examples = examples_of("memotrap")
    assert examples["memotrap-3-none"].subject == examples["memotrap-4-none"].subject


def test_a_repeated_option_does_not_shift_the_letters(tmp_path: Path) -> None:
    row = changed("conflictbank", options=["x", "x", "y", "z"], correct_option="C", replace_option="D")
    loaded = load_dataset(write_json_lines(tmp_path / "rows.jsonl", [row]), "conflictbank")
    assert loaded.conflicts.examples[0].memory_answers == ("y",)


@pytest.mark.parametrize("format", ["nq-swap", "counterfact", "conflicts"])
def test_parquet_gives_the_same_set_as_json(tmp_path: Path, format: str) -> None:
    pl.DataFrame(rows_of(FILES[format])).write_parquet(tmp_path / "rows.parquet")
    assert load_dataset(tmp_path / "rows.parquet", format) == load_dataset(FILES[format], format)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_objects_line_by_line_are_read_under_both_endings(tmp_path: Path, suffix: str) -> None:
    path = write_json_lines(tmp_path / f"rows{suffix}", rows_of(FILES["confiqa"]))
    assert load_dataset(path, "confiqa") == load_dataset(FILES["confiqa"], "confiqa")


def test_a_line_separator_inside_a_json_text_does_not_end_the_line(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed("confiqa", cf_context="one\u2028two\x85three")])
    assert load_dataset(path, "confiqa").conflicts.examples[0].context == "one\u2028two\x85three"


def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + FILES["confiqa"].read_bytes())
    assert load_dataset(tmp_path / "rows.json", "confiqa") == load_dataset(FILES["confiqa"], "confiqa")


def test_long_fields_of_a_table_are_read_and_the_limit_is_put_back(tmp_path: Path) -> None:
    row = changed("dynamicqa", context="[ENTITY] " + "x" * 300_000)
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, row)
        writer.writeheader()
        writer.writerow(row)
    limit = csv.field_size_limit()
    loaded = load_dataset(tmp_path / "rows.csv", "dynamicqa")
    assert len(loaded.conflicts.examples[0].context) > 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("format", "field"), [(name, field) for name in FORMATS for field in FORMATS[name].fields])
def test_a_missing_field_is_named(tmp_path: Path, format: str, field: str) -> None:
    row = changed(format)
    del row[field]
    message = message_of(write_json_lines(tmp_path / "rows.jsonl", [row]), format)
    assert "line 1" in message
    assert field in message.split("got a row")[0]


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        (
            "nq-swap",
            {"org_answer": []},
            "'org_answer' should be a list with at least one text that is not empty, got []",
        ),
        ("nq-swap", {"sub_answer": [" "]}, "'sub_answer' should be a list with at least one"),
        ("nq-swap", {"org_answer": [1911]}, "'org_answer' should be a list of texts, got [1911]"),
        ("nq-swap", {"question": 5}, "'question' should be a text that is not empty, got 5"),
        ("nq-swap", {"sub_context": "  "}, "'sub_context' should be a text that is not empty, got '  '"),
        ("popqa", {"possible_answers": '["painter", '}, "'possible_answers' should be a list of texts"),
        ("popqa", {"possible_answers": "nan"}, "'possible_answers' should be a list of texts, got 'nan'"),
        ("popqa", {"possible_answers": "['a' 'b', 'c']"}, "'possible_answers' should be a list of texts"),
        ("popqa", {"possible_answers": "['O''Brien']"}, "'possible_answers' should be a list of texts"),
        ("popqa", {"possible_answers": "['a' ... 'z']"}, "'possible_answers' should be a list of texts"),
        ("popqa", {"possible_answers": "[1911 1912]"}, "'possible_answers' should be a list of texts"),
        (
            "confiqa",
            {"orig_path_labeled": "[('a', 'b')]"},
            "'orig_path_labeled' should be a list of (subject, relation",
        ),
        ("memotrap", {"classes": "[' broth.', "}, "'classes' should be a list of texts"),
        ("memotrap", {"classes": "[' soup.', ' soup.']"}, "'classes' should be a list of different texts"),
        ("memotrap", {"answer_index": "2"}, "'answer_index' should be the text, letter or index of one of 2 options"),
        ("memotrap", {"prompt": "Too many cooks"}, "'prompt' should be an order to write or translate"),
        ("conflictbank", {"replace_option": "E"}, "'replace_option' should be the text, letter or index of one of 4"),
        ("dynamicqa", {"context": "nothing to fill"}, "'context' should be a text with [ENTITY] or 'painter' in it"),
        ("counterfact", {"requested_rewrite": {"prompt": "x"}}, "'requested_rewrite.target_true.str'"),
        ("counterfact-competition", {"base_prompt": "other"}, "'prompt' should be a text that says 'Lindqvist'"),
        ("conflicts", {"search_results": "none"}, "'search_results' should be a list of objects, got 'none'"),
        ("conflicts", {"search_results": []}, "'search_results' should be a list with at least one"),
        ("conflicts", {"conflict_type": "other"}, "'conflict_type' should be a text that starts with"),
    ],
)
def test_a_malformed_field_is_told_with_what_was_expected_and_what_came(
    tmp_path: Path, format: str, fields: dict[str, Any], expected: str
) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed(format, **fields)])
    assert expected in message_of(path, format)


def test_counterfact_without_a_place_for_the_subject_is_refused(tmp_path: Path) -> None:
    row = changed("counterfact")
    row["requested_rewrite"]["prompt"] = "The mother tongue is"
    message = message_of(write_json_lines(tmp_path / "rows.jsonl", [row]), "counterfact")
    assert "should be a text with {} in the place of the subject, got 'The mother tongue is'" in message


def test_stop_names_file_and_line_of_the_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(FILES["coconflictqa"].read_text(encoding="utf-8") + "[1]\n", encoding="utf-8")
    assert message_of(path, "coconflictqa").startswith(f"{path}, line 4: expected an object with fields, got [1]")


def test_skip_keeps_good_rows_under_their_ids_and_reports_each_bad_one(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed("confiqa", cf_answer=None), changed("confiqa", 1)])
    path.write_text(path.read_text(encoding="utf-8") + "{half\n", encoding="utf-8")
    conflicts, skipped, _ = load_dataset(path, "confiqa", on_error="skip")
    assert [example.id for example in conflicts] == ["confiqa-2-conflict", "confiqa-2-aligned", "confiqa-2-none"]
    assert [message.split(":")[0] for message in skipped] == [f"{path}, line 1", f"{path}, line 3"]


def test_a_bad_item_of_an_array_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([changed("confiqa"), "text"]), encoding="utf-8")
    assert f"{path}, item 2: expected an object" in message_of(path, "confiqa")


def test_a_bad_row_of_parquet_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pl.DataFrame([changed("nq-swap"), changed("nq-swap", 1, question=None)]).write_parquet(path)
    assert f"{path}, row 2: the field 'question'" in message_of(path, "nq-swap")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ('"too few"\n', "expected 3 fields as in the first line, got 1"),
        ("\"Write a quote\",\"['a', 'b']\",7\n", "the field 'answer_index'"),
        ('"never closed,"[]",0\n', "expected a record of quoted and separated fields"),
    ],
)
def test_a_bad_record_of_a_table_is_placed_at_the_line_where_it_starts(
    tmp_path: Path, record: str, problem: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(FILES["memotrap"].read_text(encoding="utf-8") + record, encoding="utf-8")
    assert f"{path}, line 15: {problem}" in message_of(path, "memotrap")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.json", None, "Could not read"),
        ("empty.json", b"", "gave no NQ-Swap, MacNoise example; it has no rows"),
        ("empty.jsonl", b"\n", "it has no rows"),
        ("empty.csv", b"", "should start with a line of field names"),
        ("header.csv", b"question,org_context\n", "it has no rows"),
        ("latin.csv", b"question\nM\xfcnchen\n", "is not UTF-8 text"),
        ("broken.json", b'[{"question": ', "is not valid JSON"),
        ("broken.parquet", b"PAR0", "as Parquet"),
        ("missing.parquet", None, "as Parquet"),
        ("rows.pkl", b"", "has the ending '.pkl'; expected one of .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = message_of(tmp_path / name, "nq-swap")
    assert expected in message
    assert "\n" not in message


def test_skip_still_refuses_a_file_without_one_good_row() -> None:
    with pytest.raises(UserError, match=r"gave no PopQA example; the first problem is: .*confiqa\.json, item 1"):
        load_dataset(FILES["confiqa"], "popqa", on_error="skip")


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'squad' is not known; known are cad, coconflictqa, confiqa, .*zsre"):
        load_dataset(FILES["confiqa"], "squad")


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the published data {name} is not beside this checkout")
    return path


def test_published_competition_file_gives_the_prompts_that_do_not_say_their_answer_word_for_word() -> None:
    path = shared("comp-mech/full_data_sampled_gpt2_with_subjects.json")

    def shown(row: dict[str, Any]) -> bool:
        subject, stem, true, new = (
            f" {re.sub(r'[^a-z0-9]+', ' ', row[name].lower()).strip()} "
            for name in ("subject", "base_prompt", "target_true", "target_new")
        )
        return true in subject or subject in true or true in stem or new in stem or new in subject

    expected = [row["prompt"] for row in rows_of(path) if not shown(row)]
    loaded = load_dataset(path, "counterfact-competition")
    prompts = [example.prompt for example in loaded.conflicts.select(kind="conflict")]
    assert len(prompts) + len(loaded.left_out) == 10_000
    # Punctuation within words is read in two ways; few items depend on it.
    assert len(set(prompts) ^ set(expected)) <= 30
    assert set(prompts) <= {row["prompt"] for row in rows_of(path)}


def test_published_ramdocs_gives_the_documents_of_each_type_and_all_together() -> None:
    path = shared("ramdocs/RAMDocs_test.jsonl")
    rows = rows_of(path)
    loaded = load_dataset(path, "ramdocs")
    conflicts = {
        template: loaded.conflicts.select(templates=[template]) for template in ("ramdocs-misinfo", "ramdocs-all")
    }
    wrong = [r for r in rows if r["wrong_answers"] and any(d["type"] == "misinfo" for d in r["documents"])]
    assert len(loaded.left_out) == 1
    for part in conflicts.values():
        assert len(part) in (len(wrong), len(wrong) - 1)
    questions = {row["question"]: row for row in rows}
    for example in conflicts["ramdocs-all"]:
        row = questions[example.question]
        assert list(example.contexts) == [d["text"].strip() for d in row["documents"] if d["text"].strip()]
        assert set(example.memory_answers) == {answer.strip() for answer in row["gold_answers"]}


def test_published_nq_synth_gives_an_item_for_every_two_rows() -> None:
    path = shared("nq-synth/nq_synth_2_-1.jsonl")
    rows = rows_of(path)
    loaded = load_dataset(path, "cad")
    assert len(loaded.conflicts.select(kind="conflict")) + len(loaded.left_out) == len(rows) / 2
    gold = {(row["context_string"].rpartition("Question:")[2].strip(), row["gold_answers"].strip()) for row in rows}
    for example in loaded.conflicts.select(kind="conflict"):
        assert (f"{example.question}\nAnswer:", *example.context_answers) in gold
        assert "references listed above" not in example.prompt


@pytest.mark.parametrize(
    ("format", "fields", "problem"),
    [
        ("ramdocs", {"documents": ["text"]}, "a list of objects with text and type"),
        ("faitheval", {"choices": ["A"]}, "an object with label and text"),
        ("faitheval", {"answerKey": "C"}, "one of A, B"),
        ("faitheval", {"choices": None}, "a row with choices, or of a file with inconsistent"),
        ("mquake", {"requested_rewrite": []}, "a list with at least one rewrite"),
        ("mquake", {"requested_rewrite": [{"prompt": "Ida Fenn is"}]}, "a prompt that has {} for its subject"),
        ("kre", {"answer": "D"}, "one of 2 options"),
        ("cub", {"context_type": "golden"}, "one of gold, edited, conflicting, irrelevant"),
        ("cub", {"target_new": None}, "a text that is not empty"),
        ("cub", {"template": "<|im_start|>user\n<subject> is"}, "from the file of a base model"),
        ("cub", {"template_w_context": "<subject-2> is in <target>. <subject> is"}, "a sentence to complete"),
        ("conflictnq", {"fake_passages": "Otto"}, "a list of objects with a passage"),
        ("conflictnq", {"fake_passages": [{"summary": "Brandt"}]}, "a list with at least one passage"),
        ("whoqa", {"answer_by_context": []}, "a list of passages, whose answers"),
        ("whoqa", {"contexts": [" "]}, "passages that are not empty"),
        ("cad", {"input_index": 9}, "in two rows that follow each other, not in 1"),
    ],
)
def test_what_a_newer_reader_cannot_read_is_told(
    tmp_path: Path, format: str, fields: dict[str, Any], problem: str
) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed(format, **fields)])
    assert problem in message_of(path, format)


@pytest.mark.parametrize(
    ("name", "row", "kind", "answers"),
    [
        ("inconsistent", {"answers": ["the sky", "the ground"]}, "conflict", ("the sky", "the ground")),
        ("unanswerable", {"answers": ["unknown"]}, "irrelevant", ()),
    ],
)
def test_faitheval_tasks_without_choices_are_told_by_the_name_of_the_file(
    tmp_path: Path, name: str, row: dict[str, Any], kind: str, answers: tuple[str, ...]
) -> None:
    asked = {"qid": "1", "question": "What do stones fall towards?", "context": "Stones lie in Quill."}
    path = write_json_lines(tmp_path / f"FaithEval-{name}-test.jsonl", [asked | row])
    example = load_dataset(path, "faitheval").conflicts.examples[0]
    assert (example.kind, example.context_answers, example.template) == (kind, answers, f"faitheval-{name}")


@pytest.mark.parametrize(("name", "published"), [("1-proverb-ending.csv", 860), ("4-history-of-science-qa.csv", 736)])
def test_published_memotrap_file_loads_whole_but_for_copies_and_endings_that_are_the_same(
    name: str, published: int
) -> None:
    path = shared(f"memotrap/{name}")
    loaded = load_dataset(path, "memotrap")
    assert pl.read_csv(path).height == published
    assert len(loaded.conflicts.select(kind="conflict")) + len(loaded.left_out) == published
    assert {example.prompt for example in loaded.conflicts.select(kind="conflict")} <= {
        row["prompt"] for row in rows_of(path)
    }


@pytest.mark.parametrize(
    ("format", "fields"),
    [
        ("nq-swap", {"org_answer": ["Ida Fenn", "Fenn"], "sub_answer": ["the fenn."]}),
        ("confiqa", {"orig_alias": ["Jon Wick"]}),
        ("coconflictqa", {"parametric_answer": "greta lund"}),
        ("conflictbank", {"options": ["x", "Kell", "y", "the Kell"]}),
        ("dynamicqa", {"replace_name": "Artist"}),
        ("paraconflict", {"Distracted Token": "old Belmora"}),
        ("counterfact-competition", {"target_new": "Corvo", "prompt": "X: It is Corvo. The Mark II is built by"}),
        ("memotrap", {"classes": "[' the soup.', ' soup.']"}),
    ],
)
def test_an_item_whose_two_answers_are_the_same_by_alias_is_left_out_whole_and_counted(
    tmp_path: Path, format: str, fields: dict[str, Any]
) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed(format, **fields), changed(format, 1)])
    loaded = load_dataset(path, format)
    assert loaded.left_out == [f"{path}, line 1: the conflict context gives an answer of memory"]
    assert loaded.skipped == []
    assert {re.findall(r"-(\d+)-", example.id)[0] for example in loaded.conflicts} == {"2"}


@pytest.mark.parametrize("context", ["They are [ENTITY]s.", "A semi[ENTITY] and a [ENTITY]."])
def test_a_placeholder_inside_a_word_is_left_out_and_counted(tmp_path: Path, context: str) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed("dynamicqa", context=context), changed("dynamicqa", 1)])
    loaded = load_dataset(path, "dynamicqa")
    assert loaded.left_out == [f"{path}, line 1: the place to fill stands inside a word"]
    assert len(loaded.conflicts) == 3


def test_a_place_for_the_subject_inside_a_word_is_left_out_and_counted(tmp_path: Path) -> None:
    row = changed("counterfact")
    row["requested_rewrite"]["prompt"] = "The mother tongue of {}s is"
    path = write_json_lines(tmp_path / "rows.jsonl", [row, changed("counterfact", 1)])
    assert set(load_dataset(path, "counterfact").left_out) == {
        f"{path}, line 1: the place to fill stands inside a word"
    }


def test_the_answer_of_a_competition_prompt_is_replaced_as_a_whole_word(tmp_path: Path) -> None:
    prompt = "Redefine: The Mark II is built by Lind, not Lindqvist. The Mark II is built by"
    row = changed("counterfact-competition", target_new=" Lind", prompt=prompt)
    loaded = load_dataset(write_json_lines(tmp_path / "rows.jsonl", [row]), "counterfact-competition")
    aligned = loaded.conflicts.select(kind="aligned").examples[0]
    assert aligned.context == "Redefine: The Mark II is built by Corvo, not Lindqvist."


@pytest.mark.parametrize(
    ("subject", "stem", "true", "new", "why"),
    [
        ("Toyota Sprinter", "Toyota Sprinter is produced by", "Toyota", "Fiat", "memory"),
        ("Mexico", "The capital of Mexico is", "Mexico City", "Lima", "memory"),
        ("The Sprinter", "The Sprinter, built by Toyota, is a product of", "Toyota", "Fiat", "memory"),
        ("The Fiat Sprinter", "The Fiat Sprinter is produced by", "Toyota", "Fiat", "context"),
        ("The Sprinter", "The Sprinter is produced by", "Toyota", "Fiat", None),
    ],
)
@pytest.mark.parametrize("format", ["counterfact", "counterfact-competition", "paraconflict"])
def test_a_fact_whose_bare_prompt_says_an_answer_is_left_out_and_counted(
    tmp_path: Path, format: str, subject: str, stem: str, true: str, new: str, why: str | None
) -> None:
    told = f"{stem} {new}. {stem}"
    rewrite = {
        "prompt": stem.replace(subject, "{}"),
        "subject": subject,
        "relation_id": "P1",
        "target_true": {"str": true},
        "target_new": {"str": new},
    }
    row = {
        "counterfact": {"case_id": 1, "requested_rewrite": rewrite},
        "counterfact-competition": {
            "base_prompt": stem,
            "target_true": true,
            "target_new": new,
            "prompt": told,
            "subject": subject,
        },
        "paraconflict": {
            "Subject": subject,
            "Answer": true,
            "Distracted Token": new,
            "Clean Prompt": stem,
            "Substitution Conflict": told,
            "Coherent Conflict": told,
        },
    }[format]
    path = write_json_lines(tmp_path / "rows.jsonl", [row, changed(format, 1)])
    found = [sentence.split(": ")[1] for sentence in load_dataset(path, format).left_out]
    shows = {"memory": "in the subject or in the prompt without context", "context": "in the prompt without context"}
    assert found == ([f"the {why} answer shows {shows[why]}"] if why else [])


def written_by_numpy(*texts: str) -> str:
    return str(np.array(texts, dtype=object))


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("['Bergen' 'Bjorgvin']", ("Bergen", "Bjorgvin")),
        (written_by_numpy("O'Brien", "x", 'say "so"'), ("O'Brien", "x", 'say "so"')),
        (written_by_numpy(*(f"a long name, of number {i}" for i in range(9))), None),
        (repr(np.array(["a", "b"], dtype=object)), ("a", "b")),
        (repr(np.array(["a", "b"])), ("a", "b")),
        (repr(list(np.array(["a", "b"]))), ("a", "b")),
        ("Index(['a', 'b'], dtype='object')", ("a", "b")),
        ("['a', 'b',]", ("a", "b")),
        ("('a', \"b's\")", ("a", "b's")),
        ("['a\\'b']", ("a'b",)),
        ('["a", "b"]', ("a", "b")),
        ("Bergen", ("Bergen",)),
        ("1984", ("1984",)),
        ("[ENTITY]", ("[ENTITY]",)),
        ("(sic) Bergen", ("(sic) Bergen",)),
        ("the 'Bergen' line", ("the 'Bergen' line",)),
        ("Bergen's", ("Bergen's",)),
        ("None of them, 'a' or \"b\"", ("None of them, 'a' or \"b\"",)),
    ],
)
def test_a_written_list_is_read_item_by_item_and_any_other_text_is_one_item(
    tmp_path: Path, written: str, texts: tuple[str, ...] | None
) -> None:
    texts = texts or tuple(f"a long name, of number {i}" for i in range(9))
    path = write_json_lines(tmp_path / "rows.jsonl", [changed("nq-swap", org_answer=written)])
    assert load_dataset(path, "nq-swap").conflicts.examples[0].memory_answers == texts


def test_a_question_spelled_in_several_ways_is_one_subject_in_one_split(tmp_path: Path) -> None:
    spellings = ["Who Painted  the hall?", "who painted the hall", '"Who painted the hall?"', "Who painted the hall ?"]
    rows = [changed("nq-swap", question=text, sub_answer=[f"b{i}"]) for i, text in enumerate(spellings)]
    for seed in range(5):
        conflicts = load_dataset(write_json_lines(tmp_path / "rows.jsonl", rows), "nq-swap", seed=seed).conflicts
        assert conflicts.subjects == [spellings[0]]
        assert len({example.split for example in conflicts}) == 1
        assert {example.question for example in conflicts} == set(spellings)


@pytest.mark.parametrize(
    ("path", "relation"),
    [
        ("[('Tern Press', 'founded by', 'Alba Reyes')]", "founded by"),
        (
            '[["Tern Press", "founded by", "Alba Reyes"], ["Alba Reyes", "lives in", "Belmora"]]',
            "founded by / lives in",
        ),
        ([["Tern Press", "founded by", "Alba Reyes"]], "founded by"),
        ("('Tern Press', 'founded by', 'Alba Reyes')", "founded by"),
    ],
)
def test_confiqa_takes_subject_and_relation_from_its_path(tmp_path: Path, path: Any, relation: str) -> None:
    rows = write_json_lines(tmp_path / "rows.jsonl", [changed("confiqa", orig_path_labeled=path)])
    found = {(example.subject, example.relation) for example in load_dataset(rows, "confiqa").conflicts}
    assert found == {("Tern Press", relation)}


def own_form(**fields: Any) -> dict[str, Any]:
    row = changed("paraconflict", Answer="Belmora", Answer_ns=["Old Belmora", "Belmora"]) | fields
    del row["Category"]
    return row


def test_paraconflict_of_its_own_repository_has_aliases_and_the_file_as_relation(tmp_path: Path) -> None:
    loaded = load_dataset(write_json_lines(tmp_path / "World Capital.jsonl", [own_form()]), "paraconflict")
    assert {example.memory_answers for example in loaded.conflicts} == {("Belmora", "Old Belmora")}
    assert {example.relation for example in loaded.conflicts} == {"World Capital"}


@pytest.mark.parametrize(
    ("coherent", "context"),
    [
        (
            "Parliament sits in Quill. Q: Which capital has it? A: It is",
            "Parliament sits in Quill. Q: Which capital has it?",
        ),
        ("Parliament sits in Quill, so the capital of Ostravia is", "Parliament sits in Quill, so"),
        ("In Quill it sits, said J. Doe.\nIts capital is", "In Quill it sits, said J. Doe."),
    ],
)
def test_the_context_of_a_coherent_conflict_ends_before_the_question(
    tmp_path: Path, coherent: str, context: str
) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [own_form(**{"Coherent Conflict": coherent})])
    example = load_dataset(path, "paraconflict").conflicts.select(templates=["paraconflict-coherent"]).examples[0]
    assert (example.context, example.prompt) == (context, coherent)


def test_last_context_of_a_coherent_conflict_is_not_the_last_token(tmp_path: Path, tiny_llama: Any) -> None:
    coherent = "Parliament sits in Quill. Its capital is"
    path = write_json_lines(tmp_path / "rows.jsonl", [own_form(**{"Coherent Conflict": coherent})])
    chosen = load_dataset(path, "paraconflict").conflicts.select(templates=["paraconflict-coherent"])
    [site] = sites_of(tiny_llama, ["residual"], layers=[0])
    last_context = record(tiny_llama, chosen, [site], "last_context")[site]
    torch.testing.assert_close(last_context, record(tiny_llama, ["Parliament sits in Quill."], [site], "last")[site])
    assert not torch.allclose(last_context, record(tiny_llama, chosen, [site], "last")[site])


def test_a_whole_prompt_without_a_sentence_before_the_question_is_left_out(tmp_path: Path) -> None:
    rows = [own_form(**{"Coherent Conflict": "Where in Quill parliament sits is"}), own_form(Subject="Vale")]
    left_out = load_dataset(write_json_lines(tmp_path / "rows.jsonl", rows), "paraconflict").left_out
    assert len(left_out) == 1
    assert "line 1: where the context ends cannot be told" in left_out[0]


def test_several_files_make_one_set_with_the_names_of_the_files_in_the_ids(tmp_path: Path) -> None:
    paths = [
        write_json_lines(tmp_path / f"{name}.jsonl", [changed("confiqa", question=f"{name}?")]) for name in ("qa", "mr")
    ]
    conflicts = load_dataset(paths, "confiqa").conflicts
    assert [example.id for example in conflicts.select(kind="none")] == ["confiqa-qa-1-none", "confiqa-mr-1-none"]


def test_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Two of the files are called rows"):
        load_dataset([tmp_path / "a" / "rows.json", tmp_path / "b" / "rows.csv"], "confiqa")


def test_a_repeated_case_is_a_malformed_row_like_any_other(tmp_path: Path) -> None:
    path = write_json_lines(
        tmp_path / "rows.jsonl",
        [changed("counterfact"), changed("counterfact", 1, case_id=41), changed("counterfact", 1)],
    )
    assert f"{path}, line 2: expected an id that no earlier example has" in message_of(path, "counterfact")
    loaded = load_dataset(path, "counterfact", on_error="skip")
    assert [sentence.split(":")[0] for sentence in loaded.skipped] == [f"{path}, line 2"]
    assert [example.id for example in loaded.conflicts][-1] == "counterfact-prompt-97-none"


def test_exact_copies_are_left_out_and_counted_in_all_files_together(tmp_path: Path) -> None:
    rows = [changed("nq-swap"), changed("nq-swap", 1), changed("nq-swap")]
    paths = [write_json_lines(tmp_path / "a.jsonl", rows), write_json_lines(tmp_path / "b.jsonl", rows[:1])]
    loaded = load_dataset(paths, "nq-swap")
    assert len(loaded.conflicts) == 6
    assert loaded.left_out == [
        f"{paths[0]}, line 3: an earlier item says the same",
        f"{paths[1]}, line 1: an earlier item says the same",
    ]


def test_half_of_a_character_is_told_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(changed("nq-swap", sub_context="It is \ud83d here.")) + "\n", encoding="utf-8")
    assert f"{path}, line 1: expected whole characters, got half of one in" in message_of(path, "nq-swap")


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ('a,"b\n1"\nc,"d\ne,f\n', 4),
        ('a,"b"\nc,"d\ne,"f"\n', 3),
        ('"a\nb","c\nd,"e"\n', 3),
        ('a,b\n"c,d', 3),
        ('a,"b ""x"" y\nc,d\n', 2),
    ],
)
def test_a_quote_that_is_not_closed_refuses_the_file_with_the_line_where_it_opens(
    tmp_path: Path, records: str, line: int
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + records, encoding="utf-8")
    with pytest.raises(UserError, match=rf'rows\.csv, line {line}: the quote " that a field starts with there'):
        load_dataset(path, "nq-swap", on_error="skip")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 2**20])
def test_an_array_is_read_the_same_in_windows_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    items = [1234567, -1.5e10, 'a]"[,é\U0001f600', None, True, [], {}, [[1, 2], {"a": [3]}], "", 12]
    for text in (json.dumps(items), json.dumps(items, indent=3, ensure_ascii=False) + "\n ", "[]", " [ ] "):
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        monkeypatch.setattr(rows_module, "_CHUNK", size)
        assert [item for _, item in read_rows(tmp_path / "rows.json")] == json.loads(text)


@pytest.mark.parametrize("text", ["[1, 2", "[1 2]", "[1,]", "[1] 2", "[1, {]", "[tru]", '["a', "[", "[" * 100_000])
def test_an_array_that_json_refuses_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises((ValueError, RecursionError)):
        json.loads(text)
    with pytest.raises(UserError, match="is not valid JSON"):
        list(read_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize("format", format_names())
def test_a_conversion_writes_what_a_loaded_set_saves(tmp_path: Path, format: str) -> None:
    load_dataset(FILES[format], format).conflicts.save(tmp_path / "saved.jsonl")
    converted = convert_dataset(FILES[format], format, tmp_path / "converted.jsonl")
    assert (tmp_path / "converted.jsonl").read_bytes() == (tmp_path / "saved.jsonl").read_bytes()
    assert converted.examples == len(ConflictSet.load(tmp_path / "converted.jsonl"))


def test_a_conversion_that_stops_leaves_no_file_and_no_folder(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [changed("confiqa"), {}])
    with pytest.raises(UserError, match="line 2"):
        convert_dataset(path, "confiqa", tmp_path / "new" / "folder" / "out.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_a_conversion_holds_far_less_of_a_row_than_the_row(tmp_path: Path) -> None:
    peaks = []
    for count in (50, 250):
        rows = [changed("nq-swap", question=f"q {i}", sub_context=f"{i} " + "word " * 4000) for i in range(count)]
        path = write_json_lines(tmp_path / f"{count}.jsonl", rows)
        tracemalloc.start()
        convert_dataset(path, "nq-swap", tmp_path / "out.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 200 * 20_000 / 10
