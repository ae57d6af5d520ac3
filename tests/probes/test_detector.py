import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.activations import record
from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import encode
from probes.detector import CONFLICT_CLASSES, SOURCE_CLASSES, ConflictDetector, Detection
from probes.linear import LinearProbe, ProbeSet
from tests.probes.test_linear import edit_json
from tests.tiny import tiny_conflicts

# The threshold


def score_probes(*sites: str, auroc: float = 0.5, classes: tuple[str, ...] = CONFLICT_CLASSES) -> ProbeSet:
    """Probes whose log odds are the one feature of their site."""
    one, zero = torch.ones(1, 1), torch.zeros(1)
    return ProbeSet({site: LinearProbe(site, classes, one, zero, 1.0, auroc) for site in sites}, {"seed": 7})


def mixed(aligned: Tensor, conflict: Tensor) -> tuple[Tensor, list[str]]:
    return torch.cat([aligned, conflict])[:, None], ["aligned"] * len(aligned) + ["conflict"] * len(conflict)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (20, 0.05), (137, 0.1), (9, 0.3), (1, 0.5)])
def test_the_threshold_is_the_order_statistic_of_the_aligned_scores(n, rate):
    aligned = torch.randn(n, generator=torch.Generator().manual_seed(n))
    features, labels = mixed(aligned, torch.tensor([0.0, 3.0]))
    detector = ConflictDetector.from_probes(score_probes("s"), {"s": features}, labels, false_positive_rate=rate)
    rank = math.ceil((n + 1) * (1 - rate))
    border = sorted(aligned.tolist())[rank - 1]
    assert detector.threshold == pytest.approx(sigmoid(border))
    assert detector.settings == {
        "seed": 7,
        "false_positive_rate": rate,
        "dev_true_positive_rate": float(np.mean(np.array([0.0, 3.0]) > border)),
        "dev_aligned": n,
        "dev_conflict": 2,
    }


@pytest.mark.parametrize("draw", [torch.randn, torch.rand, lambda *a, **k: torch.randn(*a, **k).exp()])
def test_new_aligned_prompts_are_called_conflicts_at_most_as_often_as_wanted_whatever_the_distribution(draw):
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        features, labels = mixed(draw(50, generator=generator), torch.ones(1))
        detector = ConflictDetector.from_probes(score_probes("s"), {"s": features}, labels, false_positive_rate=0.1)
        border = math.log(detector.threshold / (1 - detector.threshold))
        shares.append((draw(400, generator=generator) > border).float().mean().item())
    # The mean share is 5/51 by exchangeability; its standard error here is about 0.0025.
    assert np.mean(shares) == pytest.approx(5 / 51, abs=0.008)


def test_the_site_that_finds_most_conflicts_is_chosen():
    aligned = torch.linspace(-1, 1, 40)
    worse, labels = mixed(aligned, torch.tensor([0.0, 5.0, 5.0, 0.5]))
    better, _ = mixed(aligned, torch.tensor([2.0, 1.5, 2.0, 0.5]))
    probes = score_probes("worse", "better", "also worse")
    features = {"worse": worse, "better": better, "also worse": worse}
    detector = ConflictDetector.from_probes(probes, features, labels)
    assert detector.conflict is probes["better"]
    assert detector.settings["dev_true_positive_rate"] == 0.75


def test_among_sites_that_find_as_many_the_better_one_on_validation_is_chosen():
    features, labels = mixed(torch.linspace(-1, 1, 40), torch.full((4,), 2.0))
    probes = ProbeSet({**score_probes("a", "c"), **score_probes("b", auroc=0.9)})
    assert ConflictDetector.from_probes(probes, dict.fromkeys("abc", features), labels).conflict.site == "b"


def test_the_best_source_probe_on_validation_is_taken():
    features, labels = mixed(torch.linspace(-1, 1, 40), torch.full((4,), 2.0))
    source = ProbeSet(
        {
            **score_probes("a", classes=SOURCE_CLASSES),
            **score_probes("b", classes=SOURCE_CLASSES, auroc=0.9),
        }
    )
    detector = ConflictDetector.from_probes(score_probes("s"), {"s": features}, labels, source=source)
    assert detector.source is source["b"]


