from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from interp.conflicts import ConflictExample, split_of
from interp.errors import UserError
from interp.formats import FORMATS, format_names, load_dataset

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
        ("coconflictqa", {"conflict": 2, "none": 2}),
        ("confiqa", {"conflict": 2, "aligned": 2, "none": 2}),
        ("conflictbank", {"conflict": 6, "aligned": 2, "none": 2}),
        ("conflicts", {"conflict": 2, "aligned": 1, "none": 3}),
        ("counterfact", {"conflict": 4, "aligned": 4, "none": 4}),
        ("counterfact-competition", {"conflict": 2, "aligned": 2, "none": 2}),
        ("dynamicqa", {"conflict": 2, "aligned": 2, "none": 2}),
        ("memotrap", {"conflict": 4, "none": 4}),
        ("nq-swap", {"conflict": 2, "aligned": 2, "none": 2}),
        ("paraconflict", {"conflict": 4, "none": 2}),
        ("popqa", {"none": 2}),
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
            "Redefine: The Corvo Mark II is built by Corvo. The Corvo Mark II is built by",
        ),
        (
            "paraconflict",
            "paraconflict-coherent-2-conflict",
            "Nina Strand won three belts in judo. Question: What does she do? Answer: She does",
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
        assert (example.context == "") == (example.kind == "none")


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
        ("popqa", {"possible_answers": "__import__('os')"}, "'possible_answers' should be a list of texts"),
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
    conflicts, skipped = load_dataset(path, "confiqa", on_error="skip")
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
    with pytest.raises(UserError, match=r"'squad' is not known; known are coconflictqa, confiqa, .*popqa"):
        load_dataset(FILES["confiqa"], "squad")


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the published data {name} is not beside this checkout")
    return path


def test_published_competition_file_gives_its_ten_thousand_prompts_word_for_word() -> None:
    path = shared("comp-mech/full_data_sampled_gpt2_with_subjects.json")
    conflicts = load_dataset(path, "counterfact-competition").conflicts.select(kind="conflict")
    assert len(conflicts) == 10_000
    assert [example.prompt for example in conflicts] == [row["prompt"] for row in rows_of(path)]


@pytest.mark.parametrize(("name", "published"), [("1-proverb-ending.csv", 860), ("4-history-of-science-qa.csv", 736)])
def test_published_memotrap_file_loads_whole(name: str, published: int) -> None:
    path = shared(f"memotrap/{name}")
    conflicts = load_dataset(path, "memotrap").conflicts.select(kind="conflict")
    assert [example.prompt for example in conflicts] == [row["prompt"] for row in rows_of(path)]
    assert len(conflicts) == pl.read_csv(path).height == published
