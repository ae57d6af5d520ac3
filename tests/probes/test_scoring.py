from typing import Any

import polars as pl

from probes.scoring import score_table


def test_the_score_table_shows_the_chosen_site_floors_and_probes_left_out():
    def row(probe: str, site: str, chosen: bool, measure: str, value: float) -> dict[str, Any]:
        about = {"label": "source", "probe": probe, "group": "test", "site": site, "chosen": chosen, "measure": measure}
        return {**about, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}

    rows = [
        row("fitted", "one", False, "auroc", 0.6),
        row("fitted", "two", True, "auroc", 0.81234),
        row("fitted", "two", True, "accuracy", 0.7),
        row("shuffled labels", "one", False, "auroc", 0.5),
        row("floor", "phrasing and relation", False, "auroc", 0.55),
        row("without relation capital", "one", False, "auroc", 0.65),
    ]
    table = score_table(pl.DataFrame(rows))
    assert table.drop("label", "n").rows() == [
        ("fitted", "test", "AUROC", "0.812 [0.712, 0.912]"),
        ("fitted", "test", "accuracy", "0.700 [0.600, 0.800]"),
        ("floor", "test", "AUROC", "0.550 [0.450, 0.650]"),
        ("without relation capital", "test", "AUROC", "0.650 [0.550, 0.750]"),
    ]
