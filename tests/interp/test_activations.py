import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp.activations import record, sites_of
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interventions.base import applied
from interventions.heads import HeadScaling
from tests.tiny import tiny_conflicts

TEXTS = [
    "Note",
    "The capital of Italy is Rome. The capital of France is",
    "Peru",
    "The capital",
    "Note: Tokyo is, we hear, the capital of Egypt. So the capital of Egypt, we hear, is",
    "The capital of Norway",
    "we hear the capital of Japan",
]
RESIDUAL = "blocks.1.hook_out"
MORE_TEXTS = [f"{text} {number}" for number in range(4) for text in TEXTS]


def by_itself(bridge, text, sites):
    """What transformer_lens records at ``sites``, ``(n_tokens, ...)`` each, without a batch and without padding."""
    with torch.inference_mode():
        ids = bridge.tokenizer(text, return_tensors="pt")["input_ids"]
        _, cache = bridge.run_with_cache(ids, names_filter=list(sites))
    return {site: cache[site][0] for site in sites}


def one_by_one(bridge, texts, sites):
    """The same for several texts, one after the other."""
    each = [by_itself(bridge, text, sites) for text in texts]
    return {site: torch.cat([values[site] for values in each]) for site in sites}


def token_ids(bridge, text):
    return bridge.tokenizer(text)["input_ids"]


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# The values


def test_every_site_holds_what_transformer_lens_records_without_padding(tiny_bridge):
    anatomy = Anatomy(tiny_bridge)
    sites = list(anatomy.observed())
    expected = one_by_one(tiny_bridge, TEXTS, sites)
    found = record(tiny_bridge, TEXTS, sites, "all", batch_size=3)
    assert list(found) == sites
    for site in sites:
        shape = (anatomy.n_heads, anatomy.d_head) if site.endswith("hook_in") else (anatomy.d_model,)
        assert_close(found[site], expected[site].reshape(-1, *shape))


def test_the_sites_of_a_real_model_hold_what_transformer_lens_records(smollm2):
    sites = ["embed.hook_out", "blocks.0.attn.hook_out", "blocks.14.hook_out", "blocks.29.mlp.hook_out"]
    z, norm = "blocks.14.attn.o.hook_in", "ln_final.hook_out"
    texts = ["The capital of France is", "Rome", "Two and two make four, and"]
    expected = one_by_one(smollm2, texts, [*sites, z, norm])
    found = record(smollm2, texts, [*sites, z, norm], "all", batch_size=2)
    for site in (*sites, norm):
        assert_close(found[site], expected[site])
    assert_close(found[z].flatten(1), expected[z].flatten(1))


def test_a_plain_transformers_model_gives_the_values_of_the_bridge(tiny_bridge):
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_bridge.original_model.config._name_or_path).eval()
    plain.tokenizer = tiny_bridge.tokenizer
    sites = list(Anatomy(plain).observed())
    expected = record(tiny_bridge, TEXTS, sites, "all")
    found = record(plain, TEXTS, sites, "all")
    for site in sites:
        assert_close(found[site], expected[site])


def test_what_attention_and_mlp_write_adds_up_to_the_residual_stream(tiny_bridge):
    """By the definition of a block, in every architecture: sites_of names the writes after any post norm."""
    before, after = sites_of(tiny_bridge, ["residual"], [0, 1])
    attention, mlp = sites_of(tiny_bridge, ["attention", "mlp"], [1])
    found = record(tiny_bridge, TEXTS, [before, attention, mlp, after], "all")
    assert_close(found[before] + found[attention] + found[mlp], found[after])


def test_an_intervention_on_the_model_is_seen(tiny_bridge):
    z, residual = sites_of(tiny_bridge, ["z", "residual"], [1])
    with applied(tiny_bridge, HeadScaling.of([(0, 3), (1, 2)], 0.0)):
        expected = one_by_one(tiny_bridge, TEXTS, [residual])[residual]
        found = record(tiny_bridge, TEXTS, [z, residual], "all")
    assert found[z][:, 2].abs().max() == 0
    assert found[z][:, [0, 1, 3]].abs().min(0).values.max() > 0
    assert_close(found[residual], expected)
    assert not torch.allclose(found[residual], record(tiny_bridge, TEXTS, [residual], "all")[residual])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_dtype_keeps_the_rounded_values(tiny_llama, dtype):
    expected = one_by_one(tiny_llama, TEXTS, [RESIDUAL])[RESIDUAL]
    found = record(tiny_llama, TEXTS, [RESIDUAL], "all", dtype=dtype)[RESIDUAL]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_a_value_too_large_for_float16_is_refused(tiny_llama):
    (z,) = sites_of(tiny_llama, ["z"], [1])
    with (
        applied(tiny_llama, HeadScaling.of([(1, 0)], 1e8)),
        pytest.raises(UserError, match=f"A value at {z} does not fit into float16; record in bfloat16 or float32"),
    ):
        record(tiny_llama, TEXTS, [z], dtype=torch.float16)


