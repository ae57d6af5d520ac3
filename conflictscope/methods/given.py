"""Measure an intervention file as it is, next to whatever else is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from conflictscope.study.condition import Condition
from conflictscope.study.lab import Lab
from conflictscope.study.method import Method
from interp.answers import Direction
from interp.errors import UserError
from interventions.config import InterventionFile
from interventions.decoding import told_apart


@dataclass(frozen=True, eq=False)
class Given(Method):
    """Take the edits of a file.

    Attributes:
        file: The file; it must be given before anything can be measured.
    """

    name: ClassVar[str] = "given"
    file: InterventionFile | None = None

    def candidates(self, lab: Lab, towards: Direction) -> Sequence[Condition]:
        """The file's edits, towards the source that it strengthens, or towards either where it says none.

        Raises:
            UserError: If there is no file, or it strengthens the other source or is for another model.
        """
        if self.file is None:
            raise UserError("There is no intervention file to measure; give one.")
        if self.file.towards not in (None, towards):
            raise UserError(
                f"{self.file.name} strengthens {self.file.towards}, so that it is not tried towards {towards}."
            )
        self.file.check(lab.model)
        edits, rule = told_apart(self.file.build())
        return [Condition(self.name, towards, {"file": self.file.name}, edits, decoding=rule)]
