"""Other people's data sets, read in their native formats into ConflictSets.

A format is a name, the fields that its rows need, and a reader: a function from one row to drafts of examples,
registered next to its definition. ``load_dataset`` takes the rows from a JSON, JSON lines, CSV, TSV or Parquet
file, hands each to the reader, and names file, line and field where a row cannot be read.

Which examples a row gives depends on what it has: ``conflict`` where a context contradicts memory, ``aligned``
where a context agrees with it, ``none`` for the question alone. Question formats are asked as
``context``, blank line, ``Question: ...``, ``Answer:``; completion formats keep their text as it is.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
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


class Draft(NamedTuple):
    """An example before it gets its id, source and split.

    Empty ``subject``, ``relation`` and ``key`` stand for the question, the format's name and the row number.
    ``template`` is the part of the template's name that follows the format's name.
    """

    kind: ContextKind
    prompt: str
    question: str
    context: str
    memory_answers: tuple[str, ...]
    context_answers: tuple[str, ...]
    subject: str = ""
    relation: str = ""
    template: str = ""
    key: str = ""


@dataclass(frozen=True)
class Format:
    """A native format.

    Attributes:
        name: What ``load_dataset`` calls it.
        title: What its authors call it.
        fields: The fields that every row must have.
        source: Who published it.
        read: The reader of one row.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    source: str
    read: Callable[[Row], list[Draft]]


FORMATS: dict[str, Format] = {}


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    return sorted(FORMATS)


