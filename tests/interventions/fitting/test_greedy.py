import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp import teacher_forcing
from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_model
from interp.reading import recalled
from interp.teacher_forcing import continued
from interventions.base import applied
from interventions.fitting import greedy
from interventions.fitting.greedy import greedy_heads
from interventions.heads import HeadScaling, ScaledHead
from tests.tiny import architecture_of, few_bridges, tiny_conflicts

tiny_bridge = few_bridges
HEADS = [(layer, head) for layer in range(3) for head in range(4)]
CONFLICTS = list(tiny_conflicts())[1:4]
# Of different lengths, and one with an answer of several tokens.
PROMPTS = [(e.prompt, e.context_answers[0]) for e in CONFLICTS[1:]]
PROMPTS.append((CONFLICTS[0].prompt, f"{CONFLICTS[0].context_answers[0]} of the land"))


@pytest.fixture
def wanted(tiny_bridge, monkeypatch):
    monkeypatch.setattr(teacher_forcing, "TOKENS_AT_ONCE", 50)
    items = [continued(tiny_bridge, *prompt) for prompt in PROMPTS]
    assert len(teacher_forcing.token_batches(tiny_bridge, items)) > 1
    assert len({item.predicted for item in items}) > 1
    return items


@pytest.fixture(scope="module")
def brute_force(tiny_bridge, tiny_plain):
    """The mean log p of the answers when heads are scaled: by plain transformers, prompt by prompt, all logits."""
    plain = tiny_plain(architecture_of(tiny_bridge))
    tokens = tiny_bridge.tokenizer
    pairs = [(tokens(prompt)["input_ids"], tokens(f"{prompt} {answer}")["input_ids"]) for prompt, answer in PROMPTS]

    def mean_log_p(scales):
        scaling = HeadScaling(tuple(ScaledHead(layer, head, scale) for (layer, head), scale in scales.items()))
        total = 0.0
        with torch.inference_mode(), applied(plain, scaling):
            for bare, full in pairs:
                log_p = plain(input_ids=torch.tensor([full])).logits[0].double().log_softmax(-1)
                total += sum(log_p[i - 1, full[i]].item() for i in range(len(bare), len(full)))
        return total / len(pairs)

    return mean_log_p


def without(brute_force, heads):
    return brute_force(dict.fromkeys(heads, 0.0))


def shortlists(monkeypatch):
    """The heads that are scored exactly, step by step, as they come."""
    seen, exact = [], greedy._exact
    monkeypatch.setattr(greedy, "_exact", lambda *arguments: seen.append(arguments[-1]) or exact(*arguments))
    return seen


def test_with_every_head_on_the_shortlist_each_step_takes_the_head_that_brute_force_takes(
    tiny_bridge, wanted, brute_force
):
    steps = greedy_heads(tiny_bridge, wanted, count=12, shortlist=12)
    gone = []
    for step in [*steps, None]:
        present = without(brute_force, gone)
        scores = {place: without(brute_force, [*gone, place]) for place in HEADS if place not in gone}
        best = max(scores, key=lambda place: scores[place])
        if step is None:
            assert scores[best] <= present, "it stops where no head helps any more"
        else:
            assert (step.layer, step.head) == best
            assert 0 < step.gain == pytest.approx(scores[best] - present, abs=1e-4)
            gone.append(best)
    assert 1 < len(gone) < 12


def test_a_shortlist_longer_than_the_model_has_heads_holds_them_all(tiny_llama):
    items = [continued(tiny_llama, *prompt) for prompt in PROMPTS]
    assert greedy_heads(tiny_llama, items, count=3, shortlist=100) == greedy_heads(
        tiny_llama, items, count=3, shortlist=12
    )


def test_never_more_heads_than_asked_for_are_removed(tiny_llama):
    items = [continued(tiny_llama, *prompt) for prompt in PROMPTS]
    more = greedy_heads(tiny_llama, items, count=2)
    assert len(more) == 2
    assert greedy_heads(tiny_llama, items, count=1) == more[:1]


