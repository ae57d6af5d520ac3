"""Every architecture of ``tests.architectures`` against its own plain forward passes, edited by hand."""

from __future__ import annotations

import copy
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import DynamicLayer, MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from interp.activations import record, sites_of
from interp.anatomy import BLUEPRINTS, UNSUPPORTED, Anatomy
from interp.attention import attention_from_last
from interp.attribution.active_neurons import active_shares
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.edges import edge_attribution
from interp.attribution.examples import corrupted_partners
from interp.attribution.path_patching import patching_scores
from interp.attribution.states import last_token_states
from interp.bridges import bridge_around
from interp.errors import UserError
from interp.inputs import encode
from interp.reading import ReadPrompts
from interp.teacher_forcing import continued
from interventions.bake import fold
from interventions.base import applied
from interventions.dropping import drop
from interventions.export.lora import adapter_config, adapter_of
from interventions.feedforward import FeedForwardScaling
from interventions.folding import Folding
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.architectures import TABLE, random_model, word_conflicts

NAMES = sorted(TABLE)
CONFLICTS = word_conflicts()
PROMPTS = [example.prompt for example in CONFLICTS]
IDS = torch.tensor([[int(word[1:]) for word in prompt.split()] for prompt in PROMPTS])
ANSWERS = torch.tensor([[20 + i, 30 + i] for i in range(len(PROMPTS))])
HEADS = [(0, 0), (0, 3), (1, 2), (2, 1)]
OF_EXPERTS = {"gpt-oss", "llama4", "mixtral", "olmoe", "qwen2-moe", "qwen3-moe"}
WITH_MLP_BIAS = {
    *("bloom", "falcon-7b", "falcon-alibi", "gpt-bigcode", "gpt-bigcode-heads", "gptj", "granite", "opt", "phi"),
    "starcoder2",
}
NOT_BRIDGED = {
    "cohere": "computes something else",
    "cohere-untied": "did not declare 'q_norm'",
    "cohere2": "computes something else",
    "falcon-40b": "new_decoder_architecture",
    "falcon-11b": "new_decoder_architecture",
    "gpt-bigcode-heads": "only supports multi_query=True",
    "phi": "did not declare 'q_norm'",
}
"""What the sentence says that refuses a bridge."""


