"""Estimate what every part of a model does through every later part: edge attribution with integrated gradients.

EAP-IG (Hanna et al. 2024, arXiv 2403.17806). An edge leads from what a head, an MLP or the embedding writes to what a
later layer's attention or MLP, or the unembedding, reads. With w the sender's write on the clean prompt and w' on the
corrupted one, and the receiver's input r:

    score = (w - w') . mean over k = 1 .. m of d(logit context - logit memory)/dr at e' + k/m (e - e')

summed over all tokens, where e and e' are the embeddings of the two prompts. With m = 1 this is edge attribution
patching. What a layer's heads read is one receiver.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import polars as pl
import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.attribution.examples import check_attributed, corrupted_partners, scorable, with_partners
from interp.attribution.scores import HeadScores, LayerScores
from interp.attribution.states import last_token_states
from interp.conflicts import ConflictExample, ConflictSet
from interp.doubled import check_single
from interp.errors import UserError
from interp.inputs import padded, prompt_batches, token_ids, tokenizer_of
from interp.progress import tracked

Reader = Literal["attention", "mlp"]
_TOKENS_AT_ONCE = 512


class Edge(NamedTuple):
    """One edge with its mean score, positive where it carries what pushes towards the context answer."""

    sender: str
    receiver: str
    score: float


@dataclass(frozen=True)
class EdgeScores:
    """How far each edge pushes towards one of the two sources.

    Attributes:
        values: Means over examples, ``(n_senders, n_receivers)`` float32 on the CPU; 0 where no edge is.
        senders: Names of the senders: ``embedding``, heads as ``3.1``, MLPs as ``mlp 3``.
        receivers: Names of the receivers: ``attention 3``, ``mlp 3``, ``logits``.
        heads: For each head the sum over all its edges, by example.
        mlps: The same of each MLP.
        is_edge: Where there is an edge, boolean ``(n_senders, n_receivers)``.
    """

    values: Tensor
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    heads: HeadScores
    mlps: LayerScores
    is_edge: Tensor

    def strongest(self, count: int) -> list[Edge]:
        """The edges whose mean score is furthest from 0, the furthest first."""
        sizes = self.values.abs().masked_fill(~self.is_edge, -1).flatten()
        order = sizes.argsort(descending=True, stable=True)[: min(count, int(self.is_edge.sum()))].tolist()
        places = [divmod(index, len(self.receivers)) for index in order]
        return [Edge(self.senders[s], self.receivers[r], self.values[s, r].item()) for s, r in places]

    def to_frame(self) -> pl.DataFrame:
        """One row an edge: ``sender, receiver, score``."""
        return pl.DataFrame(self.strongest(self.values.numel()), schema=list(Edge._fields), orient="row")


def edge_attribution(
    model: nn.Module,
    conflicts: ConflictSet,
    *,
    name: str,
    steps: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> EdgeScores:
    """Estimate the effect of corrupting every edge on the logit difference.

    Args:
        model: The model, or a bridge around it.
        conflicts: Conflict prompts. Those whose two answers start with the same token, or to which no other prompt of
            the same phrasing and number of tokens is to be found, are left out.
        name: Name of the model, for the record.
        steps: Points between the corrupted and the clean prompt at which the gradient is taken; ``m`` above.
        batch_size: Prompts per pass at most; fewer of long ones.
        seed: Decides the corrupted prompts.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If there is no step, or no example can be scored.
    """
    if steps < 1:
        raise UserError("Integrated gradients need at least one step.")
    check_single(model)
    anatomy = Anatomy(model)
    anatomy.check_differentiable()
    examples, answers = _aligned(model, conflicts)
    prompts = [example.prompt for example in examples]
    check_attributed(anatomy, last_token_states(model, prompts).final, answers)
    partners = corrupted_partners(examples, seed, _length_too(model, examples))
    tokens = token_ids(tokenizer_of(model), prompts)
    model_edges = _Edges(anatomy)
    total = torch.zeros(len(model_edges.senders), len(model_edges.receivers))
    outgoing = torch.zeros(len(examples), len(model_edges.senders))
    for numbers, _ in tracked(prompt_batches(model, prompts, batch_size, most_tokens=_TOKENS_AT_ONCE), progress):
        clean, corrupted = (
            padded(model, [tokens[i] for i in rows]) for rows in (numbers, [partners[i] for i in numbers])
        )
        values = model_edges.scores(clean, corrupted, answers[numbers], steps)
        total += values.sum(0) / len(examples)
        outgoing[numbers] = values.sum(-1)
    about: dict[str, Any] = {
        "method": "edge_attribution",
        "metric": "logit_diff",
        "model": name,
        "settings": {
            "unit": "estimated change of (logit context - logit memory), all edges",
            "baseline": "corrupted",
            "steps": steps,
            "seed": seed,
        },
    }
    n_heads = anatomy.n_layers * anatomy.n_heads
    heads = outgoing[:, 1 : 1 + n_heads].unflatten(1, (anatomy.n_layers, anatomy.n_heads))
    return EdgeScores(
        total,
        model_edges.senders,
        model_edges.receivers,
        HeadScores.of(heads, examples, conflicts, **about),
        LayerScores.of(outgoing[:, 1 + n_heads :], examples, conflicts, **about),
        model_edges.is_edge,
    )


def _aligned(model: nn.Module, conflicts: ConflictSet) -> tuple[list[ConflictExample], Tensor]:
    """Examples that have a partner of their length, and the first tokens of their answers ``(n, 2)``."""
    examples, answers = scorable(model, conflicts)
    kept = with_partners(examples, _length_too(model, examples))
    if not kept:
        raise UserError(
            "No example has another with the same phrasing, the same number of tokens and different answers to be "
            "corrupted with; give more examples."
        )
    ids = {example.id for example in kept}
    return kept, answers[[i for i, example in enumerate(examples) if example.id in ids]]


def _length_too(model: nn.Module, examples: Sequence[ConflictExample]) -> Any:
    """What an example shares with the one that it is corrupted with, token by token."""
    tokens = token_ids(tokenizer_of(model), [example.prompt for example in examples])
    lengths = {example.id: len(ids) for example, ids in zip(examples, tokens, strict=True)}

    def alike(example: ConflictExample) -> Hashable:
        return example.relation, example.template, lengths[example.id]

    return alike


class _Edges:
    """The senders and receivers of one model."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        layers = range(anatomy.n_layers)
        heads = tuple(f"{layer}.{head}" for layer, head in anatomy.heads)
        self.senders = ("embedding", *heads, *(f"mlp {layer}" for layer in layers))
        self.receivers = (*(name for layer in layers for name in (f"attention {layer}", f"mlp {layer}")), "logits")
        # Receivers stand in the order in which they read, those of a parallel layer side by side.
        of_heads = [2 * layer + (2 if anatomy.parallel else 1) for layer, _ in anatomy.heads]
        first = torch.tensor([0, *of_heads, *(2 * layer + 2 for layer in layers)])
        self.is_edge = torch.arange(len(self.receivers)) >= first.unsqueeze(1)

    @torch.no_grad()
    def scores(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor], answers: Tensor, steps: int) -> Tensor:
        """Scores of some prompts of one length each with their partner, ``(n, n_senders, n_receivers)``."""
        written, other = self._written(clean), self._written(corrupted)
        gradient: Tensor | None = None
        for step in range(1, steps + 1):
            at = other.embedding + step / steps * (written.embedding - other.embedding)
            found = self._gradient(clean, at, answers).float() / steps
            gradient = found if gradient is None else gradient + found
        assert gradient is not None
        parts = [self._through((written.embedding - other.embedding).unsqueeze(2), gradient)]
        for layer in range(self.anatomy.n_layers):
            ours, theirs = (self.anatomy.head_writes(layer, states.z[layer])[0] for states in (written, other))
            parts.append(self._through(ours - theirs, gradient))
        parts += [
            self._through((ours - theirs).unsqueeze(2), gradient)
            for ours, theirs in zip(written.mlps, other.mlps, strict=True)
        ]
        return torch.cat(parts, 1) * self.is_edge

    @staticmethod
    def _through(change: Tensor, gradient: Tensor) -> Tensor:
        """Changes ``(n, n_tokens, k, d_model)`` by gradients ``(n, n_receivers, n_tokens, d_model)``."""
        return torch.einsum("ntkm,nrtm->nkr", change.to(gradient.device).float(), gradient).cpu()

    def _written(self, inputs: dict[str, Tensor]) -> _Written:
        """What senders write at every token of some prompts."""
        z: list[Tensor] = []
        mlps: list[Tensor] = []
        embedding: list[Any] = []

        def keep_z(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            z.append(given[0].unflatten(-1, (self.anatomy.n_heads, -1)))

        def keep_write(output: Tensor) -> None:
            mlps.append(self.anatomy.residual_multiplier * output)

        with ExitStack() as hooks:
            for layer in range(self.anatomy.n_layers):
                attention = self.anatomy.module("output_projection", layer)
                hooks.callback(attention.register_forward_pre_hook(keep_z).remove)
                mlp = self.anatomy.writing_part("mlp")
                hooks.callback(self.anatomy.on_output(mlp, layer, keep_write).remove)
            hooks.enter_context(self._entering(embedding.append))
            self.anatomy.body(**inputs, use_cache=False)
        return _Written(embedding[0], z, mlps)

    def _gradient(self, inputs: dict[str, Tensor], embedding: Tensor, answers: Tensor) -> Tensor:
        """The logit difference's gradient at what receivers read, ``(n, n_receivers, n_tokens, d_model)``."""
        network: Any = self.anatomy.model
        offsets = [torch.zeros_like(embedding, requires_grad=True) for _ in self.receivers]
        reading = [(part, layer) for layer in range(self.anatomy.n_layers) for part in get_args(Reader)]
        with ExitStack() as hooks, torch.enable_grad():
            for (part, layer), offset in zip(reading, offsets[:-1], strict=True):
                hooks.enter_context(self._offset(part, layer, offset))
            hooks.enter_context(_given(self.anatomy.final_norm, lambda read: read + offsets[-1].to(read.device)))
            hooks.enter_context(self._entering(lambda _: embedding))
            logits = network(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            logits = logits.gather(1, answers.to(logits.device))
            gradients = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), offsets)
        return torch.stack(gradients, 1)

    @contextmanager
    def _offset(self, part: Reader, layer: int, offset: Tensor) -> Iterator[None]:
        """Add an offset to what attention or the MLP reads, and to what nothing else reads."""
        norms, reader = self.anatomy.blueprint, self.anatomy.module(part, layer)
        if (norms.attention_norm if part == "attention" else norms.mlp_norm) is None:
            with _given(reader, lambda read: read + offset.to(read.device)):
                yield
            return
        norm = self.anatomy.module("attention_norm" if part == "attention" else "mlp_norm", layer)
        if norms.attention_norm != norms.mlp_norm:
            with _given(norm, lambda read: read + offset.to(read.device).reshape(read.shape)):
                yield
            return
        # The norm is the other's too: it is applied once more, for this reader.
        entered: list[Tensor] = []

        def again(read: Tensor) -> Tensor:
            return norm.forward(entered.pop() + offset.to(read.device))

        with _given(norm, entered.append), _given(reader, again):
            yield

    def _entering(self, seen: Callable[[Tensor], Tensor | None]) -> AbstractContextManager[None]:
        """Show ``seen`` the residual stream that enters the first block; what it returns enters instead."""
        return _given(self.anatomy.module("block", 0), seen)


@contextmanager
def _given(module: nn.Module, seen: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show ``seen`` what a module is given to read; what it returns is given instead."""

    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        replaced = seen(given[0] if given else named["hidden_states"])
        if replaced is None:
            return given, named
        return ((replaced, *given[1:]), named) if given else (given, {**named, "hidden_states": replaced})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Written(NamedTuple):
    """What senders write at every token.

    Attributes:
        embedding: What enters the first block, ``(n, n_tokens, d_model)``.
        z: Of every layer ``(n, n_tokens, n_heads, d_head)``.
        mlps: Of every layer ``(n, n_tokens, d_model)``.
    """

    embedding: Tensor
    z: list[Tensor]
    mlps: list[Tensor]