def test_the_shortlist_holds_the_heads_with_the_largest_slope_given_those_that_are_gone(
    tiny_bridge, wanted, brute_force, monkeypatch
):
    seen = shortlists(monkeypatch)
    steps = greedy_heads(tiny_bridge, wanted, count=2, shortlist=3)
    gone, small = {}, 1e-2
    for number, shortlisted in enumerate(seen):
        slopes = {
            place: (brute_force({**gone, place: 1 + small}) - brute_force({**gone, place: 1 - small})) / (2 * small)
            for place in HEADS
            if place not in gone
        }
        assert shortlisted == sorted(slopes, key=lambda place: slopes[place])[:3]
        if number < len(steps):
            assert (steps[number].layer, steps[number].head) in shortlisted
            gone[steps[number].layer, steps[number].head] = 0.0


def test_the_first_order_effects_are_those_of_finite_differences(tiny_bridge, wanted, brute_force):
    gone, small = [(0, 1), (2, 3)], 1e-2
    effects = greedy._first_order(tiny_bridge, wanted, HEADS, gone)
    for place, effect in zip(HEADS, effects, strict=True):
        if place not in gone:
            ends = [brute_force({**dict.fromkeys(gone, 0.0), place: 1 + sign * small}) for sign in (1, -1)]
            assert effect == pytest.approx((ends[1] - ends[0]) / (2 * small), rel=2e-2, abs=1e-3)


def test_heads_that_do_nothing_are_not_removed(tiny_directories):
    model = load_model(str(tiny_directories["llama"]), device="cpu")
    anatomy = Anatomy(model)
    for layer in range(anatomy.n_layers):
        projection: Any = anatomy.module("output_projection", layer)
        projection.weight.data.zero_()
    assert greedy_heads(model, [continued(model, *prompt) for prompt in PROMPTS], count=3) == []


def test_of_each_batch_every_block_runs_only_for_heads_at_or_below_it_and_once_more(tiny_llama, monkeypatch):
    items = [continued(tiny_llama, *prompt) for prompt in PROMPTS]
    assert len(teacher_forcing.token_batches(tiny_llama, items)) == 1
    runs, handles = [0, 0, 0], []
    for layer in range(3):
        attention = Anatomy(tiny_llama).module("attention", layer)

        def counted(*_, layer=layer):
            runs[layer] += 1

        handles.append(attention.register_forward_hook(counted))
    greedy._exact(tiny_llama, items, [(1, 1)], [(2, 0), (0, 2), (1, 3), (2, 1)])
    for handle in handles:
        handle.remove()
    assert runs == [2, 3, 4]


def test_the_model_is_as_before_afterwards(tiny_bridge, wanted):
    inputs = encode(tiny_bridge, [prompt for prompt, _ in PROMPTS])

    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_bridge.modules())
        replaced = [m for m in tiny_bridge.modules() if "forward" in vars(m)]
        with torch.inference_mode():
            logits = tiny_bridge.original_model(**inputs).logits
        return logits, hooks, replaced, [parameter.grad is None for parameter in tiny_bridge.parameters()]

    before = state()
    greedy_heads(tiny_bridge, wanted, count=2, shortlist=4)
    after = state()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def test_blocks_get_their_forward_pass_back_after_an_error_even_if_it_was_their_own(tiny_directories):
    model = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"])
    anatomy = Anatomy(model)
    first, second = (vars(anatomy.module("block", layer)) for layer in (0, 1))
    own = first["forward"] = anatomy.module("block", 0).forward
    with pytest.raises(ZeroDivisionError), recalled(anatomy, 2, {}):
        assert first["forward"] is not own
        assert "forward" in second
        _ = 1 / 0
    assert first["forward"] is own
    assert "forward" not in second


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 0}, "Between 1 and 12 heads .* not 0"),
        ({"count": 13}, "Between 1 and 12 heads .* not 13"),
        ({"shortlist": 0}, "at least 1 head, not 0"),
        ({"wanted": []}, "there are none"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_llama, wrong, said):
    items = [continued(tiny_llama, *prompt) for prompt in PROMPTS]
    with pytest.raises(UserError, match=said):
        greedy_heads(tiny_llama, **{"wanted": items, "count": 1, **wrong})


def test_numbers_out_of_range_are_one_sentence(tiny_llama, monkeypatch):
    real = greedy.answer_losses
    monkeypatch.setattr(greedy, "answer_losses", lambda *arguments: real(*arguments) * math.nan)
    with pytest.raises(UserError, match="float32 or bfloat16"):
        greedy_heads(tiny_llama, [continued(tiny_llama, *prompt) for prompt in PROMPTS], count=1)
