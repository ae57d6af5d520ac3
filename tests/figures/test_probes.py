from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from figures.probes import activation_patterns, auroc_by_layer, projection_by_layer, reliability_curve
from figures.theme import ALIGNED_COLOUR, CONFLICT_COLOUR, CONTEXT_COLOUR, DARK_THEME, MEMORY_COLOUR, OTHER_COLOUR
from interp.activations import site_kind
from interp.errors import UserError
from interp.statistics import Estimate
from probes.linear import LinearProbe, ProbeSet
from probes.quality import ProbeScore, ReliabilityBin
from tests.figures.samples import trace

RESIDUAL = ("blocks.0.hook_out", "blocks.1.hook_out")


def around(value: float) -> Estimate:
    return Estimate(value, value - 0.02, value + 0.03, 120)


def score(auroc: float) -> ProbeScore:
    bins = (ReliabilityBin(0.14, around(0.2)), ReliabilityBin(0.86, around(0.8)))
    return ProbeScore(around(auroc), around(auroc), around(0.7), around(0.061), 0.5, bins)


SCORES = {
    "embed.hook_out": score(0.55),
    "blocks.10.hook_out": score(0.9),
    "blocks.2.hook_out": score(0.8),
    "blocks.2.attn.hook_out": score(0.7),
}
AUROC = {site: found.auroc for site, found in SCORES.items()}


def band_of(figure: Any, name: str) -> Any:
    return trace(figure, legendgroup=name, fill="toself")


def probes(weights: Tensor) -> ProbeSet:
    """Probes of memory and context at the residual sites; the second did best on validation."""
    return ProbeSet(
        {
            site: LinearProbe(site, ("memory", "context"), weights, torch.tensor([0.5]), 1.0, 0.6 + 0.1 * layer)
            for layer, site in enumerate(RESIDUAL)
        }
    )


FEATURES = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5.0, 3.0, 1.0, 1.0])
LABELS = ["memory", "context", "other"] * 4
WEIGHT = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("blocks.3.hook_out", ("residual", 3)),
        ("blocks.3.attn.hook_out", ("attention", 3)),
        ("blocks.3.ln1_post.hook_out", ("attention", 3)),
        ("blocks.12.mlp.hook_out", ("mlp", 12)),
        ("blocks.12.ln2_post.hook_out", ("mlp", 12)),
        ("blocks.3.attn.o.hook_in", ("z", 3)),
        ("blocks.3.attn.q.hook_out", None),
        ("embed.hook_out", None),
        ("hook_out", None),
    ],
)
def test_site_kind_reads_kind_and_layer_from_the_name(site: str, place: tuple[str, int] | None) -> None:
    assert site_kind(site) == place


def test_auroc_has_a_line_for_each_kind_in_order_of_the_layers() -> None:
    figure: Any = auroc_by_layer(AUROC)
    residual, attention = trace(figure, name="residual"), trace(figure, name="attention")
    assert (list(residual.x), list(residual.y)) == ([2, 10], [0.8, 0.9])
    assert (list(attention.x), list(attention.y)) == ([2], [0.7])
    assert {t.legendgroup for t in figure.data} == {"residual", "attention"}


def test_auroc_has_its_interval_as_a_band() -> None:
    band = band_of(auroc_by_layer(AUROC), "residual")
    assert list(band.x) == [2, 10, 10, 2]
    assert list(band.y) == pytest.approx([0.83, 0.93, 0.88, 0.78])


def test_auroc_says_layer_interval_and_n_on_hover() -> None:
    text = trace(auroc_by_layer(AUROC), name="residual").hovertext[1]
    assert "residual, layer 10" in text
    assert "AUROC 0.900 [0.880, 0.930]" in text
    assert "n = 120 prompts" in text


def test_shuffled_labels_are_one_grey_line_of_the_residual_stream() -> None:
    shuffled = {site: around(0.5 + 0.01 * i) for i, site in enumerate(SCORES)}
    figure: Any = auroc_by_layer(AUROC, shuffled=shuffled)
    control = trace(figure, name="shuffled labels")
    assert (list(control.x), list(control.y)) == ([2, 10], [0.52, 0.51])
    assert control.line.color == OTHER_COLOUR


def test_shuffled_labels_take_the_first_kind_where_there_is_no_residual_stream() -> None:
    attention = {"blocks.2.attn.hook_out": around(0.7)}
    figure: Any = auroc_by_layer(attention, shuffled={"blocks.2.attn.hook_out": around(0.51)})
    assert list(trace(figure, name="shuffled labels").y) == [0.51]


