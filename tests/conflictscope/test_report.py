import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

from conflictscope.cli import report as command
from conflictscope.report import read_runs, write_report
from conflictscope.report.runs import Change
from conflictscope.study.record import EXAMPLES, RECORD, UNEDITED, StudyRecord, read_examples, write_examples
from conflictscope.study.run import example_frame
from figures.theme import percent
from interp.answers import USAGES
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.files import read_json, write_json, write_parquet
from tests.conflictscope import report_samples as samples
from tests.conflictscope.report_samples import WRITERS

STUDIES = [kind for kind in WRITERS if kind != "probes"]


def estimate(value: float, n: int = 136) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.06), "n": n}


class Page(HTMLParser):
    """The tags of a page with their attributes, its visible text, and its scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self.feed(source)
        self.text = re.sub(r" ([.,;])", r"\1", " ".join(" ".join(self._text).split()))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self._text.append(data)
        elif self._open[-1] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


def page_of(path: Path, *folders: Path) -> Page:
    write_report(path, read_runs(folders))
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    root = tmp_path_factory.mktemp("pages")
    return {kind: page_of(root / f"{kind}.html", folder) for kind, folder in folders.items()}


@pytest.fixture
def changed(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a study whose record a test changes."""

    def change(kind: str, how: Callable[[dict[str, Any]], object]) -> Path:
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        record = read_json(folder / RECORD)
        how(record)
        write_json(folder / RECORD, record)
        return folder

    return change


def of(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in record["conditions"] if c["name"] == name)


def figures_of(script: str) -> dict[str, Any]:
    line = next(line for line in script.splitlines() if line.startswith("const figures = "))
    return json.loads(line.removeprefix("const figures = ").removesuffix(";"))


def written(estimate: dict[str, float]) -> str:
    low, high = percent(estimate["low"]).removesuffix("%"), percent(estimate["high"])
    return f"{percent(estimate['value'])} {low}\N{EN DASH}{high}"


def points(change: dict[str, float]) -> list[str]:
    return [f"{round(100 * change[end]) + 0:+d}".replace("-", "\N{MINUS SIGN}") for end in ("value", "low", "high")]


