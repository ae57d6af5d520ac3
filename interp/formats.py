"""Other people's data sets, read in their native formats into ConflictSets.

A format is a name, the fields that its rows need, and a reader: a function from one row to its items, registered
where it is defined. An item is a question with its contexts; it becomes one example for each context
(``conflict`` or ``aligned``) and one without (``none``). ``load_dataset`` takes the rows from JSON, JSON lines,
CSV, TSV or Parquet files, ``convert_dataset`` writes their examples to a file as they come; both name file, place and
field where a row cannot be read, and leave out, and count, what could not be measured:

- items whose conflict context gives an answer of memory: whichever an answer used, it would count as both,
- items whose answer a prompt gives away without a context, where the format's reader says so (``Item.unusable``),
- exact copies of an earlier item.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from interp.answers import contains_answer, overlap
from interp.conflicts import (
    ConflictExample,
    ConflictSet,
    ContextKind,
    example_of,
    shows_answer,
    split_of_key,
    subject_key,
    write_examples,
)
from interp.errors import UserError
from interp.rows import BadRow, read_rows
from interp.sentences import unfinished_sentence

OnError = Literal["stop", "skip"]


class Loaded(NamedTuple):
    """What ``load_dataset`` gives back.

    Attributes:
        conflicts: The examples, in the order of the files; the set is named after the format.
        skipped: One sentence for each malformed row, with its place in the file.
        left_out: One sentence for each item that could not be measured, or copies another, with its place.
    """

    conflicts: ConflictSet
    skipped: list[str]
    left_out: list[str]


class Converted(NamedTuple):
    """What ``convert_dataset`` gives back.

    Attributes:
        examples: How many were written.
        skipped: As in ``Loaded``.
        left_out: As in ``Loaded``.
        reasons: How many items were left out for each reason.
    """

    examples: int
    skipped: list[str]
    left_out: list[str]
    reasons: Counter[str]


class Context(NamedTuple):
    """A context and the answers that it gives.

    Attributes:
        kind: How it relates to memory.
        text: The text, or the texts of several documents, which a prompt shows with empty lines between them.
        answers: What it answers.
        template: What its family adds to the format's name.
    """

    kind: ContextKind
    text: str | tuple[str, ...]
    answers: tuple[str, ...]
    template: str = ""

    @property
    def joined(self) -> str:
        """The text, that of several documents with empty lines between them."""
        return self.text if isinstance(self.text, str) else "\n\n".join(self.text)


class Item(NamedTuple):
    """A question, what memory answers, and its contexts.

    Attributes:
        question: A question, or the stem of a sentence.
        memory_answers: The canonical answer first.
        contexts: The contexts; with ``completion``, whole prompts that are used as they are: they end with the stem,
            or else with an unfinished sentence, before which the context ends.
        subject: What is asked about; the question where empty.
        relation: What is asked about it; the format's name where empty.
        template: What the family adds to the format's name, for contexts that do not say.
        key: Tells the row from others in ids; the row number where empty.
        completion: Whether the model completes a sentence; else the prompt is the context, an empty line, and the
            lines ``Question: {question}`` and ``Answer:``.
        unusable: Why the item cannot be measured, if so: it is left out and counted under this reason.
    """

    question: str
    memory_answers: tuple[str, ...]
    contexts: tuple[Context, ...]
    subject: str = ""
    relation: str = ""
    template: str = ""
    key: str = ""
    completion: bool = False
    unusable: str = ""


@dataclass(frozen=True)
class Format:
    """A native format.

    Attributes:
        name: What ``load_dataset`` calls it.
        title: What its authors call it.
        fields: The fields that every row must have.
        source: Who published it.
        read: The items of a row.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    source: str
    read: Callable[[Row], list[Item]]


FORMATS: dict[str, Format] = {}


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    return sorted(FORMATS)


def load_dataset(
    path: str | Path | Sequence[str | Path], format: str, *, on_error: OnError = "stop", seed: int = 0
) -> Loaded:
    """Read a data set from local files.

    An id is template, row number (CounterFact: ``case_id``) and kind; it does not change when other rows are skipped.
    Of several files, the name stands before the number. Subjects that differ in spelling alone (``subject_key``) get
    the first spelling.

    Args:
        path: A ``.json`` (an array, or one object a line), ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or
            several.
        format: One of ``format_names()``.
        on_error: What to do with a row that cannot be read: ``stop`` raises, ``skip`` reports it in the result.
        seed: Decides the splits, which are by subject, or by question where rows name no subject.

    Raises:
        UserError: If the format is not known, a file cannot be read, nothing is left, or a row is bad.
    """
    reading = _Reading(_paths(path), format, on_error, seed)
    examples = tuple(reading.examples())
    return Loaded(ConflictSet(format, examples), reading.skipped, reading.left_out)


