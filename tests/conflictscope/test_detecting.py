"""Detectors of a tiny model that is taken to know all it is asked."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score

from conflictscope.detecting import TESTED, detecting_parts
from conflictscope.detectors import Detecting, Part
from interp.activations import record, sites_of
from interp.anatomy import Anatomy, transformers_model
from interp.conflicts import ConflictSet
from interp.facts import usable_facts
from interp.families import FAMILIES, UNSEEN_FAMILIES
from interp.files import read_json
from interp.inputs import tokenizer_of
from tests.conflictscope import small_studies
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run, small = test_cli.run, small_studies.small
OPTIONS = ("--relation", "capital", "--relation", "language", "--unseen-relation", "continent", "--out", "out")


@pytest.fixture(scope="module")
def asked(tiny_llama):
    facts = {name: usable_facts(name)[:30] for name in ("capital", "language", "continent")}
    return detecting_parts(
        {name: facts[name] for name in ("capital", "language")}, {"continent": facts["continent"]},
        tokenizer_of(tiny_llama), each=2,
    )  # fmt: skip


def test_what_is_unseen_in_a_part_was_not_learned_from(asked):
    def of(part, key):
        return {key(example) for example in asked[part]}

    unseen = {family.name for family in UNSEEN_FAMILIES}
    assert set(asked) == {"train", "dev", *TESTED}
    for part in asked:
        is_new = part in ("unseen_families", "unseen_both")
        assert (of(part, lambda e: e.template) <= unseen) is is_new
        assert (of(part, lambda e: e.relation) == {"continent"}) is (part in ("unseen_relations", "unseen_both"))
        assert len(of(part, lambda e: e.kind)) == 4
    learned = [of(part, lambda e: e.subject) for part in ("train", "dev")]
    for part in TESTED:
        assert not of(part, lambda e: e.subject) & set.union(*learned)
    assert not set.intersection(*learned)


def small_part(model, examples):
    """What a tiny model holds at the ends of some prompts."""
    prompts, n = ConflictSet("some", tuple(examples)), Anatomy(model).n_layers
    sites = [*sites_of(model, ["z"]), *sites_of(model, ["residual"])]
    last = sites_of(model, ["residual"])[n - 1]
    bare = record(model, [example.bare_prompt for example in prompts], [last])[last]
    return Part(prompts, record(model, prompts, sites), bare)


def by_kind(prompts, each):
    return [e for kind in ("conflict", "aligned", "none") for e in prompts.select(kind=kind).examples[:each]]


@pytest.fixture(scope="module")
def bench(tiny_llama, asked):
    parts = {name: small_part(tiny_llama, by_kind(asked[name], 6)) for name in ("train", "dev", "unseen_families")}
    return Detecting(tiny_llama, parts, [(1, 0), (2, 3)], [(1, 2), (1, 3)], strengths=[1.0])


def test_the_head_lens_reads_what_heads_write_through_the_models_own_weights(bench, tiny_llama):
    part = bench.parts["dev"]
    found = bench._lens(part, bench.memory_heads, bench.context_heads)
    network: Any = transformers_model(tiny_llama)
    residual = part.states["blocks.2.hook_out"].double()
    scale = (residual.square().mean(1, keepdim=True) + network.config.rms_norm_eps).rsqrt()
    named = []
    for heads in (bench.memory_heads, bench.context_heads):
        write = torch.zeros_like(residual)
        for layer, head in heads:
            z = part.states[f"blocks.{layer}.attn.o.hook_in"][:, head].double()
            columns = slice(head * z.shape[1], (head + 1) * z.shape[1])
            write += z @ network.model.layers[layer].self_attn.o_proj.weight[:, columns].T.double()
        normed = write * scale * network.model.norm.weight.double()
        named.append((normed @ network.lm_head.weight.T.double()).softmax(-1).detach().numpy())
    expected = [jensenshannon(p, q) ** 2 for p, q in zip(*named, strict=True)]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found[:, 1], named[0].argmax(1) != named[1].argmax(1))


def test_two_passes_see_nothing_where_there_is_no_context(bench):
    part = bench.parts["dev"]
    is_bare = torch.tensor([variant == "none" for variant in part.variants])
    features = bench._two_passes(part)
    assert features[is_bare].abs().max() < 1e-4 < features[~is_bare, 0].min()


def test_named_tokens_spell_what_stands_in_the_prompt_alone(bench, tiny_llama):
    """By the characters of the texts; a token that begins with a space names the same as one that does not."""
    part, tokenizer = bench.parts["dev"], tokenizer_of(tiny_llama)
    for example, ids in zip(part.prompts, bench._named(part), strict=True):
        spelled = {tokenizer.decode([token]).strip().lower() for token in ids}
        assert all(text in example.prompt.lower() for text in spelled)
        whole, bare = (tokenizer.tokenize(text) for text in (example.prompt, example.bare_prompt))
        alone = {tokenizer.convert_tokens_to_string([token]).strip().lower() for token in bare}
        assert not spelled & alone
        told = {tokenizer.convert_tokens_to_string([token]).strip().lower() for token in whole} - alone
        assert spelled == {text for text in told if any(letter.isalnum() for letter in text)}
        assert (example.kind == "none") <= (not ids)
    features = bench._named_tokens(part)
    is_bare = torch.tensor([variant == "none" for variant in part.variants])
    assert not features[is_bare][:, [0, 1, 4, 5, 6]].any()
    assert features[~is_bare][:, 3].min() > math.log(1e-4)


def test_the_joint_probe_reads_the_middle_layers_and_costs_as_much(bench):
    assert bench.z_sites == ["blocks.1.attn.o.hook_in"]
    costs = {detector.name: detector.passes for make in (bench.joint, bench.two_passes) for detector in make()}
    assert (costs["z, middle layers"], costs["z, middle and upper layers"]) == (0.667, 1.0)
    assert costs["two passes: divergence"] == 2


def test_all_is_written_and_a_second_run_takes_what_the_first_kept(small, run, tiny_directories, tmp_path, monkeypatch):
    monkeypatch.setattr("interp.statistics.RESAMPLES", 40)
    # The second is more than so few families can promise.
    monkeypatch.setattr("conflictscope.detecting.KEPT_SHARES", (0.4, 0.99))
    command = ("gate", "detectors", "--model", tiny_directories["llama"], *OPTIONS, "--quick")
    code, _, error = run(*command)
    assert code == 0, error
    found, scores = read_json(tmp_path / "out/detectors.json"), pl.read_parquet(tmp_path / "out/scores.parquet")
    assert set(scores["template"]) <= set(FAMILIES)
    assert not set(found["memory_heads"][0]) - {0, 1, 2, 3}
    for detector in found["detectors"]:
        part = scores.filter(part="unseen_families")
        labels = (part["variant"] == "conflict").to_numpy()
        written = detector["parts"]["unseen_families"]["all"]["auroc"]["value"]
        assert written == pytest.approx(roc_auc_score(labels, part[detector["name"]]), abs=1e-6)
    assert [one["keep"] for one in found["thresholds"]] == [0.4]
    for one in found["thresholds"]:
        passing = scores.filter(part="unseen_families", variant="none")["z, middle layers"] > one["threshold"]
        assert one["parts"]["unseen_families"]["none"]["value"] == pytest.approx(passing.mean())
    dev = scores.filter(part="dev", variant="conflict")
    assert max(found["thresholds"], key=lambda one: one["keep"])["threshold"] <= dev["z, middle layers"].max()
    assert "## False alarms at 95 % of conflicts kept" in (tmp_path / "out/detectors.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/families.html").is_file()

    def refused(*_, **__):
        raise AssertionError

    for name in ("conflictscope.study.lab.path_patching", "interp.activation_store.collected_activations"):
        monkeypatch.setattr(name, refused)
    monkeypatch.setattr(Detecting, "_wide", refused)
    code, _, error = run(*command)
    assert code == 0, error
    assert read_json(tmp_path / "out/detectors.json") == found


def test_a_relation_cannot_be_seen_and_unseen(small, run, tiny_directories):
    options = ("--relation", "capital", "--unseen-relation", "capital")
    result = run("gate", "detectors", "--model", tiny_directories["llama"], *options)
    assert_one_sentence(result, "The relation capital cannot be seen and unseen")