FIGURES = {
    "demo": {"usage", "templates", "map", "top", "cost", "tried"},
    "dial": {"usage", "templates", "cost", "line-0"},
    "gate": {"usage", "templates", "cost"},
    "compare": {"usage", "templates", "cost", "line-0"},
    "probes": {"conflict", "source"},
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_study_has_its_figures_with_text_alternatives_and_loads_nothing(
    kind: str, pages: dict[str, Page]
) -> None:
    assert set(figures_of(pages[kind].scripts[-1])) == FIGURES[kind]
    assert_every_plot_has_its_place(pages[kind])
    assert_loads_nothing(pages[kind])


@pytest.mark.parametrize("kind", STUDIES)
def test_the_headline_says_how_often_each_source_is_used(kind: str, pages: dict[str, Page]) -> None:
    context, memory = (percent(samples.measures(UNEDITED)[f"{d}_rate"]["value"]) for d in ("context", "memory"))
    assert f"tiny answers from context {context} of the time and from memory {memory}." in pages[kind].text


def test_probes_have_a_headline_of_their_own(pages: dict[str, Page]) -> None:
    said = "probes of tiny read conflict at blocks.16.mlp.hook_out with AUROC 0.70 and source at "
    assert said in pages["probes"].text


def test_the_lead_says_what_the_best_edits_do_on_which_subjects_at_which_cost(
    folders: dict[str, Path], pages: dict[str, Page]
) -> None:
    record = StudyRecord.load(folders["demo"])
    for d in ("context", "memory"):
        winner = record.winner(d)
        assert winner is not None
        before, after = (percent(test[f"{d}_rate"]["value"]) for test in (record.unedited.test, winner.test))
        assert (
            f"Towards {d} the best edit is pruning, 2 heads pruned: it answers from {d} {after} of the time instead of "
            f"{before}; facts asked without any context do not clearly suffer" in pages["demo"].text
        )
    n = record.data["counts"]["subjects_by_split"]["test"]
    assert f"from {n} subjects that nothing was tuned on" in pages["demo"].text


@pytest.mark.parametrize(("p", "said"), [(0.3, "do not clearly suffer ("), (0.01, "it gets 80% of the facts right")])
def test_a_loss_is_one_only_where_chance_does_not_explain_it(changed, tmp_path: Path, p: float, said: str) -> None:
    def lose(record: dict[str, Any]) -> None:
        test = of(record, "pruning, towards context")["test"]
        test["closed_book_accuracy"] = estimate(0.8)
        test["change"]["closed_book_accuracy"] = {**estimate(-0.1), "p": p}

    assert said in page_of(tmp_path / "report.html", changed("demo", lose)).text


def test_an_edit_that_does_nothing_is_not_praised(changed, tmp_path: Path) -> None:
    def weaken(record: dict[str, Any]) -> None:
        for d in ("context", "memory"):
            of(record, f"pruning, towards {d}")["test"]["change"][f"{d}_rate"]["p"] = 0.3

    text = page_of(tmp_path / "report.html", changed("demo", weaken)).text
    for d in ("context", "memory"):
        assert f"answers from {d} do not clearly change" in text
    assert "p = 0.30" in text


def test_an_edit_that_is_not_compared_is_not_praised_either(changed, tmp_path: Path) -> None:
    folder = changed("demo", lambda record: [c["test"].pop("change", None) for c in record["conditions"]])
    text = page_of(tmp_path / "report.html", folder).text
    assert "not compared prompt by prompt" in text
    assert "of the time instead of" not in text


def test_four_of_57_prompts_that_change_one_way_are_no_fall() -> None:
    """Of 57 subjects four stop answering from memory: a sign test says p = .125, though the intervals may be apart."""
    unedited = pl.DataFrame(
        {
            "id": [str(i) for i in range(57)],
            "subject": [f"subject {i}" for i in range(57)],
            "template": ["statement"] * 57,
            "kind": ["conflict"] * 57,
            "usage": ["memory"] * 57,
            "memory_span_match": [1.0] * 57,
        }
    )
    edited = unedited.with_columns(usage=pl.Series(["other"] * 4 + ["memory"] * 53))
    change = UsageReport(edited).changes(UsageReport(unedited))["memory_rate"].to_record()
    before, after = (UsageReport(frame).rate("memory").to_record() for frame in (unedited, edited))
    assert change["p"] == 0.125
    assert Change(before, after, change).verdict == "unclear"


@pytest.mark.parametrize(
    ("value", "p", "verdict"),
    [(0.1, 0.05, "rises"), (-0.1, 0.001, "falls"), (0.1, 0.0501, "unclear"), (-0.1, 0.0501, "unclear")],
)
def test_the_verdict_is_that_of_the_paired_change_alone(value: float, p: float, verdict: str) -> None:
    apart = {"before": estimate(0.1), "after": estimate(0.9)}
    assert Change(**apart, paired={"value": value, "p": p}).verdict == verdict
    assert Change(**apart).verdict == "unclear"


@pytest.mark.parametrize("kind", STUDIES)
def test_the_table_has_a_row_for_every_condition_below_its_direction(
    kind: str, folders: dict[str, Path], pages: dict[str, Page]
) -> None:
    record = StudyRecord.load(folders[kind])
    table = pages[kind].text.split("All conditions on the test subjects")[1]
    for direction in ("context", "memory"):
        own = table.split(f" towards {direction} unedited ", 1)[1]
        assert f" {written(record.unedited.test[f'{direction}_rate'])} " in own
        for c in record.conditions:
            if c.towards != direction:
                continue
            row = own.split(f" {c.name} ", 1)[1]
            change = points(c.test["change"][f"{direction}_rate"])
            rate = written(c.test[f"{direction}_rate"])
            assert f"{rate} {change[0]} {change[1]} to {change[2]} {written(c.test['memorisation_ratio'])}" in row
            for guard in ("closed_book_accuracy", "aligned_accuracy", "irrelevant_accuracy"):
                if c.test[guard] is not None:
                    lost = points(c.test["change"][guard])
                    assert f"{percent(c.test[guard]['value'])} {lost[0]} ( {lost[1]} to {lost[2]} )" in _loose(row)
            if c.cost:
                assert "0.97 0.95\N{EN DASH}0.99" in row


def _loose(text: str) -> str:
    return re.sub(r" +", " ", re.sub(r"([()])", r" \1 ", text))


def test_a_control_stands_below_what_it_controls(pages: dict[str, Page]) -> None:
    table = pages["demo"].text.split("All conditions on the test subjects")[1]
    names = ("pruning, towards context", "random heads, towards context", "value scaling, towards context")
    places = [table.index(name) for name in names]
    assert places == sorted(places)
    assert "random heads, towards context 2 heads: 0.0 x 0, 1.2 x 0 random, 2 draws 2" in table


def test_the_table_says_how_a_condition_was_chosen(pages: dict[str, Page]) -> None:
    assert "pruning, towards context 2 heads pruned best, within budget 2" in pages["demo"].text
    row = "context aware decoding, towards context next token by CAD, alpha 0.5 within budget –"  # noqa: RUF001
    assert row in pages["compare"].text


def test_what_does_not_apply_is_not_0_and_says_why(pages: dict[str, Page]) -> None:
    row = pages["compare"].text.split("context aware decoding, towards context")[1]
    assert row.split("towards memory unedited")[0].count("n/a") == 3, "closed-book accuracy, KL and speed"
    titles = {found["title"] or "" for _, found in pages["compare"].tags if "title" in found}
    assert any("does not apply" in title for title in titles)


def test_a_method_that_cannot_run_has_a_row_that_says_why(pages: dict[str, Page]) -> None:
    assert "could not run probe not run Both sources are needed." in pages["compare"].text


def test_what_is_undefined_is_said_to_be(changed, tmp_path: Path) -> None:
    undefined = {"value": None, "low": None, "high": None, "n": 0}

    def undefine(record: dict[str, Any]) -> None:
        record["conditions"][0]["test"]["memorisation_ratio"] = undefined
        record["details"]["gate"]["towards_context"]["kept"]["none"] = undefined

    text = page_of(tmp_path / "report.html", changed("gate", undefine)).text
    rate = written(samples.measures(UNEDITED)["context_rate"])
    assert f"unedited – – {rate} – undefined" in text  # noqa: RUF001
    assert "keeps 97% of its gain on conflicts." in text
    assert "no context 50% 40–60% 50% 40–60% undefined 5% 0–10%" in text  # noqa: RUF001


def test_a_dial_says_what_it_gives_where_it_is_asked_for_a_rate(pages: dict[str, Page]) -> None:
    assert "context rate 60% +0.50 60% 50–70% 60% 50–70%" in pages["dial"].text  # noqa: RUF001
    assert "memory rate 60% \N{MINUS SIGN}0.50 60%" in pages["dial"].text


def test_the_gate_says_when_it_opens_and_what_it_keeps(pages: dict[str, Page]) -> None:
    text = pages["gate"].text
    assert "Behind its gate the edit towards context keeps 97% of its gain on conflicts and 5% of its closed" in text
    assert "a probe of blocks.17.attn.hook_out, open above \N{MINUS SIGN}1.5 (AUROC on dev 0.95)" in text
    assert "conflicting 50% 40–60% 50% 40–60% 97% 90–100% 97% 90–100%" in text  # noqa: RUF001
    assert "agreeing 50% 40–60% 50% 40–60% – –" in text  # noqa: RUF001


def test_answers_that_say_nothing_are_told(changed, tmp_path: Path) -> None:
    def empty(record: dict[str, Any]) -> None:
        record["conditions"][0]["test"]["empty_rate"] = estimate(0.02)

    text = page_of(tmp_path / "report.html", changed("dial", empty)).text
    assert "those that say nothing (0%\N{EN DASH}2%) make up the rest" in text


def test_every_edited_head_is_listed_with_scale_and_score(pages: dict[str, Page]) -> None:
    scores = {(h.layer, h.head): h.score for h in samples.head_scores().ranked("context")}
    for heads in samples.HEADS_OF.values():
        for layer, head, _ in heads:
            score = f"{round(scores[layer, head], 2) + 0:+.2f}".replace("-", "\N{MINUS SIGN}")
            assert f"{layer}.{head} 0 {score} " in pages["demo"].text


def test_of_many_edited_heads_the_strongest_are_listed_and_the_others_counted(changed, tmp_path: Path) -> None:
    def many(record: dict[str, Any]) -> None:
        heads = [[layer, head, 0.98765] for layer in range(4) for head in range(4)]
        of(record, "pruning, towards context")["heads"] = heads

    text = page_of(tmp_path / "report.html", changed("demo", many)).text
    assert text.count(" 0.99 ") == 12
    assert "and 4 more with weaker scores" in text


def test_the_page_says_how_to_reproduce_and_apply(pages: dict[str, Page]) -> None:
    assert "conflictscope demo --model tiny --relation capital --relation currency --seed 7" in pages["demo"].text
    assert "load_model('tiny')" in pages["demo"].text
    assert "InterventionFile.load('interventions/pruning-towards_context.json')" in pages["demo"].text


def test_the_figures_hold_the_rates_of_the_record(folders: dict[str, Path], pages: dict[str, Page]) -> None:
    record = StudyRecord.load(folders["demo"])
    figures = figures_of(pages["demo"].scripts[-1])
    names = ("pruning, towards context", "random heads, towards context", "pruning, towards memory")
    rates = {c.name: c.test["memory_rate"]["value"] for c in record.conditions}
    memory = next(t for t in figures["usage"]["data"] if t.get("name") == "memory")
    assert memory["x"] == [rates[name] for name in (UNEDITED, *names, "random heads, towards memory")]
    gained = {x for t in figures["cost"]["data"] if t["mode"] == "markers" for x in t["x"] if x is not None}
    wanted = {
        c.test[f"{d}_rate"]["value"] for c in record.conditions for d in ("context", "memory") if c.towards in (d, None)
    }
    assert gained == wanted
    tried = [x for t in figures["tried"]["data"] if t.get("yaxis") in ("y", "y2") for x in t["x"] if x is not None]
    asked = [candidate for candidate in record.tried if candidate["damage"] is not None]
    assert sorted(tried) == sorted(candidate["rate"] for candidate in asked)
    assert f"Left out are {len(record.tried) - len(asked)} others" in pages["demo"].text


def test_candidates_are_drawn_where_more_were_weighed_than_chosen(changed, tmp_path: Path) -> None:
    def chosen_alone(record: dict[str, Any]) -> None:
        for number, candidate in enumerate(record["tried"]):
            candidate["damage"] = candidate["damage"] if number == 3 else None

    page = page_of(tmp_path / "report.html", changed("demo", chosen_alone))
    assert "tried" not in assert_every_plot_has_its_place(page)
    assert "What dev chose from" not in page.text


def test_a_line_is_a_curve_over_its_dose(pages: dict[str, Page]) -> None:
    curve = figures_of(pages["dial"].scripts[-1])["line-0"]
    assert [list(trace["x"]) for trace in curve["data"]] == [[t / 4 for t in range(-4, 5)]] * 2
    line = figures_of(pages["compare"].scripts[-1])["line-0"]
    assert line["data"][0]["x"] == [0.5, 1.0, 2.0]
    assert line["data"][0]["y"] == pytest.approx([0.25, 0.2, 0.1])
    assert line["layout"]["xaxis"]["title"]["text"] == "strength"


def assert_every_plot_has_its_place(page: Page) -> dict[str, dict[str, str | None]]:
    plots = {
        attributes["id"] or "": attributes
        for tag, attributes in page.tags
        if tag == "div" and attributes.get("role") == "img"
    }
    assert set(plots) == {f"plot-{name}" for name in figures_of(page.scripts[-1])}
    assert all(attributes["aria-label"] for attributes in plots.values())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert labelled <= set(ids)
    return plots


def assert_loads_nothing(page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    addresses = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "srcset")]
    assert all((address or "").startswith("#") for address in addresses)
    own = page.source.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|@import|url\(|fetch\(|\bimport\(|innerHTML", own)


def test_plotly_js_is_inlined_exactly_once(pages: dict[str, Page]) -> None:
    assert pages["demo"].source.count(get_plotlyjs()) == 1
    assert len(re.findall(r"plotly\.js v\d", pages["demo"].source)) == 1


def test_hostile_names_stay_text(changed, tmp_path: Path) -> None:
    hostile = "</script><script>alert('x')</script>"

    def rename(record: dict[str, Any]) -> None:
        record["model"]["name"] = record["data"]["digest"] = record["command"] = hostile
        record["data"]["relations"] = [hostile]
        record["data"]["phrasings"]["held_out"] = hostile
        record["not_run"] = {hostile: hostile}
        for c in record["conditions"]:
            c["does"], c["heads"] = hostile, []
            c["test"]["by_template"][hostile] = c["test"]["by_template"].pop("according_to")
        for c in record["tried"]:
            c["method"] = c["does"] = hostile

    page = page_of(tmp_path / "report.html", changed("demo", rename))
    assert hostile not in page.source
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert f"{hostile} answers from context" in page.text


def test_a_quick_run_is_called_one(changed, tmp_path: Path) -> None:
    folder = changed("demo", lambda record: record["settings"].update(quick=True))
    assert "Quick run." in page_of(tmp_path / "report.html", folder).text


def test_an_unfinished_study_says_what_is_to_come_and_is_loaded_again(changed, tmp_path: Path) -> None:
    folder = changed("demo", lambda record: record.update(to_come=["mean_ablation", "pruning"]))
    said = "Still to come: mean ablation, pruning, and random controls."
    refresh, path = '<meta http-equiv="refresh" content="30">', tmp_path / "report.html"
    assert f"{said} Run the command again to go on." in page_of(path, folder).text
    assert refresh not in path.read_text(encoding="utf-8")
    write_report(path, read_runs([folder]), growing=True)
    assert f"{said} Until then the page loads itself again." in path.read_text(encoding="utf-8")
    assert refresh in path.read_text(encoding="utf-8")


def test_a_finished_page_does_not_load_itself_again(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "to come" not in page_of(tmp_path / "report.html", folders["demo"]).text
    assert "refresh" not in (tmp_path / "report.html").read_text(encoding="utf-8").split("</head>")[0]


def test_scores_of_another_model_are_refused_and_leave_no_file(changed, tmp_path: Path) -> None:
    folder = changed("demo", lambda record: of(record, "pruning, towards memory").update(heads=[[40, 4, 0.0]]))
    with pytest.raises(UserError, match=r"40\.4 is not among these scores of 30 layers x 9 heads"):
        page_of(tmp_path / "report.html", folder)
    assert not (tmp_path / "report.html").exists()


def test_several_runs_are_compared_in_one_table(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = read_runs([*folders.values()])
    page = page_of(tmp_path / "report.html", *folders.values())
    compared = page.text.split("All conditions next to each other")[1].split("The answers themselves")[0]
    for run in runs:
        assert run.name in page.text
        assert all(f" {c.name} {run.name}" in compared for c in run.conditions)
    assert "compared" in figures_of(page.scripts[-1])
    assert_every_plot_has_its_place(page)


def test_runs_of_other_models_or_data_are_called_so(folders: dict[str, Path], changed, tmp_path: Path) -> None:
    alike = page_of(tmp_path / "alike.html", folders["demo"], folders["dial"])
    assert "Not one to one" not in alike.text

    def differ(record: dict[str, Any]) -> None:
        record["model"]["fingerprint"] = record["data"]["digest"] = "another"

    page = page_of(tmp_path / "report.html", folders["demo"], changed("dial", differ))
    assert "These runs are of different models and of different data" in page.text


def test_probes_alone_have_neither_edits_to_compare_nor_answers(folders: dict[str, Path], tmp_path: Path) -> None:
    page = page_of(tmp_path / "report.html", folders["probes"], folders["probes"])
    assert "2 runs compared" in page.text
    assert "The answers themselves" not in page.text
    assert_every_plot_has_its_place(page)


def test_runs_of_the_same_name_are_numbered(folders: dict[str, Path]) -> None:
    runs = read_runs([folders["demo"], folders["gate"], folders["demo"]])
    assert [run.name for run in runs] == ["demo (1)", "gate", "demo (3)"]


def test_the_answers_of_the_page_are_those_of_the_records(folders: dict[str, Path], pages: dict[str, Page]) -> None:
    (run,) = json.loads(pages["gate"].scripts[0])
    names = ["unedited", *(f"{name}, towards context" for name in ("everywhere", "gate", "random gate"))]
    assert [condition["name"] for condition in run["conditions"]] == names
    frame = read_examples(folders["gate"])
    assert frame is not None
    for condition in run["conditions"]:
        own = frame.filter(condition=condition["name"])
        assert condition["answer"] == own["answer"].to_list()
        assert condition["usage"] == "".join(usage[0] for usage in own["usage"])
        assert condition["logit"] == [value and pytest.approx(value, abs=0.006) for value in own["logit_difference"]]
    expected = frame.filter(condition=UNEDITED)["memory_answers"].to_list()
    assert run["prompts"]["memory"] == [" / ".join(answers) for answers in expected]


def with_answers(folder: Path, where: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Path:
    frame = read_examples(folder)
    assert frame is not None
    write_examples(where, change(frame))
    shutil.copy(folder / RECORD, where)
    return where


def test_every_usage_is_told_on_the_page(folders: dict[str, Path], tmp_path: Path) -> None:
    usages: list[str] = []

    def cycle(frame: pl.DataFrame) -> pl.DataFrame:
        usages.extend(USAGES[i % len(USAGES)] for i in range(frame.height))
        return frame.with_columns(pl.Series("usage", usages))

    page = page_of(tmp_path / "report.html", with_answers(folders["gate"], tmp_path, cycle))
    told = "".join(condition["usage"] for condition in json.loads(page.scripts[0])[0]["conditions"])
    (listed,) = re.findall(r"USAGES = \{(.*?)\}", page.source)
    names = dict(re.findall(r'(\w): "(\w+)"', listed))
    assert sorted(names.values()) == sorted(USAGES)
    assert sorted(names[letter] for letter in told) == sorted(usages)


def test_a_run_without_answers_says_how_to_get_them(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["dial"] / RECORD, tmp_path)
    page = page_of(tmp_path / "report.html", tmp_path)
    assert "left no examples.parquet" in page.text
    assert "Run its command again in the same folder" in page.text
    assert len(page.scripts) == 2


def test_answers_stay_text(folders: dict[str, Path], tmp_path: Path) -> None:
    hostile = "</script><script>alert('x')</script><!--"
    texts = {name: pl.lit(hostile) for name in ("answer", "prompt", "relation")}
    folder = with_answers(folders["gate"], tmp_path, lambda frame: frame.with_columns(**texts))
    page = page_of(tmp_path / "report.html", folder)
    assert hostile not in page.source
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert json.loads(page.scripts[0])[0]["prompts"]["prompt"][0] == hostile


def _lacking(record: dict[str, Any]) -> None:
    del of(record, "random gate, towards context")["test"]["neutral_kl"]


def _without_low(record: dict[str, Any]) -> None:
    del of(record, "random gate, towards context")["test"]["memory_rate"]["low"]


def _bare(record: dict[str, Any]) -> None:
    of(record, "random gate, towards context")["test"]["neutral_kl"] = 0.5


def _surplus(record: dict[str, Any]) -> None:
    of(record, "random gate, towards context")["test"]["by_template"]["question"]["context_rate"]["more"] = 1


def _undefined(record: dict[str, Any]) -> None:
    undefined = {"value": None, "low": None, "high": None, "n": 0}
    of(record, "random gate, towards context")["test"]["memory_rate"] = undefined


@pytest.mark.parametrize("damage", [_lacking, _without_low, _bare, _surplus, _undefined])
def test_a_damaged_measure_is_named(damage: Any, changed) -> None:
    said = r"has no (memory_rate|neutral_kl|context_rate) of random gate, towards context; run the study again"
    with pytest.raises(UserError, match=said):
        read_runs([changed("gate", damage)])


@pytest.mark.parametrize("column", [pl.lit("nothing").alias("usage"), pl.lit("text").alias("logit_difference")])
def test_answers_that_are_none_are_refused(column: pl.Expr, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_answers(folders["gate"], tmp_path, lambda frame: frame.with_columns(column))
    with pytest.raises(UserError, match="holds usages or logit differences that are none"):
        read_runs([folder])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda _: None, "holds no study"),
        (lambda folder: write_json(folder / "summary.json", {"gate": {}}), "is of an older conflictscope"),
        (lambda folder: write_json(folder / "results.json", [1]), "is of an older conflictscope"),
        (lambda folder: write_json(folder / RECORD, {"accuracy": 1}), "is no record of a study"),
        (lambda folder: (folder / RECORD).write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "scores.parquet").write_text("no table"), "cannot be read"),
        (lambda folder: write_parquet(folder / "scores.parquet", pl.DataFrame({"label": ["a"]})), "lacks chosen"),
        (lambda folder: (folder / EXAMPLES).write_text("no table"), "cannot be read"),
        (lambda folder: write_parquet(folder / EXAMPLES, pl.DataFrame({"id": ["a"]})), "lacks answer, condition"),
    ],
)
def test_what_is_no_run_is_refused_with_a_sentence(write, said: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    if (folder / EXAMPLES).exists():
        shutil.copy(folders["gate"] / RECORD, folder)
    with pytest.raises(UserError, match=said):
        read_runs([folder])


def test_examples_of_other_prompts_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    some = (pl.col("condition") == UNEDITED) | (pl.col("kind") == "conflict")
    folder = with_answers(folders["gate"], tmp_path, lambda frame: frame.filter(some))
    with pytest.raises(UserError, match="have other prompts of everywhere, towards context"):
        page_of(tmp_path / "report.html", folder)


def test_the_command_writes_a_page_for_one_run_and_for_several(
    folders: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command.report)
    shutil.copytree(folders["dial"], "dial")
    assert CliRunner().invoke(app, ["dial"]).exit_code == 0
    assert Path("dial/report.html").exists()
    assert CliRunner().invoke(app, ["dial", str(folders["gate"])]).exit_code == 0
    assert "2 runs compared" in Path("out/report.html").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["dial", "--out", "page.html"]).exit_code == 0
    assert Path("page.html").exists()


def test_the_frame_of_answers_has_each_condition_with_what_was_expected() -> None:
    reports = {UNEDITED: samples.answered(UNEDITED), "edited": samples.answered("context")}
    frame = example_frame(samples.asked(), reports)
    for name, report in reports.items():
        assert frame.filter(condition=name)[report.frame.columns].equals(report.frame)
    expected = {e.id: (list(e.memory_answers), list(e.context_answers)) for e in samples.asked()}
    rows = frame.select("id", "memory_answers", "context_answers").rows()
    assert all(expected[key] == (memory, context) for key, memory, context in rows)
