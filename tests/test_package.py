"""The package as people get it: typed, one version everywhere, one definition of what a change must pass."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import conflictscope

ROOT = Path(__file__).parents[1]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_every_package_of_the_wheel_is_marked_as_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [package for package in packages if not (ROOT / package / "py.typed").is_file()] == []


def test_the_changelog_starts_with_this_version_and_goes_back():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [tuple(map(int, found.split("."))) for found in re.findall(r"^## (\d+\.\d+\.\d+)$", text, re.MULTILINE)]
    assert ".".join(map(str, versions[0])) == conflictscope.__version__
    assert versions == sorted(set(versions), reverse=True)
    assert len(versions) == text.count("\n## ")


def test_every_run_elsewhere_is_the_same_as_here():
    steps = [step for job in read_yaml(".github/workflows/ci.yml")["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    hooks = [hook for repository in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    run = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {"make lint", "make test"} <= {*run}


def test_the_citation_says_what_the_format_needs():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "MIT"


def test_issue_forms_have_what_a_code_host_needs():
    for form in ("bug.yml", "method.yml"):
        assert {"name", "description", "body"} <= read_yaml(f".github/ISSUE_TEMPLATE/{form}").keys()
