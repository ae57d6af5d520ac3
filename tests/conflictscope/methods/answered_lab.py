"""A lab of a tiny model whose prompts count as answered from either source in turn: a random model follows none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from conflictscope.study.data import Prompts
from conflictscope.study.lab import Lab
from interp.conflicts import ConflictSet
from interp.fingerprints import fingerprint
from interp.records import Records
from interp.sae import SparseAutoencoder
from tests.tiny import tiny_conflicts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def answered_lab(
    model: TransformerBridge, folder: Path, saes: Callable[[], Sequence[SparseAutoencoder]] | None = None
) -> Lab:
    """The lab; of each two prompts the first counts as answered from the context, and every fifth from neither."""
    every = tiny_conflicts()
    parts = (ConflictSet("tiny", every.select(split=split).examples) for split in ("train", "dev", "test"))
    prompts = Prompts(*parts, name="tiny", relations=("capital",))
    lab = Lab(model, "tiny", prompts, Records(folder, model=fingerprint(model)), quick=True, saes=saes)
    index = lab.store.index.with_row_index("row")
    source = pl.when(pl.col("row") % 2 == 0).then(pl.lit("context")).otherwise(pl.lit("memory"))
    lab.answered = index.with_columns(usage=source).filter(pl.col("row") % 5 != 4)
    return lab
