"""Look at features of an autoencoder: what they fire for, with which source, and what they promote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch
from torch import nn

from conflictscope.saes import check_recording
from figures.features import feature_view
from figures.theme import save_figure
from interp.activation_store import ActivationStore
from interp.errors import UserError
from interp.files import write_json
from interp.sae import SparseAutoencoder
from probes.feature_selection import FeatureStatistics
from probes.feature_views import view_features


def look_at_features(
    model: nn.Module,
    sae: SparseAutoencoder,
    recording: ActivationStore,
    out: Path,
    *,
    features: Sequence[int] | None,
    count: int,
) -> pl.DataFrame:
    """Views of features, as ``features.json`` and a figure of each; see ``probes.feature_views``.

    Args:
        model: The model, or a bridge around it.
        sae: The autoencoder.
        recording: Last tokens of conflict prompts at the autoencoder's site, with answers.
        out: The folder.
        features: Which; ``None`` takes those that tell most about the source of answers.
        count: How many of these.

    Returns:
        A row of text for each.

    Raises:
        UserError: If the recording does not serve, or there is no such feature.
    """
    check_recording(recording, model)
    index = recording.index
    if recording.basis["positions"] != "last" or "usage" not in index.columns:
        raise UserError(
            f"{recording.path} does not hold the last tokens of conflict prompts with their answers; record them with "
            "`conflictscope record`."
        )
    states = recording.read(sae.site)
    if features is None:
        answered = torch.tensor(index["usage"].is_in(["memory", "context"]).fill_null(False).to_list())
        follows = torch.tensor((index["usage"] == "context").fill_null(False).to_list())
        statistics = FeatureStatistics.of(sae.encode(states[answered]), follows[answered])
        features = statistics.information.topk(min(count, sae.d_sae)).indices.tolist()
    views = view_features(model, sae, features, states, index)
    write_json(out / "features.json", {"sae": sae.name, "features": [view.to_record() for view in views]})
    for view in views:
        save_figure(feature_view(view), out / f"layer_{view.layer}-feature_{view.feature}.html")
    return pl.DataFrame(
        [
            {
                "layer": view.layer,
                "feature": view.feature,
                "fires for": f"{view.frequency:.0%}",
                **{f"mean, {row['usage']}": f"{row['mean']:.2f}" for row in view.by_source.iter_rows(named=True)},
                "promotes": " ".join(view.promoted["token"].head(5)),
                "suppresses": " ".join(view.suppressed["token"].head(5)),
            }
            for view in views
        ]
    )