def format_named(name: str) -> Format:
    """The format ``name``.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    if name not in FORMATS:
        raise UserError(f"The format {name!r} is not known; known are {', '.join(format_names())}.")
    return FORMATS[name]


def load_dataset(
    path: str | Path, format: str, *, on_error: Literal["stop", "skip"] = "stop", seed: int = 0
) -> Loaded:
    """Read a data set from a local file.

    An id is template, row number (CounterFact: ``case_id``) and kind, and stays the same when other rows are skipped.

    Args:
        path: A ``.json`` (an array, or one object a line), ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file.
        format: One of ``format_names()``.
        on_error: What to do with a row that cannot be read: ``stop`` raises, ``skip`` reports it in the result.
        seed: Decides the splits, which are by subject, or by question where rows name no subject.

    Raises:
        UserError: If the format is not known, the file cannot be read, no row is good, or a row is bad.
    """
    chosen = format_named(format)
    examples: list[ConflictExample] = []
    skipped: list[str] = []
    for number, (place, fields) in enumerate(_records(Path(path)), 1):
        try:
            drafts = chosen.read(Row(fields))
        except _BadRow as problem:
            message = f"{path}, {place}: {problem}"
            if on_error == "stop":
                raise UserError(f"{message}; mend or remove it, or skip such rows with on_error='skip'.") from problem
            skipped.append(message)
        else:
            examples += [_example(chosen.name, number, draft, seed) for draft in drafts]
    if not examples:
        reason = f"the first problem is: {skipped[0]}" if skipped else "it has no rows"
        raise UserError(f"{path} gave no {chosen.title} example; {reason}.")
    return Loaded(ConflictSet(chosen.name, tuple(examples)), skipped)


def _example(name: str, number: int, draft: Draft, seed: int) -> ConflictExample:
    template = f"{name}-{draft.template}" if draft.template else name
    subject = draft.subject or draft.question
    return ConflictExample(
        id=f"{template}-{draft.key or number}-{draft.kind}",
        subject=subject,
        relation=draft.relation or name,
        question=draft.question,
        context=draft.context,
        memory_answers=draft.memory_answers,
        context_answers=draft.context_answers,
        kind=draft.kind,
        template=template,
        source=name,
        prompt=draft.prompt,
        split=split_of(subject, seed),
    )


class _BadRow(Exception):
    """A row that cannot be read; the message says which field, what was expected and what came."""


class Row:
    """The fields of one row. Each method checks the type of what it returns, and strips white space."""

    def __init__(self, fields: object) -> None:
        if isinstance(fields, _BadRow):
            raise fields
        if not isinstance(fields, Mapping):
            raise _BadRow(f"expected an object with fields, got {_shown(fields)}")
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) not in (None, "")

    def value(self, name: str) -> Any:
        """The field as it is; a dot in the name enters a nested object."""
        value: Any = self._fields
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise _BadRow(f"expected the field {name!r}, got a row with the fields {', '.join(map(str, self._fields))}")
            value = value[part]
        return value

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.value(name)
        if not isinstance(value, str) or not value.strip():
            raise self.unexpected(name, "a text that is not empty")
        return value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, at least one of them not empty, or the JSON or Python text of such a list."""
        items = self._parsed(name)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.unexpected(name, "a list of texts")
        if not (kept := _answers(*items)):
            raise self.unexpected(name, "a list with at least one text that is not empty")
        return kept

    def aliases(self, name: str) -> tuple[str, ...]:
        """Like ``texts``, but the field may be missing or empty."""
        return self.texts(name) if name in self and self._parsed(name) != [] else ()

    def choice(self, name: str, options: tuple[str, ...]) -> int:
        """The index of an option, which the field gives as its text, its letter or its index from 0."""
        value = str(self.value(name)).strip()
        if value in options:
            return options.index(value)
        index = int(value) if value.isdecimal() else "ABCDEFGH".find(value) if len(value) == 1 else -1
        if not 0 <= index < len(options):
            raise self.unexpected(name, f"one of {len(options)} options as text, letter or index from 0")
        return index

    def unexpected(self, name: str, wanted: str) -> _BadRow:
        """The error for a field that is not what was wanted."""
        return _BadRow(f"the field {name!r} should be {wanted}, got {_shown(self.value(name))}")

    def _parsed(self, name: str) -> Any:
        value = self.value(name)
        if not isinstance(value, str):
            return value
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
        raise self.unexpected(name, "a list of texts, in JSON or Python")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _answers(*texts: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


class _Context(NamedTuple):
    kind: ContextKind
    text: str
    answers: tuple[str, ...]
    template: str = ""


def _asked(
    question: str, memory: tuple[str, ...], *contexts: _Context, subject: str = "", relation: str = ""
) -> list[Draft]:
    """The question after each context, and alone."""
    ask = f"Question: {question}\nAnswer:"
    drafts = [
        Draft(c.kind, f"{c.text}\n\n{ask}", question, c.text, memory, c.answers, subject, relation, c.template)
        for c in contexts
    ]
    return [*drafts, Draft("none", ask, question, "", memory, (), subject, relation)]


def _continued(
    stem: str,
    memory: tuple[str, ...],
    *prompts: _Context,
    subject: str = "",
    relation: str = "",
    template: str = "",
    key: str = "",
) -> list[Draft]:
    """Each prompt as it is, and its stem alone; what a prompt says before its stem is the context."""
    drafts = [
        Draft(p.kind, p.text, stem, p.text.removesuffix(stem).strip(), memory, p.answers, subject, relation,
              p.template or template, key)
        for p in prompts
    ]  # fmt: skip
    return [*drafts, Draft("none", stem, stem, "", memory, (), subject, relation, template, key)]


def _format(name: str, *, title: str, fields: tuple[str, ...], source: str) -> Callable[..., Callable[..., Any]]:
    def register(read: Callable[[Row], list[Draft]]) -> Callable[[Row], list[Draft]]:
        FORMATS[name] = Format(name, title, fields, source, read)
        return read

    return register


@_format(
    "nq-swap",
    title="NQ-Swap, MacNoise",
    fields=("question", "org_context", "sub_context", "org_answer", "sub_answer"),
    source="Longpre et al. 2021, arXiv 2109.05052; Hong et al. 2024, arXiv 2305.01579",
)
def _nq_swap(row: Row) -> list[Draft]:
    memory = row.texts("org_answer")
    return _asked(
        row.text("question"),
        memory,
        _Context("conflict", row.text("sub_context"), row.texts("sub_answer")),
        _Context("aligned", row.text("org_context"), memory),
    )


@_format(
    "counterfact",
    title="CounterFact",
    fields=("case_id", "requested_rewrite"),
    source="Meng et al. 2022, arXiv 2202.05262",
)
def _counterfact(row: Row) -> list[Draft]:
    """The edit as a statement, then the prompt or a paraphrase of it; neighbourhood prompts have other subjects."""
    true, new = (_answers(row.text(f"requested_rewrite.target_{which}.str")) for which in ("true", "new"))
    subject, relation = row.text("requested_rewrite.subject"), row.text("requested_rewrite.relation_id")
    if "{}" not in row.text("requested_rewrite.prompt"):
        raise row.unexpected("requested_rewrite.prompt", "a text with {} in the place of the subject")
    prompt = row.text("requested_rewrite.prompt").replace("{}", subject)
    case = str(row.value("case_id"))

    def drafts(stem: str, template: str, key: str) -> list[Draft]:
        return _continued(
            stem,
            true,
            _Context("conflict", f"{prompt} {new[0]}. {stem}", new),
            _Context("aligned", f"{prompt} {true[0]}. {stem}", true),
            subject=subject,
            relation=relation,
            template=template,
            key=key,
        )

    result = drafts(prompt, "prompt", case)
    for number, paraphrase in enumerate(row.aliases("paraphrase_prompts"), 1):
        result += drafts(paraphrase, "paraphrase", f"{case}.{number}")
    return result


@_format(
    "counterfact-competition",
    title="CounterFact in the format of Competition of Mechanisms",
    fields=("base_prompt", "target_true", "target_new", "prompt", "subject"),
    source="Ortu et al. 2024, arXiv 2402.11655",
)
def _counterfact_competition(row: Row) -> list[Draft]:
    stem, prompt = row.text("base_prompt"), row.text("prompt")
    true, new = _answers(row.text("target_true")), _answers(row.text("target_new"))
    before, found, after = prompt.removesuffix(stem).rpartition(new[0])
    if not prompt.endswith(stem) or not found:
        raise row.unexpected("prompt", f"a text that states {new[0]!r} and ends with the base prompt {stem!r}")
    return _continued(
        stem,
        true,
        _Context("conflict", prompt, new),
        _Context("aligned", f"{before}{true[0]}{after}{stem}", true),
        subject=row.text("subject"),
    )


@_format(
    "paraconflict",
    title="ParaConflict",
    fields=("Category", "Subject", "Answer", "Distracted Token", "Clean Prompt", "Substitution Conflict",
            "Coherent Conflict"),
    source="Li et al. 2025, arXiv 2503.10996",
)  # fmt: skip
def _paraconflict(row: Row) -> list[Draft]:
    distracted = _answers(row.text("Distracted Token"))
    return _continued(
        row.text("Clean Prompt"),
        row.texts("Answer"),
        _Context("conflict", row.text("Substitution Conflict"), distracted, "substitution"),
        _Context("conflict", row.text("Coherent Conflict"), distracted, "coherent"),
        subject=row.text("Subject"),
        relation=row.text("Category"),
    )


@_format(
    "conflictbank",
    title="ConflictBank",
    fields=("subject", "relation", "question", "options", "correct_option", "replace_option", "default_evidence",
            "misinformation_conflict_evidence", "temporal_conflict_evidence", "semantic_conflict_evidence"),
    source="Su et al. 2024, arXiv 2408.12076",
)  # fmt: skip
def _conflictbank(row: Row) -> list[Draft]:
    options = row.texts("options")
    memory, replaced = ((options[row.choice(f"{which}_option", options)],) for which in ("correct", "replace"))
    # The public release spells this one column with the word twice.
    twice = "misinformation_conflict_evidence_evidence"
    misinformation = twice if twice in row else "misinformation_conflict_evidence"
    return _asked(
        row.text("question"),
        memory,
        _Context("conflict", row.text(misinformation), replaced, "misinformation"),
        _Context("conflict", row.text("temporal_conflict_evidence"), replaced, "temporal"),
        _Context("conflict", row.text("semantic_conflict_evidence"), replaced, "semantic"),
        _Context("aligned", row.text("default_evidence"), memory),
        subject=row.text("subject"),
        relation=row.text("relation"),
    )


@_format(
    "dynamicqa",
    title="DynamicQA",
    fields=("subj", "obj", "question", "context", "replace_name"),
    source="Marjanović et al. 2024, arXiv 2407.17023",
)
def _dynamicqa(row: Row) -> list[Draft]:
    """The disputable partition has no placeholder: its contexts state ``obj`` itself."""
    obj, replacement, context = row.text("obj"), row.text("replace_name"), row.text("context")
    place = re.escape("[ENTITY]") if "[ENTITY]" in context else rf"(?<!\w){re.escape(obj)}(?!\w)"
    if not re.search(place, context):
        raise row.unexpected("context", f"a text with [ENTITY] or {obj!r} in it")
    memory = _answers(obj, *row.aliases("possible_answers"))
    return _asked(
        row.text("question"),
        memory,
        _Context("conflict", re.sub(place, lambda _: replacement, context), (replacement,)),
        _Context("aligned", re.sub(place, lambda _: obj, context), memory),
        subject=row.text("subj"),
        relation=row.text("prop") if "prop" in row else "",
    )


@_format(
    "confiqa",
    title="ConFiQA",
    fields=("question", "orig_context", "cf_context", "orig_answer", "cf_answer"),
    source="Bi et al. 2024, arXiv 2412.15280",
)
def _confiqa(row: Row) -> list[Draft]:
    memory = _answers(row.text("orig_answer"), *row.aliases("orig_alias"))
    counterfactual = _answers(row.text("cf_answer"), *row.aliases("cf_alias"))
    return _asked(
        row.text("question"),
        memory,
        _Context("conflict", row.text("cf_context"), counterfactual),
        _Context("aligned", row.text("orig_context"), memory),
    )


@_format(
    "coconflictqa",
    title="CoConflictQA",
    fields=("question", "answers", "context", "parametric_answer"),
    source="Huang et al. 2025, arXiv 2502.15543",
)
def _coconflictqa(row: Row) -> list[Draft]:
    """The context is true; memory is what the authors' model answered without it."""
    return _asked(
        row.text("question"),
        _answers(row.text("parametric_answer")),
        _Context("conflict", row.text("context"), row.texts("answers")),
    )


_ENDING = re.compile(r'(Write .*?"[^"]*"): (.+)', re.DOTALL)
_OPTION = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)


