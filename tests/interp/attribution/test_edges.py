from contextlib import ExitStack

import pytest
import torch

from interp.anatomy import Anatomy
from interp.attribution.edges import edge_attribution
from interp.attribution.examples import corrupted_partners, scorable
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.inputs import encode
from tests.tiny import tiny_conflicts


@pytest.fixture(scope="module")
def conflicts() -> ConflictSet:
    return tiny_conflicts()


def pair(model, conflicts):
    """The clean prompt, the one it is corrupted with, and the tokens of its two answers; all others are left out."""
    examples, ids = scorable(model, conflicts)
    lengths = {e.id: encode(model, [e.prompt])["input_ids"].shape[1] for e in examples}
    for example, answers in zip(examples, ids, strict=True):
        for other in examples:
            chosen = [example, other]
            alike = lengths[example.id] == lengths[other.id] and example.template == other.template
            if alike and {*example.memory_answers, *example.context_answers}.isdisjoint(
                {*other.memory_answers, *other.context_answers}
            ):
                assert corrupted_partners(chosen, 0) == [1, 0]
                return ConflictSet("two", tuple(chosen)), *(encode(model, [e.prompt]) for e in chosen), answers
    raise AssertionError("no two prompts of one length")


def difference(model, inputs, answers, hooks=()):
    """The logit difference of one prompt, with pre-hooks ``(module, hook)``."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        logits = Anatomy(model).model(**inputs).logits[0, -1].double()
    return logits[answers[0]] - logits[answers[1]]


def values_at(module, run, *, output):
    """What enters or leaves a module in a run."""
    seen = []

    def hook(_, inputs, result=None):
        seen.append(result if output else inputs[0])

    handle = (module.register_forward_hook if output else module.register_forward_pre_hook)(hook)
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


def test_what_the_embedding_does_adds_up_to_the_difference_between_the_prompts(tiny_bridge, conflicts):
    """Integrated gradients are complete (Sundararajan et al. 2017)."""
    two, clean, corrupted, answers = pair(tiny_bridge, conflicts)
    few, many = (edge_attribution(tiny_bridge, two, name="tiny", steps=steps).values[0].sum() for steps in (30, 60))
    reverse = scorable(tiny_bridge, two)[1][1]
    with torch.no_grad():
        expected = [
            difference(tiny_bridge, inputs, ids) - difference(tiny_bridge, others, ids)
            for inputs, others, ids in ((clean, corrupted, answers), (corrupted, clean, reverse))
        ]
    # The error of a sum at one end of each step falls with their number (Richardson).
    assert (2 * many - few).item() == pytest.approx(torch.stack(expected).mean().item(), rel=0.02, abs=1e-4)


def test_what_heads_do_is_the_gradient_at_what_they_write(tiny_bridge, conflicts):
    """With one step: the first-order effect of corrupting what a head adds to the residual stream at all tokens."""
    two, clean, corrupted, answers = pair(tiny_bridge, conflicts)
    anatomy = Anatomy(tiny_bridge)
    scores = edge_attribution(tiny_bridge, two, name="tiny", steps=1)
    for layer in range(anatomy.n_layers):
        projection = anatomy.module("output_projection", layer)
        written = [
            anatomy.head_writes(
                layer,
                values_at(
                    projection, lambda inputs=inputs: difference(tiny_bridge, inputs, answers), output=False
                ).unflatten(-1, (anatomy.n_heads, -1)),
            )[0]
            for inputs in (clean, corrupted)
        ]
        gradient = gradient_at(tiny_bridge, anatomy.module(anatomy.writing_part("attention"), layer), clean, answers)
        by_head = ((written[0] - written[1]) * gradient.unsqueeze(2)).sum((0, 1, 3))
        torch.testing.assert_close(scores.heads.values[0, layer], by_head.float(), rtol=1e-3, atol=1e-5)


def gradient_at(model, module, inputs, answers):
    """The logit difference's gradient at what a module puts out, ``(1, n_tokens, d_model)``."""
    offsets = []

    def moved(_, __, output):
        first = output[0] if isinstance(output, tuple) else output
        offsets.append(torch.zeros_like(first, requires_grad=True))
        return (first + offsets[0], *output[1:]) if isinstance(output, tuple) else first + offsets[0]

    handle = module.register_forward_hook(moved)
    difference(model, inputs, answers).backward()
    handle.remove()
    return offsets[0].grad


def test_an_edge_is_what_moving_along_it_changes(tiny_plain, conflicts):
    """Finite differences: what the receiver reads is moved by a little of what the sender writes differently."""
    model = tiny_plain("llama")
    two, clean, corrupted, answers = pair(model, conflicts)
    anatomy = Anatomy(model)
    scores = edge_attribution(model, two, name="tiny", steps=1)
    reverse = scorable(model, two)[1][1]
    mlp, norm, small = anatomy.module("mlp", 0), anatomy.module("attention_norm", 2), 1e-2
    effects = []
    for inputs, others, ids in ((clean, corrupted, answers), (corrupted, clean, reverse)):
        with torch.no_grad():
            ours, theirs = (
                values_at(mlp, lambda some=some, ids=ids: difference(model, some, ids), output=True)
                for some in (inputs, others)
            )
            up, down = (
                difference(model, inputs, ids, [(norm, lambda _, given, change=change: (given[0] + change,))])
                for change in (small * (ours - theirs), -small * (ours - theirs))
            )
        effects.append((up - down).item() / (2 * small))
    found = scores.values[scores.senders.index("mlp 0"), scores.receivers.index("attention 2")]
    assert found.item() == pytest.approx(sum(effects) / 2, rel=2e-2)


def test_edges_lead_from_earlier_parts_to_later_ones(tiny_bridge, conflicts):
    two, *_ = pair(tiny_bridge, conflicts)
    scores = edge_attribution(tiny_bridge, two, name="tiny")
    frame = scores.to_frame()
    edges = set(frame.select("sender", "receiver").iter_rows())
    parallel = Anatomy(tiny_bridge).parallel
    assert ("embedding", "attention 0") in edges
    assert (("1.0", "mlp 1") in edges) is not parallel
    assert not {("1.0", "attention 1"), ("mlp 1", "mlp 1"), ("mlp 1", "attention 1"), ("1.0", "mlp 0")} & edges
    assert frame["score"].abs().is_sorted(descending=True)
    assert scores.heads.values.shape == (2, Anatomy(tiny_bridge).n_layers, Anatomy(tiny_bridge).n_heads)
    assert scores.mlps.values.shape == (2, Anatomy(tiny_bridge).n_layers)


def test_scores_do_not_depend_on_what_prompts_run_together(tiny_llama, conflicts):
    together = edge_attribution(tiny_llama, conflicts, name="tiny", batch_size=8)
    alone = edge_attribution(tiny_llama, conflicts, name="tiny", batch_size=1)
    torch.testing.assert_close(together.values, alone.values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together.heads.values, alone.heads.values, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_scored_is_refused(tiny_llama, conflicts):
    with pytest.raises(UserError, match="at least one step"):
        edge_attribution(tiny_llama, conflicts, name="tiny", steps=0)
    with pytest.raises(UserError, match="the same number of tokens"):
        edge_attribution(tiny_llama, ConflictSet("one", conflicts.examples[:1]), name="tiny")
