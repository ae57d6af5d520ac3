import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import Handle, applied, attach_patches
from interventions.residual import residual_patches
from interventions.steering import Steering
from interventions.tokens import TOKENS, TokenTracker
from tests.tiny import tiny_conflicts

STEPS = 4
PROMPTS = [e.prompt for e in tiny_conflicts()][:4]


def change(seed: int) -> Callable[[Tensor], Tensor]:
    """An edit of the order of the residual stream, which depends on it."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 2
    return lambda residual: direction - 0.5 * residual.float()


CHANGES = {0: change(0), 2: change(1)}


class Edit:
    """The edit under test, as an intervention."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def attach(self, model: nn.Module) -> Handle:
        return attach_patches(model, residual_patches(CHANGES, self.tokens))


def expected_mask(tokens: str, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Which columns are meant where prompts, padded on the left, end at ``prompt_length``, and text follows."""
    rows, length = attention_mask.shape
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for column in range(length):
            mask[row, column] = {
                "last_prompt": column == prompt_length - 1,
                "answer": column >= prompt_length - 1,
                "generated": column >= prompt_length,
                "prompt": column < prompt_length and bool(attention_mask[row, column]),
                "all": bool(attention_mask[row, column]),
            }[tokens]
    return mask


def by_hand(model: nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Logits of one whole forward pass whose residual stream is edited where ``mask`` says."""
    anatomy = Anatomy(model)

    def hook(layer: int) -> Any:
        def edit(_: nn.Module, __: Any, output: Any) -> Any:
            residual = output[0] if isinstance(output, tuple) else output
            edited = torch.where(mask[..., None], residual + CHANGES[layer](residual), residual)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    handles = [anatomy.module("block", layer).register_forward_hook(hook(layer)) for layer in CHANGES]
    try:
        with torch.inference_mode():
            network: Any = anatomy.model
            return network(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def greedy_by_hand(model: nn.Module, inputs: dict[str, Tensor], tokens: str) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``(rows, STEPS)`` and logits ``(rows, STEPS, d_vocab)`` of whole passes over prompt and text."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]
    steps = []
    for _ in range(STEPS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = by_hand(model, whole, expected_mask(tokens, mask, length))[:, -1]
        steps.append(logits)
        ids = torch.cat([ids, without_end(logits).argmax(-1, keepdim=True)], -1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return ids[:, length:], torch.stack(steps, 1)


def without_end(logits: Tensor) -> Tensor:
    """As ``min_new_tokens`` makes ``generate`` go on."""
    ended = logits.clone()
    ended[:, 0] = -torch.inf
    return ended


def generated(model: nn.Module, inputs: dict[str, Tensor], *, cached: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """Generated tokens and their logits, as ``greedy_by_hand``."""
    network: Any = transformers_model(model)
    output = network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        use_cache=cached,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    network: Any = transformers_model(model)
    with torch.inference_mode():
        return network(**inputs).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def inputs(tiny_bridge):
    batch = encode(tiny_bridge, PROMPTS)
    assert (batch["attention_mask"] == 0).any()
    return batch


@pytest.fixture(scope="module")
def plain(tiny_bridge):
    """The same weights as a plain transformers model, freshly loaded."""
    directory = tiny_bridge.original_model.config._name_or_path
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


# One pass


@pytest.mark.parametrize("tokens", TOKENS)
def test_in_a_prompt_exactly_the_meant_tokens_are_edited(tiny_bridge, inputs, tokens):
    mask = inputs["attention_mask"]
    expected = by_hand(tiny_bridge, inputs, expected_mask(tokens, mask, mask.shape[1]))
    with applied(tiny_bridge, Edit(tokens)):
        close(forward(tiny_bridge, inputs)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_bridge_itself_is_edited_too(tiny_bridge, inputs, tokens):
    mask = inputs["attention_mask"]
    expected = by_hand(tiny_bridge, inputs, expected_mask(tokens, mask, mask.shape[1]))
    with applied(tiny_bridge, Edit(tokens)), torch.inference_mode():
        found = tiny_bridge(inputs["input_ids"], attention_mask=mask, position_ids=inputs["position_ids"])
    close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("tokens", TOKENS)
def test_where_prompts_are_padded_on_the_right_the_last_real_token_is_meant(tiny_bridge, tokens):
    batch = tiny_bridge.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    meant = torch.zeros_like(mask, dtype=torch.bool)
    for row, length in enumerate(mask.sum(-1).tolist()):
        if tokens in ("last_prompt", "answer"):
            meant[row, length - 1] = True
        elif tokens != "generated":
            meant[row, :length] = True
    whole = {"input_ids": ids, "attention_mask": mask}
    expected = by_hand(tiny_bridge, whole, meant)
    with applied(tiny_bridge, Edit(tokens)):
        found = forward(tiny_bridge, whole)
        close(found[mask.bool()], expected[mask.bool()])
        for row, length in enumerate(mask.sum(-1).tolist()):
            alone = forward(tiny_bridge, {"input_ids": ids[row : row + 1, :length]})
            close(found[row, :length], alone[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_choice_edits_padding(tiny_bridge, side):
    batch = tiny_bridge.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    anatomy = Anatomy(tiny_bridge)
    seen: list[Tensor] = []

    def see(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    for tokens in TOKENS:
        seen.clear()
        for edit in ((), (Edit(tokens),)):
            with applied(tiny_bridge, *edit):
                handle = anatomy.module("block", 0).register_forward_hook(see)
                forward(tiny_bridge, dict(batch))
                handle.remove()
        assert torch.equal(seen[1][padding], seen[0][padding])
        assert torch.equal(seen[1], seen[0]) == (tokens == "generated")


def test_without_a_mask_every_token_is_real(tiny_llama):
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    expected = by_hand(tiny_llama, {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
    with applied(tiny_llama, Edit("all")):
        close(forward(tiny_llama, {"input_ids": ids}), expected)


def test_a_prompt_can_be_given_by_position_or_as_embeddings(tiny_llama):
    network: Any = transformers_model(tiny_llama)
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    with applied(tiny_llama, Edit("last_prompt")), torch.inference_mode():
        expected = network(input_ids=ids).logits
        assert torch.equal(network(ids).logits, expected)
        close(network(inputs_embeds=network.get_input_embeddings()(ids)).logits, expected)


# Generated text


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_while_text_is_generated_exactly_the_meant_tokens_are_edited(tiny_bridge, plain, inputs, tokens, cached):
    expected_tokens, expected_logits = greedy_by_hand(plain, inputs, tokens)
    for model in (plain, tiny_bridge.original_model):
        with applied(model, Edit(tokens)):
            found_tokens, found_logits = generated(model, inputs, cached=cached)
        assert torch.equal(found_tokens, expected_tokens)
        close(found_logits, expected_logits)


def test_each_choice_of_tokens_says_something_else(tiny_bridge, inputs):
    said = []
    for tokens in TOKENS:
        with applied(tiny_bridge, Edit(tokens)):
            said.append(generated(tiny_bridge, inputs, cached=True)[1])
    said.append(generated(tiny_bridge, inputs, cached=True)[1])
    for i in range(len(said)):
        for j in range(i):
            assert (said[i][:, -1] - said[j][:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_prompt_is_answered_alike_alone_and_in_a_batch(tiny_bridge, inputs, tokens, cached):
    with applied(tiny_bridge, Edit(tokens)):
        batch_tokens, batch_logits = generated(tiny_bridge, inputs, cached=cached)
        for row, prompt in enumerate(PROMPTS):
            alone_tokens, alone_logits = generated(tiny_bridge, encode(tiny_bridge, [prompt]), cached=cached)
            assert torch.equal(batch_tokens[row], alone_tokens[0])
            close(batch_logits[row], alone_logits[0])


@pytest.mark.parametrize("tokens", TOKENS)
def test_beam_search_finds_the_same_with_and_without_cache(tiny_bridge, inputs, tokens):
    with applied(tiny_bridge, Edit(tokens)):
        cached, _ = generated(tiny_bridge, inputs, cached=True, num_beams=3)
        uncached, _ = generated(tiny_bridge, inputs, cached=False, num_beams=3)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_static_cache_gives_the_same_text(tiny_bridge, plain, inputs, tokens):
    expected_tokens, expected_logits = greedy_by_hand(plain, inputs, tokens)
    with applied(plain, Edit(tokens)):
        found_tokens, found_logits = generated(
            plain, inputs, cached=True, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(found_tokens, expected_tokens)
    close(found_logits, expected_logits)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_cache_that_the_model_makes_itself_is_followed(plain, inputs, tokens):
    expected, expected_logits = greedy_by_hand(plain, inputs, tokens)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    said, steps = [], []
    with applied(plain, Edit(tokens)), torch.inference_mode():
        output = plain(**inputs, use_cache=True)
        for _ in range(STEPS):
            steps.append(output.logits[:, -1])
            ids = without_end(steps[-1]).argmax(-1, keepdim=True)
            said.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], -1)
            positions = mask.sum(-1, keepdim=True) - 1
            cache = output.past_key_values
            output = plain(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert torch.equal(torch.cat(said, -1), expected)
    close(torch.stack(steps, 1), expected_logits)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_known_by_the_names_that_versions_of_transformers_give_it(name):
    tracker, cache = TokenTracker("generated"), DynamicCache()
    tracker.see([], nn.Identity(), (), {"input_ids": torch.ones(1, 3, dtype=torch.long), name: cache})
    cache.update(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), 0)
    tracker.see([], nn.Identity(), (), {"input_ids": torch.ones(1, 1, dtype=torch.long), name: cache})
    mask = tracker.mask(torch.device("cpu"))
    assert mask is not None
    assert mask.tolist() == [[True]]


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_bridge_generates_the_same_with_and_without_cache(tiny_llama, tokens):
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    expected, _ = greedy_by_hand(tiny_llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens)
    with applied(tiny_llama, Edit(tokens)), torch.inference_mode():
        for cached in (True, False):
            said = tiny_llama.generate(
                ids,
                max_new_tokens=STEPS,
                stop_at_eos=False,
                do_sample=False,
                use_past_kv_cache=cached,
                return_type="tokens",
                verbose=False,
            )
            assert torch.equal(said[:, ids.shape[1] :], expected), f"use_past_kv_cache={cached}"


# However the model is called


@pytest.mark.parametrize("tokens", TOKENS)
def test_arguments_given_by_position_are_edited_as_those_given_by_name(tiny_bridge, plain, inputs, tokens):
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    by_name = dict(inputs)
    order = list(inspect.signature(type(plain).forward).parameters)[1:]
    by_position = [by_name.get(name) for name in order[: order.index("position_ids") + 1]]
    expected = by_hand(plain, by_name, expected_mask(tokens, mask, ids.shape[1]))
    for model in (plain, tiny_bridge.original_model):
        with applied(model, Edit(tokens)), torch.inference_mode():
            # What a pass leaves behind must not matter.
            generated(model, encode(tiny_bridge, PROMPTS[:2]), cached=True)
            for called in (model, model.forward):
                close(called(*by_position).logits[mask.bool()], expected[mask.bool()])
                close(
                    called(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()], expected[mask.bool()]
                )


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_cache_given_by_position_is_followed(plain, inputs, tokens):
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    length = ids.shape[1] - 1
    # One prompt, and one token of text after it.
    expected = by_hand(plain, inputs, expected_mask(tokens, mask, length))[:, -1]
    order = list(inspect.signature(type(plain).forward).parameters)[1:]
    with applied(plain, Edit(tokens)), torch.inference_mode():
        for called in (plain, plain.forward):
            cache = called(
                input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True
            ).past_key_values
            last = {
                "input_ids": ids[:, -1:],
                "attention_mask": mask,
                "position_ids": positions[:, -1:],
                "past_key_values": cache,
            }
            given = max(order.index(name) for name in last) + 1
            close(called(*(last.get(name) for name in order[:given])).logits[:, -1], expected)


def test_a_part_that_is_called_by_itself_is_refused(tiny_llama):
    network: Any = transformers_model(tiny_llama)
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    with applied(tiny_llama, Edit("last_prompt")), torch.inference_mode():
        for _ in range(2):
            with pytest.raises(UserError, match="call the model, not a part of it"):
                network.model.forward(ids)
            network.generate(ids, max_new_tokens=2)


def test_arguments_by_position_that_have_no_name_are_refused():
    with pytest.raises(UserError, match="give its arguments by name"):
        TokenTracker("answer").see(["input_ids"], nn.Identity(), (torch.ones(1, 3), torch.ones(1, 3)), {})


# A new prompt


def test_another_prompt_after_one_is_a_new_prompt(tiny_llama):
    """Also where it is longer by one token, shorter, of another number of rows, or the same."""
    ids = tiny_llama.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    other = ids.flip(-1)
    longer = torch.cat([ids[:, -1:], ids], -1)
    one = ids[:, :1]
    prompts = [ids, other, longer, ids, ids, one, one, ids[:, :5], torch.cat([ids, other]), other]
    for tokens in TOKENS:
        with applied(tiny_llama, Edit(tokens)):
            for prompt in prompts:
                meant = expected_mask(tokens, torch.ones_like(prompt), prompt.shape[1])
                found = forward(tiny_llama, {"input_ids": prompt})
                close(found, by_hand_beside(tiny_llama, prompt, meant))


def by_hand_beside(model: nn.Module, ids: Tensor, meant: Tensor) -> Tensor:
    """``by_hand`` on a copy of the model to which nothing is attached."""
    network: Any = transformers_model(model)
    copy = AutoModelForCausalLM.from_pretrained(network.config._name_or_path, attn_implementation="eager").eval()
    return by_hand(copy, {"input_ids": ids}, meant)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_an_answer_does_not_depend_on_what_was_generated_before(tiny_bridge, inputs, tokens, cached):
    first = encode(tiny_bridge, PROMPTS[:2])
    with applied(tiny_bridge, Edit(tokens)):
        expected, expected_logits = generated(tiny_bridge, inputs, cached=cached)
    with applied(tiny_bridge, Edit(tokens)):
        for before in (first, inputs, first):
            generated(tiny_bridge, before, cached=cached)
            forward(tiny_bridge, before)
            found, found_logits = generated(tiny_bridge, inputs, cached=cached)
            assert torch.equal(found, expected)
            assert torch.equal(found_logits, expected_logits)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_second_prompt_on_the_same_cache_has_a_last_token_of_its_own(tiny_bridge, plain, tokens):
    ids = encode(tiny_bridge, PROMPTS[:1])["input_ids"]
    second = ids[:, 3:8]
    # The first prompt's edits stay in the cache.
    meant = torch.cat(
        [
            expected_mask(tokens, torch.ones_like(ids), ids.shape[1]),
            expected_mask(tokens, torch.ones_like(second), second.shape[1]),
        ],
        -1,
    )
    expected = by_hand(plain, {"input_ids": torch.cat([ids, second], -1)}, meant)[:, ids.shape[1] :]
    with applied(plain, Edit(tokens)), torch.inference_mode():
        cache = plain(input_ids=ids, use_cache=True).past_key_values
        found = plain(input_ids=second, past_key_values=cache).logits
    close(found, expected)


def test_edits_of_different_tokens_do_not_disturb_each_other(tiny_bridge, inputs):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    once = Steering(1, vector, tokens="last_prompt")
    later = Steering(1, vector, tokens="generated")
    with applied(tiny_bridge, once, later):
        found, found_logits = generated(tiny_bridge, inputs, cached=True)
    with applied(tiny_bridge, Steering(1, vector, tokens="answer")):
        expected, expected_logits = generated(tiny_bridge, inputs, cached=True)
    assert torch.equal(found, expected)
    close(found_logits, expected_logits)


# Attached and removed


def test_a_removed_edit_leaves_the_model_as_it_was_bit_for_bit(tiny_bridge, inputs):
    before = forward(tiny_bridge, inputs)
    for tokens in TOKENS:
        handle = Edit(tokens).attach(tiny_bridge)
        assert torch.equal(forward(tiny_bridge, inputs), before) == (tokens == "generated")
        handle.remove()
        assert torch.equal(forward(tiny_bridge, inputs), before)
    assert not transformers_model(tiny_bridge)._forward_pre_hooks


def test_an_edit_of_a_layer_that_does_not_exist_leaves_nothing_attached(tiny_llama):
    batch = encode(tiny_llama, PROMPTS[:1])
    before = forward(tiny_llama, batch)
    with pytest.raises(UserError, match="Layer 3 does not exist"):
        attach_patches(tiny_llama, residual_patches({0: change(0), 3: change(0)}, "all"))
    assert torch.equal(forward(tiny_llama, batch), before)
    assert not transformers_model(tiny_llama)._forward_pre_hooks


def test_an_edit_of_no_layer_changes_no_bit(tiny_llama):
    batch = encode(tiny_llama, PROMPTS[:1])
    before = forward(tiny_llama, batch)
    with attach_patches(tiny_llama, residual_patches({}, "all")):
        assert torch.equal(forward(tiny_llama, batch), before)


def test_a_choice_of_tokens_that_does_not_exist_is_refused():
    unknown: Any = "first"
    with pytest.raises(UserError, match="no choice of tokens 'first'; choose among last_prompt, answer"):
        TokenTracker(unknown)
