"""The records that everything else works on: ConflictExample and ConflictSet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from interp.errors import UserError
from interp.files import write_text

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


def split_of(subject: str, seed: int) -> Split:
    """The split of a subject: the same for every relation, phrasing, model and data set with this seed.

    Decided by a hash of the subject, so that no subject is ever in two splits and adding data moves nobody.
    Shares are 40 % train, 20 % dev, 40 % test.
    """
    digest = hashlib.sha256(f"{seed}:{subject.lower()}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in _SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return split
    return "test"


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
        return hashlib.sha256(self._to_json_lines().encode()).hexdigest()

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
        write_text(path, self._to_json_lines())

    @classmethod
    def load(cls, path: str | Path) -> ConflictSet:
        """Read a set that ``save`` wrote; its name is the file's stem.

        Raises:
            UserError: If the file is missing, empty, or a line is not an example (the line number is named).
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Could not read {path}: {error}; give a file written by `conflictscope data`.") from error
        examples = tuple(_parsed(line, path, number) for number, line in enumerate(lines, 1) if line.strip())
        if not examples:
            raise UserError(f"{path} has no examples; write it again with `conflictscope data build` or `convert`.")
        return cls(Path(path).stem, examples)

    def _to_json_lines(self) -> str:
        return "".join(json.dumps(dataclasses.asdict(e), ensure_ascii=False) + "\n" for e in self.examples)


_FIELDS = {field.name for field in dataclasses.fields(ConflictExample)}
_LISTS = {"memory_answers", "context_answers"}


def _parsed(line: str, path: str | Path, number: int) -> ConflictExample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend or remove the line.") from error
    if not isinstance(row, dict) or set(row) != _FIELDS:
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
    for name, choices in (("kind", CONTEXT_KINDS), ("split", SPLITS)):
        if row[name] not in choices:
            raise UserError(f"{path}, line {number}: {name} must be one of {', '.join(choices)}, not {row[name]!r}.")
    fields: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in row.items()}
    return ConflictExample(**fields)
