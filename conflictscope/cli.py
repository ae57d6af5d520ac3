"""The command line. Every command is a few lines over the library; results go to files, talk to standard error."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from conflictscope import deployment
from conflictscope.asking import ask
from conflictscope.explore import explore
from conflictscope.options import (
    DEFAULT_MODEL,
    DEFAULT_RELATION,
    BatchSizeOption,
    ControlOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    MaxNewTokensOption,
    ModelOption,
    ProbesOption,
    PromptsArgument,
    RecordingOption,
    RelationOption,
    SaeOption,
    SeedOption,
    TokensOption,
    console,
    say,
)
from conflictscope.reporting import report
from conflictscope.tables import print_frame
from interp.errors import Caution, UserError

app = typer.Typer(
    name="conflictscope",
    help="Measure, locate, change and verify how a language model chooses between its memory and its context.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Build, inspect and convert conflict data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
probe_app = typer.Typer(help="Fit, score and use probes on recorded activations.", no_args_is_help=True)
app.add_typer(probe_app, name="probe")
sae_app = typer.Typer(help="Train, measure and look into sparse autoencoders.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
spare_app = typer.Typer(help="Control the source of answers by features of sparse autoencoders.", no_args_is_help=True)
app.add_typer(spare_app, name="spare")
steer_app = typer.Typer(help="Control the source of answers by directions.", no_args_is_help=True)
app.add_typer(steer_app, name="steer")
dial_app = typer.Typer(help="Learn a dial between memory and context, and set it.", no_args_is_help=True)
app.add_typer(dial_app, name="dial")


@app.command()
def demo(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; finished steps in it are reused.")] = Path(
        "out/demo"
    ),
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few facts: checks that all runs; measures little.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Do the whole job on one model: measure, locate, intervene, verify; then look at OUT/report.html."""
    from conflictscope.demo_study import headline, run_study

    summary = run_study(
        model, relations=relation or [DEFAULT_RELATION], out=out, seed=seed, quick=quick, device=device, dtype=dtype
    )
    for line in headline(summary):
        say(line)
    say(f"Look at {out / 'report.html'}")


