import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from interp.errors import UserError
from probes import linear
from probes.linear import METHODS, SHRINKAGES, STRENGTHS, LinearProbe, ProbeSet

D = 24
CLASSES = ("aligned", "conflict")


def unit(d: int, seed: int) -> Tensor:
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


PLANTED = unit(D, 5)


class Planted:
    """Activations in which one site knows the class along one direction, and another nothing.

    Attributes:
        features: ``good`` with the direction ``PLANTED``, ``noise`` without.
        labels: Names of the classes.
        held: Which examples validate: three of eight.
    """

    def __init__(self, n: int = 400, *, seed: int = 0, gap: float = 2.5, share: float = 0.5, n_classes: int = 2):
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        names = CLASSES if n_classes == 2 else tuple(f"class {k}" for k in range(n_classes))
        shares = [1 - share, share] if n_classes == 2 else [1 / n_classes] * n_classes
        self.numbers = rng.choice(n_classes, n, p=shares)
        self.labels = [names[k] for k in self.numbers]
        means = torch.stack([PLANTED * gap * k if n_classes == 2 else unit(D, k) * gap for k in range(n_classes)])
        noise = torch.randn(2, n, D, generator=generator)
        self.features = {"noise": noise[1], "good": noise[0] + means[torch.tensor(self.numbers)]}
        self.held = [i % 8 < 3 for i in range(n)]

    def fit(self, features: dict[str, Tensor] | None = None, **options: Any) -> ProbeSet:
        return ProbeSet.fit(
            self.features if features is None else features,
            self.labels,
            **{"validation": self.held, "device": "cpu", **options},
        )


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def fitted(planted: Planted) -> ProbeSet:
    return planted.fit(settings={"model": "none", "seed": 3})


def assert_same(found: ProbeSet, expected: ProbeSet, tolerance: float = 0.0) -> None:
    assert list(found) == list(expected)
    for site, probe in expected.items():
        torch.testing.assert_close(found[site].weight, probe.weight, rtol=0, atol=tolerance)
        torch.testing.assert_close(found[site].bias, probe.bias, rtol=0, atol=tolerance)
        assert found[site].strength == probe.strength
        assert found[site].classes == probe.classes


# What is found


@pytest.mark.parametrize("method", METHODS)
def test_the_planted_direction_is_found_at_the_site_that_has_it(planted, method):
    probes = planted.fit(method=method)
    assert probes.best.site == "good"
    assert probes["good"].direction @ PLANTED > 0.9
    assert probes["good"].direction.norm().item() == pytest.approx(1)
    new = Planted(seed=9)
    scores = probes.score(new.features, new.labels, range(400))
    ideal = roc_auc_score(new.numbers, new.features["good"] @ PLANTED)
    assert scores["good"].auroc.value == pytest.approx(ideal, abs=0.02)
    assert scores["noise"].auroc.value == pytest.approx(0.5, abs=0.1)


def test_validation_auroc_is_that_of_the_validation_examples(planted, fitted):
    held = np.array(planted.held)
    for site, probe in fitted.items():
        logits = probe.logits(planted.features[site])[:, 0].numpy()
        assert probe.validation_auroc == pytest.approx(roc_auc_score(planted.numbers[held], logits[held]))


def sklearn_pipeline(features: Tensor, numbers: np.ndarray, strength: float) -> Any:
    n = len(numbers)
    model = LogisticRegression(
        C=1 / (strength * n), class_weight="balanced", tol=1e-10, max_iter=500, solver="newton-cholesky"
    )
    return make_pipeline(StandardScaler(), model).fit(features.double().numpy(), numbers)


def prior_shift(numbers: np.ndarray) -> float:
    counts = np.bincount(numbers)
    return float(np.log(counts[1] / counts[0]))


@pytest.fixture(scope="module")
def skewed() -> Planted:
    """A fifth of the examples are conflicts, and features have scales and offsets of their own."""
    case = Planted(500, share=0.2, gap=1.5)
    scale = torch.logspace(-1, 2, D)
    case.features = {site: values * scale + 5 * scale for site, values in case.features.items()}
    return case


@pytest.mark.parametrize("strength", [1e-3, 0.1])
def test_logits_are_those_of_a_standardised_balanced_logistic_regression_with_the_prior_put_back(skewed, strength):
    train = ~np.array(skewed.held)
    features, numbers = skewed.features["good"], skewed.numbers
    pipeline = sklearn_pipeline(features[torch.tensor(train)], numbers[train], strength)
    expected = pipeline.decision_function(features.double().numpy())
    found = skewed.fit(strengths=[strength])["good"].logits(features)[:, 0].double().numpy()
    shift = found - expected
    np.testing.assert_allclose(found - shift.mean(), expected, atol=0.03 * np.abs(expected).max())
    assert shift.mean() == pytest.approx(prior_shift(numbers[train]), abs=0.05)
    assert prior_shift(numbers[train]) < -1