@_format(
    "memotrap",
    title="MemoTrap",
    fields=("prompt", "classes", "answer_index"),
    source="Liu and Liu 2023, github.com/liujch1998/memo-trap",
)
def _memotrap(row: Row) -> list[Draft]:
    """The instruction is the context; the class it does not ask for is the memorised ending.

    The multiple-choice part words each of its events in eight ways, and only the options stay the same: they are
    the subject, lest one event be in two splits. The text of an option is an alias of its letter.
    """
    prompt, classes = row.text("prompt"), row.texts("classes")
    demanded = classes[row.choice("answer_index", classes)]
    options = dict(_OPTION.findall(prompt))
    (context, memory) = (
        _answers(*(text for c in group for text in (c, options.get(c, ""))))
        for group in ([demanded], [c for c in classes if c != demanded])
    )
    conflict = _Context("conflict", prompt, context)
    if set(classes) <= set(options):
        stem = prompt[_OPTION.search(prompt).start() :]  # pyright: ignore[reportOptionalMemberAccess]
        return _continued(stem, memory, conflict, subject=" / ".join(sorted(options.values())), template="choice")
    if match := _ENDING.fullmatch(prompt):
        return _continued(match[2], memory, conflict, template="ending")
    return [Draft("conflict", prompt, prompt, prompt, memory, context)]


