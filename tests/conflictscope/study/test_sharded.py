"""What is attributed and recorded in parts is what one process makes, to the byte, also where it was killed between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conflictscope.study.sharded import Sharded, ShardedAttribution, ShardedRecording, done_in_parts
from conflictscope.study.units import Done, Executor, Schedule, serial
from interp import activation_store
from interp.activation_store import ActivationStore
from interp.activations import sites_of
from interp.attribution import path_patching as patching_module
from interp.attribution.path_patching import path_patching
from interp.attribution.scores import HeadScores
from interp.errors import UserError
from tests.tiny import tiny_conflicts


def killed_after(count: int, make_worker: Any) -> Executor:
    """One unit after the other, until so many are done."""

    def run(schedule: Schedule) -> Any:
        for number, done in enumerate(serial(make_worker)(schedule)):
            yield done
            if number + 1 == count:
                raise KeyboardInterrupt

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_two_lives(make: Any) -> list[str]:
    """Do work, killed after three units and started again; gives the parts that were made."""
    made: list[str] = []

    class Counted:
        def __init__(self) -> None:
            self.work: Sharded = make()

        def run(self, unit: Any) -> Done:
            made.append(f"{unit.step}{unit.what}")
            return self.work.run(unit)

    with pytest.raises(KeyboardInterrupt):
        done_in_parts(make(), killed_after(3, Counted))
    done_in_parts(make(), serial(Counted))
    return made


def test_scores_of_blocks_are_those_of_one_process(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching_module, "BLOCK", 4)
    conflicts, options = tiny_conflicts(), {"name": "tiny", "baseline": "corrupted", "mlps": "recompute", "seed": 1}
    path_patching(tiny_llama, conflicts, **options)["logit_diff"].save(tmp_path / "whole.parquet")

    def make() -> ShardedAttribution:
        asked = (tiny_llama, conflicts)
        return ShardedAttribution(
            lambda: tiny_llama, lambda: asked, tmp_path / "parts", options, tmp_path / "out.parquet"
        )

    made = in_two_lives(make)
    assert len(made) == len(set(made)) == 2 + patching_module.n_blocks(tiny_llama, conflicts)
    for suffix in (".parquet", ".json"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert HeadScores.load(tmp_path / "out.parquet").example_ids


def test_a_recording_of_shards_is_that_of_one_process(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "SHARD_PROMPTS", 5)
    conflicts = tiny_conflicts()
    options: dict[str, Any] = {"positions": "last", "name": "tiny", "seed": 0, "dtype": activation_store.torch.float32}
    options |= {"answers": True, "batch_size": 4}
    ActivationStore.record(tmp_path / "whole", tiny_llama, conflicts, sites_of(tiny_llama), **options)

    def make() -> ShardedRecording:
        asked = (tiny_llama, conflicts)
        return ShardedRecording(lambda: tiny_llama, lambda: asked, tmp_path / "parts", options, tmp_path / "out")

    made = in_two_lives(make)
    assert len(made) == len(set(made)) == 2 + -(-len(conflicts) // 5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_cannot_be_cut_is_said(tiny_llama: Any, tmp_path: Path) -> None:
    options = {"name": "tiny", "baseline": "mean", "mlps": "recompute", "seed": 1}
    asked = (tiny_llama, tiny_conflicts())
    work = ShardedAttribution(lambda: tiny_llama, lambda: asked, tmp_path, options, tmp_path / "out.parquet")
    with pytest.raises(UserError, match="--baseline zero"):
        done_in_parts(work, serial(lambda: work))
