"""What is missing for which command is what the package's own metadata says."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conflictscope.cli import app


def doctor(monkeypatch: pytest.MonkeyPatch, cache: Path, **versions: str | None) -> Any:
    """What the command says where these packages are of these versions, or missing."""
    installed = metadata.version

    def version(name: str) -> str:
        if (found := versions.get(name.replace("-", "_"), installed)) is None:
            raise metadata.PackageNotFoundError(name)
        return found if isinstance(found, str) else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setenv("CONFLICTSCOPE_CACHE", str(cache))
    return CliRunner().invoke(app, ["doctor"])


def test_all_is_ready_but_for_what_is_missing(monkeypatch, tmp_path):
    found = doctor(monkeypatch, tmp_path / "not" / "yet")
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert "demo, compare, ask and all that measures: ready" in lines
    assert f"torch {metadata.version('torch')}" in lines[1]
    assert any(line.startswith(f"Fetched models lie in {tmp_path / 'not' / 'yet'}, with ") for line in lines)
    assert "smollm2-135m is fetched when first used." in lines
    (images,) = (line for line in lines if line.startswith("figures as PNG"))
    assert images.endswith("ready; Chrome or Chromium was not found, which you install yourself")


def test_what_most_commands_need_ends_with_one(monkeypatch, tmp_path):
    found = doctor(monkeypatch, tmp_path, plotly=None, transformers="5.24.0")
    assert found.exit_code == 1
    (study,) = (line for line in found.stdout.splitlines() if line.startswith("demo, compare"))
    assert "plotly is missing" in study
    assert "transformers is 5.24.0, not <5.24" in study
    assert study.endswith("pip install 'conflictscope[study]'")
    # What extras take from others is theirs, too; serving needs neither.
    assert sum("plotly is missing" in line for line in found.stdout.splitlines()) == 6
    assert "serve: ready" in found.stdout


def test_it_says_what_is_missing_also_where_nothing_can_be_asked_of_models(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "interp.models", None)
    found = doctor(monkeypatch, tmp_path, transformers=None)
    assert found.exit_code == 1
    assert "Where models run and lie is not known: " in found.stdout
    assert "transformers is missing" in found.stdout


def test_an_extra_of_its_own_breaks_nothing_else(monkeypatch, tmp_path):
    found = doctor(monkeypatch, tmp_path, fastapi=None)
    assert found.exit_code == 0
    assert "serve: fastapi is missing: pip install 'conflictscope[serve]'" in found.stdout


def test_without_its_metadata_it_says_so(monkeypatch, tmp_path):
    def requires(_: str) -> None:
        raise metadata.PackageNotFoundError("conflictscope")

    monkeypatch.setattr(metadata, "requires", requires)
    found = doctor(monkeypatch, tmp_path)
    assert found.exit_code == 1
    assert "runs without being installed, so that its needs are not known" in found.stdout
