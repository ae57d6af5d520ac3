"""What harnesses may ask of an edit; answers that are read token by token against passes that are edited by hand."""

import pytest
import torch

from conflictscope.elsewhere.edits import answer_logits, check_texts, chosen_edit, follows_prompts
from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.decoding import CAD
from interventions.dial import DialScale, TrustDial
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
ANSWERS = [[20, 21], [22], [23, 24, 25]]
# The tokens, of a prompt and its answer, that a direction is added at.
PLACES = {
    "last_prompt": lambda prompt, length: [prompt - 1][:length],
    "answer": lambda prompt, length: range(prompt - 1, length),
    "generated": lambda prompt, length: range(prompt, length),
    "prompt": lambda prompt, length: range(min(prompt, length)),
    "all": lambda prompt, length: [*range(prompt), *range(prompt, length)],
}


@pytest.fixture(scope="module")
def model(tiny_directories):
    return load_model(str(tiny_directories["llama"]), device="cpu")


@pytest.fixture
def saved(model, tmp_path):
    def save(*parts):
        path = tmp_path / "edit.json"
        InterventionFile.of(parts, name="edit", model=ModelIdentity.of(model, "tiny")).save(path)
        return path

    return save


@pytest.fixture(scope="module")
def direction(model):
    torch.manual_seed(0)
    return 3 * torch.randn(Anatomy(model).d_model)


def by_hand(model, layer, direction, places):
    """The logits that answers are predicted by, of one pass for each text with a direction added at its places."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        tokens = [*prompt, *answer][:-1]
        at = torch.zeros(len(tokens), 1)
        at[[*places(len(prompt), len(tokens))]] = 1
        handle = model.model.layers[layer].register_forward_hook(lambda _, __, out, at=at: _plus(out, at * direction))
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        handle.remove()
        found.append(logits[len(prompt) - 1 :])
    return found


def _plus(output, added):
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


@pytest.mark.parametrize("tokens", PLACES)
def test_answers_are_read_with_an_edit_at_the_tokens_that_it_is_meant_for(model, direction, tokens):
    with applied(model, Steering(1, direction, tokens=tokens)):
        logits = answer_logits(model, PROMPTS, ANSWERS)
    expected = by_hand(model, 1, direction, PLACES[tokens])
    for row, one in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[: len(one)], one, atol=1e-4, rtol=1e-4)


def test_a_gate_reads_the_end_of_each_prompt(model, direction):
    """Open or not, prompt by prompt: with a threshold between what two of them give, and never by what answers say."""
    probe = torch.ones_like(direction)
    ends = []
    for prompt in PROMPTS:
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        ends.append(float(states[1][0, -1] @ probe))
    threshold = sum(sorted(ends)[:2]) / 2
    with applied(model, ConflictGate("block", 0, probe, 0.0, threshold, (Steering(1, direction, tokens="all"),))):
        logits = answer_logits(model, PROMPTS, ANSWERS)
    plain = by_hand(model, 1, direction, lambda *_: [])
    edited = by_hand(model, 1, direction, PLACES["all"])
    for row, end, closed, opened in zip(logits, ends, plain, edited, strict=True):
        expected = opened if end > threshold else closed
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-4)


def test_prompts_that_go_on_with_earlier_ones_are_new(model, direction):
    with applied(model, Steering(1, direction, tokens="last_prompt")):
        answer_logits(model, [[5, 6]], [[7]])
        again = answer_logits(model, [[5, 6, 7]], [[8]])
    with applied(model, Steering(1, direction, tokens="last_prompt")):
        alone = answer_logits(model, [[5, 6, 7]], [[8]])
    torch.testing.assert_close(again, alone)


def test_only_edits_of_all_tokens_need_not_know_where_a_prompt_ends(saved, direction):
    steering = Steering(1, direction, tokens="last_prompt")
    everywhere = HeadScaling.of([(1, 1)], 0.0)
    gate = ConflictGate("block", 0, direction, 0.0, 0.0, (everywhere,))
    for part, expected in ((steering, True), (gate, True), (everywhere, False)):
        file = InterventionFile.load(saved(part))
        assert follows_prompts(file) == expected
        if expected:
            with pytest.raises(UserError, match="take tasks of output_type multiple_choice"):
                check_texts(file)
        else:
            check_texts(file)


def test_an_edit_is_taken_at_its_setting(saved):
    path = saved(TrustDial((DialScale(1, 1, 0.0, 2.0),), 0.0))
    chosen = chosen_edit(path, trust=0.5, strength=1.0)
    assert chosen is not None
    assert chosen.build() == [TrustDial((DialScale(1, 1, 0.0, 2.0),), 0.5)]
    assert chosen_edit(None, trust=None, strength=1.0) is None


@pytest.mark.parametrize("rule", [CAD(1.0), ConflictGate("block", 0, torch.ones(32), 0.0, 0.0, (CAD(1.0),))])
def test_a_rule_that_needs_prompts_without_their_contexts_is_refused(saved, rule):
    with pytest.raises(UserError, match="take an edit of the forward pass"):
        chosen_edit(saved(rule), trust=None, strength=1.0)


@pytest.mark.parametrize("setting", [{"trust": 0.5, "strength": 1.0}, {"trust": None, "strength": 0.5}])
def test_a_setting_without_an_edit_is_refused(setting):
    with pytest.raises(UserError, match=r"give its file: config=edit\.json"):
        chosen_edit(None, **setting)
