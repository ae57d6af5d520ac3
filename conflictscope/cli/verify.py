"""The command that checks an exported edit on the engine that is to run it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.cli.inputs import read_prompts
from conflictscope.cli.options import MODEL_HELP, MaxNewTokensOption, Model, say

_PROMPTS = 16


@dataclass(frozen=True)
class Base(Model):
    """The base model, by default that of the exported edit."""

    model: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None, typer.Option(help=f"{MODEL_HELP} By default what the edit was exported for.")
    ] = None


def verify(
    *,
    out: Annotated[Path, typer.Argument(help="A folder that `export` wrote with --lora, --bake or --vector.")],
    url: Annotated[
        str | None, typer.Option(help="Ask a running server instead, by OpenAI's API: http://localhost:8000.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="CONFLICTSCOPE_API_KEY", help="What the server wants as a bearer token.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="Ask llama.cpp too, with this base in GGUF; not in float32, its rounding shows as well."),
    ] = None,
    llama_python: Annotated[
        Path | None, typer.Option(help="With --gguf: the interpreter that has llama-cpp-python; else this one.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line, instead of those that were recorded with the export.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    base: Base,
) -> None:
    """Compare an exported edit with hooks: next logits and greedy answers, alone and in mixed batches.

    Ends with exit code 1 if anything differs.
    """
    from interp.errors import UserError
    from interventions.export.llama_cpp import LlamaCpp
    from interventions.export.server import Server
    from interventions.export.verify import edits_in, left_out, prompts_in, traps, verified

    if llama_python is not None and gguf is None:
        raise UserError("--llama-python runs llama.cpp, which needs a base; give --gguf too.")
    edits = edits_in(out)
    asked = list(recorded(prompts)) if prompts is not None else prompts_in(edits)
    if not asked:
        raise UserError(f"{out} holds no prompts to ask; give some with --prompts.")
    server = None if url is None else Server(url, api_key)
    llama = None if gguf is None else LlamaCpp(llama_python or Path(sys.executable), gguf)
    name = base.model or edits[0].file.model.name
    model = replace(base, model=name).load()
    notes = {edit.name: list(traps(edit.folder)) for edit in edits if edit.is_adapter}
    for edit, sentences in notes.items():
        for sentence in sentences:
            say(f"{edit}: {sentence}")
    if server is None:
        for sentence in left_out(edits):
            say(sentence)
    findings = list(verified(model, edits, asked, max_new_tokens=max_new_tokens, server=server, llama=llama))
    if as_json:
        print(json.dumps({"notes": notes, "findings": [asdict(finding) for finding in findings]}, indent=2))  # noqa: T201
    else:
        _show(findings, len(asked))
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


def recorded(prompts: Path | None) -> list[str]:
    """The prompts of a file; of none those that an export records by default: facts that contexts contradict."""
    from interp.conflicts import evenly
    from interp.facts import build_conflicts, usable_facts

    if prompts is not None:
        with prompts.open(encoding="utf-8") as lines:
            return [prompt.text for batch in read_prompts(lines, _PROMPTS) for prompt in batch]
    conflicts = build_conflicts({"capital": usable_facts("capital")}, kinds=("conflict",))
    return [example.prompt for example in evenly(conflicts.select(split="test"), _PROMPTS, 0)]


def _show(findings: list[Any], count: int) -> None:
    output = Console()
    table = Table("asked of", "edit", "largest difference of logits", "same answers", box=None)
    for finding in findings:
        logits = "not given" if finding.logits is None else f"{finding.logits:.1e}"
        table.add_row(finding.engine, finding.edit, logits, f"{finding.equal} of {count}")
    output.print(table, markup=False)
    for finding in findings:
        for prompt, wanted, found in finding.differing:
            output.print(f"{finding.engine}, {finding.edit}: {prompt!r}", markup=False)
            output.print(f"    hooks: {wanted!r}\n    found: {found!r}", markup=False)
