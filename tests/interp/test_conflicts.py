import dataclasses
import json

import pytest

from interp.conflicts import ConflictSet, split_of
from interp.errors import UserError
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
    conflicts = tiny_conflicts()
    written = []
    plain = ConflictSet._to_json_lines
    monkeypatch.setattr(ConflictSet, "_to_json_lines", lambda self: written.append(1) or plain(self))
    assert conflicts.digest == conflicts.digest == tiny_conflicts().digest
    assert len(written) == 2
