"""The leaderboard's statistics and files."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import friedmanchisquare
from typer.testing import CliRunner

from conflictscope.cli import app
from conflictscope.report import read_runs
from conflictscope.report.board import Board, Cell, Numbers, board_of, front_of
from conflictscope.report.board_files import SCHEMA, escape_latex, long_table, studies_below, write_board
from conflictscope.study.record import EXAMPLES, UNEDITED, StudyRecord, read_examples, write_examples
from interp.answers import DIRECTIONS
from interp.errors import UserError
from interp.evaluation import GUARDS
from interp.ranks import Ranks
from interp.statistics import RESAMPLES, Estimate, bootstrap_mean
from tests.conflictscope.board_samples import METHODS, asked, write_plan, write_study


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def board(plan: Path) -> Board:
    return board_of(read_runs(studies_below([plan])))


@pytest.fixture(scope="module")
def out(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of the plan, the folders of which lie within each other."""
    out = tmp_path_factory.mktemp("out")
    run = CliRunner().invoke(app, ["leaderboard", str(plan), str(plan / "studies/tiny"), "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert "pruning (front)" in run.stdout
    assert "random heads for pruning" in run.stdout
    return out


def cell_of(board: Board, method: str, model: str = "tiny", data: str = "capital", choice: str = "best") -> Cell:
    (found,) = (
        c for c in board.cells if (c.method, *c.block, c.towards, c.choice) == (method, model, data, "context", choice)
    )
    return found


def changes(folder: Path, method: str, measure: str, towards: str = "context") -> pl.DataFrame:
    """Columns ``subject`` and ``change``, from the file of answers alone."""
    examples = read_examples(folder)
    assert examples is not None
    kind = GUARDS.get(measure, "conflict")
    outcome = pl.col("usage") == towards if kind == "conflict" else pl.col("memory_span_match") > 0
    rows = examples.filter(kind=kind).with_columns(outcome=outcome.cast(pl.Float64))
    after = rows.filter(condition=f"{method}, towards {towards}").select("id", after="outcome")
    return (
        rows.filter(condition=UNEDITED)
        .join(after, on="id", maintain_order="left")
        .select("subject", change=pl.col("after") - pl.col("outcome"))
    )


def close(found: Estimate | None, wanted: Estimate) -> None:
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (wanted.value, wanted.low, wanted.high, wanted.n), abs=1e-9
    )


def test_with_one_seed_intervals_are_those_of_subjects_alone(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    numbers = cell_of(board_of(read_runs([folder])), "pruning").numbers
    own = changes(folder, "pruning", "context_rate")
    close(numbers.gain, bootstrap_mean(own["change"].to_numpy(), own["subject"].to_list()))
    for label, measure in (("closed-book", "closed_book_accuracy"), ("aligned", "aligned_accuracy")):
        own = changes(folder, "pruning", measure)
        close(numbers.losses[label], bootstrap_mean(-own["change"].to_numpy(), own["subject"].to_list()))


def test_gain_and_losses_are_the_changes_of_the_record(plan: Path) -> None:
    record = StudyRecord.load(plan / "studies/tiny/capital/0")
    cells = board_of(read_runs([plan / "studies/tiny/capital/0"])).cells
    (alone,) = (c for c in cells if (c.method, c.towards, c.choice) == ("caa", "memory", "best"))
    (condition,) = (c for c in record.chosen("memory") if c.method == "caa")
    change = condition.test["change"]
    assert alone.numbers.gain.value == pytest.approx(change["memory_rate"]["value"])
    for label, measure in zip(alone.numbers.losses, GUARDS, strict=True):
        loss = alone.numbers.losses[label]
        assert loss is not None
        assert loss.value == pytest.approx(-change[measure]["value"])
    assert alone.numbers.damage == max(-change[measure]["value"] for measure in GUARDS)


def test_several_seeds_are_pooled_as_a_naive_pigeonhole_bootstrap_does(plan: Path, board: Board) -> None:
    numbers = cell_of(board, "pruning").numbers
    parts = [changes(plan / f"studies/tiny/capital/{seed}", "pruning", "context_rate") for seed in (0, 1)]
    names = sorted({name for part in parts for name in part["subject"]})
    drawn = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    seeds = np.random.default_rng(1).multinomial(2, [0.5, 0.5], size=RESAMPLES)
    means = []
    for subjects, own in zip(drawn, seeds, strict=True):
        often = dict(zip(names, subjects, strict=True))
        weights = [often[name] * own[seed] for seed, part in enumerate(parts) for name in part["subject"]]
        means.append(np.average(np.concatenate([part["change"].to_numpy() for part in parts]), weights=weights))
    low, high = np.quantile(means, [0.025, 0.975])
    every = np.concatenate([part["change"].to_numpy() for part in parts])
    close(numbers.gain, Estimate(every.mean(), low, high, len(every)))
    assert set(parts[0]["subject"]) & set(parts[1]["subject"]), "else subjects and seeds are not crossed"


def test_over_data_sets_each_weighs_the_same_and_shares_its_draws(tmp_path: Path) -> None:
    """A board of one study twice, once under another name, is as sure as the study alone."""
    folders = [write_study(tmp_path / name, model=name) for name in ("one", "other")]
    record, other = (StudyRecord.load(folder) for folder in folders)
    examples = read_examples(folders[0])
    assert examples is not None
    write_examples(folders[1], examples)
    assert record.model["name"] != other.model["name"]
    both = board_of(read_runs(folders)).view("context", "best")
    alone = board_of(read_runs(folders[:1])).view("context", "best")
    assert both is not None
    assert alone is not None
    for one, two in zip(alone.rows, both.rows, strict=True):
        assert one.method == two.method
        assert (two.numbers.gain.low, two.numbers.gain.high) == pytest.approx(
            (one.numbers.gain.low, one.numbers.gain.high)
        )
        assert two.numbers.gain.n == 2 * one.numbers.gain.n


def test_the_mean_over_cells_is_that_of_their_gains(board: Board) -> None:
    view = board.view("context", "within_budget")
    assert view is not None
    for row in view.rows:
        own = [c for c in board.cells if (c.method, c.towards, c.choice) == (row.method, "context", "within_budget")]
        assert row.numbers.gain.value == pytest.approx(np.mean([c.numbers.gain.value for c in own]))
        assert row.cells == len(own)
        assert row.numbers.gain.low < row.numbers.gain.value < row.numbers.gain.high


def test_what_a_record_holds_as_an_estimate_alone_is_averaged(plan: Path, board: Board) -> None:
    (row,) = (c for c in board.view("context", "best", model="tiny", data="capital").controls)  # type: ignore[union-attr]
    records = [StudyRecord.load(plan / f"studies/tiny/capital/{seed}") for seed in (0, 1)]
    found = [
        c.test["change"]["context_rate"]
        for r in records
        for c in r.conditions
        if c.is_control and c.towards == "context"
    ]
    assert (row.method, row.control_of, row.rank) == ("random_heads", "pruning", None)
    for part in ("value", "low", "high"):
        assert getattr(row.numbers.gain, part) == pytest.approx(np.mean([one[part] for one in found]))
    speed = cell_of(board, "caa").numbers.speed
    assert speed is not None
    assert (speed.value, speed.low, speed.high) == pytest.approx((0.9, 0.8, 1.0))


def test_a_method_of_which_nothing_fits_gains_0_there_and_says_so(plan: Path, board: Board) -> None:
    cell = cell_of(board, "spare", choice="within_budget")
    assert [source.condition is None for source in cell.sources] == [False, True]
    assert cell.applied == 1
    fits = changes(plan / "studies/tiny/capital/0", "spare", "context_rate")["change"].to_list()
    idle = changes(plan / "studies/tiny/capital/1", "spare", "context_rate").height
    assert cell.numbers.gain.value == pytest.approx(sum(fits) / (len(fits) + idle))
    assert cell_of(board, "spare").applied == 2, "at its best it is applied with both seeds"


def test_what_does_not_apply_to_a_method_is_no_0_where_it_is_not_applied(tmp_path: Path) -> None:
    methods = {"adacad": (0.4, 0.1, 0.5), **METHODS}
    folders = [
        write_study(tmp_path / str(seed), seed=seed, methods=methods, unfit=unfit)
        for seed, unfit in ((0, ()), (1, ("adacad",)))
    ]
    numbers = cell_of(board_of(read_runs(folders)), "adacad", choice="within_budget").numbers
    assert (numbers.losses["closed-book"], numbers.kl) == (None, None)
    assert numbers.losses["aligned"] is not None
    assert numbers.damage == max(loss.value for loss in numbers.losses.values() if loss is not None)


def test_a_method_that_never_fits_has_no_part_in_the_front(tmp_path: Path) -> None:
    view = board_of(read_runs([write_study(tmp_path, unfit=tuple(METHODS))])).view("context")
    assert view is not None
    assert [(row.rank, row.applied, row.on_front) for row in view.rows] == [(1, 0, False)] * len(METHODS)
    assert {row.numbers.gain for row in view.rows} == {
        Estimate(0.0, 0.0, 0.0, len(asked("capital", 0).select(kind="conflict")))
    }


def test_a_method_that_could_not_run_somewhere_has_no_rank_there_and_gives_its_reason(board: Board) -> None:
    view = board.view("context")
    assert view is not None
    *ranked, last = view.rows
    assert (last.method, last.rank, last.cells, last.on_front) == ("caa", None, 3, False)
    gains = [row.numbers.gain.value for row in ranked]
    assert gains == sorted(gains, reverse=True)
    assert [row.rank for row in ranked] == [1, 2, 3]
    assert last.numbers.gain.value > gains[1], "by its gain it would be second"
    assert {(r.method, r.study.block, r.study.seed) for r in view.refused} == {
        ("caa", ("small", "currency"), seed) for seed in (0, 1)
    }
    only = board.view("context", model="tiny")
    assert only is not None
    assert {row.rank for row in only.rows} == {1, 2, 3, 4}


def test_one_seed_that_is_lacking_takes_the_rank_too(tmp_path: Path) -> None:
    less = {name: what for name, what in METHODS.items() if name != "caa"}
    folders = [write_study(tmp_path / "0"), write_study(tmp_path / "1", seed=1, methods=less, to_come=("caa",))]
    view = board_of(read_runs(folders)).view("context")
    assert view is not None
    (row,) = (row for row in view.rows if row.method == "caa")
    assert (row.rank, row.cells, row.studies) == (None, 1, 1)
    assert [(r.method, r.reason) for r in view.refused] == [("caa", "The study has not come to it yet.")]


def test_ablations_of_other_methods_are_marked(board: Board) -> None:
    view = board.view("memory")
    assert view is not None
    assert {row.method for row in view.rows if row.is_derived} == {"spare_constant"}


def test_ranks_are_tested_over_models_and_data_sets_with_seeds_averaged(board: Board) -> None:
    view = board.view("context")
    assert view is not None
    assert isinstance(view.ranks, Ranks)
    methods = ["pruning", "spare", "spare_constant"]
    assert set(view.ranks.means) == set(methods), "caa did not run everywhere"
    gains = [
        [cell_of(board, m, *block, choice="within_budget").numbers.gain.value for m in methods]
        for block in itertools.product(("tiny", "small"), ("capital", "currency"))
    ]
    assert view.ranks.p == pytest.approx(friedmanchisquare(*np.array(gains).T).pvalue)
    assert view.ranks.n_blocks == 4


def test_with_one_data_set_a_sentence_says_why_ranks_are_not_tested(board: Board) -> None:
    view = board.view("context", model="tiny", data="capital")
    assert view is not None
    assert isinstance(view.ranks, str)
    assert view.ranks.endswith("here are 1 and 4.")


def test_the_front_is_what_nothing_beats_by_brute_force() -> None:
    rng = np.random.default_rng(0)

    def exactly(value: float) -> Estimate:
        return Estimate(value, value, value, 1)

    for _ in range(20):
        found = [
            Numbers(exactly(gain), {"a": exactly(loss), "b": exactly(loss - 1), "c": None}, None, exactly(speed))
            for gain, loss, speed in rng.integers(0, 4, size=(12, 3))
        ]
        triples = [(n.gain.value, -n.losses["a"].value, n.speed.value) for n in found]  # type: ignore[union-attr]
        wanted = [
            number
            for number, triple in zip(found, triples, strict=True)
            if not any(np.all(np.array(t) >= triple) and t != triple for t in triples)
        ]
        assert front_of(found) == wanted


def test_what_was_not_timed_is_compared_by_gain_and_damage() -> None:
    def numbers(gain: float, speed: float | None) -> Numbers:
        timed = None if speed is None else Estimate(speed, speed, speed, 1)
        return Numbers(Estimate(gain, gain, gain, 1), {"a": Estimate(0.1, 0, 0.2, 1)}, None, timed)

    slow, unknown, fast = numbers(0.5, 0.2), numbers(0.4, None), numbers(0.3, 1.0)
    assert front_of([slow, unknown, fast]) == [slow, fast]


def test_missing_and_unfinished_studies_are_told(plan: Path, tmp_path: Path) -> None:
    some = [path for path in studies_below([plan]) if path != plan / "studies/small/currency/1"]
    unfinished = write_study(tmp_path / "more", model="new", to_come=("caa",), methods={"pruning": METHODS["pruning"]})
    board = board_of(read_runs([*some, unfinished]))
    assert ("small", "currency", 1) in board.missing
    assert len(board.missing) == 4, "the new model has one of four"
    assert [study.block.model for study in board.unfinished] == ["new"]


@pytest.mark.parametrize("settings", [{"quick": True}, {"budgets": {"none": 0.1}}])
def test_studies_that_were_made_differently_are_refused(tmp_path: Path, settings: dict) -> None:
    folders = [write_study(tmp_path / "a"), write_study(tmp_path / "b", model="other", **settings)]
    with pytest.raises(UserError, match=r"^b and a were made with different budgets.*made alike\.$"):
        board_of(read_runs(folders))


def test_two_studies_of_the_same_are_refused(tmp_path: Path) -> None:
    folders = [write_study(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UserError, match="a and b are both of tiny on capital, seed 0; give one"):
        board_of(read_runs(folders))


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [write_study(tmp_path / "a"), write_study(tmp_path / "b", seed=1)]
    text = (folders[1] / "study.json").read_text().replace("print of tiny", "another")
    (folders[1] / "study.json").write_text(text)
    with pytest.raises(UserError, match="Two different models are called tiny"):
        board_of(read_runs(folders))


def test_a_study_without_answers_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "a")
    (folder / EXAMPLES).unlink()
    with pytest.raises(UserError, match="a left no answers to compare"):
        board_of(read_runs([folder]))


def test_a_condition_without_answers_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "a")
    examples = read_examples(folder)
    assert examples is not None
    write_examples(folder, examples.filter(pl.col("condition") != "caa, towards context"))
    with pytest.raises(UserError, match="The examples of a lack caa, towards context"):
        board_of(read_runs([folder]))


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "a")
    examples = read_examples(folder)
    assert examples is not None
    write_examples(folder, examples.filter((pl.col("condition") == UNEDITED) | (pl.int_range(pl.len()) % 7 > 0)))
    with pytest.raises(UserError, match="other prompts"):
        board_of(read_runs([folder]))


