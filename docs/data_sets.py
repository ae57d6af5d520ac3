"""Measure how a model uses memory and context on facts and on public sets, and write it into a page.

    python -m docs.data_sets ../data out/data_sets

The first folder holds the public files; those that are missing are left out, and the page says so. Every prompt is
asked as it is and through the model's chat template. What was asked is kept, so that a run that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from torch import nn

from docs.results import ROOT
from interp.asking import Asking, at_answers
from interp.attribution.examples import with_partners
from interp.attribution.path_patching import PATH_PATCHING_VERSION, path_patching
from interp.attribution.scores import HeadScores
from interp.attribution.ways import agreement
from interp.conflicts import CONTEXT_KINDS, ConflictSet, about_some, evenly
from interp.evaluation import ANSWERS_VERSION, UsageReport, measure_usage
from interp.facts import STUDY_PHRASINGS, usable_facts
from interp.files import write_text
from interp.fingerprints import fingerprint
from interp.formats import load_dataset
from interp.known import conflicts_about_known
from interp.models import load_model
from interp.records import Records

PAGE = ROOT / "docs" / "results" / "data_sets.md"
RELATIONS = ("capital", "language", "continent", "manufacturer")
SETS = (
    ("MemoTrap, proverbs", "memotrap", "memotrap/1-proverb-ending.csv", 100),
    ("MemoTrap, history of science", "memotrap", "memotrap/4-history-of-science-qa.csv", 100),
    ("NQ-Synth", "cad", "nq-synth/nq_synth_2_-1.jsonl", 60),
    ("NQ-Swap", "nq-swap", "nq-swap/dev.parquet", 212),
    ("RAMDocs", "ramdocs", "ramdocs/RAMDocs_test.jsonl", 60),
)
"""Title, format, file, and of how many subjects all rows are drawn: of NQ-Swap some 600 of each kind."""
FORMS = ("completion", "chat")
_TOKENS = {"completion": 8, "chat": 32}
# Passages of public sets are long.
_BATCH_SIZE = 8
_SUBJECTS_AT_ONCE = 20
_SCORED, _HEADS = 96, 4


def sets(folder: Path, known: ConflictSet, seed: int) -> Iterator[tuple[str, ConflictSet | None]]:
    """The title and the prompts of each set; ``None`` where its file is missing."""
    yield "facts, four relations", about_some(known.select(split="test", templates=STUDY_PHRASINGS), 60, seed)
    for title, format, name, count in SETS:
        path = folder / name
        yield title, about_some(load_dataset(path, format, seed=seed).conflicts, count, seed) if path.exists() else None


def measured(model: nn.Module, asked: ConflictSet, form: str, title: str, records: Records) -> UsageReport:
    """How prompts are answered; what is known of some subjects is kept before the next ones are asked."""
    parts = []
    for start in range(0, len(asked.subjects), _SUBJECTS_AT_ONCE):
        some = set(asked.subjects[start : start + _SUBJECTS_AT_ONCE])
        part = ConflictSet(asked.name, tuple(example for example in asked if example.subject in some))

        def ask(part: ConflictSet = part, start: int = start) -> UsageReport:
            label, tokens = f"{title}, {form}, from subject {start}", _TOKENS[form]
            return measure_usage(model, part, max_new_tokens=tokens, batch_size=_BATCH_SIZE, progress=label)

        parts.append(records.usage(f"usage-{form}", part.digest, ask, version=ANSWERS_VERSION).frame)
    return UsageReport(pl.concat(parts))


def rows(title: str, form: str, report: UsageReport, *, has_memory: bool) -> Iterator[list[str]]:
    """A row of the table for each kind of context, and each template of public sets that has several.

    Args:
        title: The set.
        form: How it was asked.
        report: The answers.
        has_memory: Whether the set says what memory answers.
    """
    for kind in CONTEXT_KINDS:
        part = report.select(kind=kind)
        templates = part.frame["template"].unique(maintain_order=True).to_list()
        split = len(templates) > 1 and not title.startswith("facts")
        for template in templates if split else [None]:
            some = part if template is None else part.select(template=template)
            if some.frame.is_empty():
                continue
            name = kind if template is None else f"{kind}: {template.partition('-')[2] or template}"
            of_memory = [some.rate("memory"), some.rate("both"), some.accuracy()] if has_memory else ["not given"] * 3
            memory, both, right = map(str, of_memory)
            others = [str(some.rate(usage)) for usage in ("other", "empty")]
            yield [title, form, name, memory, str(some.rate("context")), both, *others, right, str(len(some.frame))]


def same_heads(model: nn.Module, name: str, known: ConflictSet, records: Records, seed: int) -> list[list[str]]:
    """A table of how far the heads that path patching finds in one form are those of the other.

    Scored on prompts of train; in a chat where the answer itself begins.
    """
    scores: dict[str, HeadScores] = {}
    chosen = evenly(known.select(kind="conflict", split="train", templates=STUDY_PHRASINGS), _SCORED, seed)
    prompts = ConflictSet(known.name, tuple(chosen))
    for form in FORMS:
        asked = Asking(form).asked(model, name, prompts)

        def score(asked: ConflictSet = asked, form: str = form) -> dict[str, HeadScores]:
            at = at_answers(model, asked, max_new_tokens=_TOKENS["chat"]).conflicts if form == "chat" else asked
            some = ConflictSet(asked.name, tuple(with_partners(at.examples)))
            found = path_patching(model, some, name=name, seed=seed, progress=f"Path patching, {form}")
            return {"logit_diff": found["logit_diff"]}

        scores[form] = records.head_scores(f"heads-{form}", [asked.digest, seed], score, version=PATH_PATCHING_VERSION)[
            "logit_diff"
        ]
    alike = agreement(scores)
    head = ["asked as", "prompts", *(f"agreement with {form}" for form in FORMS), "memory heads", "context heads"]
    table = [head, ["---"] * len(head)]
    for form, found in scores.items():
        strongest = [
            ", ".join(f"{one.layer}.{one.head} ({one.score:+.2f})" for one in found.ranked(source)[:_HEADS])
            for source in ("memory", "context")
        ]
        correlations = [f"{alike[form][other]:.2f}" for other in FORMS]
        table.append([form, str(len(found.example_ids)), *correlations, *strongest])
    return table


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the public files.")],
    out: Annotated[Path, typer.Argument(help="Folder for what was asked.")] = Path("out/data_sets"),
    model: Annotated[str, typer.Option(help="The model.")] = "smollm2-135m",
    seed: Annotated[int, typer.Option(help="Decides which questions are drawn.")] = 0,
) -> None:
    """Measure, and write the table into the page."""
    # Attention's weights are not looked at, and passages are long.
    loaded = load_model(model, attention="sdpa")
    records = Records(out / "records", model=fingerprint(loaded))
    facts = {relation: usable_facts(relation) for relation in RELATIONS}
    known = conflicts_about_known(loaded, facts, records, seed=seed)
    _write(same_heads(loaded, model, known, records, seed), "heads")
    rates = ["memory rate", "context rate", "both", "other", "empty", "says memory's answer"]
    head = ["set", "asked as", "context", *rates, "n"]
    table = [head, ["---"] * len(head)]
    missing = []
    for title, conflicts in sets(folder, known, seed):
        if conflicts is None:
            missing.append(title)
            continue
        for form in FORMS:
            asked = Asking(form).asked(loaded, model, conflicts)
            report = measured(loaded, asked, form, title, records)
            has_memory = any(example.memory_answers for example in conflicts)
            table += rows(title, form, report, has_memory=has_memory)
    # Once, so that a run that is killed takes nothing off the page.
    _write(table, "data sets", missing)


def _write(table: list[list[str]], what: str, missing: Sequence[str] = ()) -> None:
    """Put a table into the page, between its marks."""
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    if missing:
        text += f"\n\nNot measured, as their files were not there: {', '.join(missing)}."
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- results of {what} -->", f"<!-- end of {what} -->"
    before, _, rest = page.partition(f"{begin}\n")
    after = rest.partition(end)[2]
    write_text(PAGE, f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    typer.run(main)
