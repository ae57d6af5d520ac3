"""A look at single features of a sparse autoencoder: when they fire, with which source, and what they promote.

1. Prompts: those whose last token activates the feature most.
2. Sources: its activation over the prompts that were answered from memory, from the context, or otherwise.
3. Tokens: the logits that its decoder direction moves most when it reaches the end of the residual stream as it was
   written (the logit lens; nostalgebraist 2020). What later layers make of it is not in there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from interp.activation_store import ActivationStore
from interp.anatomy import Anatomy
from interp.answers import USAGES
from interp.errors import UserError
from interp.inputs import tokenizer_of
from interp.sae import SparseAutoencoder
from interp.statistics import bootstrap_mean
from probes.feature_selection import FeatureStatistics

_ROWS_AT_ONCE = 1024
_SHOWN = ("usage", "relation", "template", "text")
_NEEDED = ("subject", *_SHOWN)
_BY_SOURCE = {
    "usage": pl.String,
    "prompts": pl.Int64,
    "frequency": pl.Float64,
    "mean": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}
_VISIBLE = {
    " ": "\N{OPEN BOX}",
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    "\t": "\N{RIGHTWARDS ARROW TO BAR}",
}


@dataclass(frozen=True, eq=False)
class FeatureView:
    """One feature.

    Attributes:
        layer: The block whose output the autoencoder reads.
        feature: Its number.
        frequency: Share of all prompts for which it fires.
        prompts: Those that activate it most, in descending order: ``activation``, ``usage`` (null where no answer was
            judged), ``relation``, ``template``, ``text``. Prompts for which it does not fire are left out.
        by_source: What the answer used, of the judged prompts: ``usage``, ``prompts`` (how many), ``frequency`` (share
            for which it fires), mean activation ``mean`` with its 95 % interval by subject ``low`` and ``high``.
        promoted: Tokens whose logits it raises most, in descending order: ``token``, with spaces and line breaks made
            visible, and ``effect``, the logit added per unit of activation, less the mean over the vocabulary, up to
            the scale of the final norm.
        suppressed: Those it lowers most, the lowest first.
    """

    layer: int
    feature: int
    frequency: float
    prompts: pl.DataFrame
    by_source: pl.DataFrame
    promoted: pl.DataFrame
    suppressed: pl.DataFrame

    def to_record(self) -> dict[str, Any]:
        """As a plain dictionary for JSON; tables are lists of rows."""
        return {
            "layer": self.layer,
            "feature": self.feature,
            "frequency": self.frequency,
            "prompts": self.prompts.to_dicts(),
            "by_source": self.by_source.to_dicts(),
            "promoted": self.promoted.to_dicts(),
            "suppressed": self.suppressed.to_dicts(),
        }


@torch.inference_mode()
def view_features(
    model: nn.Module,
    sae: SparseAutoencoder,
    features: Sequence[int],
    states: Tensor,
    index: pl.DataFrame,
    *,
    n_prompts: int = 10,
    n_tokens: int = 10,
) -> list[FeatureView]:
    """Look at some features of an autoencoder, one view for each.

    Args:
        model: The model, or a bridge around it, whose tokens are promoted and suppressed.
        sae: The autoencoder.
        features: Numbers of features.
        states: Residual streams at ``sae.site`` and the prompts' last token, ``(n, d_in)``.
        index: About these ``n`` prompts, as in the index of an ``ActivationStore`` with answers: ``subject``,
            ``relation``, ``template``, ``text``, and ``usage``, null where no answer was judged.
        n_prompts: How many prompts to show, at most.
        n_tokens: How many tokens to show on either side.

    Raises:
        UserError: If the autoencoder has no such feature, states and index are not of the same prompts or the states
            not of the autoencoder's width, or the index does not say what the answers used.
    """
    _check_prompts(sae, states, index)
    chosen = sae.restricted(features)
    anatomy = Anatomy(model)
    directions = chosen.weights["W_dec"]
    activations = torch.cat([chosen.encode(x.to(directions.device)).cpu() for x in states.split(_ROWS_AT_ONCE)])
    views = []
    for number, values, direction in zip(features, activations.T, directions, strict=True):
        frame = index.select(_NEEDED).with_columns(activation=pl.Series(values.tolist(), dtype=pl.Float64))
        firing = frame.filter(pl.col("activation") != 0)
        effects = anatomy.direction_logits(direction.to(anatomy.device)).cpu()
        view = FeatureView(
            layer=sae.layer,
            feature=number,
            frequency=len(firing) / len(frame),
            prompts=firing.sort("activation", descending=True, maintain_order=True)
            .head(n_prompts)
            .select("activation", *_SHOWN),
            by_source=_by_source(frame),
            promoted=_tokens(tokenizer_of(model), effects, n_tokens, largest=True),
            suppressed=_tokens(tokenizer_of(model), effects, n_tokens, largest=False),
        )
        views.append(view)
    return views


def look_at_features(
    model: nn.Module,
    sae: SparseAutoencoder,
    recording: ActivationStore,
    *,
    features: Sequence[int] | None,
    count: int,
) -> list[FeatureView]:
    """Look at features with what was recorded of conflict prompts.

    Args:
        model: The model, or a bridge around it.
        sae: The autoencoder.
        recording: Last tokens of conflict prompts at the autoencoder's site, with answers.
        features: Which; ``None`` takes those that tell most about the source of answers.
        count: How many of these.

    Raises:
        UserError: If the recording does not serve, or there is no such feature.
    """
    recording.check(model)
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
    return view_features(model, sae, features, states, index)


def features_table(views: Sequence[FeatureView]) -> pl.DataFrame:
    """A row of text for each feature: how often it fires, with which source, and which tokens it moves."""
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


def visible_token(tokenizer: Any, token_id: int) -> str:
    """A token as it reads in a text, with spaces, line breaks and control characters made visible."""
    piece = tokenizer.convert_ids_to_tokens(token_id) or f"[{token_id}]"
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    # Sentencepiece tokenizers strip the space of a token that stands alone.
    if piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
        text = f" {text}"
    # Part of a character is no text.
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = piece
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _check_prompts(sae: SparseAutoencoder, states: Tensor, index: pl.DataFrame) -> None:
    if absent := [column for column in _NEEDED if column not in index.columns]:
        raise UserError(
            f"The index has no column {absent[0]}: features are looked at on a recording of conflict prompts with "
            "answers; make one with `conflictscope record`."
        )
    if states.ndim != 2 or states.shape[1] != sae.d_in:
        raise UserError(
            f"The states have shape {tuple(states.shape)}, but the SAE {sae.name} reads {sae.d_in} numbers a prompt; "
            f"give those of {sae.site} of the model that it was trained on."
        )
    if len(states) != len(index):
        raise UserError(f"There are {len(states)} states for {len(index)} rows of the index; give one for each row.")
    if not index["usage"].is_in(USAGES).any():
        raise UserError(
            "The index says of no prompt which source its answer used; give a recording of conflict prompts with "
            "answers, made with `conflictscope record`."
        )


def _by_source(frame: pl.DataFrame) -> pl.DataFrame:
    rows = []
    for usage in USAGES:
        part = frame.filter(usage=usage)
        if len(part):
            activation = part["activation"].to_numpy()
            mean = bootstrap_mean(activation, part["subject"].to_list())
            frequency = float((activation != 0).mean())
            rows.append((usage, mean.n, frequency, mean.value, mean.low, mean.high))
    return pl.DataFrame(rows, schema=_BY_SOURCE, orient="row")


def _tokens(tokenizer: Any, effects: Tensor, count: int, *, largest: bool) -> pl.DataFrame:
    # Unembeddings are often padded to more rows than there are tokens.
    known = effects[: len(tokenizer)]
    values, ids = known.topk(min(count, len(known)), largest=largest)
    tokens = [visible_token(tokenizer, i) for i in ids.tolist()]
    return pl.DataFrame({"token": tokens, "effect": values.tolist()}, schema={"token": pl.String, "effect": pl.Float64})