@app.command()
def evaluate(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    data: DataOption = None,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="Intervention file to apply; repeatable, applied in order.")
    ] = None,
    split: Annotated[
        Literal["train", "dev", "test", "all"],
        typer.Option(help="The split to ask; edits are learned and chosen on train and dev, and shown on test."),
    ] = "test",
    by: Annotated[str, typer.Option(help="Columns to break the table down by, separated by commas.")] = "kind",
    out: Annotated[Path, typer.Option(help="Parquet file for the answers, one row per prompt.")] = Path(
        "out/usage.parquet"
    ),
    max_new_tokens: MaxNewTokensOption = 8,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Answer every prompt of a split and say how often memory and context were used."""
    from interp.evaluation import measure_usage
    from interventions.base import applied
    from interventions.config import InterventionFile

    columns = [column.strip() for column in by.split(",") if column.strip()]
    _check_columns(columns)
    _check_parquet(out)
    edits = [InterventionFile.load(path) for path in config or []]
    bridge, conflicts = _model_and_data(model, relation, data, seed, device, dtype)
    asked = conflicts if split == "all" else conflicts.select(split=split)
    if not len(asked):
        counts = {name: count for name, count in conflicts.counts()["examples_by_split"].items() if count}
        there = " and ".join(f"{count} of {name}" for name, count in counts.items())
        raise UserError(
            f"{conflicts.name} has no examples of the split {split}, but {there}; give --split {next(iter(counts))} "
            "or --split all."
        )
    with applied(bridge, *edits):
        report = measure_usage(bridge, asked, max_new_tokens=max_new_tokens, progress="Answering")
    report.save(out)
    print_frame(report.summary(by=columns))
    say(f"Answers are in {out}")


@app.command()
def attribute(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    data: DataOption = None,
    method: Annotated[
        Literal["path-patching", "direct-logits", "attribution-patching"], typer.Option(help="How heads are scored.")
    ] = "path-patching",
    metric: Annotated[
        Literal["logit_diff", "memory_probability", "context_probability"],
        typer.Option(help="What path patching attributes."),
    ] = "logit_diff",
    baseline: Annotated[
        Literal["corrupted", "zero", "mean"], typer.Option(help="What path patching puts in a head's place.")
    ] = "corrupted",
    mlps: Annotated[
        Literal["recompute", "frozen"], typer.Option(help="Whether path patching recomputes the MLPs.")
    ] = "recompute",
    split: Annotated[
        Literal["train", "dev", "test", "all"], typer.Option(help="The split to score heads on; test stays unseen.")
    ] = "train",
    top: Annotated[int, typer.Option(min=1, help="How many heads to list for each direction.")] = 8,
    out: Annotated[
        Path, typer.Option(help="Parquet file for the scores; a JSON and an HTML file go next to it.")
    ] = Path("out/heads.parquet"),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Score every head: which push the answer to the context, which to memory."""
    from interp.attribution.attribution_patching import attribution_patching
    from interp.attribution.direct_logits import direct_logit_attribution
    from interp.attribution.path_patching import path_patching
    from interp.plots import head_map, save_figure

    if method != "path-patching" and (metric, baseline, mlps) != ("logit_diff", "corrupted", "recompute"):
        raise UserError(f"--metric, --baseline and --mlps belong to path-patching; leave them out with {method}.")
    _check_parquet(out)
    bridge, conflicts = _model_and_data(model, relation, data, seed, device, dtype)
    chosen = conflicts.select(kind="conflict", split=None if split == "all" else split)
    if method == "path-patching":
        scores = path_patching(
            bridge,
            chosen,
            name=model,
            baseline=baseline,
            mlps=mlps,
            metrics=(metric,),
            seed=seed,
            progress="Path patching",
        )[metric]
    elif method == "direct-logits":
        scores = direct_logit_attribution(bridge, chosen, name=model, progress="Direct logits").heads
    else:
        scores = attribution_patching(bridge, chosen, name=model, seed=seed, progress="Attribution patching")
    scores.save(out)
    save_figure(head_map(scores), out.with_suffix(".html"))
    table = Table(
        "towards", "head", "score", "95 % interval", title=f"{scores.settings['unit']}, {len(scores.values)} prompts"
    )
    for towards in ("context", "memory"):
        for head in scores.ranked(towards)[:top]:
            table.add_row(
                towards, f"{head.layer}.{head.head}", f"{head.score:+.3f}", f"{head.low:+.3f} to {head.high:+.3f}"
            )
    Console().print(table)
    say(f"Scores are in {out}, a picture in {out.with_suffix('.html')}")