def test_the_strength_is_the_one_of_lowest_balanced_validation_loss(skewed):
    held = np.array(skewed.held)
    for site, features in skewed.features.items():
        values = features.double().numpy()
        losses = {}
        for strength in STRENGTHS:
            pipeline = sklearn_pipeline(features[torch.tensor(~held)], skewed.numbers[~held], strength)
            truth = skewed.numbers[held]
            weights = 1 / np.bincount(truth)[truth]
            losses[strength] = log_loss(truth, pipeline.predict_proba(values[held]), sample_weight=weights)
        assert skewed.fit({site: features})[site].strength == min(losses, key=lambda s: losses[s])


def test_the_discriminants_shrinkage_is_one_of_its_grid(planted):
    assert planted.fit(method="discriminant")["good"].strength in SHRINKAGES
    assert planted.fit(method="discriminant", strengths=[0.5])["good"].strength == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_calibrated_on_average_for_unbalanced_classes(method):
    case, new = Planted(2000, share=0.15, gap=1.5), Planted(4000, share=0.15, gap=1.5, seed=1)
    probabilities = case.fit(method=method).predict_proba(new.features)["good"]
    assert probabilities[:, 1].mean().item() == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_three_classes_are_told_apart(method):
    case, new = Planted(600, n_classes=3, gap=4.0), Planted(300, n_classes=3, gap=4.0, seed=2)
    probes = case.fit(method=method)
    assert probes["good"].weight.shape == (3, D)
    assert probes["good"].bias.shape == (3,)
    probabilities = probes.predict_proba(new.features)["good"]
    assert probabilities.shape == (300, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(300, dtype=torch.float64))
    # What the true means give: nearest mean, in the same noise.
    means = torch.stack([unit(D, k) * 4.0 for k in range(3)])
    ideal = (torch.cdist(new.features["good"], means).argmin(1).numpy() == new.numbers).mean()
    assert (probabilities.argmax(1).numpy() == new.numbers).mean() > ideal - 0.05
    held = np.array(case.held)
    on_held = probes["good"].predict_proba(case.features["good"])[torch.tensor(held)].numpy()
    expected = roc_auc_score(case.numbers[held], on_held, multi_class="ovr", average="macro")
    # The prior is put back after validation, which reorders examples a little.
    assert probes["good"].validation_auroc == pytest.approx(expected, abs=0.005)
    with pytest.raises(UserError, match="A probe of 3 classes has no single direction; take rows of its weight"):
        _ = probes["good"].direction


def test_probabilities_of_two_classes_are_the_logistic_function_of_the_logits(planted, fitted):
    probe = fitted["good"]
    probabilities = probe.predict_proba(planted.features["good"])
    logits = probe.logits(planted.features["good"])[:, 0].double()
    torch.testing.assert_close(probabilities[:, 1], 1 / (1 + (-logits).exp()))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(400, dtype=torch.float64))


def test_the_last_of_the_classes_is_the_positive_one(planted):
    turned = planted.fit(classes=CLASSES[::-1])["good"]
    assert turned.classes == ("conflict", "aligned")
    assert turned.direction @ PLANTED < -0.9


# What goes in


def test_heads_of_z_are_read_as_one_vector(planted, fitted):
    as_heads = planted.fit({site: values.unflatten(1, (4, 6)) for site, values in planted.features.items()})
    assert_same(as_heads, fitted)
    heads = planted.features["good"].unflatten(1, (4, 6))
    assert torch.equal(as_heads["good"].logits(heads), fitted["good"].logits(planted.features["good"]))


