from dataclasses import replace

import pytest
import torch

from benchmarks.reference import full_forward_patch, z_of
from interp.anatomy import Anatomy
from interp.attribution import path_patching as patching_module
from interp.attribution.examples import with_partners
from interp.attribution.path_patching import corrupted_partners, n_blocks, patching_scores, path_patching, scorable
from interp.attribution.scores import HeadScores
from interp.attribution.states import last_token_states
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.models import load_model
from tests.tiny import tiny_conflicts


def brute_force(bridge, examples, token_ids, replacement, heads):
    """Full forwards: the change of the answers' logits ``(n, n_heads_given, 2)`` and log probabilities."""
    prompts = [e.prompt for e in examples]
    clean_z = z_of(bridge, prompts)
    layer, head = heads[0]
    untouched = clean_z[layer][:, -1].unflatten(-1, replacement.shape[2:])[:, head]
    clean = full_forward_patch(bridge, prompts, clean_z, untouched, layer, head)
    patched = torch.stack(
        [
            full_forward_patch(bridge, prompts, clean_z, replacement[:, layer, head], layer, head)
            for layer, head in heads
        ],
        1,
    )
    ids = token_ids.unsqueeze(1).expand(-1, len(heads), -1)
    logits = patched.gather(2, ids) - clean.gather(1, token_ids).unsqueeze(1)
    log_p = patched.log_softmax(-1).gather(2, ids) - clean.log_softmax(-1).gather(1, token_ids).unsqueeze(1)
    return logits, log_p


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def conflicts() -> ConflictSet:
    return tiny_conflicts()


def test_one_sweep_equals_full_forwards_in_every_architecture(tiny_bridge, conflicts):
    examples, token_ids = scorable(tiny_bridge, conflicts)
    states = last_token_states(tiny_bridge, [e.prompt for e in examples])
    replacement = states.z[corrupted_partners(examples, 0)]
    anatomy = Anatomy(tiny_bridge)
    heads = [(layer, head) for layer in range(anatomy.n_layers) for head in range(anatomy.n_heads)]

    logits, log_p = brute_force(tiny_bridge, examples, token_ids, replacement, heads)
    scores = patching_scores(
        anatomy, states, replacement, token_ids, metrics=("logit_diff", "memory_probability", "context_probability")
    )

    assert relative_error(scores["logit_diff"].flatten(1), logits[..., 1] - logits[..., 0]) < 1e-4
    assert relative_error(scores["context_probability"].flatten(1), -torch.expm1(log_p[..., 0])) < 1e-4
    assert relative_error(scores["memory_probability"].flatten(1), torch.expm1(log_p[..., 1])) < 1e-4


def test_one_sweep_equals_full_forwards_on_the_real_model(smollm2, capital_conflicts):
    conflicts = ConflictSet("three", capital_conflicts.select(kind="conflict").examples[:3])
    examples, token_ids = scorable(smollm2, conflicts)
    states = last_token_states(smollm2, [e.prompt for e in examples])
    replacement = torch.zeros_like(states.z)
    heads = [(0, 0), (7, 5), (15, 8), (23, 4), (24, 4), (29, 6)]

    logits, _ = brute_force(smollm2, examples, token_ids, replacement, heads)
    scores = patching_scores(Anatomy(smollm2), states, replacement, token_ids)["logit_diff"]

    found = torch.stack([scores[:, layer, head] for layer, head in heads], 1)
    assert relative_error(found, logits[..., 1] - logits[..., 0]) < 1e-4


def test_half_precision_scores_are_close_to_full_precision(tiny_llama, tiny_directories, conflicts):
    half = load_model(str(tiny_directories["llama"]), device="cpu", dtype="bfloat16")
    expected = path_patching(tiny_llama, conflicts, name="tiny", baseline="zero")["logit_diff"].values
    found = path_patching(half, conflicts, name="tiny", baseline="zero")["logit_diff"].values
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.99


def test_memory_budget_does_not_change_the_scores(tiny_llama, conflicts):
    roomy = path_patching(tiny_llama, conflicts, name="tiny")["logit_diff"].values
    tight = path_patching(tiny_llama, conflicts, name="tiny", memory_budget=1)["logit_diff"].values
    torch.testing.assert_close(tight, roomy, rtol=1e-4, atol=1e-5)