def test_the_floor_is_a_labelled_dotted_line() -> None:
    figure: Any = auroc_by_layer(AUROC, floor=around(0.55), floor_label="question alone")
    line = trace(figure, name="question alone")
    assert (list(line.y), line.line.dash) == ([0.55, 0.55], "dot")
    assert [a.text for a in figure.layout.annotations] == ["question alone: 0.55"]


@pytest.mark.parametrize(("reached", "side"), [(0.55, "top"), (0.95, "bottom"), (0.88, "top")])
def test_the_label_of_the_floor_keeps_away_from_the_lines(reached: float, side: str) -> None:
    figure: Any = auroc_by_layer(AUROC, floor=around(reached))
    assert figure.layout.annotations[0].yanchor == side


def test_the_chosen_site_has_a_ring_and_a_label() -> None:
    figure: Any = auroc_by_layer(AUROC, chosen="blocks.10.hook_out")
    ring = trace(figure, name="blocks.10.hook_out")
    assert (list(ring.x), list(ring.y), ring.marker.symbol) == ([10], [0.9], "circle-open")
    assert figure.layout.annotations[0].text == "<b>residual 10: 0.90</b>"


def test_a_chosen_site_without_score_is_refused() -> None:
    with pytest.raises(UserError, match=r"'blocks\.7\.hook_out' has no score"):
        auroc_by_layer(AUROC, chosen="blocks.7.hook_out")


def test_scores_of_no_layer_are_refused() -> None:
    with pytest.raises(UserError, match="None of the scores"):
        auroc_by_layer({"embed.hook_out": around(0.5)})


def test_reliability_holds_frequency_interval_and_calibration_error() -> None:
    figure: Any = reliability_curve({"blocks.2.hook_out": score(0.8), "<held out>": score(0.7)})
    curve = trace(figure, name="residual 2, ECE 0.061")
    assert (list(curve.x), list(curve.y)) == ([0.14, 0.86], [0.2, 0.8])
    assert list(curve.error_y.array) == pytest.approx([0.03, 0.03])
    assert list(curve.error_y.arrayminus) == pytest.approx([0.02, 0.02])
    assert "&lt;held out&gt;, ECE 0.061" in {t.name for t in figure.data}


def test_reliability_has_the_diagonal() -> None:
    diagonal = trace(reliability_curve({"a": score(0.8)}), name=None)
    assert (list(diagonal.x), list(diagonal.y)) == ([0, 1], [0, 1])


def test_projection_has_a_frame_for_each_layer_and_starts_at_the_best() -> None:
    figure: Any = projection_by_layer(dict.fromkeys(RESIDUAL, FEATURES), probes(WEIGHT), LABELS)
    assert [frame.name for frame in figure.frames] == ["0", "1"]
    assert figure.layout.sliders[0].active == 1
    assert [list(t.x) for t in figure.data] == [list(t.x) for t in figure.frames[1].data]


def test_projection_colours_the_labels_and_shows_the_text() -> None:
    texts = [f"prompt <{i}>" for i in range(12)]
    figure: Any = projection_by_layer({RESIDUAL[0]: FEATURES}, probes(WEIGHT), LABELS, texts)
    memory, context = trace(figure, name="memory"), trace(figure, name="context")
    assert (memory.marker.color, context.marker.color) == (MEMORY_COLOUR, CONTEXT_COLOUR)
    assert context.hovertext[0] == "<b>context</b><br>prompt &lt;1&gt;"


def test_projection_has_log_odds_on_the_right() -> None:
    figure: Any = projection_by_layer({RESIDUAL[0]: FEATURES}, probes(WEIGHT), LABELS)
    right = trace(figure, name="memory", xaxis="x2")
    assert list(right.x) == pytest.approx((FEATURES[::3, 0] + 0.5).tolist(), rel=0.01)
    assert figure.layout.xaxis2.title.text == "log odds of context"


def test_projection_has_the_principal_components_on_the_left() -> None:
    figure: Any = projection_by_layer({RESIDUAL[0]: FEATURES}, probes(WEIGHT), ["memory"] * 12)
    left = trace(figure, name="memory", xaxis="x")
    values, vectors = torch.linalg.eigh(FEATURES.T.cov())
    expected = (FEATURES - FEATURES.mean(0)) @ vectors[:, -1]
    assert [abs(x) for x in left.x] == pytest.approx(expected.abs().tolist(), rel=0.01)
    assert figure.layout.xaxis.title.text == f"PC 1 ({100 * values[-1] / values.sum():.0f}%)"


def test_projection_is_orthogonal_to_the_probe_across_the_log_odds() -> None:
    figure: Any = projection_by_layer({RESIDUAL[0]: FEATURES}, probes(WEIGHT), ["memory"] * 12)
    right = trace(figure, name="memory", xaxis="x2")
    expected = torch.pca_lowrank(FEATURES[:, 1:], q=4)[0][:, 0]
    correlation = torch.corrcoef(torch.stack([torch.tensor(right.y), expected]))[0, 1]
    assert abs(correlation.item()) == pytest.approx(1, abs=1e-3)


