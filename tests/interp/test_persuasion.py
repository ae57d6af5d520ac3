"""DYNAMICQA's measures against closed forms, and samples against passes of their own."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from interp.conflicts import ConflictSet
from interp.entailment import Entailment
from interp.errors import UserError
from interp.generation import next_logits
from interp.persuasion import (
    Sampled,
    Sampling,
    clustered,
    coherent_persuasion,
    persuasion,
    semantic_entropy,
)
from interp.teacher_forcing import Continued, predicting_residuals
from tests.tiny import tiny_conflicts


def sampled(distributions, log_likelihoods=None):
    rows = torch.tensor(distributions)
    likelihoods = torch.zeros(len(rows)) if log_likelihoods is None else torch.tensor(log_likelihoods)
    return Sampled([str(i) for i in range(len(rows))], rows, likelihoods, rows[0])


def test_persuasion_is_the_mean_divergence_of_all_pairs_of_clusters():
    """Two clusters against one, by hand: KL((.5, .5) || (.25, .75)) and KL((.9, .1) || (.25, .75))."""
    with_context = sampled([[0.4, 0.6], [0.6, 0.4], [0.9, 0.1]])
    without = sampled([[0.25, 0.75], [0.25, 0.75]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log(0.1 / 0.75)
    found = coherent_persuasion(with_context, without, [[0, 1], [2]], [[0, 1]])
    assert found == pytest.approx((first + second) / 2, rel=1e-6)
    assert coherent_persuasion(without, without, [[0], [1]], [[0, 1]]) == pytest.approx(0, abs=1e-9)
    # What has no probability with the context adds nothing.
    sure = sampled([[1.0, 0.0]])
    assert coherent_persuasion(sure, without, [[0]], [[0, 1]]) == pytest.approx(math.log(4), rel=1e-6)


def test_semantic_entropy_is_that_of_the_clusters():
    log_p = [math.log(0.2), math.log(0.3), math.log(0.1)]
    found = semantic_entropy(sampled([[1.0, 0.0]] * 3, log_p), [[0, 1], [2]])
    assert found == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=1e-6)
    assert semantic_entropy(sampled([[1.0, 0.0]] * 2, [math.log(0.5)] * 2), [[0, 1]]) == pytest.approx(0, abs=1e-6)


def test_answers_that_say_the_same_belong_together():
    answers = ["It is Rome", "Rome.", "the capital is Lima", "I don't know", "Not mentioned", "Rome or Lima", "Rome"]
    known = [("Rome", "Roma"), ("Lima",)]
    assert clustered(answers, known) == [[0, 1, 6], [2], [3, 4], [5]]
    assert clustered(["the Sill", "Sill", "sill!"]) == [[0, 1, 2]]

    def same(one, other):
        return set(one.split()) <= set(other.split())

    assert clustered(["a b", "b a", "a", "a b"], same=same) == [[0, 1, 3], [2]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_samples_have_the_distributions_of_forced_passes(architecture, tiny_plain):
    model = tiny_plain(architecture)
    prompt = next(iter(tiny_conflicts())).prompt
    sampling = Sampling(samples=3, temperature=0.8, new_tokens=4)
    found = sampling.sampled(model, prompt)
    again = sampling.sampled(model, prompt)
    assert found.answers == again.answers
    assert Sampling(samples=3, temperature=0.8, new_tokens=4, seed=1).sampled(model, prompt).answers != found.answers
    ((_, logits),) = next_logits(model, [prompt])
    torch.testing.assert_close(found.first, logits[0].float().softmax(-1), atol=1e-5, rtol=1e-4)
    assert found.distributions.sum(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    # Forced: the tokens that were sampled, read in one pass.
    from interp import persuasion as module

    seen = []
    real = module._summed_up
    module._summed_up = lambda model, said, log_p: seen.append((said, log_p)) or real(model, said, log_p)
    try:
        sampling.sampled(model, prompt)
    finally:
        module._summed_up = real
    said, _ = seen[0]
    from interp.anatomy import Anatomy
    from interp.inputs import token_ids, tokenizer_of

    before = token_ids(tokenizer_of(model), [prompt])[0]
    ends = model.generation_config.eos_token_id
    for row, likelihood, mean in zip(said, found.log_likelihoods.tolist(), found.distributions, strict=True):
        tokens = row.tolist()
        kept = tokens[: tokens.index(ends) + 1] if ends in tokens else tokens
        item = Continued((*before, *kept), len(kept))
        with torch.no_grad():
            log_p = Anatomy(model).logits(predicting_residuals(model, [item])).float().log_softmax(-1)
        assert likelihood == pytest.approx(float(np.mean([log_p[i, t] for i, t in enumerate(kept)])), abs=1e-4)
        torch.testing.assert_close(mean, log_p.exp().mean(0), atol=1e-5, rtol=1e-3)


def test_each_prompt_is_measured_against_itself_without_its_context(tiny_plain):
    model = tiny_plain("llama")
    conflicts = tiny_conflicts()
    frame = persuasion(model, conflicts, Sampling(samples=3, new_tokens=3))
    assert frame["id"].to_list() == [e.id for e in conflicts if e.contexts and e.bare_prompt]
    some = {e.id: e for e in conflicts}
    for row in frame.iter_rows(named=True):
        p, q = (
            next(next_logits(model, [prompt]))[1][0].double().softmax(-1)
            for prompt in (some[row["id"]].prompt, some[row["id"]].bare_prompt)
        )
        entropies = [-(x * x.log()).sum().item() for x in (p, q, (p + q) / 2)]
        assert row["confidence_gain"] == pytest.approx(entropies[1] - entropies[0], abs=1e-4)
        assert row["divergence"] == pytest.approx(entropies[2] - (entropies[0] + entropies[1]) / 2, abs=1e-4)
        assert row["coherent_persuasion"] >= 0
        assert len(row["answers"]) == 3
    with pytest.raises(UserError, match="has no prompt with a context that can be asked without it"):
        persuasion(model, ConflictSet("none", ()))


def test_entailment_is_a_classifiers_label(tiny_directories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_directories["llama"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.id2label, config.pad_token_id = {0: "contradiction", 1: "ENTAILMENT", 2: "neutral"}, 0
    torch.manual_seed(0)
    network = LlamaForSequenceClassification(config).eval()
    network.save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    entails = Entailment(tmp_path / "nli")
    pairs = [("Rome", "Paris"), ("Lima", "Rome and Paris"), ("Cairo is old", "Cairo"), ("Peru", "Egypt is large")]
    for one, other in pairs:
        logits = network(**tokenizer(one, other, return_tensors="pt")).logits[0]
        assert entails(one, other) == (int(logits.argmax()) == 1)
    assert entails("Rome", "Rome")
    network.config.id2label = {0: "a", 1: "b", 2: "c"}
    network.save_pretrained(tmp_path / "nli")
    with pytest.raises(UserError, match="none of which is entailment"):
        Entailment(tmp_path / "nli")
    with pytest.raises(UserError, match=r"Could not load .* as a classifier"):
        Entailment(tmp_path / "missing")
