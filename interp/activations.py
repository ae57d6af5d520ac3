"""Record what a model holds at named sites and token positions.

One batch of prompts runs forward until the last wanted site has passed by, and no further: later layers and the
unembedding are not computed. Of each site only the wanted positions are kept, on the device and in the dtype asked
for; they move to the host in the background while the next batch runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, Observation, transformers_model
from interp.conflicts import ConflictExample, ConflictSet
from interp.doubled import check_single
from interp.errors import UserError
from interp.generation import BATCH_SIZE
from interp.inputs import (
    batch_tokens_of,
    check_lengths,
    continuation_ids,
    joined,
    most_positions,
    padded,
    pass_tokens,
    together,
    token_ids,
    token_spans,
    tokenizer_of,
)
from interp.progress import counted

SiteKind = Literal["residual", "attention", "mlp", "z"]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
Position = Literal["last", "last_context", "memory_answer", "context_answer", "all"]
POSITIONS: tuple[Position, ...] = get_args(Position)

_CHECKED_AT_ONCE, _MARGIN = 1024, 64

_SITE_NAMES: dict[str, SiteKind] = {
    "hook_out": "residual",
    "attn.hook_out": "attention",
    "ln1_post.hook_out": "attention",
    "mlp.hook_out": "mlp",
    "ln2_post.hook_out": "mlp",
    "attn.o.hook_in": "z",
}


def sites_of(
    model: Any, kinds: Sequence[SiteKind] = ("residual", "attention", "mlp"), layers: Sequence[int] | None = None
) -> list[str]:
    """The sites of the given kinds and layers, layer by layer.

    ``residual`` is the residual stream after a block, ``attention`` and ``mlp`` are what these add to it, ``z`` is
    the heads' output before the output projection.

    Args:
        model: The model, or a bridge around it.
        kinds: Which kinds.
        layers: Which layers; ``None`` means all.

    Raises:
        UserError: If there is no such kind or layer.
    """
    if unknown := [kind for kind in kinds if kind not in SITE_KINDS]:
        raise UserError(f"The kind of site {unknown[0]!r} is not known; known are {', '.join(SITE_KINDS)}.")
    anatomy = Anatomy(model)
    by_kind = {
        "residual": lambda layer: anatomy.site("block", layer),
        "attention": lambda layer: anatomy.written_site("attention", layer),
        "mlp": lambda layer: anatomy.written_site("mlp", layer),
        "z": lambda layer: anatomy.site("output_projection", layer),
    }
    wanted = range(anatomy.n_layers) if layers is None else layers
    return [by_kind[kind](layer) for layer in wanted for kind in kinds]


def site_kind(site: str) -> tuple[SiteKind, int] | None:
    """Kind and layer of a site, by its name alone: what ``sites_of`` made it from; ``None`` for any other site."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    kind = _SITE_NAMES.get(match[2]) if match else None
    return (kind, int(match[1])) if match and kind else None


def observations(model: Any, sites: Sequence[str]) -> dict[str, Observation]:
    """Where the values of each site pass by.

    Raises:
        UserError: If no site is given, or one does not exist; the message lists those that do.
    """
    if not sites:
        raise UserError("No site is given; name at least one, for example with sites_of(model).")
    known = Anatomy(model).observed()
    if unknown := [site for site in sites if site not in known]:
        raise UserError(f"The site {unknown[0]!r} does not exist in this model; there are {', '.join(known)}.")
    return {site: known[site] for site in sites}


@dataclass(frozen=True)
class Activations(Mapping[str, Tensor]):
    """Recorded values by site, one row for each recorded token.

    Attributes:
        by_site: Values, by site ``(n_rows, d)``; for z ``(n_rows, n_heads, d_head)``. On the host.
        prompt: Number of the prompt that each row belongs to, ``(n_rows,)``.
        position: Number of the token in that prompt, ``(n_rows,)``.
    """

    by_site: Mapping[str, Tensor]
    prompt: Tensor
    position: Tensor

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.by_site:
            raise UserError(f"The site {site!r} was not recorded; recorded are {', '.join(self.by_site)}.")
        return self.by_site[site]

    def __contains__(self, site: object) -> bool:
        return site in self.by_site

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)


