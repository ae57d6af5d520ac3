"""Tell which characters belong to a script that writes words without spaces between them.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan text runs on: there an answer follows the text before it
without a space, and is part of a text without a word boundary. Korean has spaces.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# What the Unicode names of their characters begin with; the last two are the punctuation of Chinese and Japanese.
_UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
    "IDEOGRAPHIC",
    "FULLWIDTH",
)


@lru_cache(maxsize=65536)
def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script, or is punctuation of one, that writes words without spaces."""
    return unicodedata.name(character, "").startswith(_UNSPACED)
