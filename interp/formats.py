"""Other people's data sets, read in their native formats into ConflictSets.

A format is a name, the fields that its rows need, and a reader: a function from one row to its items, registered
where it is defined. An item is a question with its contexts; it becomes one example for each context
(``conflict`` or ``aligned``) and one without (``none``). ``load_dataset`` takes the rows from a JSON, JSON lines,
CSV, TSV or Parquet file, and names file, place and field where a row cannot be read.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from interp.conflicts import ConflictExample, ConflictSet, ContextKind, split_of
from interp.errors import UserError


class Loaded(NamedTuple):
    """What ``load_dataset`` gives back.

    Attributes:
        conflicts: The examples, in the order of the file; the set is named after the format.
        skipped: One sentence for each row that was left out, with its place in the file.
    """

    conflicts: ConflictSet
    skipped: list[str]


class Context(NamedTuple):
    """A context and the answers that it gives; ``template`` is what its family adds to the format's name."""

    kind: ContextKind
    text: str
    answers: tuple[str, ...]
    template: str = ""


class Item(NamedTuple):
    """A question, what memory answers, and its contexts.

    Attributes:
        question: A question, or the stem of a sentence.
        memory_answers: The canonical answer first.
        contexts: The contexts; with ``completion``, whole prompts that end with the stem and are used as they are.
        subject: What is asked about; the question where empty.
        relation: What is asked about it; the format's name where empty.
        template: What the family adds to the format's name, for contexts that do not say.
        key: Tells the row from others in ids; the row number where empty.
        completion: Whether the model completes a sentence; else the prompt is the context, an empty line, and the
            lines ``Question: {question}`` and ``Answer:``.
    """

    question: str
    memory_answers: tuple[str, ...]
    contexts: tuple[Context, ...]
    subject: str = ""
    relation: str = ""
    template: str = ""
    key: str = ""
    completion: bool = False


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


def load_dataset(path: str | Path, format: str, *, on_error: Literal["stop", "skip"] = "stop", seed: int = 0) -> Loaded:
    """Read a data set from a local file.

    An id is template, row number (CounterFact: ``case_id``) and kind; it does not change when other rows are skipped.

    Args:
        path: A ``.json`` (an array, or one object a line), ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file.
        format: One of ``format_names()``.
        on_error: What to do with a row that cannot be read: ``stop`` raises, ``skip`` reports it in the result.
        seed: Decides the splits, which are by subject, or by question where rows name no subject.

    Raises:
        UserError: If the format is not known, the file cannot be read, no row is good, or a row is bad.
    """
    if format not in FORMATS:
        raise UserError(f"The format {format!r} is not known; known are {', '.join(format_names())}.")
    examples: list[ConflictExample] = []
    skipped: list[str] = []
    for number, (place, record) in enumerate(_records(Path(path)), 1):
        try:
            items = FORMATS[format].read(_row(record))
        except _BadRow as problem:
            message = f"{path}, {place}: {problem}"
            if on_error == "stop":
                raise UserError(
                    f"{message}; mend or remove it, or skip such rows (`--on-error skip`, on_error='skip')."
                ) from problem
            skipped.append(message)
        else:
            examples += (example for item in items for example in _examples(format, number, item, seed))
    if not examples:
        reason = f"the first problem is: {skipped[0]}" if skipped else "it has no rows"
        raise UserError(f"{path} gave no {FORMATS[format].title} example; {reason}.")
    return Loaded(ConflictSet(format, tuple(examples)), skipped)


def _examples(name: str, number: int, item: Item, seed: int) -> Iterator[ConflictExample]:
    subject = item.subject or item.question
    ask = item.question if item.completion else f"Question: {item.question}\nAnswer:"
    for context in (*item.contexts, Context("none", "", ())):
        template = "-".join(filter(None, (name, context.template or item.template)))
        whole = context.text if item.completion else f"{context.text}\n\n{ask}"
        yield ConflictExample(
            id=f"{template}-{item.key or number}-{context.kind}",
            subject=subject,
            relation=item.relation or name,
            question=item.question,
            context=whole.removesuffix(ask).strip(),
            memory_answers=item.memory_answers,
            context_answers=context.answers,
            kind=context.kind,
            template=template,
            source=name,
            prompt=whole if context.text else ask,
            split=split_of(subject, seed),
        )


class _BadRow(Exception):
    """A row that cannot be read; the message says which field, what was expected and what came."""


@dataclass(frozen=True)
class Row:
    """The fields of one row. Each method checks the type of what it returns, and strips white space.

    Attributes:
        fields: As the file has them; methods take a dotted name for a field of a nested object.
    """

    fields: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether there is such a field, and something in it."""
        return self.fields.get(name) not in (None, "", [])

    def value(self, name: str) -> Any:
        """The field as it is."""
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                there = ", ".join(map(str, self.fields))
                raise _BadRow(f"expected the field {name!r}, got a row with the fields {there}")
            value = value[part]
        return value

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.value(name)
        if not isinstance(value, str) or not value.strip():
            raise self.unexpected(name, "a text that is not empty")
        return value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or the JSON or Python text of one, in its own order."""
        items = self.value(name)
        if isinstance(items, str):
            items = _literal(items)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.unexpected(name, "a list of texts")
        return tuple(item.strip() for item in items)

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

    def unexpected(self, name: str, wanted: str) -> _BadRow:
        """The error for a field that is not what was wanted."""
        return _BadRow(f"the field {name!r} should be {wanted}, got {_shown(self.value(name))}")


