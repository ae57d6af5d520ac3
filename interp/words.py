"""Read texts as words, so that answers can be found in them whatever their punctuation, accents and script.

1. Unicode's compatible forms become one (NFKC), invisible format characters go, digits become 0 to 9.
2. A regular expression finds the words: numbers with their sign, decimals and thousands (``-5``, ``3.5``, ``1,000``
   which is ``1000``), initials (``D.C.``), ``C++`` and ``C#``, every character of Korean and of scripts without spaces,
   and runs of letters and digits. Everything else separates words.
3. A hyphen, an apostrophe or a full stop next to a letter separates words or not, as the comparison needs it: "Lima's"
   contains "Lima", and "Al-Khwarizmi" is "Alkhwarizmi".
4. Articles are marked where another word follows: the "A" of "The answer is A" and of "Vitamin A" is none.
5. Case goes, and so do the accents of Latin and Greek letters, and the vowel signs of Arabic and Hebrew, where the
   caller folds them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from interp.scripts import is_unspaced

Span = tuple[int, int]
"""Which words of a text: the first, and the one after the last."""

# Signs that stand for others (apostrophes, hyphens, point, sharp), and signs that NFKC would make letters of a word.
_TYPED = str.maketrans(
    {
        **dict.fromkeys("\u00b4`\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc", "'"),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **{"\u00b7": ".", "\u266f": "#"},
        **dict.fromkeys("\N{TRADE MARK SIGN}\N{SERVICE MARK}\N{REGISTERED SIGN}"),
    }
)
# Superscripts, subscripts and fractions after a digit: NFKC would make 102 of 10 to the power of 2.
_RAISED = re.compile(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2080-\u2089\u2150-\u215e])")
# Letters that Unicode does not take for a letter and a mark.
_WHOLE_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ŧ": "t", "\u0131": "i", "þ": "th", "æ": "ae", "œ": "oe"}
)
# In terms of what ``_class_of`` calls characters.
_WORD = re.compile(
    r"(?P<initials>[aA](?:\.[aA])+\.?(?![aA0m]))"
    r"|um*"
    r"|(?:(?<![aA0mu.\-])-?\.?(?=0))?[aA0][aA0m]*(?:(?<=0)[.,](?=0)[aA0m]+)*(?:(?<=[aAm])\++(?![aA0]))?"
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
# What stands between two words that may be one, and what stands before a sentence or a quotation.
_INNER = ("-", "'", ".")
_BEGINNING = frozenset(".!(\n")
_ARTICLES = frozenset(["a", "an", "the"])
_AFTER_A_CHOICE = frozenset(["is", "was", "are", "would", "will", "has", "because", "and", "or", "but", "not"])
# What an apostrophe parts from a word that is none by itself, and so no answer: "I'd" has no D.
_CONTRACTED = frozenset(["s", "t", "d", "m", "ll", "re", "ve"])
_JOINED, _CONTRACTION = "'", '"'
_LOOSE = (_JOINED, _CONTRACTION)
# A written word: what parts it from the one before, itself, and whether it is an article.
_WRITTEN = re.compile(r"([ '\"]?)([^ '\"_]+)(_?)")


class Words:
    """The words of a text, to look for those of another text in them.

    Args:
        text: Any text.
        fold: Whether letters lose their accents.

    Attributes:
        normal: The words without articles, joined by single spaces; what may be one word is one ("limas").
    """

    def __init__(self, text: str, fold: bool = True) -> None:
        pieces = _WRITTEN.findall(_written(text, fold))
        # A span that begins with an article is as long as the same without it.
        whole = [(between, word, i + bool(article), i + 1) for i, (between, word, article) in enumerate(pieces)]
        bare = [piece for piece in whole if piece[2] < piece[3]]
        self.normal = "".join([word if between in _LOOSE else f" {word}" for between, word, *_ in bare]).lstrip()
        self._bare = _Reading(bare)
        self._whole = self._bare if len(bare) == len(whole) else _Reading(whole)

    def __bool__(self) -> bool:
        return bool(self.normal)

    def find(self, answer: Words) -> set[Span]:
        """Every place where another text's words occur: without the articles of both, or with them."""
        found = self._bare.find(answer._bare)
        # The choice "A" must not be found in an article.
        if answer._whole.length > 1 and (self._whole is not self._bare or answer._whole is not answer._bare):
            found |= self._whole.find(answer._whole)
        return found


class _Places(NamedTuple):
    """Where words meet in letters that run on.

    Attributes:
        starts: Which word may start at a place.
        ends: Which word follows one that may end there.
        parted: Where one word ends and another starts, whoever compares.
    """

    starts: dict[int, int]
    ends: dict[int, int]
    parted: frozenset[int]


