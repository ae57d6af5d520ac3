"""Ask a llama.cpp that is installed here for what it answers with exported edits."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.errors import UserError

_SCRIPT = Path(__file__).with_name("ask_llama_cpp.py")


class Run(NamedTuple):
    """What llama.cpp is given beside the base.

    Attributes:
        adapter: A LoRA adapter in a GGUF file.
        scale: How far the adapter goes.
        directions: What a control vector adds after layers, ``(d_model,)`` each.
    """

    adapter: Path | None = None
    scale: float = 1.0
    directions: Mapping[int, Tensor] = {}


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp with a base model.

    Attributes:
        python: The interpreter of an environment that has llama-cpp-python.
        base: The base model, a GGUF file.
    """

    python: Path
    base: Path

    def asked(
        self, runs: Sequence[Run], prompts: Sequence[Sequence[int]], tokens: int, *, n_layers: int
    ) -> tuple[Tensor, list[list[list[int]]]]:
        """Ask prompts in several runs.

        Args:
            runs: What is given to llama.cpp in each.
            prompts: Token ids.
            tokens: How many to answer with; the end of the text does not end an answer.
            n_layers: Of the base.

        Returns:
            The next logits ``(runs, prompts, d_vocab)``, and the greedy tokens of each run and prompt.

        Raises:
            UserError: If there is no llama.cpp, or it does not take the base or an edit.
        """
        if not self.base.is_file():
            raise UserError(f"{self.base} is not a file; give the base model in GGUF.")
        with tempfile.TemporaryDirectory() as folder:
            job, found = Path(folder, "job.json"), Path(folder, "found.npz")
            said = [_said(run, Path(folder, f"vector-{number}.npy"), n_layers) for number, run in enumerate(runs)]
            asked = {"model": str(self.base), "prompts": [list(prompt) for prompt in prompts], "tokens": tokens}
            job.write_text(json.dumps({**asked, "runs": said}), encoding="utf-8")
            # Isolated: files beside the script have names of packages.
            command = [self.python, "-I", _SCRIPT, job, found]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                raise UserError(f"Could not run {self.python}: {error.strerror}; give --llama-python.") from error
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
                raise UserError(f"{self.python} could not ask llama.cpp: {last}")
            with np.load(found, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["logits"]), arrays["tokens"].tolist()


def _said(run: Run, path: Path, n_layers: int) -> dict[str, Any]:
    """A run as the script reads it; its directions go into a file."""
    if run.adapter is not None:
        return {"lora": str(run.adapter.resolve()), "scale": run.scale}
    if not run.directions:
        return {}
    # As llama.cpp's own loader puts them: no row for layer 0.
    rows = np.zeros((n_layers - 1, len(next(iter(run.directions.values())))), np.float32)
    for layer, direction in run.directions.items():
        rows[layer - 1] = direction.float().numpy()
    np.save(path, rows, allow_pickle=False)
    return {"vector": str(path), "layers": [1, n_layers]}
