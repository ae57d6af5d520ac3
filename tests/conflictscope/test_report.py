import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import typer
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

from conflictscope.cli import app
from conflictscope.cli import report as command
from conflictscope.control import STEERING_METHODS
from conflictscope.examples import EXAMPLES, UNEDITED, example_frame, read_examples, write_examples
from conflictscope.report import demo_run, read_runs, write_report
from conflictscope.report.runs import Change
from figures.theme import percent
from interp.answers import USAGES
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.evaluation import UsageReport
from interp.files import read_json, write_json, write_parquet
from tests.conflictscope import report_samples as samples
from tests.conflictscope.report_samples import WRITERS

PHRASINGS = ("statement", "question", "document", "according_to")
MEMORY_HEADS, CONTEXT_HEADS = [(2, 0), (3, 1)], [(2, 1), (3, 3)]


def estimate(value: float, n: int = 136) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.06), "n": n}


def changed(before: float, after: float, p: float = 0.001) -> dict[str, float]:
    return {**estimate(after - before), "p": p}


def measured(memory: float, context: float, closed_book: float, kl: float, *, p: float = 0.001) -> dict[str, Any]:
    rates = {"memory_rate": memory, "context_rate": context, "both_rate": 0.01, "other_rate": 0.99 - memory - context}
    return {
        **{name: estimate(value) for name, value in rates.items()},
        "memorisation_ratio": estimate(memory / (memory + context)),
        "closed_book_accuracy": estimate(closed_book),
        "aligned_accuracy": estimate(0.98),
        "irrelevant_accuracy": estimate(0.87),
        "neutral_kl": {"value": kl, "low": 0.8 * kl, "high": 1.2 * kl, "n": 60},
        "by_template": {
            name: {rate: estimate(rates[rate], 34) for rate in ("memory_rate", "context_rate", "other_rate")}
            for name in PHRASINGS
        },
        "change": {"memory_rate": changed(0.27, memory, p), "context_rate": changed(0.40, context, p)},
    }


def edit(heads: list[tuple[int, int]], scale: float, test: dict[str, Any]) -> dict[str, Any]:
    return {
        "heads": [[layer, head, scale] for layer, head in heads],
        "around": "zero",
        "chosen_on": "dev",
        "test": test,
    }


def drawn(first: list[list[int]], second: list[list[int]], test: dict[str, Any]) -> dict[str, Any]:
    draws = [{"heads": [[*head, 0.0] for head in heads], "around": "zero"} for heads in (first, second)]
    return {"draws": draws, "chosen_on": "random", "test": test}


def sample_summary() -> dict[str, Any]:
    """What a study of a small model that trusts both sources might have found."""
    methods = {
        "pruning": {
            "towards_context": edit(MEMORY_HEADS, 0.0, measured(0.03, 0.93, 0.93, 0.031)),
            "towards_memory": edit(CONTEXT_HEADS, 0.0, measured(0.55, 0.02, 0.94, 0.022)),
        },
        "value_scaling": {
            "towards_context": edit(MEMORY_HEADS, -0.5, measured(0.05, 0.85, 0.90, 0.048)),
            "towards_memory": edit(CONTEXT_HEADS, -0.5, measured(0.52, 0.05, 0.92, 0.040)),
        },
    }
    return {
        "model": {
            "name": "SmolLM2-135M",
            "architecture": "LlamaForCausalLM",
            "n_layers": 4,
            "n_heads": 4,
            "d_model": 64,
        },
        "data": {
            "relations": ["capital", "currency"],
            "counts": {"examples": 1936, "subjects": 121, "subjects_by_split": {"train": 60, "dev": 27, "test": 34}},
            "phrasings": {"seen": list(PHRASINGS[:-1]), "held_out": PHRASINGS[-1]},
            "digest": "be9bbd125c36",
        },
        "settings": {"seed": 7, "quick": False, "dtype": "float32", "versions": {"torch": "2.9.0"}},
        "baseline": {"test": measured(0.27, 0.40, 0.95, 0.0)},
        "towards_context": {"method": "pruning", **methods["pruning"]["towards_context"]},
        "towards_memory": {"method": "pruning", **methods["pruning"]["towards_memory"]},
        "random_heads": {
            "towards_context": drawn([[0, 0], [1, 2]], [[0, 1], [1, 1]], measured(0.26, 0.41, 0.945, 0.012, p=0.3)),
            "towards_memory": drawn([[0, 2], [1, 0]], [[0, 3], [1, 3]], measured(0.28, 0.39, 0.935, 0.011, p=0.3)),
        },
        "methods": methods,
    }


