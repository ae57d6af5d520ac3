import json
import shutil

import polars as pl
import pytest

from conflictscope import demo_study as study_module
from conflictscope import gate_fit
from conflictscope.demo_study import (
    METHODS,
    RANKED_METHODS,
    Candidate,
    Study,
    as_good_as_the_best,
    candidates,
    headline,
)
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from interp.evaluation import UsageReport, measure_usage
from interp.facts import usable_facts
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.fitting.scale_learning import ScaleTraining
from interventions.heads import HeadScaling


@pytest.fixture(scope="module")
def make_study(tiny_llama):
    """A study of a tiny random model that is taken to know thirty capitals."""

    def make(out, model=tiny_llama):
        return Study(model, "tiny", relations=["capital"], out=out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "known_facts", lambda *_, **__: usable_facts("capital")[:30])
        patch.setattr(study_module, "_PRUNED_HEADS", (1, 2))
        patch.setattr(study_module, "_ABLATED_HEADS", (2,))
        settings = ScaleTraining(budget=0.5, context_budget=0.5, max_scales=3, steps=3, conflicts=6, guards=4)
        patch.setattr(study_module, "_GATES", settings)
        patch.setattr(gate_fit, "_TEXT_TOKENS", 8)
        patch.setattr(gate_fit, "_TEXTS", {"train": 6, "dev": 4})
        patch.setattr(gate_fit, "_SIZES", {"train": {"conflicts": 24}, "dev": {"conflicts": 12, "guards": 6}})
        yield make


@pytest.fixture(scope="module")
def finished(make_study, tmp_path_factory):
    """A study that ran, to be read; and what it returned."""
    study = make_study(tmp_path_factory.mktemp("study"))
    return study, study.run()


def test_a_study_writes_every_file(finished):
    study, summary = finished
    out = study.out
    assert summary == json.loads((out / "summary.json").read_text())
    for towards in ("context", "memory"):
        file = InterventionFile.load(out / "interventions" / f"towards_{towards}.json")
        (edit,) = file.build()
        assert isinstance(edit, HeadScaling)
        heads = [[h.layer, h.head, h.scale] for h in edit.heads]
        assert heads == summary[f"towards_{towards}"]["heads"]
        for method, found in summary["methods"].items():
            of_method = InterventionFile.load(out / "interventions" / f"{method}-towards_{towards}.json")
            assert of_method.measured["test"] == found[f"towards_{towards}"]["test"]
            assert of_method.provenance.method == method
    assert len(HeadScores.load(out / "heads.parquet").values) > 0
    examples = pl.read_parquet(out / "examples.parquet").filter(kind="conflict")
    used = examples.group_by("condition").agg(pl.col("usage").eq("memory").mean())
    shares = dict(used.iter_rows())
    assert shares["unedited"] == pytest.approx(summary["baseline"]["test"]["memory_rate"]["value"])
    for towards in ("context", "memory"):
        chosen = f"{summary[f'towards_{towards}']['method'].replace('_', ' ')}, towards {towards}"
        assert shares[chosen] == pytest.approx(summary[f"towards_{towards}"]["test"]["memory_rate"]["value"])


@pytest.mark.parametrize("architecture", ["gpt-neox", "gemma2"])
def test_a_study_runs_on_other_architectures(make_study, tiny_directories, tmp_path, architecture):
    model = load_model(str(tiny_directories[architecture]), device="cpu")
    assert make_study(tmp_path, model).run()["model"]["architecture"] == type(model.original_model).__name__


def test_the_summary_has_what_its_readers_need(finished):
    _, summary = finished
    assert {"model", "data", "baseline", "towards_context", "towards_memory", "random_heads"} <= set(summary)
    ends = ("towards_context", "towards_memory")
    edited = [*(summary[end] for end in ends), *(summary["random_heads"][end] for end in ends)]
    for condition in (summary["baseline"], *edited):
        test = condition["test"]
        for measure in (
            "memory_rate",
            "context_rate",
            "other_rate",
            "closed_book_accuracy",
            "aligned_accuracy",
            "neutral_kl",
        ):
            assert test[measure]["low"] <= test[measure]["value"] <= test[measure]["high"]
    for condition in edited:
        for measure, change in condition["test"]["change"].items():
            before, after = (found["test"][measure]["value"] for found in (summary["baseline"], condition))
            assert change["value"] == pytest.approx(after - before)
            assert 0 < change["p"] <= 1
    assert summary["towards_context"]["chosen_on"] == summary["towards_memory"]["chosen_on"] == "dev"


def test_the_random_control_has_the_winners_scales_and_none_of_its_heads(finished):
    _, summary = finished
    winners = {f"towards_{towards}": summary[f"towards_{towards}"]["heads"] for towards in ("context", "memory")}
    assert set(summary["random_heads"]) == set(winners)
    for end, heads in winners.items():
        draws = [draw["heads"] for draw in summary["random_heads"][end]["draws"]]
        assert [[s for *_, s in drawn] for drawn in draws] == 2 * [[s for *_, s in heads]]
        for drawn in draws:
            assert not {tuple(h[:2]) for h in drawn} & {tuple(h[:2]) for heads in winners.values() for h in heads}


