"""Write tables of results into pages, from the records that studies left: no number is copied by hand.

    python -m docs.results out/compare out/demo

A page says where a table belongs, what the study's folder is called, and, if it does not want all, for which source, by
which of dev's choices, and how many of the methods, those with the highest rates on test. What stands between the two
marks is written anew:

    <!-- results of compare, towards context, within budget, first 10 -->
    <!-- end of results -->

Of a comparison of many studies its leaderboard is written, and where the hours went; of a comparison of detectors its
tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import polars as pl
import typer
from rich.console import Console

from conflictscope.report.words import edit, words
from conflictscope.study.leaderboard import LOSSES, lost, speed, written
from conflictscope.study.record import EXAMPLES, Choice, Measured, StudyRecord
from interp.answers import DIRECTIONS, Direction
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.files import read_json, write_text

ROOT = Path(__file__).parents[1]
_MARK = re.compile(
    r"(<!-- results of ([^,\n]+?)((?:, [^,\n]+)*) -->\n)(?:(?!<!-- results of).)*?(<!-- end of results -->)", re.DOTALL
)
_CHOICES: dict[Choice, str] = {"best": "at its best", "within_budget": "within the budget"}
_WANTED: dict[str, tuple[Direction | None, Choice | None]] = {
    **{f"towards {direction}": (direction, None) for direction in DIRECTIONS},
    "best": (None, "best"),
    "within budget": (None, "within_budget"),
}
HOURS, LEADERBOARD, DETECTORS, _LONGEST = "hours.json", "leaderboard.md", "detectors.md", 12
_FIRST, _BY_PHRASING = re.compile("first ([1-9][0-9]*)"), "by phrasing"
_PAIRED = re.compile("(.+) against others")


class Wanted(NamedTuple):
    """What a mark asks for of a study.

    Attributes:
        directions: Towards which sources.
        choices: By which of dev's choices.
        first: How many methods, those with the highest rates on test, and the one that dev prefers; ``None`` is all.
        by_phrasing: Whether a table of each phrasing's rates follows each.
        paired: The method that is compared with each other one, prompt by prompt.
    """

    directions: Sequence[Direction]
    choices: Sequence[Choice]
    first: int | None = None
    by_phrasing: bool = False
    paired: str | None = None


def tables(record: StudyRecord, wanted: Wanted, folder: Path | None = None) -> str:
    """Say a study as tables in Markdown: one for each source and choice, a row a method, what dev prefers in bold.

    A study of ways to find heads begins with how far they agree. Where a mark asks for the first methods only, no
    sentence says which could not be measured.

    Beside the rate of the wanted source, a share of conflict prompts, stands by how much it rose, and by how much with
    random controls; then what the edit costs, of the unedited model's accuracy, which stands in the first row. ``n`` is
    the number of conflict prompts.

    Args:
        record: The study.
        wanted: What is wanted of it.
        folder: Where it lies, for comparisons prompt by prompt; by default where we are.

    Raises:
        UserError: If a method that is to be compared with the others is not there.
    """
    shown = []
    for towards, choice in product(wanted.directions, wanted.choices):
        if not record.chosen(towards, choice):
            continue
        rows = _shown(record, towards, choice, wanted.first)
        shown.append(_table(record, towards, choice, rows))
        if wanted.by_phrasing:
            shown.append(_phrasings(record, towards, choice, rows))
        if wanted.paired:
            shown.append(_paired(folder or Path(), towards, choice, rows, wanted.paired))
    if not wanted.first and (agreement := record.details.get("agreement")):
        shown.insert(0, _agreement(agreement))
    refused = [f"{words(method)} was not measured: {reason}" for method, reason in record.not_run.items()]
    version = record.settings["versions"]["conflictscope"]
    made = f"Made by `{record.command}`, conflictscope {version}."
    return "\n\n".join([*shown, *(refused if not wanted.first else ()), made])


def _shown(record: StudyRecord, towards: Direction, choice: Choice, first: int | None) -> list[Measured]:
    """The conditions of a table, the one with the highest rate on test first."""
    chosen = sorted(record.chosen(towards, choice), key=lambda c: -c.test[f"{towards}_rate"]["value"])
    winner = record.winner(towards)
    return [c for number, c in enumerate(chosen) if first is None or number < first or c is winner]


def _table(record: StudyRecord, towards: Direction, choice: Choice, shown: Sequence[Measured]) -> str:
    title = f"{record.model['name']} towards {towards}, {_CHOICES[choice]}"
    losses = [f"{label} loss" for label in _losses(record)]
    head = [title, f"{towards} rate", "gain", "gain at random", *losses, "KL on text", "speed", "n"]
    if len(shown) < (n_chosen := len(record.chosen(towards, choice))):
        head[0] += f", {len(shown)} of {n_chosen} methods"
    rows = [[*_row(record, c, towards)] for c in (record.unedited, *shown)]
    return _markdown([head, ["---"] * len(head), *rows])


def _phrasings(record: StudyRecord, towards: Direction, choice: Choice, shown: Sequence[Measured]) -> str:
    """The rate in each of test's phrasings."""
    found = [(c, c.test["by_template"]) for c in (record.unedited, *shown)]
    phrasings = list(found[0][1])
    head = [f"{towards} rate by phrasing, {_CHOICES[choice]}", *phrasings]
    rows = [
        [_name(record, c, towards), *(written(rates[one][f"{towards}_rate"]) for one in phrasings)]
        for c, rates in found
    ]
    return _markdown([head, ["---"] * len(head), *rows])


