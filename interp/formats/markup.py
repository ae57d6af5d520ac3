"""Take markup out of texts that were made from web pages, and put split punctuation back.

Sets made from Natural Questions keep the page's tags (``<P>``, ``<Td>``) and the spaces of its tokenizer, as in
``( 1975 ) ,``, with quotes as two backticks and two apostrophes. What ``cleaned`` does, in this order:

1. Tags of HTML go: of blocks, rows and items a line break is left, between two cells of a row a bar, of others nothing.
2. Entities become characters, -LRB- and its like brackets; Wikipedia's hidden sort keys and invisible characters go.
3. Quotes are ``"``, next to what they quote.
4. Punctuation joins the word before it, brackets and currency signs what they stand before, ``'s`` and ``n't`` their
   word; times, ratios and dates lose the spaces within.
5. White space is single, and no line begins or ends with it.
"""

from __future__ import annotations

import html
import re

from interp.formats.items import Item
from interp.formats.row import distinct

_INLINE = "a abbr b big cite code em font i ins kbd q s small span strong sub sup tt u"
_BLOCKS = (
    "article blockquote body br caption center dd div dl dt figure footer h1 h2 h3 h4 h5 h6 head header hr html li "
    "main nav ol p pre section table tbody td tfoot th thead title tr ul"
)


def _tags(names: str) -> str:
    return rf"</?(?:{'|'.join(names.split())})(?:\s[^<>]*)?/?>"


_CELLS = re.compile(
    rf"\s*{_tags('td th').replace('</?', '</')}\s*{_tags('td th').replace('</?', '<')}\s*", re.IGNORECASE
)
_BLOCK = re.compile(rf"\s*{_tags(_BLOCKS)}\s*", re.IGNORECASE)
_WITHIN = re.compile(_tags(_INLINE), re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|[a-zA-Z]\w{1,31});")
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_BRACKET = re.compile("|".join(_BRACKETS))
# Of 19 digits, before a spade: what Wikipedia sorts a column of numbers by, and does not show.
_SORT_KEY = re.compile(r"(?<!\d)\d{19} ♠ ?")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_QUOTE = re.compile(r"(?<!`)``(?!`)|(?<!')''(?!')")

_MENDED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), written)
    for pattern, written in (
        # Times, ratios and dates.
        (r"(?<![\d,])(\d{1,3}) : (?=\d{1,3}\b(?! [a-z]{3}))", r"\1:"),
        (r"\b(\d{4}) - (\d{2}) - (\d{2})\b", r"\1-\2-\3"),
        # Not what a number or a name begins with (".38"), nor an ellipsis.
        (r"(?<=\S) +([,;:!?]|\.(?!\.))(?=[\s,;:!?.)\]\"']|$)", r"\1"),
        (r"(?<=\d) +%", "%"),
        (r"(?<!\S)([$£€₹]) +(?=\d)", r"\1"),
        (r"([(\[{]) +", r"\1"),
        (r" +([)\]}])", r"\1"),
        (r"(?<=\w) +('(?:s|re|ve|ll|d|m)|n't)\b", r"\1"),
        (r"(?<=s) +'(?=\s|$)", "'"),
    )
)


def cleaned(text: str) -> str:
    """Take the tags out of a text, decode its entities, and mend the spaces around its punctuation and quotes.

    Hyphens between words keep their spaces: ``present - day`` may be one word or two that a dash parts.

    Returns:
        The text; empty where nothing but markup was in it.
    """
    if "<" in text:
        # What ends here is told from line breaks of the text, of which two part paragraphs.
        text = _BLOCK.sub("\v", _CELLS.sub(" | ", text))
        text = _WITHIN.sub("", text)
    if "&" in text:
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if "B-" in text:
        text = _BRACKET.sub(lambda name: _BRACKETS[name[0]], text)
    text = _INVISIBLE.sub("", _SORT_KEY.sub("", text))
    text = re.sub(r"[^\S\n\v]+", " ", text)
    if "``" in text or "''" in text:
        text = _quoted(text)
    for pattern, written in _MENDED:
        text = pattern.sub(written, text)
    text = re.sub(r"\s*\v[\s\v]*", "\n", text.strip())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


def cleaned_item(item: Item) -> Item:
    """Clean all texts of an item alike, so that an answer is still found in its context.

    A text of which nothing would be left stays as it is.
    """
    contexts = tuple(
        context._replace(
            text=_kept(context.text) if isinstance(context.text, str) else tuple(map(_kept, context.text)),
            answers=_answers(context.answers),
        )
        for context in item.contexts
    )
    return item._replace(
        question=_kept(item.question),
        memory_answers=_answers(item.memory_answers),
        contexts=contexts,
        subject=_kept(item.subject),
    )


def _kept(text: str) -> str:
    return cleaned(text) or text


def _answers(answers: tuple[str, ...]) -> tuple[str, ...]:
    return distinct(*map(_kept, answers))


def _quoted(text: str) -> str:
    """Write quotes as ``"``: without a space after one that opens, or before one that closes."""
    parts: list[str] = []
    at, is_open = 0, False
    for mark in _QUOTE.finditer(text):
        before = text[at : mark.start()]
        # Inches: a number before them, and nothing to close.
        is_inches = mark[0] == "''" and not is_open and before.rstrip()[-1:].isdigit()
        opens = mark[0] == "``" or not (is_open or is_inches)
        parts += [before if opens else before.rstrip(" "), '"']
        at = mark.end()
        if opens:
            at += len(text[at:]) - len(text[at:].lstrip(" "))
        is_open = opens
    return "".join((*parts, text[at:]))