def test_the_long_table_has_a_row_for_every_cell_and_is_the_same_in_csv_and_parquet(board: Board, out: Path) -> None:
    frame = pl.read_parquet(out / "leaderboard.parquet")
    assert pl.read_csv(out / "leaderboard.csv", schema=SCHEMA).equals(frame)
    assert frame.equals(long_table(board))
    methods = frame.filter(kind="method")
    assert methods.height == len(board.cells) == 2 * 2 * 15
    assert frame.filter(kind="not run")["reason"].unique().to_list() == ["It needs <both> sources & more."]
    cell = cell_of(board, "caa", "small")
    row = methods.row(
        by_predicate=(pl.col("model") == "small")
        & (pl.col("data") == "capital")
        & (pl.col("method") == "caa")
        & (pl.col("towards") == "context")
        & (pl.col("choice") == "best"),
        named=True,
    )
    assert (row["gain"], row["gain_low"], row["gain_high"], row["gain_n"]) == (
        cell.numbers.gain.value,
        cell.numbers.gain.low,
        cell.numbers.gain.high,
        cell.numbers.gain.n,
    )
    assert row["largest_loss"] == max(row[f"{name}_loss"] for name in ("closed_book", "aligned", "irrelevant"))
    assert (row["seeds"], row["studies"], row["applied"], row["derived"]) == ("0 1", 2, 2, False)


