"""Find where sentences of a text end.

A sentence ends at a full stop, an exclamation or a question mark that white space follows (after closing quotes and
brackets, if any), at the full stop of a script that sets no space after it, and at a line break. It goes on

1. after a title ("Sgt. Pepper"), and after a number that opens the text ("1. Paris"),
2. after "No." and its like before a number ("No. 5"),
3. after what closes a name or a list ("Inc.", "etc."), unless the next word has a capital letter,
4. after another abbreviation ("Jr.", "e.g."), an initial ("Vitamin C.") or several ("D.C.", "Ph.D."), unless the next
   word opens a sentence ("Washington, D.C. It is ...").
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_STOP = re.compile(
    r"(?P<stop>[.!?\u2026]+)(?:[\"'\u2019\u201d\u00bb\u203a)\]}*_`]|</?\w+>|\[\d+\])*(?=\s)"
    r"|[\u3002\uff01\uff1f\uff61\u0964\u06d4\u061f]"
    r"|[\n\r\v\f\x85\u2028\u2029]"
)
_OPENING = "\"'\u2018\u201c\u00ab\u2039([{"
# Case counts: "no." and "art." end a sentence.
_TITLE = re.compile(
    "Mr|Mrs|Ms|Mx|Messrs|Dr|Prof|Rev|Fr|Msgr|Hon|Pres|Gov|Sen|Rep|Amb|Supt|Det|Insp|Gen|Col|Maj|Capt|Cmdr|Cdr|Lt"
    "|Sgt|Cpl|Pvt|Adm|Mme|Mlle|Sra|Srta|Hr"
)
_BEFORE_NUMBER = re.compile("No|Nos|Nr|Vol|vol|Fig|fig|Ch|Sec|Art|Op|pp|p")
_ABBREVIATION = re.compile(
    "Jr|Sr|St|Ste|Sta|Sto|Mt|Mts|Ft|Pt|Co|Bros|Cos|Univ|Dept|Assn|Assoc|Ave|Blvd|Rd|Hwy|vs|viz|approx|ca|cf|al|incl"
    "|excl|esp|est|resp|Vs|Approx|Ca|Cf|Est|sq|ft"
)
_AFTER_NAME = re.compile(
    "Inc|Ltd|Corp|Esq|etc|Etc|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thur|Thurs|Fri"
)
_INITIALS = re.compile(r"(?:^|[\W_])(?:[^\W\d_]{1,3}\.)+[^\W\d_]{1,4}\Z")
_NO_NUMBER = re.compile(r"[^\S\n]*\n|[^\S\n]+[^\s\d]")
_OPENER = re.compile(
    r"[^\S\n]+[\"'\u2018\u201c(]*(?:[A-Z][a-z]*:"
    r"|(?:The|This|That|These|Those|There|It|Its|He|She|They|We|You|His|Her|Their|A|In|For|But|And|However|When|While|If)"
    r"(?=[\s,'\u2019]))"
)


def sentence_end(text: str) -> int | None:
    """Where the first sentence ends, before its full stop; ``None`` if more text is needed to know."""
    return next((found.start() for found in _ends(text)), None)


def unfinished_sentence(text: str) -> int:
    """Where the sentence begins that a text breaks off in, with the space before it; 0 where no other ends before."""
    return max((found.end() for found in _ends(text)), default=0)


def _ends(text: str) -> Iterator[re.Match[str]]:
    """The full stops that end sentences."""
    found = _STOP.finditer(text)
    return (stop for stop in found if stop["stop"] != "." or not _goes_on(text, stop.start(), stop.end()))


def _goes_on(text: str, stop: int, after: int) -> bool:
    """Whether a sentence goes on after a full stop."""
    before = text[:stop]
    word = before.split()[-1].lstrip(_OPENING) if before.strip() else ""
    if _TITLE.fullmatch(word) or (word == before and word.isdigit() and len(word) <= 2):
        return True
    if _BEFORE_NUMBER.fullmatch(word):
        return not _NO_NUMBER.match(text, after)
    if _AFTER_NAME.fullmatch(word):
        return not text[after:].lstrip(" \t" + _OPENING)[:1].isupper()
    initial = word[-1:].isupper() and not word[-2:-1].isalnum()
    if initial or _ABBREVIATION.fullmatch(word) or _INITIALS.search(word):
        return not _OPENER.match(text, after)
    return False
