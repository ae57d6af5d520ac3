"""Read blueprints of architectures from JSON files, and make them known.

{"architecture": "MyForCausalLM", "like": "LlamaForCausalLM", "fields": {"mlp_norm": null, ...}}

``fields`` are those of ``interp.anatomy.Blueprint``; with ``like`` only those that differ from a known architecture.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from interp.anatomy import BLUEPRINTS, Blueprint, Variant, unknown_architecture
from interp.errors import UserError
from interp.files import read_json

_ENTRIES = ("architecture", "like", "fields")
# What files of interventions say of where an edit acts holds for all settings of an architecture.
_UNVARIED = ("attention_post_norm", "mlp_post_norm", "variants")


def blueprint_from(path: str | Path) -> tuple[str, Blueprint]:
    """Read a blueprint from a JSON file.

    Args:
        path: The file.

    Returns:
        Class name of the transformers model, and what such models look like.

    Raises:
        UserError: If the file cannot be read, an entry or field is missing, unknown or of the wrong kind, or the
            architecture that it is like is not known.
    """
    from pydantic import TypeAdapter, ValidationError

    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("architecture"), str):
        raise UserError(f'{path} does not name its architecture; write {{"architecture": "...", "fields": {{...}}}}.')
    _check_names(path, record, _ENTRIES)
    like, changed = record.get("like"), record.get("fields", {})
    if like is not None and like not in BLUEPRINTS:
        raise UserError(unknown_architecture(str(like)))
    given = ({} if like is None else asdict(BLUEPRINTS[like])) | (changed if isinstance(changed, dict) else {})
    _check_names(path, given, [field.name for field in fields(Blueprint)])
    try:
        blueprint = TypeAdapter(Blueprint).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} has a wrong field {place} ({first['msg']}); mend it.") from error
    for variant in blueprint.variants:
        _check_variant(path, variant)
    return record["architecture"], blueprint


def register(path: str | Path) -> str:
    """Make the architecture of a JSON file known, for this process, and give its name.

    Raises:
        UserError: As ``blueprint_from``, or if another blueprint of this architecture is known already.
    """
    name, blueprint = blueprint_from(path)
    if BLUEPRINTS.setdefault(name, blueprint) != blueprint:
        raise UserError(f"The architecture {name} of {path} is known already, and looks otherwise; leave the file out.")
    return name


def _check_variant(path: str | Path, variant: Variant) -> None:
    _check_names(path, variant.fields, [f.name for f in fields(Blueprint) if f.name not in _UNVARIED])


def _check_names(path: str | Path, given: Any, known: Any) -> None:
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{path} has an unknown entry {unknown[0]!r}; there are {', '.join(known)}.")
