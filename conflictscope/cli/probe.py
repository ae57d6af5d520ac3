"""The commands that fit, score and use probes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from conflictscope.cli.inputs import prompt_batches, write_lines
from conflictscope.cli.options import BatchSizeOption, Model, ProbesOption, PromptsArgument, RecordingOption, say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError


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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
) -> None:
    """Fit probes of conflict and source at every recorded site, and a detector."""
    from interp.activation_store import ActivationStore
    from probes.fitting import LABELS, fit_probes

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


def probe_score(
    recording: RecordingOption = Path("out/recording"),
    probes: ProbesOption = Path("out/probes"),
    out: Annotated[Path, typer.Option(help="Folder for scores.parquet and figures/.")] = Path("out/probe-scores"),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Score probes and their controls on held-out subjects, and draw figures."""
    from figures.probe_scores import save_score_figures
    from interp.activation_store import ActivationStore
    from probes.scoring import score_probes, score_table

    scores = score_probes(ActivationStore(recording), probes, out, seed=seed)
    save_score_figures(scores, out / "figures")
    print_frame(score_table(scores.frame))
    say(f"All sites are in {out / 'scores.parquet'}, figures in {out / 'figures'}")


def probe_detect(
    *,
    file: PromptsArgument = None,
    probes: ProbesOption = Path("out/probes"),
    batch_size: BatchSizeOption = 32,
    loaded: Model,
) -> None:
    """Say of each prompt, before it is answered, whether its context conflicts with memory and which will win.

    Writes one JSON object a line to standard output, in the order of the prompts.
    """
    from dataclasses import asdict

    from interp.fingerprints import fingerprint
    from probes.detector import ConflictDetector
    from probes.fitting import check_finished

    check_finished(probes)
    detector = ConflictDetector.load(probes / "detector")
    with prompt_batches(file, batch_size) as batches:
        model = loaded.load()
        fitted = detector.settings.get("model", {})
        if fingerprint(model) != fitted.get("fingerprint"):
            raise UserError(
                f"The probes were fitted on {fitted.get('name', 'an unknown model')} with other weights or in another "
                "dtype; give that model, or record and fit with this one."
            )
        for batch in batches:
            detections = detector.detect(model, [prompt.text for prompt in batch], batch_size=batch_size)
            write_lines(
                {"id": prompt.id, **asdict(detection)} for prompt, detection in zip(batch, detections, strict=True)
            )
