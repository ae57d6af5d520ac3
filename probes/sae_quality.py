"""How good an autoencoder is: how few features it takes, what they explain, and what the model loses with them alone.

The first token of a text is left out everywhere: it is an attention sink whose norm dwarfs all others, and an
autoencoder that is trained without it cannot be asked about it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from interp.activations import observations, watching
from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import padded, prompt_batches
from interp.progress import tracked
from interp.sae import SparseAutoencoder
from interp.statistics import Estimate, bootstrap_mean, rate
from probes.sae_data import held_out_prompts, held_out_texts


@dataclass(frozen=True)
class SAEQuality:
    """Quality of one autoencoder on some texts; intervals are bootstrapped by text or, given clusters, by these.

    Attributes:
        tokens: Tokens that were encoded.
        active: Features that fire for a token, on average (L0).
        explained_variance: 1 - squared error / variance of the residual stream.
        dead_features: Features that fired for none of these tokens.
        loss: The model's cross-entropy, nats per token.
        loss_spliced: The same when the reconstruction takes the residual stream's place.
        loss_ablated: The same when zeros do.
        loss_recovered: (ablated - spliced) / (ablated - loss): 1 loses nothing.
        loss_increase: Spliced less unspliced loss, mean over texts.
        same_next_token: Share of texts after which the greedy next token is the same with the reconstruction.
    """

    tokens: int
    active: float
    explained_variance: float
    dead_features: int
    loss: float
    loss_spliced: float
    loss_ablated: float
    loss_recovered: float
    loss_increase: Estimate
    same_next_token: Estimate

    def to_record(self) -> dict[str, Any]:
        """As plain dictionaries for JSON."""
        return {name: value.to_record() if isinstance(value, Estimate) else value for name, value in vars(self).items()}


def evaluate_saes(
    model: nn.Module,
    saes: Sequence[SparseAutoencoder],
    texts: Sequence[str],
    *,
    clusters: Sequence[Hashable] | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[SAEQuality]:
    """Measure autoencoders on texts that they have not seen.

    Args:
        model: The model they read.
        saes: The autoencoders.
        texts: The texts, of two tokens or more.
        clusters: For each text what the bootstrap resamples together (its subject); ``None`` is each by itself.
        batch_size: Texts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If an autoencoder does not fit the model, or a text has fewer than two tokens.
    """
    device = Anatomy(model).device
    tallies = [_Tally(sae.to(device)) for sae in saes]
    for sae in saes:
        sae.check(model)
    network: Any = transformers_model(model)
    order: list[int] = []
    for numbers, tokens in tracked(prompt_batches(model, texts, batch_size), progress):
        order += numbers
        inputs = padded(model, tokens)
        real = inputs["attention_mask"].bool()
        if int(real.sum(-1).min()) < 2:
            raise UserError("A text has fewer than two tokens, which leaves nothing to predict; leave it out.")
        inner = real & (inputs["position_ids"] > 0)

        def logits(inputs: dict[str, Tensor] = inputs) -> Tensor:
            return network(**inputs).logits

        with torch.inference_mode():
            residuals: dict[str, Tensor] = {}
            with watching(model, observations(model, [sae.site for sae in saes]), residuals.__setitem__):
                clean = _Predictions(logits(), inputs["input_ids"], inner)
            for tally in tallies:
                tally.count(residuals[tally.sae.site][inner])
                with _replaced(model, tally.sae.layer, inner, tally.sae.reconstruct):
                    spliced = _Predictions(logits(), inputs["input_ids"], inner)
                with _replaced(model, tally.sae.layer, inner, torch.zeros_like):
                    ablated = _Predictions(logits(), inputs["input_ids"], inner)
                tally.compare(clean, spliced, ablated)
    drawn = order if clusters is None else [clusters[i] for i in order]
    return [tally.quality(drawn) for tally in tallies]


def measure_saes(
    model: nn.Module, saes: Sequence[SparseAutoencoder], folder: Path, *, seed: int = 0
) -> dict[str, list[SAEQuality]]:
    """Measure autoencoders on text that nobody trained on: sampled, and conflict prompts about held-out subjects.

    Args:
        model: The model, or a bridge around it.
        saes: The autoencoders.
        folder: Where sampled texts are kept.
        seed: Decides the split and what is sampled.

    Returns:
        For ``text`` and for ``conflict_prompts`` the quality of each.
    """
    prompts = held_out_prompts(seed)
    return {
        "text": evaluate_saes(model, saes, held_out_texts(model, folder / "texts", seed), progress="Measuring on text"),
        "conflict_prompts": evaluate_saes(
            model,
            saes,
            [example.prompt for example in prompts],
            clusters=[example.subject for example in prompts],
            progress="Measuring on conflict prompts",
        ),
    }


def sae_table(saes: Sequence[SparseAutoencoder]) -> pl.DataFrame:
    """What the cards say about quality, a row for each autoencoder and kind of text."""
    parts = ("text", "conflict_prompts")
    records = {part: [sae.card["quality"][part] for sae in saes] for part in parts}
    return quality_table([sae.layer for sae in saes], records)


def quality_table(layers: Sequence[int], records: Mapping[str, Sequence[Mapping[str, Any]]]) -> pl.DataFrame:
    """Records of quality by kind of text, a row for each layer and kind."""
    return pl.DataFrame(
        [
            {
                "layer": layer,
                "on": part.replace("_", " "),
                "active": f"{record['active']:.1f}",
                "explained variance": f"{record['explained_variance']:.3f}",
                "loss recovered": f"{record['loss_recovered']:.3f}",
                "loss increase": "{value:.3f} [{low:.3f}, {high:.3f}]".format(**record["loss_increase"]),
                "same next token": "{value:.2f} [{low:.2f}, {high:.2f}]".format(**record["same_next_token"]),
                "dead": record["dead_features"],
            }
            for part, found in records.items()
            for layer, record in zip(layers, found, strict=True)
        ]
    )


@contextmanager
def _replaced(model: nn.Module, layer: int, where: Tensor, replacement: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the residual stream after a block at the tokens ``where`` for the length of a ``with`` block."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        residual = output[0] if isinstance(output, tuple) else output
        replaced = residual.clone()
        replaced[where] = replacement(residual[where]).to(residual.dtype)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    handle = Anatomy(model).module("block", layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Predictions:
    """Of one batch: each text's summed loss over the tokens after the first, and its greedy next token."""

    def __init__(self, logits: Tensor, input_ids: Tensor, inner: Tensor) -> None:
        # The token at a column is predicted one column before.
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
        ).view(input_ids[:, 1:].shape)
        self.loss = (losses * inner[:, 1:]).sum(-1).cpu().double()
        self.tokens = inner[:, 1:].sum(-1).cpu()
        self.next = logits[:, -1].argmax(-1).cpu()