class _Reading:
    """Words as letters that run on; where they meet is only looked at where the letters agree."""

    def __init__(self, pieces: list[tuple[str, str, int, int]]) -> None:
        self.letters = "".join([word for _, word, *_ in pieces])
        self.length = len(pieces)
        self._pieces = pieces

    @cached_property
    def places(self) -> _Places:
        place, starts, ends, parted = 0, {}, {}, []
        for between, word, first, last in self._pieces:
            if between not in _LOOSE:
                parted.append(place)
            if between != _CONTRACTION:
                starts[place] = first
            place += len(word)
            ends[place] = last
        return _Places(starts, ends, frozenset(parted))

    def find(self, answer: _Reading) -> set[Span]:
        found: set[Span] = set()
        length = len(answer.letters)
        first = self.letters.find(answer.letters) if length else -1
        while first >= 0:
            last = first + length
            starts, ends, parted = self.places
            if (
                first in starts
                and last in ends
                and all(first + place in ends for place in answer.places.parted if place)
                and all(place - first in answer.places.ends for place in parted if first < place < last)
            ):
                found.add((starts[first], ends[last]))
            first = self.letters.find(answer.letters, first + 1)
        return found


def _written(text: str, fold: bool) -> str:
    """The words in lower case, each after what parts it from the one before; articles are followed by ``_``."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _RAISED.sub(" ", text.translate(_TYPED))).translate(_PLAIN)
    classes = text.translate(_CLASSES)
    written: list[str] = []
    last, article = 0, ""
    for found in _WORD.finditer(classes):
        start, end = found.span()
        gap, word = classes[last:start], text[start:end]
        part = " "
        if gap in _INNER and written and (classes[last - 1] in "aAm+." or classes[start] in "aA"):
            lower = word.lower()
            # "Don't" has neither Don nor T.
            part = _JOINED if gap != "'" or lower not in _CONTRACTED else "" if lower == "t" else _CONTRACTION
        elif article and (
            gap[:1] in (" ", "\n") if article != "A" else gap.strip(" ") == "" and word.lower() not in _AFTER_A_CHOICE
        ):
            written.append("_")
        written += (part, word if word.isalnum() else _spelt(word, initials=found.lastgroup is not None))
        article = ""
        if word.lower() in _ARTICLES and part == " " and (word != "A" or not last or not _BEGINNING.isdisjoint(gap)):
            article = word
        last = end
    plain = "".join(written).casefold()
    return plain if plain.isascii() else _folded(plain) if fold else unicodedata.normalize("NFC", plain)


def _spelt(word: str, *, initials: bool) -> str:
    """A word as it is compared."""
    if initials:
        return word.replace(".", "")
    if "," in word:
        word = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), word)
    return word.replace(".", "0.", 1) if word.startswith((".", "-.")) else word


def _folded(text: str) -> str:
    """A text whose Latin and Greek letters have lost their accents."""
    kept: list[str] = []
    loses = False
    for character in unicodedata.normalize("NFD", text):
        if not unicodedata.combining(character):
            loses = unicodedata.name(character, "").startswith(("LATIN", "GREEK", "ARABIC", "HEBREW"))
        elif loses:
            continue
        kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept)).translate(_WHOLE_LETTERS)


class _ByCharacter(dict[int, str]):
    """A table for ``str.translate`` that a rule fills as characters come."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self.rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]


def _class_of(character: str) -> str:
    """What a character is to ``_WORD``: a letter, an upper-case one, a mark, a digit, or what stands between words."""
    category = unicodedata.category(character)
    if category[0] == "L":
        # Korean has spaces, but its particles follow a word without one.
        runs_on = is_unspaced(character) or unicodedata.name(character, "").startswith("HANGUL")
        return "u" if runs_on else "A" if character.isupper() else "a"
    if category[0] in "MN":
        return "m" if category[0] == "M" else "0"
    if character in "-.,'":
        return character
    if character in "+#":
        return "+"
    if character in "\n\r":
        return "\n"
    if character.isspace():
        return " "
    if character in "!?\u3002":
        return "!"
    return "(" if character == '"' or category in ("Ps", "Pi") else ";"


def _plain_of(character: str) -> str:
    category = unicodedata.category(character)
    return "" if category == "Cf" else str(unicodedata.decimal(character)) if category == "Nd" else character


_CLASSES, _PLAIN = _ByCharacter(_class_of), _ByCharacter(_plain_of)
