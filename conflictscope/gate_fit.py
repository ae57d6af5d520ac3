"""Gates learned from a set of conflict prompts, with the text they are guarded by: what studies and dials share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from conflictscope.study.records import Records
from interp.answers import Direction
from interp.conflicts import ConflictSet
from interp.corpus import TEXTS_VERSION, sampled_texts
from interp.teacher_forcing import FORCING_VERSION
from interventions.fitting.scale_data import SCALE_DATA_VERSION, ScaleData
from interventions.fitting.scale_learning import SCALES_VERSION, ScaleTraining, learn_scales

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LearnedFrom = Literal["train", "dev"]

_TEXTS: dict[LearnedFrom, int] = {"train": 56, "dev": 16}
_TEXT_TOKENS = 48
_SIZES: dict[LearnedFrom, dict[str, int]] = {
    "train": {"conflicts": 720, "guards": 112},
    "dev": {"conflicts": 64, "guards": 48},
}


class GateFit:
    """Learns gates from the prompts of two splits; what was learned is kept.

    Args:
        model: The bridge.
        parts: Prompts of every kind, to learn from and to check on.
        records: Where results, texts and unfinished trainings are kept.
        seed: Decides which prompts and texts are used.
    """

    def __init__(
        self, model: TransformerBridge, parts: Mapping[LearnedFrom, ConflictSet], records: Records, *, seed: int
    ) -> None:
        self.model = model
        self.parts = parts
        self.records = records
        self.seed = seed

    def learned(self, towards: Direction, settings: ScaleTraining) -> dict[str, Any]:
        """The gates ``[layer, head, scale]`` of one direction, and what they do on dev."""
        depends_on = [self.basis, vars(settings)]
        version = (SCALES_VERSION, SCALE_DATA_VERSION, FORCING_VERSION, TEXTS_VERSION)
        checkpoint = self.records.place(f"training-{towards}", depends_on, ".safetensors", version=version)

        def compute() -> dict[str, Any]:
            progress = f"Learning towards {towards}"
            gates = learn_scales(
                self.model,
                self.data["train"],
                self.data["dev"],
                towards,
                settings,
                checkpoint=checkpoint,
                progress=progress,
            )
            return {
                "gates": [[*place, scale] for place, scale in zip(gates.places, gates.scales, strict=True)],
                "dev": asdict(gates.dev),
            }

        found = self.records.json(f"gates-{towards}", depends_on, compute, version=version)
        checkpoint.unlink(missing_ok=True)
        return found

    @property
    def basis(self) -> list[Any]:
        """What the data depends on."""
        return [[part.digest for part in self.parts.values()], _TEXTS, _TEXT_TOKENS, _SIZES, self.seed]

    @cached_property
    def data(self) -> dict[LearnedFrom, ScaleData]:
        """Prompts and texts of both splits, as tokens."""
        return {
            split: ScaleData(
                self.model,
                self.parts[split].examples,
                sampled_texts(
                    self.model,
                    count,
                    self.records.folder / "texts",
                    split=split,
                    seed=self.seed,
                    new_tokens=_TEXT_TOKENS,
                    batch_size=count,
                    progress=f"Sampling text: {split}",
                ),
                **_SIZES[split],
                seed=self.seed,
                progress=f"Guards: {split}",
            )
            for split, count in _TEXTS.items()
        }
