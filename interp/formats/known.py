"""The formats that are known, by name."""

from __future__ import annotations

from interp.formats import (
    cad,
    coconflictqa,
    confiqa,
    conflictbank,
    conflictnq,
    conflictqa,
    conflicts,
    counterfact,
    counterfact_competition,
    counterfact_easyedit,
    counterfact_tracing,
    cub,
    druid,
    dynamicqa,
    faitheval,
    known_1000,
    kre,
    memotrap,
    mquake,
    nq_swap,
    paraconflict,
    popqa,
    ramdocs,
    whoqa,
    wikicontradict,
    zsre,
)
from interp.formats.items import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        nq_swap,
        counterfact,
        counterfact_competition,
        paraconflict,
        conflictbank,
        dynamicqa,
        confiqa,
        coconflictqa,
        memotrap,
        conflicts,
        popqa,
        cad,
        conflictnq,
        conflictqa,
        counterfact_easyedit,
        counterfact_tracing,
        cub,
        druid,
        faitheval,
        known_1000,
        kre,
        mquake,
        ramdocs,
        whoqa,
        wikicontradict,
        zsre,
    )
}


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    return sorted(FORMATS)
