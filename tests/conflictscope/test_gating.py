import json

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import binomtest

from conflictscope import demo_study as study
from conflictscope import dialing
from conflictscope import gating as job
from conflictscope.gating import Gating, gating_lines, gating_table, kept_shares, passing_threshold
from interp.anatomy import transformers_model
from interp.errors import UserError
from interp.evaluation import UsageReport, neutral_texts
from interp.facts import HELD_OUT_PHRASING
from interp.inputs import encode
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope.cli import test_cli

run = test_cli.run
EDIT = HeadScaling.of([(2, 1), (2, 3)], -3.0)


@pytest.fixture(scope="module", autouse=True)
def small():
    """The tiny models know nothing: here they are taken to know all they are asked."""
    with pytest.MonkeyPatch.context() as patch:
        few = neutral_texts()[:4]
        patch.setattr("interp.evaluation.neutral_texts", lambda: few)
        patch.setattr(dialing, "greedily_continued", lambda _, items, **__: [True] * len(items))
        yield


def file_of(model, *edits):
    identity = ModelIdentity.of(model, "tiny")
    return InterventionFile.of(edits or [EDIT], name="edit", towards="context", model=identity)


def gating(model, out, **options):
    options = {"relations": ["capital", "language"], "subjects": 8, "keep": 0.8, "file": file_of(model), **options}
    return Gating(model, out=out, **options)


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("gate")
    return gating(tiny_llama, out).run(), out


def test_the_file_is_the_edit_behind_the_gate_that_the_summary_describes(finished, tiny_llama):
    summary, out = finished
    file = InterventionFile.load(out / "gated.json")
    (gate,) = file.build()
    assert isinstance(gate, ConflictGate)
    assert gate.edits == (EDIT,)
    assert gate.layer < 2
    assert gate.threshold == summary["gate"]["threshold"]
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    answered = pl.read_parquet(out / "examples.parquet").filter(kind="conflict", condition="gated")["usage"]
    assert (answered == "memory").mean() == pytest.approx(summary["conditions"]["gated"]["memory_rate"]["value"])
    assert file.measured["test"] == summary["conditions"]["gated"]
    assert file.provenance.data == summary["data"]["digest"]


def test_what_is_said_to_open_is_what_the_file_edits(finished, tiny_llama):
    """The share of test prompts whose logits the file changes, against the share said to be open."""
    summary, out = finished
    asked = gating(tiny_llama, out).tested
    network = transformers_model(tiny_llama)
    file = InterventionFile.load(out / "gated.json")
    opened = summary["gate"]["test"]["opened"]
    for kind in ("conflict", "aligned", "irrelevant", "none"):
        changed: dict[str, list[bool]] = {}
        for example in asked.select(kind=kind):
            inputs = encode(tiny_llama, [example.prompt])
            with torch.inference_mode():
                before = network(**inputs).logits
                with applied(tiny_llama, file):
                    differs = not torch.equal(network(**inputs).logits, before)
            changed.setdefault(example.template, []).append(differs)
        every = [differs for some in changed.values() for differs in some]
        assert np.mean(every) == pytest.approx(opened[kind]["value"])
        assert np.mean(changed[HELD_OUT_PHRASING]) == pytest.approx(opened["held_out_phrasing"][kind]["value"])


def test_neither_test_subjects_nor_the_held_out_phrasing_choose_the_gate(tiny_llama, tmp_path, monkeypatch):
    seen = []
    real = job.record

    def watched(model, part, sites, **options):
        seen.append(part)
        return real(model, part, sites, **options)

    monkeypatch.setattr(job, "record", watched)
    made = gating(tiny_llama, tmp_path)
    assert made.chosen
    assert made.blind
    assert [{e.split for e in part} for part in seen] == [{"train"}, {"dev"}, {"dev"}]
    assert all(e.template != HELD_OUT_PHRASING for part in seen for e in part)
    assert {e.kind for e in seen[0]} == {"conflict", "aligned", "irrelevant", "none"}


def test_the_chosen_site_lets_fewest_others_through_of_all_that_pass_the_wanted_share(finished):
    summary, _ = finished
    opened = summary["gate"]["dev"]["opened"]
    assert opened["conflict"] >= 0.8
    blind = summary["random_gate"]["dev"]["opened"]
    others = ("aligned", "irrelevant", "none")
    assert sum(opened[kind] for kind in others) <= sum(blind[kind] for kind in others)


def test_a_second_run_reads_what_the_first_measured(finished, tiny_llama, monkeypatch):
    summary, out = finished
    monkeypatch.setattr(study, "measure_usage", lambda *_, **__: pytest.fail("asked again"))
    assert gating(tiny_llama, out).run() == summary


def test_the_table_has_all_conditions_and_the_lines_say_what_is_kept(finished):
    summary, _ = finished
    assert gating_table(summary)["condition"].to_list() == ["unedited", "everywhere", "gated", "random gate"]
    assert sum("in the unseen phrasing" in line for line in gating_lines(summary)) == 2


# Thresholds and shares


