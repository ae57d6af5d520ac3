"""Tables of a person's own: columns, rows, what is made of them and what is left out."""

import csv
import gzip
import json
import re

import polars as pl
import pytest

from interp import tables
from interp.answers import contains_answer
from interp.errors import UserError
from interp.tables import columns_of, read_table, table_conflicts

FACTS = [
    ("What is the capital of France?", "Lyon is the capital of France.", "Lyon", "Paris"),
    ("What is the capital of Japan?", "The capital of Japan is Osaka, says the law.", "Osaka", "Tokyo"),
    ("What is the capital of Italy?", "Milan is the capital of Italy; Milan is large.", "Milan", "Rome"),
    ("What is the capital of Spain?", "Spain is governed from its southern port.", "Seville", "Madrid"),
    ("Who wrote Hamlet?", "Hamlet is by William Shakespeare.", "William Shakespeare", "Shakespeare"),
    ("Which language is spoken in Brazil?", "In Brazil people speak Spanish.", "Spanish", "Portuguese"),
]


def rows(memory=True):
    names = ("Question", "Passage", "Answer", "Memory Answer")
    return [dict(zip(names if memory else names[:3], fact, strict=False)) for fact in FACTS]


def write_csv(path, some, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(some[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(some)
    return path


def by_kind(built, question):
    return {e.kind: e for e in built.conflicts if e.question == question}


def test_a_row_gives_prompts_of_every_kind(tmp_path):
    built = table_conflicts(read_table(write_csv(tmp_path / "mine.csv", rows())), None)
    found = by_kind(built, "What is the capital of Italy?")
    assert found["conflict"].prompt == (
        "Milan is the capital of Italy; Milan is large.\n\nQuestion: What is the capital of Italy?\nAnswer:"
    )
    assert (found["conflict"].memory_answers, found["conflict"].context_answers) == (("Rome",), ("Milan",))
    assert found["aligned"].context == "Rome is the capital of Italy; Rome is large."
    assert found["aligned"].context_answers == ("Rome",)
    assert found["none"].prompt == found["conflict"].bare_prompt == "Question: What is the capital of Italy?\nAnswer:"
    assert {e.source for e in built.conflicts} == {"mine"}


def test_a_spreadsheet_may_part_fields_by_semicolons(tmp_path):
    """The comma stays a comma in its fields, and a semicolon in those of a table with commas a semicolon."""
    path = write_csv(tmp_path / "mine.csv", rows(), delimiter=";")
    assert path.read_text().startswith("Question;Passage")
    commas = write_csv(tmp_path / "commas.csv", rows())
    assert read_table(path).rows == read_table(commas).rows


def test_irrelevant_contexts_are_of_the_same_split_and_say_nothing_of_the_row(tmp_path):
    many = [
        {"question": f"What is the code of town {n}?", "context": f"Town {n} has the code x{n}y.", "answer": f"x{n}y"}
        for n in range(60)
    ]
    table = read_table(write_csv(tmp_path / "mine.csv", [one | {"memory": f"m{i}"} for i, one in enumerate(many)]))
    built = table_conflicts(table, None)
    split = {e.context: e.split for e in built.conflicts if e.kind == "conflict"}
    irrelevant = [e for e in built.conflicts if e.kind == "irrelevant"]
    assert len(irrelevant) == 60
    for example in irrelevant:
        own = next(e for e in built.conflicts if e.kind == "conflict" and e.question == example.question)
        assert split[example.context] == example.split
        assert not contains_answer(example.context, [*own.context_answers, *own.memory_answers, example.subject])
    # Not the same one for all.
    assert len({e.context for e in irrelevant}) > 10


def test_what_cannot_be_made_is_counted(tmp_path):
    built = table_conflicts(read_table(write_csv(tmp_path / "mine.csv", rows())), None)
    kinds = by_kind(built, "Who wrote Hamlet?")
    assert "conflict" not in kinds
    assert kinds["aligned"].memory_answers == ("William Shakespeare",)
    assert "aligned" not in by_kind(built, "What is the capital of Spain?")
    assert built.reasons[tables._ALIGNED_ONLY] == 1
    assert built.reasons[tables._SAYS_OTHERWISE] == 1
    assert built.asked == 0


def test_without_a_column_memory_is_what_the_model_says(tmp_path, tiny_plain, monkeypatch):
    said = {fact[0]: fact[3] for fact in FACTS} | {FACTS[0][0]: "I don't know", FACTS[1][0]: "a b c d e f g h i j"}
    asked = []

    def answers(model, prompts, **_):
        asked.extend(prompts)
        found = [said[re.findall(r"Question: (.*)\nAnswer:$", prompt)[0]] for prompt in prompts]
        return type("Found", (), {"answers": found})

    monkeypatch.setattr(tables, "continue_greedily", answers)
    table = read_table(write_csv(tmp_path / "mine.csv", rows(memory=False)))
    built = table_conflicts(table, tiny_plain("llama"))
    assert built.asked == len(asked) == len(FACTS)
    assert built.reasons[tables._NOT_KNOWN] == 2
    assert by_kind(built, FACTS[2][0])["conflict"].memory_answers == ("Rome",)
    with pytest.raises(UserError, match="give a column of memory answers"):
        table_conflicts(table, None)


def test_the_real_model_says_what_it_knows_in_few_words(tmp_path, smollm2):
    table = read_table(write_csv(tmp_path / "mine.csv", rows(memory=False)[:3]))
    built = table_conflicts(table, smollm2)
    assert [e.memory_answers for e in built.conflicts if e.kind == "conflict"] == [("Paris",), ("Tokyo",), ("Rome",)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    expected = read_table(write_csv(tmp_path / "mine.csv", rows())).rows
    write_csv(tmp_path / "mine.tsv", rows(), "\t")
    (tmp_path / "mine.json").write_text(json.dumps(rows()))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    frame = pl.DataFrame(rows())
    frame.write_parquet(tmp_path / "mine.parquet")
    for name in ("mine.csv", "mine.jsonl", "mine.json"):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as stream:
            stream.write((tmp_path / name).read_bytes())
    for path in tmp_path.iterdir():
        assert read_table(path).rows == expected, path
        assert read_table(path).name == "mine"


def test_folders_are_read_file_by_file_also_as_datasets_saves_them(tmp_path):
    folder = tmp_path / "mine"
    (folder / "train").mkdir(parents=True)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "train" / "state.json").write_text("{}")
    frame = pl.DataFrame(rows())
    frame[:2].write_ipc_stream(folder / "train" / "data-00000-of-00002.arrow")
    frame[2:].write_ipc(folder / "train" / "data-00001-of-00002.arrow")
    table = read_table(folder)
    assert [row.question for row in table.rows] == [fact[0] for fact in FACTS]
    assert len({row.key for row in table.rows}) == len(FACTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no file that ends in one of"):
        read_table(tmp_path / "empty")


def test_columns_are_found_by_name_or_said():
    assert columns_of(["ID", "Query", "Retrieved Contexts", "Gold-Answer", "other"]) == {
        "question": "Query",
        "context": "Retrieved Contexts",
        "answer": "Gold-Answer",
        "id": "ID",
    }
    assert columns_of(["Frage", "Text", "Antwort"], {"question": "Frage", "answer": "Antwort"})["context"] == "Text"
    with pytest.raises(UserError, match="No column of the table is known to hold the question; name it, for example"):
        columns_of(["Frage", "text", "answer"])
    with pytest.raises(UserError, match="has no column 'Fragen'; it has Frage, text"):
        columns_of(["Frage", "text"], {"question": "Fragen"})
    with pytest.raises(UserError, match="There is no role 'frage' for a column; choose among question, context"):
        columns_of(["Frage"], {"frage": "Frage"})


@pytest.mark.parametrize(
    ("cell", "documents"),
    [
        ("['first', 'second']", ("first", "second")),
        (["first", {"text": "second"}, {"page_content": "third"}], ("first", "second", "third")),
        ([["first"], " second "], ("first", "second")),
        (1911, ("1911",)),
        ("one text, of [sic] course", ("one text, of [sic] course",)),
    ],
)
def test_cells_hold_one_document_or_several(tmp_path, cell, documents):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "q?", "contexts": cell, "answers": ["a"]}))
    assert read_table(path).rows[0].documents == documents


def test_rows_that_lack_something_are_told_with_their_place(tmp_path):
    some = [*rows(), {"Question": "Why?", "Passage": " ", "Answer": "x", "Memory Answer": "y"}]
    some.append({"Question": "Why?", "Passage": "p", "Answer": "", "Memory Answer": "y"})
    table = read_table(write_csv(tmp_path / "mine.csv", some))
    assert len(table.rows) == len(FACTS)
    assert [sentence.partition(", ")[2] for sentence in table.left_out] == [
        "line 8: it has no context",
        "line 9: it has no answer",
    ]
    with pytest.raises(UserError, match=r"no row that can be used; .*line 2: it has no context"):
        read_table(write_csv(tmp_path / "none.csv", some[-2:-1]))
    with pytest.raises(UserError, match="There is no"):
        read_table(tmp_path / "missing.csv")


def test_limit_and_sample(tmp_path):
    path = write_csv(tmp_path / "mine.csv", rows())
    assert [row.question for row in read_table(path, limit=2).rows] == [fact[0] for fact in FACTS[:2]]
    samples = {tuple(row.key for row in read_table(path, sample=3, seed=seed).rows) for seed in range(8)}
    assert all(len(sample) == 3 and list(sample) == sorted(sample) for sample in samples)
    assert len(samples) > 1
    assert read_table(path, sample=3, seed=1) == read_table(path, sample=3, seed=1)


def test_rows_with_one_id_are_told_apart(tmp_path):
    some = [row | {"id": "same"} for row in rows()]
    built = table_conflicts(read_table(write_csv(tmp_path / "mine.csv", some)), None)
    assert len({e.id for e in built.conflicts}) == len(built.conflicts)
