import copy
import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.errors import Caution, UserError
from interp.generation import greedy_texts
from interp.models import decode_plainly
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.gate import ConflictGate, GateReading
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.juice import AddedHead, JuICE
from interventions.runtime import apply, remove
from interventions.steering import Steering
from tests.tiny import CONFIGS, tiny_conflicts

PROMPTS = [e.prompt for e in tiny_conflicts()][:5]
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
HEADS = HeadScaling.of([(1, 1), (2, 3)], -2.0)
KINDS: dict[str, list[Any]] = {
    "heads": [HEADS],
    "steering": [Steering(1, VECTOR)],
    "gate": [ConflictGate("block", 0, VECTOR, 0.0, 0.0, (HEADS, Steering(1, VECTOR, tokens="answer")))],
    "soft gate": [ConflictGate("block", 0, VECTOR, 0.0, 0.0, (HEADS,), (GateReading("mlp", 0, VECTOR),), soft=True)],
    "juice": [JuICE((AddedHead(1, 1, 3.0), AddedHead(2, 3, -2.0)))],
}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def llama(tiny_directories) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_directories["llama"]).eval()


@pytest.fixture(scope="session")
def tokenizer(tiny_directories) -> Any:
    return AutoTokenizer.from_pretrained(tiny_directories["llama"])


@pytest.fixture
def batch(tokenizer) -> Any:
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left"))


def file_of(kind: str, model: Any, tokenizer: Any = None) -> InterventionFile:
    return InterventionFile.of(KINDS[kind], name=kind, model=ModelIdentity.of(model, "tiny", tokenizer))


def greedy(model, batch, **options: Any):
    with torch.inference_mode():
        return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


def logits(model, batch):
    with torch.inference_mode():
        return model(**batch).logits


# What is applied


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_plain_model_gives_what_the_bridge_gives(tiny_directories, tiny_model, tmp_path, architecture, kind, batch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_directories[architecture])
    bridge = tiny_model(architecture)
    model = AutoModelForCausalLM.from_pretrained(tiny_directories[architecture]).eval()
    file_of(kind, bridge).save(tmp_path / "edit.json")
    plain = greedy(model, batch)
    with applied(bridge, *KINDS[kind]):
        expected = greedy(bridge.original_model, batch)
    for path in (tmp_path / "edit.json", tmp_path):
        with apply(model, path, tokenizer=tokenizer):
            assert torch.equal(greedy(model, batch), expected)
    # A random probe may open for none of these prompts.
    assert "gate" in kind or not torch.equal(plain, expected)
    assert torch.equal(greedy(model, batch), plain)


def test_strength_and_trust_say_how_far(llama, batch):
    file = file_of("heads", llama)
    with apply(llama, file, strength=0.5):
        half = logits(llama, batch)
    with applied(llama, HeadScaling.of([(1, 1), (2, 3)], -0.5)):
        assert torch.equal(logits(llama, batch), half)
    plain = logits(llama, batch)
    assert not torch.equal(half, plain)
    with apply(llama, file, strength=0.0):
        assert torch.equal(logits(llama, batch), plain)
    dial = TrustDial((DialScale(1, 1, 0.0, 2.0),))
    dial_file = InterventionFile.of([dial], name="dial", model=file.model)
    with apply(llama, dial_file, trust=-0.5):
        turned = logits(llama, batch)
    with applied(llama, dial.at(-0.5)):
        assert torch.equal(logits(llama, batch), turned)


def test_greedy_texts_ignore_what_the_checkpoint_would_penalise(llama, tokenizer):
    expected = greedy_texts(llama, tokenizer, PROMPTS, max_new_tokens=6)
    llama.generation_config.repetition_penalty = 10.0
    assert greedy_texts(llama, tokenizer, PROMPTS, max_new_tokens=6) != expected
    decode_plainly(llama)
    assert greedy_texts(llama, tokenizer, PROMPTS, max_new_tokens=6) == expected


# Ways to run


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["no cache", "beams", "static cache"],
)
def test_each_row_of_a_batch_gets_what_it_gets_alone(llama, batch, tokenizer, kind, options):
    with apply(llama, file_of(kind, llama)):
        if kind == "juice" and "num_beams" in options:
            with pytest.raises(UserError, match="set num_beams to 1"):
                greedy(llama, batch, **options)
            return
        together = greedy(llama, batch, **options)[:, batch["input_ids"].shape[1] :]
        for row, prompt in enumerate(PROMPTS):
            alone = dict(tokenizer([prompt], return_tensors="pt"))
            expected = greedy(llama, alone, **options)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(together[row], expected)


