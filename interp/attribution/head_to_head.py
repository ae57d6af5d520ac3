"""Find the heads that another head listens to: exact path patching from head to head.

The effect of a sender on the answer through one receiver alone (Wang et al. 2022, arXiv 2211.00593, with the later
heads frozen as in ``path_patching``). For every sender two passes, of which the second is one of residual streams:

1. The sender's z takes another value, all other heads' z are frozen to the clean run, MLPs and norms are recomputed;
   the receiver's z is read where it is not yet frozen.
2. The receiver's z takes that value, all other heads are frozen, the sender too.

A sender that is replaced at the prompt's last token reaches the receiver's query there, and the key and value of that
one token. Replaced at all tokens, it also reaches what the receiver finds in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.attribution.examples import check_attributed, scorable
from interp.attribution.path_patching import Baseline, check_choice, head_effects, partners_of, replacement_z
from interp.attribution.scores import HeadScores
from interp.attribution.states import last_token_states
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.progress import tracked
from interp.reading import ALL_LAYERS_AT_END, ReadPrompts

Tokens = Literal["last", "all"]
Head = tuple[int, int]


def head_to_head(
    model: nn.Module,
    conflicts: ConflictSet,
    receivers: Sequence[Head],
    *,
    name: str,
    baseline: Baseline = "corrupted",
    tokens: Tokens = "last",
    seed: int = 0,
    progress: str | None = None,
) -> dict[Head, HeadScores]:
    """Score every head by what it does to the answer through another head.

    Every head below the highest receiver costs a pass: of the last token of each prompt, or of whole prompts where
    ``tokens`` is ``all``.

    Args:
        model: The model, or a bridge around it.
        conflicts: Conflict prompts. Those whose two answers start with the same token are left out.
        receivers: ``(layer, head)`` of the heads that listen.
        name: Name of the model, for the record.
        baseline: What a sender's z is replaced by, as in ``path_patching``; ``zero`` where ``tokens`` is ``all``, since
            the others are values of the last token.
        tokens: Where a sender is replaced: at the ``last`` token of the prompt, or at ``all``.
        seed: Decides the corrupted prompts.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        For each receiver the scores of all heads as senders, with the sign of ``HeadScores``; 0 for heads that are not
        in an earlier layer.

    Raises:
        UserError: If an option is not known, a receiver does not exist or listens to no head, or no example can be
            scored.
    """
    check_choice("baseline", baseline, get_args(Baseline))
    check_choice("tokens", tokens, get_args(Tokens))
    if tokens == "all" and baseline != "zero":
        raise UserError(f'The {baseline} baseline replaces the last token alone; with tokens="all" take zero.')
    anatomy = Anatomy(model)
    listening = [anatomy.checked_head(*head) for head in receivers]
    if not listening or min(listening)[0] == 0:
        raise UserError("Give receivers as (layer, head) above layer 0, where no head listens to another.")
    examples, token_ids = scorable(model, conflicts)
    partners = partners_of(examples, baseline, seed)
    prompts = [example.prompt for example in examples]
    clean = last_token_states(model, prompts)
    check_attributed(anatomy, clean.final, token_ids)
    # Whole prompts are run anew for each sender, so that nothing need be kept of them.
    read = ReadPrompts(model, prompts) if tokens == "last" else ReadPrompts(model, prompts, most_kept=0)
    changes = _Patch(anatomy, read, listening, tokens).changes(replacement_z(clean, baseline, partners), progress)
    scores = {}
    for at, receiver in enumerate(listening):
        senders = receiver[0] * anatomy.n_heads
        values = torch.zeros(len(examples), anatomy.n_layers * anatomy.n_heads)
        z = clean.z[:, receiver[0], receiver[1]].unsqueeze(1) + changes[:, :senders, at]
        values[:, :senders] = head_effects(anatomy, clean, receiver, z, token_ids)
        scores[receiver] = HeadScores.of(
            values.unflatten(1, (anatomy.n_layers, anatomy.n_heads)),
            examples,
            conflicts,
            method="head_to_head",
            metric="logit_diff",
            model=name,
            settings={
                "unit": f"change of (logit context - logit memory) through head {receiver[0]}.{receiver[1]}",
                "receiver": list(receiver),
                "baseline": baseline,
                "tokens": tokens,
                "seed": seed,
            },
        )
    return scores


class _Enough(Exception):
    """What is above is not needed."""


@dataclass(frozen=True)
class _Patch:
    """The first of the two passes."""

    anatomy: Anatomy
    read: ReadPrompts
    receivers: list[Head]
    tokens: Tokens

    def changes(self, replacement: Tensor, progress: str | None) -> Tensor:
        """How each receiver's z changes at the last token with a sender, ``(n, n_senders, n_receivers, d_head)``.

        Both are of the same kind of pass, so that what rounding does to one kind is no change.

        Args:
            replacement: What each sender's z is replaced by, ``(n, n_layers, n_heads, d_head)``.
            progress: Label of a progress bar.
        """
        senders = [head for head in self.anatomy.heads if head[0] < max(self.receivers)[0]]
        shape = (len(replacement), len(senders), len(self.receivers), self.anatomy.d_head)
        changes = torch.empty(shape, device=self.anatomy.device, dtype=self.anatomy.dtype)
        steps = [(batch, at) for batch in range(len(self.read.batches)) for at in range(len(senders))]
        clean: dict[int, Tensor] = {}
        for batch, at in tracked(steps, progress):
            rows = self.read.batches[batch]
            if at == 0:
                clean = self._clean(batch)
            changes[rows, at] = self._heard(batch, senders[at], clean, replacement[rows]) - self._of_receivers(clean)
        return changes

    def _clean(self, batch: int) -> dict[int, Tensor]:
        """Every layer's z ``(n, n_tokens, n_heads * d_head)`` of the tokens that a pass runs."""
        clean: dict[int, Tensor] = {}
        self._run(batch, lambda layer, _, inputs: clean.update({layer: inputs[0]}))
        return clean

    def _of_receivers(self, z: dict[int, Tensor]) -> Tensor:
        """Each receiver's z at the last token, ``(n, n_receivers, d_head)``."""
        heads = {layer: values[:, -1].unflatten(-1, (self.anatomy.n_heads, -1)) for layer, values in z.items()}
        device = self.anatomy.device
        return torch.stack([heads[layer][:, head].to(device) for layer, head in self.receivers], 1)

    def _heard(self, batch: int, sender: Head, clean: dict[int, Tensor], replacement: Tensor) -> Tensor:
        """Each receiver's z when one sender is replaced in the prompts of a batch, ``(n, n_receivers, d_head)``."""
        heard: dict[int, Tensor] = {}
        replaced = slice(-1, None) if self.tokens == "last" else slice(None)

        def freeze(layer: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = clean[layer]
            if layer == sender[0]:
                z = z.unflatten(-1, (self.anatomy.n_heads, -1)).clone()
                z[:, replaced, sender[1]] = replacement[:, None, layer, sender[1]].to(z.device)
                z = z.flatten(-2)
            heard[layer] = inputs[0]
            return (z, *inputs[1:])

        self._run(batch, freeze)
        return self._of_receivers(heard)

    def _run(self, batch: int, hook: Callable[..., Any]) -> None:
        """A pass with a hook at the output projections, which ends behind the highest receiver."""

        def enough(*_: Any) -> None:
            raise _Enough

        highest, _ = max(self.receivers)
        with ExitStack() as hooks, suppress(_Enough):
            for layer in range(highest + 1):
                projection = self.anatomy.module("output_projection", layer)
                hooks.callback(projection.register_forward_pre_hook(partial(hook, layer)).remove)
            last = self.anatomy.module("output_projection", highest)
            hooks.callback(last.register_forward_hook(enough).remove)
            self.read.batch_logits(batch, ALL_LAYERS_AT_END if self.tokens == "last" else "whole")