@pytest.mark.parametrize("n", [0, 1, 18])
def test_too_few_aligned_examples_are_refused(n):
    features, labels = mixed(torch.zeros(n), torch.ones(3))
    with pytest.raises(UserError, match=f"There are {n} aligned and 3 conflict examples .*rate of 0.05; record more"):
        ConflictDetector.from_probes(score_probes("s"), {"s": features}, labels)


def test_no_conflict_examples_are_refused():
    features, labels = mixed(torch.zeros(30), torch.ones(0))
    with pytest.raises(UserError, match="There are 30 aligned and 0 conflict examples"):
        ConflictDetector.from_probes(score_probes("s"), {"s": features}, labels)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(rate):
    features, labels = mixed(torch.zeros(30), torch.ones(3))
    with pytest.raises(UserError, match="must lie between 0 and 1, not"):
        ConflictDetector.from_probes(score_probes("s"), {"s": features}, labels, false_positive_rate=rate)


def test_probes_with_other_classes_are_refused():
    features, labels = mixed(torch.zeros(30), torch.ones(3))
    turned = score_probes("s", classes=CONFLICT_CLASSES[::-1])
    for conflict, source, message in (
        (turned, None, "needs a probe that tells aligned from conflict, not conflict from aligned"),
        (score_probes("s"), score_probes("s"), "tells memory from context, not aligned from conflict"),
    ):
        with pytest.raises(UserError, match=message):
            ConflictDetector.from_probes(conflict, {"s": features}, labels, source=source)


# On models

LONG = " We hear, we hear, that the capital of Peru is Lima and the capital of Norway is Oslo." * 4
PROMPTS = [
    "Peru is",
    *[e.prompt for e in tiny_conflicts()][:6],
    f"Note:{LONG} The capital of Japan is",
    "So the capital",
]


