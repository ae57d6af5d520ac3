"""The commands that control the source of answers by features and by directions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from conflictscope.cli.inputs import Prompted, layers_of, listed_layers
from conflictscope.cli.options import DEFAULT_MODEL, OutOption, SaeOption, TokensOption
from conflictscope.cli.studies import BudgetedStudy, study
from interp.errors import UserError


def spare_fit(
    *,
    sae: SaeOption = DEFAULT_MODEL,
    layers: Annotated[str | None, typer.Option(help="Only the SAEs of these layers, for example 14-18.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Share of the information that is edited (K); repeatable: dev chooses.")
    ] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="How far; repeatable: dev chooses.")] = None,
    alpha_form: Annotated[
        Literal["targets", "change"],
        typer.Option(help="What alpha multiplies: the targets (published code) or the change (published equation)."),
    ] = "targets",
    tokens: TokensOption = "last_prompt",
    out: OutOption = Path("out/spare"),
    asked: BudgetedStudy,
) -> None:
    """Fit SpARE in both directions, and measure it with its ablations on held-out subjects."""
    from conflictscope.methods.spare import ALPHAS, SHARES, Spare
    from conflictscope.methods.spare_ablations import SpareAddOnly, SpareConstant, SpareRemoveOnly
    from interp.sae import load_saes

    if outside := [value for value in share or () if not 0 < value < 1]:
        raise UserError(f"--share is a share of the information, between 0 and 1, not {outside[0]:g}.")
    if endless := [value for value in alpha or () if not math.isfinite(value)]:
        raise UserError(f"--alpha is a finite number, not {endless[0]}.")
    saes = load_saes(sae)
    if layers is not None:
        wanted = layers_of(layers) or []
        if absent := [number for number in wanted if number not in {one.layer for one in saes}]:
            raise UserError(f"{sae} has no SAE of layer {absent[0]}; it has {listed_layers(saes)}.")
        saes = [one for one in saes if one.layer in wanted]
    spare = Spare(tuple(share or SHARES), tuple(alpha or ALPHAS), alpha_form, tokens)
    methods = [spare, *(part(of=spare) for part in (SpareRemoveOnly, SpareAddOnly, SpareConstant))]
    study(replace(asked.lab(out), saes=lambda: saes), methods, "spare", out)


def steer_fit(
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(help="actadd, probe_direction, task_vector, caa or context_focus; repeatable; all by default."),
    ] = None,
    tokens: TokensOption = "last_prompt",
    out: OutOption = Path("out/steer"),
    asked: BudgetedStudy,
) -> None:
    """Fit steering vectors in both directions, and measure them on held-out subjects."""
    from conflictscope.methods.actadd import ActAdd
    from conflictscope.methods.caa import CAA
    from conflictscope.methods.context_focus import ContextFocus
    from conflictscope.methods.probe_direction import ProbeDirection
    from conflictscope.methods.task_vector import TaskVector

    # CAA and ContextFocus act on all tokens that predict the answer, whatever the others do.
    of_tokens = [one(tokens=tokens) for one in (ActAdd, ProbeDirection, TaskVector)]
    methods = [*of_tokens, CAA(), ContextFocus()]
    by_name = {one.name: one for one in methods}
    if unknown := [name for name in method or () if name not in by_name]:
        raise UserError(f"There is no steering by {unknown[0]!r}; choose among {', '.join(by_name)}.")
    study(asked.lab(out), [one for one in methods if one.name in (method or by_name)], "steer", out)


def apply_edit(
    *,
    config: Annotated[Path, typer.Argument(help="An intervention file.")],
    strength: Annotated[
        float, typer.Option(help="Factor on alpha or strength: 0 leaves the model as it is, 1 is the file's own.")
    ] = 1.0,
    save: Annotated[Path | None, typer.Option(help="Intervention file to write with that strength.")] = None,
    prompts: Prompted,
) -> None:
    """Answer prompts without and with an edit; one JSON object a line to standard output."""
    from interventions.config import InterventionFile

    prompts.answer(InterventionFile.load(config).scaled(strength), save)