def _row(record: object) -> Row:
    if isinstance(record, _BadRow):
        raise record
    if not isinstance(record, Mapping):
        raise _BadRow(f"expected an object with fields, got {_shown(record)}")
    return Row(record)


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _distinct(*texts: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


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
    if "{}" not in row.text("requested_rewrite.prompt"):
        raise row.unexpected("requested_rewrite.prompt", "a text with {} in the place of the subject")
    prompt = row.text("requested_rewrite.prompt").replace("{}", subject)
    case = str(row.value("case_id"))
    stems = [(prompt, "prompt", case)]
    stems += [(text, "paraphrase", f"{case}.{i}") for i, text in enumerate(row.aliases("paraphrase_prompts"), 1)]

    def contexts(stem: str) -> tuple[Context, Context]:
        return (
            Context("conflict", f"{prompt} {new[0]}. {stem}", new),
            Context("aligned", f"{prompt} {true[0]}. {stem}", true),
        )

    return [
        Item(stem, true, contexts(stem), subject, relation, template, key, completion=True)
        for stem, template, key in stems
    ]


@_format(
    "counterfact-competition",
    "CounterFact, in the format of Competition of Mechanisms",
    "base_prompt, target_true, target_new, prompt, subject",
    "Ortu et al. 2024, arXiv 2402.11655",
)
def _counterfact_competition(row: Row) -> list[Item]:
    stem, prompt = row.text("base_prompt"), row.text("prompt")
    true, new = row.text("target_true"), row.text("target_new")
    before, found, after = prompt.removesuffix(stem).rpartition(new)
    if not prompt.endswith(stem) or not found:
        raise row.unexpected("prompt", f"a text that says {new!r} and ends with the base prompt {stem!r}")
    conflict = Context("conflict", prompt, (new,))
    aligned = Context("aligned", f"{before}{true}{after}{stem}", (true,))
    return [Item(stem, (true,), (conflict, aligned), row.text("subject"), completion=True)]


@_format(
    "paraconflict",
    "ParaConflict",
    "Category, Subject, Answer, Distracted Token, Clean Prompt, Substitution Conflict, Coherent Conflict",
    "Li et al. 2025, arXiv 2503.10996",
)
def _paraconflict(row: Row) -> list[Item]:
    distracted = (row.text("Distracted Token"),)
    contexts = (
        Context("conflict", row.text("Substitution Conflict"), distracted, "substitution"),
        Context("conflict", row.text("Coherent Conflict"), distracted, "coherent"),
    )
    stem, answers = row.text("Clean Prompt"), row.answers("Answer")
    return [Item(stem, answers, contexts, row.text("Subject"), row.text("Category"), completion=True)]


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
    return [Item(row.text("question"), memory, contexts, row.text("subj"), row.text("prop") if row.has("prop") else "")]


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
    return [Item(row.text("question"), memory, contexts)]


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


def _search_results(row: Row) -> str:
    results = row.value("search_results")
    if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
        raise row.unexpected("search_results", "a list of objects")
    texts = [str(result.get("short_text") or result.get("snippet") or "").strip() for result in results]
    heads = [" | ".join(str(result[name]) for name in ("title", "date") if result.get(name)) for result in results]
    if not any(texts):
        raise row.unexpected("search_results", "a list with at least one short_text or snippet")
    return "\n\n".join(f"{head}\n{text}".strip() for head, text in zip(heads, texts, strict=True) if text)


@_format("popqa", "PopQA", "subj, prop, obj, question, possible_answers", "Mallen et al. 2023, arXiv 2212.10511")
def _popqa(row: Row) -> list[Item]:
    memory = _distinct(row.text("obj"), *row.answers("possible_answers"))
    return [Item(row.text("question"), memory, (), row.text("subj"), row.text("prop"))]


_Records = Iterator[tuple[str, object]]


def _records(path: Path) -> _Records:
    """The rows of a file with their places; a row that is not one is a ``_BadRow``."""
    readers: dict[str, Callable[[Path], _Records]] = {
        ".json": _json_records,
        ".jsonl": _json_lines,
        ".csv": lambda path: _table_records(path, ","),
        ".tsv": lambda path: _table_records(path, "\t"),
        ".parquet": _parquet_records,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} has the ending {path.suffix!r}; expected one of {', '.join(readers)}.")
    return readers[path.suffix.lower()](path)


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror or error}; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it or give another file.") from error


def _json_records(path: Path) -> _Records:
    text = _text_of(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it or give another file.") from error
    yield from ((f"item {number}", item) for number, item in enumerate(items, 1))


def _json_lines(path: Path) -> _Records:
    # Not splitlines(): JSON texts may contain other line separators of Unicode.
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", _BadRow(f"expected one JSON object a line, got invalid JSON ({error})")


def _table_records(path: Path, delimiter: str) -> _Records:
    text = _text_of(path)
    # The limit belongs to the process: it is raised for this file only, and for no longer than it takes to parse it.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        lines = list(_table_lines(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)))
    finally:
        csv.field_size_limit(limit)
    if not lines or isinstance(lines[0][1], _BadRow):
        raise UserError(f"{path} should start with a line of field names; give a file that has one.")
    header = lines[0][1]
    for number, values in lines[1:]:
        if not isinstance(values, _BadRow) and len(values) != len(header):
            values = _BadRow(f"expected {len(header)} fields as in the first line, got {len(values)}")
        fields = values if isinstance(values, _BadRow) else dict(zip(header, values, strict=True))
        yield f"line {number}", fields


def _table_lines(reader: Any) -> Iterator[tuple[int, list[str] | _BadRow]]:
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            values = _BadRow(f"expected a record of quoted and separated fields, got an error ({error})")
        if values:
            yield first, values


def _parquet_records(path: Path) -> _Records:
    import polars as pl

    try:
        frame = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Could not read {path} as Parquet: {reason}; check the path and the file.") from error
    yield from ((f"row {number}", row) for number, row in enumerate(frame.iter_rows(named=True), 1))