class _Tally:
    """Sums over batches for one autoencoder."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self.tokens = 0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.long)
        self.error = 0.0
        self.total = torch.zeros(sae.d_in, dtype=torch.float64)
        self.square = 0.0
        self.losses: list[Tensor] = []
        self.same: list[Tensor] = []

    def count(self, residual: Tensor) -> None:
        x = residual.float()
        self.tokens += len(x)
        self.fired += (self.sae.encode(x) != 0).sum(0).cpu()
        self.error += (x - self.sae.reconstruct(x)).square().sum().item()
        self.total += x.sum(0).cpu().double()
        self.square += x.square().sum().item()

    def compare(self, clean: _Predictions, spliced: _Predictions, ablated: _Predictions) -> None:
        self.losses.append(torch.stack([clean.loss, spliced.loss, ablated.loss, clean.tokens.double()], 1))
        self.same.append((clean.next == spliced.next).double())

    def quality(self, clusters: Sequence[Hashable]) -> SAEQuality:
        by_text = torch.cat(self.losses)
        clean, spliced, ablated, tokens = by_text.sum(0).tolist()
        variance = self.square - (self.total.square().sum().item()) / self.tokens
        increase = (by_text[:, 1] - by_text[:, 0]) / by_text[:, 3]
        return SAEQuality(
            tokens=self.tokens,
            active=self.fired.sum().item() / self.tokens,
            explained_variance=1 - self.error / variance,
            dead_features=int((self.fired == 0).sum()),
            loss=clean / tokens,
            loss_spliced=spliced / tokens,
            loss_ablated=ablated / tokens,
            loss_recovered=(ablated - spliced) / (ablated - clean),
            loss_increase=bootstrap_mean(increase.numpy(), clusters),
            same_next_token=rate(torch.cat(self.same).numpy(), clusters),
        )
