"""Prompts that were read once, against full passes over them: the same logits and answers under any edit."""

from typing import Any

import pytest
import torch

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.generation import continue_greedily, gathered_logits, next_logits
from interp.inputs import token_ids
from interp.reading import ALL_LAYERS_AT_END, AtEnd, ReadPrompts
from interventions.base import applied, changed_by
from interventions.decoding import CAD
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.steering import Steering
from tests.interp.two_streams import two_passes_a_token
from tests.tiny import tiny_conflicts

# Five long ones and three short ones: in batches of four at most, one has to be padded.
PROMPTS = [example.prompt for example in (*list(tiny_conflicts())[1:10:2], *list(tiny_conflicts())[10::2])]


def direction(model, seed=0):
    return torch.randn(Anatomy(model).d_model, generator=torch.Generator().manual_seed(seed)) * 5


def edits_of(model):
    """Edits by what they change."""
    last = Anatomy(model).n_layers - 1
    vector = direction(model)
    gate = ConflictGate("block", 0, vector, 0.0, 0.0, (HeadScaling.of([(last, 0)], 0.0),))
    return [
        (ALL_LAYERS_AT_END, []),
        (AtEnd(0), [Steering(last, vector, 1.0, "last_prompt"), Steering(0, direction(model, 1), 1.0, "answer")]),
        (AtEnd(last), [Steering(last, vector, 1.0, "last_prompt")]),
        (last, [HeadScaling.of([(last, 0)], -3.0)]),
        (0, [HeadScaling.of([(last, 0)], 4.0), HeadScaling.of([(0, 1)], 0.0)]),
        (last, [Steering(last, vector, 1.0, "all")]),
        ("whole", [HeadScaling.of([(last, 1)], 0.0), Steering(0, vector, 1.0, "last_prompt")]),
        ("whole", [gate]),
    ]


