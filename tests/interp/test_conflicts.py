import dataclasses
import hashlib
import json

import pytest

from interp import conflicts
from interp.conflicts import ConflictSet, json_line, shows_answer, split_of, subject_key
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


def test_a_line_is_what_json_makes_of_the_fields():
    odd = 'a "b" \\ \n\t\x00\x1f\x7f é\u2028\U0001f600'
    example = dataclasses.replace(
        tiny_conflicts().examples[0],
        context=odd,
        prompt=f"{odd}\n\n{odd}",
        memory_answers=(odd, ""),
        context_answers=(),
    )
    for one in (example, dataclasses.replace(example, context=""), dataclasses.replace(example, prompt=odd[1:])):
        line = json_line(one)
        assert json.loads(line) == json.loads(json.dumps(dataclasses.asdict(one)))
        # No control character, and so no second line, stands in it as it is.
        assert [code for code in line if code < 32] == [10]
        assert line.endswith(b"\n")


def test_half_of_a_character_is_not_written(tmp_path):
    broken = dataclasses.replace(tiny_conflicts().examples[0], context="\ud83d")
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
        (lambda row: row.update(context="\ud83d"), r"'\\ud83d' is half of a character"),
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


def test_the_digest_is_computed_once(monkeypatch):
    written = []
    monkeypatch.setattr(conflicts, "json_line", lambda example: written.append(1) or json_line(example))
    some = tiny_conflicts()
    assert some.digest == some.digest == tiny_conflicts().digest
    assert len(written) == 2 * len(some)
