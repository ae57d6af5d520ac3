from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import mutual_info_score

from interp.errors import UserError
from probes.feature_selection import FeatureStatistics, matched_random_features, select_features

# Of the features of Llama-3-8B that were published with SpARE (Zhao et al. 2024, arXiv 2410.15999; MIT licence,
# Copyright (c) 2024 Yu Zhao): of two layers the thousand with the most information, and the sum of all others'.
PUBLISHED = load_file(Path(__file__).with_name("published_features.safetensors"))
N_FEATURES = 131_072

# Selection


@pytest.mark.parametrize(
    ("layer", "counts", "context", "memory"),
    [
        (13, (489, 229), [36147, 256, 112764, 108517, 129548], [12384, 58010, 49302, 40764, 82533]),
        (15, (428, 96), [27159, 125169, 105281, 27661, 63923], [5451, 59652, 45508, 35901, 123054]),
    ],
)
def test_selection_is_the_published_one(layer, counts, context, memory):
    kept, strongest, expectation, rest = (
        PUBLISHED[f"layer{layer}.{name}"] for name in ("feature", "information", "expectation", "rest")
    )
    # The others share what is left of the information, each less than any of the thousand has.
    information = torch.full((N_FEATURES,), rest.item() / (N_FEATURES - len(kept)), dtype=torch.float64)
    assert information[0] < strongest.min()
    information[kept.long()] = strongest
    published = torch.zeros(N_FEATURES)
    published[kept.long()] = expectation
    found = select_features(information, published, 0.07)
    assert (len(found.context), len(found.memory)) == counts
    assert (found.context[:5], found.memory[:5]) == (context, memory)


# By descending information: features 1, 3, 5, 0, 2, 6, 4, which together hold 5, 9, 12, 14, 15, 16, 16 of 16.
INFORMATION = torch.tensor([2.0, 5, 1, 4, 0, 3, 1])
# Feature 3 is equal with either source.
EXPECTATION = torch.tensor([0.5, 1, -1, 0, 3, -2, 4])


@pytest.mark.parametrize(
    ("share", "context", "memory"),
    [
        (0.3, [1], []),  # 5 exceeds 4.8: one feature
        (0.5, [1], [5]),  # 9 exceeds 8: two; 3 is skipped, and 5 takes its place
        (0.5625, [1, 0], [5]),  # 9 of 16 does not exceed itself: three
        (0.8, [1, 0], [5, 2]),  # 14 exceeds 12.8: four
        (0.95, [1, 0, 6, 4], [5, 2]),  # 16 exceeds 15.2: six, and but six are left
    ],
)
def test_selection_by_hand_skips_equal_features_and_takes_the_next(share, context, memory):
    assert select_features(INFORMATION, EXPECTATION, share) == (context, memory)


def test_features_of_the_same_information_go_by_number():
    assert select_features(torch.ones(5000), torch.ones(5000), 0.5) == (list(range(2501)), [])


@pytest.mark.parametrize("share", [-0.1, 0, 1, 1.5, float("nan")])
def test_a_share_lies_between_none_and_all(share):
    with pytest.raises(UserError, match=f"between 0 and 1, not {share:g}"):
        select_features(INFORMATION, EXPECTATION, share)


def test_without_any_information_nothing_is_selected():
    with pytest.raises(UserError, match="give more prompts"):
        select_features(torch.zeros(7), EXPECTATION, 0.5)


# Statistics


def test_statistics_are_those_of_a_loop_over_prompts():
    generator = torch.Generator().manual_seed(0)
    follows = torch.rand(60, generator=generator) < 0.4
    activations = (torch.randint(3, (60, 5), generator=generator) * (1 + follows[:, None])).clamp(max=2).float()
    activations[:, 4] = 0
    found = FeatureStatistics.of(activations, follows)
    for feature in range(5):
        by_source: dict[bool, list[float]] = {True: [], False: []}
        for value, context in zip(activations[:, feature].tolist(), follows.tolist(), strict=True):
            by_source[context].append(value)
        context_mean, memory_mean = (sum(by_source[source]) / len(by_source[source]) for source in (True, False))
        fired = sum(value != 0 for source in by_source.values() for value in source)
        assert found.context_mean[feature].item() == pytest.approx(context_mean)
        assert found.memory_mean[feature].item() == pytest.approx(memory_mean)
        assert found.expectation[feature].item() == pytest.approx(context_mean - memory_mean)
        assert found.frequency[feature].item() == pytest.approx(fired / 60)


def test_the_information_of_statistics_is_about_the_source():
    """Of features that fire with 1 or not at all, which is discrete; less its bias of 1 / 2n."""
    follows = torch.arange(100) < 40
    fires = torch.stack([follows ^ (torch.arange(100) % 5 == 0), follows, ~follows], 1)
    found = FeatureStatistics.of(fires.float(), follows).information
    expected = [mutual_info_score(follows, column) - 1 / 200 for column in fires.T]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("followed", [0, 6])
def test_statistics_need_both_sources(followed):
    with pytest.raises(UserError, match=f"Of 6 prompts {followed} were answered from the context: both"):
        FeatureStatistics.of(torch.rand(6, 3), torch.arange(6) < followed)


# Random control


def statistics_of(frequency: torch.Tensor) -> FeatureStatistics:
    nothing = torch.zeros(len(frequency))
    return FeatureStatistics(nothing, nothing, nothing, frequency)


# Shuffled, so that neighbours in frequency are not neighbours in number.
FREQUENCY = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) / 1000
FEATURES = list(range(100, 140))


@pytest.mark.parametrize("seed", range(5))
def test_random_controls_are_new_and_none_is_drawn_twice(seed):
    drawn = matched_random_features(statistics_of(FREQUENCY), FEATURES, seed)
    assert len(set(drawn)) == len(drawn) == len(FEATURES)
    assert not set(drawn) & set(FEATURES)


def test_random_controls_do_not_meet_even_where_all_want_the_same():
    drawn = matched_random_features(statistics_of(torch.full((50,), 0.1)), list(range(20)), 0)
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(range(20, 50))


def test_a_random_control_is_one_of_the_ten_features_nearest_in_frequency():
    frequency = torch.arange(100) / 100
    drawn = {matched_random_features(statistics_of(frequency), [50], seed)[0] for seed in range(200)}
    assert drawn == {45, 46, 47, 48, 49, 51, 52, 53, 54, 55}


def test_random_controls_fire_about_as_often():
    drawn = matched_random_features(statistics_of(FREQUENCY), FEATURES, 0)
    # The ten nearest lie within five steps of a thousandth; leave as many again for those that are taken or drawn.
    assert (FREQUENCY[drawn] - FREQUENCY[FEATURES]).abs().max() < 0.0101


def test_random_controls_are_reproducible_from_a_seed():
    first, again, other = (matched_random_features(statistics_of(FREQUENCY), FEATURES, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_random_controls_need_as_many_other_features():
    statistics = statistics_of(torch.rand(8, generator=torch.Generator().manual_seed(0)))
    assert sorted(matched_random_features(statistics, [0, 1, 2, 3], 0)) == [4, 5, 6, 7]
    with pytest.raises(UserError, match="too few other features for a random control of 5"):
        matched_random_features(statistics, [0, 1, 2, 3, 4], 0)
