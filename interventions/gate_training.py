"""Learn the gates of a trust dial: all scales together, few of them moved, and damage within a budget.

For one direction, with s the scales of all heads (and, if wanted, of all feed-forward layers), s = 1 + m * d:

1. d are free offsets, m are hard concrete gates (Louizos et al. 2018, arXiv 1712.01312): samples of a stretched binary
   concrete distribution, cut off at 0 and 1, so that gates close exactly and still have a gradient.
2. Minimise the mean of -log p(wanted answer) over conflict prompts, under two kinds of constraints: for each guard
   the KL divergence from the unedited model is at most a budget, and the expected number of open gates is at most the
   wanted one. Guards are prompts without a context, with one that agrees and one about something else (each followed by
   the memory answer), and ordinary text.
3. The constraints are held by multipliers that rise while a constraint is broken and fall while there is room: dual
   ascent, next to Adam's descent.
4. After two thirds of the steps the gates that move most are kept for good, without noise, and only their scales are
   learned on.
5. In that last third the scales are tried on dev every sixth of the steps: moved back towards 1 as far as the budget
   demands there. The ones with the best answers on dev win.

The direction's other end has gates of its own; the two make one dial.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.anatomy import Anatomy
from interp.conflicts import ConflictExample
from interp.errors import UserError
from interp.files import atomic_path
from interp.generation import tracked
from interp.teacher_forcing import (
    Continued,
    continued,
    greedily_continued,
    item_residuals,
    predicting_residuals,
    text_tokens,
    token_batches,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Guard = Literal["none", "aligned", "irrelevant", "neutral"]
GUARDS: tuple[Guard, ...] = get_args(Guard)

# Of the hard concrete distribution: its temperature, and how far it is stretched beyond 0 and 1.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_GUARD_WEIGHT, _DUAL_RATE, _LARGEST_MULTIPLIER = 0.1, 0.2, 50.0
_SPARSITY_RATE = 0.05
_TRIES, _MARGIN = 8, 0.97
_LONGEST_TEXT = 48

_T = TypeVar("_T")


@dataclass(frozen=True)
class GateTraining:
    """What decides a training.

    Attributes:
        budget: Largest mean KL divergence (nats) from the unedited model, for each guard.
        max_gates: Most heads (and feed-forward layers) that may move, in each direction.
        feed_forward: Whether feed-forward layers have gates too.
        steps: Steps of Adam.
        learning_rate: Of the offsets; the gates' is three times that.
        conflicts: Conflict prompts a step.
        guards: Prompts a step for each guard but neutral text, of which there is a quarter.
        seed: Of noise and order.
    """

    budget: float = 0.02
    max_gates: int = 40
    feed_forward: bool = False
    steps: int = 60
    learning_rate: float = 0.05
    conflicts: int = 12
    guards: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"The {name.replace('_', ' ')} is a number above 0, not {getattr(self, name):g}.")
        for name, least in (("max_gates", 1), ("steps", 3), ("conflicts", 1), ("guards", 1)):
            if getattr(self, name) < least:
                raise UserError(f"Learning gates needs {name} of at least {least}, not {getattr(self, name)}.")


class Guarded(NamedTuple):
    """A guard's prompt, and the unedited model's final residual stream where its looked-at tokens are predicted."""

    item: Continued
    reference: Tensor


class GateData:
    """Conflict prompts and guards of one split, as tokens; what guards are held to is computed here.

    Args:
        model: The bridge, unedited.
        examples: Prompts of kinds conflict, none, aligned and irrelevant.
        texts: Ordinary texts.
        conflicts: How many conflict prompts are kept at most; they are drawn evenly from relations and phrasings.
        guards: How many prompts of each other kind are kept at most.
        seed: Decides which.
        progress: Label of a progress bar; ``None`` shows none.

    Attributes:
        conflicts: The conflict prompts that were kept.
        guards: For each guard, its prompts or texts.

    Raises:
        UserError: If a kind of prompts is missing.
    """

    def __init__(
        self,
        model: TransformerBridge,
        examples: Sequence[ConflictExample],
        texts: Sequence[str],
        *,
        conflicts: int = 720,
        guards: int = 96,
        seed: int = 0,
        progress: str | None = None,
    ) -> None:
        self.model = model
        by_kind = {kind: [e for e in examples if e.kind == kind] for kind in ("conflict", *GUARDS[:3])}
        if missing := [kind for kind, found in by_kind.items() if not found]:
            raise UserError(f"Gates are learned from prompts of every kind, but there are none of {missing[0]!r}.")
        self.conflicts = _evenly(by_kind["conflict"], conflicts, seed)
        kept = {kind: _evenly(by_kind[kind], guards, seed) for kind in GUARDS[:3]}
        items_of: dict[Guard, list[Continued]] = {
            kind: [continued(model, e.prompt, e.memory_answers[0]) for e in kept[kind]] for kind in GUARDS[:3]
        }
        cut = [text_tokens(model, text, _LONGEST_TEXT) for text in texts]
        items_of["neutral"] = [item for item in cut if item.predicted > 0]
        if not items_of["neutral"]:
            raise UserError("Gates are guarded by ordinary text too, but there is none of two tokens or more.")
        every = [item for items in items_of.values() for item in items]
        references = iter(item_residuals(model, every, progress=progress))
        self.guards: dict[Guard, list[Guarded]] = {
            kind: [Guarded(item, next(references)) for item in items] for kind, items in items_of.items()
        }

    def wanted(self, towards: Literal["context", "memory"]) -> list[Continued]:
        """The conflict prompts with the answers of one source."""
        return [
            continued(self.model, e.prompt, (e.context_answers if towards == "context" else e.memory_answers)[0])
            for e in self.conflicts
        ]


def _evenly(examples: Sequence[ConflictExample], count: int, seed: int) -> list[ConflictExample]:
    """At most ``count`` examples, of relations and phrasings in turn."""
    groups: dict[tuple[str, str], list[ConflictExample]] = {}
    for example in examples:
        groups.setdefault((example.relation, example.template), []).append(example)
    rng = random.Random(seed)
    queues = [rng.sample(group, len(group)) for group in groups.values()]
    chosen: list[ConflictExample] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: count - len(chosen)]
    return chosen


class GateState:
    """The numbers that are learned for one direction, and how far training is.

    Args:
        model: The bridge.
        settings: What decides the training.

    Attributes:
        places: ``(layer, head)`` of every gate; head ``None`` is the feed-forward layer.
        offset, location: The learned numbers, ``(n_gates,)``.
        kept: 1 for gates that are kept for good, 0 for others, ``(n_gates,)``; ``None`` before that is decided.
    """

    def __init__(self, model: TransformerBridge, settings: GateTraining) -> None:
        anatomy = Anatomy(model)
        self.places: list[tuple[int, int | None]] = [
            (layer, head) for layer in range(anatomy.n_layers) for head in range(anatomy.n_heads)
        ]
        if settings.feed_forward:
            self.places += [(layer, None) for layer in range(anatomy.n_layers)]
        self.offset = torch.zeros(len(self.places), requires_grad=True)
        self.location = torch.full((len(self.places),), 2.0, requires_grad=True)
        self.kept: Tensor | None = None

    def sampled(self, generator: torch.Generator) -> Tensor:
        """Scales with noise, ``(n_gates,)``."""
        if self.kept is not None:
            return 1 + self.kept * self.offset
        uniform = torch.rand(len(self.places), generator=generator).clamp(1e-6, 1 - 1e-6)
        logistic = uniform.log() - (1 - uniform).log()
        return 1 + _stretched((logistic + self.location) / _TEMPERATURE) * self.offset

    def scales(self) -> Tensor:
        """Scales without noise, ``(n_gates,)``; 1 for gates that were not kept, once that is decided."""
        with torch.no_grad():
            opened = _stretched(self.location) if self.kept is None else self.kept
            return 1 + opened * self.offset

    def expected_open(self) -> Tensor:
        """How many gates are open on average."""
        return torch.sigmoid(self.location - _TEMPERATURE * math.log(-_LOW / _HIGH)).sum()

    def keep(self, count: int) -> None:
        """Keep the ``count`` gates that move most for good."""
        moved = (self.scales() - 1).abs()
        with torch.no_grad():
            self.offset.copy_(self.scales() - 1)
        self.kept = torch.zeros(len(self.places))
        self.kept[moved.topk(min(count, len(moved))).indices] = 1


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


@contextmanager
def scaled(model: TransformerBridge, places: Sequence[tuple[int, int | None]], scales: Tensor) -> Iterator[None]:
    """Scale heads and feed-forward layers for the length of a ``with`` block, with a gradient to ``scales``."""
    anatomy = Anatomy(model)
    part = anatomy.writing_part("mlp")
    scales = scales.to(anatomy.device)
    per_layer: dict[int, list[int]] = {}
    for index, (layer, head) in enumerate(places):
        if head is not None:
            per_layer.setdefault(layer, []).append(index)

    def scale_heads(indices: list[int]) -> Any:
        heads = torch.tensor([places[i][1] for i in indices], device=scales.device)

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].unflatten(-1, (anatomy.n_heads, anatomy.d_head))
            factor = torch.ones(anatomy.n_heads, device=scales.device).index_copy(0, heads, scales[indices])
            return ((z * factor.to(z.device, z.dtype)[:, None]).flatten(-2), *inputs[1:])

        return hook

    def scale_output(index: int) -> Any:
        return lambda _, __, output: output * scales[index].to(output.device, output.dtype)

    with ExitStack() as stack:
        for layer, indices in per_layer.items():
            module = anatomy.module("output_projection", layer)
            stack.callback(module.register_forward_pre_hook(scale_heads(indices)).remove)
        for index, (layer, head) in enumerate(places):
            if head is None:
                stack.callback(anatomy.module(part, layer).register_forward_hook(scale_output(index)).remove)
        yield


def answer_losses(model: TransformerBridge, items: Sequence[Continued]) -> Tensor:
    """-log p of each item's answer in nats, ``(n_items,)``; for one batch."""
    log_p = Anatomy(model).logits(predicting_residuals(model, items)).float().log_softmax(-1)
    answers = torch.tensor([token for item in items for token in item.answer], device=log_p.device)
    return _summed(-log_p.gather(1, answers[:, None]).squeeze(1), items)