def sample_scores() -> HeadScores:
    mean = torch.zeros(4, 4)
    for strength, (memory, context) in enumerate(zip(MEMORY_HEADS, CONTEXT_HEADS, strict=True), start=1):
        mean[memory], mean[context] = -1.25 * strength, 0.75 * strength
    values = mean + 0.1 * torch.randn(12, 4, 4, generator=torch.Generator().manual_seed(0))
    subjects = tuple(f"subject {i // 3}" for i in range(12))
    return HeadScores(
        values, tuple(map(str, range(12))), subjects, "path_patching", "logit_diff", "m", "d", {"unit": "logits"}
    )


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


def report(folder: Path, summary: dict[str, Any]) -> Page:
    write_report(folder / "report.html", [demo_run("demo", summary, sample_scores(), None)])
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(tmp_path_factory.mktemp("report"), sample_summary())


def figures_of(script: str) -> dict[str, Any]:
    line = next(line for line in script.splitlines() if line.startswith("const figures = "))
    return json.loads(line.removeprefix("const figures = ").removesuffix(";"))


def test_the_headline_says_how_often_each_source_is_used(page: Page) -> None:
    assert "SmolLM2-135M answers from context 40% of the time and from memory 27%." in page.text


def test_the_lead_says_what_the_edits_do_on_which_subjects_at_which_cost(page: Page) -> None:
    assert "with 2 heads pruned, it answers from context 93% of the time instead of 40%" in page.text
    assert "with 2 heads pruned, it answers from memory 55% of the time instead of 27%" in page.text
    assert "34 subjects that nothing was tuned on" in page.text
    assert "95% of these facts right unedited, 93% and 94% with the two edits" in page.text


def test_an_edit_that_does_nothing_is_not_praised(tmp_path: Path) -> None:
    summary = sample_summary()
    for direction in ("context", "memory"):
        summary[f"towards_{direction}"]["test"] = summary["random_heads"][f"towards_{direction}"]["test"]
    text = report(tmp_path, summary).text
    assert "do not clearly change (40% to 41%, p = 0.30)" in text
    assert "do not clearly change (27% to 28%, p = 0.30)" in text
    assert "A few of its" not in text


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


