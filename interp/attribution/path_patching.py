"""Exact head -> logits path patching, all heads of the model in one sweep.

The effect of a head on the answer when only this head's output at the last prompt position (END) takes another
value, all other heads frozen to the clean run, MLPs and norms recomputed (PH3: Jin et al. 2024, arXiv
2402.18154; path patching: Wang et al. 2022, arXiv 2211.00593, Goldowsky-Dill et al. 2023, arXiv 2304.05969).

With every head's z frozen, positions no longer mix, so only END's residual stream can change:

1. Record one forward pass per prompt and keep, at END, z of every layer and the residual stream's two ends.
2. Sweep once over the layers with a batch of residual streams. The first stream is the clean one. In each
   layer every head starts one new stream: the clean residual stream, with this head's z replaced in what
   attention writes. Older streams receive the clean attention write. All go through the MLP as one batch.
3. Apply the final norm and only those columns of the unembedding that the metric needs.

The clean stream must arrive at the recorded final residual stream; that is checked in every sweep, so an
architecture that the anatomy describes wrongly is an error, not a wrong number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.attribution.examples import check_attributed, corrupted_partners, scorable
from interp.attribution.scores import HeadScores
from interp.attribution.states import LastTokenStates, last_token_states
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.progress import tracked

Baseline = Literal["corrupted", "zero", "mean"]
Mlps = Literal["recompute", "frozen"]
Metric = Literal["logit_diff", "memory_probability", "context_probability"]

_UNITS: dict[Metric, str] = {
    "logit_diff": "change of (logit context - logit memory)",
    "memory_probability": "relative change of P(memory answer)",
    "context_probability": "relative change of P(context answer)",
}
_CLEAN_STREAM_TOLERANCE, _ROUNDED = {torch.float32: 1e-3}, 5e-2
BLOCK = 256
"""So many examples are scored together: memory does not grow with their number, and blocks may be scored anywhere."""
PATH_PATCHING_VERSION = 1
"""Version of the scores: raise it when the same prompts would get others."""


def path_patching(
    model: nn.Module,
    conflicts: ConflictSet,
    *,
    name: str,
    baseline: Baseline = "corrupted",
    mlps: Mlps = "recompute",
    metrics: Sequence[Metric] = ("logit_diff",),
    memory_budget: int = 2**29,
    seed: int = 0,
    blocks: Sequence[int] | None = None,
    partners: Sequence[int] | None = None,
    progress: str | None = None,
) -> dict[Metric, HeadScores]:
    """Score every head by exact path patching on every example.

    Args:
        model: The model, or a bridge around it.
        conflicts: Conflict prompts. Those whose two answers start with the same token are left out.
        name: Name of the model, for the record.
        baseline: What a head's z is replaced by: ``corrupted``, its value on the same template with another subject
            and another context answer (a prompt of ``conflicts``); ``zero``; or ``mean`` over ``conflicts``.
        mlps: ``recompute`` them on the patched stream, or keep them ``frozen`` (direct path only).
        metrics: What is attributed, all from one sweep. ``logit_diff``: logits. The two probabilities are the
            relative changes by which PH3 ranks memory heads and context heads; they need the whole unembedding.
        memory_budget: Bytes that the sweep may take on top of the model.
        seed: Decides the corrupted prompts.
        blocks: Score only these blocks of ``BLOCK`` examples, counted among those that can be scored; ``None`` scores
            all. ``HeadScores.merged`` puts blocks together to what all at once give, to the last digit.
        partners: What ``partners_of`` gave for all examples that can be scored, to find them once for many blocks.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        For each metric its scores, with the sign of ``HeadScores``: a head whose replacement lowers the context
        answer pushed towards it.

    Raises:
        UserError: If an option is not known, no example can be scored, or blocks are to be scored apart whose baseline
            is a mean over all.
    """
    check_choice("baseline", baseline, get_args(Baseline))
    check_choice("mlps", mlps, get_args(Mlps))
    for metric in metrics:
        check_choice("metric", metric, get_args(Metric))
    if baseline == "mean" and blocks is not None:
        raise UserError("A mean over all examples needs all of them at once; score all blocks, or take zero.")
    examples, token_ids = scorable(model, conflicts)
    # Refused before anything runs.
    partners = partners_of(examples, baseline, seed) if partners is None else partners
    size = len(examples) if baseline == "mean" else BLOCK
    parts = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    chosen = parts if blocks is None else [parts[number] for number in blocks]
    values: dict[Metric, list[Tensor]] = {metric: [] for metric in metrics}
    for rows in tracked(chosen, progress if len(chosen) > 1 else None):
        states, replacement = _states(model, examples, rows, baseline, partners)
        check_attributed(Anatomy(model), states.final, token_ids[rows.start : rows.stop])
        scores = patching_scores(
            Anatomy(model),
            states,
            replacement,
            token_ids[rows.start : rows.stop],
            mlps=mlps,
            metrics=metrics,
            memory_budget=memory_budget,
            progress=progress if len(chosen) == 1 else None,
        )
        for metric in metrics:
            values[metric].append(scores[metric])
    scored = [examples[i] for rows in chosen for i in rows]
    about = {"baseline": baseline, "mlps": mlps, "seed": seed, "left_out": len(conflicts) - len(examples)}
    return {
        metric: HeadScores(
            torch.cat(values[metric]),
            tuple(example.id for example in scored),
            tuple(example.subject for example in scored),
            "path_patching",
            metric,
            name,
            conflicts.digest,
            {"unit": _UNITS[metric], **about},
        )
        for metric in metrics
    }


def n_blocks(model: nn.Module, conflicts: ConflictSet) -> int:
    """Count the blocks of the examples that can be scored.

    Raises:
        UserError: If there is none.
    """
    return -(-len(scorable(model, conflicts)[0]) // BLOCK)


def _states(
    model: nn.Module, examples: Sequence[ConflictExample], rows: range, baseline: Baseline, partners: Sequence[int]
) -> tuple[LastTokenStates, Tensor]:
    """States of some examples, and what each head's z is replaced by."""
    outside = sorted({partners[i] for i in rows} - set(rows)) if partners else []
    numbers = [*rows, *outside]
    states = last_token_states(model, [examples[i].prompt for i in numbers])
    places = {number: place for place, number in enumerate(numbers)}
    own = states[: len(rows)]
    if not partners:
        return own, replacement_z(own, baseline, [])
    return own, replacement_z(states, baseline, [places[partners[i]] for i in rows])


