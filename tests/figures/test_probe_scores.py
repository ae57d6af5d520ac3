from typing import Any

import polars as pl
import pytest

from figures.probe_scores import auroc_of_scores
from interp.errors import UserError
from probes.fitting import EMBEDDING, KNOWN_BEFOREHAND
from tests.figures.samples import trace

SITE = "blocks.2.hook_out"


def scores(label: str, *floors: str, chosen: bool = True) -> pl.DataFrame:
    def row(probe: str, site: str, value: float, group: str = "test", measure: str = "auroc") -> dict[str, Any]:
        about = {"label": label, "probe": probe, "group": group, "site": site, "measure": measure}
        return {**about, "chosen": chosen and site == SITE, "value": value, "low": value - 0.1, "high": 0.99, "n": 9}

    rows = [row("fitted", f"blocks.{layer}.hook_out", 0.6 + 0.1 * layer) for layer in range(3)]
    rows += [row("fitted", SITE, 0.1, measure="accuracy"), row("fitted", SITE, 0.2, group="relation capital")]
    rows += [row("shuffled labels", SITE, 0.5), *(row("floor", site, 0.55) for site in floors)]
    return pl.DataFrame(rows)


def test_what_is_drawn_is_the_auroc_on_the_test_split() -> None:
    figure: Any = auroc_of_scores(scores("conflict"))
    assert list(trace(figure, name="residual").y) == pytest.approx([0.6, 0.7, 0.8])
    assert list(trace(figure, name="shuffled labels").y) == [0.5]


@pytest.mark.parametrize(
    ("label", "floors", "drawn"),
    [
        ("conflict", (KNOWN_BEFOREHAND, EMBEDDING), "embedding floor"),
        ("conflict", (KNOWN_BEFOREHAND,), "known beforehand floor"),
        ("source", (KNOWN_BEFOREHAND, EMBEDDING), "known beforehand floor"),
        ("source", (EMBEDDING,), "embedding floor"),
    ],
)
def test_the_floor_is_the_one_that_the_label_is_compared_with(label: str, floors: tuple[str, ...], drawn: str) -> None:
    names = {t.name for t in auroc_of_scores(scores(label, *floors)).data}
    assert [name for name in names if name and name.endswith("floor")] == [drawn]


def test_scores_without_the_chosen_probe_are_refused() -> None:
    with pytest.raises(UserError, match="scores of source lack the probe"):
        auroc_of_scores(scores("source", chosen=False))