@cache
def model_of(name: str) -> Any:
    return random_model(name)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name) -> Any:
    """The architecture's model, in float64."""
    return model_of(name)


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=IDS, use_cache=False).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def seen(model: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Z of every layer, what enters the first block and the final norm, and logits, of a plain forward pass."""
    anatomy, kept = Anatomy(model), {}

    def keep(key: Any) -> Any:
        return lambda _, given, named: kept.update({key: given[0] if given else named["hidden_states"]})

    modules = {layer: anatomy.module("output_projection", layer) for layer in range(anatomy.n_layers)}
    modules |= {"first": anatomy.module("block", 0), "last": anatomy.final_norm}
    handles = [module.register_forward_pre_hook(keep(key), with_kwargs=True) for key, module in modules.items()]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return [kept[layer] for layer in range(anatomy.n_layers)], kept["first"], kept["last"], found


def test_steps_and_logits_are_the_models(model):
    anatomy = Anatomy(model)
    z, residual, final, expected = seen(model)
    with torch.inference_mode():
        for layer, values in enumerate(z):
            heads = values.unflatten(-1, (anatomy.n_heads, anatomy.d_head))
            write = anatomy.attention_write(layer, heads)
            parts, bias = anatomy.head_writes(layer, heads)
            assert relative_error(parts.sum(-2) + bias, write) < 1e-6
            residual = anatomy.step(layer, residual, write)
        assert relative_error(residual, final) < 1e-12
        assert relative_error(anatomy.logits(residual), expected) < 1e-12
        chosen = torch.tensor([3, 5])
        assert relative_error(anatomy.logits(residual, chosen), expected[..., chosen]) < 1e-5


def test_z_holds_the_heads_in_their_order(name, model, monkeypatch):
    """Heads are changed where attention is computed, each by itself."""
    anatomy, head = Anatomy(model), 2
    attention: Any = type(anatomy.attention_module(0))
    clean = seen(model)[0][0]
    if attention.__name__ == "GPTJAttention":
        _zero(monkeypatch, attention, "_attn", 0, (slice(None), head))
    elif attention.__name__ == "FalconAttention":
        _zero(monkeypatch, attention, "_split_heads", 0, (slice(None), slice(None), head))
    elif attention.__name__ == "BloomAttention":
        _zero(monkeypatch, attention, "_reshape", 0, (slice(None), head))
    else:
        _zero(
            monkeypatch,
            sys.modules[attention.__module__],
            "eager_attention_forward",
            0,
            (slice(None), slice(None), head),
        )
    changed = (seen(model)[0][0] - clean).unflatten(-1, (anatomy.n_heads, anatomy.d_head)).abs().amax((0, 1, 3))
    assert [at for at in range(anatomy.n_heads) if changed[at] > 0] == [head]


def _zero(monkeypatch: Any, owner: Any, function: str, index: int, place: Any) -> None:
    """Let a function set a part of one of the tensors that it returns to 0."""
    own = getattr(owner, function)

    def changed(*args: Any, **kwargs: Any) -> Any:
        outputs = list(own(*args, **kwargs))
        outputs[index] = outputs[index].clone()
        outputs[index][place] = 0
        return tuple(outputs)

    monkeypatch.setattr(owner, function, changed)


def test_one_sweep_equals_full_forwards(model):
    states = last_token_states(model, PROMPTS)
    replacement = states.z[corrupted_partners(list(CONFLICTS), 0)]
    scores = patching_scores(Anatomy(model), states, replacement, ANSWERS)["logit_diff"]
    clean_z, *_, clean = seen(model)

    def difference(found: torch.Tensor) -> torch.Tensor:
        context, memory = found[:, -1].gather(1, ANSWERS).unbind(1)
        return context - memory

    def patched(layer: int, head: int) -> torch.Tensor:
        anatomy = Anatomy(model)

        def freeze(at: int) -> Any:
            z = clean_z[at].clone()
            if at == layer:
                z[:, -1, head * anatomy.d_head : (head + 1) * anatomy.d_head] = replacement[:, layer, head]
            return lambda _, given: (z, *given[1:])

        projections = [anatomy.module("output_projection", at) for at in range(anatomy.n_layers)]
        handles = [module.register_forward_pre_hook(freeze(at)) for at, module in enumerate(projections)]
        found = logits(model)
        for handle in handles:
            handle.remove()
        return difference(found)

    expected = torch.stack([difference(clean) - patched(*head) for head in HEADS], 1)
    found = torch.stack([scores[:, layer, head] for layer, head in HEADS], 1)
    assert relative_error(found, expected) < 1e-4


def test_direct_logits_add_up_to_the_logit_difference(model):
    parts = direct_logit_attribution(model, CONFLICTS, name="tiny")
    context, memory = logits(model)[:, -1].gather(1, ANSWERS).unbind(1)
    assert relative_error(parts.total.double(), context - memory) < 1e-5


def test_what_is_recorded_of_attention_and_mlp_adds_up_to_the_residual_stream(model):
    anatomy = Anatomy(model)
    states = last_token_states(model, PROMPTS)
    recorded = record(model, PROMPTS, sites_of(model, ["attention", "mlp"]), batch_size=3)
    written = anatomy.residual_multiplier * sum(recorded[site] for site in recorded)
    assert relative_error(states.embedding + written, states.final) < 1e-5


# Edits


def both(model: Any, *edits: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with edits applied, and with the same folded in."""
    with applied(model, *edits):
        expected = logits(model)
    folded = copy.deepcopy(model)
    fold(folded, edits)
    return logits(folded), expected


def test_scaled_heads_are_folded(model):
    # The sums of folding are done in float32.
    found, expected = both(model, HeadScaling((ScaledHead(0, 1, -0.5), ScaledHead(2, 3, 2.0))))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(expected, logits(model)) > 1e-2


def test_scaled_feed_forward_layers_are_folded_or_refused(name, model):
    edit = FeedForwardScaling(((0, 0.3), (1, -1.0), (2, 2.0)))
    if name in OF_EXPERTS:
        before = logits(model)
        with pytest.raises(UserError, match="has experts, not one last linear map"):
            fold(model, [edit])
        assert torch.equal(logits(model), before)
        return
    found, expected = both(model, edit)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(expected, logits(model)) > 1e-2


@pytest.mark.parametrize(("name", "layer"), [("qwen2-moe", 1), ("qwen3-moe", 0), ("llama4", 0)])
def test_a_dense_layer_between_layers_of_experts_is_folded(name, layer):
    found, expected = both(model_of(name), FeedForwardScaling(((layer, 0.3),)))
    assert relative_error(found, expected) < 1e-5


def test_steering_is_folded_or_refused(name, model):
    edit = Steering(1, torch.linspace(-1, 1, Anatomy(model).d_model), 2.0, tokens="all")
    if name not in WITH_MLP_BIAS:
        with pytest.raises(UserError, match="needs a bias to be folded into"):
            fold(model, [edit])
        return
    found, expected = both(model, edit)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(expected, logits(model)) > 1e-2


def test_scaling_a_feed_forward_layer_takes_it_out_of_the_residual_stream(model):
    """Against the anatomy's steps, which were compared with the plain model."""
    anatomy = Anatomy(model)
    z, residual, _, _ = seen(model)
    with applied(model, FeedForwardScaling(((2, 0.0),))):
        found = logits(model)
    with torch.inference_mode():
        for layer, values in enumerate(z):
            write = anatomy.attention_write(layer, values.unflatten(-1, (anatomy.n_heads, anatomy.d_head)))
            residual = anatomy.step(layer, residual, write) if layer < 2 else residual + write
        assert relative_error(found, anatomy.logits(residual)) < 1e-12


@pytest.mark.parametrize("name", ["opt", "llama4", "gpt-oss", "falcon-7b"])
def test_a_gate_opens_for_some_prompts_of_a_batch(name):
    model, edit = model_of(name), FeedForwardScaling(((1, 0.0), (2, -1.0)))
    probe = torch.randn(32, generator=torch.Generator().manual_seed(0))
    read = record(model, PROMPTS, sites_of(model, ["residual"], [0]))
    values = next(iter(read.by_site.values())) @ probe
    is_open = values > values.median()
    with applied(model, ConflictGate("block", 0, probe, 0.0, values.median().item(), (edit,))):
        found = logits(model)
    with applied(model, edit):
        edited = logits(model)
    expected = torch.where(is_open[:, None, None], edited, logits(model))
    assert 0 < is_open.sum() < len(PROMPTS)
    assert relative_error(found, expected) < 1e-12


def test_peft_does_what_the_hooks_do(model):
    edit = HeadScaling(tuple(ScaledHead(layer, head, -0.5) for layer, head in HEADS))
    with applied(model, edit):
        expected = logits(model)
    adapter = adapter_of(model, Folding(edit.folded().heads))
    settings = adapter_config(adapter, "tiny")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    weights = {}
    for path, factors in adapter.factors.items():
        weights[f"base_model.model.{path}.lora_A.weight"] = factors.down
        weights[f"base_model.model.{path}.lora_B.weight"] = factors.up
    peft.set_peft_model_state_dict(adapted, weights)
    assert relative_error(logits(adapted.double().eval()), expected) < 1e-6


def test_a_bridge_does_what_the_plain_model_does_or_is_refused(name):
    plain = copy.deepcopy(model_of(name)).float()
    direction = torch.linspace(-1, 1, Anatomy(plain).d_model)
    edits = (HeadScaling.of(HEADS, -0.5), FeedForwardScaling(((1, 0.3),)), Steering(1, direction, tokens="all"))
    with applied(plain, *edits):
        expected = logits(plain)
    z = last_token_states(plain, PROMPTS).z
    if name in NOT_BRIDGED:
        with pytest.raises(UserError, match=NOT_BRIDGED[name]):
            bridge_around(plain)
        return
    bridge = bridge_around(plain)
    with applied(bridge, *edits):
        assert relative_error(logits(bridge.original_model), expected) < 1e-5
    states = last_token_states(bridge, PROMPTS)
    torch.testing.assert_close(states.z, z, rtol=1e-4, atol=1e-5)
    # The sweep compares the clean stream with the bridge's own.
    patching_scores(Anatomy(bridge), states, torch.zeros_like(states.z), ANSWERS)


# Whose weights these are


def test_an_identity_knows_its_model_and_no_other(model):
    identity = ModelIdentity.model_validate_json(ModelIdentity.of(model, "tiny").model_dump_json())
    identity.check(model)
    identity.check(copy.deepcopy(model).bfloat16())
    for path, weight in Anatomy(model).sampled_weights():
        assert weight.numel() > 0
        if ".1." not in path:
            continue
        other = copy.deepcopy(model)
        (changed,) = (w for p, w in dict(Anatomy(other).sampled_weights()).items() if p == path)
        with torch.no_grad():
            changed += 1
        with pytest.raises(UserError, match="sampled weights differ"):
            identity.check(other)


# What else looks inside


def test_attention_weights_are_the_models(model):
    with torch.inference_mode():
        expected = model(input_ids=IDS[:1], use_cache=False, output_attentions=True).attentions
    found = attention_from_last(model, PROMPTS[0], HEADS).weights
    wanted = torch.stack([expected[layer][0, head, -1] for layer, head in HEADS])
    assert relative_error(found.double(), wanted) < 1e-6


def test_neurons_are_counted_or_refused(name, model):
    items = [continued(model, prompt, "w5") for prompt in PROMPTS]
    if name in OF_EXPERTS:
        with pytest.raises(UserError, match="has experts, whose neurons are not there for every token"):
            active_shares(model, items)
        return
    anatomy, kept = Anatomy(model), {}
    handle = anatomy.mlp_activation(1).register_forward_hook(lambda *args: kept.update(neurons=args[2]))
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    neurons = kept["neurons"].reshape(*IDS.shape, -1)
    assert neurons.shape[-1] == anatomy.d_mlp
    torch.testing.assert_close(active_shares(model, items)[:, 1], (neurons[:, -1] > 0).float().mean(-1))


@pytest.mark.parametrize(
    "name", ["olmo2", "cohere", "granite", "opt", "falcon-7b", "gptj", "bloom", "gpt-oss", "llama4"]
)
def test_edges_from_the_embedding_hold_its_whole_gradient(name):
    """With one step they add up to the gradient at the clean embedding, times the change of it."""
    model = model_of(name)
    scores = edge_attribution(model, CONFLICTS, name="tiny", steps=1)
    examples = list(CONFLICTS)
    partners = corrupted_partners(examples, 0)
    total = 0.0
    for i, partner in enumerate(partners):
        embeddings = [seen_embedding(model, IDS[[row]]) for row in (i, partner)]
        offset = torch.zeros_like(embeddings[0], requires_grad=True)
        handle = (
            Anatomy(model)
            .module("block", 0)
            .register_forward_pre_hook(
                lambda _, given, named, offset=offset: (
                    ((given[0] + offset, *given[1:]), named)
                    if given
                    else (given, {**named, "hidden_states": named["hidden_states"] + offset})
                ),
                with_kwargs=True,
            )
        )
        answers = model(input_ids=IDS[[i]], use_cache=False).logits[0, -1, ANSWERS[i]]
        handle.remove()
        (gradient,) = torch.autograd.grad(answers[0] - answers[1], offset)
        total += ((embeddings[0] - embeddings[1]) * gradient).sum().item() / len(partners)
    assert scores.values[0].sum().item() == pytest.approx(total, rel=1e-4)


def seen_embedding(model: Any, ids: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = (
        Anatomy(model)
        .module("block", 0)
        .register_forward_pre_hook(
            lambda _, given, named: kept.append(given[0] if given else named["hidden_states"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return kept[0]


def test_prompts_of_different_lengths_go_on_from_what_was_read(name):
    model = copy.deepcopy(model_of(name)).float()
    prompts = ["w5 w6 w7 w8 w9 w10 w11 w12 w13", "w5 w6 w3", "w7 w8 w1 w2 w9"]
    for prompt, (numbers, found) in zip(prompts, ReadPrompts(model, prompts, batch_size=1).next_logits(), strict=True):
        prompt = prompts[numbers[0]]
        with torch.inference_mode():
            alone = model(**encode(model, [prompt])).logits[0, -1]
        assert relative_error(found[0], alone) < 1e-4
    ((numbers, together),) = ReadPrompts(model, prompts).next_logits()
    for row, number in enumerate(numbers):
        with torch.inference_mode():
            alone = model(**encode(model, [prompts[number]])).logits[0, -1]
        assert relative_error(together[row], alone) < 1e-4


def test_what_prompts_begin_with_is_read_once_for_all(name):
    model = copy.deepcopy(model_of(name)).float()
    beginning = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10"
    prompts = [f"{beginning} {rest}" for rest in ("w3 w4", "w11 w12 w13 w2 w5", "w7 w8 w1")]
    shapes = []
    handle = Anatomy(model).body.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    read = ReadPrompts(model, prompts, edited=False)
    handle.remove()
    (one, n_shared), (all_rows, n_rest) = shapes
    assert (one, all_rows) == (1, 3)
    # Where a layer forgets what is far away, prompts are read whole.
    forgets = any(type(layer) is not DynamicLayer for layer in read._batches[0].cache.layers)
    assert n_rest + 1 == read.padded_tokens(0) // 3 - (0 if forgets else n_shared)
    ((numbers, found),) = read.next_logits()
    for row, number in enumerate(numbers):
        with torch.inference_mode():
            alone = model(**encode(model, [prompts[number]])).logits[0, -1]
        assert relative_error(found[row], alone) < 1e-4


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"word_embed_proj_dim": 16}, "projects embeddings of width 16 to a residual stream of width 32"),
        ({"do_layer_norm_before": False}, r"\(do_layer_norm_before = False\) normalises the residual stream"),
    ],
)
def test_a_model_that_does_more_than_a_blueprint_says_is_refused(settings, message):
    config = OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=10)
    config.update({"word_embed_proj_dim": 32, **settings})
    with pytest.raises(UserError, match=message):
        Anatomy(OPTForCausalLM(config))


def test_recurrent_blocks_are_refused_in_a_sentence_that_says_so():
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=10)
    with pytest.raises(UserError, match="has recurrent blocks, which have no attention heads"):
        Anatomy(MambaForCausalLM(config))


def test_no_architecture_is_both_known_and_unsupported():
    assert not BLUEPRINTS.keys() & UNSUPPORTED.keys()


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_feed_forward_parts_that_are_no_module_cannot_be_left_out(name):
    with pytest.raises(UserError, match="no modules of their own"):
        drop(model_of(name), [1])


def test_nothing_about_an_architecture_stands_outside_the_anatomy():
    """No class name of an architecture, and no path of one's parts."""
    root = Path(__file__).parents[2]
    paths = {getattr(b, f) for b in BLUEPRINTS.values() for f in ("query", "output_projection", "mlp_output", "blocks")}
    names = [re.escape(name) for name in (*BLUEPRINTS, *UNSUPPORTED, *sorted(path for path in paths if path))]
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(names)})(?!\w)")
    found = []
    for package in ("conflictscope", "interventions", "probes", "figures", "interp"):
        for path in sorted((root / package).rglob("*.py")):
            code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            if path.name != "anatomy.py" and (match := pattern.search(code)):
                found.append(f"{path.relative_to(root)}: {match[0]}")
    assert found == []
