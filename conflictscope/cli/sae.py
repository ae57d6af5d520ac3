"""The commands about sparse autoencoders."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from conflictscope.cli.inputs import layers_of, listed_layers
from conflictscope.cli.options import DEFAULT_MODEL, Asked, Model, SaeOption, SeedOption, SplitOption, say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError


@dataclass(frozen=True)
class Training:
    """How autoencoders are trained."""

    architecture: Annotated[
        Literal["batchtopk", "topk", "jumprelu", "standard"],
        typer.Option(help="How features compete; batchtopk ends as a JumpReLU autoencoder."),
    ] = "batchtopk"
    features: Annotated[int, typer.Option(min=2, help="Features of each autoencoder.")] = 4096
    active: Annotated[
        int | None, typer.Option(min=1, help="Features that are to fire for a token, 32 by default; not for standard.")
    ] = None
    l1: Annotated[float | None, typer.Option(help="Weight of the L1 penalty, 5 by default; for standard only.")] = None
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on; few are seen several times.")] = 800_000
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 2048
    learning_rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = 3e-3
    seed: SeedOption = 0

    def settings(self) -> Any:
        """What decides the training.

        Raises:
            UserError: If a setting belongs to another architecture.
        """
        from probes.sae_training import SAETraining

        if (self.l1 if self.architecture != "standard" else self.active) is not None:
            raise UserError(
                "--l1 belongs to --architecture standard, --active to all others; give the one that applies."
            )
        return SAETraining(**{**asdict(self), "active": self.active or 32, "l1": 5.0 if self.l1 is None else self.l1})


def sae_train(
    *,
    layers: Annotated[str, typer.Option(help="Layers whose output is to be explained, for example 12,16,20-22.")] = (
        "12,16,18,20,22"
    ),
    out: Annotated[
        Path, typer.Option(help="Folder for layer_N/, text and activations; the same command goes on in it.")
    ] = Path("out/saes"),
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
    training: Training,
    loaded: Model,
) -> None:
    """Train sparse autoencoders of the residual stream with sae_lens, and write a card of quality for each.

    Needs no download: text is sampled from the model itself.
    """
    from interp.activation_store import ActivationStore
    from probes.sae_data import TrainingText
    from probes.sae_making import train_saes
    from probes.sae_quality import sae_table

    settings = training.settings()
    if recording is not None and not texts is prompts is text is None:
        raise UserError("--recording takes the place of --text, --texts and --prompts; leave these out.")
    if text is not None and texts is not None:
        raise UserError("--text takes the place of --texts; leave one out.")
    if recording is None:
        lines = None if text is None else _lines(text)
        n_texts, n_prompts = 2048 if texts is None else texts, 6000 if prompts is None else prompts
        source = TrainingText(lines, n_texts, n_prompts, training.seed)
    else:
        source = ActivationStore(recording)
    saes = train_saes(
        loaded.load(),
        loaded.model,
        layers_of(layers) or [],
        out,
        settings,
        source,
        device=loaded.device,
    )
    print_frame(sae_table(saes))
    say(f"SAEs and their cards are in {out}; {out / 'activations'} may be deleted")


def sae_evaluate(
    *,
    sae: SaeOption = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for quality.json and the sampled text.")] = Path("out/sae-quality"),
    seed: SeedOption = 0,
    loaded: Model,
) -> None:
    """Measure autoencoders on text and conflict prompts that they were not trained on."""
    from interp.files import write_json
    from interp.sae import load_saes
    from probes.sae_data import check_unseen, test_subjects
    from probes.sae_quality import measure_saes, quality_table

    saes = load_saes(sae)
    check_unseen(saes, test_subjects(seed))
    model = loaded.load()
    for one in saes:
        one.check(model, loaded.model)
    qualities = measure_saes(model, saes, out, seed=seed)
    records = {part: [quality.to_record() for quality in found] for part, found in qualities.items()}
    write_json(out / "quality.json", {"saes": [one.name for one in saes], "layers": [s.layer for s in saes], **records})
    print_frame(quality_table([one.layer for one in saes], records))
    say(f"Everything measured is in {out / 'quality.json'}")


def sae_features(
    *,
    sae: SaeOption = DEFAULT_MODEL,
    layer: Annotated[int | None, typer.Option(help="Which of several SAEs; its layer.")] = None,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="A feature; repeatable. By default those that tell most about the source of answers."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many features, where none are given.")] = 4,
    recording: Annotated[Path, typer.Option(help="A recording of conflict prompts' last tokens, with answers.")] = Path(
        "out/recording"
    ),
    out: Annotated[Path, typer.Option(help="Folder for features.json and a figure of each.")] = Path("out/features"),
    loaded: Model,
) -> None:
    """Look at features: which prompts they fire for, with which source, and which tokens they promote."""
    from figures.features import feature_view
    from figures.theme import save_figure
    from interp.activation_store import ActivationStore
    from interp.files import write_json
    from interp.sae import load_saes
    from probes.feature_views import features_table, look_at_features

    saes = load_saes(sae)
    found = [one for one in saes if layer is None or one.layer == layer]
    if not found:
        raise UserError(f"{sae} has no SAE of layer {layer}; it has {listed_layers(saes)}.")
    if len(found) > 1:
        raise UserError(f"{sae} has several SAEs; give --layer, one of {listed_layers(saes)}.")
    model = loaded.load()
    found[0].check(model, loaded.model)
    views = look_at_features(model, found[0], ActivationStore(recording), features=feature, count=count)
    write_json(out / "features.json", {"sae": found[0].name, "features": [view.to_record() for view in views]})
    for view in views:
        save_figure(feature_view(view), out / f"layer_{view.layer}-feature_{view.feature}.html")
    print_frame(features_table(views))
    say(f"More about each is in {out / 'features.json'}, figures next to it")


def sae_diff(
    *,
    other: Annotated[
        str | None,
        typer.Option(
            "--other",
            help="A fine-tune to compare the model with; without it, prompts with their context and bare ones.",
        ),
    ] = None,
    sae: SaeOption = DEFAULT_MODEL,
    layer: Annotated[int | None, typer.Option(help="Which of several SAEs; its layer. All by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many features of each SAE to list and to edit.")] = 16,
    split: SplitOption = "train",
    out: Annotated[Path, typer.Option(help="Folder for the table, and a figure and an edit of each SAE.")] = Path(
        "out/sae-diff"
    ),
    source: Asked,
) -> None:
    """Find the features that differ most between two models, or with and without a context; and edit them.

    Both models read the same conflict prompts. Each edit moves one layer's features of --model to their means in
    --other, or, without --other, to their means with a context.
    """
    import polars as pl

    from figures.features import difference_bars
    from figures.theme import save_figure
    from interp.files import write_parquet
    from interventions.config import InterventionFile
    from interventions.features import EditedFeatures, FeatureEdit
    from interventions.identity import ModelIdentity
    from probes.feature_differences import differences

    saes = _one_for_each_layer(sae, layer)
    model, conflicts = source.conflicts()
    for one in saes:
        one.check(model, source.model)
    asked = conflicts.select(kind="conflict", split=None if split == "all" else split)
    fine_tune = None if other is None else replace(source, model=other).load()
    found = differences(saes, model, asked, other=fine_tune, progress="Recording")
    table = pl.concat([one.table(count) for one in found])
    sides = ("without context", "with context") if other is None else (source.model, other)
    if table.is_empty():
        raise UserError(f"No feature differs between {sides[0]} and {sides[1]}; there is no edit.")
    write_parquet(out / "differences.parquet", table)
    print_frame(table)
    about = {"method": "feature_differences", "data": asked.digest, "seed": source.seed, "split": split}
    for one in (one for one in found if one.first(count)):
        place = out / f"layer_{one.sae.layer}"
        save_figure(difference_bars(one.table(count), *sides), place.with_suffix(".html"))
        InterventionFile.of(
            [FeatureEdit((EditedFeatures.of(one.sae, *one.moves(count)),), tokens="last_prompt")],
            name=f"{sides[0]} towards {sides[1]}, layer {one.sae.layer}",
            towards="context" if other is None else None,
            model=ModelIdentity.of(model, source.model),
            provenance={**about, "sides": list(sides)},
        ).save(place.with_suffix(".json"))
    say(f"One is {sides[0]}, other is {sides[1]}. The table is in {out}, with a figure and an edit of each layer.")
    say(f"What an edit does: conflictscope evaluate, without and with --config {out}/layer_{table['layer'][0]}.json")


def _one_for_each_layer(source: str, layer: int | None) -> list[Any]:
    """The autoencoders of a source, or that of one layer."""
    from interp.sae import load_saes

    there = load_saes(source)
    saes = [one for one in there if layer is None or one.layer == layer]
    if not saes:
        raise UserError(f"{source} has no SAE of layer {layer}; it has {listed_layers(there)}.")
    if len({one.layer for one in saes}) < len(saes):
        raise UserError(f"{source} has several SAEs of one layer; give a folder with one SAE for each.")
    return saes


def _lines(path: Path) -> list[str]:
    """The texts of a file, one a line."""
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no text; give one text a line.")
    return lines
