"""Define what a method is, and find methods by name.

A method is one class in one file of ``conflictscope.methods``; another package adds its own by an entry point of the
group ``conflictscope.methods`` that names the class.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from conflictscope.study.condition import Condition
from interp.answers import Direction
from interp.errors import UserError

if TYPE_CHECKING:
    from conflictscope.study.lab import Lab

ENTRY_POINTS = "conflictscope.methods"

Shared = Literal["texts", "head_scores", "mean_outputs", "store"]
"""What methods share: train's texts, head scores, mean outputs of heads, recorded states with answers."""
SHARED: tuple[Shared, ...] = get_args(Shared)

Needs = Literal["nothing", "head_scores", "states", "learning", "search", "autoencoders", "unknown"]
"""What a method needs before it can name candidates, the cheapest first: nothing; scores of all heads; states or
activities that are recorded; learning; trying all heads one by one; autoencoders of the model; not said."""
NEEDS: tuple[Needs, ...] = get_args(Needs)


class Method(ABC):
    """A way to move a model towards its memory or its context.

    Attributes:
        name: Its name, as commands and records have it.
        derived: Whether it is an ablation of another method, which is not compared with others for the best.
        starts_from: What it takes of the lab that other methods take too, which is made once before them; all by
            default.
        follows: The methods whose choice it starts from.
        needs: What it needs before it can name candidates, by which a search tries the cheapest methods first.
    """

    name: ClassVar[str]
    derived: ClassVar[bool] = False
    starts_from: ClassVar[tuple[Shared, ...]] = SHARED
    follows: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Needs] = "unknown"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)

    @abstractmethod
    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The conditions that compete on dev.

        Raises:
            UserError: If the method cannot run on this model or these prompts; the record then says why.
        """

    def controls(self, lab: Lab, chosen: Condition) -> Sequence[Condition]:
        """Random draws of the same kind and size as what was chosen, measured together; none by default."""
        del lab, chosen
        return ()

    def details(self, lab: Lab, chosen: Condition) -> Mapping[str, Any]:
        """What the record says besides, as JSON; nothing by default."""
        del lab, chosen
        return {}


@cache
def registered() -> Mapping[str, type[Method]]:
    """All methods by name: those of this package, then those of others."""
    from conflictscope import methods

    found = {method.name: method for method in methods.ALL}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        method = entry.load()
        found.setdefault(method.name, method)
    return found


def method_named(name: str) -> Method:
    """The method of this name, with its default settings.

    Raises:
        UserError: If there is none; the message lists those there are.
    """
    if (method := registered().get(name)) is None:
        raise UserError(f"There is no method {name!r}; choose among {', '.join(registered())}.")
    return method()
