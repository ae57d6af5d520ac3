"""The records that everything else works on: ConflictExample and ConflictSet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
        contexts: The documents that the prompt shows, one or several; none for kind ``none``.
        memory_answers: What training stored, canonical answer first, then aliases.
        context_answers: What the context says: the same as ``memory_answers`` for kind ``aligned``, empty for
            ``irrelevant`` and ``none``.
        kind: How the context relates to memory.
        template: The phrasing family of the prompt.
        source: The data set.
        prompt: The whole text that the model continues.
        bare_prompt: The prompt without its context, which asks the same closed-book: for kind ``none`` the prompt
            itself, empty where it is not known.
        split: Which split the subject belongs to.
    """

    id: str
    subject: str
    relation: str
    question: str
    contexts: tuple[str, ...]
    memory_answers: tuple[str, ...]
    context_answers: tuple[str, ...]
    kind: ContextKind
    template: str
    source: str
    prompt: str
    bare_prompt: str
    split: Split

    @property
    def context(self) -> str:
        """The documents as one text, with empty lines between them; empty for kind ``none``."""
        return "\n\n".join(self.contexts)


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


@lru_cache(maxsize=2**14)
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

        Files of earlier versions, whose rows have one ``context`` and no ``bare_prompt``, load too. The bare prompt is
        then the prompt without the context where that occurs once in it, else the prompt of kind ``none`` with the same
        subject, relation and template; where there is neither it is empty, and a ``Caution`` says how often.

        Raises:
            UserError: If the file is missing, empty, or a line is not an example or has the id of another (the line
                number is named).
        """
        examples: list[ConflictExample] = []
        lines: dict[str, int] = {}
        old: list[int] = []
        # Only line feeds end a line: JSON texts may contain other line separators of Unicode.
        with open_text(path, newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    example, is_old = _parsed(line, path, number)
                    if (earlier := lines.setdefault(example.id, number)) != number:
                        raise UserError(
                            f"{path}, line {number}: the id {example.id} is that of line {earlier}; ids must be unique."
                        )
                    if is_old:
                        old.append(len(examples))
                    examples.append(example)
        if not examples:
            raise UserError(f"{path} has no examples; write it again with `conflictscope data build` or `convert`.")
        _add_bare_prompts(path, examples, old)
        _caution_leaks(path, examples)
        return cls(Path(path).stem, tuple(examples))


def evenly(examples: Iterable[ConflictExample], count: int, seed: int) -> list[ConflictExample]:
    """At most ``count`` examples at random, of relations and phrasings in turn."""
    groups: dict[tuple[str, str], list[ConflictExample]] = {}
    for example in examples:
        groups.setdefault((example.relation, example.template), []).append(example)
    rng = random.Random(seed)
    queues = [rng.sample(group, len(group)) for group in groups.values()]
    chosen: list[ConflictExample] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: count - len(chosen)]
    return chosen


def about_some(conflicts: ConflictSet, count: int, seed: int) -> ConflictSet:
    """All examples about ``count`` subjects at most, drawn at random."""
    subjects = conflicts.subjects
    chosen = set(random.Random(seed).sample(subjects, min(count, len(subjects))))
    return ConflictSet(conflicts.name, tuple(example for example in conflicts if example.subject in chosen))


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


def _add_bare_prompts(path: str | Path, examples: list[ConflictExample], old: Sequence[int]) -> None:
    """Complete the examples with these numbers, which come from a file without bare prompts."""
    alone: dict[tuple[str, str, str], set[str]] = {}
    for example in examples if old else ():
        if example.kind == "none":
            alone.setdefault((example.subject, example.relation, example.template), set()).add(example.prompt)
    unknown = 0
    for i in old:
        example = examples[i]
        bare = example.prompt if example.kind == "none" else _without(example.context, example.prompt)
        same = alone.get((example.subject, example.relation, example.template), ())
        if not bare and len(same) == 1:
            [bare] = same
        unknown += not bare
        examples[i] = example_of({**vars(example), "bare_prompt": bare})
    if unknown:
        warnings.warn(
            Caution(
                f"{path} is of an earlier version, and what {unknown} of its {len(examples)} prompts ask without their "
                "context cannot be told; write it again with `conflictscope data build` or `convert`."
            ),
            stacklevel=3,
        )


def _without(context: str, prompt: str) -> str:
    """The prompt without its context; empty where the context does not occur once in it, or is all of it."""
    if not context:
        return ""
    if not (times := prompt.count(context)):
        # Prompts may start the context with a capital. Not by lowering both: some letters become two then.
        found = list(dict.fromkeys(re.findall(re.escape(context), prompt, re.IGNORECASE)))
        context, times = (found[0], prompt.count(found[0])) if len(found) == 1 else (context, 0)
    if times != 1:
        return ""
    before, _, after = prompt.partition(context)
    if not before.strip():
        return after.lstrip()
    if not after.strip():
        return before.rstrip()
    gaps = before[len(before.rstrip()) :], after[: len(after) - len(after.lstrip())]
    return before.rstrip() + max(gaps, key=len) + after.lstrip()


_FIELDS = [field.name for field in dataclasses.fields(ConflictExample)]
_OLD_FIELDS = {*_FIELDS, "context"} - {"contexts", "bare_prompt"}
_LISTS = {"contexts", "memory_answers", "context_answers"}
_TABLES = {".csv", ".tsv", ".parquet", ".arrow"}
_NOT_EMPTY = ("id", "subject", "prompt")


def _parsed(line: str, path: str | Path, number: int) -> tuple[ConflictExample, bool]:
    """The example of a line, and whether the line is of an earlier version, so that it lacks its bare prompt."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if Path(path).suffix.lower() in _TABLES:
            raise UserError(
                f"{path} is a table, not conflict data; make that of it with `conflictscope data build --from {path}`."
            ) from error
        raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend or remove the line.") from error
    is_old = isinstance(row, dict) and row.keys() == _OLD_FIELDS
    if not is_old and (not isinstance(row, dict) or row.keys() != set(_FIELDS)):
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
    if is_old:
        context = row.pop("context")
        row |= {"contexts": [context] if context.strip() else [], "bare_prompt": ""}
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
    if row["kind"] == "none" and row["bare_prompt"] != row["prompt"] and not is_old:
        raise UserError(
            f"{path}, line {number}: bare_prompt must be the prompt itself for the kind none; mend or remove the line."
        )
    # In the order of the class, whatever the file's: digests depend on it.
    fields: dict[str, Any] = {name: tuple(row[name]) if name in _LISTS else row[name] for name in _FIELDS}
    return example_of(fields), is_old
