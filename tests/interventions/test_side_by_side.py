"""Edits that read each prompt twice equal two passes of one prompt at a time, without a cache and without padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from interp.activations import record
from interp.anatomy import Anatomy
from interp.attention import attention_from_last
from interp.attribution.states import last_token_states
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import Intervention, applied
from interventions.config import InterventionFile
from interventions.decoding import CAD
from interventions.decore import DeCoRe
from interventions.dola import DoLa
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.juice import AddedHead, JuICE
from interventions.runtime import apply
from interventions.steering import Steering
from interventions.two_streams import generate
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges
JUICE = JuICE((AddedHead(0, 1, 3.0), AddedHead(1, 0, -2.0), AddedHead(2, 1, 1.0)))
DECORE = DeCoRe(((0, 1), (2, 0), (2, 1)), 2.0)
BOTH = pytest.mark.parametrize("edit", [JUICE, DECORE], ids=["juice", "decore"])
PROMPTS = ["The capital of France is", "In", "Lima is in Chile. Lima is in the country of", "A Canon is made by"]


def reference(model: Any, edit: Intervention, ids: Tensor) -> Tensor:
    """Logits ``(1, n_tokens, d_vocab)`` by the formulas of the two papers, with hooks of the test's own."""
    anatomy = Anatomy(model)
    network: Any = anatomy.model
    written: dict[int, Tensor] = {}

    def run(change: Callable[[int, Tensor], Tensor]) -> Tensor:
        def changed(layer: int, _: Any, inputs: Any) -> Any:
            return (change(layer, inputs[0]), *inputs[1:])

        with ExitStack() as stack, torch.inference_mode():
            for layer in range(anatomy.n_layers):
                module = anatomy.module("output_projection", layer)
                stack.callback(module.register_forward_pre_hook(partial(changed, layer)).remove)
            return network(input_ids=ids, use_cache=False).logits.clone()

    def keep(layer: int, z: Tensor) -> Tensor:
        written[layer] = z.clone()
        return z

    def heads(z: Tensor) -> Tensor:
        return z.view(*z.shape[:2], anatomy.n_heads, anatomy.d_head)

    whole = run(keep)
    if isinstance(edit, JuICE):

        def add(layer: int, z: Tensor) -> Tensor:
            z = z.clone()
            for one in edit.heads:
                if one.layer == layer:
                    heads(z)[:, :, one.head] += one.factor * heads(written[layer])[:, :, one.head]
            return z

        return run(add)
    assert isinstance(edit, DeCoRe)

    def leave_out(layer: int, z: Tensor) -> Tensor:
        z = z.clone()
        for at, head in edit.heads:
            if at == layer:
                heads(z)[:, :, head] = 0
        return z

    without = run(leave_out)
    p = whole.softmax(-1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    return (1 + edit.strength * entropy) * whole - edit.strength * entropy * without


def greedy(model: Any, edit: Intervention, prompt: str, steps: int) -> list[int]:
    ids = encode(model, [prompt])["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        ids = torch.cat([ids, reference(model, edit, ids)[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()


def generated(model: Any, prompts: list[str], **given: Any) -> Tensor:
    inputs = encode(model, prompts)
    network: Any = Anatomy(model).model
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | given
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return network.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@BOTH
def test_logits_of_every_token_are_those_of_two_passes(tiny_bridge, edit):
    network: Any = tiny_bridge.original_model
    inputs = encode(tiny_bridge, PROMPTS)
    with applied(tiny_bridge, edit), torch.inference_mode():
        logits = network(**inputs).logits
        last = network(**inputs, logits_to_keep=1).logits
    assert logits.shape[0] == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = encode(tiny_bridge, [prompt])["input_ids"]
        expected = reference(tiny_bridge, edit, ids)[0]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(last[row, -1], expected[-1], rtol=1e-3, atol=1e-4)


@BOTH
def test_generated_batches_equal_one_prompt_at_a_time_without_a_cache(tiny_bridge, edit):
    with applied(tiny_bridge, edit):
        answers = generated(tiny_bridge, PROMPTS).tolist()
        static = generated(tiny_bridge, PROMPTS, cache_implementation="static").tolist()
    assert answers == [greedy(tiny_bridge, edit, prompt, 5) for prompt in PROMPTS]
    assert static == answers


@BOTH
def test_it_changes_the_answers_and_the_model_is_as_before_afterwards(tiny_llama, edit):
    inputs = encode(tiny_llama, PROMPTS)
    network: Any = tiny_llama.original_model
    with torch.inference_mode():
        before = network(**inputs).logits
        with applied(tiny_llama, edit):
            assert (network(**inputs).logits - before).abs().max() > 1e-2
        assert torch.equal(network(**inputs).logits, before)


@BOTH
def test_at_strength_0_the_tokens_are_the_models_own(tiny_llama, edit):
    own = generated(tiny_llama, PROMPTS)
    with applied(tiny_llama, edit.scaled(0.0)):
        assert torch.equal(generated(tiny_llama, PROMPTS), own)
    assert edit.scaled(0.0).settled() == ()
    assert edit.scaled(2.0).scaled(0.5) == edit


@BOTH
def test_several_samples_of_a_prompt_have_the_tokens_that_the_scores_allow(tiny_llama, edit):
    with applied(tiny_llama, edit):
        torch.manual_seed(0)
        sampled = generated(tiny_llama, PROMPTS[:1], do_sample=True, top_k=1, num_return_sequences=3)
    assert sampled.tolist() == [greedy(tiny_llama, edit, PROMPTS[0], 5)] * 3


@BOTH
def test_behind_a_gate_prompts_that_do_not_open_it_are_left_alone(tiny_llama, edit):
    above = JuICE((AddedHead(2, 1, 3.0),)) if isinstance(edit, JuICE) else DeCoRe(((2, 0), (2, 1)), 2.0)
    inputs = encode(tiny_llama, PROMPTS)
    network: Any = tiny_llama.original_model
    with torch.inference_mode():
        own = network(**inputs).logits
        with applied(tiny_llama, above):
            edited = network(**inputs).logits
        # A probe that separates the prompts in the middle.
        last = network(**inputs, output_hidden_states=True).hidden_states[1][:, -1]
        weight = last[0] - last[1]
        sums = last @ weight
        gate = ConflictGate("block", 0, weight, 0.0, sums.median().item(), (above,))
        is_open = sums > sums.median()
        with applied(tiny_llama, gate):
            gated = network(**inputs).logits
    assert 0 < is_open.sum() < len(PROMPTS)
    assert not torch.allclose(own, edited, atol=1e-2)
    torch.testing.assert_close(gated, torch.where(is_open[:, None, None], edited, own), rtol=1e-4, atol=1e-4)


@BOTH
def test_edits_of_certain_tokens_act_on_both_readings(tiny_llama, edit):
    """Both orders: the tokens are told apart in the doubled rows."""
    steering = Steering(1, torch.full((Anatomy(tiny_llama).d_model,), 0.3), 1.0, "last_prompt", "add")
    inputs = encode(tiny_llama, PROMPTS)
    network: Any = tiny_llama.original_model
    with torch.inference_mode():
        with applied(tiny_llama, steering, edit):
            first = network(**inputs).logits[:, -1]
        with applied(tiny_llama, edit, steering):
            second = network(**inputs).logits[:, -1]
        with applied(tiny_llama, steering):
            expected = reference(tiny_llama, edit, encode(tiny_llama, PROMPTS[:1])["input_ids"])[:, -1]
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first[:1], expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_a_rule_for_two_prompts_weighs_edited_logits(tiny_llama, edit):
    example = tiny_conflicts().examples[0]
    network: Any = tiny_llama.original_model
    whole, bare = (encode(tiny_llama, [text]) for text in (example.prompt, example.prompt.split(". ")[-1]))
    with applied(tiny_llama, edit):
        answer = generate(
            network,
            CAD(1.0),
            input_ids=whole["input_ids"],
            without={"input_ids": bare["input_ids"]},
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )
    with_context, without = (reference(tiny_llama, edit, x["input_ids"])[0, -1] for x in (whole, bare))
    assert answer[0, -1] == (2 * with_context - without).argmax()


@BOTH
def test_files_hold_it_and_plain_transformers_applies_them(tiny_plain, tmp_path, edit):
    model = tiny_plain("llama")
    file = InterventionFile.of([edit], name="twice", model=ModelIdentity.of(model, "tiny"))
    file.save(tmp_path / "twice.json")
    assert InterventionFile.load(tmp_path / "twice.json").build() == [edit]
    ids = torch.tensor([[5, 9, 2, 7]])
    expected = reference(model, edit, ids)
    with apply(model, tmp_path / "twice.json"), torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="cannot be folded into weights"):
        edit.folded()


def test_what_an_edit_cannot_do_is_refused_in_a_sentence(tiny_llama):
    network: Any = tiny_llama.original_model
    inputs = encode(tiny_llama, PROMPTS)
    ids = inputs["input_ids"]
    with torch.inference_mode():
        cache = network(ids[:, :2], use_cache=True).past_key_values
    with applied(tiny_llama, JUICE):
        for options, message in (
            ({"num_beams": 2}, "does not generate by beams; set num_beams to 1"),
            ({"prompt_lookup_num_tokens": 2}, "by prompt lookup decoding"),
            ({"assistant_model": network}, "by assisted decoding"),
            ({"prefill_chunk_size": 2}, "by reading a prompt in chunks"),
            ({"generation_config": GenerationConfig(num_beams=3)}, "by beams"),
        ):
            with pytest.raises(UserError, match=message):
                network.generate(**inputs, max_new_tokens=2, **options)
        for given, message in (
            ({"labels": ids}, "not a loss; leave out labels"),
            ({"output_hidden_states": True}, "not hidden states"),
            ({"past_key_values": cache}, "kept without it; read the whole prompt"),
        ):
            with pytest.raises(UserError, match=message):
                network(input_ids=ids, **given)
        with pytest.raises(UserError, match="without a pass through the whole model"):
            network.forward(input_ids=ids)
        with pytest.raises(UserError, match="continuous batching, which packs"):
            network.init_continuous_batching()
        for other in (DECORE, DoLa((0, 1))):
            with pytest.raises(UserError, match="made of two by one edit, not by several"):
                other.attach(tiny_llama)
        for look in (
            lambda: record(tiny_llama, PROMPTS, ["blocks.0.hook_out"]),
            lambda: attention_from_last(tiny_llama, PROMPTS[0], [(0, 0)]),
            lambda: last_token_states(tiny_llama, PROMPTS),
        ):
            with pytest.raises(UserError, match="take the edit off to look into it"):
                look()
        # What failed leaves nothing behind.
        with torch.inference_mode():
            assert len(network(input_ids=ids).logits) == len(ids)
    for heads in ((AddedHead(9, 0, 1.0),), (AddedHead(0, 99, 1.0),)):
        with pytest.raises(UserError, match="does not exist"):
            JuICE(heads).attach(tiny_llama)
    with pytest.raises(UserError, match="listed twice"):
        DeCoRe(((0, 0), (0, 0)))
    with pytest.raises(UserError, match="give it one at least"):
        DeCoRe(())


def test_tuples_and_half_precision_are_given_as_without_it(tiny_directories):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"], dtype=torch.bfloat16).eval()
    ids = torch.tensor([[5, 9, 2, 7], [5, 9, 2, 8]])
    with applied(model, JUICE), torch.inference_mode():
        output, (logits, *_) = model(ids), model(ids, return_dict=False)
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (2, 7)
    assert output.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, logits)


