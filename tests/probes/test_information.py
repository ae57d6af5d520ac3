import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

import probes.information
from interp.errors import UserError
from probes.information import mutual_information, nearest_neighbour_information


def sparse_features(n: int, n_features: int, seed: int = 0, frequency: float = 0.4) -> torch.Tensor:
    """Zero-inflated, positive where they fire, all values different."""
    generator = torch.Generator().manual_seed(seed)
    values = 0.1 + torch.rand(n, n_features, generator=generator, dtype=torch.double)
    return values * (torch.rand(n, n_features, generator=generator) < frequency)


def labels_of(n: int, n_classes: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(n_classes, (n,), generator=torch.Generator().manual_seed(seed))


def informative_case(n: int = 600, n_features: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of which both the firing and the values tell of the label."""
    labels = labels_of(n)
    features = sparse_features(n, n_features)
    features[:, ::2] *= 1 + labels[:, None]
    features[:, ::3] *= (sparse_features(n, 1, seed=2, frequency=0.6) > 0) | (labels[:, None] == 1)
    return features, labels


def less_bias(features: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Plug-in information of discrete features by scikit-learn, less Miller's (rows - 1) (columns - 1) / 2n."""
    freedom = [(len(column.unique()) - 1) * (len(labels.unique()) - 1) for column in features.T]
    plain = [mutual_info_score(labels, column) for column in features.T]
    return [i - f / (2 * len(labels)) for i, f in zip(plain, freedom, strict=True)]


# Nothing to know


@pytest.mark.parametrize("n_classes", [1, 2, 3, 5])
@pytest.mark.parametrize("value", [0.0, 0.7, -2.0])
def test_a_dead_or_constant_feature_has_exactly_no_information(value, n_classes):
    for n in range(100, 400, 7):
        assert mutual_information(torch.full((n, 2), value), labels_of(n, n_classes, seed=n)).tolist() == [0, 0]


def test_independent_features_have_next_to_none():
    """Twice n times the mean of what chance leaves: 0.5 of the firing (chi-square of 1 degree, less 1, its positive
    part) and 0.4 standard deviations, of sqrt(30), of at most 16 bins. Uncorrected it would be 1 + 15.
    """
    n = 4000
    found = mutual_information(sparse_features(n, 1000), labels_of(n))
    assert (found >= 0).all()
    assert 2 * n * found.mean() < 0.5 + 0.4 * 30**0.5


# Known information


@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_discrete_features_have_their_plug_in_information_less_its_bias(n_classes):
    """Each value is frequent enough for a bin of its own."""
    n, n_features = 2000, 20
    labels = labels_of(n, n_classes)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(4, (n, n_features), generator=generator)
    told = torch.rand(n, n_features, generator=generator) < torch.linspace(0.3, 0.6, n_features)
    features = torch.where(told, labels[:, None], noise).float()
    assert mutual_information(features, labels).tolist() == pytest.approx(less_bias(features, labels), rel=1e-9)


def joint_of_uniform(without: float, with_: float, shift: float) -> np.ndarray:
    """Probabilities ``(label, outcome)``: silent, below both, in the overlap, above.

    Label 0 fires with the first probability, uniformly on [1, 2]; label 1 with the second, on [1 + shift, 2 + shift].
    """
    zero = [1 - without, without * shift, without * (1 - shift), 0]
    one = [1 - with_, 0, with_ * (1 - shift), with_ * shift]
    return np.array([zero, one]) / 2


# Equal counts put the edges of the overlap on edges of the sixteen bins: binning loses nothing.
@pytest.mark.parametrize(
    ("without", "with_", "shift"),
    [(0.3, 0.3, 0.5), (0.3, 0.3, 1), (0.1, 0.4, 0), (0.15, 0.45, 0.5), (0.45, 0.15, 0.25), (1, 1, 0.25), (0.5, 0, 1)],
)
def test_uniform_values_have_the_information_of_the_closed_form_within_four_standard_errors(without, with_, shift):
    joint = joint_of_uniform(without, with_, shift)
    independent = joint.sum(0) * joint.sum(1, keepdims=True)
    pointwise = np.log(np.divide(joint, independent, where=joint > 0, out=np.ones_like(joint)))
    information = (joint * pointwise).sum()
    deviation = ((joint * pointwise**2).sum() - information**2) ** 0.5

    n = 200_000
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    fires = rng.random(n) < np.where(labels == 1, with_, without)
    values = fires * (1 + rng.random(n) + shift * labels)
    found = mutual_information(torch.from_numpy(values)[:, None], torch.from_numpy(labels)).item()
    # What is left of the bias, and of edges that samples move, is of the order of 1 / n and 1 / sqrt(n) of a bin.
    assert found == pytest.approx(information, abs=4 * deviation / n**0.5 + 2e-4)


def test_the_chain_rule_holds():
    features, labels = informative_case()
    features = features[:, ::6]
    presence = mutual_information((features != 0).double(), labels)
    for column, first, whole in zip(features.T, presence, mutual_information(features, labels), strict=True):
        fires = column != 0
        rest = mutual_information(column[fires][:, None], labels[fires])[0]
        assert whole.item() == pytest.approx((first + fires.double().mean() * rest).item(), rel=1e-12)
        assert min(first, rest) > 0.001


def test_the_values_of_a_feature_that_fires_rarely_are_not_looked_at():
    """Below 32 values there is one bin: the rest would be chance."""
    labels = torch.arange(400) // 320
    features = torch.zeros(400, 1)
    features[304:320], features[320:335] = 1, 2
    assert mutual_information(features, labels).tolist() == pytest.approx(less_bias(features != 0, labels))
    features[335] = 2
    assert mutual_information(features, labels).tolist() == pytest.approx(less_bias(features, labels))


def test_equal_values_share_a_bin_whatever_the_order_of_rows():
    """The rows are sorted by label: a bin's edge among the ones would tell one label from the other."""
    labels = torch.arange(600) // 300
    features = torch.ones(600, 1)
    features[250:350] = 2
    features[::5] = 0
    assert mutual_information(features, labels).tolist() == [0]
    features[300:350] = 1
    features[:60] = 0
    assert mutual_information(features, labels).tolist() == pytest.approx(less_bias(features, labels))


def test_a_feature_may_begin_with_the_value_that_the_one_before_ends_with():
    labels = torch.arange(400) // 200
    one = torch.tensor([1.0, 2.0]).repeat_interleave(200)
    features = torch.stack([one, one + 1, one + 2], 1)
    features[::4] = 0
    assert mutual_information(features, labels).tolist() == pytest.approx([0.75 * np.log(2) - 1 / 800] * 3)


# What does not matter


@pytest.mark.parametrize(
    "rescale", [lambda z: 1000 * z, lambda z: z**3, lambda z: z.exp(), lambda z: -1 / z, lambda z: z - 0.7]
)
def test_monotone_rescaling_of_active_values_does_not_matter(rescale):
    features, labels = informative_case()
    rescaled = torch.where(features != 0, rescale(features), 0)
    torch.testing.assert_close(mutual_information(rescaled, labels), mutual_information(features, labels))


def test_the_order_of_prompts_does_not_matter():
    features, labels = informative_case()
    features = (10 * features).round()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert torch.equal(mutual_information(features[order], labels[order]), mutual_information(features, labels))


@pytest.mark.parametrize("values", [1, 600, 4200, 10**9])
def test_chunking_does_not_matter(monkeypatch, values):
    features, labels = informative_case()
    alone = [mutual_information(features[:, [i]], labels).item() for i in range(features.shape[1])]
    monkeypatch.setattr(probes.information, "_CHUNK_VALUES", values)
    assert mutual_information(features, labels).tolist() == alone


def test_half_precision_features_are_taken():
    features, labels = informative_case()
    features = (8 * features).round() / 8
    expected = mutual_information(features, labels)
    assert torch.equal(mutual_information(features.bfloat16(), labels), expected)


# Errors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    features, labels = informative_case()
    features[3, 4] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        mutual_information(features, labels)


@pytest.mark.parametrize(("rows", "labels"), [(5, 4), (4, 5), (0, 0)])
def test_each_row_needs_a_label(rows, labels):
    with pytest.raises(UserError, match=f"{rows} rows of features and {labels} labels; give one for each row"):
        mutual_information(torch.ones(rows, 3), torch.zeros(labels))


# The published estimator


def test_nearest_neighbours_give_features_that_never_fire_a_score():
    dead, labels = torch.zeros(1000, 50), labels_of(1000)
    assert nearest_neighbour_information(dead, labels).mean() > 1e-3
    assert mutual_information(dead, labels).tolist() == [0] * 50


def test_nearest_neighbours_know_as_much_where_there_is_much_to_know():
    """Values on [1, 2] or [2, 3] by label and none silent: all of ln 2."""
    labels = labels_of(2000)
    features = 1 + torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    assert nearest_neighbour_information(features, labels).item() == pytest.approx(np.log(2), abs=0.02)
    # The bin that the two share may tell nothing, and the bias of sixteen is taken off.
    assert mutual_information(features, labels).item() == pytest.approx(np.log(2), abs=np.log(2) / 16 + 15 / 4000)


def test_nearest_neighbours_are_reproducible_from_a_seed():
    features, labels = informative_case(n_features=4)
    first, again, other = (nearest_neighbour_information(features, labels, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
