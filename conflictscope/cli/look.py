"""The commands that measure a model and look inside it; and the list of models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from conflictscope.cli.cluster import Cluster
from conflictscope.cli.inputs import check_parquet, columns_of, layers_of
from conflictscope.cli.options import Asked, BatchSizeOption, SplitOption, say
from conflictscope.cli.tables import print_frame
from interp.answers import CHAT_TOKENS, COMPLETION_TOKENS
from interp.errors import UserError

_PARTS = ("kind", "template", "relation", "split", "subject")


def evaluate(
    *,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="Intervention file to apply; repeatable, applied in order.")
    ] = None,
    split: SplitOption = "test",
    subjects: Annotated[
        int | None, typer.Option(min=1, help="Subjects asked about at most, drawn at random; all by default.")
    ] = None,
    by: Annotated[str, typer.Option(help="Columns to break the table down by, separated by commas.")] = "kind",
    out: Annotated[Path, typer.Option(help="Parquet file for the answers, one row per prompt.")] = Path(
        "out/usage.parquet"
    ),
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Longest answer in tokens: as the longest takes, from {COMPLETION_TOKENS} to {CHAT_TOKENS}; "
            f"{CHAT_TOKENS} in a chat.",
        ),
    ] = None,
    whole_answer: Annotated[
        bool, typer.Option("--whole-answer", help="Judge all that the model says, not only its first sentence.")
    ] = False,
    reliance: Annotated[
        Path | None,
        typer.Option(
            help="Parquet file for what the context adds to each token of the answers; a figure goes next to it."
        ),
    ] = None,
    source: Asked,
) -> None:
    """Answer every prompt of a split and say how often memory and context were used."""
    from interp.conflicts import about_some
    from interp.evaluation import measure_usage
    from interventions.base import applied
    from interventions.config import InterventionFile
    from interventions.decoding import told_apart

    columns = columns_of(by, _PARTS)
    for path in (out, *([reliance] if reliance else [])):
        check_parquet(path)
    edits = [InterventionFile.load(path) for path in config or []]
    model, conflicts = source.conflicts()
    asked = _part(conflicts, split)
    if subjects is not None:
        asked = about_some(asked, subjects, source.seed)
    for edit in edits:
        edit.check(model)
    changes, rule = told_apart(part for edit in edits for part in edit.build())
    if reliance is not None and (rule is not None or whole_answer):
        raise UserError("--reliance takes first sentences: leave out --whole-answer and decoding rules, or --reliance.")
    combined = None if rule is None else rule.scores
    with applied(model, *changes):
        longest = source.longest_answer(model, asked, max_new_tokens)
        how: dict[str, Any] = {"max_new_tokens": longest, "whole": whole_answer}
        report = measure_usage(model, asked, combined=combined, progress="Answering", **how)
    _print_usage(report, asked, columns, out)
    say(f"Answers are in {out}")
    if reliance is not None:
        with applied(model, *changes):
            _write_reliance(model, asked, reliance, longest)


def _print_usage(report: Any, asked: Any, columns: list[str], path: Path) -> None:
    """Write a report and print its rates; of data with types of conflicts also whether answers are as expected."""
    from interp.evaluation import UsageReport
    from interp.expected import expected_rates, with_expected

    rows = with_expected(report.frame, asked)
    rates = expected_rates(rows)
    has_types = not rates.is_empty()
    (UsageReport(rows) if has_types else report).save(path)
    print_frame(report.summary(by=columns))
    if has_types:
        print_frame(rates)


def _part(conflicts: Any, split: str) -> Any:
    """The prompts of a split.

    Raises:
        UserError: If it has none; the message says which splits have some.
    """
    part = conflicts if split == "all" else conflicts.select(split=split)
    if not len(part):
        counts = {name: count for name, count in conflicts.counts()["examples_by_split"].items() if count}
        there = " and ".join(f"{count} of {name}" for name, count in counts.items())
        raise UserError(
            f"{conflicts.name} has no examples of the split {split}, but {there}; give --split {next(iter(counts))} "
            "or --split all."
        )
    return part


def _write_reliance(model: Any, asked: Any, path: Path, longest: int) -> None:
    """What the context adds to each token of the answers, and a figure of it."""
    from figures.reliance import reliance_map
    from figures.theme import save_figure
    from interp.files import write_parquet
    from interp.reliance import token_reliance

    frame = token_reliance(model, asked, max_new_tokens=longest, progress="Token by token")
    write_parquet(path, frame)
    save_figure(reliance_map(frame), path.with_suffix(".html"))
    say(f"What the context adds to each token is in {path}, a picture in {path.with_suffix('.html')}")


def record(
    *,
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
    out: Annotated[
        Path, typer.Option(help="Folder of the recording; the same command goes on where it stopped.")
    ] = Path("out/recording"),
    cluster: Cluster,
    source: Asked,
) -> None:
    """Record activations of conflicting and aligned prompts, and what the model answers, in a folder.

    Without --data the prompts are about facts that the model knows, in every phrasing. To find them it is asked
    closed-book first; what it knows is kept in OUT-records.
    """
    from interp.activation_store import ActivationStore
    from interp.models import DTYPES

    chosen = site or ["residual", "attention", "mlp"]
    _check_layers(chosen, layers)
    cluster.check()
    numbers, beside = layers_of(layers), out.resolve().with_name(f"{out.resolve().name}-records")
    options: dict[str, Any] = {"positions": position, "name": source.model, "seed": source.seed}
    options |= {"dtype": DTYPES[keep], "answers": answers, "batch_size": batch_size}
    asked, sites = partial(_recorded_prompts, source, beside), partial(_sites, chosen=chosen, layers=numbers)
    if cluster.ray is None:
        model, conflicts = asked()
        store = ActivationStore.record(out, model, conflicts, sites(model), **options, progress="Recording")
    else:
        from conflictscope.study.setting import digest_of
        from conflictscope.study.sharded import ShardedRecording, done_in_parts

        files = [Path(source.model), *filter(None, (source.data, source.blueprint))]
        parts = beside / f"parts-{digest_of([repr((source, chosen, numbers, options))], files)}"
        work = partial(ShardedRecording, source.load, asked, parts, options, out.resolve(), sites)
        done_in_parts(work(), cluster.executor(work, parts))
        store = ActivationStore(out)
    about = f"{store.basis['data']['prompts']} prompts at {len(store.sites)} sites"
    say(f"Recorded {store.index.height} tokens of {about} in {out}")


def _recorded_prompts(source: Asked, folder: Path) -> tuple[Any, Any]:
    """Load the model, and get the prompts that are recorded."""
    from interp.conflicts import ConflictSet
    from probes.fitting import conflicts_for_probes

    relations = source.relations()
    conflicts = None if source.data is None else ConflictSet.load(source.data)
    model = source.load()
    if conflicts is None:
        how: Any = {"folder": folder, "seed": source.seed}
        conflicts = conflicts_for_probes(model, relations, kinds=("conflict", "aligned"), **how)
    return model, source.asking.asked(model, source.model, conflicts)


def _check_layers(chosen: Sequence[str], layers: str | None) -> None:
    from interp.activations import SITE_KINDS

    if layers is not None and not set(chosen) & set(SITE_KINDS):
        raise UserError(
            "--layers belongs to kinds of sites; the names of sites that you gave have their layer already."
        )


def _sites(model: Any, chosen: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """The sites of the kinds that are chosen, the embedding first, and those that are chosen by name; all exist."""
    from interp.activations import SITE_KINDS, observations, sites_of
    from probes.fitting import EMBEDDING

    kinds: list[Any] = [kind for kind in chosen if kind in SITE_KINDS]
    named = [name for name in chosen if name not in SITE_KINDS]
    sites = list(dict.fromkeys([EMBEDDING, *sites_of(model, kinds, layers), *named] if kinds else named))
    observations(model, sites)
    return sites


def models() -> None:
    """List the registered models and whether they are cached."""
    from interp.models import REGISTERED, cached_path, is_cached

    for name, entry in REGISTERED.items():
        Console().print(f"{name}: {entry.description}")
        Console().print(f"    {cached_path(name) if is_cached(name) else 'not fetched yet'}", soft_wrap=True)
    Console().print("Any local directory or hub id of a causal language model works too, if its architecture is known:")
    from interp.anatomy import BLUEPRINTS

    Console().print(", ".join(sorted(BLUEPRINTS)))
