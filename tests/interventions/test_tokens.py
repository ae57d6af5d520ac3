"""Which tokens an edit acts on, for every choice at once.

The rows of a batch are in as many groups as there are choices of tokens; in each group the edit acts at another choice.
So one pass shows that every choice is kept to, and that they do not disturb each other.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import Handle, applied, attach_patches
from interventions.residual import residual_patches
from interventions.steering import Steering
from interventions.tokens import TOKENS, TokenTracker
from tests.tiny import FEW, architecture_of, tiny_conflicts

STEPS = 4
PROMPTS = [e.prompt for e in tiny_conflicts()][:4]
# A plain forward pass over prompt and text is compared in all of them; what only generation tells in few.
few_bridges = pytest.mark.parametrize("tiny_bridge", FEW, indirect=True)
cache_or_not = pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])


def change(seed: int) -> Callable[[Tensor], Tensor]:
    """An edit of the order of the residual stream, which depends on it."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 2
    return lambda residual: direction - 0.5 * residual.float()


CHANGES = {0: change(0), 2: change(1)}


def choice_of_rows(n_rows: int, choices: Sequence[str] = TOKENS) -> list[str]:
    """The choice of tokens in each row: as many rows for each, one group after the other."""
    return [choices[row * len(choices) // n_rows] for row in range(n_rows)]


class Edit:
    """The edit under test, as an intervention: in each group of rows at another choice of tokens."""

    def __init__(self, *choices: Any) -> None:
        self.choices = choices or TOKENS

    def attach(self, model: nn.Module) -> Handle:
        patches = [
            patch._replace(change=self.in_its_rows(tokens, patch.change))
            for tokens in self.choices
            for patch in residual_patches(CHANGES, tokens)
        ]
        return attach_patches(model, patches)

    def in_its_rows(self, tokens: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def edit_its_rows(residual: Tensor) -> Tensor:
            own = torch.tensor([choice == tokens for choice in choice_of_rows(len(residual), self.choices)])
            return torch.where(own[:, None, None], edit(residual), residual)

        return edit_its_rows


def for_every_choice(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows once for each choice of tokens."""
    return {name: values.repeat(len(TOKENS), 1) for name, values in inputs.items()}


def expected_mask(attention_mask: Tensor, prompt_length: int, choices: Sequence[str] = TOKENS) -> Tensor:
    """Which columns are meant where prompts, padded on the left, end at ``prompt_length``, and text follows."""
    rows, length = attention_mask.shape
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, tokens in enumerate(choice_of_rows(rows, choices)):
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


def greedy_by_hand(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``(rows, STEPS)`` and logits ``(rows, STEPS, d_vocab)`` of whole passes over prompt and text."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]
    steps = []
    for _ in range(STEPS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = by_hand(model, whole, expected_mask(mask, length))[:, -1]
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


def close(found: Tensor, expected: Tensor, choices: Sequence[str] = TOKENS) -> None:
    """See that they are the same in the rows of every choice."""
    assert found.shape == expected.shape
    for tokens in choices:
        own = torch.tensor([choice == tokens for choice in choice_of_rows(len(found), choices)])
        torch.testing.assert_close(
            found[own], expected[own], rtol=1e-4, atol=1e-4, msg=lambda text, tokens=tokens: f"{tokens}: {text}"
        )


def close_where_real(found: Tensor, expected: Tensor, attention_mask: Tensor) -> None:
    """The same, but what stands at padding is no matter."""
    real = attention_mask.bool()[..., None]
    close(found.where(real, 0), expected.where(real, 0))


@pytest.fixture
def inputs(tiny_bridge):
    batch = encode(tiny_bridge, PROMPTS)
    assert (batch["attention_mask"] == 0).any()
    return for_every_choice(batch)


@pytest.fixture
def plain(tiny_bridge, tiny_plain):
    """The same weights as a plain transformers model."""
    return tiny_plain(architecture_of(tiny_bridge))


# One pass


def test_in_a_prompt_exactly_the_meant_tokens_are_edited(tiny_bridge, inputs):
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    expected = by_hand(tiny_bridge, inputs, expected_mask(mask, mask.shape[1]))
    with applied(tiny_bridge, Edit()), torch.inference_mode():
        close_where_real(forward(tiny_bridge, inputs), expected, mask)
        close_where_real(tiny_bridge(inputs["input_ids"], attention_mask=mask, position_ids=positions), expected, mask)


@few_bridges
def test_where_prompts_are_padded_on_the_right_the_last_real_token_is_meant(tiny_bridge):
    batch = for_every_choice(tiny_bridge.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right"))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    meant, lengths = torch.zeros_like(mask, dtype=torch.bool), mask.sum(-1).tolist()
    for row, (length, tokens) in enumerate(zip(lengths, choice_of_rows(len(mask)), strict=True)):
        if tokens in ("last_prompt", "answer"):
            meant[row, length - 1] = True
        elif tokens != "generated":
            meant[row, :length] = True
    whole = {"input_ids": ids, "attention_mask": mask}
    expected = by_hand(tiny_bridge, whole, meant)
    with applied(tiny_bridge, Edit()):
        found = forward(tiny_bridge, whole)
        close_where_real(found, expected, mask)
        for row in range(len(PROMPTS)):
            same = slice(row, None, len(PROMPTS))
            close(found[same, : lengths[row]], forward(tiny_bridge, {"input_ids": ids[same, : lengths[row]]}))


@few_bridges
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_choice_edits_padding(tiny_bridge, side):
    batch = for_every_choice(tiny_bridge.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    anatomy = Anatomy(tiny_bridge)
    seen: list[Tensor] = []

    def see(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    for edit in ((), (Edit(),)):
        with applied(tiny_bridge, *edit):
            handle = anatomy.module("block", 0).register_forward_hook(see)
            forward(tiny_bridge, batch)
            handle.remove()
    assert torch.equal(seen[1][padding], seen[0][padding])
    unchanged = (seen[1] == seen[0]).all(-1).all(-1).tolist()
    assert unchanged == [tokens == "generated" for tokens in choice_of_rows(len(padding))]


def test_without_a_mask_every_token_is_real(tiny_llama):
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"]
    expected = by_hand(tiny_llama, {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
    with applied(tiny_llama, Edit("all")):
        close(forward(tiny_llama, {"input_ids": ids}), expected, ["all"])


def test_a_prompt_can_be_given_by_position_or_as_embeddings(tiny_llama):
    network: Any = transformers_model(tiny_llama)
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"].repeat(len(TOKENS), 1)
    with applied(tiny_llama, Edit()), torch.inference_mode():
        expected = network(input_ids=ids).logits
        assert torch.equal(network(ids).logits, expected)
        close(network(inputs_embeds=network.get_input_embeddings()(ids)).logits, expected)


# Generated text


@cache_or_not
def test_while_text_is_generated_exactly_the_meant_tokens_are_edited(tiny_bridge, plain, inputs, cached):
    expected_tokens, expected_logits = greedy_by_hand(plain, inputs)
    for model in (plain, tiny_bridge.original_model):
        with applied(model, Edit()):
            found_tokens, found_logits = generated(model, inputs, cached=cached)
        assert torch.equal(found_tokens, expected_tokens)
        close(found_logits, expected_logits)


@few_bridges
def test_each_choice_of_tokens_says_something_else(tiny_bridge, inputs):
    with applied(tiny_bridge, Edit()):
        edited = generated(tiny_bridge, inputs, cached=True)[1]
    said = [*edited[:, -1].chunk(len(TOKENS)), generated(tiny_bridge, inputs, cached=True)[1][: len(PROMPTS), -1]]
    for i in range(len(said)):
        for j in range(i):
            assert (said[i] - said[j]).abs().max() > 1e-2


@few_bridges
@cache_or_not
def test_a_prompt_is_answered_alike_alone_and_in_a_batch(tiny_bridge, inputs, cached):
    with applied(tiny_bridge, Edit()):
        batch_tokens, batch_logits = generated(tiny_bridge, inputs, cached=cached)
        for row, prompt in enumerate(PROMPTS):
            alone = for_every_choice(encode(tiny_bridge, [prompt]))
            alone_tokens, alone_logits = generated(tiny_bridge, alone, cached=cached)
            assert torch.equal(batch_tokens[row :: len(PROMPTS)], alone_tokens)
            close(batch_logits[row :: len(PROMPTS)], alone_logits)


@few_bridges
def test_beam_search_finds_the_same_with_and_without_cache(tiny_bridge, inputs):
    with applied(tiny_bridge, Edit()):
        cached, _ = generated(tiny_bridge, inputs, cached=True, num_beams=3)
        uncached, _ = generated(tiny_bridge, inputs, cached=False, num_beams=3)
    assert torch.equal(cached, uncached)


def test_a_static_cache_gives_the_same_text(plain, inputs):
    expected_tokens, expected_logits = greedy_by_hand(plain, inputs)
    with applied(plain, Edit()):
        found_tokens, found_logits = generated(
            plain, inputs, cached=True, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(found_tokens, expected_tokens)
    close(found_logits, expected_logits)


@few_bridges
def test_a_cache_that_the_model_makes_itself_is_followed(plain, inputs):
    expected, expected_logits = greedy_by_hand(plain, inputs)
    mask = inputs["attention_mask"]
    said, steps = [], []
    with applied(plain, Edit()), torch.inference_mode():
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


def test_the_bridge_generates_the_same_with_and_without_cache(tiny_llama):
    ids = tiny_llama.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"].repeat(len(TOKENS), 1)
    expected, _ = greedy_by_hand(tiny_llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with applied(tiny_llama, Edit()), torch.inference_mode():
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


def test_arguments_given_by_position_are_edited_as_those_given_by_name(tiny_bridge, plain, inputs):
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    by_name = dict(inputs)
    order = list(inspect.signature(type(plain).forward).parameters)[1:]
    by_position = [by_name.get(name) for name in order[: order.index("position_ids") + 1]]
    expected = by_hand(plain, by_name, expected_mask(mask, ids.shape[1]))
    before = for_every_choice(encode(tiny_bridge, PROMPTS[:2]))
    for model in (plain, tiny_bridge.original_model):
        with applied(model, Edit()), torch.inference_mode():
            # What a pass leaves behind must not matter.
            generated(model, before, cached=True)
            for called in (model, model.forward):
                close_where_real(called(*by_position).logits, expected, mask)
                close_where_real(called(ids, attention_mask=mask, position_ids=positions).logits, expected, mask)


def test_a_cache_given_by_position_is_followed(plain, inputs):
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    length = ids.shape[1] - 1
    # One prompt, and one token of text after it.
    expected = by_hand(plain, inputs, expected_mask(mask, length))[:, -1]
    order = list(inspect.signature(type(plain).forward).parameters)[1:]
    with applied(plain, Edit()), torch.inference_mode():
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


def test_another_prompt_after_one_is_a_new_prompt(tiny_llama, tiny_plain):
    """Also where it is longer by one token, shorter, of another number of rows, or the same."""
    ids = tiny_llama.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    other = ids.flip(-1)
    longer = torch.cat([ids[:, -1:], ids], -1)
    one = ids[:, :1]
    prompts = [ids, other, longer, ids, ids, one, one, ids[:, :5], torch.cat([ids, other]), other]
    with applied(tiny_llama, Edit()):
        for prompt in prompts:
            rows = prompt.repeat(len(TOKENS), 1)
            # On a model to which nothing is attached.
            expected = by_hand(
                tiny_plain("llama"), {"input_ids": rows}, expected_mask(torch.ones_like(rows), rows.shape[1])
            )
            close(forward(tiny_llama, {"input_ids": rows}), expected)


@few_bridges
@cache_or_not
def test_an_answer_does_not_depend_on_what_was_generated_before(tiny_bridge, inputs, cached):
    first = for_every_choice(encode(tiny_bridge, PROMPTS[:2]))
    with applied(tiny_bridge, Edit()):
        expected, expected_logits = generated(tiny_bridge, inputs, cached=cached)
    with applied(tiny_bridge, Edit()):
        for before in (first, inputs, first):
            generated(tiny_bridge, before, cached=cached)
            forward(tiny_bridge, before)
            found, found_logits = generated(tiny_bridge, inputs, cached=cached)
            assert torch.equal(found, expected)
            assert torch.equal(found_logits, expected_logits)


@few_bridges
def test_a_second_prompt_on_the_same_cache_has_a_last_token_of_its_own(tiny_bridge, plain):
    ids = encode(tiny_bridge, PROMPTS[:1])["input_ids"].repeat(len(TOKENS), 1)
    second = ids[:, 3:8]
    # The first prompt's edits stay in the cache.
    meant = torch.cat([expected_mask(torch.ones_like(part), part.shape[1]) for part in (ids, second)], -1)
    expected = by_hand(plain, {"input_ids": torch.cat([ids, second], -1)}, meant)[:, ids.shape[1] :]
    with applied(plain, Edit()), torch.inference_mode():
        cache = plain(input_ids=ids, use_cache=True).past_key_values
        found = plain(input_ids=second, past_key_values=cache).logits
    close(found, expected)


@few_bridges
def test_edits_of_different_tokens_do_not_disturb_each_other(tiny_bridge):
    inputs = encode(tiny_bridge, PROMPTS)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    once = Steering(1, vector, tokens="last_prompt")
    later = Steering(1, vector, tokens="generated")
    with applied(tiny_bridge, once, later):
        found, found_logits = generated(tiny_bridge, inputs, cached=True)
    with applied(tiny_bridge, Steering(1, vector, tokens="answer")):
        expected, expected_logits = generated(tiny_bridge, inputs, cached=True)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found_logits, expected_logits, rtol=1e-4, atol=1e-4)


# Attached and removed


def test_a_removed_edit_leaves_the_model_as_it_was_bit_for_bit(tiny_bridge):
    inputs = encode(tiny_bridge, PROMPTS)
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