@pytest.mark.parametrize(("most_kept", "ends"), [(2**30, False), (2**30, True), (0, True)])
def test_what_is_left_of_read_prompts_gives_what_whole_passes_give(tiny_bridge, most_kept, ends):
    """Again and again, in batches of different lengths, with residual streams kept and without."""
    read = ReadPrompts(tiny_bridge, PROMPTS, new_tokens=4, batch_size=4, ends=ends, most_kept=most_kept)
    lengths = [len(ids) for ids in token_ids(tiny_bridge.tokenizer, PROMPTS)]
    assert [len({lengths[i] for i in batch}) for batch in read.batches] == [1, 2]
    for changed, edits in [*edits_of(tiny_bridge), (ALL_LAYERS_AT_END, [])]:
        assert changed_by(edits) == changed
        with applied(tiny_bridge, *edits):
            expected = gathered_logits(next_logits(tiny_bridge, PROMPTS), len(PROMPTS))
            found = gathered_logits(read.next_logits(changed), len(PROMPTS))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            watch = torch.tensor([[3, 7]] * len(PROMPTS))
            plain = continue_greedily(tiny_bridge, PROMPTS, watch=watch, max_new_tokens=4)
            answers = read.continue_greedily(changed, watch=watch, max_new_tokens=4)
        assert answers.answers == plain.answers
        assert answers.first_tokens.tolist() == plain.first_tokens.tolist()
        torch.testing.assert_close(answers.first_logits, plain.first_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most_kept", [2**30, 0])
def test_rules_for_the_next_token_go_on_from_pairs_that_were_read_once(tiny_bridge, most_kept):
    examples = [e for e in tiny_conflicts() if e.prompt in PROMPTS]
    prompts, bare = [e.prompt for e in examples], [e.bare_prompt or e.prompt for e in examples]
    # One has no context to leave out.
    bare[0] = prompts[0]
    read = ReadPrompts(tiny_bridge, prompts, without=bare, new_tokens=4, batch_size=3, most_kept=most_kept)
    widths = []
    network: Any = transformers_model(tiny_bridge)
    handle = network.get_input_embeddings().register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    watch = torch.tensor([[3, 7]] * len(prompts))
    for rule in (CAD(1.5), CAD(-0.7)):
        found = read.continue_greedily(watch=watch, combined=rule.scores, max_new_tokens=4)
        assert (max(widths) == 1) == bool(most_kept)
        expected = [two_passes_a_token(tiny_bridge, *pair, rule.scores, 4) for pair in zip(prompts, bare, strict=True)]
        assert found.answers == expected
        anew = continue_greedily(
            tiny_bridge, prompts, watch=watch, without=bare, combined=rule.scores, max_new_tokens=4
        )
        torch.testing.assert_close(found.first_logits, anew.first_logits, rtol=1e-4, atol=1e-4)
        widths.clear()
    handle.remove()


def test_a_rule_without_pairs_and_pairs_without_a_rule_are_refused(tiny_llama):
    alone, pairs = ReadPrompts(tiny_llama, PROMPTS[:2]), ReadPrompts(tiny_llama, PROMPTS[:2], without=PROMPTS[2:4])
    for read, rule in ((alone, CAD(1.0).scores), (pairs, None)):
        with pytest.raises(UserError, match="without their contexts too"):
            read.continue_greedily(combined=rule)


def test_a_beginning_that_prompts_share_is_read_once_and_answers_stay(tiny_llama):
    shots = "The capital of Peru is Lima. The capital of Chile is Santiago."
    prompts = [f"{shots} {prompt}" for prompt in PROMPTS]
    widths = []
    body = Anatomy(tiny_llama).body
    handle = body.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    read = ReadPrompts(tiny_llama, prompts, new_tokens=4, batch_size=4, edited=False)
    handle.remove()
    shared = len(token_ids(tiny_llama.tokenizer, [shots])[0])
    assert len(read.batches) == 2
    # Of each batch the beginning in one row, then the rest in all rows.
    assert [rows for rows, _ in widths] == [1, 4, 1, 4]
    for (_, beginning), (_, rest), batch in zip(widths[::2], widths[1::2], range(2), strict=True):
        assert beginning >= shared
        assert 4 * (beginning + rest + 1) == read.padded_tokens(batch)
    found, expected = (
        gathered_logits(batches, len(prompts)) for batches in (read.next_logits(), next_logits(tiny_llama, prompts))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = continue_greedily(tiny_llama, prompts, max_new_tokens=4)
    assert read.continue_greedily(max_new_tokens=4).answers == plain.answers


@pytest.mark.parametrize("prompts", [["one"], [PROMPTS[0]] * 3, [PROMPTS[0], "It"], PROMPTS])
def test_prompts_of_which_no_beginning_is_shared_or_all_are_read_as_they_are(tiny_llama, prompts):
    found, expected = (
        gathered_logits(batches, len(prompts))
        for batches in (
            ReadPrompts(tiny_llama, prompts, edited=False).next_logits(),
            next_logits(tiny_llama, prompts),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ends", [False, True])
def test_layers_below_an_edit_are_not_run_again(tiny_llama, ends):
    read = ReadPrompts(tiny_llama, PROMPTS, ends=ends)
    anatomy = Anatomy(tiny_llama)
    widths = []
    handles = [
        anatomy.module("mlp", layer).register_forward_hook(
            lambda _, inputs, __, layer=layer: widths.append((layer, inputs[0].shape[1]))
        )
        for layer in (0, 1)
    ]
    list(read.next_logits(1))
    assert {width for layer, width in widths if layer == 0} == ({1} if not ends else set())
    assert max(width for layer, width in widths if layer == 1) > 1
    widths.clear()
    list(read.next_logits(AtEnd(1)))
    assert set(widths) == {(1, 1)} | ({(0, 1)} if not ends else set())
    for handle in handles:
        handle.remove()


def test_no_more_than_an_eighth_of_a_small_memory_is_kept(tiny_llama, monkeypatch):
    def left(memory):
        monkeypatch.setattr("interp.reading.device_memory", lambda _: memory)
        return ReadPrompts(tiny_llama, [])._left

    assert [left(memory) for memory in (8 * 2**30, 64 * 2**30, None)] == [2**29, 2**31, 2**31]


def test_a_prompt_of_one_token_is_read_whole(tiny_llama):
    prompts = ["Rome Rome Rome", tiny_llama.tokenizer.decode([5])]
    read = ReadPrompts(tiny_llama, prompts)
    expected = gathered_logits(next_logits(tiny_llama, prompts), 2)
    torch.testing.assert_close(gathered_logits(read.next_logits(), 2), expected, rtol=1e-5, atol=1e-5)
    assert read.continue_greedily().answers == continue_greedily(tiny_llama, prompts).answers


def test_no_more_is_kept_than_is_allowed(tiny_llama):
    """Prompts beyond are read whole each time, and give the same."""
    expected = gathered_logits(next_logits(tiny_llama, PROMPTS), len(PROMPTS))
    for kept in (0, 2**10, 2**30):
        read = ReadPrompts(tiny_llama, PROMPTS, batch_size=2, most_kept=kept)
        caches = [b.cache for b in read._batches if b.cache is not None]
        sizes = [sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) for cache in caches]
        # The batch that goes beyond it is the last.
        assert sum(sizes[:-1]) <= kept // 2
        torch.testing.assert_close(gathered_logits(read.next_logits(), len(PROMPTS)), expected, rtol=1e-4, atol=1e-4)
    assert len(caches) == len(PROMPTS) // 2


def test_no_prompts_give_nothing(tiny_llama):
    assert ReadPrompts(tiny_llama, []).continue_greedily().answers == []