def test_a_record_without_changes_is_compared_by_its_answers(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gate"], tmp_path / "gate")
    summary = read_json(tmp_path / "gate" / "summary.json")
    changes = {name: found.pop("change") for name, found in summary["conditions"].items() if name != UNEDITED}
    write_json(tmp_path / "gate" / "summary.json", summary)
    (run,) = read_runs([tmp_path / "gate"])
    for condition in run.conditions[1:]:
        found = run.change(condition, "context_rate")
        assert found.paired == changes[condition.name.replace(" ", "_")]["context_rate"]
        assert found.verdict == "rises"
    (tmp_path / "gate" / EXAMPLES).unlink()
    (run,) = read_runs([tmp_path / "gate"])
    assert run.change(run.conditions[1], "context_rate").verdict == "unclear"
    assert "not compared prompt by prompt" in page_of(tmp_path / "report.html", tmp_path / "gate").text


def test_a_method_that_cannot_run_has_a_row_that_says_why(tmp_path: Path) -> None:
    summary = sample_summary()
    summary["methods"]["learned_gates"] = {"not_run": "The gates' gradients are not finite."}
    text = report(tmp_path, summary).text
    assert "learned gates not run The gates' gradients are not finite." in text


def test_a_steering_method_that_cannot_run_has_a_row_that_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    results = read_json(folders["control"] / "results.json")
    results["methods"]["probe"] = {"not_run": "Both sources are needed."}
    write_json(tmp_path / "results.json", results)
    assert "probe not run Both sources are needed." in page_of(tmp_path / "report.html", tmp_path).text


def test_what_is_undefined_is_said_to_be(folders: dict[str, Path], tmp_path: Path) -> None:
    undefined = {"value": None, "low": None, "high": None, "n": 0}
    summary = sample_summary()
    summary["baseline"]["test"]["memorisation_ratio"] = undefined
    assert "unedited 27% 22–33% 40% 35–46% undefined 95%" in report(tmp_path, summary).text  # noqa: RUF001
    summary = read_json(folders["gate"] / "summary.json")
    summary["kept"]["gated"]["none"] = undefined
    write_json(tmp_path / "gate" / "summary.json", summary)
    text = page_of(tmp_path / "report.html", tmp_path / "gate").text
    assert "keeps 97% of its gain on conflicts." in text
    assert "no context 50% 40–60% 50% 40–60% undefined 5% 0–10%" in text  # noqa: RUF001


def test_answers_that_say_nothing_are_shown_where_they_are_counted(page: Page, tmp_path: Path) -> None:
    assert "those that name both (1%) make up the rest" in page.text
    summary = sample_summary()
    summary["baseline"]["test"]["empty_rate"] = estimate(0.02)
    text = report(tmp_path, summary).text
    assert "those that name both (1%) and those that say nothing (2%) make up the rest" in text


def test_a_rate_cannot_be_undefined(folders: dict[str, Path], tmp_path: Path) -> None:
    summary = read_json(folders["dial"] / "summary.json")
    summary["baseline"]["test"]["memory_rate"] = {"value": None, "low": None, "high": None, "n": 0}
    write_json(tmp_path / "summary.json", summary)
    with pytest.raises(UserError, match="has no memory_rate of unedited; run the study again"):
        read_runs([tmp_path])


def test_a_control_of_both_directions_together_is_still_read(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["demo"], tmp_path / "demo")
    summary = read_json(tmp_path / "demo" / "summary.json")
    by_direction = [summary["random_heads"][f"towards_{d}"] for d in ("context", "memory")]
    draws = [draw for control in by_direction for draw in control["draws"]]
    summary["random_heads"] = {"draws": draws, "test": by_direction[0]["test"]}
    write_json(tmp_path / "demo" / "summary.json", summary)
    page = page_of(tmp_path / "report.html", tmp_path / "demo")
    assert "random heads, both directions together" in page.text
    assert_every_plot_has_its_place(page)


def test_the_damage_table_has_a_row_for_every_method_direction_and_control(page: Page) -> None:
    for row in (
        "unedited 27% 22–33% 40% 35–46%",  # noqa: RUF001
        "pruning, towards context 2 heads pruned; chosen 3% 0–9% 93% 88–99%",  # noqa: RUF001
        "value scaling, towards context 2 heads inverted 5%",
        "pruning, towards memory 2 heads pruned; chosen 55%",
        "value scaling, towards memory 2 heads inverted 52%",
        "random heads, towards context 2 heads pruned 26%",
        "random heads, towards memory 2 heads pruned 28%",
        "0.031 0.025–0.037",  # noqa: RUF001
    ):
        assert row in page.text


def test_every_edited_head_is_listed_with_scale_and_score(page: Page) -> None:
    for head in ("2.0 0 −1.2", "3.1 0 −2.", "2.1 0 +0.", "3.3 0 +1."):  # noqa: RUF001
        assert head in page.text


def test_of_many_edited_heads_the_strongest_are_listed_and_the_others_counted(tmp_path) -> None:
    summary = sample_summary()
    heads = [[layer, head, 0.98765] for layer in range(4) for head in range(4)]
    summary["towards_context"] = {**summary["towards_context"], "heads": heads}
    text = report(tmp_path, summary).text
    assert text.count(" 0.99 ") == 12
    assert "and 4 more with weaker scores" in text


def test_the_page_says_how_to_reproduce_and_apply(page: Page) -> None:
    assert "conflictscope demo --model SmolLM2-135M --relation capital --relation currency --seed 7" in page.text
    assert "load_model('SmolLM2-135M')" in page.text
    assert 'InterventionFile.load("interventions/towards_context.json")' in page.text


def test_the_figures_hold_the_rates_of_the_summary(page: Page) -> None:
    figures = figures_of(page.scripts[-1])
    assert set(figures) == {"usage", "templates", "map", "top", "cost"}
    memory = next(t for t in figures["usage"]["data"] if t.get("name") == "memory")
    assert memory["x"] == [0.27, 0.03, 0.55, 0.26, 0.28]


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


def test_every_figure_has_its_place_and_a_text_alternative(page: Page) -> None:
    plots = assert_every_plot_has_its_place(page)
    assert "towards context: memory 3%, context 93%" in (plots["plot-usage"]["aria-label"] or "")


def assert_loads_nothing(page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    addresses = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "srcset")]
    assert all((address or "").startswith("#") for address in addresses)
    own = page.source.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|@import|url\(|fetch\(|\bimport\(|innerHTML", own)


def test_the_page_loads_nothing(page: Page) -> None:
    assert_loads_nothing(page)


def test_plotly_js_is_inlined_exactly_once(page: Page) -> None:
    assert page.source.count(get_plotlyjs()) == 1
    assert len(re.findall(r"plotly\.js v\d", page.source)) == 1


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert('x')</script>"
    summary = sample_summary()
    summary["model"]["name"] = hostile
    summary["data"]["relations"] = [hostile]
    summary["data"]["digest"] = hostile
    parts = [summary[part] for part in ("baseline", "towards_context", "towards_memory")]
    for part in [*parts, *summary["random_heads"].values()]:
        by_template = part["test"]["by_template"]
        by_template[hostile] = by_template.pop("according_to")
    summary["data"]["phrasings"]["held_out"] = hostile
    summary["methods"][hostile] = summary["methods"].pop("value_scaling")
    page = report(tmp_path, summary)
    assert hostile not in page.source
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert f"{hostile} answers from context" in page.text
    assert set(figures_of(page.scripts[-1])) == {"usage", "templates", "map", "top", "cost"}


def test_a_quick_run_is_called_one_and_reproduced_as_one(tmp_path: Path) -> None:
    summary = sample_summary()
    summary["settings"]["quick"] = True
    text = report(tmp_path, summary).text
    assert "Quick run." in text
    assert "--seed 7 --dtype float32 --quick" in text


def test_scores_of_another_model_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    summary = sample_summary()
    summary["towards_memory"]["heads"] = [[23, 4, 0.0]]
    with pytest.raises(UserError, match=r"23\.4 is not among these scores of 4 layers x 4 heads"):
        report(tmp_path, summary)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


def page_of(path: Path, *folders: Path) -> Page:
    write_report(path, read_runs(folders))
    return Page(path.read_text(encoding="utf-8"))


HEADLINES = {
    "demo": "tiny answers from context {unedited_context} of the time and from memory {unedited_memory}.",
    "dial": "at one end it answers from context {context} of the time, at the other from memory {memory};",
    "gate": "keeps 97% of its gain on conflicts and 5% of its closed-book damage.",
    "control": "Of 5 methods, ",
    "probes": "probes of tiny read conflict at blocks.16.mlp.hook_out with AUROC 0.70 and source at ",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_run_has_its_headline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    rates = {
        "unedited_context": samples.measures(UNEDITED)["context_rate"],
        "unedited_memory": samples.measures(UNEDITED)["memory_rate"],
        "context": samples.measures("context", 10)["context_rate"],
        "memory": samples.measures("memory", 10)["memory_rate"],
    }
    page = page_of(tmp_path / "report.html", folders[kind])
    assert HEADLINES[kind].format(**{name: percent(e["value"]) for name, e in rates.items()}) in page.text
    assert f"conflictscope {'probe' if kind == 'probes' else 'steer' if kind == 'control' else kind}" in page.text
    assert_loads_nothing(page)
    assert_every_plot_has_its_place(page)


def test_the_page_of_a_demo_s_folder_is_the_one_that_demo_writes(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["demo"]
    page = page_of(tmp_path / "read.html", folder)
    summary, scores = read_json(folder / "summary.json"), HeadScores.load(folder / "heads.parquet")
    write_report(tmp_path / "made.html", [demo_run("demo", summary, scores, read_examples(folder))])
    assert (tmp_path / "made.html").read_text(encoding="utf-8") == page.source


def test_the_best_edit_of_each_direction_is_the_one_of_the_headline(folders: dict[str, Path], tmp_path: Path) -> None:
    methods = read_json(folders["control"] / "results.json")["methods"]
    text = page_of(tmp_path / "report.html", folders["control"]).text
    for d in ("context", "memory"):
        rates = {m: methods[m][f"towards_{d}"]["test"][f"{d}_rate"]["value"] for m in (*STEERING_METHODS, "spare")}
        best = max(rates, key=lambda method: rates[method])
        assert f"{best.replace('_', ' ')}, towards {d}" in text.split("Which source")[0]
        assert percent(rates[best]) in text.split("Every number")[0]


def test_a_gate_that_nothing_is_kept_of_has_dashes(folders: dict[str, Path], tmp_path: Path) -> None:
    summary = read_json(folders["gate"] / "summary.json")
    summary["kept"] = {"gated": {}, "random_gate": {}}
    summary["towards"] = None
    write_json(tmp_path / "gate" / "summary.json", summary)
    text = page_of(tmp_path / "report.html", tmp_path / "gate").text
    assert "conflicting 50% 40–60% 50% 40–60% – –" in text  # noqa: RUF001


def test_several_runs_are_compared_in_one_table(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = read_runs([*folders.values()])
    page = page_of(tmp_path / "report.html", *folders.values())
    compared = page.text.split("All edits next to each other")[1].split("The answers themselves")[0]
    for run in runs:
        assert run.name in page.text
        for c in run.conditions:
            cells = [written(c.test[m]) for m in ("memory_rate", "context_rate", "memorisation_ratio")]
            guards = [written(c.test[m]) for m in ("closed_book_accuracy", "aligned_accuracy", "irrelevant_accuracy")]
            row = " ".join([*cells, *guards, f"{c.test['neutral_kl']['value']:.3f}"])
            assert row in compared.split(f" {c.name} ", 1)[1]
    assert "compared" in figures_of(page.scripts[-1])
    assert_every_plot_has_its_place(page)


def written(estimate: dict[str, float]) -> str:
    low, high = percent(estimate["low"]).removesuffix("%"), percent(estimate["high"])
    return f"{percent(estimate['value'])} {low}\N{EN DASH}{high}"


def test_runs_of_other_models_or_data_are_called_so(folders: dict[str, Path], tmp_path: Path) -> None:
    alike = page_of(tmp_path / "alike.html", folders["demo"], folders["dial"])
    assert "Not one to one" not in alike.text
    summary = read_json(folders["dial"] / "summary.json")
    summary["model"]["fingerprint"], summary["data"]["digest"] = "another", "another"
    write_json(tmp_path / "other" / "summary.json", summary)
    page = page_of(tmp_path / "report.html", folders["demo"], tmp_path / "other")
    assert "These runs are of different models and of different data" in page.text


def test_probes_alone_have_neither_edits_to_compare_nor_answers(folders: dict[str, Path], tmp_path: Path) -> None:
    page = page_of(tmp_path / "report.html", folders["probes"], folders["probes"])
    assert "2 runs compared" in page.text
    assert "The answers themselves" not in page.text
    assert_every_plot_has_its_place(page)


def test_runs_of_the_same_name_are_numbered(folders: dict[str, Path], tmp_path: Path) -> None:
    assert [run.name for run in read_runs([folders["demo"], folders["gate"], folders["demo"]])] == [
        "demo (1)",
        "gate",
        "demo (3)",
    ]


def test_the_answers_of_the_page_are_those_of_the_records(folders: dict[str, Path], tmp_path: Path) -> None:
    page = page_of(tmp_path / "report.html", folders["gate"])
    (run,) = json.loads(page.scripts[0])
    assert [condition["name"] for condition in run["conditions"]] == ["unedited", "everywhere", "gated", "random gate"]
    frame = read_examples(folders["gate"])
    assert frame is not None
    for condition in run["conditions"]:
        own = frame.filter(condition=condition["name"])
        assert condition["answer"] == own["answer"].to_list()
        assert condition["usage"] == "".join(usage[0] for usage in own["usage"])
        assert condition["logit"] == [value and pytest.approx(value, abs=0.006) for value in own["logit_difference"]]
    expected = frame.filter(condition=UNEDITED)["memory_answers"].to_list()
    assert run["prompts"]["memory"] == [" / ".join(answers) for answers in expected]


def test_every_usage_is_told_on_the_page(folders: dict[str, Path], tmp_path: Path) -> None:
    frame = read_examples(folders["gate"])
    assert frame is not None
    usages = [USAGES[i % len(USAGES)] for i in range(frame.height)]
    write_examples(tmp_path, frame.with_columns(pl.Series("usage", usages)))
    shutil.copy(folders["gate"] / "summary.json", tmp_path)
    page = page_of(tmp_path / "report.html", tmp_path)
    told = "".join(condition["usage"] for condition in json.loads(page.scripts[0])[0]["conditions"])
    (listed,) = re.findall(r"USAGES = \{(.*?)\}", page.source)
    names = dict(re.findall(r'(\w): "(\w+)"', listed))
    assert sorted(names.values()) == sorted(USAGES)
    assert sorted(names[letter] for letter in told) == sorted(usages)


def test_a_run_without_answers_says_how_to_get_them(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["dial"] / "summary.json", tmp_path)
    page = page_of(tmp_path / "report.html", tmp_path)
    assert "left no examples.parquet" in page.text
    assert "Run its command again in the same folder" in page.text
    assert len(page.scripts) == 2


def test_answers_stay_text(folders: dict[str, Path], tmp_path: Path) -> None:
    hostile = "</script><script>alert('x')</script><!--"
    frame = read_examples(folders["gate"])
    assert frame is not None
    write_examples(
        tmp_path, frame.with_columns(answer=pl.lit(hostile), prompt=pl.lit(hostile), relation=pl.lit(hostile))
    )
    shutil.copy(folders["gate"] / "summary.json", tmp_path)
    page = page_of(tmp_path / "report.html", tmp_path)
    assert hostile not in page.source
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert json.loads(page.scripts[0])[0]["prompts"]["prompt"][0] == hostile


@pytest.mark.parametrize("kind", WRITERS)
def test_the_commands_of_a_page_are_ones_that_the_command_line_takes(kind: str, folders: dict[str, Path]) -> None:
    (run,) = read_runs([folders[kind]])
    for line in run.command.splitlines():
        program, *arguments = shlex.split(line)
        context = typer.main.get_command(app).make_context(program, list(arguments))
        while hasattr(context.command, "commands"):
            command: Any = context.command
            rest = [*getattr(context, "_protected_args", []), *context.args]
            name, inner, left = command.resolve_command(context, rest)
            context = inner.make_context(name, left, parent=context)


def _without_low(found: dict[str, Any]) -> None:
    del found["conditions"]["gated"]["memory_rate"]["low"]


def _bare(found: dict[str, Any]) -> None:
    found["conditions"]["gated"]["neutral_kl"] = 0.5


def _surplus(found: dict[str, Any]) -> None:
    found["conditions"]["gated"]["by_template"]["question"]["context_rate"]["more"] = 1


@pytest.mark.parametrize("damage", [_without_low, _bare, _surplus])
def test_a_damaged_measure_is_named(damage: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    summary = read_json(folders["gate"] / "summary.json")
    damage(summary)
    write_json(tmp_path / "gate" / "summary.json", summary)
    with pytest.raises(UserError, match=r"has no (memory_rate|neutral_kl|by_template) of gated; run the study again"):
        read_runs([tmp_path / "gate"])


@pytest.mark.parametrize("column", [pl.lit("nothing").alias("usage"), pl.lit("text").alias("logit_difference")])
def test_answers_that_are_none_are_refused(column: pl.Expr, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gate"], tmp_path / "gate")
    frame = pl.read_parquet(tmp_path / "gate" / EXAMPLES).with_columns(column)
    write_parquet(tmp_path / "gate" / EXAMPLES, frame)
    with pytest.raises(UserError, match="holds usages or logit differences that are none"):
        read_runs([tmp_path / "gate"])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda _: None, "holds no records of a study"),
        (lambda folder: write_json(folder / "summary.json", {"accuracy": 1}), "holds no records of a study"),
        (lambda folder: write_json(folder / "results.json", [1]), "holds no records of a study"),
        (lambda folder: write_json(folder / "summary.json", {"gate": {}}), "lacks something that a report shows"),
        (lambda folder: (folder / "summary.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "scores.parquet").write_text("no table"), "cannot be read"),
        (lambda folder: (folder / EXAMPLES).write_text("no table"), "cannot be read"),
        (lambda folder: write_parquet(folder / EXAMPLES, pl.DataFrame({"id": ["a"]})), "lacks answer, condition"),
    ],
)
def test_what_is_no_run_is_refused_with_a_sentence(write, said: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    if (folder / EXAMPLES).exists():
        shutil.copy(folders["gate"] / "summary.json", folder)
    with pytest.raises(UserError, match=said):
        read_runs([folder])


def test_a_summary_that_lacks_a_measure_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    summary = read_json(folders["dial"] / "summary.json")
    del summary["random_heads"]["towards_memory"]["test"]["aligned_accuracy"]
    write_json(tmp_path / "summary.json", summary)
    with pytest.raises(UserError, match="has no aligned_accuracy of random gates, towards memory"):
        read_runs([tmp_path])


def test_examples_of_other_prompts_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    frame = read_examples(folders["gate"])
    assert frame is not None
    write_examples(tmp_path, frame.filter((pl.col("condition") == UNEDITED) | (pl.col("kind") == "conflict")))
    shutil.copy(folders["gate"] / "summary.json", tmp_path)
    with pytest.raises(UserError, match="have other prompts of everywhere"):
        page_of(tmp_path / "report.html", tmp_path)


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
