"""The commands that put an intervention behind a conflict detector, and that compare detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from conflictscope.cli.options import Facts, OutOption, TrustOption, say
from conflictscope.cli.studies import BudgetedStudy, StudyOptions, study

_UNSEEN = "held_out_phrasing"


def gate_fit(
    *,
    config: Annotated[Path, typer.Argument(help="The intervention file to put behind a gate.")],
    trust: TrustOption = None,
    keep: Annotated[float, typer.Option(help="Share of conflict prompts that the gate is to let pass.")] = 0.95,
    soft: Annotated[
        bool, typer.Option("--soft", help="Move every prompt by the probability of a conflict, not all or nothing.")
    ] = False,
    out: OutOption = Path("out/gate"),
    asked: StudyOptions,
) -> None:
    """Fit a gate that opens for conflicts, verify it, and write OUT/gated.json and OUT/study.json."""
    from conflictscope.methods.gate import Gate
    from conflictscope.methods.given import Given
    from conflictscope.study.data import RELATIONS
    from interp.answers import DIRECTIONS
    from interventions.config import InterventionFile

    file = InterventionFile.load(config).at(trust=trust)
    # What strengthens neither source is shown as if it were for the context.
    towards = file.towards or DIRECTIONS[-1]
    gate, given = Gate(tuple(file.build()), file.towards, (keep,), soft), Given(file)
    lab = asked.lab(out, default=RELATIONS)
    file.check(lab.model)
    # Where there is no gate there is nothing to measure.
    lab.chosen(gate, towards, within_budget=False)
    record = study(lab, [given, gate], "gate", out, directions=(towards,), choices=("best",))
    (row,) = (found for found in record.chosen(towards) if found.method == gate.name)
    gated = InterventionFile.load(out / str(row.file))
    provenance = gated.provenance.details | {"edit": file.provenance.model_dump(mode="json")}
    about = {"name": f"{file.name}, gated", "towards": file.towards}
    gated.model_copy(update={**about, "provenance": gated.provenance.model_copy(update={"details": provenance})}).save(
        out / "gated.json"
    )

    found = record.details[gate.name][f"towards_{towards}"]
    sites = found["sites"]
    say(f"The gate reads {len(sites)} sites up to {sites[-1]}; it opens for {_listed(found['opened'])}")
    say(f"It keeps of the gain, and of each loss of accuracy: {_listed(found['kept'])}")
    if _UNSEEN in found["opened"]:
        say(f"In the unseen phrasing it opens for {_listed(found['opened'][_UNSEEN])}")
        say(f"and keeps {_listed(found['kept'][_UNSEEN])}")
    say(f"The gated intervention is {out / 'gated.json'}")


def _listed(shares: dict[str, Any]) -> str:
    from conflictscope.tables import written

    return ", ".join(f"{kind} {written(share)}" for kind, share in shares.items() if kind != _UNSEEN)


def gate_dial(
    *,
    keep: Annotated[float, typer.Option(help="Share of conflict prompts that the gate is to let pass.")] = 0.95,
    out: OutOption = Path("out/gated-dial"),
    asked: BudgetedStudy,
) -> None:
    """Learn a dial behind a gate, calibrate and verify it; writes OUT/gated_dial.json and OUT/study.json.

    What the gate protects needs no budget of damage, so that the dial may move heads further than one without a gate.
    """
    from conflictscope.methods.dial import SETTINGS
    from conflictscope.methods.gated_scales import GatedScales
    from conflictscope.methods.learned_scales import ENDS
    from conflictscope.study.choice import line
    from conflictscope.study.condition import Condition
    from conflictscope.study.data import RELATIONS
    from conflictscope.study.run import made_with
    from interp.answers import DIRECTIONS, Direction
    from interventions.config import InterventionFile

    method = GatedScales(keeps=(keep,), strengths=(1.0,))
    lab = asked.lab(out, default=RELATIONS)
    gate = method.dial(lab)

    def at(trust: float) -> Condition:
        towards: Direction | None = next((d for d in DIRECTIONS if trust * ENDS[d] > 0), None)
        return Condition("gated_dial", towards, {"trust": trust}, (gate.turned(trust),))

    settings = line(lab, "trust", {trust: at(trust) for trust in SETTINGS})
    record = study(lab, [method], "gate", out, choices=("best",), lines={"trust": settings})
    ends = {f"trust {ENDS[towards]:+g}": record.chosen(towards)[0].test for towards in DIRECTIONS}
    InterventionFile.of(
        [gate],
        name=f"{lab.name}: gated dial",
        model=lab.identity,
        provenance={"method": method.name, "chosen_on": "dev", "data": lab.prompts.digest, **made_with(lab)},
        measured={"unedited": record.unedited.test, **ends},
    ).save(out / "gated_dial.json")
    for towards in DIRECTIONS:
        kept = record.details[method.name][f"towards_{towards}"]["kept"]
        say(f"Towards {towards} the gate keeps, of what the scales do without it: {_listed(kept)}")
    say(f"The gated dial is {out / 'gated_dial.json'}")


def gate_detectors(
    *,
    unseen_relation: Annotated[
        list[str] | None, typer.Option(help="A relation that is only tested on; repeatable. Headquarters and currency.")
    ] = None,
    each: Annotated[
        int, typer.Option(min=1, help="Phrasing families drawn for each fact and kind of prompt that is learned from.")
    ] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Little of everything: checks that all runs; measures nothing.")
    ] = False,
    out: OutOption = Path("out/detectors"),
    source: Facts,
) -> None:
    """Compare ways to detect conflicts, in phrasings and relations that they were not fitted on."""
    from conflictscope.detecting import UNSEEN_RELATIONS, compare_detectors
    from figures.detectors import families_curve
    from figures.theme import save_figure
    from interp.facts import relation_named, relations
    from interp.statistics import Estimate

    unseen = [relation_named(name).name for name in unseen_relation or UNSEEN_RELATIONS]
    seen = source.relations(tuple(name for name in relations() if name not in unseen))
    model = source.load()
    found = compare_detectors(model, source.model, seen, unseen, out, each=each, seed=source.seed, quick=quick)
    ceiling = {
        one["name"]: Estimate.from_record(one["parts"]["unseen_families"]["all"]["auroc"]) for one in found["ceiling"]
    }
    save_figure(families_curve(found["curve"], ceiling), out / "families.html")
    say((out / "detectors.md").read_text(encoding="utf-8"))
    say(f"These tables are in {out / 'detectors.md'}, all numbers in {out / 'detectors.json'},")
    say(f"log odds of every prompt in {out / 'scores.parquet'}, the curve of families in {out / 'families.html'}")
