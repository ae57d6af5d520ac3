"""The records that everything else works on: ConflictExample and ConflictSet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from interp.answers import contains_answer
from interp.errors import Caution, UserError
from interp.files import atomic_path
from interp.rows import open_text

ContextKind = Literal["conflict", "aligned", "irrelevant", "none"]
Split = Literal["train", "dev", "test"]
CONTEXT_KINDS: tuple[ContextKind, ...] = get_args(ContextKind)
SPLITS: tuple[Split, ...] = get_args(Split)

_SPLIT_SHARES: dict[Split, float] = {"train": 0.4, "dev": 0.2, "test": 0.4}


@dataclass(frozen=True)
class ConflictExample:
    """One prompt, and what each source would answer.

    Attributes:
        id: Unique in its set.
        subject: What is asked about.
        relation: What is asked about it, for example ``capital``.
        question: The question, without context.
        context: What the prompt says; empty for kind ``none``.
        memory_answers: What training stored, canonical answer first, then aliases.
        context_answers: What the context says: the same as ``memory_answers`` for kind ``aligned``, empty for
            ``irrelevant`` and ``none``.
        kind: How the context relates to memory.
        template: The phrasing family of the prompt.
        source: The data set.
        prompt: The whole text that the model continues.
        split: Which split the subject belongs to.
    """

    id: str
    subject: str
    relation: str
    question: str
    context: str
    memory_answers: tuple[str, ...]
    context_answers: tuple[str, ...]
    kind: ContextKind
    template: str
    source: str
    prompt: str
    split: Split


def example_of(fields: Mapping[str, Any]) -> ConflictExample:
    """An example with all these fields: made eight times as fast as by its class, which sets each field on its own."""
    example = object.__new__(ConflictExample)
    vars(example).update(fields)
    return example


_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_AROUND = " \"'\u00ab\u00bb\u201e"


def subject_key(text: str) -> str:
    """What spellings of one subject, or of one question, have in common.

    Capitals, the forms of Unicode and of quotes, white space, quotes around the text and a question mark at its end
    make no difference.
    """
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text).translate(_STRAIGHT)
    return " ".join(plain.casefold().split()).strip(_AROUND).rstrip(_AROUND + "?") or text.lower()


def split_of(subject: str, seed: int) -> Split:
    """The split of a subject: the same for every relation, phrasing, model and data set with this seed.

    Decided by a hash of the subject's key, so that no subject is ever in two splits, however it is spelled, and adding
    data moves nobody. Shares are 40 % train, 20 % dev, 40 % test.
    """
    return split_of_key(subject_key(subject), seed)


def split_of_key(key: str, seed: int) -> Split:
    """The split of all subjects with this key."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in _SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return split
    return "test"


def shows_answer(subject: str, answers: Sequence[str], prompt: str = "") -> bool:
    """Whether an answer shows in its subject (as in Mexico City), or a subject in its answer, or an answer in a prompt.

    A model may then give the answer without knowing it: such facts tell nothing about memory.
    """
    return (
        contains_answer(subject, answers)
        or any(contains_answer(answer, [subject]) for answer in answers)
        or contains_answer(prompt, answers)
    )


