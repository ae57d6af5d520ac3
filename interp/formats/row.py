"""The fields of one row of a data file, each checked where it is read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interp.rows import BadRow


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
        if not (answers := distinct(*self.texts(name))):
            raise self.unexpected(name, "a list with at least one text that is not empty")
        return answers

    def aliases(self, name: str) -> tuple[str, ...]:
        """Like ``answers``, but the field may be missing or empty."""
        return distinct(*self.texts(name)) if self.has(name) else ()

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
        return BadRow(f"the field {name!r} should be {wanted}, got {shown(self.value(name))}")


def row_of(record: object, file: str) -> Row:
    """The row that a record of a file is; raises what says that it is none."""
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, Mapping):
        raise BadRow(f"expected an object with fields, got {shown(record)}")
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


def shown(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def distinct(*texts: str) -> tuple[str, ...]:
    """The texts without white space around them, each once; empty ones are left out."""
    return tuple(dict.fromkeys([text for one in texts if (text := one.strip())]))
