"""One pass over data files: their rows become items, and items become examples."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from interp.answers import overlap
from interp.conflicts import ConflictExample, example_of, split_of_key, subject_key
from interp.errors import UserError
from interp.formats.items import Context, Format, Item
from interp.formats.markup import cleaned_item
from interp.formats.row import Row, row_of
from interp.rows import BadRow, Rows, read_rows
from interp.sentences import unfinished_sentence

OnError = Literal["stop", "skip"]
Markup = Literal["keep", "clean"]

_SAME = "the conflict context gives an answer of memory"
_COPY = "an earlier item says the same"
_NO_END = "where the context ends cannot be told: no sentence ends before the question"


class Reading:
    """One pass over files, which gives their examples and notes what became of the rest.

    Attributes:
        skipped: As in ``Loaded``.
        left_out: As in ``Loaded``.
        reasons: As in ``Converted``.
    """

    def __init__(
        self, paths: Sequence[Path], format: Format, on_error: OnError, seed: int, markup: Markup = "keep"
    ) -> None:
        self.skipped: list[str] = []
        self.left_out: list[str] = []
        self.reasons: Counter[str] = Counter()
        self._paths, self._format, self._on_error, self._seed = paths, format, on_error, seed
        self._read = format.read if markup == "keep" else lambda row: [cleaned_item(item) for item in format.read(row)]
        self._ids: set[str] = set()
        self._digests: set[bytes] = set()
        self._spellings: dict[str, str] = {}

    def examples(self) -> Iterator[ConflictExample]:
        """The examples of all files, as they are read."""
        for path in self._paths:
            file = f"{path.stem}-" if len(self._paths) > 1 else ""
            for number, (place, record) in enumerate(_joined(read_rows(path), self._format.together), 1):
                where = f"{path}, {place}"
                try:
                    examples = self._of_row(row_of(record, path.stem), f"{file}{number}", file, where)
                except BadRow as problem:
                    if self._on_error == "stop":
                        raise UserError(
                            f"{where}: {problem}; mend or remove it, or skip such rows "
                            "(`--on-error skip`, on_error='skip')."
                        ) from problem
                    self.skipped.append(f"{where}: {problem}")
                else:
                    yield from examples
        if not self._ids:
            sentences = [*self.skipped, *self.left_out]
            reason = f"the first problem is: {sentences[0]}" if sentences else "it has no rows"
            raise UserError(f"{', '.join(map(str, self._paths))} gave no {self._format.title} example; {reason}.")

    def _of_row(self, row: Row, number: str, file: str, where: str) -> list[ConflictExample]:
        """The examples of a row; it is noted only if none of its items is malformed."""
        examples: list[ConflictExample] = []
        digests: set[bytes] = set()
        reasons: list[str] = []
        for item in self._read(row):
            digest = _digest(item)
            is_copy = digest in self._digests or digest in digests
            if why := _unusable(item) or (_COPY if is_copy else ""):
                reasons.append(why)
            else:
                digests.add(digest)
                key = f"{file}{item.key}" if item.key else number
                examples += examples_of(item, self._format.name, key, self._seed, self._spellings)
        ids: set[str] = set()
        for example in examples:
            if example.id in self._ids or example.id in ids:
                raise BadRow(f"expected an id that no earlier example has, got {example.id!r} again")
            ids.add(example.id)
        self._ids |= ids
        self._digests |= digests
        if reasons:
            self.left_out += [f"{where}: {why}" for why in reasons]
            self.reasons.update(reasons)
        return examples


def examples_of(item: Item, source: str, key: str, seed: int, spellings: dict[str, str]) -> Iterator[ConflictExample]:
    """The examples of an item: one for each context, and one without.

    Args:
        item: The item.
        source: What the data set is called.
        key: Tells the item from others in ids.
        seed: Decides the split.
        spellings: The first spelling of every subject by its key; that of a new one is added.
    """
    subject = item.subject or item.question
    known_as = subject_key(subject)
    subject = spellings.setdefault(known_as, subject)
    split = split_of_key(known_as, seed)
    ask = _ask(item)
    for context in (*item.contexts, _NO_CONTEXT):
        family = context.template or item.template
        template = f"{source}-{family}" if family else source
        text = context.joined
        fields: dict[str, Any] = {
            "id": f"{template}-{key}-{context.kind}",
            "subject": subject,
            "relation": item.relation or source,
            "question": item.question,
            "contexts": _documents(item, context),
            "memory_answers": item.memory_answers,
            "context_answers": context.answers,
            "kind": context.kind,
            "template": template,
            "source": source,
            "prompt": ask if not text else text if item.completion else f"{text}\n\n{ask}",
            "bare_prompt": ask,
            "split": split,
        }
        yield example_of(fields)


_NO_CONTEXT = Context("none", "", ())


def _joined(rows: Rows, together: str) -> Rows:
    """The rows, or with a name of a field the first of those that follow each other with the same value, and all."""
    if not together:
        yield from rows
        return

    def value(row: tuple[str, object]) -> object:
        return row[1].get(together) if isinstance(row[1], Mapping) else row[0]

    for _, group in itertools.groupby(rows, value):
        (place, first), *others = group
        records = [first, *(record for _, record in others)]
        yield place, {**first, "rows": records} if isinstance(first, Mapping) else first


def _ask(item: Item) -> str:
    return item.question if item.completion else f"Question: {item.question}\nAnswer:"


def _documents(item: Item, context: Context) -> tuple[str, ...]:
    """The context alone: of a whole prompt, what stands before the stem or else before its unfinished sentence."""
    if not item.completion:
        texts = (context.text,) if isinstance(context.text, str) else context.text
        return tuple([stripped for text in texts if (stripped := text.strip())])
    text = context.joined
    start = len(text) - len(item.question)
    if text[start:].lower() != item.question.lower():
        start = unfinished_sentence(text)
    return (before,) if (before := text[:start].strip()) else ()


def _unusable(item: Item) -> str:
    """Why an item is left out, if it is."""
    if item.unusable:
        return item.unusable
    for context in item.contexts:
        if context.kind == "conflict" and _same(item.memory_answers, context.answers):
            return _SAME
        if not _documents(item, context):
            return _NO_END
    return ""


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    # However plain texts are compared, their last letter stays; most pairs need not be looked at any closer.
    plain = all(map(str.isascii, (*one, *other)))
    if plain and set(map(_last_letter, one)).isdisjoint(map(_last_letter, other)):
        return False
    return overlap(one, other) == "same"


def _last_letter(answer: str) -> str:
    """The last letter or digit of a text, in lower case."""
    return next((c for c in reversed(answer) if c.isalnum()), "").lower()


def _digest(item: Item) -> bytes:
    """The same for items that differ in their keys alone."""
    contexts = (
        "\1".join((context.kind, context.template, context.joined, *context.answers)) for context in item.contexts
    )
    answers = "\1".join(item.memory_answers)
    content = "\0".join((item.question, item.subject, item.relation, item.template, answers, *contexts))
    try:
        item.key.encode()
        return hashlib.blake2b(content.encode(), digest_size=16).digest()
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - 20) : error.start + 20]
        raise BadRow(f"expected whole characters, got half of one in {around!r}") from error