@dataclass(frozen=True)
class ConflictSet:
    """An immutable list of examples with a name.

    Attributes:
        name: The data set.
        examples: The examples; their ids are unique.
    """

    name: str
    examples: tuple[ConflictExample, ...]

    def __post_init__(self) -> None:
        if repeated := [key for key, count in Counter(e.id for e in self.examples).items() if count > 1]:
            raise UserError(f"The data set {self.name} has two examples with the id {repeated[0]}; ids must be unique.")

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[ConflictExample]:
        return iter(self.examples)

    def select(
        self,
        *,
        kind: ContextKind | None = None,
        split: Split | None = None,
        templates: Collection[str] | None = None,
        relation: str | None = None,
    ) -> ConflictSet:
        """The examples that fit every condition given; ``None`` means any."""
        return ConflictSet(
            self.name,
            tuple(
                e
                for e in self.examples
                if kind in (None, e.kind)
                and split in (None, e.split)
                and (templates is None or e.template in templates)
                and relation in (None, e.relation)
            ),
        )

    @property
    def subjects(self) -> list[str]:
        """Distinct subjects, sorted."""
        return sorted({e.subject for e in self.examples})

    @cached_property
    def digest(self) -> str:
        """A hash of the content: two sets with the same digest have the same examples in the same order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json_line(example))
        return digest.hexdigest()

    def counts(self) -> dict[str, Any]:
        """How many examples and subjects there are, in all and by split, kind, relation and template."""
        by_split = {split: self.select(split=split) for split in SPLITS}
        return {
            "examples": len(self),
            "subjects": len(self.subjects),
            "subjects_by_split": {split: len(part.subjects) for split, part in by_split.items()},
            "examples_by_split": {split: len(part) for split, part in by_split.items()},
            "by_kind": dict(Counter(e.kind for e in self.examples)),
            "by_relation": dict(Counter(e.relation for e in self.examples)),
            "by_template": dict(Counter(e.template for e in self.examples)),
        }

    def save(self, path: str | Path) -> None:
        """Write the set as JSON lines, one example a line, atomically."""
        write_examples(path, self.examples)

    @classmethod
    def load(cls, path: str | Path) -> ConflictSet:
        """Read a set that ``save`` wrote; its name is the file's stem.

        Raises:
            UserError: If the file is missing, empty, or a line is not an example or has the id of another (the line
                number is named).
        """
        examples: list[ConflictExample] = []
        lines: dict[str, int] = {}
        # Only line feeds end a line: JSON texts may contain other line separators of Unicode.
        with open_text(path, newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    example = _parsed(line, path, number)
                    if (earlier := lines.setdefault(example.id, number)) != number:
                        raise UserError(
                            f"{path}, line {number}: the id {example.id} is that of line {earlier}; ids must be unique."
                        )
                    examples.append(example)
        if not examples:
            raise UserError(f"{path} has no examples; write it again with `conflictscope data build` or `convert`.")
        _caution_leaks(path, examples)
        return cls(Path(path).stem, tuple(examples))


def json_line(example: ConflictExample) -> bytes:
    """The line of a file of conflict data that holds this example, as UTF-8.

    Raises:
        UserError: If a text of it is not made of whole characters.
    """
    try:
        return orjson.dumps(vars(example), option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        raise UserError(f"The example {example.id!a} cannot be written ({error}); mend or leave it out.") from error


def write_examples(path: str | Path, examples: Iterable[ConflictExample]) -> int:
    """Write examples as JSON lines, atomically and as they come; gives their number."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb", buffering=2**20) as stream:
        for example in examples:
            stream.write(json_line(example))
            count += 1
    return count


def _caution_leaks(path: str | Path, examples: Iterable[ConflictExample]) -> None:
    splits: dict[str, set[Split]] = {}
    for example in examples:
        splits.setdefault(example.subject, set()).add(example.split)
    by_key: dict[str, set[Split]] = {}
    for subject, found in splits.items():
        by_key.setdefault(subject_key(subject), set()).update(found)
    if leaking := [key for key, found in by_key.items() if len(found) > 1]:
        warnings.warn(
            Caution(
                f"{path} has {len(leaking)} of {len(by_key)} subjects in several splits (the first is {leaking[0]!r}), "
                "so that results on test are not about unseen subjects; split them with interp.conflicts.split_of."
            ),
            stacklevel=3,
        )


_FIELDS = [field.name for field in dataclasses.fields(ConflictExample)]
_LISTS = {"memory_answers", "context_answers"}
_NOT_EMPTY = ("id", "subject", "prompt")


def _parsed(line: str, path: str | Path, number: int) -> ConflictExample:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend or remove the line.") from error
    if not isinstance(row, dict) or row.keys() != set(_FIELDS):
        raise UserError(
            f"{path}, line {number}: expected an object with the fields {', '.join(sorted(_FIELDS))}; "
            "convert other formats with `conflictscope data convert`."
        )
    for name, value in row.items():
        if name in _LISTS:
            valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
        else:
            valid = isinstance(value, str)
        if not valid:
            wanted = "a list of strings" if name in _LISTS else "a string"
            raise UserError(f"{path}, line {number}: {name} must be {wanted}; mend or remove the line.")
    for name in _NOT_EMPTY:
        if not row[name].strip():
            raise UserError(f"{path}, line {number}: {name} must not be empty; fill it in or remove the line.")
    for name in _LISTS:
        if not all(text.strip() for text in row[name]):
            raise UserError(f"{path}, line {number}: {name} must not hold an empty text; fill it in or take it out.")
    if "\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}, line {number}: {error.object[error.start]!r} is half of a character; mend or remove the line."
            ) from error
    for name, choices in (("kind", CONTEXT_KINDS), ("split", SPLITS)):
        if row[name] not in choices:
            raise UserError(f"{path}, line {number}: {name} must be one of {', '.join(choices)}, not {row[name]!r}.")
    # In the order of the class, whatever the file's: digests depend on it.
    fields: dict[str, Any] = {name: tuple(row[name]) if name in _LISTS else row[name] for name in _FIELDS}
    return example_of(fields)