def test_sampling_with_a_seed_gives_the_same_with_and_without_a_cache(llama, batch, kind):
    found = []
    with apply(llama, file_of(kind, llama)):
        for use_cache in (True, False):
            torch.manual_seed(3)
            with torch.inference_mode():
                found.append(llama.generate(**batch, max_new_tokens=5, do_sample=True, use_cache=use_cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_of_the_float32_model_is_applied_to_its_half_precision_copy(llama, batch, kind, dtype):
    file = file_of(kind, llama)
    with apply(llama, file):
        expected = logits(llama, batch)
    half = copy.deepcopy(llama).to(dtype)
    plain = logits(half, batch)
    with apply(half, file):
        found = logits(half, batch)
    assert found.dtype == dtype
    keep = batch["attention_mask"].bool()
    distance = (found.float() - expected)[keep].norm() / expected[keep].norm()
    assert distance < 0.1
    assert not torch.equal(found, plain)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_edited_and_restored_whenever_the_edit_comes_and_goes(llama, batch):
    # The gate holds the other two.
    file = file_of("gate", llama)
    plain = logits(llama, batch)
    with apply(llama, file):
        expected = logits(llama, batch)
    # The graph is captured as always; only the code generator, which would take minutes, is left out.
    compiled: Any = torch.compile(llama, backend="eager")
    torch.testing.assert_close(logits(compiled, batch), plain)
    with apply(compiled, file):
        torch.testing.assert_close(logits(compiled, batch), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(compiled, batch), plain)
    torch.compiler.reset()


def test_threads_that_generate_at_once_do_not_disturb_each_other(llama, tokenizer, kind):
    with apply(llama, file_of(kind, llama)):
        inputs = [dict(tokenizer([prompt], return_tensors="pt")) for prompt in PROMPTS]
        alone = [greedy(llama, one) for one in inputs]
        found: dict[tuple[int, int], torch.Tensor] = {}

        def work(row: int) -> None:
            for turn in range(5):
                found[row, turn] = greedy(llama, inputs[row])

        threads = [threading.Thread(target=work, args=(row,)) for row in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 5 * len(inputs)
    assert all(torch.equal(tokens, alone[row]) for (row, _), tokens in found.items())


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}, {"assistant_model": True}], ids=str
)
def test_ways_to_generate_that_hide_tokens_are_served_or_refused(llama, tokenizer, kind, options):
    batch = dict(tokenizer(PROMPTS[:1], return_tensors="pt"))
    options = {name: llama if value is True else value for name, value in options.items()}
    if kind == "heads":
        with apply(llama, file_of(kind, llama)):
            assert torch.equal(greedy(llama, batch, **options), greedy(llama, batch))
        return
    with apply(llama, file_of(kind, llama)), pytest.raises(UserError, match=f"generate without {next(iter(options))}"):
        greedy(llama, batch, **options)


def test_a_direction_at_all_tokens_is_served_in_every_way_to_generate(llama, tokenizer):
    file = InterventionFile.of([Steering(1, VECTOR, tokens="all")], name="all", model=ModelIdentity.of(llama, "tiny"))
    batch = dict(tokenizer(PROMPTS[:1], return_tensors="pt"))
    plain = greedy(llama, batch)
    with apply(llama, file):
        expected = greedy(llama, batch)
        for options in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}, {"assistant_model": llama}):
            assert torch.equal(greedy(llama, batch, **options), expected)
    assert not torch.equal(plain, expected)


