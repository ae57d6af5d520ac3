"""How numbers and edits are put into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conflictscope.study.record import Measured
from figures.theme import percent
from interp.statistics import UNDEFINED

_LONGEST = 140


def share(estimate: Mapping[str, Any]) -> str:
    """An estimated share as a percentage; ``undefined`` where there is none."""
    return UNDEFINED if estimate["value"] is None else percent(estimate["value"])


def interval(estimate: Mapping[str, Any]) -> str:
    """Its interval, for example ``35-46%`` with a proper dash; nothing where it is undefined."""
    if estimate["value"] is None:
        return ""
    return f"{percent(estimate['low']).removesuffix('%')}\N{EN DASH}{percent(estimate['high'])}"


def defined(estimates: Mapping[str, Any]) -> dict[str, Any]:
    """The estimates that have a value."""
    return {name: estimate for name, estimate in estimates.items() if (estimate or {}).get("value") is not None}


def decimals(estimate: Mapping[str, Any], digits: int = 3) -> tuple[str, str]:
    """An estimate that is no share, and its interval."""
    value, low, high = (_minus(f"{estimate[name]:.{digits}f}") for name in ("value", "low", "high"))
    return value, f"{low}\N{EN DASH}{high}"


def points(change: Mapping[str, Any]) -> tuple[str, str]:
    """A change of a share in whole percentage points, and its interval."""
    value, low, high = (signed(100 * change[name], 0) for name in ("value", "low", "high"))
    return value, f"{low} to {high}"


def signed(score: float, digits: int = 2) -> str:
    """A number with its sign."""
    # No minus before nothing.
    return _minus(f"{round(score, digits) + 0.0:+.{digits}f}")


def scale(factor: float) -> str:
    """A scale with at most two decimals: 0, 1.5, 0.99."""
    return _minus(f"{round(factor, 2):g}")


def words(name: str) -> str:
    """A name of the records without its underscores."""
    return name.replace("_", " ")


def edit(condition: Measured) -> str:
    """What a condition does, heads counted instead of listed: for example ``5 heads pruned and 2 amplified``."""
    if not condition.heads:
        return clipped(condition.does)
    removed = "held at their mean" if "around their means" in condition.does else "pruned"
    counts = dict.fromkeys((removed, "inverted", "damped", "amplified"), 0)
    for _, _, factor in condition.heads:
        counts[removed if factor == 0 else "inverted" if factor < 0 else "damped" if factor < 1 else "amplified"] += 1
    (verb, count), *others = ((verb, count) for verb, count in counts.items() if count)
    parts = [f"{count} head{'s' * (count > 1)} {verb}", *(f"{count} {verb}" for verb, count in others)]
    if (more := condition.moved - len(condition.heads)) > 0:
        noun = "feed-forward layer" if "feed-forward" in condition.does else "other part"
        parts.append(f"{more} {noun}{'s' * (more > 1)} scaled")
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def clipped(text: str) -> str:
    """The beginning of a text that is too long to be read in passing."""
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " \N{HORIZONTAL ELLIPSIS}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