def test_two_edits_refuse_each_what_it_cannot_do_in_whatever_order_they_come_and_go(tiny_llama):
    network: Any = tiny_llama.original_model
    inputs = encode(tiny_llama, PROMPTS)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    steering = Steering(1, torch.full((Anatomy(tiny_llama).d_model,), 0.3), 1.0, "last_prompt", "add")
    for first, second in ((JUICE, steering), (steering, JUICE)):
        handles = {id(edit): edit.attach(tiny_llama) for edit in (first, second)}
        with pytest.raises(UserError, match="by beams"):
            network.generate(**given, max_new_tokens=2, num_beams=2)
        with pytest.raises(UserError, match="prefill_chunk_size"):
            network.generate(**given, max_new_tokens=2, prefill_chunk_size=2)
        handles[id(JUICE)].remove()
        with pytest.raises(UserError, match="meant for certain tokens"):
            network.generate(**given, max_new_tokens=2, prefill_chunk_size=2)
        assert network.generate(**given, max_new_tokens=2, num_beams=2, pad_token_id=0).shape[0] == len(PROMPTS)
        handles[id(steering)].remove()
        assert "generate" not in vars(network)


def test_a_copy_of_an_edited_model_is_edited_as_well(tiny_plain):
    model = tiny_plain("llama")
    ids = torch.tensor([[5, 9, 2, 7]])
    with applied(model, JUICE), torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_one_head_with_a_factor_is_that_head_scaled(tiny_llama):
    """With nothing else edited below it, a head writes the same in both readings."""
    inputs = encode(tiny_llama, PROMPTS)
    network: Any = tiny_llama.original_model
    with torch.inference_mode():
        with applied(tiny_llama, JuICE((AddedHead(1, 0, 2.0),))):
            added = network(**inputs).logits
        with applied(tiny_llama, HeadScaling.of([(1, 0)], 3.0)):
            scaled = network(**inputs).logits
    torch.testing.assert_close(added, scaled, rtol=1e-4, atol=1e-4)