def _paired(folder: Path, towards: Direction, choice: Choice, shown: Sequence[Measured], method: str) -> str:
    """How a method's rate and accuracies differ from each other method's on the same prompts, paired by subject."""
    found = {words(condition.method): condition for condition in shown}
    if method not in found:
        raise UserError(f"A mark asks for {method} against others, which the study does not have {_CHOICES[choice]}.")
    examples = pl.read_parquet(folder / EXAMPLES)
    reports = {name: UsageReport(examples.filter(condition=one.name)) for name, one in found.items()}
    measures = {f"{towards} rate": f"{towards}_rate", **{f"{label} accuracy": m for label, m in LOSSES.items()}}
    head = [f"{method} less another, towards {towards}, {_CHOICES[choice]}", *measures]
    rows = []
    for name, report in reports.items():
        if name != method:
            changes = {m: change.to_record() for m, change in reports[method].changes(report).items()}
            rows.append([f"less {name}", *(written(changes.get(m)) for m in measures.values())])
    return _markdown([head, ["---"] * len(head), *rows])


def _agreement(correlations: Mapping[str, Mapping[str, float]]) -> str:
    ways = list(correlations)
    rows = [
        [one, *(f"{found[other]:z.2f}" if other in found else "" for other in ways)]
        for one, found in correlations.items()
    ]
    return _markdown([["rank correlation", *ways], ["---"] * (len(ways) + 1), *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = (" | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def _row(record: StudyRecord, condition: Measured, towards: Direction) -> Iterator[str]:
    test, rate = condition.test, f"{towards}_rate"
    yield _name(record, condition, towards)
    yield written(test[rate])
    if (change := test.get("change")) is None:
        yield from ("", "", *(f"of {written(test[m])}" if m in test else "" for m in _losses(record).values()))
    else:
        yield written(change[rate])
        controls = (written(control.test["change"][rate]) for control in record.controls_of(condition))
        yield ", ".join(controls) or "not drawn"
        yield from (written(lost(change.get(measure))) for measure in _losses(record).values())
    yield written(test["neutral_kl"], 3)
    yield "1" if change is None else speed(condition.cost)
    yield str(test[rate]["n"])


def _losses(record: StudyRecord) -> Mapping[str, str]:
    """What an edit may cost, by what it is called; other abilities in studies that asked for them."""
    asked = "abilities_accuracy" in record.unedited.test
    return {**LOSSES, "abilities": "abilities_accuracy"} if asked else LOSSES


def _name(record: StudyRecord, condition: Measured, towards: Direction) -> str:
    name = ": ".join(filter(None, (words(condition.method), edit(condition))))
    return f"**{name}**" if condition is record.winner(towards) else name


def ranking(folder: Path) -> str:
    """Say a comparison of many studies: its leaderboard, and the hours that its steps and methods took."""
    hours = read_json(folder / HOURS)
    total = sum(one["hours"] for one in hours)
    places = [(" ".join(filter(None, (one["step"], words(one["what"])))), one) for one in hours]
    longest = "; ".join(f"{name} {one['hours']:.2f} ({one['units']})" for name, one in places[:_LONGEST])
    spent = f"{total:.1f} hours of work on one worker or another. The longest, with how many units: {longest}."
    return f"{(folder / LEADERBOARD).read_text(encoding='utf-8').strip()}\n\n{spent}"


def detected(folder: Path) -> str:
    """Say a comparison of detectors: its tables, under smaller headings."""
    _, _, text = (folder / DETECTORS).read_text(encoding="utf-8").strip().partition("\n")
    return re.sub("^#", "##", text.strip(), flags=re.MULTILINE)


def filled(
    page: str, records: Mapping[str, StudyRecord | str], folders: Mapping[str, Path] = MappingProxyType({})
) -> tuple[str, set[str]]:
    """Write the tables of the given studies anew in a page; which of them it has is the second that is returned.

    Args:
        page: The page.
        records: By name a study, or the text that stands for it.
        folders: By name where a study lies, for comparisons prompt by prompt.

    Raises:
        UserError: If a mark asks for something that there is not.
    """
    found: set[str] = set()

    def fill(mark: re.Match[str]) -> str:
        start, name, wanted, end = mark.groups()
        if name not in records:
            return mark[0]
        found.add(name)
        record = records[name]
        text = record if isinstance(record, str) else tables(record, _wanted(wanted), folders.get(name))
        # Empty lines, or what follows a mark would be read as part of it.
        return f"{start}\n{text}\n\n{end}"

    return _MARK.sub(fill, page), found


def _wanted(said: str) -> Wanted:
    directions: list[Direction] = []
    choices: list[Choice] = []
    options: dict[str, Any] = {}
    for one in said.split(", ")[1:]:
        if one in _WANTED:
            direction, choice = _WANTED[one]
            if direction:
                directions.append(direction)
            if choice:
                choices.append(choice)
        elif one == _BY_PHRASING:
            options["by_phrasing"] = True
        elif first := _FIRST.fullmatch(one):
            options["first"] = int(first[1])
        elif paired := _PAIRED.fullmatch(one):
            options["paired"] = paired[1]
        else:
            known = ", ".join([*_WANTED, "first 10", _BY_PHRASING, "pruning against others"])
            raise UserError(f"A mark asks for results {one!r}; give some of: {known}.")
    return Wanted(directions or DIRECTIONS, choices or [*_CHOICES], **options)


def main(
    studies: Annotated[list[Path], typer.Argument(help="Folders that hold a study.json.")],
    page: Annotated[
        list[Path] | None, typer.Option(help="A page to write into; by default README.md and all of docs/.")
    ] = None,
) -> None:
    """Write tables of results into the pages that have marks for them."""
    try:
        for path, names in write_results(studies, page or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]):
            Console().print(f"{path}: {', '.join(sorted(names))}", markup=False)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error


def write_results(studies: Sequence[Path], pages: Sequence[Path]) -> Iterator[tuple[Path, set[str]]]:
    """Write the tables of studies into pages; gives each page that has some, with the names of the studies.

    Raises:
        UserError: If a folder holds neither a finished study nor a comparison, has the name of another, or no page has
            a mark for it.
    """
    of_file = {HOURS: ranking, DETECTORS: detected}

    def said(folder: Path) -> StudyRecord | str:
        say = next((say for name, say in of_file.items() if (folder / name).is_file()), None)
        return StudyRecord.load(folder) if say is None else say(folder)

    folders = {folder.resolve().name: folder for folder in studies}
    records = {name: said(folder) for name, folder in folders.items()}
    if len(records) < len(studies):
        raise UserError("Two of the folders have the same name, which is what a page knows them by; rename one.")
    if unfinished := [name for name, record in records.items() if isinstance(record, StudyRecord) and record.to_come]:
        raise UserError(f"{unfinished[0]} is not finished; run its command again, which goes on where it stopped.")
    shown: set[str] = set()
    for path in pages:
        after, found = filled(path.read_text(encoding="utf-8"), records, folders)
        if found:
            write_text(path, after)
            yield path, found
        shown |= found
    if missing := records.keys() - shown:
        raise UserError(f"No page has a mark for {', '.join(sorted(missing))}; docs/results.py says how one looks.")


if __name__ == "__main__":
    typer.run(main)
