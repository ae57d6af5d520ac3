"""The commands that learn and set a dial."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from conflictscope.cli.inputs import Prompted
from conflictscope.cli.options import OutOption, say
from conflictscope.cli.studies import BudgetedStudy, study
from interp.errors import UserError

_COUNTERFACT, _COUNTERFACT_SUBJECTS = "counterfact-competition", 1000


def dial_fit(
    *,
    max_scales: Annotated[int, typer.Option(min=1, help="Heads that may move in each direction, at most.")] = 40,
    max_heads_per_layer: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of these in one layer, at most: vLLM takes 512 / d_head of an adapter. Else no bound."
        ),
    ] = None,
    feed_forward: Annotated[
        bool, typer.Option("--feed-forward", help="Let feed-forward layers move too, counted among the heads.")
    ] = False,
    steps: Annotated[int, typer.Option(min=3, help="Steps of learning in each direction.")] = 7,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="Also learn without each relation and test on it: OUT/without-RELATION."),
    ] = False,
    counterfact: Annotated[
        Path | None,
        typer.Option(help="Also test on CounterFact in the format of Competition of Mechanisms: OUT/counterfact."),
    ] = None,
    out: OutOption = Path("out/dial"),
    asked: BudgetedStudy,
) -> None:
    """Learn, calibrate and verify a dial; writes OUT/dial.json and OUT/study.json.

    Without --relation or --data it is learned from facts of four relations that the model knows.
    """
    from conflictscope.methods.dial import DialEnds, asked_for_halfway, curve, fitted_dial, save_dial
    from conflictscope.methods.learned_scales import ENDS, LearnedScales
    from conflictscope.study.data import RELATIONS
    from conflictscope.study.run import made_with
    from interp.answers import DIRECTIONS
    from interp.formats import load_dataset
    from interventions.fitting.scale_training import ScaleTraining

    if leave_one_out and asked.data is None and len(asked.relations(RELATIONS)) < 2:
        raise UserError("--leave-one-out needs two relations at least; give more of --relation.")
    if counterfact is not None:
        load_dataset(counterfact, _COUNTERFACT)
    training = ScaleTraining(
        budget=asked.budget,
        context_budget=asked.context_budget,
        max_scales=max_scales,
        max_heads_per_layer=max_heads_per_layer,
        feed_forward=feed_forward,
        steps=steps,
        seed=asked.seed,
    )
    lab = asked.lab(out, default=RELATIONS)
    dial, method = fitted_dial(lab, training), LearnedScales(training, strengths=(1.0,))
    halfway = {f"towards_{towards}": asked_for_halfway(lab, dial, towards) for towards in DIRECTIONS}
    about = {"lines": {"trust": curve(lab, dial)}, "details": {"dial": halfway}}
    record = study(lab, [method], "dial", out, choices=("best",), **about)
    ends = {f"trust {ENDS[towards]:+g}": record.chosen(towards)[0].test for towards in DIRECTIONS}
    settings = {**asdict(training), **made_with(lab)}
    save_dial(lab, dial, out, measured={"unedited": record.unedited.test, **ends}, settings=settings)
    say(f"The dial is {out / 'dial.json'}")
    for left_out in lab.prompts.relations if leave_one_out else ():
        say(f"On {left_out}: scales that were learned without it, and the dial")
        part = lab.on(lab.prompts.left_out(left_out))
        study(part, [method, DialEnds(dial)], "dial", out / f"without-{left_out}", choices=("best",))
    if counterfact is not None:
        say("On CounterFact: the dial")
        many = replace(asked, relation=None, data=counterfact, data_format=_COUNTERFACT, subjects=_COUNTERFACT_SUBJECTS)
        part = lab.on(lab.prompts.tested_on(many.setting().lab(out / "records", lab.model).prompts))
        study(part, [DialEnds(dial)], "dial", out / "counterfact", choices=("best",))


def dial_apply(
    *,
    config: Annotated[Path, typer.Argument(help="An intervention file with a dial.")] = Path("out/dial/dial.json"),
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
    prompts: Prompted,
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
    prompts.answer(edit.dialed(trust), save)