def partners_of(examples: Sequence[ConflictExample], baseline: Baseline, seed: int) -> list[int]:
    """What each example is corrupted with, where the baseline is ``corrupted``; else nothing.

    Raises:
        UserError: If an example has no partner.
    """
    return corrupted_partners(examples, seed) if baseline == "corrupted" else []


def replacement_z(states: LastTokenStates, baseline: Baseline, partners: Sequence[int]) -> Tensor:
    """What a baseline puts in the place of each head's z at the last token, ``(n, n_layers, n_heads, d_head)``."""
    if baseline == "zero":
        return torch.zeros_like(states.z)
    if baseline == "mean":
        return states.z.mean(0, keepdim=True).expand_as(states.z)
    return states.z[partners]


@torch.inference_mode()
def patching_scores(
    anatomy: Anatomy,
    clean: LastTokenStates,
    replacement: Tensor,
    token_ids: Tensor,
    *,
    mlps: Mlps = "recompute",
    metrics: Sequence[Metric] = ("logit_diff",),
    memory_budget: int = 2**29,
    progress: str | None = None,
) -> Mapping[Metric, Tensor]:
    """Path patching on recorded states.

    Args:
        anatomy: The model's anatomy.
        clean: States of the clean prompts.
        replacement: What each head's z is replaced by, ``(n, n_layers, n_heads, d_head)``.
        token_ids: First tokens of the (context, memory) answers, ``(n, 2)``.
        mlps: As in ``path_patching``.
        metrics: As in ``path_patching``.
        memory_budget: Bytes that the streams and one step of them may take.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        For each metric ``(n, n_layers, n_heads)`` float32 on the CPU.
    """
    n_streams = 1 + anatomy.n_layers * anatomy.n_heads
    half_budget = memory_budget // (2 * clean.z.element_size())
    # A step holds the streams, their writes and the result of both.
    examples_at_once = max(1, half_budget // (4 * n_streams * anatomy.d_model))
    widest = max(3 * anatomy.d_mlp + 4 * anatomy.d_model, 0 if metrics == ("logit_diff",) else 2 * anatomy.d_vocab)
    rows_at_once = max(64, half_budget // widest)
    starts = range(0, len(clean.z), examples_at_once)
    scores: dict[Metric, list[Tensor]] = {metric: [] for metric in metrics}
    for start in tracked(starts, progress):
        rows = slice(start, start + examples_at_once)
        streams = patched_streams(anatomy, clean[rows], replacement[rows], mlps=mlps, rows_at_once=rows_at_once)
        for metric, values in _scores(anatomy, streams, token_ids[rows], metrics, rows_at_once).items():
            scores[metric].append(values.cpu())
    shape = (anatomy.n_layers, anatomy.n_heads)
    return {metric: torch.cat(values).unflatten(1, shape) for metric, values in scores.items()}


def patched_streams(
    anatomy: Anatomy, clean: LastTokenStates, replacement: Tensor, *, mlps: Mlps, rows_at_once: int
) -> Tensor:
    """The final residual stream of the clean run and of every single-head patch.

    Args:
        anatomy: The model's anatomy.
        clean: States of ``n`` clean prompts.
        replacement: ``(n, n_layers, n_heads, d_head)``.
        mlps: As in ``path_patching``.
        rows_at_once: How many streams go through an MLP together.

    Returns:
        ``(n, 1 + n_layers * n_heads, d_model)``: the clean stream first, then the patches, layer by layer.

    Raises:
        RuntimeError: If the clean stream does not arrive at the recorded final residual stream.
    """
    streams = clean.embedding.unsqueeze(1)
    direct: list[Tensor] = []
    for layer in range(anatomy.n_layers):
        clean_write, patched_writes = _attention_writes(anatomy, layer, clean.z[:, layer], replacement[:, layer])
        if mlps == "frozen":
            direct.append((patched_writes - clean_write).to(anatomy.device))
            patched_writes = patched_writes[:, :0]
        started = streams[:, :1].expand(-1, patched_writes.shape[1], -1)
        streams = _step(
            anatomy,
            layer,
            torch.cat([streams, started], 1),
            torch.cat([clean_write.expand(-1, streams.shape[1], -1), patched_writes], 1),
            rows_at_once,
        )
    streams = streams.to(anatomy.device)
    if mlps == "frozen":
        streams = torch.cat([streams, streams + torch.cat(direct, 1)], 1)
    check_clean_stream(anatomy, streams[:, 0], clean.final)
    return streams


@torch.inference_mode()
def head_effects(
    anatomy: Anatomy,
    clean: LastTokenStates,
    head: tuple[int, int],
    z: Tensor,
    token_ids: Tensor,
    *,
    memory_budget: int = 2**29,
) -> Tensor:
    """What happens to the logit difference when one head takes other values, all later heads frozen.

    Args:
        anatomy: The model's anatomy.
        clean: States of ``n`` clean prompts.
        head: ``(layer, head)``.
        z: What the head's z is replaced by, ``(n, m, d_head)``: ``m`` values for every prompt.
        token_ids: First tokens of the (context, memory) answers, ``(n, 2)``.
        memory_budget: Bytes that the streams and one step of them may take.

    Returns:
        ``(n, m)`` float32 on the CPU, with the sign of ``HeadScores``.
    """
    layer, number = head
    half_budget = memory_budget // (2 * z.element_size())
    rows_at_once = max(64, half_budget // (3 * anatomy.d_mlp + 4 * anatomy.d_model))
    examples_at_once = max(1, half_budget // (4 * (1 + z.shape[1]) * anatomy.d_model))
    effects = []
    for start in range(0, len(z), examples_at_once):
        rows = slice(start, start + examples_at_once)
        states, streams = clean[rows], clean.embedding[rows].unsqueeze(1)
        for at in range(anatomy.n_layers):
            clean_z = states.z[:, at].unsqueeze(1)
            write = anatomy.attention_write(at, clean_z)
            writes = write.expand(-1, streams.shape[1], -1)
            if at == layer:
                replaced = clean_z.repeat(1, z.shape[1], 1, 1)
                replaced[:, :, number] = z[rows]
                writes = torch.cat([write, anatomy.attention_write(at, replaced)], 1)
                streams = streams.expand(-1, writes.shape[1], -1)
            streams = _step(anatomy, at, streams, writes, rows_at_once)
        streams = streams.to(anatomy.device)
        check_clean_stream(anatomy, streams[:, 0], states.final)
        effects.append(_scores(anatomy, streams, token_ids[rows], ("logit_diff",), rows_at_once)["logit_diff"].cpu())
    return torch.cat(effects)


def _attention_writes(anatomy: Anatomy, layer: int, z: Tensor, replacement: Tensor) -> tuple[Tensor, Tensor]:
    """The clean attention write ``(n, 1, d_model)`` and those with one head replaced ``(n, n_heads, d_model)``."""
    patched = anatomy.patched_outputs(layer, z, replacement)
    return anatomy.attention_write(layer, z.unsqueeze(1)), anatomy.added_by_attention(layer, patched)


def _step(anatomy: Anatomy, layer: int, residual: Tensor, write: Tensor, rows_at_once: int) -> Tensor:
    n = len(residual)
    chunks = zip(residual.flatten(0, 1).split(rows_at_once), write.flatten(0, 1).split(rows_at_once), strict=True)
    return torch.cat([anatomy.step(layer, r, w) for r, w in chunks]).unflatten(0, (n, -1))


def check_clean_stream(anatomy: Anatomy, arrived: Tensor, recorded: Tensor) -> None:
    """Refuse residual streams ``(n, d_model)`` that did not arrive where the model's own forward pass did.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    error = ((arrived - recorded).float().norm() / recorded.float().norm()).item()
    # Where activations are rounded to 8 bit, a last digit decides between two of 256 values.
    tolerance = _ROUNDED if anatomy.is_quantised else _CLEAN_STREAM_TOLERANCE.get(recorded.dtype, _ROUNDED)
    if not error < tolerance:
        raise RuntimeError(
            f"The anatomy of {anatomy.architecture} does not reproduce its forward pass (relative error {error:.1e}): "
            "its Blueprint in interp/anatomy.py is wrong, its dtype overflows, or more than its heads is edited."
        )


def _scores(
    anatomy: Anatomy, streams: Tensor, token_ids: Tensor, metrics: Sequence[Metric], rows_at_once: int
) -> dict[Metric, Tensor]:
    """For each metric ``(n, n_patches)``: how far each patch moved it, with the sign of HeadScores."""
    scores: dict[Metric, Tensor] = {}
    if "logit_diff" in metrics:
        logits = anatomy.logits(streams, token_ids.unsqueeze(1)).float()
        difference = logits[..., 0] - logits[..., 1]
        scores["logit_diff"] = difference[:, :1] - difference[:, 1:]
    if set(metrics) - {"logit_diff"}:
        log_p = anatomy.log_probabilities(streams, token_ids, rows_at_once=rows_at_once)
        context, memory = torch.expm1(log_p[:, 1:] - log_p[:, :1]).unbind(-1)
        scores |= {"context_probability": -context, "memory_probability": memory}
    return {metric: scores[metric] for metric in metrics}


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of an option's choices.

    Raises:
        UserError: If it is none.
    """
    if value not in choices:
        raise UserError(f"{option} must be one of {', '.join(choices)}, not {value!r}.")
