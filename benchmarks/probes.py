"""All probes as one batched problem against scikit-learn's LogisticRegression in a loop, in the same run.

Run ``python -m benchmarks.probes --json``. The problems are real: conflicting against aligned capitals at the last
token, for residual stream, attention and MLP of every layer and ten regularisation strengths. Both sides start from
recorded activations, standardise them, and stop at the same tolerance of the gradient; AUROC is that on held-out
subjects. The loop runs on ``--sites`` sites spread over all layers and kinds, and is extrapolated to all of them, and
says so. scikit-learn's ``newton-cholesky``, its fastest solver for such shapes, runs beside its default.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from interp.activations import record, sites_of
from interp.conflicts import ConflictSet
from interp.facts import build_conflicts, usable_facts
from interp.models import DEFAULT_MODEL, load_model, resolve_device
from probes.linear import STRENGTHS
from probes.training import TOLERANCE, balanced_weights, fit_logistic

REPEATS = 3


def batched(train: Tensor, labels: Tensor, unseen: Tensor) -> Tensor:
    """Logits of the unseen examples by the batched solver, ``(p, s, n)``."""
    centre, scale = train.mean(1, keepdim=True), train.std(1, keepdim=True, correction=0)
    scale = torch.where(scale > 0, scale, 1)
    strengths = torch.tensor(STRENGTHS, device=train.device)
    weights = balanced_weights(labels, 2)
    fits = fit_logistic((train - centre) / scale, labels, weights, strengths, n_classes=2)
    return fits.logits((unseen - centre) / scale)[..., 0]


def looped(
    train: np.ndarray, labels: np.ndarray, unseen: np.ndarray, solver: Literal["lbfgs", "newton-cholesky"]
) -> np.ndarray:
    """Logits of the unseen examples by scikit-learn, one site after the other, one strength after the other."""
    logits = np.zeros((len(train), len(STRENGTHS), unseen.shape[1]))
    for i, (known, new) in enumerate(zip(train, unseen, strict=True)):
        scaler = StandardScaler().fit(known)
        for k, strength in enumerate(STRENGTHS):
            model = LogisticRegression(
                C=1 / (strength * len(known)), tol=TOLERANCE, class_weight="balanced", max_iter=100_000, solver=solver
            )
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                logits[i, k] = model.fit(scaler.transform(known), labels).decision_function(scaler.transform(new))
    return logits


def aurocs(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC of each site and strength."""
    return np.array([[roc_auc_score(labels, row) for row in site] for site in logits])


def conflict_and_aligned(split: Sequence[str]) -> ConflictSet:
    """Prompts about the capitals of subjects in these splits."""
    everything = build_conflicts({"capital": usable_facts("capital")}, kinds=("conflict", "aligned"))
    return ConflictSet("capitals", tuple(e for e in everything if e.split in split))


def main(
    model: Annotated[str, typer.Option(help="Model to measure on.")] = DEFAULT_MODEL,
    sites: Annotated[int, typer.Option(help="Sites that the loop runs on.")] = 9,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Record, fit both ways, compare."""
    bridge, where = load_model(model, device=device), resolve_device(device)
    names = sites_of(bridge)
    known, unseen = conflict_and_aligned(("train", "dev")), conflict_and_aligned(("test",))
    recorded = [record(bridge, prompts, names) for prompts in (known, unseen)]
    train, test = (torch.stack([activations[name] for name in names]) for activations in recorded)
    labels, expected = (torch.tensor([e.kind == "conflict" for e in part]).long() for part in (known, unseen))

    seconds: list[float] = []
    logits = np.zeros(0)
    for _ in range(REPEATS):
        begin = time.perf_counter()
        logits = batched(train.to(where), labels.to(where), test.to(where)).cpu().numpy()
        seconds.append(time.perf_counter() - begin)
    ours = sorted(seconds)[REPEATS // 2]

    # Every kind of site and all depths: a step that is no multiple of the three kinds.
    chosen = np.linspace(0, len(names) - 1, sites).round().astype(int)
    found = aurocs(logits[chosen], expected.numpy())
    loops: dict[str, float] = {}
    differences: dict[str, float] = {}
    for solver in ("lbfgs", "newton-cholesky"):
        begin = time.perf_counter()
        reference = looped(train[chosen].numpy(), labels.numpy(), test[chosen].numpy(), solver)
        loops[solver] = (time.perf_counter() - begin) * len(names) / len(chosen)
        differences[solver] = np.abs(aurocs(reference, expected.numpy()) - found).max().item()
    result: dict[str, Any] = {
        "ratio": round(loops["lbfgs"] / ours, 1),
        "max_auroc_difference": round(differences["lbfgs"], 5),
        "ratio_to_newton_cholesky": round(loops["newton-cholesky"] / ours, 1),
        "max_auroc_difference_newton_cholesky": round(differences["newton-cholesky"], 5),
        "batched_seconds": round(ours, 2),
        "looped_seconds": round(loops["lbfgs"], 1),
        "looped_extrapolated_from_sites": len(chosen),
        "sites": len(names),
        "strengths": len(STRENGTHS),
        "examples": len(known),
        "features": train.shape[2],
        "model": model,
        "device": str(where),
        "threads": torch.get_num_threads(),
    }
    if not as_json:
        print(f"Batched: {ours:8.1f} s for {len(names)} sites at {len(STRENGTHS)} strengths")
        print(f"Looped:  {loops['lbfgs']:8.1f} s, extrapolated from {len(chosen)} sites")
        print(f"{result['ratio']} times fewer seconds; largest difference in AUROC {differences['lbfgs']:.5f}")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