def test_a_generation_config_given_by_position_is_looked_at_too(llama, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    config = copy.deepcopy(llama.generation_config)
    config.prompt_lookup_num_tokens = 3
    with apply(llama, file_of("steering", llama)), pytest.raises(UserError, match="prompt lookup decoding"):
        llama.generate(ids, config)


def test_continuous_batching_is_refused_where_tokens_or_rows_matter(llama, kind):
    with apply(llama, file_of(kind, llama)):
        if kind == "heads":
            assert "init_continuous_batching" not in vars(llama)
        else:
            with pytest.raises(UserError, match=r"(in|by) continuous batching"):
                llama.init_continuous_batching()
    assert not {"generate", "init_continuous_batching"} & vars(llama).keys()


def test_a_deep_copy_made_meanwhile_generates_with_its_own_weights(llama, batch):
    with apply(llama, file_of("steering", llama)):
        other = copy.deepcopy(llama)
        with torch.no_grad():
            other.lm_head.weight.neg_()
        assert not torch.equal(greedy(other, batch), greedy(llama, batch))


def test_two_followed_edits_may_be_removed_in_any_order(llama, batch):
    plain = greedy(llama, batch)
    first, second = (apply(llama, file_of(kind, llama)) for kind in ("steering", "gate"))
    first.remove()
    with pytest.raises(UserError, match="prompt_lookup"):
        greedy(llama, {k: v[:1] for k, v in batch.items()}, prompt_lookup_num_tokens=2)
    second.remove()
    assert torch.equal(greedy(llama, batch), plain)


def test_device_map_and_offloading(tiny_directories, llama, batch, kind, tmp_path):
    file = file_of(kind, llama)
    with apply(llama, file):
        expected = greedy(llama, batch)
    mapped = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"], device_map={"": "cpu"}).eval()
    with apply(mapped, file):
        assert torch.equal(greedy(mapped, batch), expected)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tiny_directories["llama"], device_map={"": "disk"}, offload_folder=str(tmp_path)
    )
    with apply(offloaded, file):
        assert torch.equal(greedy(offloaded, batch), expected)


def test_another_model_or_tokenizer_is_refused_and_nothing_stays_attached(llama, tokenizer, batch, tiny_directories):
    file = file_of("steering", llama, tokenizer)
    before = logits(llama, batch)
    other: Any = copy.deepcopy(tokenizer)
    other.add_tokens(["<|other|>"])
    with pytest.raises(UserError, match="another tokenizer"):
        apply(llama, file, tokenizer=other)
    assert torch.equal(logits(llama, batch), before)
    assert "generate" not in vars(llama)
    mistral = AutoModelForCausalLM.from_pretrained(tiny_directories["mistral"])
    with pytest.raises(UserError, match="architecture LlamaForCausalLM"):
        apply(mistral, file)


def test_a_model_called_by_position_or_by_its_forward_method_is_edited(llama, batch, kind):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with apply(llama, file_of(kind, llama)), torch.inference_mode():
        expected = llama(input_ids=ids, attention_mask=mask).logits
        llama.generate(ids[:1, -3:], max_new_tokens=2)
        assert torch.equal(llama(ids, mask).logits, expected)
        if kind == "juice":
            # Its two readings of a prompt are put side by side where the model is called.
            with pytest.raises(UserError, match="call the model"):
                llama.forward(ids, mask)
        else:
            assert torch.equal(llama.forward(ids, mask).logits, expected)


# Applied twice, and saved


def test_an_edit_applied_again_replaces_the_first(llama, batch):
    plain = logits(llama, batch)
    file = file_of("heads", llama)
    with apply(llama, file, strength=0.5):
        expected = logits(llama, batch)
    first = apply(llama, file)
    with pytest.warns(Caution, match="heads was on the model already and is replaced"):
        second = apply(llama, file, strength=0.5)
    assert torch.equal(logits(llama, batch), expected)
    # The handle of what was replaced takes nothing off.
    first.remove()
    assert torch.equal(logits(llama, batch), expected)
    second.remove()
    assert torch.equal(logits(llama, batch), plain)


def test_an_edit_applied_again_after_it_was_removed_is_no_matter(llama, recwarn):
    file = file_of("steering", llama)
    for _ in range(2):
        with apply(llama, file):
            pass
    assert not recwarn.list


def test_edits_of_different_names_add_up(llama, batch):
    with applied(llama, *KINDS["heads"], *KINDS["steering"]):
        expected = logits(llama, batch)
    with apply(llama, file_of("heads", llama)), apply(llama, file_of("steering", llama)):
        assert torch.equal(logits(llama, batch), expected)


def test_a_refused_edit_leaves_the_earlier_one_on(llama, batch, tiny_directories):
    mistral = AutoModelForCausalLM.from_pretrained(tiny_directories["mistral"])
    with apply(llama, file_of("heads", llama)):
        expected = logits(llama, batch)
        with pytest.raises(UserError):
            apply(llama, file_of("heads", mistral))
        assert torch.equal(logits(llama, batch), expected)