@pytest.mark.parametrize(("n", "keep"), [(19, 0.95), (100, 0.9), (9, 0.5), (1000, 0.99)])
def test_a_new_score_passes_with_the_wanted_probability(n, keep):
    """The coverage of a conformal threshold lies between the wanted share and one rank more, by counting ranks."""
    scores = torch.randperm(n).float()
    passed = int((scores > passing_threshold(scores, keep)).sum())
    # A new score is equally likely to fall into each of the n + 1 gaps; it passes in those above the threshold.
    assert keep - 1e-9 <= (passed + 1) / (n + 1) < keep + 1 / (n + 1) + 1e-9


def test_too_few_scores_or_no_share_are_refused(tiny_llama, tmp_path):
    with pytest.raises(UserError, match=r"too few to let 0\.95"):
        passing_threshold(torch.zeros(18), 0.95)
    with pytest.raises(UserError, match="between 0 and 1"):
        gating(tiny_llama, tmp_path, keep=1.0)


def report(kind: str, usage: list[str], right: list[float]) -> pl.DataFrame:
    subjects = [str(i) for i in range(len(usage))]
    return pl.DataFrame({"kind": [kind] * len(usage), "subject": subjects, "usage": usage, "memory_span_match": right})


def test_kept_shares_by_hand():
    def condition(context: int, right: int) -> UsageReport:
        usage = ["context"] * context + ["memory"] * (10 - context)
        known = [1.0] * right + [0.0] * (10 - right)
        return UsageReport(pl.concat([report("conflict", usage, known), report("none", usage, known)]))

    reports = {"unedited": condition(2, 9), "everywhere": condition(8, 4), "gated": condition(5, 8)}
    shares = kept_shares(reports, "gated", "context")  # pyright: ignore[reportArgumentType]
    assert shares["gain"]["value"] == pytest.approx(0.5)
    assert shares["none"]["value"] == pytest.approx(0.2)
    assert shares["gain"]["low"] <= 0.5 <= shares["gain"]["high"]
    # Every prompt that the edit turned right to wrong is right behind the gate, or it is not.
    expected = binomtest(1, 5).proportion_ci(method="wilson")
    assert (shares["none"]["low"], shares["none"]["high"]) == pytest.approx((expected.low, expected.high))
    assert "irrelevant" not in shares
    assert "gain" not in kept_shares(reports, "gated", None)  # pyright: ignore[reportArgumentType]


def test_a_share_of_a_change_that_there_is_not_is_undefined():
    def condition(right: list[float]) -> UsageReport:
        return UsageReport(report("aligned", ["memory"] * 10, right))

    reports = {name: condition([1.0] * 9 + [0.0]) for name in ("unedited", "everywhere")}
    reports["gated"] = condition([1.0] * 8 + [0.0] * 2)
    shares = kept_shares(reports, "gated", None)  # pyright: ignore[reportArgumentType]
    assert shares == {"aligned": {"value": None, "low": None, "high": None, "n": 10}}


def test_a_share_of_all_is_as_sure_as_the_prompts_that_changed():
    usage = {"unedited": ["memory"] * 20, "everywhere": ["context"] * 3 + ["memory"] * 17}
    usage["gated"] = usage["everywhere"]
    reports = {name: UsageReport(report("conflict", found, [1.0] * 20)) for name, found in usage.items()}
    gain = kept_shares(reports, "gated", "context")["gain"]  # pyright: ignore[reportArgumentType]
    expected = binomtest(3, 3).proportion_ci(method="wilson")
    assert (gain["value"], gain["n"]) == (1, 3)
    assert (gain["low"], gain["high"]) == pytest.approx((expected.low, expected.high))


# What is refused


def test_files_that_cannot_be_gated_are_refused(tiny_llama, tmp_path):
    low = file_of(tiny_llama, HeadScaling.of([(0, 1)], 0.0))
    with pytest.raises(UserError, match="edits layer 0 or nothing"):
        gating(tiny_llama, tmp_path, file=low)
    gated = file_of(tiny_llama, ConflictGate("block", 0, torch.ones(32), 0.0, 0.0, (EDIT,)))
    with pytest.raises(UserError, match="has a gate already"):
        gating(tiny_llama, tmp_path, file=gated)
    dial = file_of(tiny_llama, TrustDial((DialScale(1, 1, 0.0, 2.0),)))
    with pytest.raises(UserError, match="is at 0, which changes nothing"):
        gating(tiny_llama, tmp_path, file=dial)


def test_the_command_writes_the_gated_file(run, tiny_directories, tiny_llama, tmp_path):
    file_of(tiny_llama).save(tmp_path / "edit.json")
    options = ["--model", tiny_directories["llama"], "--relation", "capital", "--relation", "language"]
    code, out, _ = run("gate", "fit", "edit.json", *options, "--keep", 0.8, "--subjects", 6, "--out", "gate")
    assert code == 0
    assert "random gate" in out
    assert InterventionFile.load(tmp_path / "gate" / "gated.json").towards == "context"