def test_the_random_control_of_a_direction_is_that_of_its_own_draws(finished, tiny_llama):
    study, summary = finished
    for end in ("towards_context", "towards_memory"):
        control = summary["random_heads"][end]
        answers = []
        for draw in control["draws"]:
            candidate = Candidate(tuple((*head,) for head in draw["heads"]), draw["around"] == "mean")
            with applied(tiny_llama, candidate.scaling(study.mean_outputs)):
                answers.append(measure_usage(tiny_llama, study._tested.select(kind="conflict")).frame)
        expected = (pl.concat(answers)["usage"] == "memory").mean()
        assert control["test"]["memory_rate"]["value"] == pytest.approx(expected)
        assert control["test"]["memory_rate"]["n"] == 2 * summary["baseline"]["test"]["memory_rate"]["n"]


def test_the_terminal_shows_each_direction_next_to_its_control(finished):
    lines = list(headline(finished[1]))
    names = ["unedited", *(f"{kind}towards {d}" for d in ("context", "memory") for kind in ("", "random, "))]
    assert [line[: len(name)] for line, name in zip(lines, names, strict=True)] == names


def test_what_was_interrupted_goes_on_without_asking_again(make_study, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study_module, "write_examples", killed)
        with pytest.raises(KeyboardInterrupt):
            make_study(tmp_path).run()
    assert not (tmp_path / "summary.json").exists()
    for name in ("measure_usage", "answer_starts", "path_patching", "neutral_kl"):
        monkeypatch.setattr(study_module, name, lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr(gate_fit, "learn_scales", lambda *_, **__: pytest.fail("computed again"))
    assert make_study(tmp_path).run()["baseline"]


def test_a_damaged_record_is_computed_again(finished, make_study, tmp_path):
    study, expected = finished
    shutil.copytree(study.out, tmp_path, dirs_exist_ok=True)
    records = list((tmp_path / "records").glob("*.parquet"))
    assert records
    for record in records:
        record.write_bytes(b"damaged")
    assert make_study(tmp_path).run() == expected


def test_answers_on_test_come_from_held_out_subjects_and_include_the_unseen_phrasing(finished):
    study, _ = finished
    heads = pl.read_parquet(study.out / "heads.parquet")
    test = study.conflicts.select(split="test")
    assert not set(heads["subject"]) & set(test.subjects)
    assert not any("according_to" in e for e in heads["example_id"])
    assert "according_to" in {e.template for e in test}


def test_a_model_that_knows_nothing_is_one_sentence(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "known_facts", lambda *_, **__: ())
    with pytest.raises(UserError, match="too few different answers among the facts of capital"):
        Study(tiny_llama, "tiny", relations=["capital"], out=tmp_path)


def report(*usages):
    """Answers about ten subjects, one a letter: c for context, m for memory."""
    words = {"c": "context", "m": "memory"}
    frame = pl.DataFrame({"usage": [words[u] for u in usages], "subject": list("abcdefghij")})
    return UsageReport(frame)


@pytest.mark.parametrize(
    ("reports", "chosen"),
    [
        (["mmmmmmmmmm", "ccccccccmm", "mccccccccc"], [1, 2]),  # worse on two subjects and better on one: within it
        (["mmmmmmmmmm", "cccccmmmmm", "cccccccccc"], [2]),  # worse on five: not
        (["cccccccccc", "cccccccccc"], [0, 1]),
    ],
)
def test_candidates_within_one_standard_error_of_the_best_stay(reports, chosen):
    assert as_good_as_the_best([report(*usages) for usages in reports], "context") == chosen


def test_learned_gates_compete_with_what_ranks_heads(finished):
    _, summary = finished
    assert list(summary["methods"]) == list(METHODS)
    for towards in ("context", "memory"):
        learned = summary["methods"]["learned_gates"][f"towards_{towards}"]
        assert 0 < len(learned["heads"]) <= 3
        assert all(scale != 1 for *_, scale in learned["heads"])


def test_a_model_whose_gates_cannot_be_learned_is_studied_without_them(make_study, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise UserError("The gates' gradients are not finite.")

    monkeypatch.setattr(gate_fit, "learn_scales", refused)
    summary = make_study(tmp_path).run()
    reason = "The gates' gradients are not finite."
    assert summary["methods"]["learned_gates"] == {"not_run": reason}
    assert all("not_run" not in summary["methods"][method] for method in RANKED_METHODS)
    assert list(headline(summary))[-1].split(maxsplit=4) == ["learned", "gates", "not", "run", reason]


def test_candidates_prune_the_opponents_and_never_name_a_head_twice(finished):
    scores = finished[0].head_scores()
    opponents = [(h.layer, h.head) for h in scores["logit_diff"].ranked("memory")]
    first = candidates(scores, "context", "pruning")[0]
    assert first.heads == ((*opponents[0], 0.0),)
    for method in RANKED_METHODS:
        for candidate in candidates(scores, "memory", method):
            assert len({head[:2] for head in candidate.heads}) == len(candidate.heads)
