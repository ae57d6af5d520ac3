"""Formulas become MathML while the site is built, so that no script has to draw them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $...$ and $$...$$.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML in the place of each formula of a page."""
    return _FORMULA.sub(_written, content)


def _written(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    formula = convert(html.unescape(found[2]), display=display)
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
