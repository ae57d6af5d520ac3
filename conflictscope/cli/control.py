"""The commands that control the source of answers by features and by directions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from conflictscope.cli.inputs import answer_edited, layers_of, listed_layers
from conflictscope.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_RELATION,
    BatchSizeOption,
    ControlOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    MaxNewTokensOption,
    ModelOption,
    PromptsArgument,
    RelationOption,
    SaeOption,
    SeedOption,
    TokensOption,
    say,
)
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

spare_app = typer.Typer(help="Control the source of answers by features of sparse autoencoders.", no_args_is_help=True)
steer_app = typer.Typer(help="Control the source of answers by directions.", no_args_is_help=True)


@spare_app.command("fit")
def spare_fit(
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
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    data: DataOption = None,
    out: ControlOption = Path("out/control"),
    test_subjects: Annotated[int, typer.Option(min=1, help="Subjects to test on, at most.")] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit SpARE in both directions, and measure it with its ablations on held-out subjects."""
    from conflictscope.control import ALPHAS, SHARES, fit_spare, results_table
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
    control = _control(model, relation, data, out, test_subjects, tokens, seed, device, dtype)
    results = fit_spare(control, saes, shares=share or SHARES, alphas=alpha or ALPHAS, alpha_form=alpha_form)
    print_frame(results_table(results))
    say(f"Intervention files are in {out / 'interventions'}, all numbers in {out / 'results.json'}")


@steer_app.command("fit")
def steer_fit(
    method: Annotated[
        list[str] | None, typer.Option(help="actadd, caa, probe or task_vector; repeatable; all by default.")
    ] = None,
    tokens: TokensOption = "last_prompt",
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    data: DataOption = None,
    out: ControlOption = Path("out/control"),
    test_subjects: Annotated[int, typer.Option(min=1, help="Subjects to test on, at most.")] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit steering vectors in both directions, and measure them on held-out subjects."""
    from conflictscope.control import STEERING_METHODS, fit_steering, results_table

    if unknown := [name for name in method or () if name not in STEERING_METHODS]:
        raise UserError(f"There is no steering by {unknown[0]!r}; choose among {', '.join(STEERING_METHODS)}.")
    control = _control(model, relation, data, out, test_subjects, tokens, seed, device, dtype)
    results = fit_steering(control, [name for name in STEERING_METHODS if name in (method or STEERING_METHODS)])
    print_frame(results_table(results))
    say(f"Intervention files are in {out / 'interventions'}, all numbers in {out / 'results.json'}")


@spare_app.command("apply")
@steer_app.command("apply")
def apply_edit(
    config: Annotated[Path, typer.Argument(help="An intervention file.")],
    file: PromptsArgument = None,
    strength: Annotated[
        float, typer.Option(help="Factor on alpha or strength: 0 leaves the model as it is, 1 is the file's own.")
    ] = 1.0,
    save: Annotated[Path | None, typer.Option(help="Intervention file to write with that strength.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    max_new_tokens: MaxNewTokensOption = 8,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Answer prompts without and with an edit; one JSON object a line to standard output."""
    from interventions.config import InterventionFile

    edit = InterventionFile.load(config).scaled(strength)
    answer_edited(edit, file, save, model, max_new_tokens, batch_size, device, dtype)


def _control(
    model: str,
    relation: list[str] | None,
    data: Path | None,
    out: Path,
    test_subjects: int,
    tokens: Any,
    seed: int,
    device: str,
    dtype: str,
) -> Any:
    """What `spare fit` and `steer fit` share: the model, its data and the folder."""
    from conflictscope.control import Control
    from interp.conflicts import ConflictSet
    from interp.facts import relation_named
    from interp.models import load_model

    if data is not None and relation:
        raise UserError("Give --data or --relation, not both.")
    conflicts = None if data is None else ConflictSet.load(data)
    relations = [relation_named(name).name for name in relation or [DEFAULT_RELATION]]
    return Control(
        load_model(model, device=device, dtype=dtype),
        model,
        relations=relations,
        out=out,
        conflicts=conflicts,
        test_subjects=test_subjects,
        tokens=tokens,
        seed=seed,
    )