def test_projection_keeps_the_signs_from_layer_to_layer() -> None:
    features = {RESIDUAL[0]: FEATURES, RESIDUAL[1]: -FEATURES}
    figure: Any = projection_by_layer(features, probes(WEIGHT), ["memory"] * 12)
    (left, right), (later_left, later_right) = (frame.data for frame in figure.frames)
    assert (list(later_left.x), list(later_left.y)) == (
        pytest.approx(list(left.x), rel=0.01),
        pytest.approx(list(left.y), rel=0.01),
    )
    assert list(later_right.y) == pytest.approx(list(right.y), rel=0.01)


def test_projection_refuses_probes_of_three_classes() -> None:
    three = LinearProbe(RESIDUAL[0], ("a", "b", "c"), torch.eye(3, 5), torch.zeros(3), 1.0, 0.6)
    with pytest.raises(UserError, match="3 classes has no single direction"):
        projection_by_layer({RESIDUAL[0]: FEATURES}, ProbeSet({RESIDUAL[0]: three}), LABELS)


def test_projection_refuses_features_without_a_probe() -> None:
    with pytest.raises(UserError, match="No residual-stream site"):
        projection_by_layer({"blocks.9.hook_out": FEATURES}, probes(WEIGHT), LABELS)


def test_projection_refuses_another_number_of_labels() -> None:
    with pytest.raises(UserError, match="each of the 12 rows"):
        projection_by_layer({RESIDUAL[0]: FEATURES}, probes(WEIGHT), LABELS[:3])


def patterns(sites: list[str], *, top: float = 2.0) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "site": site,
                "pattern": pattern,
                "group": group,
                "value": value,
                "low": value - 0.1,
                "high": value + 0.1,
                "n": 9,
            }
            for i, site in enumerate(sites)
            for pattern in ("gini", "l2")
            for group in ("conflict", "aligned")
            for value in [1 + (top - 1) * i]
        ]
    )


def test_patterns_have_a_panel_each_and_a_line_for_each_group() -> None:
    figure: Any = activation_patterns(patterns(["blocks.4.hook_out", "blocks.10.hook_out", "blocks.4.mlp.hook_out"]))
    assert [a.text for a in figure.layout.annotations] == ["<b>Gini index</b>", "<b>L2 norm</b>"]
    conflict, aligned = trace(figure, name="conflict", xaxis="x2"), trace(figure, name="aligned", xaxis="x2")
    assert (conflict.line.color, aligned.line.color) == (CONFLICT_COLOUR, ALIGNED_COLOUR)
    assert (list(conflict.x), list(conflict.y)) == ([4, 10], [1, 2])


def test_patterns_have_their_interval_as_a_band() -> None:
    figure = activation_patterns(patterns(["blocks.4.hook_out", "blocks.10.hook_out"]))
    assert list(band_of(figure, "conflict").y) == pytest.approx([1.1, 2.1, 1.9, 0.9])


def test_patterns_take_the_kind_with_most_sites_where_there_is_no_residual_stream() -> None:
    sites = ["blocks.1.attn.hook_out", "blocks.1.mlp.hook_out", "blocks.2.mlp.hook_out"]
    figure: Any = activation_patterns(patterns(sites))
    assert list(trace(figure, name="conflict").x) == [1, 2]
    assert figure.layout.xaxis.title.text == "layer (mlp)"


@pytest.mark.parametrize(("top", "scale"), [(2.0, "linear"), (50.0, "log")])
def test_patterns_that_grow_manyfold_have_a_logarithmic_axis(top: float, scale: str) -> None:
    figure: Any = activation_patterns(patterns(["blocks.0.hook_out", "blocks.1.hook_out"], top=top))
    assert (figure.layout.yaxis.type or "linear") == scale


def test_patterns_of_no_layer_are_refused() -> None:
    with pytest.raises(UserError, match="None of the patterns"):
        activation_patterns(patterns(["embed.hook_out"]))


@pytest.mark.parametrize(
    "figure",
    [
        auroc_by_layer(AUROC, floor=around(0.5), chosen="blocks.2.hook_out"),
        reliability_curve(SCORES),
        projection_by_layer({RESIDUAL[0]: FEATURES}, probes(WEIGHT), LABELS),
        activation_patterns(patterns(["blocks.0.hook_out"])),
    ],
    ids=["auroc", "reliability", "projection", "patterns"],
)
def test_a_theme_swap_changes_no_data_colour(figure: Any) -> None:
    before = figure.to_plotly_json()["data"]
    assert figure.update_layout(template=DARK_THEME).to_plotly_json()["data"] == before