def divergences(model: TransformerBridge, guarded: Sequence[Guarded]) -> Tensor:
    """Each item's mean KL(unedited || edited) over its looked-at tokens in nats, ``(n_items,)``; for one batch."""
    anatomy = Anatomy(model)
    items = [item for item, _ in guarded]
    log_p = anatomy.logits(predicting_residuals(model, items)).float().log_softmax(-1)
    with torch.no_grad():
        log_q = anatomy.logits(torch.cat([reference for _, reference in guarded])).float().log_softmax(-1)
    summed = _summed((log_q.exp() * (log_q - log_p)).sum(-1), items)
    return summed / torch.tensor([item.predicted for item in items], device=summed.device)


def _summed(values: Tensor, items: Sequence[Continued]) -> Tensor:
    """Values of looked-at tokens, summed by item."""
    counts = torch.tensor([item.predicted for item in items], device=values.device)
    owner = torch.arange(len(items), device=values.device).repeat_interleave(counts)
    return torch.zeros(len(items), device=values.device).index_add(0, owner, values)


@dataclass(frozen=True)
class Checked:
    """What scales do.

    Attributes:
        rate: Share of conflict prompts that are answered from the wanted source, token by token.
        divergence: For each guard the mean KL divergence from the unedited model, nats.
    """

    rate: float
    divergence: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest of the divergences; infinite if one is no number."""
        return max(math.inf if math.isnan(value) else value for value in self.divergence.values())


def check_scales(
    model: TransformerBridge,
    data: GateData,
    wanted: Sequence[Continued],
    places: Sequence[tuple[int, int | None]],
    scales: Tensor,
) -> Checked:
    """Measure scales on the prompts of ``data``, of which those about conflicts are to be answered as ``wanted``."""
    with torch.no_grad(), scaled(model, places, scales):
        return Checked(sum(greedily_continued(model, wanted)) / len(wanted), _divergence(model, data))


def _divergence(model: TransformerBridge, data: GateData) -> dict[str, float]:
    """For each guard the mean divergence of the model as it is now."""
    found = {}
    for kind, guarded in data.guards.items():
        batches = token_batches([item for item, _ in guarded])
        found[kind] = sum(float(divergences(model, [guarded[i] for i in b]).sum()) for b in batches) / len(guarded)
    return found


def within_budget(
    model: TransformerBridge,
    data: GateData,
    wanted: Sequence[Continued],
    places: Sequence[tuple[int, int | None]],
    scales: Tensor,
    budget: float,
) -> tuple[Tensor, Checked]:
    """Move scales back towards 1 until no guard of ``data`` diverges by more than ``budget``, and measure them there.

    Divergence grows about with the square of the way, so that one or two tries are enough.
    """
    tried = scales
    for tries_left in reversed(range(_TRIES)):
        with torch.no_grad(), scaled(model, places, tried):
            divergence = _divergence(model, data)
            worst = Checked(0.0, divergence).worst
            if worst <= budget or not tries_left:
                return tried, Checked(sum(greedily_continued(model, wanted)) / len(wanted), divergence)
        tried = 1 + _MARGIN * math.sqrt(budget / worst) * (tried - 1) if tries_left > 1 else torch.ones_like(scales)
    raise AssertionError("the last try returns")


@dataclass(frozen=True, eq=False)
class LearnedGates:
    """Scales that were learned for one direction, within the budget on dev.

    Attributes:
        places: ``(layer, head)`` of the gates that move; head ``None`` is the feed-forward layer.
        scales: Their scales, as many.
        dev: What they do on dev.
    """

    places: tuple[tuple[int, int | None], ...]
    scales: tuple[float, ...]
    dev: Checked


def learn_gates(
    model: TransformerBridge,
    train: GateData,
    dev: GateData,
    towards: Literal["context", "memory"],
    settings: GateTraining,
    *,
    checkpoint: Path | None = None,
    progress: str | None = None,
) -> LearnedGates:
    """Learn the gates of one direction.

    Args:
        model: The bridge.
        train: What is learned from.
        dev: What the scales are checked on.
        towards: The source that is to win.
        settings: What decides the training.
        checkpoint: File that training is kept in, and goes on from if it is there, of the same settings and, which is
            for the caller to see to, the same model and data.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If the numbers leave the range of the model's dtype.
    """
    wanted = train.wanted(towards)
    tried = dev.wanted(towards)
    state = _Training(model, settings)
    if checkpoint is not None:
        state.resume(checkpoint)
    every = max(1, settings.steps // 6)
    sparse_from = settings.steps * 2 // 3
    for step in tracked(range(state.step, settings.steps), progress, total=settings.steps - state.step):
        if step == sparse_from:
            state.gates.keep(settings.max_gates)
        state.descend(model, wanted, train.guards)
        if state.step % every == 0 or state.step == settings.steps:
            if state.step > sparse_from or state.step == settings.steps:
                scales = state.gates.scales()
                found = within_budget(model, dev, tried, state.gates.places, scales, settings.budget)
                if state.best is None or found[1].rate > state.best[1].rate:
                    state.best = found
            if checkpoint is not None:
                state.save(checkpoint)
    assert state.best is not None
    scales, checked = state.best
    moved = [i for i, scale in enumerate(scales.tolist()) if scale != 1]
    return LearnedGates(tuple(state.gates.places[i] for i in moved), tuple(float(scales[i]) for i in moved), checked)


class _Training:
    """The state of a training between two steps."""

    def __init__(self, model: TransformerBridge, settings: GateTraining) -> None:
        self.settings = settings
        self.gates = GateState(model, settings)
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.gates.offset], "lr": settings.learning_rate},
                {"params": [self.gates.location], "lr": 3 * settings.learning_rate},
            ],
            betas=(0.8, 0.98),
        )
        self.multipliers: dict[str, float] = dict.fromkeys(GUARDS, 1.0)
        self.sparsity = 0.0
        self.step = 0
        self.best: tuple[Tensor, Checked] | None = None

    def descend(
        self, model: TransformerBridge, wanted: Sequence[Continued], guards: Mapping[Guard, Sequence[Guarded]]
    ) -> None:
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        sampled = self.gates.sampled(generator)
        # Passes are made one by one; their gradients meet here.
        scales = sampled.detach().requires_grad_()
        drawn = _drawn(rng, wanted, settings.conflicts)
        counts = {kind: settings.guards if kind != "neutral" else -(-settings.guards // 4) for kind in GUARDS}
        guarded = [(kind, guard) for kind in GUARDS for guard in _drawn(rng, guards[kind], counts[kind])]
        sizes = Counter(kind for kind, _ in guarded)
        weights = [_GUARD_WEIGHT * self.multipliers[kind] / settings.budget / sizes[kind] for kind, _ in guarded]
        with scaled(model, self.gates.places, scales):
            _backward(
                drawn, [1 / len(drawn)] * len(drawn), lambda batch: answer_losses(model, [drawn[i] for i in batch])
            )
            values = _backward(
                [guard.item for _, guard in guarded],
                weights,
                lambda batch: divergences(model, [guarded[i][1] for i in batch]),
            )
        assert scales.grad is not None
        if not scales.grad.isfinite().all():
            raise UserError("The gates' gradients are not finite; load the model with --dtype float32 or bfloat16.")
        objective = (sampled * scales.grad.to(sampled)).sum()
        if self.gates.kept is None:
            count = self.gates.expected_open() / settings.max_gates
            objective = objective + self.sparsity * count
            self.sparsity = max(0.0, self.sparsity + _SPARSITY_RATE * (count.item() - 1))
        self.optimiser.zero_grad()
        objective.backward()
        self.optimiser.step()
        for kind in GUARDS:
            divergence = sum(value for (of, _), value in zip(guarded, values, strict=True) if of == kind) / sizes[kind]
            moved = self.multipliers[kind] + _DUAL_RATE * (divergence / settings.budget - 1)
            self.multipliers[kind] = min(max(0.0, moved), _LARGEST_MULTIPLIER)
        self.step += 1

    def save(self, path: Path) -> None:
        """Keep all that the next step needs, in one file."""
        moments = self.optimiser.state_dict()["state"]
        tensors = {
            "offset": self.gates.offset.detach(),
            "location": self.gates.location.detach(),
            **{f"adam.{number}.{name}": value for number, state in moments.items() for name, value in state.items()},
        }
        if self.gates.kept is not None:
            tensors["kept"] = self.gates.kept
        if self.best is not None:
            tensors["best"] = self.best[0]
        about = {
            "settings": asdict(self.settings),
            "step": self.step,
            "multipliers": self.multipliers,
            "sparsity": self.sparsity,
            "best": None if self.best is None else asdict(self.best[1]),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"training": json.dumps(about)})

    def resume(self, path: Path) -> None:
        """Go on from what was kept, if it is there, whole and of the same settings."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            if about["settings"] != asdict(self.settings) or tensors["offset"].shape != self.gates.offset.shape:
                return
            best = None if about["best"] is None else (tensors["best"], Checked(**about["best"]))
            location, kept = tensors["location"], tensors.get("kept")
            multipliers, sparsity, step = about["multipliers"], about["sparsity"], about["step"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return
        with torch.no_grad():
            self.gates.offset.copy_(tensors["offset"])
            self.gates.location.copy_(location)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.gates.kept, self.best = kept, best
        self.multipliers, self.sparsity, self.step = multipliers, sparsity, step


def _backward(items: Sequence[Continued], weights: Sequence[float], loss: Callable[[list[int]], Tensor]) -> list[float]:
    """Add the gradient of the weighted sum of the items' losses, batch by batch; returns the losses."""
    values = [0.0] * len(items)
    for batch in token_batches(items):
        found = loss(batch)
        (found * torch.tensor([weights[i] for i in batch], device=found.device)).sum().backward()
        for i, value in zip(batch, found.tolist(), strict=True):
            values[i] = value
    return values


def _drawn(rng: random.Random, items: Sequence[_T], count: int) -> list[_T]:
    return rng.sample(list(items), min(count, len(items)))
