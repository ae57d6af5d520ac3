import pytest
import torch

from conflictscope.methods import dial as job
from conflictscope.methods.dial import DialEnds, asked_for_halfway, at, fitted_dial, save_dial
from conflictscope.methods.learned_scales import ENDS, LearnedScales
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import answer_token_ids, measure_usage, neutral_texts
from interp.facts import HELD_OUT_PHRASING
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.fitting.scale_training import ScaleTraining
from tests.conflictscope.methods.labs import tiny_lab

FEW = ScaleTraining(max_scales=3)


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        few = neutral_texts()[:4]
        for module in ("interp.evaluation", "conflictscope.study.measure"):
            patch.setattr(f"{module}.neutral_texts", lambda: few)
        patch.setattr(job, "SETTINGS", (-1.0, -0.5, 0.0, 1.0))
        yield


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    lab = tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))
    lab.budgets = dict.fromkeys(lab.budgets, 0.5)
    return lab


@pytest.fixture(scope="module")
def dial(lab):
    return fitted_dial(lab, FEW)


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_the_ends_do_what_was_learned_and_the_middle_nothing(lab, dial, towards):
    (learned,) = LearnedScales(FEW, strengths=(1.0,)).candidates(lab, towards)
    end = at(dial, ENDS[towards])
    assert end.digest == learned.digest
    assert end.towards == towards
    (given,) = DialEnds(dial).candidates(lab, towards)
    assert given.digest == end.digest
    assert (at(dial, 0.0).digest, at(dial, 0.0).towards) == (None, None)


def test_the_calibration_is_the_rate_of_first_tokens_on_dev(lab, dial):
    assert [point.trust for point in dial.calibration] == [-1.0, -0.5, 0.0, 1.0]
    for point in dial.calibration:
        first = []
        for example in lab.dev.conflicts:
            with torch.inference_mode(), applied(lab.model, dial.at(point.trust)):
                ids = lab.model.tokenizer(example.prompt, return_tensors="pt").input_ids
                first.append(lab.model.original_model(ids).logits[0, -1].argmax().item())
        pairs = [pair for e in lab.dev.conflicts if (pair := answer_token_ids(lab.model, e)) is not None]
        context = [token == pair[0] for token, pair in zip(first, pairs, strict=True)]
        memory = [token == pair[1] for token, pair in zip(first, pairs, strict=True)]
        assert point.context_rate == pytest.approx(sum(context) / len(context))
        assert point.memory_rate == pytest.approx(sum(memory) / len(memory))


@pytest.mark.parametrize("towards", ["context", "memory"])
def test_the_dial_is_asked_for_a_rate_halfway_and_measured_on_test(lab, dial, towards):
    asked = asked_for_halfway(lab, dial, towards)
    rates = {p.trust: p.context_rate if towards == "context" else p.memory_rate for p in dial.calibration}
    assert asked["rate"] == pytest.approx((rates[0.0] + rates[ENDS[towards]]) / 2)
    assert asked["trust"] == dial.trust_for(towards, asked["rate"])
    held_out = ConflictSet("held out", lab.prompts.test.select(kind="conflict", templates=[HELD_OUT_PHRASING]).examples)
    with applied(lab.model, dial.at(asked["trust"])):
        expected = measure_usage(lab.model, held_out, max_new_tokens=lab.new_tokens).rate(towards)
    assert asked["test"]["held_out_phrasing"] == expected.to_record()
    n = sum(found["n"] for found in asked["test"].values())
    assert n == len(lab.prompts.test.select(kind="conflict"))


def test_the_file_holds_the_dial_at_0_and_says_where_it_comes_from(lab, dial, tmp_path):
    save_dial(lab, dial, tmp_path, measured={"unedited": {"context_rate": 0.5}}, settings={"seed": 3, "max_scales": 3})
    file = InterventionFile.load(tmp_path / "dial.json")
    assert file.dial == dial
    assert file.measured == {"unedited": {"context_rate": 0.5}}
    assert (file.provenance.method, file.provenance.chosen_on) == ("learned_scales", "dev")
    assert (file.provenance.data, file.provenance.seed) == (lab.prompts.digest, 3)
    assert (tmp_path / "dial.html").exists()


def test_budgets_that_nothing_can_keep_are_one_sentence(lab):
    tight = lab.on(lab.prompts)
    tight.budgets = dict.fromkeys(lab.budgets, 1e-12)
    with pytest.raises(UserError, match="give a larger --budget or --context-budget"):
        fitted_dial(tight, FEW)
