import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from conflictscope import demo_study as study
from conflictscope import dial_comparison, gate_fit
from conflictscope import dialing as job
from conflictscope.dialing import Dialing
from interp.answers import Direction
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import neutral_texts
from interp.facts import HELD_OUT_PHRASING, LEARNED_PHRASINGS
from interp.inputs import encode
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.fitting.scale_learning import ScaleTraining
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run = test_cli.run
LEARNING = ScaleTraining(budget=0.5, context_budget=0.5, max_scales=3, steps=4, conflicts=6, guards=4)


@pytest.fixture(scope="module", autouse=True)
def small():
    """The tiny models know nothing: here they are taken to know all they are asked."""
    with pytest.MonkeyPatch.context() as patch:
        few = neutral_texts()[:4]
        patch.setattr("interp.evaluation.neutral_texts", lambda: few)
        patch.setattr(job, "greedily_continued", lambda _, items, **__: [True] * len(items))
        patch.setattr(job, "SETTINGS", (-1.0, 0.0, 1.0))
        patch.setattr(gate_fit, "_TEXT_TOKENS", 8)
        patch.setattr(gate_fit, "_TEXTS", {"train": 6, "dev": 4})
        patch.setattr(gate_fit, "_SIZES", {"train": {}, "dev": {"conflicts": 12, "guards": 6}})
        yield


def dialing(model, out, **settings):
    return Dialing(
        model, "tiny", relations=["capital", "language"], out=out, subjects=6, **{"settings": LEARNING, **settings}
    )


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("dial")
    return dialing(tiny_llama, out).run(), out


def test_the_summary_has_the_demo_s_keys_and_says_what_it_cost(finished):
    summary, out = finished
    demo = {"model", "data", "settings", "baseline", "towards_context", "towards_memory", "random_heads"}
    assert demo < set(summary)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    answered = pl.read_parquet(out / "examples.parquet").filter(kind="conflict", condition="towards memory")["usage"]
    assert (answered == "memory").mean() == pytest.approx(summary["towards_memory"]["test"]["memory_rate"]["value"])
    for end in ("towards_context", "towards_memory"):
        part = summary[end]
        assert 0 < len(part["heads"]) + len(part["feed_forward"]) <= LEARNING.max_scales
        assert max(part["dev"]["divergence"].values()) <= LEARNING.budget
        assert {"memory_rate", "context_rate", "closed_book_accuracy", "neutral_kl"} < set(part["test"])


def test_test_subjects_and_the_held_out_phrasing_are_for_the_test_alone(tiny_llama, tmp_path, monkeypatch):
    """What learning, calibration and test are given, as they are called."""
    learned, calibrated, tested = [], [], []

    def watched(module, name, seen):
        real = getattr(module, name)

        def call(model, examples, *others, **named):
            seen.append(examples)
            return real(model, examples, *others, **named)

        monkeypatch.setattr(module, name, call)

    watched(gate_fit, "ScaleData", learned)
    watched(job, "answer_starts", calibrated)
    watched(study, "measure_usage", tested)
    dialing(tiny_llama, tmp_path, settings=replace(LEARNING, steps=3)).run()
    assert [{e.split for e in examples} for examples in learned] == [{"train"}, {"dev"}]
    # The last ones are what the dial gives on test when it is asked for a rate.
    assert [{e.split for e in examples} for examples in calibrated[:3]] == [{"dev"}] * 3
    assert all({e.split for e in examples} == {"test"} for examples in calibrated[3:])
    assert all(e.template != HELD_OUT_PHRASING for examples in (*learned, *calibrated[:3]) for e in examples)
    assert all({e.split for e in examples} == {"test"} for examples in tested)
    assert HELD_OUT_PHRASING in {e.template for e in tested[0] if e.kind == "conflict"}


def test_the_dial_s_file_does_at_both_ends_what_the_summary_lists(finished, tiny_llama):
    summary, out = finished
    dial = InterventionFile.load(out / "dial.json").dial
    assert dial.trust == 0
    assert [point.trust for point in dial.calibration] == [-1.0, 0.0, 1.0]
    inputs = encode(tiny_llama, ["The capital of Peru is"])
    network = tiny_llama.original_model
    for end, trust in (("towards_context", 1.0), ("towards_memory", -1.0)):
        heads = HeadScaling(tuple(ScaledHead(*head) for head in summary[end]["heads"]))
        layers = FeedForwardScaling(tuple((layer, scale) for layer, scale in summary[end]["feed_forward"]))
        with torch.inference_mode():
            with applied(tiny_llama, heads, layers):
                expected = network(**inputs).logits
            with applied(tiny_llama, dial.at(trust)):
                assert torch.equal(network(**inputs).logits, expected)


