"""Give rows of one pass edits of their own, as a server's batch of different requests needs.

1. Rows with the same patches are a group. What follows passes for these patches is told what the group's rows are,
   since the passes of a batch, whose rows come and go, cannot be followed from outside.
2. At each patched module every group's rows are taken out, changed, and put back; all others stay as they are.
3. What a follower found out about new prompts, as a gate's decision, is kept with the row and told again at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interventions.base import Handle, Patch, RowFollower, hooked


def shares_passes(patches: Sequence[Patch]) -> bool:
    """Whether patches can act on some rows of a pass: what follows passes for them can be told of these instead."""
    return all(patch.tracker is None or isinstance(patch.tracker, RowFollower) for patch in patches)


class RowGroup:
    """Rows of a model's passes that the same patches act on.

    Attributes:
        rows: Their numbers in the pass, ``(n,)``, on the model's device.
        error: What went wrong when they were changed; their values are worthless then, other groups' are not.

    Args:
        patches: The patches, for which ``shares_passes`` holds.
        rows: As the attribute.
    """

    def __init__(self, patches: Sequence[Patch], rows: Tensor) -> None:
        self.rows = rows
        self.error: Exception | None = None
        self._patches = patches
        trackers = dict.fromkeys(patch.tracker for patch in patches if patch.tracker is not None)
        self._followers = [tracker for tracker in trackers if isinstance(tracker, RowFollower)]

    def attach(self, model: nn.Module) -> Handle:
        """Change the group's rows in every pass of a transformers model, until the handle is removed.

        Raises:
            UserError: If the model does not have one of the parts; nothing is attached then.
        """
        anatomy = Anatomy(model)
        for patch in self._patches:
            anatomy.module(patch.part, patch.layer)
        patches = [patch._replace(change=self._in_rows(patch.change)) for patch in self._patches]
        return Handle([hooked(anatomy, patch) for patch in patches])

    def tell(self, real: Tensor, kept: Sequence[Mapping[RowFollower, Tensor]] | None = None) -> None:
        """Say what the group's rows are in this thread's next passes.

        Args:
            real: Which of their tokens are no padding, boolean ``(n, n_tokens)``; padding is on the left.
            kept: What ``keep`` gave for each row when it was new; ``None`` for new prompts.
        """
        for follower in self._followers:
            known = [row[follower] for row in kept or () if follower in row]
            follower.tell(real, new_prompts=kept is None, kept=torch.stack(known) if known else None)

    def keep(self) -> list[dict[RowFollower, Tensor]]:
        """For each row, after a pass over new prompts, what has to be told at later steps."""
        found: list[dict[RowFollower, Tensor]] = [{} for _ in self.rows]
        if self.error is None:
            for follower in self._followers:
                if (kept := follower.keep()) is not None:
                    for row, value in zip(found, kept, strict=True):
                        row[follower] = value
        return found

    def leave(self) -> None:
        """Say that the passes that were told of are over."""
        for follower in self._followers:
            follower.leave()

    def _in_rows(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def change_rows(values: Tensor) -> Tensor:
            if self.error is not None:
                return values
            rows = self.rows.to(values.device)
            try:
                return values.index_copy(0, rows, change(values[rows]))
            except Exception as error:
                self.error = error
                return values

        return change_rows
