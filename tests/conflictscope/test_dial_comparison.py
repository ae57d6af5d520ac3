import json

import pytest

from conflictscope import demo_study as study
from conflictscope import dial_comparison as job
from conflictscope.dial_comparison import (
    Comparison,
    comparison_table,
    counterfact,
    counterfact_table,
    leave_one_out,
    losses,
    transfer_table,
)
from conflictscope.dialing import Dialing
from interp.conflicts import ConflictSet, split_of
from interp.errors import UserError
from interp.evaluation import measure_usage
from interp.facts import usable_facts
from interventions.base import applied
from interventions.heads import HeadScaling, ScaledHead
from tests.conflictscope import test_dialing

small = test_dialing.small
METHODS = {
    "pruning",
    "value_scaling",
    "greedy_pruning",
    "learned_gates",
    "hard_concrete",
    "other_answers",
    "random_gates",
}


@pytest.fixture(scope="module")
def compared(tiny_llama, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_PRUNED_HEADS", (1, 2))
        patch.setattr(job, "_RANKED_ON", 1000)
        patch.setattr(job, "_GREEDY_ON", 6)
        patch.setattr(job, "_GREEDY_COUNTS", (1, 2))
        patch.setattr(job, "_FURTHER", (1.5,))
        patch.setattr(job, "_NOISY", {"learner": "hard_concrete", "steps": 6, "conflicts": 4, "guards": 4})
        dialing = test_dialing.dialing(tiny_llama, tmp_path_factory.mktemp("compared"))
        yield dialing, Comparison(dialing).run()


def test_every_method_is_tried_on_dev_and_measured_on_test(compared):
    dialing, result = compared
    assert json.loads((dialing.out / "comparison.json").read_text()) == json.loads(json.dumps(result))
    for towards in ("context", "memory"):
        part = result[f"towards_{towards}"]
        assert {row["method"] for row in part["dev"]} == set(part["test"]) == METHODS
        for choices in part["test"].values():
            assert "regardless" in choices
    assert set(comparison_table(result)["method"]) == {"unedited", *(name.replace("_", " ") for name in METHODS)}


def test_choices_are_the_best_on_dev_and_keep_the_budget(compared):
    _, result = compared
    for towards in ("context", "memory"):
        part = result[f"towards_{towards}"]
        for method, choices in part["test"].items():
            own = [row for row in part["dev"] if row["method"] == method]
            kept = [r for r in own if all(r["divergence"][kind] <= bound for kind, bound in result["budgets"].items())]
            assert kept
            for name, among in (("regardless", own), ("within_budget", kept)):
                if method == "random_gates":
                    continue
                chosen = next(row for row in own if row["setting"] == choices[name]["setting"])
                assert chosen in among
                assert chosen["rate"] == max(row["rate"] for row in among)


def test_losses_are_paired_by_prompt(compared):
    dialing, result = compared
    found = result["towards_memory"]["test"]["learned_gates"]["regardless"]
    unedited = result["unedited"]["test"]
    for kind, measure in (("none", "closed_book_accuracy"), ("aligned", "aligned_accuracy")):
        fallen = unedited[measure]["value"] - found["test"][measure]["value"]
        assert found["loss"][kind]["value"] == pytest.approx(fallen)
    before, _ = dialing.measured(None, "")
    assert all((estimate["value"], estimate["p"]) == (0, 1) for estimate in losses(before, [before]).values())


def test_a_method_that_cannot_run_has_a_row_that_says_why(compared, monkeypatch):
    dialing, result = compared

    def refused(*_, **__):
        raise UserError("The gradients are not finite.")

    monkeypatch.setattr(Comparison, "_learned", refused)
    edits = Comparison(dialing).edits("context")
    assert {method for method, some in edits.items() if isinstance(some, str)} == {"hard_concrete", "other_answers"}
    again = Comparison(dialing).run()
    assert again["towards_context"]["test"]["hard_concrete"] == {"not_run": "The gradients are not finite."}
    assert again["towards_context"]["test"]["pruning"] == result["towards_context"]["test"]["pruning"]
    rows = comparison_table(again).filter(method="hard concrete")
    assert rows["chosen"].to_list() == ["not run: The gradients are not finite."] * 2


def test_what_is_measured_is_what_the_table_lists(compared, tiny_llama):
    dialing, result = compared
    found = result["towards_context"]["test"]["greedy_pruning"]["regardless"]
    assert all(scale == 0 for *_, scale in found["heads"])
    with applied(tiny_llama, HeadScaling(tuple(ScaledHead(*head) for head in found["heads"]))):
        report = measure_usage(tiny_llama, dialing.tested)
    assert found["test"]["context_rate"] == report.select(kind="conflict").rate("context").to_record()


def test_a_relation_that_is_left_out_is_not_learned_from(tiny_llama, tmp_path, monkeypatch):
    jobs = []
    real = Dialing.__init__

    def watched(self, *arguments, **named):
        real(self, *arguments, **named)
        jobs.append(self)

    monkeypatch.setattr(Dialing, "__init__", watched)
    dialing = test_dialing.dialing(tiny_llama, tmp_path)
    result = leave_one_out(dialing)
    assert set(result) == {"capital", "language"}
    without = {one.out.name: one for one in jobs[1:]}
    assert set(without) == {"without-capital", "without-language"}
    assert {e.relation for e in without["without-capital"].conflicts} == {"language"}
    assert transfer_table(result).height == 4
    for left_out, found in result.items():
        assert found["unedited"]["test"]["memory_rate"]["n"] == sum(
            e.relation == left_out for e in dialing.tested if e.kind == "conflict"
        )
        own = without[f"without-{left_out}"].dial.at(1.0)
        asked = ConflictSet("", tuple(e for e in dialing.tested if e.relation == left_out and e.kind == "conflict"))
        with applied(tiny_llama, own):
            rate = measure_usage(tiny_llama, asked).rate("context").value
        assert found["without_it_context"]["test"]["context_rate"]["value"] == pytest.approx(rate)


def test_a_relation_without_test_prompts_is_refused_before_anything_is_learned(tiny_llama, tmp_path, monkeypatch):
    dialing = test_dialing.dialing(tiny_llama, tmp_path)
    capitals = ConflictSet("", tuple(e for e in dialing.tested if e.relation == "capital"))
    monkeypatch.setattr(dialing, "tested", capitals)
    monkeypatch.setattr("conflictscope.gate_fit.learn_scales", lambda *_, **__: pytest.fail("learned"))
    with pytest.raises(UserError, match="knows no test subject of language"):
        leave_one_out(dialing)


def test_counterfact_asks_about_known_items_of_the_test_split_alone(compared, tmp_path, monkeypatch):
    dialing, _ = compared
    countries = [fact.subject for fact in usable_facts("capital")]
    tested = [country for country in countries if split_of(country, 0) == "test"][:3]
    trained = [country for country in countries if split_of(country, 0) == "train"][:2]
    items = [
        {
            "base_prompt": f"The capital of {country} is",
            "target_true": " Lima",
            "target_new": " Rome",
            "prompt": f"Redefine: The capital of {country} is Rome. The capital of {country} is",
            "subject": country,
        }
        for country in (*tested, *trained)
    ]
    file = tmp_path / "competition.json"
    file.write_text(json.dumps(items))
    asked, edits = [], []
    real = job.answer_starts

    def answer_starts(model, conflicts, **named):
        asked.append(conflicts)
        return real(model, conflicts, **named)

    real_applied = job.applied
    monkeypatch.setattr(job, "applied", lambda model, dial: edits.append(dial) or real_applied(model, dial))
    monkeypatch.setattr(job, "answer_starts", answer_starts)
    monkeypatch.setattr(job, "greedily_continued", lambda _, some, **__: [i != 1 for i in range(len(some))])
    result = counterfact(dialing, file)
    assert (result["items"], result["known"]) == (3, 2)
    assert {e.subject for e in asked[0]} < set(tested)
    assert len(asked[0]) == 2
    assert {1.0, -1.0, 0.0} == {dial.trust for dial in edits}
    assert counterfact_table(result).height == 5
    monkeypatch.setattr(job, "greedily_continued", lambda _, some, **__: [False] * len(some))
    for kept in dialing.records.folder.glob("counterfact-known*"):
        kept.unlink()
    with pytest.raises(UserError, match="knows none of the 3 items"):
        counterfact(dialing, file)