def test_the_dial_is_asked_for_a_rate_halfway(finished):
    summary, out = finished
    dial = InterventionFile.load(out / "dial.json").dial
    ends: tuple[tuple[Direction, float], ...] = (("context", 1.0), ("memory", -1.0))
    for towards, end in ends:
        asked = summary["asked"][f"towards_{towards}"]
        rates = {point["trust"]: point[f"{towards}_rate"] for point in summary["calibration"]}
        assert asked["rate"] == pytest.approx((rates[0.0] + rates[end]) / 2)
        assert asked["trust"] == dial.trust_for(towards, asked["rate"])
        assert 0 <= asked["trust"] * end <= 1
        learned, unseen = (asked["test"][name]["n"] for name in ("learned_phrasings", "held_out_phrasing"))
        assert learned == len(LEARNED_PHRASINGS) * unseen > 0


def test_a_repeated_run_computes_nothing_anew(finished, tiny_directories, monkeypatch):
    summary, out = finished
    computes = [(gate_fit, "learn_scales"), (job, "answer_starts"), (study, "measure_usage"), (study, "neutral_kl")]
    for module, name in computes:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    assert dialing(load_model(str(tiny_directories["llama"]), device="cpu"), out).run() == summary


def test_random_gates_have_the_same_scales_in_places_that_are_not_the_dial_s(finished):
    summary, _ = finished
    for kind in ("heads", "feed_forward"):
        drawn = []
        for end in ("towards_context", "towards_memory"):
            moved = summary[end][kind]
            for draw in summary["random_heads"][end]["draws"]:
                assert sorted(gate[-1] for gate in draw[kind]) == sorted(gate[-1] for gate in moved)
                drawn.append(frozenset(tuple(gate[:-1]) for gate in draw[kind]))
                assert not drawn[-1] & {tuple(gate[:-1]) for gate in moved}
        if kind == "heads":
            assert len(set(drawn)) > 1


def test_feed_forward_layers_are_gates_where_they_are_wanted(tiny_llama, tmp_path):
    gates = dialing(tiny_llama, tmp_path, settings=replace(LEARNING, max_scales=15, feed_forward=True)).dial.scales
    assert {gate.layer for gate in gates if gate.head is None} == {0, 1, 2}


def test_where_nearly_all_gates_move_random_ones_share_places(tiny_llama, tmp_path):
    settings = replace(LEARNING, max_scales=100, steps=3, feed_forward=True)
    summary = dialing(tiny_llama, tmp_path, settings=settings).run()
    sizes = {end: len(summary[end]["heads"]) for end in ("towards_context", "towards_memory")}
    for end, size in sizes.items():
        assert [len(draw["heads"]) for draw in summary["random_heads"][end]["draws"]] == [size] * 2
    assert max(sizes.values()) == 12


def test_a_budget_that_no_gate_can_keep_is_one_sentence(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="give a larger --budget or --context-budget"):
        _ = dialing(
            tiny_llama, tmp_path, settings=ScaleTraining(budget=1e-12, context_budget=1e-12, steps=3, max_scales=2)
        ).dial


def test_a_model_that_knows_nothing_is_one_sentence(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "greedily_continued", lambda _, items, **__: [False] * len(items))
    with pytest.raises(UserError, match="too few different answers among the facts of capital, language"):
        _ = dialing(tiny_llama, tmp_path).conflicts


