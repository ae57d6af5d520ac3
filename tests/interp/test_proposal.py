"""Proposals against the blueprints that were written by hand, and against models that no blueprint describes."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from interp.anatomy import BLUEPRINTS, Anatomy, Blueprint
from interp.blueprints import blueprint_from
from interp.errors import Caution, UserError
from interp.files import write_json
from interp.fit import checked
from interp.models import load_model, save_checkpoint
from interp.proposal import adopt, is_proposed, proposed, written
from interp.small import Misfit, small_copy
from interventions.config import InterventionFile
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.architectures import TABLE, random_model, random_model_of
from tests.interp import test_architectures as of_known
from tests.interp import wrong_models
from tests.tiny import CONFIGS, tiny_tokenizer

_SHARED: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_SHARED, "num_key_value_heads": 2}
_OF_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40}
UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", _GROUPED),
    "codegen": ("CodeGen", {**_OF_GPT, "rotary_dim": 4}),
    "ctrl": ("CTRL", {**_OF_GPT, "dff": 40}),
    "exaone4": ("Exaone4", {**_GROUPED, "sliding_window": 6}),
    "glm4": ("Glm4", {**_GROUPED, "head_dim": 8}),
    "gpt-neo": ("GPTNeo", {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48}),
    "granite-moe": (
        "GraniteMoe",
        {**_GROUPED, "num_local_experts": 4, "residual_multiplier": 0.6, "logits_scaling": 3.0},
    ),
    "helium": ("Helium", {**_GROUPED, "head_dim": 8}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "persimmon": ("Persimmon", _SHARED),
}
UNKNOWN["gpt-neo"][1]["attention_types"] = [[["global", "local", "global"], 1]]
REFUSED = {
    "bitnet": ("BitNet", _GROUPED, "outputs of its heads are not values of tokens"),
    "deepseek": (
        "DeepseekV3",
        {**_GROUPED, "num_key_value_heads": 4},
        "maps 512 numbers to 32, not 4 heads of 64",
    ),
    "diff-llama": ("DiffLlama", _GROUPED, "outputs of its heads are not values of tokens"),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "has no number num_attention_heads"),
    "nemotron": ("Nemotron", {**_GROUPED, "head_dim": 8}, "no norm with a weight of a known kind"),
    "olmo": ("Olmo", _GROUPED, "no norm with a weight of a known kind"),
    "recurrent-gemma": ("RecurrentGemma", {**_SHARED, "lru_width": 32, "head_dim": 8}, "attention that gives"),
}
WRONG = {
    "Scaled": "stream after block 0 is not what was there, and what attention and MLP add",
    "ScaledALittle": "stream after block 0 is not what was there",
    "OwnEmbedding": "stream after block 0 is not what was there",
    "Gains": "stream after block 0 is not what was there",
    "Buffered": "stream after block 0 is not what was there",
    "ReadsItself": "stream after block 0 is not what was there",
    "Between": "block 1 reads something else than the stream after block 0",
    "Reversed": "values of tokens, weighted by the attention of these heads",
    "Interleaved": "values of tokens, weighted by the attention of these heads",
    "Mixed": "values of tokens, weighted by the attention of these heads",
    "ReversedInside": r"query 0 acts on heads \[3\], not \[0\]",
    "Recurrent": "no attention that gives its heads' weights",
    "OtherNorm": "no norm with a weight of a known kind",
    "ShiftedLogits": "logits are not its unembedding of its final norm",
    "Noisy": "logits are not its unembedding of its final norm",
}
_OF_EXPERTS = ("mlp_output", "mlp_activation")
_NUMBERS = ("n_kv_heads", "d_mlp")

pytestmark = pytest.mark.usefixtures("architectures_are_left_as_they_were")


@cache
def known_model(name: str) -> Any:
    if name in TABLE:
        return random_model(name)
    return AutoModelForCausalLM.from_config(CONFIGS[name](61), attn_implementation="eager").eval()


@pytest.mark.parametrize("name", sorted([*TABLE, *CONFIGS]))
def test_what_is_proposed_is_what_was_written_by_hand(name):
    model = known_model(name)
    by_hand, found = Anatomy(model), Anatomy(model, proposed(model))
    for field in _NUMBERS:
        if not (field == "d_mlp" and found.mlp_output_path(0) is None):
            assert getattr(found, field) == getattr(by_hand, field)
    ours, theirs = (asdict(replace(anatomy.blueprint, variants=())) for anatomy in (found, by_hand))
    for field in _OF_EXPERTS:
        # By hand also where a configuration has no layer that is not of experts.
        if ours[field] is None and ours["mlp_experts"] is not None:
            del ours[field], theirs[field]
    # By hand also where a configuration adds in place no longer.
    assert set(ours.pop("overwritten")) <= set(theirs.pop("overwritten"))
    assert {k: v for k, v in ours.items() if k not in _NUMBERS} == {
        k: v for k, v in theirs.items() if k not in _NUMBERS
    }


@pytest.mark.parametrize("name", sorted([*TABLE, *CONFIGS]))
def test_blueprints_that_were_written_by_hand_fit(name):
    model = known_model(name)
    fit = checked(model, BLUEPRINTS[type(model).__name__])
    assert max(fit.small[check] for check in ("stream", "heads", "logits", "edits")) < 1e-12


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_a_proposal_for_an_unknown_architecture_holds_in_brute_force(name):
    """Sweeps against full passes, direct logits against the difference, records against the stream."""
    model = random_model_of(*UNKNOWN[name])
    assert type(model).__name__ not in BLUEPRINTS
    with pytest.warns(Caution, match="is not known here; a blueprint that is proposed"):
        adopt(model)
    of_known.test_steps_and_logits_are_the_models(model)
    of_known.test_one_sweep_equals_full_forwards(model)
    of_known.test_direct_logits_add_up_to_the_logit_difference(model)
    of_known.test_what_is_recorded_of_attention_and_mlp_adds_up_to_the_residual_stream(model)
    of_known.test_attention_weights_are_the_models(model)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_architecture_that_no_blueprint_describes_is_refused_with_the_reason(name):
    family, settings, reason = REFUSED[name]
    config = getattr(transformers, f"{family}Config")(**settings, vocab_size=61, pad_token_id=0, bos_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(Misfit, match=reason):
        proposed(model)


# Models that look like others and compute something else


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_model_that_computes_something_else_is_refused_with_the_reason(name):
    model = wrong_models.made(getattr(wrong_models, f"{name}ForCausalLM"), num_key_value_heads=4)
    with pytest.raises(UserError, match=WRONG[name]):
        adopt(model)
    assert type(model).__name__ not in BLUEPRINTS


@pytest.mark.parametrize("name", [name for name in sorted(WRONG) if name not in ("OtherNorm", "ReversedInside")])
def test_nor_does_the_blueprint_of_what_it_looks_like_fit_it(name):
    """The check alone, without a proposal, refuses it as well."""
    model = wrong_models.made(getattr(wrong_models, f"{name}ForCausalLM"))
    with pytest.raises(Misfit):
        checked(model, BLUEPRINTS["LlamaForCausalLM"])


def test_a_model_that_is_put_together_in_the_same_way_and_is_right_is_taken():
    model = wrong_models.made(wrong_models.RightForCausalLM)
    assert proposed(model) == BLUEPRINTS["LlamaForCausalLM"]
    checked(model, BLUEPRINTS["LlamaForCausalLM"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_wrong_with_the_loaded_model_alone_is_seen(dtype):
    """No class makes it so: a copy would not have it."""
    model = wrong_models.made(wrong_models.RightForCausalLM).to(dtype)
    checked(model, BLUEPRINTS["LlamaForCausalLM"])
    model.model.layers[2].scale = 0.8
    with pytest.raises(Misfit, match="the stream after block 2 is not what was there"):
        checked(model, BLUEPRINTS["LlamaForCausalLM"])


@pytest.mark.parametrize(
    ("like", "fields", "reason"),
    [
        ("llama", {"norm": "rms_plus_one"}, "a norm of block 0 computes something else than its kind says"),
        ("llama", {"parallel": True}, "what the MLP of block 0 adds is not"),
        ("llama", {"mlp_norm": "input_layernorm"}, "what the MLP of block 0 adds is not"),
        ("llama", {"attention_norm": None}, "attention of block 0 does not read the stream"),
        ("llama", {"query": "self_attn.k_proj"}, "does not make the query of heads"),
        ("llama", {"key": "self_attn.v_proj"}, "does not make the key of heads"),
        ("llama", {"d_mlp": "hidden_size"}, "has 48 neurons, not 32"),
        ("llama", {"n_kv_heads": 4}, "values of block 0 are among 16 numbers, not of 4 heads of 8"),
        ("llama", {"mlp_output": "mlp.up_proj"}, "the MLP of block 0 has 32 neurons, not 48"),
        ("llama", {"final_norm": "model.nrm"}, "it has no model.nrm"),
        ("gemma2", {"attention_post_norm": None}, "the stream after block 0 is not what was there"),
        ("gpt-neox", {"parallel": False}, "what the MLP of block 0 adds is not"),
        ("granite", {"residual_multiplier": None}, "the stream after block 0 is not what was there"),
        ("granite", {"logit_divisor": None}, "the logits are not what follows"),
        ("falcon-7b", {"overwritten": ()}, "the stream after block 0 is not what was there"),
    ],
)
def test_a_wrong_field_of_a_blueprint_is_seen(like, fields, reason):
    model = known_model(like)
    blueprint = replace(BLUEPRINTS[type(model).__name__].of(model.config), variants=(), **fields)
    with pytest.raises(Misfit, match=reason):
        checked(model, blueprint)


# Small copies


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"num_hidden_layers": 12}, 2),
        ({"num_hidden_layers": 12, "mlp_only_layers": [0, 1, 2]}, 4),
        ({"num_hidden_layers": 12, "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 7}, 6),
    ],
)
def test_a_copy_has_layers_of_every_kind(settings, layers):
    shape = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "vocab_size": 100}
    config = transformers.Qwen3MoeConfig(**{**shape, "sliding_window": 4, **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert small_copy(model).config.num_hidden_layers == layers


def test_a_copy_of_a_large_model_is_small_and_shares_keys_among_as_many_heads():
    config = transformers.LlamaConfig(num_hidden_layers=80, num_key_value_heads=8, vocab_size=128000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    small = small_copy(model)
    assert sum(p.numel() for p in small.parameters()) < 3e7
    assert small.config.num_attention_heads / small.config.num_key_value_heads == 32 / 8
    assert small.config.hidden_size / small.config.num_attention_heads == 4096 / 32


def test_a_copy_of_many_experts_has_few():
    shape = {**_GROUPED, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 24, "vocab_size": 100}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**shape))
    small = small_copy(model)
    assert (small.config.num_experts, small.config.num_experts_per_tok) == (16, 8)


def test_random_numbers_of_others_are_left_as_they_were():
    model = known_model("llama")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    checked(model, proposed(model))
    assert torch.equal(torch.rand(3), expected)


# Taking one


def neo(**settings: Any) -> Any:
    family, own = UNKNOWN["gpt-neo"]
    tokenizer = tiny_tokenizer()
    model = random_model_of(family, {**own, **settings}, len(tokenizer)).float()
    model.tokenizer = tokenizer
    return model


def test_loading_an_unknown_architecture_says_so_once_and_uses_the_proposal(tmp_path):
    model = neo()
    save_checkpoint(model, model.tokenizer, tmp_path / "neo")
    with pytest.warns(Caution, match="GPTNeoForCausalLM is not known here"):
        loaded = load_model(str(tmp_path / "neo"), device="cpu")
    assert is_proposed("GPTNeoForCausalLM")
    assert Anatomy(loaded).blueprint.query == "attn.attention.q_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("error", Caution)
        load_model(str(tmp_path / "neo"), device="cpu")


def test_another_model_of_the_architecture_is_compared_again():
    del BLUEPRINTS["StableLmForCausalLM"]
    with pytest.warns(Caution):
        adopt(known_model("stablelm"))
    with pytest.raises(UserError, match="not as another StableLmForCausalLM that was loaded before it"):
        adopt(known_model("stablelm-parallel"))


def test_a_model_whose_modules_break_in_an_unforeseen_way_is_one_sentence():
    model = wrong_models.made(wrong_models.RightForCausalLM)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(UserError, match="no blueprint that is proposed from its modules fits it: division by zero"):
        adopt(model)


def test_a_proposal_that_is_written_down_is_read_as_it_was(tmp_path):
    blueprint: Blueprint = proposed(known_model("olmo2"))
    write_json(tmp_path / "b.json", written("Mine", blueprint))
    assert blueprint_from(tmp_path / "b.json") == ("Mine", blueprint)


# Files of interventions


def test_a_file_of_an_architecture_that_is_not_known_yet_waits_for_its_model(tmp_path):
    model = neo()
    with pytest.warns(Caution):
        adopt(model)
    edit = HeadScaling.of([(1, 2)], 0.0)
    identity = ModelIdentity.of(model, "neo")
    InterventionFile.of([edit], name="edit", model=identity).save(tmp_path / "edit.json")
    text = (tmp_path / "edit.json").read_text().replace("attn.attention.out_proj", "attn.attention.q_proj")
    (tmp_path / "other.json").write_text(text)
    del BLUEPRINTS["GPTNeoForCausalLM"]
    early, other = (InterventionFile.load(tmp_path / f"{name}.json").scaled(0.5) for name in ("edit", "other"))
    with pytest.raises(UserError, match="GPTNeoForCausalLM is not known"):
        early.attach(model)
    with pytest.warns(Caution):
        adopt(model)
    with pytest.raises(UserError, match="sites that edit names are not those"):
        other.attach(model)
    ids = torch.arange(1, 8)[None]
    with torch.inference_mode(), early.attach(model):
        found = model(input_ids=ids).logits
    weight = model.transformer.h[1].attn.attention.out_proj.weight
    with torch.inference_mode():
        weight[:, 16:24] *= 0.5
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