def detector_of(model: Any, conflict_site: str, source_site: str | None) -> ConflictDetector:
    """A detector whose labels mean nothing: whether a prompt is long, and which half of the countries it is about."""
    texts = [e.prompt for e in tiny_conflicts()] * 2
    texts = [f"{'Note: ' if i % 2 else ''}{text}{' Now' * (i % 3)}" for i, text in enumerate(texts)]
    sites = [conflict_site] + ([source_site] if source_site else [])
    activations = record(model, texts, sites)
    held = [i % 16 in (3, 4, 5, 10) for i in range(len(texts))]

    def probes(site: str, labels: list[str], classes: tuple[str, ...]) -> ProbeSet:
        return ProbeSet.fit({site: activations[site]}, labels, validation=held, classes=classes, strengths=[0.1])

    conflict = probes(conflict_site, [CONFLICT_CLASSES[i % 2] for i in range(len(texts))], CONFLICT_CLASSES)
    labels = [SOURCE_CLASSES[i // 2 % 2] for i in range(len(texts))]
    return ConflictDetector(
        conflict[conflict_site], 0.5, probes(source_site, labels, SOURCE_CLASSES)[source_site] if source_site else None
    )


@pytest.fixture(
    scope="module",
    params=[
        ("blocks.1.hook_out", "blocks.0.attn.hook_out"),
        ("blocks.1.hook_out", "blocks.1.hook_out"),
        ("blocks.0.attn.o.hook_in", None),
    ],
    ids=lambda sites: sites[0],
)
def judged(request: pytest.FixtureRequest, tiny_llama: Any) -> tuple[Any, ConflictDetector]:
    """A model and a detector for it."""
    return tiny_llama, detector_of(tiny_llama, *request.param)


@pytest.fixture(scope="module")
def tiny_judged(tiny_llama: Any) -> tuple[Any, ConflictDetector]:
    return tiny_llama, detector_of(tiny_llama, "blocks.1.hook_out", "blocks.0.attn.hook_out")


def assert_same(found: list[Detection], expected: list[Detection]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.conflict_probability == pytest.approx(other.conflict_probability, abs=1e-4)
        assert (one.conflict, one.expected_source) == (other.conflict, other.expected_source)
        if other.context_probability is None:
            assert one.context_probability is None
        else:
            assert one.context_probability == pytest.approx(other.context_probability, abs=1e-4)


def n_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_detection_is_what_the_probes_say_of_the_last_token(judged):
    model, detector = judged
    probes = [p for p in (detector.conflict, detector.source) if p is not None]
    for prompt, detection in zip(PROMPTS, detector.detect(model, PROMPTS), strict=True):
        values = record(model, [prompt], [p.site for p in probes])
        expected = [p.predict_proba(values[p.site])[0, 1].item() for p in probes]
        assert detection.conflict_probability == pytest.approx(expected[0], abs=1e-4)
        assert detection.conflict == (expected[0] > 0.5)
        if detector.source is None:
            assert (detection.context_probability, detection.expected_source) == (None, None)
        else:
            assert detection.context_probability == pytest.approx(expected[1], abs=1e-4)
            assert detection.expected_source == ("context" if expected[1] >= 0.5 else "memory")


def test_a_prompt_gets_the_same_verdict_alone_and_in_any_batch(judged):
    model, detector = judged
    alone = [detector.detect(model, [prompt])[0] for prompt in PROMPTS]
    for batch_size in (2, 4, 32):
        assert_same(detector.detect(model, PROMPTS, batch_size=batch_size), alone)
    assert len({round(d.conflict_probability, 3) for d in alone}) > 3


def test_no_prompts_give_no_detections(tiny_judged):
    model, detector = tiny_judged
    assert detector.detect(model, []) == []


def test_layers_after_the_deeper_probe_are_not_run(tiny_judged):
    model, detector = tiny_judged
    anatomy, calls = Anatomy(model), []
    handles = [
        anatomy.module("block", layer).register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
        for layer in range(anatomy.n_layers)
    ]
    try:
        detector.detect(model, PROMPTS, batch_size=len(PROMPTS))
    finally:
        for handle in handles:
            handle.remove()
    assert set(calls) == {0, 1}


def test_a_model_without_the_site_or_of_another_width_is_refused(tiny_judged):
    model, detector = tiny_judged
    nowhere = LinearProbe("blocks.9.hook_out", CONFLICT_CLASSES, torch.ones(1, 32), torch.zeros(1), 1.0, 0.5)
    with pytest.raises(UserError, match=r"'blocks\.9\.hook_out' does not exist"):
        ConflictDetector(nowhere, 0.5).detect(model, PROMPTS)
    wide = LinearProbe("blocks.0.hook_out", CONFLICT_CLASSES, torch.ones(1, 33), torch.zeros(1), 1.0, 0.5)
    with pytest.raises(UserError, match="reads 33 features, but there are 32"):
        ConflictDetector(wide, 0.5).detect(model, PROMPTS)
    assert detector.detect(model, PROMPTS[:1])


# Listening


def generate(model: Any, prompts: list[str], **options: Any) -> None:
    inputs = encode(model, prompts)
    del inputs["position_ids"]
    network: Any = transformers_model(model)
    with torch.inference_mode():
        network.generate(
            **inputs,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id,
            **{"max_new_tokens": 3, "min_new_tokens": 3, **options},
        )


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
def test_listening_gives_one_detection_for_each_prompt_that_generate_reads(judged, options: dict[str, Any]):
    model, detector = judged
    prompts = [PROMPTS[0], PROMPTS[7], PROMPTS[3]]
    generate(model, prompts[:1])  # transformers adds hooks of its own the first time
    hooks = n_hooks(model)
    with detector.listening(model) as heard:
        generate(model, prompts, **options)
        generate(model, prompts[:1], **options)
        generate(model, prompts[:1], **options)
    expected = detector.detect(model, prompts)
    assert_same(heard, expected + expected[:1] * 2)
    assert n_hooks(model) == hooks


def test_listening_hears_every_beam(tiny_judged):
    model, detector = tiny_judged
    for use_cache in (True, False):
        with detector.listening(model) as heard:
            generate(model, PROMPTS, num_beams=2, use_cache=use_cache)
        assert_same(heard, [d for d in detector.detect(model, PROMPTS) for _ in range(2)])


def test_listening_judges_again_when_a_conversation_goes_on(tiny_judged):
    model, detector = tiny_judged
    first, second = "The capital of Italy is", "The capital of Italy is Rome. The capital of Peru, we hear, is"
    for use_cache in (True, False):
        with detector.listening(model) as heard:
            generate(model, [first], use_cache=use_cache)
            generate(model, [second], use_cache=use_cache)
        assert_same(heard, detector.detect(model, [first, second]))


def test_listening_hears_single_forward_passes_and_the_bridges_own_generate(tiny_judged):
    model, detector = tiny_judged
    text = PROMPTS[1]
    expected = detector.detect(model, [text])
    ids = encode(model, [text])["input_ids"]
    calls: list[Callable[[], Any]] = [
        lambda: model(ids),
        lambda: transformers_model(model)(ids),
        lambda: model.generate(ids, max_new_tokens=3, do_sample=False, verbose=False),
        lambda: model.generate(ids, max_new_tokens=3, do_sample=False, verbose=False, use_past_kv_cache=False),
    ]
    for call in calls:
        with detector.listening(model) as heard:
            call()
        assert_same(heard, expected)


def test_nothing_is_heard_and_no_hook_is_left_after_listening_also_after_an_exception(tiny_judged):
    model, detector = tiny_judged
    generate(model, PROMPTS[:1])
    hooks = n_hooks(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = Anatomy(model).module("mlp", 2).register_forward_hook(broken)
    heard: list[Detection] = []
    try:
        with pytest.raises(RuntimeError, match="broken"), detector.listening(model) as heard:
            generate(model, PROMPTS)
    finally:
        handle.remove()
    assert n_hooks(model) == hooks
    assert_same(heard, detector.detect(model, PROMPTS))
    generate(model, PROMPTS)
    assert len(heard) == len(PROMPTS)


# Files


@pytest.mark.parametrize("with_source", [True, False])
def test_a_saved_detector_comes_back(tiny_judged, tmp_path, with_source):
    model, whole = tiny_judged
    detector = ConflictDetector(whole.conflict, 0.3, whole.source if with_source else None, {"seed": 1})
    detector.save(tmp_path / "detector")
    again = ConflictDetector.load(tmp_path / "detector")
    assert (again.threshold, again.settings) == (0.3, {"seed": 1})
    assert again.detect(model, PROMPTS) == detector.detect(model, PROMPTS)
    probes = {"conflict.safetensors", "conflict.json"} | (
        {"source.safetensors", "source.json"} if with_source else set()
    )
    assert {path.name for path in (tmp_path / "detector").iterdir()} == {"detector.json", *probes}


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], r"Could not read .*detector\.json"),
    "no source": (lambda f: (f / "source.json").unlink(), r"Could not read .*source\.json"),
    "probes swapped": (
        lambda f: (f / "conflict.safetensors").write_bytes((f / "source.safetensors").read_bytes()),
        r"conflict\.safetensors is not the file that conflict\.json describes",
    ),
    "not json": (lambda f: (f / "detector.json").write_text("{"), r"detector\.json is not valid JSON"),
    "another version": (
        lambda f: edit_json(f / "detector.json", lambda r: r.update(version=2)),
        "is not of format conflictscope-detector, version 1; make it again",
    ),
    "no threshold": (
        lambda f: edit_json(f / "detector.json", lambda r: r.pop("threshold")),
        r"detector\.json lacks 'threshold'; make it again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_missing_or_damaged_file_is_one_sentence(tiny_judged, tmp_path, name):
    damage, message = DAMAGE[name]
    tiny_judged[1].save(tmp_path)
    assert json.loads((tmp_path / "detector.json").read_text())["source"] is True
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ConflictDetector.load(tmp_path)