def test_markdown_and_latex_hold_the_ranking(board: Board, out: Path) -> None:
    markdown = (out / "leaderboard.md").read_text(encoding="utf-8")
    latex = (out / "leaderboard.tex").read_text(encoding="utf-8")
    for towards in DIRECTIONS:
        view = board.view(towards)
        assert view is not None
        (table,) = (part for part in markdown.split("## ") if part.startswith(f"Towards {towards}"))
        names = [line.split(" | ")[1] for line in table.splitlines()[4:] if line.startswith("|")]
        assert [re.sub(r" \(.*", "", name) for name in names if "random" not in name] == [row.name for row in view.rows]
        gain = view.rows[0].numbers.gain
        assert f"| 1 | pruning (front) | {gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}] |" in table
        assert f"1 & pruning (front) & {gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}] & " in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", latex)
    assert columns is not None
    assert {line.count(" & ") for line in latex.splitlines() if line.endswith(r" \\")} == {len(columns[1]) - 1}


def test_latex_shows_every_character_as_it_is() -> None:
    assert escape_latex(r"a_b & 5% of $x$ #1 {y} \z ~ ^ <|>") == (
        r"a\_b \& 5\% of \$x\$ \#1 \{y\} \textbackslash{}z \textasciitilde{} \textasciicircum{} "
        r"\textless{}\textbar{}\textgreater{}"
    )


def test_the_command_writes_all_files_and_counts_a_study_once(out: Path) -> None:
    written = {f"leaderboard.{end}" for end in ("html", "csv", "parquet", "md", "tex")}
    assert {path.name for path in out.iterdir()} == written | {f"answers-{n}.js" for n in range(8)}


def test_a_folder_without_studies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no study.json below .*; give a folder"):
        studies_below([tmp_path])


def test_answers_of_an_earlier_larger_board_are_removed(plan: Path, tmp_path: Path) -> None:
    for folder, names in (("tiny/capital", ["answers-0.js", "answers-1.js"]), ("tiny/capital/0", ["answers-0.js"])):
        write_board(tmp_path, [plan / "studies" / folder])
        assert sorted(path.name for path in tmp_path.glob("answers-*")) == names
