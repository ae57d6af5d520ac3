"""The commands that learn and set a dial."""

from __future__ import annotations

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
    SeedOption,
    say,
)
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

app = typer.Typer(help="Learn a dial between memory and context, and set it.", no_args_is_help=True)


@app.command("fit")
def dial_fit(
    model: Annotated[str, typer.Argument(help="A registered name, a local directory or a hub id.")] = DEFAULT_MODEL,
    relation: Annotated[
        list[str] | None, typer.Option("--relation", help="A relation of the fact tables; repeatable; four by default.")
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Damage allowed: mean nats of KL divergence, without a context and on text it samples."),
    ] = 0.02,
    context_budget: Annotated[
        float, typer.Option(help="The same for prompts with a context that agrees or is about something else.")
    ] = 0.2,
    max_scales: Annotated[int, typer.Option(min=1, help="Heads that may move in each direction, at most.")] = 40,
    feed_forward: Annotated[
        bool, typer.Option("--feed-forward", help="Let feed-forward layers move too, counted among the heads.")
    ] = False,
    steps: Annotated[int, typer.Option(min=3, help="Steps of learning in each direction.")] = 7,
    subjects: Annotated[
        int,
        typer.Option(min=4, help="Subjects of each relation to learn from, and to test on, at most."),
    ] = 40,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also measure other edits on the same prompts: OUT/comparison.json.")
    ] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-out", help="Also learn without each relation and test on it: OUT/leave-one-out.json."
        ),
    ] = False,
    counterfact: Annotated[
        Path | None,
        typer.Option(help="Also test on CounterFact in the format of Competition of Mechanisms: OUT/counterfact.json."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/dial"
    ),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Learn, calibrate and verify a dial; writes OUT/dial.json and OUT/summary.json."""
    from conflictscope import dial_comparison
    from conflictscope.demo_study import headline
    from conflictscope.dialing import RELATIONS, Dialing
    from interp.facts import relation_named
    from interp.formats import load_dataset
    from interp.models import load_model
    from interventions.fitting.scale_learning import ScaleTraining

    relations = list(dict.fromkeys(relation_named(name).name for name in relation or RELATIONS))
    if leave_one_out and len(relations) < 2:
        raise UserError("--leave-one-out needs two relations at least; give more of --relation.")
    if counterfact is not None:
        load_dataset(counterfact, "counterfact-competition")
    settings = ScaleTraining(
        budget=budget,
        context_budget=context_budget,
        max_scales=max_scales,
        feed_forward=feed_forward,
        steps=steps,
        seed=seed,
    )
    bridge = load_model(model, device=device, dtype=dtype)
    dialing = Dialing(bridge, model, relations=relations, out=out, settings=settings, subjects=subjects)
    for line in headline(dialing.run()):
        say(line)
    say(f"The dial is {out / 'dial.json'}, all numbers are in {out / 'summary.json'}")
    if compare:
        print_frame(dial_comparison.comparison_table(dial_comparison.Comparison(dialing).run()))
    if leave_one_out:
        print_frame(dial_comparison.transfer_table(dial_comparison.leave_one_out(dialing)))
    if counterfact is not None:
        print_frame(dial_comparison.counterfact_table(dial_comparison.counterfact(dialing, counterfact)))


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