def convert_dataset(
    path: str | Path | Sequence[str | Path],
    format: str,
    out: str | Path,
    *,
    on_error: OnError = "stop",
    seed: int = 0,
) -> Converted:
    """Write the examples of a data set as conflict data, row by row: what ``load_dataset(...).conflicts.save`` writes.

    Args:
        path: As for ``load_dataset``.
        format: One of ``format_names()``.
        out: The JSON lines file to write, atomically.
        on_error: As for ``load_dataset``.
        seed: Decides the splits.

    Raises:
        UserError: As ``load_dataset`` does, or if ``out`` is one of the files to read.
    """
    paths = _paths(path)
    if same := [file for file in paths if Path(out).exists() and file.exists() and file.samefile(out)]:
        raise UserError(f"{out} is to be written, but {same[0]} is read from it; give another name to write to.")
    reading = _Reading(paths, format, on_error, seed)
    written = write_examples(out, reading.examples())
    return Converted(written, reading.skipped, reading.left_out, reading.reasons)


def _paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise UserError("There is no file to read; give one at least.")
    if repeated := [name for name, count in Counter(one.stem for one in paths).items() if count > 1]:
        raise UserError(
            f"Two of the files are called {repeated[0]}; ids carry the names of files, so rename one or leave it out."
        )
    return paths


_SAME = "the conflict context gives an answer of memory"
_COPY = "an earlier item says the same"
_NO_END = "where the context ends cannot be told: no sentence ends before the question"
_GIVEN_AWAY = "the memory answer shows in the subject or in the prompt without context"
_GIVEN_AWAY_TOO = "the context answer shows in the prompt without context"
_INSIDE_A_WORD = "the place to fill stands inside a word"


