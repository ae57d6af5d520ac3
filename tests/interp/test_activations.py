import dataclasses
import json
import os
import resource
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp import activations
from interp.activations import ActivationStore, record, sites_of
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage
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
        tiny_conflicts().examples[0], context="in İzmir it rains.", prompt="İİİİ: In İzmir it rains. Then it is"
    )
    found = record(tiny_llama, ConflictSet("one", (example,)), ["embed.hook_out"], "last_context")
    upto = tiny_llama.tokenizer.decode(token_ids(tiny_llama, example.prompt)[: found.position.item() + 1])
    assert upto == "İİİİ: In İzmir it rains."


# Wrong inputs


def with_kind_none():
    first = tiny_conflicts().examples[0]
    return ConflictSet(
        "none", (dataclasses.replace(first, kind="none", context="", context_answers=(), prompt="The capital is"),)
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


# The store


@pytest.fixture
def small_shards(monkeypatch):
    """Five prompts a shard, so that a few prompts make several."""
    monkeypatch.setattr(activations, "SHARD_PROMPTS", 5)


def store_of(folder, model, prompts=MORE_TEXTS, sites=("embed.hook_out", RESIDUAL), positions: Any = "all", **options):
    chosen: dict[str, Any] = {"name": "tiny", **options}
    return ActivationStore.record(folder, model, prompts, sites, positions, **chosen)


def contents(folder):
    """The bytes of every file, also of hidden ones."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_holds_what_record_gives(tiny_llama, tmp_path, small_shards):
    sites = sites_of(tiny_llama, ["residual", "z"])
    expected = record(tiny_llama, MORE_TEXTS, sites, "all")
    store = store_of(tmp_path / "store", tiny_llama, sites=sites)
    assert store.complete
    assert list(store) == store.sites == sites
    assert len(list(store.shards(sites[0]))) == 6
    for site in sites:
        assert_close(store[site], expected[site])
    assert store.index["prompt"].to_list() == expected.prompt.tolist()
    assert store.index["position"].to_list() == expected.position.tolist()


def test_the_index_says_which_token_of_which_text_a_row_is(tiny_llama, tmp_path, small_shards):
    index = store_of(tmp_path / "store", tiny_llama).index
    expected = [
        (i, p, token, str(i), text)
        for i, text in enumerate(MORE_TEXTS)
        for p, token in enumerate(token_ids(tiny_llama, text))
    ]
    assert index.select("prompt", "position", "token", "id", "text").rows() == expected


def test_the_index_carries_what_the_examples_say(tiny_llama, tmp_path, small_shards):
    conflicts = tiny_conflicts()
    index = store_of(tmp_path / "store", tiny_llama, conflicts, positions="last").index
    columns = ["id", "subject", "relation", "template", "kind", "split", "source"]
    assert index.select(columns).rows() == [tuple(getattr(e, c) for c in columns) for e in conflicts]
    assert index["text"].to_list() == [e.prompt for e in conflicts]


def test_rows_are_read_in_the_order_asked_for(tiny_llama, tmp_path, small_shards):
    store = store_of(tmp_path / "store", tiny_llama)
    everything = store[RESIDUAL]
    wanted = [len(everything) - 1, 3, 40, 3, 0, 41]
    assert torch.equal(store.read(RESIDUAL, wanted), everything[wanted])
    assert store.read(RESIDUAL, []).shape == (0, everything.shape[1])
    some = store.rows(wanted)
    assert dict(some).keys() == dict(store).keys()
    assert torch.equal(some[RESIDUAL], everything[wanted])


def test_a_row_or_site_that_a_store_lacks_is_an_error(tiny_llama, tmp_path):
    store = store_of(tmp_path / "store", tiny_llama, ["Note", "Peru"], positions="last")
    assert "blocks.0.hook_out" not in store
    assert "blocks.0.hook_out" not in store.rows([0])
    with pytest.raises(UserError, match=r"recorded are embed.hook_out, blocks.1.hook_out"):
        store["blocks.0.hook_out"]
    for row in (2, -1):
        with pytest.raises(UserError, match=f"has no row {row}; its rows are 0 to 1"):
            store.read(RESIDUAL, [0, row])


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_values_are_mapped_into_memory_not_read(tiny_llama, tmp_path):
    store = store_of(tmp_path / "store", tiny_llama)
    values = next(store.shards(RESIDUAL))
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "store" in line
    ]
    assert any(int(start, 16) <= values.data_ptr() < int(end, 16) for start, end in mapped)


def test_a_finished_store_is_opened_without_a_forward_pass(tiny_llama, tmp_path, monkeypatch):
    store_of(tmp_path / "store", tiny_llama)
    before = contents(tmp_path / "store")
    monkeypatch.setattr(activations, "observe", lambda *_: pytest.fail("nothing is left to record"))
    assert store_of(tmp_path / "store", tiny_llama).complete
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"name": "other"}, "its model is .*tiny.*, not .*other"),
        ({"prompts": [*MORE_TEXTS[1:], "else"]}, "its data is"),
        ({"sites": [RESIDUAL]}, "its sites is .*embed.hook_out.*, not"),
        ({"positions": "last"}, 'its positions is "all", not "last"'),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"dtype": torch.float16}, 'its dtype is "float32", not "float16"'),
        ({"batch_size": 7}, "its batch_size is 32, not 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_store_of_something_else_is_refused_and_left_alone(tiny_llama, tmp_path, changed, named):
    store_of(tmp_path / "store", tiny_llama)
    before = contents(tmp_path / "store")
    with pytest.raises(UserError, match=f"{named}.*; give the name of a new folder"):
        store_of(tmp_path / "store", tiny_llama, **changed)
    assert contents(tmp_path / "store") == before


def test_a_store_of_other_weights_is_refused(tiny_llama, tiny_directories, tmp_path):
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"])
    plain.tokenizer = tiny_llama.tokenizer
    store_of(tmp_path / "store", plain)
    with torch.no_grad():
        plain.model.norm.weight[0] += 1
    with pytest.raises(UserError, match="its model is"):
        store_of(tmp_path / "store", plain)


def test_a_folder_that_is_not_a_store_is_refused(tiny_llama, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not an activation store; give a folder"):
            ActivationStore(path)
    for path in (tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(UserError, match="is not an activation store; give the name of a new folder"):
            store_of(path, tiny_llama)
    with pytest.raises(UserError, match="choose another folder"):
        store_of(tmp_path / "file" / "below", tiny_llama)
    assert contents(tmp_path / "folder") == {"precious": b"x"}


def test_a_store_of_another_version_is_refused(tiny_llama, tmp_path):
    store_of(tmp_path / "store", tiny_llama)
    basis = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps(basis | {"version": 0}))
    with pytest.raises(UserError, match="record it again"):
        ActivationStore(tmp_path / "store")


def test_answers_of_texts_are_refused(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="give conflict examples, not texts alone"):
        store_of(tmp_path / "store", tiny_llama, answers=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows_that_fit", [1, 40])
def test_a_shard_holds_no_more_bytes_than_it_may(tiny_llama, tmp_path, monkeypatch, rows_that_fit):
    bytes_per_row = 2 * 32 * 4
    monkeypatch.setattr(activations, "SHARD_BYTES", rows_that_fit * bytes_per_row)
    store = store_of(tmp_path / "store", tiny_llama)
    sizes = [len(values) for values in store.shards(RESIDUAL)]
    lengths = [len(token_ids(tiny_llama, text)) for text in MORE_TEXTS]
    assert all(size <= rows_that_fit for size in sizes) or sizes == lengths
    assert set(accumulate(sizes)) <= set(accumulate(lengths))
    assert_close(store[RESIDUAL], record(tiny_llama, MORE_TEXTS, [RESIDUAL], "all")[RESIDUAL])


def interrupted(monkeypatch, after):
    """Make the forward pass with this number fail."""
    original, calls = activations.observe, []

    def observe(*args):
        calls.append(None)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(activations, "observe", observe)


def test_an_interrupted_recording_goes_on_to_identical_bytes(tiny_llama, tmp_path, small_shards, monkeypatch):
    store_of(tmp_path / "whole", tiny_llama, batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, after=10)
        store_of(tmp_path / "store", tiny_llama, batch_size=2)
    half = ActivationStore(tmp_path / "store")
    assert not half.complete
    # Three forward passes a shard: the fourth shard was under way.
    assert half.index["prompt"].unique().to_list() == list(range(15))
    assert len(half[RESIDUAL]) == len(half.index)
    with monkeypatch.context() as patch:
        interrupted(patch, after=8)
        assert store_of(tmp_path / "store", tiny_llama, batch_size=2).complete
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_nothing_recorded_yet_is_an_empty_store(tiny_llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, after=0)
        store_of(tmp_path / "store", tiny_llama)
    empty = ActivationStore(tmp_path / "store")
    assert not empty.complete
    assert empty.index.is_empty()
    with pytest.raises(UserError, match="has no rows yet"):
        empty[RESIDUAL]


def test_what_a_killed_run_left_half_written_is_cleared(tiny_llama, tmp_path, small_shards):
    store_of(tmp_path / "store", tiny_llama)
    before = contents(tmp_path / "store")
    (tmp_path / "store" / ".store.json.x1y2").write_text('{"form')
    (tmp_path / "store" / "shards" / ".00006.abcd").mkdir()
    (tmp_path / "store" / "shards" / ".00006.abcd" / "activations.safetensors").write_bytes(b"half")
    store_of(tmp_path / "store", tiny_llama)
    assert contents(tmp_path / "store") == before


def test_a_run_killed_before_the_first_file_was_whole_is_taken_up(tiny_llama, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".store.json.x1y2").write_text('{"form')
    assert store_of(tmp_path / "store", tiny_llama).complete
    assert ".store.json.x1y2" not in contents(tmp_path / "store")


def test_a_second_writer_is_refused(tiny_llama, tmp_path, monkeypatch):
    original, refused = activations.observe, []

    def observe(*args):
        with pytest.raises(UserError, match=r"Another process is recording to .*; wait for it") as error:
            store_of(tmp_path / "store", tiny_llama)
        refused.append(error)
        return original(*args)

    monkeypatch.setattr(activations, "observe", observe)
    assert store_of(tmp_path / "store", tiny_llama).complete
    assert refused


def test_a_disk_that_fills_up_is_one_sentence_and_the_recording_goes_on_later(tiny_llama, tmp_path, small_shards):
    """A real refusal of the operating system: no file may grow beyond what a shard of short prompts needs."""
    texts = [*["Peru"] * 5, *TEXTS, *["Peru"] * 5]
    sites = list(Anatomy(tiny_llama).observed())
    whole = contents(store_of(tmp_path / "whole", tiny_llama, texts, sites).path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(UserError, match=r"Could not write .*00001.*File too large.*record again"):
            store_of(tmp_path / "store", tiny_llama, texts, sites)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "store" / "shards").iterdir()) == ["00000"]
    store_of(tmp_path / "store", tiny_llama, texts, sites)
    assert contents(tmp_path / "store") == whole


def test_answers_put_the_measured_usage_into_conflict_rows_only(smollm2, capital_conflicts, tmp_path, small_shards):
    conflicts = ConflictSet("some", capital_conflicts.select(templates=["question"]).examples[:10])
    store = store_of(tmp_path / "store", smollm2, conflicts, ["embed.hook_out"], "last", answers=True)
    expected = measure_usage(smollm2, conflicts.select(kind="conflict")).frame.select("id", "answer", "usage")
    assert store.index.filter(kind="conflict").select("id", "answer", "usage").rows() == expected.rows()
    others = store.index.filter(store.index["kind"] != "conflict")
    assert len(others) == len(conflicts) - len(expected)
    assert others["usage"].null_count() == others["answer"].null_count() == len(others)


KILLS = 20

# Loads the model once and forks a child for each run. Before a fork nothing runs that keeps threads: no polars, no
# recording. Each child is killed after a random time, or once the store has the child's share of the shards: else a
# machine that becomes faster meanwhile would finish before the last kill.
KILLER = f"""
import json, os, random, signal, sys, time, traceback
from pathlib import Path

import torch

from interp import activations
from interp.models import load_model

torch.set_num_threads(1)
activations.SHARD_PROMPTS = 64
model = load_model(sys.argv[1], device="cpu")
root = Path(sys.argv[2])
texts = [f"The capital of {{land}}, we hear, is number {{i}} of" for i in range(600) for land in
         ("Italy", "France", "Japan", "Egypt", "Peru")]


def start(folder):
    child = os.fork()
    if not child:
        try:
            sites = activations.sites_of(model)
            activations.ActivationStore.record(folder, model, texts, sites, name="tiny")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def shards(folder):
    return len(list((folder / "shards").glob("[0-9]*")))


begin = time.perf_counter()
assert os.waitpid(start(root / "whole"), 0)[1] == 0
seconds = time.perf_counter() - begin
rng = random.Random(0)
total = shards(root / "whole")
signals, recorded = [], []
for number in range({KILLS}):
    child = start(root / "store")
    moment = time.perf_counter() + rng.random() * seconds / 4
    share = total * (number + 1) // ({KILLS} + 3)
    while time.perf_counter() < moment and shards(root / "store") < share:
        time.sleep(0.002)
    time.sleep(rng.random() * seconds / total)
    os.kill(child, signal.SIGKILL)
    signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
    recorded.append(shards(root / "store"))
finished = os.waitpid(start(root / "store"), 0)[1]
print(json.dumps({{"signals": signals, "recorded": recorded, "finished": finished, "shards": total}}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_recording_killed_at_twenty_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    tiny_directories, tmp_path
):
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tiny_directories["llama"]), str(tmp_path)],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["signals"] == [9] * KILLS
    assert report["recorded"] == sorted(report["recorded"])
    assert 0 < report["recorded"][-1] < report["shards"]
    assert report["finished"] == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == 1 + 2 * report["shards"]
    assert contents(tmp_path / "store") == whole
