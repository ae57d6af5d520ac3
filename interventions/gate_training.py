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
4. After two thirds of the steps the most important gates are kept for good, without noise, and only their scales are
   learned on.
5. At the end of each stretch of steps the scales are tried on dev: moved back towards 1 as far as the budget demands
   there. The stretch with the best answers on dev wins.

The direction's other end has gates of its own; the two make one dial.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.anatomy import Anatomy, Part
from interp.conflicts import ConflictExample
from interp.errors import UserError
from interp.files import atomic_path
from interp.generation import tracked

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Guard = Literal["none", "aligned", "irrelevant", "neutral"]
GUARDS: tuple[Guard, ...] = get_args(Guard)

# Of the hard concrete distribution: its temperature, and how far it is stretched beyond 0 and 1.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_TOKENS_AT_ONCE = 512


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
        if not 0 < self.budget < math.inf:
            raise UserError(f"The budget is a number of nats above 0, not {self.budget:g}.")
        if self.max_gates < 1 or self.steps < 3:
            raise UserError("A dial needs at least one gate and three steps of training.")


@dataclass(frozen=True, eq=False)
class Continued:
    """A prompt with the tokens that should follow, or a text of which every token counts.

    Attributes:
        tokens: Token ids of both.
        predicted: How many of them, the last ones, are looked at: those of the answer, or all of a text but the first.
        reference: For guards, the unedited model's final residual stream where these are predicted,
            ``(predicted, d_model)``.
    """

    tokens: tuple[int, ...]
    predicted: int
    reference: Tensor | None = None


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
        if not texts:
            raise UserError("Gates are guarded by ordinary text too, but there is none.")
        self.conflicts = _evenly(by_kind["conflict"], conflicts, seed)
        kept = {kind: _evenly(by_kind[kind], guards, seed) for kind in GUARDS[:3]}
        bare: dict[Guard, list[Continued]] = {
            kind: [continued(model, e.prompt, e.memory_answers[0]) for e in kept[kind]] for kind in GUARDS[:3]
        }
        ids = [model.tokenizer(text)["input_ids"] for text in texts]
        bare["neutral"] = [Continued(tuple(tokens), len(tokens) - 1) for tokens in ids if len(tokens) > 1]
        every = [item for items in bare.values() for item in items]
        references = iter(_final_states(model, every, progress))
        self.guards: dict[Guard, list[Continued]] = {
            kind: [Continued(item.tokens, item.predicted, next(references)) for item in items]
            for kind, items in bare.items()
        }

    def wanted(self, towards: Literal["context", "memory"]) -> list[Continued]:
        """The conflict prompts with the answers of one source."""
        return [
            continued(self.model, e.prompt, (e.context_answers if towards == "context" else e.memory_answers)[0])
            for e in self.conflicts
        ]


def continued(model: TransformerBridge, prompt: str, answer: str) -> Continued:
    """``prompt`` and the tokens of ``answer`` after it."""
    bare = model.tokenizer(prompt)["input_ids"]
    full = model.tokenizer(f"{prompt} {answer}")["input_ids"]
    if full[: len(bare)] != bare or len(full) == len(bare):
        # The tokenizer merges across the border; what it makes of the answer alone is the next best.
        full = [*bare, *model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]]
    return Continued(tuple(full), len(full) - len(bare))


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
        kept: Gates that are kept for good, boolean; ``None`` before that is decided.
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
        """Scales without noise, of no more gates than were kept, ``(n_gates,)``."""
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
    written: Part = "mlp_post_norm" if "mlp_post_norm" in anatomy.parts else "mlp"
    per_layer: dict[int, list[int]] = {}
    for index, (layer, head) in enumerate(places):
        if head is not None:
            per_layer.setdefault(layer, []).append(index)

    def scale_heads(indices: list[int]) -> Any:
        heads = torch.tensor([places[i][1] for i in indices])

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].unflatten(-1, (anatomy.n_heads, anatomy.d_head))
            factor = torch.ones(anatomy.n_heads).index_copy(0, heads, scales[indices]).to(z.device, z.dtype)
            return ((z * factor[:, None]).flatten(-2), *inputs[1:])

        return hook

    def scale_output(index: int) -> Any:
        return lambda _, __, output: output * scales[index].to(output.device, output.dtype)

    with ExitStack() as stack:
        for layer, indices in per_layer.items():
            module = anatomy.module("output_projection", layer)
            stack.callback(module.register_forward_pre_hook(scale_heads(indices)).remove)
        for index, (layer, head) in enumerate(places):
            if head is None:
                stack.callback(anatomy.module(written, layer).register_forward_hook(scale_output(index)).remove)
        yield