@_format(
    "conflicts",
    title="CONFLICTS",
    fields=("question", "conflict_type", "correct_answer", "search_results"),
    source="Cattan et al. 2025, arXiv 2506.08500",
)
def _conflicts(row: Row) -> list[Draft]:
    """The sources of a row conflict with each other, or do not; the row does not tell what a model remembers.

    Where they conflict (opinions, outdated information, misinformation), the kind is ``conflict``, the correct
    answer is the context answer, and memory answers are unknown, hence empty. Where they do not (none,
    complementary), the correct answer is that of the context and of memory, kind ``aligned``. Most rows about
    opinions and complementary information have no correct answer: their answers are empty.
    """
    conflict_type = row.text("conflict_type")
    if not re.match("conflict|no conflict|complementary", conflict_type, re.IGNORECASE):
        raise row.unexpected("conflict_type", "a text that starts with Conflict, No conflict or Complementary")
    kind: ContextKind = "conflict" if conflict_type.lower().startswith("conflict") else "aligned"
    row.value("correct_answer")
    correct = _answers(row.text("correct_answer")) if "correct_answer" in row else ()
    context = _Context(kind, _search_results(row), correct, "-".join(conflict_type.lower().split()))
    return _asked(row.text("question"), () if kind == "conflict" else correct, context)


def _search_results(row: Row) -> str:
    results = row.value("search_results")
    if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
        raise row.unexpected("search_results", "a list of objects")
    texts = [str(result.get("short_text") or result.get("snippet") or "").strip() for result in results]
    heads = [" | ".join(str(result[name]) for name in ("title", "date") if result.get(name)) for result in results]
    if not any(texts):
        raise row.unexpected("search_results", "a list with at least one short_text or snippet")
    return "\n\n".join(f"{head}\n{text}".strip() for head, text in zip(heads, texts, strict=True) if text)


@_format(
    "popqa",
    title="PopQA",
    fields=("subj", "prop", "obj", "question", "possible_answers"),
    source="Mallen et al. 2023, arXiv 2212.10511",
)
def _popqa(row: Row) -> list[Draft]:
    memory = _answers(row.text("obj"), *row.texts("possible_answers"))
    return _asked(row.text("question"), memory, subject=row.text("subj"), relation=row.text("prop"))


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a file with their places; a row that is not one is a ``_BadRow``."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
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


def _json_records(path: Path) -> Iterator[tuple[str, object]]:
    text = _text_of(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it or give another file.") from error
    yield from ((f"item {number}", item) for number, item in enumerate(items, 1))


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    # Not splitlines(): JSON texts may contain other line separators of Unicode.
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", _BadRow(f"expected one JSON object a line, got invalid JSON ({error})")


def _table_records(path: Path, delimiter: str) -> Iterator[tuple[str, object]]:
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


def _parquet_records(path: Path) -> Iterator[tuple[str, object]]:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Could not read {path} as Parquet: {reason}; check the path and the file.") from error
    yield from ((f"row {number}", row) for number, row in enumerate(frame.iter_rows(named=True), 1))