def test_a_fact_is_known_if_most_phrasings_get_it_right(tiny_llama, tmp_path, monkeypatch):
    """Two of three phrasings get every other subject right, one of three the rest."""
    asked = []

    def known(_, items, **__):
        asked.extend(items)
        return [number % 3 < (2 if number // 3 % 2 == 0 else 1) for number in range(len(items))]

    monkeypatch.setattr(job, "greedily_continued", known)
    subjects = Dialing(tiny_llama, "tiny", relations=["capital", "language"], out=tmp_path).conflicts.subjects
    assert 0 < len(subjects) <= len(asked) / 3 / 2


@pytest.fixture
def dial_file(tiny_llama, tmp_path):
    """A dial that turns the first layer around towards memory, with a curve to ask."""
    curve = (DialPoint(-1.0, 0.8, 0.1), DialPoint(0.0, 0.4, 0.4), DialPoint(1.0, 0.1, 0.9))
    dial = TrustDial(tuple(DialScale(0, head, -20.0, 5.0) for head in range(4)), calibration=curve)
    path = tmp_path / "dial.json"
    InterventionFile.of([dial], name="dial", model=ModelIdentity.of(tiny_llama, "tiny")).save(path)
    (tmp_path / "prompts.txt").write_text("The capital of Peru is\nThe capital of Italy is\n")
    return path


def answered(run, tiny_directories, *options):
    command = ["dial", "apply", "dial.json", "prompts.txt", "--model", tiny_directories["llama"]]
    code, printed, error = run(*command, *options)
    assert code == 0, error
    return [json.loads(line) for line in printed.splitlines()]


def test_prompts_are_answered_at_the_wanted_setting(dial_file, run, tiny_directories):
    lines = answered(run, tiny_directories, "--trust", "-1")
    assert [set(line) for line in lines] == [{"id", "unedited", "edited"}] * 2
    assert any(line["unedited"] != line["edited"] for line in lines)
    lines = answered(run, tiny_directories, "--trust", "0")
    assert [line["edited"] for line in lines] == [line["unedited"] for line in lines]


@pytest.mark.parametrize(("options", "trust"), [(("--context-rate", "0.65"), 0.5), (("--memory-rate", "0.6"), -0.5)])
def test_asking_for_a_rate_sets_the_dial(dial_file, run, tiny_directories, tmp_path, options, trust):
    lines = answered(run, tiny_directories, *options, "--save", "dial.json")
    assert len(lines) == 2
    assert InterventionFile.load(dial_file).dial.trust == pytest.approx(trust)
    again = answered(run, tiny_directories)
    assert again == lines


def test_a_setting_is_exported_as_a_file_or_as_a_checkpoint(dial_file, run, tiny_directories, tiny_llama, tmp_path):
    model = str(tiny_directories["llama"])
    assert run("export", model, "dial.json", "half.json", "--trust", "-0.5")[0] == 0
    assert InterventionFile.load(tmp_path / "half.json").dial.trust == -0.5
    assert run("export", model, "half.json", "folded", "--bake")[0] == 0
    folded = load_model(str(tmp_path / "folded"), device="cpu")
    inputs = encode(tiny_llama, ["The capital of Peru is"])
    with torch.inference_mode(), applied(tiny_llama, InterventionFile.load(dial_file).dial.at(-0.5)):
        expected = tiny_llama.original_model(**inputs).logits
    with torch.inference_mode():
        torch.testing.assert_close(folded.original_model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert_one_sentence(run("export", model, "half.json", "folded", "--bake"), "folded")
    assert_one_sentence(run("export", model, "dial.json", "unchanged", "--bake"), "changes nothing as it stands")
    assert_one_sentence(
        run("export", str(tiny_directories["gpt2"]), "dial.json", "other.json"), "load the model it was made for"
    )


def test_wrong_settings_are_one_sentence(dial_file, run, tiny_directories):
    command = ["dial", "apply", "dial.json", "prompts.txt", "--model", tiny_directories["llama"]]
    assert_one_sentence(run(*command), "is at 0, which changes nothing")
    assert_one_sentence(run(*command, "--trust", "0.5", "--memory-rate", "0.5"), "Give one of --trust")
    assert_one_sentence(run(*command, "--trust", "1.5"), "between -1")
    assert_one_sentence(run(*command, "--context-rate", "0.95"), "at most; ask for no more")
    assert_one_sentence(run("dial", "fit", tiny_directories["llama"], "--relation", "colour"), "'colour' is not known")
    assert_one_sentence(run("dial", "fit", tiny_directories["llama"], "--budget", "0"), "above 0")
    alone = run("dial", "fit", tiny_directories["llama"], "--relation", "capital", "--leave-one-out")
    assert_one_sentence(alone, "needs two relations at least")
    missing = run("dial", "fit", tiny_directories["llama"], "--counterfact", "nowhere.json")
    assert_one_sentence(missing, "nowhere.json")


def test_the_command_fits_with_what_it_was_told(run, tiny_directories, monkeypatch, finished):
    told = {}

    class Spy:
        def __init__(self, _, name, **settings):
            told.update(settings, name=name)
            self.model, self.records = None, None

        def run(self):
            return finished[0]

    monkeypatch.setattr(job, "Dialing", Spy)
    done = []
    for name in ("comparison", "transfer", "counterfact"):
        monkeypatch.setattr(dial_comparison, f"{name}_table", lambda _, name=name: pl.DataFrame({"table": [name]}))
    monkeypatch.setattr(dial_comparison.Comparison, "run", lambda _: done.append("compared"))
    monkeypatch.setattr(dial_comparison, "leave_one_out", lambda _: done.append("left out"))
    monkeypatch.setattr(dial_comparison, "counterfact", lambda _, file: done.append(file))
    monkeypatch.setattr("interp.formats.load_dataset", lambda *_: None)
    settings = "--budget 0.1 --context-budget 0.3 --max-scales 7 --feed-forward --steps 9 --subjects 5 --seed 3"
    more = "--relation capital --relation language --relation capital --compare --leave-one-out --counterfact cf.json"
    command = ["dial", "fit", tiny_directories["llama"], *settings.split(), *more.split(), "--out", "there"]
    code, printed, error = run(*command)
    assert code == 0, error
    assert told == {
        "name": str(tiny_directories["llama"]),
        "relations": ["capital", "language"],
        "out": Path("there"),
        "settings": ScaleTraining(budget=0.1, context_budget=0.3, max_scales=7, feed_forward=True, steps=9, seed=3),
        "subjects": 5,
    }
    assert done == ["compared", "left out", Path("cf.json")]
    assert all(name in printed for name in ("comparison", "transfer", "counterfact"))
    (line,) = [line for line in error.splitlines() if line.startswith("towards memory")]
    assert line.split()[2:4] == ["3", "heads"]


def test_data_of_all_kinds_lie_next_to_the_dial(finished):
    _, out = finished
    kinds = {example.kind for example in ConflictSet.load(out / "conflicts.jsonl")}
    assert kinds == {"conflict", "aligned", "irrelevant", "none"}