def test_all_edits_whose_handles_were_lost_are_removed(llama, batch):
    plain = logits(llama, batch)
    for kind in KINDS:
        apply(llama, file_of(kind, llama))
    assert not torch.equal(logits(llama, batch), plain)
    remove(llama)
    assert torch.equal(logits(llama, batch), plain)
    assert not {"generate", "save_pretrained"} & vars(llama).keys()
    remove(llama)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_or_a_bridge_is_the_model_inside(llama, tiny_llama):
    file = file_of("heads", llama)
    pairs: list[tuple[Any, Any]] = [(torch.compile(llama), llama), (tiny_llama, tiny_llama.original_model)]
    for outside, inside in pairs:
        apply(outside, file)
        with pytest.warns(Caution, match="is replaced"):
            apply(inside, file)
        remove(outside)
        assert "save_pretrained" not in vars(inside)
    torch.compiler.reset()


def test_a_model_is_not_kept_by_what_is_applied_to_it(tiny_directories):
    model = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"])
    handle = apply(model, file_of("steering", model))
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
    handle.remove()


def test_saving_an_edited_model_says_that_the_edit_is_not_saved(llama, kind, tmp_path, recwarn):
    with apply(llama, file_of(kind, llama)):
        with pytest.warns(
            Caution, match="do not hold the edit.* conflictscope export MODEL CONFIG OUT --bake"
        ) as found:
            llama.save_pretrained(tmp_path / "edited")
        assert found[0].filename == __file__
    recwarn.clear()
    llama.save_pretrained(tmp_path / "plain")
    assert not recwarn.list
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("edited", "plain")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_saving_under_an_edit_attached_by_itself_says_so_too(llama, tmp_path):
    with applied(llama, *KINDS["heads"]), pytest.warns(Caution, match="do not hold the edit"):
        llama.save_pretrained(tmp_path)


def test_what_others_put_into_a_model_stays_and_is_called(llama, tmp_path):
    called = []

    def save_pretrained(*args: Any) -> None:
        called.append(args)

    llama.save_pretrained = save_pretrained
    with apply(llama, file_of("heads", llama)), pytest.warns(Caution):
        llama.save_pretrained(tmp_path)
    assert called == [(tmp_path,)]
    assert llama.save_pretrained is save_pretrained


def test_a_copy_of_an_edited_model_keeps_the_edit_and_says_so(llama, batch, tmp_path):
    file = file_of("heads", llama)
    plain = logits(llama, batch)
    with apply(llama, file):
        edited = logits(llama, batch)
        other = copy.deepcopy(llama)
    assert torch.equal(logits(llama, batch), plain)
    assert torch.equal(logits(other, batch), edited)
    with applied(other, *KINDS["steering"]):
        pass
    for refused in (lambda: apply(other, file), lambda: remove(other)):
        with pytest.raises(UserError, match="a copy of one that was edited"):
            refused()
    with torch.no_grad():
        other.lm_head.weight.zero_()
    with pytest.warns(Caution, match="do not hold the edit"):
        other.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight"].any()


# Import


ALONE = """
import sys, time
absent = "transformer_lens", "sae_lens", "polars", "plotly", "sklearn", "scipy", "platformdirs"
sys.modules.update(dict.fromkeys(absent))
started = time.process_time()
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
import transformers.generation
models = time.process_time()
import interventions
from interventions.runtime import apply
print((time.process_time() - models) / (models - started))
from interventions.config import named
from conflictscope.serve.engine import Engine
from conflictscope.serve.jobs import Done
from conflictscope.serve.requests import CompletionRequest
from pathlib import Path
folder, edit = sys.argv[1], Path(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with apply(model, edit, tokenizer=tokenizer):
    model.generate(**tokenizer("The capital of", return_tensors="pt"), max_new_tokens=2)
engine, found = Engine(model, tokenizer, name="tiny", interventions=named([edit])), []
asked = CompletionRequest(prompt="", max_tokens=2)
engine.submit(engine.jobs([[5, 6]], asked, lambda _, event: found.append(event)))
engine.close()
assert isinstance(found[-1], Done)
"""


@pytest.fixture(scope="module")
def alone(tiny_directories, tiny_plain, tmp_path_factory) -> Any:
    """A process that applies and serves a file, and in which only what serving needs can be imported."""
    path = tmp_path_factory.mktemp("alone") / "edit.json"
    file_of("gate", tiny_plain("llama")).save(path)
    command = [sys.executable, "-c", ALONE, str(tiny_directories["llama"]), str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_file_is_applied_and_served_where_only_what_serving_needs_is_installed(alone):
    assert alone.returncode == 0, alone.stderr


def test_importing_the_runtime_takes_little_more_than_importing_the_models_it_edits(alone):
    assert float(alone.stdout.splitlines()[0]) < 0.2