@app.command()
def record(
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    data: DataOption = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the recording; the same command goes on where it stopped.")
    ] = Path("out/recording"),
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of sites (residual, attention, mlp, z) or names of sites; repeatable. All but z by default."
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, for example 0-9,12; all by default.")] = None,
    position: Annotated[
        Literal["last", "last_context", "memory_answer", "context_answer", "all"],
        typer.Option(
            help="The tokens that are kept: the prompt's last, its context's last, those of an answer written after it."
        ),
    ] = "last",
    keep: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="The dtype that activations are kept in.")
    ] = "float32",
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Answer conflict prompts too; the source probe needs it.")
    ] = True,
    batch_size: BatchSizeOption = 32,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Record activations of conflicting and aligned prompts, and what the model answers, in a folder.

    Without --data the prompts are about facts that the model knows, in every phrasing in which it knows them. To find
    them it is asked closed-book first; its answers are kept in OUT-records.
    """
    from conflictscope.probing import EMBEDDING, conflicts_for_probes
    from interp.activation_store import ActivationStore
    from interp.activations import SITE_KINDS, observations, sites_of
    from interp.conflicts import ConflictSet
    from interp.models import DTYPES, load_model

    if data is not None and relation:
        raise UserError("Give --data or --relation, not both.")
    chosen = site or ["residual", "attention", "mlp"]
    conflicts = None if data is None else ConflictSet.load(data)
    bridge = load_model(model, device=device, dtype=dtype)
    kinds: list[Any] = [kind for kind in chosen if kind in SITE_KINDS]
    sites = [name for name in chosen if name not in SITE_KINDS]
    if layers is not None and not kinds:
        raise UserError(
            "--layers belongs to kinds of sites; the names of sites that you gave have their layer already."
        )
    sites = [EMBEDDING, *sites_of(bridge, kinds, _layers(layers)), *sites] if kinds else sites
    observations(bridge, sites)
    if conflicts is None:
        conflicts = conflicts_for_probes(
            bridge,
            relation or [DEFAULT_RELATION],
            folder=out.resolve().with_name(f"{out.resolve().name}-records"),
            seed=seed,
            kinds=("conflict", "aligned"),
        )
    store = ActivationStore.record(
        out,
        bridge,
        conflicts,
        list(dict.fromkeys(sites)),
        position,
        name=model,
        seed=seed,
        dtype=DTYPES[keep],
        answers=answers,
        batch_size=batch_size,
        progress="Recording",
    )
    say(f"Recorded {store.index.height} tokens of {len(conflicts)} prompts at {len(store.sites)} sites in {out}")


@probe_app.command("fit")
def probe_fit(
    recording: RecordingOption = Path("out/recording"),
    out: Annotated[Path, typer.Option(help="Folder for the probes, their controls and the detector.")] = Path(
        "out/probes"
    ),
    label: Annotated[list[str] | None, typer.Option(help="conflict or source; repeatable; both by default.")] = None,
    method: Annotated[
        Literal["logistic", "discriminant", "mean_difference"], typer.Option(help="How probes are fitted.")
    ] = "logistic",
    held_out: Annotated[
        str, typer.Option(help="Phrasing family that is neither trained nor chosen on.")
    ] = "according_to",
    false_positive_rate: Annotated[
        float, typer.Option(help="Share of aligned prompts that the detector may call conflicts.")
    ] = 0.05,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Fit the controls too; it takes several times as long.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the shuffled labels.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Fit probes of conflict and source at every recorded site, and a detector."""
    from conflictscope.probing import LABELS, fit_probes
    from interp.activation_store import ActivationStore

    if unknown := [name for name in label or () if name not in LABELS]:
        raise UserError(f"There is no probe of {unknown[0]!r}; choose among {', '.join(LABELS)}.")
    if label and "conflict" not in label and false_positive_rate != 0.05:
        raise UserError(
            "--false-positive-rate belongs to the detector, which needs --label conflict; give both or none."
        )
    probes, detector = fit_probes(
        ActivationStore(recording),
        out,
        labels=[name for name in LABELS if name in (label or LABELS)],
        method=method,
        held_out=held_out,
        false_positive_rate=false_positive_rate,
        controls=controls,
        seed=seed,
        device=device,
    )
    for name, probe_set in probes.items():
        say(f"{name}: chosen on dev is {probe_set.best.site}, AUROC {probe_set.best.validation_auroc:.3f} there")
    if detector is not None:
        hits = detector.settings["dev_true_positive_rate"]
        say(
            f"detector: {detector.conflict.site} above {detector.threshold:.3f}, chosen because it finds {hits:.0%} of "
            f"the conflicts on dev at {false_positive_rate:.0%} false alarms; `probe score` says what it does on test"
        )
    elif "conflict" in probes:
        say("No detector: it reads the last token of a prompt, and other positions were recorded")
    say(f"Probes are in {out}")