def test_sites_of_different_widths_are_fitted_together_as_alone(planted):
    wide = torch.cat([planted.features["noise"], planted.features["good"]], 1)
    features = {"a": planted.features["good"], "b": wide, "c": planted.features["noise"], "d": wide * 2}
    probes = planted.fit(features)
    assert [probe.weight.shape[1] for probe in probes.values()] == [D, 2 * D, D, 2 * D]
    for site, values in features.items():
        assert_same(ProbeSet({site: probes[site]}), planted.fit({site: values}), tolerance=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_those_of_their_float32_values(planted, dtype):
    half = {site: values.to(dtype) for site, values in planted.features.items()}
    full = {site: values.float() for site, values in half.items()}
    probes = planted.fit(half)
    assert_same(probes, planted.fit(full))
    assert torch.equal(probes["good"].logits(half["good"]), probes["good"].logits(full["good"]))


def test_features_far_beyond_the_range_of_float16_sums_are_standardised():
    case = Planted()
    large = {"good": (case.features["good"] * 5000).half()}
    assert case.fit(large)["good"].direction @ PLANTED > 0.9


@pytest.mark.parametrize("value", [0.0, 0.1, 7.7, 100.3])
@pytest.mark.parametrize("method", METHODS)
def test_a_feature_that_is_constant_in_training_has_no_weight(planted, method, value):
    features = planted.features["good"].clone()
    features[:, 3] = value
    probe = planted.fit({"good": features}, method=method)["good"]
    assert probe.weight[0, 3].abs() < 1e-2 * probe.weight.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_a_site_at_which_all_examples_are_the_same_is_a_coin_toss(planted, method):
    same = torch.randn(D).expand(len(planted.labels), D) * 0.3
    probe = ProbeSet.fit({"same": same}, planted.labels, validation=planted.held, method=method)["same"]
    assert probe.validation_auroc == 0.5
    share = np.mean([label == "conflict" for label, held in zip(planted.labels, planted.held, strict=True) if not held])
    assert probe.predict_proba(same)[:, 1].numpy() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("size", [1, 200_000, 2**30])
def test_the_size_of_chunks_changes_nothing(monkeypatch, size):
    case = Planted(200)
    features = {f"{site} {i}": values + i for i in range(3) for site, values in case.features.items()}
    expected = {site: case.fit({site: values})[site] for site, values in features.items()}
    monkeypatch.setattr(linear, "_CHUNK_BYTES", size)
    assert_same(case.fit(features), ProbeSet(expected), tolerance=2e-3)


def test_chunks_hold_at_least_one_site_and_no_more_than_fit(monkeypatch):
    features = {str(i): torch.zeros(10, 4) for i in range(5)}
    monkeypatch.setattr(linear, "_CHUNK_BYTES", 1)
    assert [sites for sites, _ in linear._chunks(features, 1)] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    monkeypatch.setattr(linear, "_CHUNK_BYTES", 2**30)
    assert [sites for sites, _ in linear._chunks(features, 1)] == [["0", "1", "2", "3", "4"]]


def test_settings_say_how_many_examples_there_were(fitted, planted):
    assert fitted.settings == {
        "method": "logistic",
        "training_examples": 400 - sum(planted.held),
        "validation_examples": sum(planted.held),
        "model": "none",
        "seed": 3,
    }


def test_a_linear_probe_is_a_set_of_one(planted, tmp_path):
    alone = LinearProbe.fit("good", planted.features["good"], planted.labels, validation=planted.held)
    expected = planted.fit({"good": planted.features["good"]})
    assert_same(ProbeSet({"good": alone}), expected)
    score = alone.score(planted.features["good"], planted.labels, range(400))
    assert score == expected.score(planted.features, planted.labels, range(400))["good"]
    alone.save(tmp_path / "probe.safetensors")
    again = LinearProbe.load(tmp_path / "probe.safetensors")
    assert torch.equal(again.weight, alone.weight)
    assert torch.equal(again.bias, alone.bias)


# Files


def test_saved_probes_come_back_bit_for_bit(fitted, planted, tmp_path):
    fitted.save(tmp_path / "p.safetensors")
    again = ProbeSet.load(tmp_path / "p.safetensors")
    assert_same(again, fitted)
    assert again.settings == fitted.settings
    for site, probe in fitted.items():
        assert again[site].validation_auroc == probe.validation_auroc
        assert torch.equal(again[site].logits(planted.features[site]), probe.logits(planted.features[site]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"p.safetensors", "p.json"}
    again.save(tmp_path / "p.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_json(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


DAMAGE = {
    "no weights": (lambda f: (f / "p.safetensors").unlink(), r"Could not read .*p\.safetensors"),
    "no json": (lambda f: (f / "p.json").unlink(), r"Could not read .*p\.json"),
    "weights cut off": (
        lambda f: (f / "p.safetensors").write_bytes((f / "p.safetensors").read_bytes()[:-4]),
        r"p\.safetensors is not the file that p\.json describes; fit the probes again",
    ),
    "weights of other probes": (
        lambda f: (f / "other.safetensors").rename(f / "p.safetensors"),
        r"p\.safetensors is not the file that p\.json describes",
    ),
    "json cut off": (
        lambda f: (f / "p.json").write_text((f / "p.json").read_text()[:-10]),
        r"p\.json is not valid JSON",
    ),
    "json of another kind": (lambda f: (f / "p.json").write_text("[]"), "is not of format conflictscope-probes"),
    "a later version": (
        lambda f: edit_json(f / "p.json", lambda r: r.update(version=2)),
        "is not of format conflictscope-probes, version 1; fit the probes again",
    ),
    "json without a hash": (
        lambda f: edit_json(f / "p.json", lambda r: r.pop("weights_sha256")),
        r"is not the file that p\.json describes",
    ),
    "json without settings": (
        lambda f: edit_json(f / "p.json", lambda r: r.pop("settings")),
        r"do not hold probes \('settings'\); fit the probes again",
    ),
    "json with a site without weights": (
        lambda f: edit_json(f / "p.json", lambda r: r["probes"].update(nowhere=r["probes"]["good"])),
        "do not hold probes .*nowhere.*; fit the probes again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_missing_swapped_or_damaged_files_are_one_sentence(fitted, planted, tmp_path, name):
    fitted.save(tmp_path / "p.safetensors")
    planted.fit(method="mean_difference").save(tmp_path / "other.safetensors")
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ProbeSet.load(tmp_path / "p.safetensors")


def test_another_ending_of_the_file_name_is_refused(fitted, tmp_path):
    for act in (fitted.save, fitted["good"].save, ProbeSet.load, LinearProbe.load):
        with pytest.raises(UserError, match=r"saved as \.safetensors with a JSON file next to it; p\.pt ends"):
            act(tmp_path / "p.pt")
    assert not list(tmp_path.iterdir())


def test_several_probes_are_not_one(fitted, tmp_path):
    fitted.save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match=r"holds 2 probes; read them with ProbeSet\.load"):
        LinearProbe.load(tmp_path / "p.safetensors")


# Wrong inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "forest"}, "'forest' is not known; known are logistic, discriminant, mean_difference"),
        ({"classes": ("conflict", "other")}, "'aligned' is none of the classes conflict, other"),
        ({"classes": ("aligned",)}, "All labels are 'aligned'; a probe needs at least two classes"),
        ({"classes": ("aligned", "conflict", "other")}, "No training example is of the class 'other'; record more"),
        ({"validation": [True, False]}, "There are 2 validation marks for 400 labels; give as many"),
        ({"validation": [False] * 400}, "No validation example is of the class 'aligned'"),
        ({"validation": [True] * 400}, "No training example is of the class 'aligned'"),
        ({"strengths": [0.1, 0.0]}, r"logistic probe must be positive, not 0 to 0\.1"),
        ({"strengths": [-1.0]}, "logistic probe must be positive, not -1"),
        ({"strengths": [float("nan")]}, "logistic probe must be positive, not nan"),
        ({"strengths": [0.5, 2.0], "method": "discriminant"}, r"above 0 and at most 1, not 0\.5 to 2"),
        ({"strengths": [0.5], "method": "mean_difference"}, "has no strength to choose; leave strengths out"),
    ],
)
def test_a_wrong_argument_is_one_sentence(planted, options, message):
    with pytest.raises(UserError, match=message):
        planted.fit(**options)


def test_a_class_that_only_validation_lacks_is_named(planted):
    held = [h and label == "aligned" for h, label in zip(planted.held, planted.labels, strict=True)]
    with pytest.raises(UserError, match="No validation example is of the class 'conflict'"):
        planted.fit(validation=held)


def test_no_examples_and_one_class_only_are_refused():
    with pytest.raises(UserError, match="There is no example to fit a probe on; choose a split"):
        ProbeSet.fit({"s": torch.zeros(0, 3)}, [], validation=[])
    with pytest.raises(UserError, match="All labels are 'a'; a probe needs at least two classes"):
        ProbeSet.fit({"s": torch.zeros(2, 3)}, ["a", "a"], validation=[True, False])


def test_as_many_features_as_labels_are_needed(planted):
    with pytest.raises(UserError, match="There are 399 rows of features at good for 400 labels; give as many"):
        planted.fit({"good": planted.features["good"][:399]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(planted, value):
    features = planted.features["good"].clone()
    features[7, 3] = value
    with pytest.raises(UserError, match="infinite features or NaN at good"):
        planted.fit({"good": features})


def test_features_of_another_width_are_refused(fitted):
    with pytest.raises(UserError, match=r"reads 24 features, but there are 23; take activations of the model and site"):
        fitted["good"].logits(torch.zeros(5, 23))


def test_a_site_without_a_probe_lists_those_with_one(fitted):
    with pytest.raises(UserError, match="no probe at 'nowhere'; there are probes at noise, good"):
        fitted["nowhere"]


def test_a_label_that_the_probe_does_not_know_cannot_be_scored(fitted, planted):
    with pytest.raises(UserError, match="'maybe' is none of the classes aligned, conflict"):
        fitted["good"].score(planted.features["good"][:2], ["maybe", "aligned"], range(2))
    with pytest.raises(UserError, match="All 2 examples are of one class"):
        fitted["good"].score(planted.features["good"][:2], ["aligned", "aligned"], range(2))
