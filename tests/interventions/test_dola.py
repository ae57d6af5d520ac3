"""DoLa against the paper's formula in numpy, from transformers' hidden states, one prompt at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.decoding import CAD
from interventions.dola import DoLa
from interventions.gate import ConflictGate
from interventions.identity import ModelIdentity
from interventions.juice import AddedHead, JuICE
from interventions.two_streams import generate
from tests.tiny import few_bridges

tiny_bridge = few_bridges
PROMPTS = ["The capital of France is", "In", "Lima is in Chile. Lima is in the country of"]
EDIT = DoLa((0, 1))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_hand(network: Any, ids: torch.Tensor, layers: tuple[int, ...]) -> np.ndarray:
    """Scores of every token of one prompt, ``(n_tokens, d_vocab)``; minus infinity where none may be chosen."""
    anatomy = Anatomy(network)
    with torch.inference_mode():
        output = network(input_ids=ids, output_hidden_states=True, use_cache=False)
        early = [anatomy.logits(output.hidden_states[layer + 1][0]).double().numpy() for layer in layers]
    final = output.logits[0].double().numpy()
    scores = np.full(final.shape, -np.inf)
    for t in range(len(final)):
        q = softmax(final[t])
        others = [softmax(one[t]) for one in early]
        middles = [(q + other) / 2 for other in others]
        apart = [
            0.5 * (q * np.log(q / m)).sum() + 0.5 * (other * np.log(other / m)).sum()
            for other, m in zip(others, middles, strict=True)
        ]
        premature = others[int(np.argmax(apart))]
        plausible = q >= 0.1 * q.max()
        scores[t, plausible] = np.log(q[plausible]) - np.log(premature[plausible])
    return scores


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-neox"])
def test_scores_are_those_of_the_formula_at_every_token(tiny_model, tiny_directories, architecture):
    bridge = tiny_model(architecture)
    plain = load_model(str(tiny_directories[architecture]), device="cpu")
    inputs = encode(plain, PROMPTS)
    expected = [by_hand(plain, encode(plain, [prompt])["input_ids"], EDIT.layers) for prompt in PROMPTS]
    for model, network in ((plain, plain), (bridge, bridge.original_model)):
        with applied(model, EDIT), torch.inference_mode():
            logits = network(**inputs).logits
            last = network(**inputs, logits_to_keep=1).logits[:, -1]
        for row, scores in enumerate(expected):
            found = logits[row, -len(scores) :].double().numpy()
            assert (np.isinf(found) == np.isinf(scores)).mean() > 0.999
            both = ~np.isinf(found) & ~np.isinf(scores)
            np.testing.assert_allclose(found[both], scores[both], atol=2e-3)
            np.testing.assert_allclose(last[row].exp().numpy(), logits[row, -1].exp().numpy(), rtol=1e-3, atol=1e-6)


def test_any_tokens_logits_may_be_asked_for_and_a_copy_reads_with_its_own_weights(tiny_plain):
    model = tiny_plain("llama")
    ids = torch.tensor([[5, 9, 2, 7]])
    with applied(model, EDIT), torch.inference_mode():
        every = model(ids).logits
        some = model(ids, logits_to_keep=torch.tensor([1, 3])).logits
        other = copy.deepcopy(model)
        other.get_output_embeddings().weight *= 2
        found = other(ids).logits[0].double().numpy()
    torch.testing.assert_close(some, every[:, [1, 3]])
    plain = tiny_plain("llama")
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        changed.get_output_embeddings().weight *= 2
    expected = by_hand(changed, ids, EDIT.layers)
    both = ~np.isinf(found) & ~np.isinf(expected)
    assert both.any()
    np.testing.assert_allclose(found[both], expected[both], atol=2e-3)


def test_generated_batches_equal_one_prompt_at_a_time_without_a_cache(tiny_bridge):
    network: Any = tiny_bridge.original_model
    inputs = encode(tiny_bridge, PROMPTS)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with applied(tiny_bridge, EDIT):
        written = network.generate(**prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, prompt in zip(written[:, inputs["input_ids"].shape[1] :].tolist(), PROMPTS, strict=True):
        ids = encode(tiny_bridge, [prompt])["input_ids"]
        start = ids.shape[1]
        for _ in range(4):
            token = int(by_hand(network, ids, EDIT.layers)[-1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert row == ids[0, start:].tolist()


def test_files_hold_it_and_the_model_is_as_before_afterwards(tiny_llama, tmp_path):
    network: Any = tiny_llama.original_model
    InterventionFile.of([EDIT], name="early", model=ModelIdentity.of(network, "tiny")).save(tmp_path / "early.json")
    assert InterventionFile.load(tmp_path / "early.json").build() == [EDIT]
    inputs = encode(tiny_llama, PROMPTS)
    with torch.inference_mode():
        before = network(**inputs).logits
        with applied(tiny_llama, EDIT):
            assert not torch.equal(network(**inputs).logits, before)
        assert torch.equal(network(**inputs).logits, before)


def test_what_cannot_be_is_refused_in_a_sentence(tiny_llama):
    network: Any = tiny_llama.original_model
    ids = encode(tiny_llama, PROMPTS)["input_ids"]
    with pytest.raises(UserError, match="give one at least"):
        DoLa(())
    with pytest.raises(UserError, match="listed twice"):
        DoLa((0, 0))
    with pytest.raises(UserError, match="layer 2, the last one"):
        DoLa((0, 2)).attach(tiny_llama)
    with pytest.raises(UserError, match="Layer 9 does not exist"):
        DoLa((9,)).attach(tiny_llama)
    with pytest.raises(UserError, match="apply it without a gate"):
        ConflictGate("block", 0, torch.zeros(Anatomy(tiny_llama).d_model), 0.0, 0.0, (EDIT,))
    with applied(tiny_llama, EDIT):
        with pytest.raises(UserError, match="without a pass through the whole model"):
            network.forward(input_ids=ids)
        for other in (EDIT, JuICE((AddedHead(1, 0, 1.0),))):
            with pytest.raises(UserError, match="made of two by one edit, not by several"):
                other.attach(tiny_llama)
        with pytest.raises(UserError, match="which a rule for two prompts cannot weigh"):
            generate(network, CAD(1.0), input_ids=ids[:1], without={"input_ids": ids[2:, -4:]}, max_new_tokens=1)
        with torch.inference_mode():
            network(input_ids=ids)