class _Reading:
    """One pass over files, which gives their examples and notes what became of the rest.

    Attributes:
        skipped: As in ``Loaded``.
        left_out: As in ``Loaded``.
        reasons: As in ``Converted``.
    """

    def __init__(self, paths: Sequence[Path], format: str, on_error: OnError, seed: int) -> None:
        if format not in FORMATS:
            raise UserError(f"The format {format!r} is not known; known are {', '.join(format_names())}.")
        self.skipped: list[str] = []
        self.left_out: list[str] = []
        self.reasons: Counter[str] = Counter()
        self._paths, self._format, self._on_error, self._seed = paths, FORMATS[format], on_error, seed
        self._ids: set[str] = set()
        self._digests: set[bytes] = set()
        self._spellings: dict[str, str] = {}

    def examples(self) -> Iterator[ConflictExample]:
        for path in self._paths:
            file = f"{path.stem}-" if len(self._paths) > 1 else ""
            for number, (place, record) in enumerate(read_rows(path), 1):
                where = f"{path}, {place}"
                try:
                    examples = self._of_row(_row(record, path.stem), f"{file}{number}", file, where)
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
        for item in self._format.read(row):
            digest = _digest(item)
            is_copy = digest in self._digests or digest in digests
            if why := _unusable(item) or (_COPY if is_copy else ""):
                reasons.append(why)
            else:
                digests.add(digest)
                examples += self._of_item(item, f"{file}{item.key}" if item.key else number)
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

    def _of_item(self, item: Item, name: str) -> Iterator[ConflictExample]:
        source = self._format.name
        subject = item.subject or item.question
        key = subject_key(subject)
        subject = self._spellings.setdefault(key, subject)
        split = split_of_key(key, self._seed)
        ask = _ask(item)
        for context in (*item.contexts, _NO_CONTEXT):
            family = context.template or item.template
            template = f"{source}-{family}" if family else source
            text = context.joined
            fields: dict[str, Any] = {
                "id": f"{template}-{name}-{context.kind}",
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


@dataclass(frozen=True)
class Row:
    """The fields of one row. Each method checks the type of what it returns, and strips white space.

    Attributes:
        fields: As the file has them; methods take a dotted name for a field of a nested object.
        file: The name of the file, without its ending.
    """

    fields: Mapping[str, Any]
    file: str = ""

    def has(self, name: str) -> bool:
        """Whether there is such a field, and something in it."""
        value = self.fields.get(name)
        return value == value and value not in (None, "", [])

    def value(self, name: str) -> Any:
        """The field as it is."""
        if name in self.fields:
            return self.fields[name]
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                there = ", ".join(map(str, self.fields))
                raise BadRow(f"expected the field {name!r}, got a row with the fields {there}")
            value = value[part]
        return value

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            value = self.value(name)
        if not isinstance(value, str) or not (text := value.strip()):
            raise self.unexpected(name, "a text that is not empty")
        return text

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or one written as JSON, Python, numpy or pandas write it, in its own order.

        Any other text is a list of itself alone; one that says that it is missing (``nan``) is refused.
        """
        items = self.value(name)
        if isinstance(items, str):
            items = _listed(items)
        if not isinstance(items, list) or not all([isinstance(item, str) for item in items]):
            raise self.unexpected(name, "a list of texts")
        return tuple([item.strip() for item in items])

    def answers(self, name: str) -> tuple[str, ...]:
        """The distinct texts of a list that has at least one which is not empty."""
        if not (answers := _distinct(*self.texts(name))):
            raise self.unexpected(name, "a list with at least one text that is not empty")
        return answers

    def aliases(self, name: str) -> tuple[str, ...]:
        """Like ``answers``, but the field may be missing or empty."""
        return _distinct(*self.texts(name)) if self.has(name) else ()

    def choice(self, name: str, options: tuple[str, ...]) -> str:
        """One of the options, which the field gives as its text, its letter or its index from 0."""
        value = str(self.value(name)).strip()
        if value in options:
            return value
        index = int(value) if value.isdecimal() else "ABCDEFGH".find(value) if len(value) == 1 else -1
        if not 0 <= index < len(options) or not options[index]:
            raise self.unexpected(name, f"the text, letter or index of one of {len(options)} options")
        return options[index]

    def unexpected(self, name: str, wanted: str) -> BadRow:
        """The error for a field that is not what was wanted."""
        return BadRow(f"the field {name!r} should be {wanted}, got {_shown(self.value(name))}")


def _row(record: object, file: str) -> Row:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, Mapping):
        raise BadRow(f"expected an object with fields, got {_shown(record)}")
    return Row(record, file)


# A string of Python, at the end of which a list or an item ends; else any character.
_TOKEN = re.compile(r"""('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")(?![^\s,])|\S""")
_NUMPY_CALL = re.compile(r"(?:\w+\.)?(?:array|Index|list)\((.*?)(?:,\s*dtype=[^\]]*)?\)", re.DOTALL)
_NUMPY_STRING = re.compile(r"""\b(?:np|numpy)\.str_\(('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\)""")
# As pandas, numpy, Python and JSON write them: other spellings are names.
_MISSING = {"nan", "NaN", "NaT", "None", "null", "<NA>"}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def _listed(text: str) -> Any:
    """The list that a text is or stands for; ``None`` if it is a broken or doubtful list."""
    text = text.strip()
    if text.startswith('["'):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return _python_strings(text)
    if text in _MISSING:
        return None
    written = call[1].strip() if (call := _NUMPY_CALL.fullmatch(text)) else text
    # "[ENTITY]" and "(sic)" are texts; what starts with a bracket and a quote, a number or another bracket is a list.
    if not re.match(r"""\[\s*["'\d\[\]-]|[({]\s*["']|\[\s*(np|numpy)\.|\[\s*(None|nan|null)\b""", written):
        return [text]
    if written[0] in "({" and written[-1] != _CLOSING[written[0]]:
        return [text]
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return _python_strings(written)


def _python_strings(written: str) -> list[str] | None:
    """The strings between two brackets, with a comma between any two, or between none of them as numpy writes."""
    if written[-1] != _CLOSING[written[0]]:
        return None
    tokens = list(_TOKEN.finditer(_NUMPY_STRING.sub(r"\1", written[1:-1])))
    strings = [token[1] for token in tokens if token[1]]
    if len(strings) < len(tokens):
        strings = [token[1] for token in tokens[::2]]
        if not all(strings) or any(token[0] != "," for token in tokens[1::2]):
            return None
    try:
        return [ast.literal_eval(string) for string in strings]
    except (ValueError, SyntaxError):
        return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _distinct(*texts: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys([text for one in texts if (text := one.strip())]))


_Reader = Callable[[Row], list[Item]]


def _format(name: str, title: str, fields: str, source: str) -> Callable[[_Reader], _Reader]:
    def register(read: _Reader) -> _Reader:
        FORMATS[name] = Format(name, title, tuple(fields.split(", ")), source, read)
        return read

    return register


@_format(
    "nq-swap",
    "NQ-Swap, MacNoise",
    "question, org_context, sub_context, org_answer, sub_answer",
    "Longpre et al. 2021, arXiv 2109.05052; Hong et al. 2024, arXiv 2305.01579",
)
def _nq_swap(row: Row) -> list[Item]:
    memory = row.answers("org_answer")
    conflict = Context("conflict", row.text("sub_context"), row.answers("sub_answer"))
    return [Item(row.text("question"), memory, (conflict, Context("aligned", row.text("org_context"), memory)))]


@_format("counterfact", "CounterFact", "case_id, requested_rewrite", "Meng et al. 2022, arXiv 2202.05262")
def _counterfact(row: Row) -> list[Item]:
    """The prompt with an answer, as a statement, before the prompt or a paraphrase of it.

    Neighbourhood prompts are left out: they have other subjects, which the data does not name.
    """
    true, new = (_distinct(row.text(f"requested_rewrite.target_{which}.str")) for which in ("true", "new"))
    subject, relation = row.text("requested_rewrite.subject"), row.text("requested_rewrite.relation_id")
    if "{}" not in (wording := row.text("requested_rewrite.prompt")):
        raise row.unexpected("requested_rewrite.prompt", "a text with {} in the place of the subject")
    prompt = wording.replace("{}", subject)
    inside = _INSIDE_A_WORD if _inside_a_word("{}", wording) else ""
    case = str(row.value("case_id"))
    stems = [(prompt, "prompt", case)]
    stems += [(text, "paraphrase", f"{case}.{i}") for i, text in enumerate(row.aliases("paraphrase_prompts"), 1)]

    def contexts(stem: str) -> tuple[Context, Context]:
        return (
            Context("conflict", f"{prompt} {new[0]}. {stem}", new),
            Context("aligned", f"{prompt} {true[0]}. {stem}", true),
        )

    return [
        Item(
            stem,
            true,
            contexts(stem),
            subject,
            relation,
            template,
            key,
            completion=True,
            unusable=inside or _given_away(subject, stem, true, new),
        )
        for stem, template, key in stems
    ]


def _given_away(subject: str, stem: str, memory: Sequence[str], context: Sequence[str]) -> str:
    """Why a fact cannot be measured that is to be completed, if so: as with the tables that the package ships."""
    if shows_answer(subject, memory, stem):
        return _GIVEN_AWAY
    return _GIVEN_AWAY_TOO if contains_answer(f"{subject} {stem}", context) else ""


def _inside_a_word(place: str, text: str) -> bool:
    return re.search(rf"(?<=\w){re.escape(place)}|{re.escape(place)}(?=\w)", text) is not None


@_format(
    "counterfact-competition",
    "CounterFact, in the format of Competition of Mechanisms",
    "base_prompt, target_true, target_new, prompt, subject",
    "Ortu et al. 2024, arXiv 2402.11655",
)
def _counterfact_competition(row: Row) -> list[Item]:
    stem, prompt = row.text("base_prompt"), row.text("prompt")
    true, new = row.text("target_true"), row.text("target_new")
    told = prompt.removesuffix(stem)
    places = list(re.finditer(rf"(?<!\w){re.escape(new)}(?!\w)", told))
    if not prompt.endswith(stem) or not places:
        raise row.unexpected("prompt", f"a text that says {new!r} and ends with the base prompt {stem!r}")
    conflict = Context("conflict", prompt, (new,))
    aligned = Context("aligned", f"{told[: places[-1].start()]}{true}{told[places[-1].end() :]}{stem}", (true,))
    subject = row.text("subject")
    unusable = _given_away(subject, stem, (true,), (new,))
    return [Item(stem, (true,), (conflict, aligned), subject, completion=True, unusable=unusable)]


@_format(
    "paraconflict",
    "ParaConflict",
    "Subject, Answer, Distracted Token, Clean Prompt, Substitution Conflict, Coherent Conflict",
    "Li et al. 2025, arXiv 2503.10996",
)
def _paraconflict(row: Row) -> list[Item]:
    """The form of the hub, and that of its own repository: a file for each category, aliases in ``Answer_ns``."""
    distracted = (row.text("Distracted Token"),)
    contexts = (
        Context("conflict", row.text("Substitution Conflict"), distracted, "substitution"),
        Context("conflict", row.text("Coherent Conflict"), distracted, "coherent"),
    )
    stem, answers = row.text("Clean Prompt"), _distinct(*row.answers("Answer"), *row.aliases("Answer_ns"))
    subject, category = row.text("Subject"), row.text("Category") if row.has("Category") else row.file
    unusable = _given_away(subject, stem, answers, distracted)
    return [Item(stem, answers, contexts, subject, category, completion=True, unusable=unusable)]


@_format(
    "conflictbank",
    "ConflictBank",
    "subject, relation, question, options, correct_option, replace_option, default_evidence, "
    "misinformation_conflict_evidence, temporal_conflict_evidence, semantic_conflict_evidence",
    "Su et al. 2024, arXiv 2408.12076",
)
def _conflictbank(row: Row) -> list[Item]:
    options = row.texts("options")
    memory = (row.choice("correct_option", options),)
    replaced = (row.choice("replace_option", options),)
    # The published table has this one column with the last word twice.
    twice = "misinformation_conflict_evidence_evidence"
    evidence = {
        "misinformation": row.text(twice if row.has(twice) else "misinformation_conflict_evidence"),
        "temporal": row.text("temporal_conflict_evidence"),
        "semantic": row.text("semantic_conflict_evidence"),
    }
    conflicts = (Context("conflict", text, replaced, template) for template, text in evidence.items())
    aligned = Context("aligned", row.text("default_evidence"), memory)
    return [Item(row.text("question"), memory, (*conflicts, aligned), row.text("subject"), row.text("relation"))]


@_format(
    "dynamicqa",
    "DynamicQA",
    "subj, obj, question, context, replace_name",
    "Marjanović et al. 2024, arXiv 2407.17023",
)
def _dynamicqa(row: Row) -> list[Item]:
    """The disputable part has no placeholder: its contexts say ``obj`` themselves."""
    obj, replacement, context = row.text("obj"), row.text("replace_name"), row.text("context")
    place = r"\[ENTITY\]" if "[ENTITY]" in context else rf"(?<!\w){re.escape(obj)}(?!\w)"
    if not re.search(place, context):
        raise row.unexpected("context", f"a text with [ENTITY] or {obj!r} in it")
    memory = _distinct(obj, *row.aliases("possible_answers"))
    contexts = (
        Context("conflict", re.sub(place, lambda _: replacement, context), (replacement,)),
        Context("aligned", re.sub(place, lambda _: obj, context), memory),
    )
    unusable = _INSIDE_A_WORD if _inside_a_word("[ENTITY]", context) else ""
    relation = row.text("prop") if row.has("prop") else ""
    return [Item(row.text("question"), memory, contexts, row.text("subj"), relation, unusable=unusable)]


@_format(
    "confiqa",
    "ConFiQA",
    "question, orig_context, cf_context, orig_answer, cf_answer",
    "Bi et al. 2024, arXiv 2412.15280",
)
def _confiqa(row: Row) -> list[Item]:
    memory = _distinct(row.text("orig_answer"), *row.aliases("orig_alias"))
    counterfactual = _distinct(row.text("cf_answer"), *row.aliases("cf_alias"))
    contexts = (
        Context("conflict", row.text("cf_context"), counterfactual),
        Context("aligned", row.text("orig_context"), memory),
    )
    return [Item(row.text("question"), memory, contexts, *_first_hop(row))]


def _first_hop(row: Row) -> tuple[str, str]:
    """The subject that a chain of facts starts from, and its relations; empty where the row does not name them."""
    if not row.has("orig_path_labeled"):
        return "", ""
    path = row.value("orig_path_labeled")
    if isinstance(path, str):
        path = _literal(path)
    hops = [path] if isinstance(path, list | tuple) and len(path) == 3 and isinstance(path[0], str) else path
    if not (
        isinstance(hops, list | tuple)
        and hops
        and all(isinstance(hop, list | tuple) and len(hop) == 3 for hop in hops)
        and all(isinstance(part, str) and part.strip() for hop in hops for part in hop)
    ):
        raise row.unexpected("orig_path_labeled", "a list of (subject, relation, object)")
    return hops[0][0].strip(), " / ".join(hop[1].strip() for hop in hops)


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


@_format(
    "coconflictqa",
    "CoConflictQA",
    "question, answers, context, parametric_answer",
    "Huang et al. 2025, arXiv 2502.15543",
)
def _coconflictqa(row: Row) -> list[Item]:
    """The context is right; memory is what the authors' model answered without it."""
    conflict = Context("conflict", row.text("context"), row.answers("answers"))
    return [Item(row.text("question"), (row.text("parametric_answer"),), (conflict,))]


# Where the stem begins: after an order to write or to translate something, or at the first option.
_MEMOTRAP_STEM = re.compile(r'Write .*?"[^"]*"[^":]*: |Translate .*?\nto:\n|.*?\n(?=A\. )', re.DOTALL)
_MEMOTRAP_OPTION = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)


@_format("memotrap", "MemoTrap", "prompt, classes, answer_index", "Liu and Liu 2023, github.com/liujch1998/memo-trap")
def _memotrap(row: Row) -> list[Item]:
    """The instruction is the context; the class that it does not ask for is the memorised one.

    The multiple-choice part tells each event in eight ways that share only their options: these are the subject, so
    that no event is in two splits. The text of an option is an alias of its letter.
    """
    prompt, classes = row.text("prompt"), row.texts("classes")
    demanded = row.choice("answer_index", classes)
    if not (instruction := _MEMOTRAP_STEM.match(prompt)):
        raise row.unexpected("prompt", "an order to write or translate, or a question with options")
    stem = prompt[instruction.end() :]
    options = dict(_MEMOTRAP_OPTION.findall(stem))

    def named(choices: Iterable[str]) -> tuple[str, ...]:
        return tuple(text for choice in choices for text in (choice, options.get(choice)) if text)

    conflict = Context("conflict", prompt, named([demanded]))
    if not (memory := named(choice for choice in classes if choice != demanded)):
        raise row.unexpected("classes", "a list of different texts")
    return [Item(stem, memory, (conflict,), " / ".join(sorted(options.values())), completion=True)]


@_format(
    "conflicts",
    "CONFLICTS",
    "question, conflict_type, correct_answer, search_results",
    "Cattan et al. 2025, arXiv 2506.08500",
)
def _conflicts(row: Row) -> list[Item]:
    """The search results of a row contradict each other, or not; what a model remembers is not part of the data.

    Where they do (opinions, outdated information, misinformation) the kind is ``conflict``, the correct answer is the
    context answer, and memory answers are unknown, hence empty. Where they do not (no conflict, complementary
    information) the kind is ``aligned``, and the correct answer is that of the context and of memory. Most rows about
    opinions and complementary information have no correct answer: their answers are empty.
    """
    conflict_type = row.text("conflict_type").lower()
    if not conflict_type.startswith(("conflict", "no conflict", "complementary")):
        raise row.unexpected("conflict_type", "a text that starts with Conflict, No conflict or Complementary")
    row.value("correct_answer")
    correct = (row.text("correct_answer"),) if row.has("correct_answer") else ()
    kind, memory = ("conflict", ()) if conflict_type.startswith("conflict") else ("aligned", correct)
    context = Context(kind, _search_results(row), correct, "-".join(conflict_type.split()))
    return [Item(row.text("question"), memory, (context,))]


def _search_results(row: Row) -> tuple[str, ...]:
    results = row.value("search_results")
    if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
        raise row.unexpected("search_results", "a list of objects")
    texts = [str(result.get("short_text") or result.get("snippet") or "").strip() for result in results]
    heads = [" | ".join(str(result[name]) for name in ("title", "date") if result.get(name)) for result in results]
    if not any(texts):
        raise row.unexpected("search_results", "a list with at least one short_text or snippet")
    return tuple(f"{head}\n{text}".strip() for head, text in zip(heads, texts, strict=True) if text)


@_format("popqa", "PopQA", "subj, prop, obj, question, possible_answers", "Mallen et al. 2023, arXiv 2212.10511")
def _popqa(row: Row) -> list[Item]:
    memory = _distinct(row.text("obj"), *row.answers("possible_answers"))
    return [Item(row.text("question"), memory, (), row.text("subj"), row.text("prop"))]