@probe_app.command("score")
def probe_score(
    recording: RecordingOption = Path("out/recording"),
    probes: ProbesOption = Path("out/probes"),
    out: Annotated[Path, typer.Option(help="Folder for scores.parquet and figures/.")] = Path("out/probe-scores"),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Score probes and their controls on held-out subjects, and draw figures."""
    from conflictscope.probing import score_probes, score_table
    from interp.activation_store import ActivationStore

    scores = score_probes(ActivationStore(recording), probes, out, seed=seed)
    print_frame(score_table(scores.frame))
    say(f"All sites are in {out / 'scores.parquet'}, figures in {out / 'figures'}")


@probe_app.command("detect")
def probe_detect(
    file: PromptsArgument = None,
    probes: ProbesOption = Path("out/probes"),
    model: ModelOption = DEFAULT_MODEL,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Say of each prompt, before it is answered, whether its context conflicts with memory and which will win.

    Writes one JSON object a line to standard output, in the order of the prompts.
    """
    from dataclasses import asdict

    from conflictscope.probing import check_finished
    from interp.models import fingerprint, load_model
    from probes.detector import ConflictDetector

    check_finished(probes)
    detector = ConflictDetector.load(probes / "detector")
    with _prompt_batches(file, batch_size) as batches:
        bridge = load_model(model, device=device, dtype=dtype)
        fitted = detector.settings.get("model", {})
        if fingerprint(bridge) != fitted.get("fingerprint"):
            raise UserError(
                f"The probes were fitted on {fitted.get('name', 'an unknown model')} with other weights or in another "
                "dtype; give that model, or record and fit with this one."
            )
        for batch in batches:
            detections = detector.detect(bridge, [prompt.text for prompt in batch], batch_size=batch_size)
            for prompt, detection in zip(batch, detections, strict=True):
                sys.stdout.write(json.dumps({"id": prompt.id, **asdict(detection)}) + "\n")
            sys.stdout.flush()


@sae_app.command("train")
def sae_train(
    model: ModelOption = DEFAULT_MODEL,
    layers: Annotated[str, typer.Option(help="Layers whose output is to be explained, for example 12,16,20-22.")] = (
        "12,16,18,20,22"
    ),
    out: Annotated[
        Path, typer.Option(help="Folder for layer_N/, text and activations; the same command goes on in it.")
    ] = Path("out/saes"),
    architecture: Annotated[
        Literal["batchtopk", "topk", "jumprelu", "standard"],
        typer.Option(help="How features compete; batchtopk ends as a JumpReLU autoencoder."),
    ] = "batchtopk",
    features: Annotated[int, typer.Option(min=2, help="Features of each autoencoder.")] = 4096,
    active: Annotated[
        int | None, typer.Option(min=1, help="Features that are to fire for a token, 32 by default; not for standard.")
    ] = None,
    l1: Annotated[float | None, typer.Option(help="Weight of the L1 penalty, 5 by default; for standard only.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on; few are seen several times.")] = 800_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = 3e-3,
    texts: Annotated[
        int | None, typer.Option(min=0, help="Texts of some 100 tokens to sample from the model; 2048 by default.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=0, help="Conflict prompts of the train split to mix in; 6000 by default.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to train on instead of sampled text: one text a line.")
    ] = None,
    recording: Annotated[
        Path | None, typer.Option(help="A recording of all tokens (`record --position all`) to train on instead.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Train sparse autoencoders of the residual stream with sae_lens, and write a card of quality for each.

    Needs no download: text is sampled from the model itself.
    """
    from conflictscope.saes import sae_table, train_saes
    from interp.activation_store import ActivationStore
    from interp.models import load_model
    from probes.sae_training import SAETraining

    if (l1 if architecture != "standard" else active) is not None:
        raise UserError("--l1 belongs to --architecture standard, --active to all others; give the one that applies.")
    if recording is not None and not texts is prompts is text is None:
        raise UserError("--recording takes the place of --text, --texts and --prompts; leave these out.")
    if text is not None and texts is not None:
        raise UserError("--text takes the place of --texts; leave one out.")
    settings = SAETraining(
        architecture=architecture,
        features=features,
        active=active or 32,
        l1=5.0 if l1 is None else l1,
        tokens=tokens,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    lines = None if text is None else _lines(text)
    saes = train_saes(
        load_model(model, device=device, dtype=dtype),
        model,
        _layers(layers) or [],
        out,
        settings,
        n_texts=2048 if texts is None else texts,
        n_prompts=6000 if prompts is None else prompts,
        texts=lines,
        recording=None if recording is None else ActivationStore(recording),
        seed=seed,
        device=device,
    )
    print_frame(sae_table(saes))
    say(f"SAEs and their cards are in {out}; {out / 'activations'} may be deleted")


@sae_app.command("evaluate")
def sae_evaluate(
    sae: SaeOption = DEFAULT_MODEL,
    model: ModelOption = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for quality.json and the sampled text.")] = Path("out/sae-quality"),
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Measure autoencoders on text and conflict prompts that they were not trained on."""
    from conflictscope.saes import check_unseen, measure_saes, quality_table, test_subjects
    from interp.files import write_json
    from interp.models import load_model
    from interp.sae import load_saes

    saes = load_saes(sae)
    check_unseen(saes, test_subjects(seed))
    bridge = load_model(model, device=device, dtype=dtype)
    for one in saes:
        one.check(bridge, model)
    qualities = measure_saes(bridge, saes, out, seed=seed)
    records = {part: [quality.to_record() for quality in found] for part, found in qualities.items()}
    write_json(out / "quality.json", {"saes": [one.name for one in saes], "layers": [s.layer for s in saes], **records})
    print_frame(quality_table([one.layer for one in saes], records))
    say(f"Everything measured is in {out / 'quality.json'}")


@sae_app.command("features")
def sae_features(
    sae: SaeOption = DEFAULT_MODEL,
    layer: Annotated[int | None, typer.Option(help="Which of several SAEs; its layer.")] = None,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="A feature; repeatable. By default those that tell most about the source of answers."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many features, where none are given.")] = 4,
    recording: Annotated[Path, typer.Option(help="A recording of conflict prompts' last tokens, with answers.")] = Path(
        "out/control/recording"
    ),
    model: ModelOption = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for features.json and a figure of each.")] = Path("out/features"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Look at features: which prompts they fire for, with which source, and which tokens they promote."""
    from conflictscope.features import look_at_features
    from interp.activation_store import ActivationStore
    from interp.models import load_model
    from interp.sae import load_saes

    saes = load_saes(sae)
    found = [one for one in saes if layer is None or one.layer == layer]
    if not found:
        raise UserError(f"{sae} has no SAE of layer {layer}; it has {_listed(saes)}.")
    if len(found) > 1:
        raise UserError(f"{sae} has several SAEs; give --layer, one of {_listed(saes)}.")
    bridge = load_model(model, device=device, dtype=dtype)
    found[0].check(bridge, model)
    table = look_at_features(bridge, found[0], ActivationStore(recording), out, features=feature, count=count)
    print_frame(table)
    say(f"More about each is in {out / 'features.json'}, figures next to it")


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
        wanted = _layers(layers) or []
        if absent := [number for number in wanted if number not in {one.layer for one in saes}]:
            raise UserError(f"{sae} has no SAE of layer {absent[0]}; it has {_listed(saes)}.")
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
    _answer_edited(edit, file, save, model, max_new_tokens, batch_size, device, dtype)


@dial_app.command("fit")
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
    from interventions.fitting.scale_training import ScaleTraining

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


@dial_app.command("apply")
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
    _answer_edited(edit.dialed(trust), file, save, model, max_new_tokens, batch_size, device, dtype)


@app.command()
def models() -> None:
    """List the registered models and whether they are cached."""
    from interp.models import REGISTERED, cached_path, is_cached

    table = Table("name", "cached", "what it is")
    for name, entry in REGISTERED.items():
        table.add_row(name, str(cached_path(name)) if is_cached(name) else "no", entry.description)
    Console().print(table)
    Console().print("Any local directory or hub id of a causal language model works too, if its architecture is known:")
    from interp.anatomy import BLUEPRINTS

    Console().print(", ".join(sorted(BLUEPRINTS)))


@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Option(help="JSON lines file to write.")] = Path("out/conflicts.jsonl"),
    model: ModelOption = DEFAULT_MODEL,
    relation: RelationOption = None,
    all_facts: Annotated[
        bool, typer.Option("--all-facts", help="Keep facts that no model was asked about; needs no model.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Build conflict data from the fact tables, of the facts that the model knows closed-book."""
    from interp.facts import build_conflicts, usable_facts

    if all_facts:
        conflicts = build_conflicts({name: usable_facts(name) for name in relation or [DEFAULT_RELATION]}, seed=seed)
    else:
        _, conflicts = _model_and_data(model, relation, None, seed, device, dtype)
    conflicts.save(out)
    say(f"Wrote {len(conflicts)} examples about {len(conflicts.subjects)} subjects to {out}")


@data_app.command("inspect")
def data_inspect(
    file: Annotated[Path, typer.Argument(help="JSON lines from `conflictscope data`.")],
    show: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 2,
) -> None:
    """Say what is in a file of conflict data, and how often its answers are hard to tell apart."""
    from interp.answers import ambiguous
    from interp.conflicts import ConflictSet

    conflicts = ConflictSet.load(file)
    output = Console()
    output.print_json(json.dumps(conflicts.counts()))
    unclear = ambiguous(conflicts)
    output.print(
        f"Of {unclear['prompts']} conflict prompts, {unclear['same']} have the same answer on both sides, "
        f"{unclear['contained']} have one answer within the other (the longer match counts), and "
        f"{unclear['both_in_context']} have both answers in their context.",
        soft_wrap=True,
        highlight=False,
    )
    for example in conflicts.examples[:show]:
        output.rule(f"{example.id}  ({example.kind}, {example.split})")
        output.print(example.prompt, markup=False)
        output.print(
            f"memory: {', '.join(example.memory_answers)}   context: {', '.join(example.context_answers)}", markup=False
        )


_SHOWN_ROWS = 10


@data_app.command("convert")
def data_convert(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="A data set in its native format: JSON, JSONL, CSV, TSV or Parquet."),
    ],
    format: Annotated[str, typer.Option("--format", help="Its format; a wrong name lists the known ones.")],
    out: Annotated[Path, typer.Option(help="JSON lines file to write.")] = Path("out/conflicts.jsonl"),
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do with a malformed row: stop, or skip and count it.")
    ] = "stop",
    seed: SeedOption = 0,
) -> None:
    """Convert a public data set to conflict data; leaves out, and counts, what could not be measured."""
    from interp.formats import convert_dataset

    converted = convert_dataset(files, format, out, on_error=on_error, seed=seed)
    for sentence in converted.skipped[:_SHOWN_ROWS]:
        say(f"Skipped: {sentence}")
    for sentence in converted.left_out[:_SHOWN_ROWS]:
        say(f"Left out: {sentence}")
    for reason, count in converted.reasons.most_common():
        say(f"Left out {count} items: {reason}")
    say(
        f"Wrote {converted.examples} examples to {out}; skipped {len(converted.skipped)} rows, "
        f"left out {len(converted.left_out)} items"
    )


deployment.add_to(app)
for command in (ask, explore, report):
    app.command()(command)


def main() -> None:
    """Run the command line: a user's mistake is one sentence and exit code 2, never a traceback."""
    plain = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, Caution):
            console.print(f"Note: {message}", markup=False, style="yellow", soft_wrap=True, highlight=False)
        else:
            plain(message, category, *where)

    warnings.showwarning = shown
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'the file system refused'}; mend that and run again.", 2)
    except ModuleNotFoundError as error:
        extras = {
            "explore": ("dash", "flask", "werkzeug"),
            "sae": ("sae_lens", "sklearn"),
            "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"),
        }
        extra = next((name for name, packages in extras.items() if error.name in packages), "study")
        _fail(f"{error.name} is not installed; install what this needs with: pip install 'conflictscope[{extra}]'", 2)
    except SystemExit as end:
        # What typer makes of an interrupt.
        if end.code != 130:
            raise
        _fail("Interrupted; run the same command again to go on where it stopped.", 130)


def _fail(message: str, code: int) -> None:
    console.print(f"Error: {message}", markup=False, style="red", soft_wrap=True, highlight=False)
    sys.exit(code)


def _model_and_data(
    model: str, relation: list[str] | None, data: Path | None, seed: int, device: str, dtype: str
) -> tuple[Any, Any]:
    """The model, and conflict data from a file or built from what the model knows."""
    from interp.conflicts import ConflictSet
    from interp.facts import build_conflicts, known_facts, relation_named
    from interp.models import load_model

    if data is not None and relation:
        raise UserError("Give --data or --relation, not both.")
    conflicts = None if data is None else ConflictSet.load(data)
    names = [relation_named(name).name for name in relation or [DEFAULT_RELATION]]
    bridge = load_model(model, device=device, dtype=dtype)
    if conflicts is None:
        facts = {name: known_facts(bridge, name, progress=f"Closed-book: {name}") for name in names}
        conflicts = build_conflicts(facts, seed=seed)
    return bridge, conflicts


def _answer_edited(
    edit: Any,
    file: Path | None,
    save: Path | None,
    model: str,
    max_new_tokens: int,
    batch_size: int,
    device: str,
    dtype: str,
) -> None:
    """Answer prompts without and with an intervention file, and save that file if it is wanted."""
    from interp.generation import continue_greedily
    from interp.models import load_model
    from interventions.base import applied

    with _prompt_batches(file, batch_size) as batches:
        bridge = load_model(model, device=device, dtype=dtype)
        edit.model.check(bridge)
        if save is not None:
            edit.save(save)
        for batch in batches:
            texts = [prompt.text for prompt in batch]
            plain = continue_greedily(bridge, texts, max_new_tokens=max_new_tokens, batch_size=batch_size).answers
            with applied(bridge, edit):
                edited = continue_greedily(bridge, texts, max_new_tokens=max_new_tokens, batch_size=batch_size).answers
            for prompt, before, after in zip(batch, plain, edited, strict=True):
                sys.stdout.write(json.dumps({"id": prompt.id, "unedited": before, "edited": after}) + "\n")
            sys.stdout.flush()


@contextmanager
def _prompt_batches(file: Path | None, batch_size: int) -> Iterator[Iterator[list[Any]]]:
    """The prompts of a file, or of standard input, in batches; refuses a file without any before all else."""
    from conflictscope.probing import read_prompts

    stream = sys.stdin if file in (None, Path("-")) else file.open(encoding="utf-8")
    with stream:
        batches = read_prompts(stream, batch_size)
        first = next(batches, None)
        if first is None:
            raise UserError("There are no prompts; give a file with one a line, or pipe them in.")
        yield itertools.chain([first], batches)


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


def _listed(saes: Any) -> str:
    return ", ".join(str(sae.layer) for sae in saes)


def _lines(path: Path) -> list[str]:
    """The texts of a file, one a line."""
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no text; give one text a line.")
    return lines


def _layers(text: str | None) -> list[int] | None:
    """The layers that a text like ``0-9,12`` names."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--layers takes numbers and ranges like 0-9,12, not {text!r}.")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(layers))


def _check_columns(columns: list[str]) -> None:
    allowed = ("kind", "template", "relation", "split", "subject")
    if unknown := [column for column in columns if column not in allowed]:
        raise UserError(f"--by cannot break down by {unknown[0]!r}; choose among {', '.join(allowed)}.")


def _check_parquet(path: Path) -> None:
    if path.suffix != ".parquet":
        raise UserError(f"--out is a Parquet file; give a name that ends in .parquet, not {path.name}.")


if __name__ == "__main__":
    main()
