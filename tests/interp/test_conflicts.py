import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from interp import conflicts
from interp.conflicts import ConflictExample, ConflictSet, about_some, json_line, shows_answer, split_of, subject_key
from interp.errors import Caution, UserError
from interp.facts import load_facts, relations
from tests.tiny import tiny_conflicts


def test_a_saved_set_loads_as_it_was(tmp_path):
    odd = dataclasses.replace(tiny_conflicts().examples[0], id="odd", prompt='line\u2028separator "quoted" é')
    conflicts = ConflictSet("tiny", (*tiny_conflicts().examples, odd))
    conflicts.save(tmp_path / "tiny.jsonl")
    assert ConflictSet.load(tmp_path / "tiny.jsonl") == conflicts


def test_splits_have_their_shares():
    splits = [split_of(f"subject {i}", 0) for i in range(5000)]
    assert splits.count("train") / 5000 == pytest.approx(0.4, abs=0.03)
    assert splits.count("dev") / 5000 == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_subjects_of_the_fact_tables_are_in_the_splits_of_the_lower_case_rule(seed):
    """Autoencoders that are shipped were trained on the train split by this rule."""
    for subject in {fact.subject for relation in relations() for fact in load_facts(relation)}:
        digest = hashlib.sha256(f"{seed}:{subject.lower()}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        assert split_of(subject, seed) == ("train" if position < 0.4 else "dev" if position < 0.6 else "test")


@pytest.mark.parametrize(
    "spelling",
    [
        "Who wrote Straße?",
        "who wrote STRASSE",
        "  Who\twrote\n Straße ?",
        '"Who wrote Straße?"',
        "\u201cWho wrote Straße\u201d?",
        "\uff37ho wrote\u00a0Straße\uff1f",
    ],
)
def test_spellings_of_a_question_have_one_key(spelling):
    assert subject_key(spelling) == "who wrote strasse"


def test_composed_and_decomposed_letters_have_one_key():
    assert subject_key("Bogot\u00e1") == subject_key("Bogota\u0301") != subject_key("Bogota")


@pytest.mark.parametrize(
    ("subject", "answers", "prompt", "shown"),
    [
        ("Toyota Sprinter", ["Toyota"], "", True),
        ("Mexico", ["Mexico City"], "", True),
        ("the Sprinter", ["Toyota"], "Toyota's Sprinter is made by", True),
        ("the Sprinter", ["Toyota"], "The Sprinter, by Toyota, is made by", True),
        ("Niger", ["Nigeria"], "Niger is in", False),
    ],
)
def test_an_answer_shows_as_whole_words(subject, answers, prompt, shown):
    assert shows_answer(subject, answers, prompt) == shown


def test_all_prompts_of_so_many_subjects_are_drawn(capital_conflicts):
    some = about_some(capital_conflicts, 3, seed=0)
    assert len(some.subjects) == 3
    assert [e.id for e in some] == [e.id for e in capital_conflicts if e.subject in some.subjects]
    assert about_some(capital_conflicts, 3, seed=1).subjects != some.subjects
    assert about_some(capital_conflicts, 10_000, seed=0).examples == capital_conflicts.examples


def test_a_line_is_what_json_makes_of_the_fields():
    odd = 'a "b" \\ \n\t\x00\x1f\x7f é\u2028\U0001f600'
    example = dataclasses.replace(
        tiny_conflicts().examples[0],
        contexts=(odd, ""),
        prompt=f"{odd}\n\n{odd}",
        memory_answers=(odd, ""),
        context_answers=(),
    )
    for one in (example, dataclasses.replace(example, contexts=()), dataclasses.replace(example, prompt=odd[1:])):
        line = json_line(one)
        assert json.loads(line) == json.loads(json.dumps(dataclasses.asdict(one)))
        # No control character, and so no second line, stands in it as it is.
        assert [code for code in line if code < 32] == [10]
        assert line.endswith(b"\n")


def test_half_of_a_character_is_not_written(tmp_path):
    broken = dataclasses.replace(tiny_conflicts().examples[0], contexts=("\ud83d",))
    with pytest.raises(UserError, match="cannot be written"):
        ConflictSet("broken", (broken,)).save(tmp_path / "broken.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_is_not_part_of_a_set(tmp_path):
    tiny_conflicts().save(tmp_path / "tiny.jsonl")
    (tmp_path / "tiny.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "tiny.jsonl").read_bytes())
    assert ConflictSet.load(tmp_path / "tiny.jsonl") == tiny_conflicts()


def test_a_repeated_id_is_told_with_both_lines(tmp_path):
    first, second = map(json_line, tiny_conflicts().examples[:2])
    (tmp_path / "tiny.jsonl").write_bytes(first + second + first)
    with pytest.raises(UserError, match=r"tiny\.jsonl, line 3: the id .* is that of line 1"):
        ConflictSet.load(tmp_path / "tiny.jsonl")


def test_a_subject_in_two_splits_is_a_caution(tmp_path):
    one = dataclasses.replace(tiny_conflicts().examples[0], subject="Who is it?", split="train")
    other = dataclasses.replace(one, id="other", subject="who is it", split="test")
    ConflictSet("leaky", (one, other)).save(tmp_path / "leaky.jsonl")
    with pytest.warns(Caution, match="1 of 1 subjects in several splits"):
        ConflictSet.load(tmp_path / "leaky.jsonl")


def test_two_examples_with_one_id_are_refused():
    example = tiny_conflicts().examples[0]
    with pytest.raises(UserError, match="two examples with the id"):
        ConflictSet("twice", (example, example))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("kind"), "expected an object with the fields"),
        (lambda row: row.update(kind="maybe"), "kind must be one of"),
        (lambda row: row.update(memory_answers="Rome"), "memory_answers must be a list of strings"),
        (lambda row: row.update(subject=3), "subject must be a string"),
        (lambda row: row.update(id=""), "id must not be empty"),
        (lambda row: row.update(subject=" "), "subject must not be empty"),
        (lambda row: row.update(prompt="\n"), "prompt must not be empty"),
        (lambda row: row.update(contexts=["\ud83d"]), r"'\\ud83d' is half of a character"),
        (lambda row: row.update(contexts="It rains."), "contexts must be a list of strings"),
        (lambda row: row.update(contexts=["It rains.", 3]), "contexts must be a list of strings"),
        (lambda row: row.update(contexts=["It rains.", " "]), "contexts must not hold an empty text"),
        (lambda row: row.pop("bare_prompt"), "expected an object with the fields"),
        (lambda row: row.update(context="It rains."), "expected an object with the fields"),
        (lambda row: row.update(bare_prompt=None), "bare_prompt must be a string"),
        (lambda row: row.update(kind="none"), "bare_prompt must be the prompt itself for the kind none"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, change, message):
    tiny_conflicts().save(tmp_path / "tiny.jsonl")
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    row = json.loads(lines[2])
    change(row)
    lines[2] = json.dumps(row)
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"line 3: {message}"):
        ConflictSet.load(tmp_path / "tiny.jsonl")


@pytest.mark.parametrize(("text", "message"), [("", "has no examples"), ("{not json", "line 1: not valid JSON")])
def test_an_empty_or_broken_file_is_an_error(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        ConflictSet.load(tmp_path / "bad.jsonl")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="Could not read"):
        ConflictSet.load(tmp_path / "none.jsonl")


def old_row(prompt: str, context: str, **fields: str) -> dict[str, object]:
    """A row of a file without bare prompts."""
    row = json.loads(json_line(tiny_conflicts().examples[0])) | {"id": f"{context}/{prompt}", "context": context}
    del row["contexts"], row["bare_prompt"]
    return row | {"prompt": prompt, **fields}


def loaded_old(tmp_path: Path, *rows: dict[str, object]) -> list[ConflictExample]:
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(ConflictSet.load(tmp_path / "old.jsonl"))


@pytest.mark.parametrize(
    ("context", "prompt", "bare"),
    [
        ("It is Oslo.", "It is Oslo. The capital is", "The capital is"),
        ("it is Oslo.", "It is Oslo.\n\nQuestion: Which?\nAnswer:", "Question: Which?\nAnswer:"),
        ("It is Oslo.", "Read this.\n\nIt is Oslo.\nWhich is it?", "Read this.\n\nWhich is it?"),
        ("It is Oslo.", "Which is it?\n\nIt is Oslo.\n", "Which is it?"),
        ("a.*b", "a.*b axxb is", "axxb is"),
    ],
)
def test_a_row_without_a_bare_prompt_gets_its_prompt_without_the_context(tmp_path, context, prompt, bare):
    [example] = loaded_old(tmp_path, old_row(prompt, context))
    assert (example.contexts, example.prompt, example.bare_prompt) == ((context,), prompt, bare)


def test_a_row_of_kind_none_without_a_bare_prompt_gets_its_prompt(tmp_path):
    [example] = loaded_old(tmp_path, old_row("The capital is", "", kind="none"))
    assert (example.contexts, example.bare_prompt) == ((), "The capital is")


@pytest.mark.parametrize("context", ["Not there.", "Oslo", "Oslo, it is Oslo: the capital is"])
def test_a_context_that_cannot_be_taken_out_leaves_the_bare_prompt_of_kind_none(tmp_path, context):
    prompt = "Oslo, it is Oslo: the capital is"
    alone = old_row("The capital is", "", kind="none")
    others = [
        old_row(f"Other {field}", "", kind="none", **{field: "other"}) for field in ("subject", "relation", "template")
    ]
    example, *_ = loaded_old(tmp_path, old_row(prompt, context), *others, alone)
    assert example.bare_prompt == "The capital is"


def test_bare_prompts_that_cannot_be_told_are_counted_in_one_caution(tmp_path):
    two = [old_row(prompt, "", kind="none") for prompt in ("One is", "Two is")]
    with pytest.warns(Caution, match="what 2 of its 5 prompts ask without their context cannot be told") as told:
        examples = loaded_old(tmp_path, old_row("x", "a"), old_row("y", "a"), old_row("b c", "b"), *two)
    assert len(told) == 1
    assert [example.bare_prompt for example in examples] == ["", "", "c", "One is", "Two is"]


def test_a_loaded_old_set_is_saved_as_a_new_one(tmp_path):
    ConflictSet("new", tuple(loaded_old(tmp_path, old_row("b c", "b")))).save(tmp_path / "new.jsonl")
    assert ConflictSet.load(tmp_path / "new.jsonl").examples == tuple(loaded_old(tmp_path, old_row("b c", "b")))


@pytest.mark.parametrize("value", [None, ["It rains."]])
def test_a_malformed_context_of_an_old_row_is_named(tmp_path, value):
    with pytest.raises(UserError, match="line 1: context must be a string"):
        loaded_old(tmp_path, {**old_row("x", "a"), "context": value})


def test_the_digest_is_computed_once(monkeypatch):
    written = []
    monkeypatch.setattr(conflicts, "json_line", lambda example: written.append(1) or json_line(example))
    some = tiny_conflicts()
    assert some.digest == some.digest == tiny_conflicts().digest
    assert len(written) == 2 * len(some)
