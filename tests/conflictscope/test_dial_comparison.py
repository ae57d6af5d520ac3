import json

import pytest

from conflictscope import dial_comparison as job
from conflictscope import study
from conflictscope.dial_comparison import (
    Comparison,
    comparison_table,
    counterfact,
    counterfact_table,
    leave_one_out,
    transfer_table,
)
from conflictscope.dialing import Dialing
from interp.errors import UserError
from interp.evaluation import measure_usage
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
    "shuffled_answers",
    "random_gates",
}


@pytest.fixture(scope="module")
def compared(tiny_llama, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_PRUNED_HEADS", (1, 2))
        patch.setattr(job, "_RANKED_ON", 40)
        patch.setattr(job, "_GREEDY_ON", 6)
        patch.setattr(job, "_GREEDY_COUNTS", (1, 2))
        patch.setattr(job, "SETTINGS", (0.5, 1.0))
        patch.setattr(job, "_HARD_CONCRETE", {"learner": "hard_concrete", "steps": 6, "conflicts": 4, "guards": 4})
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
    assert set(comparison_table(result)["method"]) == {name.replace("_", " ") for name in METHODS}


def test_choices_are_the_best_on_dev_and_keep_the_budget(compared):
    _, result = compared
    for towards in ("context", "memory"):
        part = result[f"towards_{towards}"]
        for method, choices in part["test"].items():
            own = [row for row in part["dev"] if row["method"] == method]
            kept = [r for r in own if all(r["divergence"][kind] <= bound for kind, bound in result["budgets"].items())]
            assert ("within_budget" in choices) == bool(kept)
            for name, among in (("regardless", own), ("within_budget", kept)):
                if among:
                    chosen = next(row for row in own if row["setting"] == choices[name]["setting"])
                    assert chosen["rate"] == max(row["rate"] for row in among)


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
    for found in result.values():
        assert set(found) == {
            "unedited",
            "transferred_context",
            "transferred_memory",
            "own_context",
            "own_memory",
        }


def test_one_relation_cannot_be_left_out(tiny_llama, tmp_path):
    dialing = Dialing(tiny_llama, "tiny", relations=["capital"], out=tmp_path)
    with pytest.raises(UserError, match="must be two at least"):
        leave_one_out(dialing)


def test_counterfact_asks_about_known_items_alone(compared, tmp_path, monkeypatch):
    dialing, _ = compared
    items = [
        {
            "base_prompt": f"The capital of {country} is",
            "target_true": f" {true}",
            "target_new": f" {new}",
            "prompt": f"Redefine: The capital of {country} is {new}. The capital of {country} is",
            "subject": country,
        }
        for country, true, new in (("Peru", "Lima", "Rome"), ("Italy", "Rome", "Paris"), ("Egypt", "Cairo", "Lima"))
    ]
    file = tmp_path / "competition.json"
    file.write_text(json.dumps(items))
    monkeypatch.setattr(job, "greedily_continued", lambda *_, **__: [True, False, True])
    asked = []
    real = job.answer_starts
    monkeypatch.setattr(
        job, "answer_starts", lambda model, some, **named: asked.append(some) or real(model, some, **named)
    )
    result = counterfact(dialing, file)
    assert (result["items"], result["known"]) == (3, 2)
    assert {example.subject for example in asked[0]} == {"Peru", "Egypt"}
    assert counterfact_table(result).height == 3
    monkeypatch.setattr(job, "greedily_continued", lambda *_, **__: [False] * 3)
    for kept in dialing.records.folder.glob("counterfact-known*"):
        kept.unlink()
    with pytest.raises(UserError, match="knows none of the 3 items"):
        counterfact(dialing, file)
