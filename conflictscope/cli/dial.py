"""The commands that learn and set a dial."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.inputs import answer_edited
from conflictscope.cli.options import (
    DEFAULT_MODEL,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    MaxNewTokensOption,
    ModelOption,
    PromptsArgument,
    RelationOption,
    SeedOption,
    say,
)
from conflictscope.cli.studies import (
    SUBJECTS,
    BudgetOption,
    ContextBudgetOption,
    SubjectsOption,
    make_lab,
    show_page,
    study,
)
from interp.errors import UserError

app = typer.Typer(help="Learn a dial between memory and context, and set it.", no_args_is_help=True)

_COUNTERFACT, _COUNTERFACT_SUBJECTS = "counterfact-competition", 1000


@app.command("fit")
def dial_fit(
    model: Annotated[str, typer.Argument(help="A registered name, a local directory or a hub id.")] = DEFAULT_MODEL,
    relation: RelationOption = None,
    budget: BudgetOption = 0.02,
    context_budget: ContextBudgetOption = 0.2,
    max_scales: Annotated[int, typer.Option(min=1, help="Heads that may move in each direction, at most.")] = 40,
    feed_forward: Annotated[
        bool, typer.Option("--feed-forward", help="Let feed-forward layers move too, counted among the heads.")
    ] = False,
    steps: Annotated[int, typer.Option(min=3, help="Steps of learning in each direction.")] = 7,
    subjects: SubjectsOption = SUBJECTS,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="Also learn without each relation and test on it: OUT/without-RELATION."),
    ] = False,
    counterfact: Annotated[
        Path | None,
        typer.Option(help="Also test on CounterFact in the format of Competition of Mechanisms: OUT/counterfact."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/dial"
    ),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Learn, calibrate and verify a dial; writes OUT/dial.json and OUT/study.json.

    Without --relation it is learned from facts of four relations that the model knows.
    """
    from conflictscope.methods.dial import DialEnds, asked_for_halfway, curve, fitted_dial, save_dial
    from conflictscope.methods.learned_scales import ENDS, LearnedScales
    from conflictscope.study.data import RELATIONS, file_prompts
    from conflictscope.study.run import made_with
    from interp.answers import DIRECTIONS
    from interp.facts import relation_named
    from interp.formats import load_dataset
    from interventions.fitting.scale_training import ScaleTraining

    relations = list(dict.fromkeys(relation_named(name).name for name in relation or RELATIONS))
    if leave_one_out and len(relations) < 2:
        raise UserError("--leave-one-out needs two relations at least; give more of --relation.")
    if counterfact is not None:
        load_dataset(counterfact, _COUNTERFACT)
    training = ScaleTraining(
        budget=budget,
        context_budget=context_budget,
        max_scales=max_scales,
        feed_forward=feed_forward,
        steps=steps,
        seed=seed,
    )
    lab = make_lab(
        model,
        out,
        relation=relations,
        subjects=subjects,
        seed=seed,
        budgets=(budget, context_budget),
        device=device,
        dtype=dtype,
    )
    dial, method = fitted_dial(lab, training), LearnedScales(training, strengths=(1.0,))
    asked = {f"towards_{towards}": asked_for_halfway(lab, dial, towards) for towards in DIRECTIONS}
    about = {"lines": {"trust": curve(lab, dial)}, "details": {"dial": asked}}
    record = study(lab, [method], "dial", out, choices=("best",), **about)
    ends = {f"trust {ENDS[towards]:+g}": record.chosen(towards)[0].test for towards in DIRECTIONS}
    settings = {**asdict(training), **made_with(lab)}
    save_dial(lab, dial, out, measured={"unedited": record.unedited.test, **ends}, settings=settings)
    show_page(out)
    say(f"The dial is {out / 'dial.json'}")
    if leave_one_out:
        for left_out in relations:
            say(f"On {left_out}: scales that were learned without it, and the dial")
            part = lab.on(lab.prompts.left_out(left_out))
            study(part, [method, DialEnds(dial)], "dial", out / f"without-{left_out}", choices=("best",))
    if counterfact is not None:
        say("On CounterFact: the dial")
        other = file_prompts(
            lab.model, counterfact, lab.records, subjects=_COUNTERFACT_SUBJECTS, seed=seed, format=_COUNTERFACT
        )
        part = lab.on(lab.prompts.tested_on(other.test, other.name))
        study(part, [DialEnds(dial)], "dial", out / "counterfact", choices=("best",))


@app.command("apply")
def dial_apply(
    config: Annotated[Path, typer.Argument(help="An intervention file with a dial.")] = Path("out/dial/dial.json"),
    file: PromptsArgument = None,
    trust: Annotated[
        float | None,
        typer.Option(help="Setting of the dial: -1 is memory, 0 the unchanged model, 1 context; else the file's own."),
    ] = None,
    context_rate: Annotated[
        float | None, typer.Option(help="Instead of --trust: the rate of context answers that is wanted at least.")
    ] = None,
    memory_rate: Annotated[
        float | None, typer.Option(help="Instead of --trust: the rate of memory answers that is wanted at least.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Intervention file to write with that setting.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    max_new_tokens: MaxNewTokensOption = 8,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Answer prompts without the dial and with it; one JSON object a line to standard output."""
    from interventions.config import InterventionFile

    if [trust, context_rate, memory_rate].count(None) < 2:
        raise UserError("Give one of --trust, --context-rate and --memory-rate.")
    edit = InterventionFile.load(config)
    if context_rate is not None:
        trust = edit.dial.trust_for("context", context_rate)
    elif memory_rate is not None:
        trust = edit.dial.trust_for("memory", memory_rate)
    if trust is None and (trust := edit.dial.trust) == 0:
        raise UserError(
            f"The dial in {config} is at 0, which changes nothing; give --trust, --context-rate or --memory-rate."
        )
    say(f"The dial is at {trust:+.2f}")
    answer_edited(edit.dialed(trust), file, save, model, max_new_tokens, batch_size, device, dtype)
