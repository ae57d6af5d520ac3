"""How numbers and edits are put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from figures.theme import percent
from interp.statistics import UNDEFINED


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
    return {name: estimate for name, estimate in estimates.items() if estimate.get("value") is not None}


def decimals(estimate: Mapping[str, Any], digits: int = 3) -> tuple[str, str]:
    """An estimate that is no share, and its interval."""
    value, low, high = (_minus(f"{estimate[name]:.{digits}f}") for name in ("value", "low", "high"))
    return value, f"{low}\N{EN DASH}{high}"


def signed(score: float) -> str:
    """A score with its sign."""
    # No minus before nothing.
    return _minus(f"{round(score, 2) + 0.0:+.2f}")


def scale(factor: float) -> str:
    """A scale with at most two decimals: 0, 1.5, 0.99."""
    return _minus(f"{round(factor, 2):g}")


def words(name: str) -> str:
    """A name of the records without its underscores."""
    return name.replace("_", " ")


def edit(condition: Mapping[str, Any]) -> str:
    """What is done to heads and feed-forward layers, for example ``5 heads pruned and 2 amplified``."""
    removed = "held at their mean" if condition["around"] == "mean" else "pruned"
    counts = dict.fromkeys((removed, "inverted", "damped", "amplified"), 0)
    for _, _, factor in condition["heads"]:
        counts[removed if factor == 0 else "inverted" if factor < 0 else "damped" if factor < 1 else "amplified"] += 1
    done = [(count, verb) for verb, count in counts.items() if count]
    parts = [f"{count} {verb}" for count, verb in done]
    if done:
        count, verb = done[0]
        parts[0] = f"{_counted(count, 'head')} {verb}"
    if layers := len(condition.get("feed_forward", ())):
        parts.append(f"{_counted(layers, 'feed-forward layer')} scaled")
    if not parts:
        return "no head edited"
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def edits(draws: Sequence[Mapping[str, Any]]) -> str:
    """What is done in each draw, said once where it is the same."""
    return "; ".join(dict.fromkeys(edit(draw) for draw in draws))


def settings(chosen: Mapping[str, Any]) -> str:
    """What was chosen for a direction or for SpARE, for example ``layer 16, strength 4``."""
    layers = chosen.get("layers") or [chosen["layer"]]
    span = f"{layers[0]}\N{EN DASH}{layers[-1]}" if len(layers) > 1 else str(layers[0])
    parts = [f"layer{'s' * (len(layers) > 1)} {span}"]
    parts += [f"{name} {chosen[name]:g}" for name in ("strength", "share", "alpha") if name in chosen]
    return ", ".join([*parts, f"{words(chosen['tokens'])} tokens"] if "tokens" in chosen else parts)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
