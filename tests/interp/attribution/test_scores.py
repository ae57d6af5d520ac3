import pytest
import torch

from interp.attribution.scores import HeadScores, top_heads
from interp.errors import UserError


def scores(values):
    n = len(values)
    return HeadScores(
        values,
        tuple(f"e{i}" for i in range(n)),
        tuple(f"s{i}" for i in range(n)),
        "m",
        "logit_diff",
        "tiny",
        "d",
        {"seed": 1},
    )


@pytest.fixture
def two_by_three():
    return scores(torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], [[2.0, -4.0, 0.5], [0.0, 5.0, -1.0]]]))


def test_ranking_starts_with_the_strongest_push_in_each_direction(two_by_three):
    assert top_heads(two_by_three.ranked("context"), 2) == [(1, 1), (0, 0)]
    assert top_heads(two_by_three.ranked("memory"), 2) == [(0, 1), (1, 2)]


def test_ranked_heads_carry_mean_and_interval(two_by_three):
    best = two_by_three.ranked("context")[0]
    assert (best.score, best.low, best.high) == (4.0, 3.0, 5.0)


def test_saved_scores_load_as_they_were(two_by_three, tmp_path):
    two_by_three.save(tmp_path / "heads.parquet")
    again = HeadScores.load(tmp_path / "heads.parquet")
    assert torch.equal(again.values, two_by_three.values)
    assert (again.example_ids, again.subjects, again.settings) == (
        two_by_three.example_ids,
        two_by_three.subjects,
        two_by_three.settings,
    )


def test_files_that_do_not_belong_together_are_an_error(two_by_three, tmp_path):
    two_by_three.save(tmp_path / "heads.parquet")
    scores(torch.zeros(1, 2, 3)).save(tmp_path / "other.parquet")
    (tmp_path / "other.parquet").replace(tmp_path / "heads.parquet")
    with pytest.raises(UserError, match="are not head scores"):
        HeadScores.load(tmp_path / "heads.parquet")


def test_rank_correlation_is_spearmans(two_by_three):
    # Ranks 1..6 against the same with the first two swapped: 1 - 6 * (1 + 1) / (6 * 35) by Spearman's formula.
    one = scores(torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
    other = scores(torch.tensor([[[2.0, 1.0, 3.0], [4.0, 5.0, 6.0]]]))
    assert one.rank_correlation(other) == pytest.approx(1 - 12 / 210)


def test_maps_of_different_models_cannot_be_correlated(two_by_three):
    with pytest.raises(UserError, match="cannot be compared"):
        two_by_three.rank_correlation(scores(torch.zeros(1, 1, 3)))