def _batches(items: Sequence[Continued]) -> list[list[int]]:
    """Numbers of items of similar length, no more tokens in a batch than fit."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].tokens), i))
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * len(items[index].tokens) > _TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(index)
    return batches


def _residuals(model: TransformerBridge, items: Sequence[Continued]) -> Tensor:
    """The final residual stream where the items' looked-at tokens are predicted, one item after another."""
    anatomy = Anatomy(model)
    network: Any = anatomy.model
    width = max(len(item.tokens) for item in items)
    padding = torch.tensor([width - len(item.tokens) for item in items], device=anatomy.device)
    rows = [[0] * (width - len(item.tokens)) + list(item.tokens) for item in items]
    mask = (torch.arange(width, device=anatomy.device) >= padding[:, None]).long()
    seen: list[Tensor] = []
    handle = anatomy.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        network(
            input_ids=torch.tensor(rows, device=anatomy.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        handle.remove()
    return torch.cat([seen[0][i, width - 1 - item.predicted : width - 1] for i, item in enumerate(items)])


def _final_states(model: TransformerBridge, items: Sequence[Continued], progress: str | None) -> list[Tensor]:
    states: list[Tensor] = [torch.empty(0)] * len(items)
    for batch in tracked(_batches(items), progress):
        chosen = [items[i] for i in batch]
        with torch.no_grad():
            parts = _residuals(model, chosen).split([item.predicted for item in chosen])
        for index, part in zip(batch, parts, strict=True):
            states[index] = part
    return states


def losses(model: TransformerBridge, items: Sequence[Continued]) -> Tensor:
    """Per item: -log p of the answer, or for guards the mean KL(unedited || edited); nats, ``(n_items,)``."""
    anatomy = Anatomy(model)
    residual = _residuals(model, items)
    log_p = anatomy.logits(residual).float().log_softmax(-1)
    counts = torch.tensor([item.predicted for item in items])
    owner = torch.arange(len(items)).repeat_interleave(counts).to(log_p.device)
    if items[0].reference is None:
        answers = torch.tensor([token for item in items for token in item.tokens[len(item.tokens) - item.predicted :]])
        per_token = -log_p.gather(1, answers.to(log_p.device)[:, None]).squeeze(1)
        return torch.zeros(len(items), device=log_p.device).index_add(0, owner, per_token)
    with torch.no_grad():
        reference = torch.cat([item.reference for item in items if item.reference is not None])
        log_q = anatomy.logits(reference.to(log_p.device)).float().log_softmax(-1)
    per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
    total = torch.zeros(len(items), device=log_p.device).index_add(0, owner, per_token)
    return total / counts.to(log_p.device)


@dataclass(frozen=True)
class Checked:
    """What scales do on dev.

    Attributes:
        rate: Share of conflict prompts that are answered from the wanted source, token by token.
        divergence: For each guard the mean KL divergence from the unedited model, nats.
    """

    rate: float
    divergence: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest of the divergences."""
        return max(self.divergence.values())


def check_scales(
    model: TransformerBridge,
    data: GateData,
    wanted: Sequence[Continued],
    places: Sequence[tuple[int, int | None]],
    scales: Tensor,
) -> Checked:
    """Measure scales on the prompts of ``data``."""
    with torch.no_grad(), scaled(model, places, scales):
        divergence = {
            kind: sum(float(losses(model, [items[i] for i in batch]).sum()) for batch in _batches(items)) / len(items)
            for kind, items in data.guards.items()
        }
        hits = 0
        for batch in _batches(wanted):
            chosen = [wanted[i] for i in batch]
            greedy = Anatomy(model).logits(_residuals(model, chosen)).argmax(-1).cpu()
            for item, tokens in zip(chosen, greedy.split([item.predicted for item in chosen]), strict=True):
                hits += tokens.tolist() == list(item.tokens[len(item.tokens) - item.predicted :])
    return Checked(hits / len(wanted), divergence)


def within_budget(
    model: TransformerBridge,
    data: GateData,
    wanted: Sequence[Continued],
    places: Sequence[tuple[int, int | None]],
    scales: Tensor,
    budget: float,
) -> tuple[Tensor, Checked]:
    """Move scales back towards 1 until no guard of ``data`` diverges by more than ``budget``.

    Divergence grows about with the square of the way, so that one or two tries are enough.
    """
    share = 1.0
    for _ in range(6):
        tried = 1 + share * (scales - 1)
        checked = check_scales(model, data, wanted, places, tried)
        if checked.worst <= budget:
            return tried, checked
        share *= 0.97 * math.sqrt(budget / checked.worst)
    unmoved = torch.ones_like(scales)
    return unmoved, check_scales(model, data, wanted, places, unmoved)


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
    answers: Sequence[Continued] | None = None,
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
        answers: What the conflict prompts of ``train`` are to be answered with instead: a control.
        checkpoint: File that training goes on from, if it is there and of the same data and settings; it is taken away
            at the end.
        progress: Label of a progress bar; ``None`` shows none.
    """
    wanted = train.wanted(towards) if answers is None else list(answers)
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
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
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
        self, model: TransformerBridge, wanted: Sequence[Continued], guards: Mapping[Guard, Sequence[Continued]]
    ) -> dict[str, float]:
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        sampled = self.gates.sampled(generator)
        # Passes are made one by one; their gradients meet here.
        scales = sampled.detach().requires_grad_()
        kinds: dict[str, Sequence[Continued]] = {"conflict": _drawn(rng, wanted, settings.conflicts)}
        for kind in GUARDS:
            kinds[kind] = _drawn(rng, guards[kind], settings.guards if kind != "neutral" else -(-settings.guards // 4))
        found = dict.fromkeys(kinds, 0.0)
        with scaled(model, self.gates.places, scales):
            for guarded in (False, True):
                named = [
                    (kind, item) for kind, items in kinds.items() if (kind != "conflict") == guarded for item in items
                ]
                for batch in _batches([item for _, item in named]):
                    values = losses(model, [named[i][1] for i in batch])
                    total = torch.zeros((), device=values.device)
                    for i, value in zip(batch, values, strict=True):
                        kind = named[i][0]
                        share = value / len(kinds[kind])
                        found[kind] += share.item()
                        total = total + share * (self.multipliers[kind] * 0.1 / settings.budget if guarded else 1.0)
                    total.backward()
        assert scales.grad is not None
        objective = (sampled * scales.grad.to(sampled)).sum()
        if self.gates.kept is None:
            count = self.gates.expected_open() / settings.max_gates
            objective = objective + self.sparsity * count
            self.sparsity = max(0.0, self.sparsity + 0.05 * (count.item() - 1))
        self.optimiser.zero_grad()
        objective.backward()
        self.optimiser.step()
        for kind in GUARDS:
            moved = self.multipliers[kind] + 0.2 * (found[kind] / settings.budget - 1)
            self.multipliers[kind] = min(max(0.0, moved), 50.0)
        self.step += 1
        return found

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
        except (OSError, SafetensorError, KeyError, ValueError):
            return
        if about["settings"] != asdict(self.settings) or len(tensors["offset"]) != len(self.gates.places):
            return
        with torch.no_grad():
            self.gates.offset.copy_(tensors["offset"])
            self.gates.location.copy_(tensors["location"])
        self.gates.kept = tensors.get("kept")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.multipliers, self.sparsity, self.step = about["multipliers"], about["sparsity"], about["step"]
        if about["best"] is not None:
            self.best = (tensors["best"], Checked(**about["best"]))


def _drawn(rng: random.Random, items: Sequence[Continued], count: int) -> list[Continued]:
    return rng.sample(list(items), min(count, len(items)))