def record(
    model: nn.Module,
    prompts: Sequence[str] | ConflictSet,
    sites: Sequence[str],
    positions: Position | Sequence[Sequence[int]] = "last",
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> Activations:
    """Record activations of all prompts in memory.

    Args:
        model: The model, or a bridge around it; interventions that are applied to it are seen.
        prompts: Texts, or conflict examples.
        sites: Names of sites, for example from ``sites_of``.
        positions: ``last`` is the last token of the prompt; ``last_context`` the last one of the context;
            ``memory_answer`` and ``context_answer`` the tokens of that answer, written after the prompt; ``all``
            every token. Or token numbers for each prompt; negative ones count from its end. All but ``last``,
            ``all`` and numbers need conflict examples.
        dtype: What to keep: ``torch.float32``, ``float16`` or ``bfloat16``.
        batch_size: Prompts per batch.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If a site or position does not exist, there is no prompt, or a value overflows ``dtype``.
    """
    source = PromptSource(model, prompts, positions)
    source.check()
    where = observations(model, sites)
    with counted(progress, len(source)) as advance:
        return collected_activations(model, source, range(len(source)), where, dtype, batch_size, advance).result()


class _Wanted(NamedTuple):
    """A text, its tokens and the numbers of those that are to be recorded."""

    text: str
    token_ids: list[int]
    positions: list[int]


class PromptSource:
    """Texts and wanted positions of prompts, worked out for a few prompts at a time."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[str] | ConflictSet,
        positions: Position | Sequence[Sequence[int]],
    ) -> None:
        if isinstance(prompts, str):
            raise UserError("The prompts are one text; give a list of texts, or conflict examples.")
        self.examples = prompts.examples if isinstance(prompts, ConflictSet) else None
        self._texts = [] if isinstance(prompts, ConflictSet) else list(prompts)
        self._positions = positions
        self._model = model
        if not len(self):
            raise UserError("There is no prompt to record; choose a split, kind or template that has examples.")
        if not isinstance(positions, str):
            if len(positions) != len(self):
                raise UserError(f"There are {len(positions)} lists of positions for {len(self)} prompts; give as many.")
            if not any(len(chosen) for chosen in positions):
                raise UserError("The lists of positions are all empty; name at least one token.")
        elif positions not in POSITIONS:
            raise UserError(f"The position {positions!r} is not known; known are {', '.join(POSITIONS)}.")
        elif self.examples is None and positions not in ("last", "all"):
            raise UserError(f"The position {positions!r} needs conflict examples; texts alone have only last and all.")

    def __len__(self) -> int:
        return len(self._texts) if self.examples is None else len(self.examples)

    def wanted(self, numbers: Sequence[int]) -> list[_Wanted]:
        """Texts, tokens and wanted positions of some prompts."""
        if self._positions in ("memory_answer", "context_answer"):
            return [self._answered(i) for i in numbers]
        if self._positions == "last_context":
            return [self._up_to_question(i) for i in numbers]
        texts = [self._text(i) for i in numbers]
        tokens = zip(numbers, texts, token_ids(tokenizer_of(self._model), texts), strict=True)
        return [_Wanted(text, ids, self._tokens_of(i, len(ids))) for i, text, ids in tokens]

    def check(self) -> None:
        """Refuse empty prompts, and those that are too long for the model with what is written after them.

        Raises:
            UserError: For one of them.
        """
        # No tokenizer makes many more tokens than there are bytes.
        positions = (most_positions(self._model) or 2**62) - _MARGIN
        suspects = [i for i in range(len(self)) if not 0 < len(self._text(i).encode("utf-8", "replace")) < positions]
        for start in range(0, len(suspects), _CHECKED_AT_ONCE):
            numbers = suspects[start : start + _CHECKED_AT_ONCE]
            check_lengths(self._model, [found.token_ids for found in self.wanted(numbers)], numbers=numbers)

    def _text(self, i: int) -> str:
        return self._texts[i] if self.examples is None else self.examples[i].prompt

    def _example(self, i: int) -> ConflictExample:
        assert self.examples is not None
        return self.examples[i]

    def _answered(self, i: int) -> _Wanted:
        example = self._example(i)
        answers = example.memory_answers if self._positions == "memory_answer" else example.context_answers
        if not answers:
            raise UserError(
                f"The example {example.id} has no {str(self._positions).replace('_', ' ')}; "
                "leave out the kinds of context that have none."
            )
        prompt, answer = continuation_ids(self._model, example.prompt, answers[0])
        text = joined(tokenizer_of(self._model), example.prompt, answers[0])
        return _Wanted(text, prompt + answer, list(range(len(prompt), len(prompt) + len(answer))))

    def _up_to_question(self, i: int) -> _Wanted:
        example = self._example(i)
        end = _context_end(example)
        ids, spans = token_spans(tokenizer_of(self._model), example.prompt)
        last = max(t for t, (start, stop) in enumerate(spans) if start < end and stop > start)
        return _Wanted(example.prompt, ids, [last])

    def _tokens_of(self, i: int, length: int) -> list[int]:
        if self._positions == "last":
            return [length - 1]
        if self._positions == "all":
            return list(range(length))
        assert not isinstance(self._positions, str)
        chosen = list(self._positions[i])
        if outside := [p for p in chosen if not -length <= p < length]:
            raise UserError(f"Prompt {i} has no token {outside[0]}: it has {length} tokens.")
        return [p % length for p in chosen]


def _context_end(example: ConflictExample) -> int:
    """Where the context ends in the prompt, in characters."""
    end = 0
    for document in example.contexts:
        # Not by lowering both: some letters become two then.
        found = re.compile(re.escape(document), re.IGNORECASE).search(example.prompt, end)
        if found is None:
            end = 0
            break
        end = found.end()
    if not end:
        raise UserError(
            f"The example {example.id} has no context in its prompt; leave out the kinds of context that have none."
        )
    return end


class _Enough(Exception):
    """Ends a forward pass once all that is wanted has passed by."""


@contextmanager
def watching(model: Any, where: Mapping[str, Observation], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(site, values)`` with the values ``(n, n_tokens, d)`` of each site whenever they pass by."""
    check_single(model)
    anatomy = Anatomy(model)

    def seen(site: str, _: nn.Module, *given: Any) -> None:
        # A hook gets the input, and a hook on the output the output too; the input is a tuple.
        values = given[-1]
        see(site, values[0] if isinstance(values, tuple) else values)

    with ExitStack() as stack:
        for site, observation in where.items():
            if observation.place is not None and not observation.is_input:
                stack.callback(anatomy.on_output(*observation.place, partial(see, site)).remove)
                continue
            module = anatomy.model.get_submodule(observation.path)
            register = module.register_forward_pre_hook if observation.is_input else module.register_forward_hook
            stack.callback(register(partial(seen, site)).remove)
        yield


def observe(
    model: Any,
    inputs: Mapping[str, Tensor],
    rows: Tensor,
    columns: Tensor,
    where: Mapping[str, Observation],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """One forward pass, up to the last site: the values at ``(rows[i], columns[i])`` of the batch, on the device.

    Args:
        model: The model, or a bridge around it.
        inputs: What ``encode`` gives.
        rows: Row of the batch for each wanted token, ``(n,)``.
        columns: Column of the batch for each wanted token, ``(n,)``.
        where: From ``observations``.
        dtype: What to keep.

    Returns:
        By site ``(n, d)``, for z ``(n, n_heads, d_head)``.
    """
    network: Any = transformers_model(model)
    kept: dict[str, Tensor] = {}

    def keep(site: str, values: Tensor) -> None:
        chosen = values[rows.to(values.device), columns.to(values.device)].to(dtype)
        heads = where[site].n_heads
        kept[site] = chosen if heads is None else chosen.unflatten(-1, (heads, -1))
        if len(kept) == len(where):
            raise _Enough

    with watching(model, where, keep), torch.inference_mode():
        try:
            network(**inputs, use_cache=False, logits_to_keep=1)
        except _Enough:
            return kept
    raise RuntimeError(f"the forward pass never came by {', '.join(set(where) - set(kept))}")


class Collected:
    """Batches of activations on their way to the host, and how to put them in the prompts' order."""

    def __init__(self, sites: Sequence[str], dtype: torch.dtype) -> None:
        self._parts: dict[str, list[Tensor]] = {site: [] for site in sites}
        self._prompts: list[int] = []
        self._positions: list[int] = []
        self._dtype = dtype
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, values: Mapping[str, Tensor], prompts: Sequence[int], positions: Sequence[int]) -> None:
        """Take a batch; its copy to the host runs while the caller goes on."""
        for site, tensor in values.items():
            self._parts[site].append(self._to_host(tensor))
        self._prompts += prompts
        self._positions += positions

    def _to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        # A model may lie on several devices; each has a stream for its copies.
        stream = self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        # The allocator must not give the memory to the next batch before the copy is done.
        tensor.record_stream(stream)
        return host

    def result(self) -> Activations:
        """Everything, ordered by prompt and position."""
        for stream in self._streams.values():
            stream.synchronize()
        keys = list(zip(self._prompts, self._positions, strict=True))
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
        values: dict[str, Tensor] = {}
        for site, parts in self._parts.items():
            values[site] = torch.cat(parts)[order]
            parts.clear()
            if not values[site].isfinite().all():
                raise UserError(
                    f"A value at {site} does not fit into {str(self._dtype).removeprefix('torch.')}; "
                    "record in bfloat16 or float32, or see why the model itself gives infinite values."
                )
        return Activations(values, torch.tensor(self._prompts)[order], torch.tensor(self._positions)[order])


def collected_activations(
    model: Any,
    source: PromptSource,
    numbers: Sequence[int],
    where: Mapping[str, Observation],
    dtype: torch.dtype,
    batch_size: int,
    advance: Any,
) -> Collected:
    """Run the prompts with these numbers, those of similar length together."""
    wanted = dict(zip(numbers, source.wanted(numbers), strict=True))
    collected = Collected(list(where), dtype)
    lengths = {i: len(wanted[i].token_ids) for i in numbers}
    for batch in together(lengths, batch_size, batch_tokens_of(model), pass_tokens(model)):
        inputs = padded(model, [wanted[i].token_ids for i in batch])
        width = inputs["input_ids"].shape[1]
        places = [(row, i, p) for row, i in enumerate(batch) for p in wanted[i].positions]
        if places:
            device = inputs["input_ids"].device
            rows = torch.tensor([row for row, _, _ in places], device=device)
            columns = torch.tensor([width - lengths[i] + p for _, i, p in places], device=device)
            values = observe(model, inputs, rows, columns, where, dtype)
            collected.add(values, [i for _, i, _ in places], [p for _, _, p in places])
        advance(len(batch))
    return collected