# The forward pass


def test_later_layers_and_the_unembedding_are_never_called(tiny_bridge):
    anatomy = Anatomy(tiny_bridge)
    calls = []
    parts: dict[str, Any] = {f"block {layer}": anatomy.module("block", layer) for layer in range(anatomy.n_layers)}
    parts["final norm"] = anatomy.final_norm
    parts["unembedding"] = anatomy.model.get_submodule(anatomy.model_path("unembedding"))
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, module in parts.items()
    ]
    try:
        record(tiny_bridge, TEXTS, sites_of(tiny_bridge, ["attention"], [1]), batch_size=len(TEXTS))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["block 0", "block 1"]


def test_the_model_is_as_before_afterwards(tiny_bridge):
    inputs = tiny_bridge.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before = tiny_bridge.original_model(inputs).logits
        hooks = n_hooks(tiny_bridge)
        record(tiny_bridge, TEXTS, sites_of(tiny_bridge, layers=[0]))
        assert n_hooks(tiny_bridge) == hooks
        assert torch.equal(tiny_bridge.original_model(inputs).logits, before)


def test_the_model_has_no_hooks_left_after_an_exception(tiny_llama):
    def broken(*_):
        raise RuntimeError("broken")

    hooks = n_hooks(tiny_llama)
    handle = Anatomy(tiny_llama).module("mlp", 2).register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        record(tiny_llama, TEXTS, sites_of(tiny_llama))
    handle.remove()
    assert n_hooks(tiny_llama) == hooks


# The positions


def test_last_is_the_last_token_of_each_prompt(tiny_llama):
    found = record(tiny_llama, TEXTS, [RESIDUAL], batch_size=2)
    assert found.prompt.tolist() == list(range(len(TEXTS)))
    assert found.position.tolist() == [len(token_ids(tiny_llama, text)) - 1 for text in TEXTS]
    expected = torch.stack([by_itself(tiny_llama, text, [RESIDUAL])[RESIDUAL][-1] for text in TEXTS])
    assert_close(found[RESIDUAL], expected)


def test_all_are_all_tokens_in_order(tiny_llama):
    found = record(tiny_llama, TEXTS, [RESIDUAL], "all", batch_size=2)
    expected = [(i, p) for i, text in enumerate(TEXTS) for p in range(len(token_ids(tiny_llama, text)))]
    assert list(zip(found.prompt.tolist(), found.position.tolist(), strict=True)) == expected


def test_numbers_are_tokens_from_the_start_or_from_the_end(tiny_llama):
    texts = TEXTS[:3]
    length = len(token_ids(tiny_llama, texts[1]))
    found = record(tiny_llama, texts, [RESIDUAL], [[0], [-1, 2, -3], []])
    assert found.prompt.tolist() == [0, 1, 1, 1]
    assert found.position.tolist() == [0, 2, length - 3, length - 1]
    expected = [by_itself(tiny_llama, text, [RESIDUAL])[RESIDUAL] for text in texts]
    assert_close(found[RESIDUAL], torch.cat([expected[0][:1], expected[1][[2, -3, -1]]]))


@pytest.mark.parametrize("which", ["memory", "context"])
def test_the_tokens_of_an_answer_spell_it(smollm2, capital_conflicts, which):
    position: Any = f"{which}_answer"
    conflicts = capital_conflicts.select(kind="conflict")
    found = record(smollm2, conflicts, ["embed.hook_out"], position)
    assert set(found.prompt.tolist()) == set(range(len(conflicts)))
    for number, example in enumerate(conflicts):
        answer = (example.memory_answers if which == "memory" else example.context_answers)[0]
        ids = token_ids(smollm2, f"{example.prompt} {answer}")
        positions = found.position[found.prompt == number].tolist()
        assert smollm2.tokenizer.decode([ids[p] for p in positions]) == f" {answer}"
        assert positions[-1] == len(ids) - 1


def test_the_values_at_an_answer_are_those_of_the_prompt_with_the_answer(tiny_llama):
    conflicts = tiny_conflicts()
    found = record(tiny_llama, conflicts, [RESIDUAL], "context_answer", batch_size=3)
    expected = [
        by_itself(tiny_llama, f"{e.prompt} {e.context_answers[0]}", [RESIDUAL])[RESIDUAL][found.position[i]]
        for i, e in enumerate(conflicts)
    ]
    assert_close(found[RESIDUAL], torch.stack(expected))