def test_frozen_mlps_leave_only_the_direct_path(tiny_llama, conflicts):
    """With MLPs frozen a head's effect is its own change of z, unembedded: a closed form without any stream."""
    examples, token_ids = scorable(tiny_llama, conflicts)
    states = last_token_states(tiny_llama, [e.prompt for e in examples])
    hf = tiny_llama.original_model
    layer, head, d_head = 1, 2, states.z.shape[-1]
    weight = hf.model.layers[layer].self_attn.o_proj.original_component.weight
    write = states.z[:, layer, head] @ weight[:, head * d_head : (head + 1) * d_head].T
    logits = [hf.lm_head(hf.model.norm(final)) for final in (states.final, states.final - write)]
    clean, patched = (row.gather(1, token_ids) for row in logits)
    expected = (clean[:, 0] - clean[:, 1]) - (patched[:, 0] - patched[:, 1])

    scores = path_patching(tiny_llama, conflicts, name="tiny", baseline="zero", mlps="frozen")["logit_diff"].values

    torch.testing.assert_close(scores[:, layer, head], expected, rtol=1e-4, atol=1e-5)


def test_mean_baseline_is_the_mean_over_the_set(tiny_llama, conflicts):
    examples, token_ids = scorable(tiny_llama, conflicts)
    states = last_token_states(tiny_llama, [e.prompt for e in examples])
    mean = torch.stack([states.z.mean(0)] * len(examples))
    expected = patching_scores(Anatomy(tiny_llama), states, mean, token_ids)["logit_diff"]
    found = path_patching(tiny_llama, conflicts, name="tiny", baseline="mean")["logit_diff"].values
    torch.testing.assert_close(found, expected)


def test_corrupted_partners_share_the_template_and_differ_in_subject_and_answers(conflicts):
    examples = list(conflicts)
    for example, partner in zip(examples, corrupted_partners(examples, 3), strict=True):
        other = examples[partner]
        assert other.template == example.template
        assert other.subject != example.subject
        assert other.memory_answers != example.memory_answers
        assert other.context_answers != example.context_answers


def test_padding_does_not_change_the_recorded_states(tiny_bridge, conflicts):
    prompts = [e.prompt for e in conflicts]
    together = last_token_states(tiny_bridge, prompts)
    alone = last_token_states(tiny_bridge, prompts, batch_size=1)
    torch.testing.assert_close(together.z, alone.z, rtol=1e-4, atol=1e-5)


def test_a_wrong_anatomy_is_an_error_not_a_number(tiny_llama, conflicts, monkeypatch):
    monkeypatch.setattr(Anatomy, "mlp_write", lambda _self, _layer, mlp_input: torch.zeros_like(mlp_input))
    with pytest.raises(RuntimeError, match="does not reproduce its forward pass"):
        path_patching(tiny_llama, conflicts, name="tiny")


@pytest.mark.parametrize("option", [{"baseline": "noise"}, {"mlps": "none"}, {"metrics": ("kl",)}])
def test_unknown_option_lists_the_valid_ones(tiny_llama, conflicts, option):
    with pytest.raises(UserError, match="must be one of"):
        path_patching(tiny_llama, conflicts, name="tiny", **option)


def test_nothing_to_attribute_is_an_error(tiny_llama):
    with pytest.raises(UserError, match="No example can be attributed"):
        path_patching(tiny_llama, ConflictSet("empty", ()), name="tiny")


def test_examples_with_partners_all_find_one(conflicts):
    examples = [example for example in conflicts if example.kind == "conflict"]
    lonely = replace(examples[0], id="lonely", template="a phrasing of its own")
    assert lonely not in with_partners([*examples, lonely])
    kept = with_partners(examples)
    assert kept == examples
    assert len(corrupted_partners(kept, 0)) == len(kept)
    assert with_partners(examples[:1]) == []


def test_blocks_that_are_scored_apart_are_what_all_at_once_give(tiny_llama, monkeypatch):
    """To the last digit; and all in one block is the same to rounding, each example with the same partner."""
    conflicts, options = tiny_conflicts(), {"name": "tiny", "metrics": ("logit_diff", "memory_probability"), "seed": 3}
    one = path_patching(tiny_llama, conflicts, **options)
    monkeypatch.setattr(patching_module, "BLOCK", 5)
    count = n_blocks(tiny_llama, conflicts)
    assert count == -(-len(one["logit_diff"].example_ids) // 5) > 2
    whole = path_patching(tiny_llama, conflicts, **options)
    partners = corrupted_partners(scorable(tiny_llama, conflicts)[0], 3)
    for metric, scores in whole.items():
        apart = [path_patching(tiny_llama, conflicts, **options, blocks=[b], partners=partners) for b in range(count)]
        merged = HeadScores.merged([part[metric] for part in apart])
        assert torch.equal(merged.values, scores.values)
        assert replace(merged, values=scores.values) == scores
        assert relative_error(scores.values, one[metric].values) < 1e-5
        assert scores.settings == one[metric].settings
    with pytest.raises(UserError, match="do not belong together"):
        HeadScores.merged([whole["logit_diff"], replace(whole["logit_diff"], settings={"seed": 4})])
    with pytest.raises(UserError, match="needs all of them"):
        path_patching(tiny_llama, conflicts, name="tiny", baseline="mean", blocks=[0])