def test_the_last_context_token_ends_the_context(smollm2, capital_conflicts):
    conflicts = ConflictSet("with context", tuple(e for e in capital_conflicts if e.kind != "none"))
    found = record(smollm2, conflicts, ["embed.hook_out"], "last_context")
    assert found.prompt.tolist() == list(range(len(conflicts)))
    for example, position in zip(conflicts, found.position.tolist(), strict=True):
        upto = smollm2.tokenizer.decode(token_ids(smollm2, example.prompt)[: position + 1])
        assert upto.lower().endswith(example.context.lower())
        assert example.prompt.startswith(upto)


def test_the_context_ends_where_it_does_also_behind_letters_that_are_two_when_lowered(tiny_llama):
    example = dataclasses.replace(
        tiny_conflicts().examples[0], contexts=("in İzmir it rains.",), prompt="İİİİ: In İzmir it rains. Then it is"
    )
    found = record(tiny_llama, ConflictSet("one", (example,)), ["embed.hook_out"], "last_context")
    upto = tiny_llama.tokenizer.decode(token_ids(tiny_llama, example.prompt)[: found.position.item() + 1])
    assert upto == "İİİİ: In İzmir it rains."


def test_the_context_of_several_documents_ends_with_the_last(tiny_llama):
    documents = ("It rains.", "It is Rome.", "It rains.")
    shown = "\n\n".join(documents)
    prompt = f"{shown}\n\nIs it Rome? It rains. So"
    example = dataclasses.replace(tiny_conflicts().examples[0], contexts=documents, prompt=prompt)
    found = record(tiny_llama, ConflictSet("one", (example,)), ["embed.hook_out"], "last_context")
    upto = tiny_llama.tokenizer.decode(token_ids(tiny_llama, example.prompt)[: found.position.item() + 1])
    assert upto == shown


# Wrong inputs


def with_kind_none():
    first = tiny_conflicts().examples[0]
    return ConflictSet(
        "none", (dataclasses.replace(first, kind="none", contexts=(), context_answers=(), prompt="The capital is"),)
    )


@pytest.mark.parametrize(
    ("sites", "positions", "message"),
    [
        ([], "last", "name at least one"),
        (["blocks.1.nowhere"], "last", r"'blocks.1.nowhere' does not exist .* there are embed.hook_out, blocks.0"),
        (["blocks.3.hook_out"], "last", "'blocks.3.hook_out' does not exist"),
        ([RESIDUAL], "first", "known are last, last_context, memory_answer, context_answer, all"),
        ([RESIDUAL], "last_context", "texts alone have only last and all"),
        ([RESIDUAL], "memory_answer", "texts alone have only last and all"),
        ([RESIDUAL], [[0]], "1 lists of positions for 2 prompts; give as many"),
        ([RESIDUAL], [[0], [2]], "Prompt 1 has no token 2: it has 2 tokens"),
        ([RESIDUAL], [[0], [-3]], "Prompt 1 has no token -3: it has 2 tokens"),
        ([RESIDUAL], [[], []], "name at least one token"),
    ],
)
def test_a_site_or_position_that_is_not_there_is_one_sentence(tiny_llama, sites, positions, message):
    with pytest.raises(UserError, match=message):
        record(tiny_llama, ["Note", "The capital"], sites, positions)


@pytest.mark.parametrize("positions", ["last_context", "context_answer"])
def test_an_example_without_context_has_no_context_position(tiny_llama, positions):
    with pytest.raises(UserError, match="leave out the kinds of context that have none"):
        record(tiny_llama, with_kind_none(), [RESIDUAL], positions)


def test_no_prompts_are_an_error(tiny_llama):
    for nothing in ([], ConflictSet("empty", ())):
        with pytest.raises(UserError, match="choose a split, kind or template that has examples"):
            record(tiny_llama, nothing, [RESIDUAL])


@pytest.mark.parametrize("positions", ["last", "all"])
def test_an_empty_prompt_is_an_error(tiny_llama, positions):
    with pytest.raises(UserError, match="Prompt 1 has no tokens; leave out empty prompts"):
        record(tiny_llama, ["Note", ""], [RESIDUAL], positions)


def test_a_kind_or_layer_that_is_not_there_is_an_error(tiny_llama):
    wrong: Any = "value"
    with pytest.raises(UserError, match="'value' is not known; known are residual, attention, mlp, z"):
        sites_of(tiny_llama, [wrong])
    with pytest.raises(UserError, match="layers 0 to 2"):
        sites_of(tiny_llama, layers=[3])


def test_a_site_that_was_not_recorded_lists_those_that_were(tiny_llama):
    found = record(tiny_llama, ["Note"], [RESIDUAL])
    assert "embed.hook_out" not in found
    with pytest.raises(UserError, match=f"recorded are {RESIDUAL}"):
        found["embed.hook_out"]
