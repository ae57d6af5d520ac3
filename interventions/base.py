"""What all interventions share: patches of a model's modules, what a kind says of itself, and ``applied``."""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint, Part
from interp.errors import Caution, UserError
from interp.reading import ALL_LAYERS_AT_END, AtEnd, Changed
from interventions.folding import Folding
from interventions.identity import ModelIdentity, Strict
from interventions.replaced import Replaced
from interventions.tokens import Tokens

if TYPE_CHECKING:
    from interp.pairs import Combined

EDITS_VERSION = 1
"""Version of what interventions do: raise it when one of them would change a model in another way."""


class Removable(Protocol):
    """What was attached to a model and can be taken off again."""

    def remove(self) -> None:
        """Take it off."""
        ...


class Follower(Protocol):
    """What follows a model's passes for as long as patches are attached that ask it."""

    def attach(self, model: nn.Module) -> Removable:
        """Follow the passes of a transformers model or a ``TransformerBridge``."""
        ...


@runtime_checkable
class RowFollower(Follower, Protocol):
    """A follower that can be told of passes instead, whose rows are then anybody's: see ``interventions.rows``."""

    def tell(self, real: Tensor, *, new_prompts: bool, kept: Tensor | None = None) -> None:
        """Say what this thread's next passes are, until ``leave``.

        Args:
            real: Which tokens are no padding, boolean ``(n_rows, n_tokens)``; padding is on the left.
            new_prompts: Whether the tokens are new prompts; else they are the one that each row goes on with.
            kept: What ``keep`` gave for the rows when they were new, ``(n_rows, ...)``.
        """
        ...

    def keep(self) -> Tensor | None:
        """What was found out about the rows of a pass over new prompts, ``(n_rows, ...)``; ``None`` is nothing."""
        ...

    def leave(self) -> None:
        """Note that the passes that were told of are over."""
        ...


class Handle:
    """What was attached to a model; ``remove()`` or leaving the ``with`` block restores the model exactly.

    Args:
        hooks: Handles of the hooks that make up the intervention, kept in the attribute of the same name.
    """

    def __init__(self, hooks: Sequence[Removable]) -> None:
        self.hooks = list(hooks)
        _forget_compiled()

    def remove(self) -> None:
        """Take the intervention off the model; calling it again does nothing."""
        if self.hooks:
            while self.hooks:
                self.hooks.pop().remove()
            _forget_compiled()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Patch(NamedTuple):
    """A change of one activation, wherever it passes by.

    Attributes:
        part: The part of a block whose output is changed; of the output projection it is the input, z, as with sites.
        layer: The block.
        change: What becomes of the values, ``(n_rows, n_tokens, width)`` -> the same.
        tracker: What follows the model's passes for ``change``, if it has to know which tokens or rows are which.
    """

    part: Part
    layer: int
    change: Callable[[Tensor], Tensor]
    tracker: Follower | None = None


class Placed:
    """A tensor wherever, and in whatever dtype, it is needed: that is known only when activations come by.

    Args:
        values: The tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, activations: Tensor) -> Tensor:
        """The values on the device of ``activations`` and in their dtype; they are moved once."""
        return self.on(activations.device, activations.dtype)

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The values on a device, in a dtype."""
        if (device, dtype) not in self._kept:
            self._kept[device, dtype] = self._values.to(device, dtype)
        return self._kept[device, dtype]


class Attachable(Protocol):
    """What changes the forward pass of a model that it is attached to: an intervention, or a file of them."""

    def attach(self, model: nn.Module) -> Handle:
        """Apply to ``model`` until the handle is removed."""
        ...


class Place(NamedTuple):
    """A part of a block; of the output projection its input is meant, of every other part its output."""

    part: Part
    layer: int


class Acting(NamedTuple):
    """What interventions do to a model.

    Attributes:
        patches: What they read and change in its forward pass, in order.
        rule: How they choose the next token from a prompt with and without its context, if they do.
    """

    patches: list[Patch]
    rule: Combined | None = None

    @classmethod
    def together(cls, parts: Iterable[Acting]) -> Acting:
        """One after the other.

        Raises:
            UserError: If there are several rules for the next token.
        """
        every = list(parts)
        rules = [part.rule for part in every if part.rule is not None]
        if len(rules) > 1:
            raise UserError(f"A next token is chosen by one rule, not by {len(rules)}; give one.")
        return cls([patch for part in every for patch in part.patches], *rules)


class Entry(Strict, ABC):
    """What the intervention file says of one intervention: a ``kind``, and a bound on every number.

    Vectors and weights lie in the file's tensors; an entry holds their names.
    """

    @abstractmethod
    def build(self, tensors: Mapping[str, Tensor]) -> Intervention:
        """The intervention that this entry describes."""

    @abstractmethod
    def places(self, blueprint: Blueprint) -> list[Place]:
        """What it reads or changes, at any setting."""

    @abstractmethod
    def check(self, model: ModelIdentity, tensors: Mapping[str, Tensor]) -> None:
        """See that it fits the model's shapes, other than the number of layers.

        Raises:
            UserError: If it does not.
        """


class Intervention(ABC):
    """A change of the forward pass that can be attached to a model and taken off again, or of the next token's choice.

    A kind has to say what it patches, and where; whatever else it does not define, it refuses. Kinds are immutable.
    """

    @abstractmethod
    def patches(self, model: nn.Module) -> list[Patch]:
        """What it reads and changes in a transformers model or a ``TransformerBridge``.

        Raises:
            UserError: If the model lacks what is read or changed, or has another shape.
        """

    @property
    @abstractmethod
    def edited_layers(self) -> set[int]:
        """The layers that it changes."""

    tokens: Tokens = "all"
    """The tokens it acts on."""

    in_one_pass: ClassVar[bool] = False
    """Whether a prompt has to be read in one pass: its end decides about all of it, or it is read otherwise."""

    by_row: ClassVar[bool] = True
    """Whether it can act on some prompts of a batch alone, as behind a gate."""

    @property
    def head_scales(self) -> dict[tuple[int, int], float]:
        """The scales of the heads that it moves, by ``(layer, head)``."""
        return {}

    @property
    def edited_heads(self) -> tuple[tuple[int, int], ...]:
        """``(layer, head)`` of the heads that it moves, sorted."""
        return tuple(sorted(self.head_scales))

    @property
    def n_moved(self) -> int:
        """How many heads, feed-forward layers, directions or features it moves."""
        return len(self.edited_layers)

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The edits that it consists of: itself, or what it lets through."""
        return (self,)

    @property
    def contrast(self) -> tuple[Intervention, Combined] | None:
        """The edit of a second reading, and what makes logits of the unedited one and this, if an edit does no more.

        Either can then be read by itself, and once for all edits that share it.
        """
        return None

    def acting(self, model: nn.Module) -> Acting:
        """All that it does to a transformers model or a ``TransformerBridge``: ``patches``, unless it says otherwise.

        Raises:
            UserError: As ``patches``.
        """
        return Acting(self.patches(model))

    def attach(self, model: nn.Module) -> Handle:
        """Apply to a transformers model or a ``TransformerBridge`` until the handle is removed.

        Raises:
            UserError: As ``patches``; the model is then unchanged.
        """
        return attach_patches(model, self.patches(model))

    def scaled(self, strength: float) -> Self:
        """The same, ``strength`` times as far: 0 changes nothing, -1 goes the other way.

        Raises:
            UserError: If the strength is not finite, or the kind has none.
        """
        raise UserError(f"{type(self).__name__} has no strength; apply it as it is.")

    def turned(self, trust: float) -> Self:
        """The same with every dial in it at ``trust``, from -1 (memory) to 1 (context).

        Raises:
            UserError: If there is a dial, and trust lies outside.
        """
        return self

    def settled(self) -> tuple[Intervention, ...]:
        """What it does, without settings and without what does nothing: a dial is what it scales where it stands."""
        return (self,)

    def described(self) -> Iterator[str]:
        """What it does, in words."""
        yield repr(self)

    def entry(self, name: str, tensors: dict[str, Tensor]) -> Entry:
        """Its part of the intervention file.

        Args:
            name: What the names of its tensors begin with.
            tensors: Where it puts them.

        Raises:
            UserError: If files cannot hold the kind.
            ValidationError: If a number is out of range.
        """
        raise UserError(f"{type(self).__name__} cannot be written to an intervention file; apply it from Python.")

    def folded(self) -> Folding:
        """What it does to weights that is the same.

        Raises:
            UserError: If what it does depends on the token or on the activation.
        """
        raise UserError(
            f"This {type(self).__name__} cannot be folded into weights, only scaled heads, scaled feed-forward layers, "
            "trust dials and directions that are added at all tokens can; apply the intervention while the model runs "
            "instead."
        )


def changed_by(interventions: Sequence[Intervention]) -> Changed:
    """Say what interventions change of a prompt, for ``interp.reading.ReadPrompts``."""
    tokens = {intervention.tokens for intervention in interventions}
    if any(intervention.in_one_pass for intervention in interventions):
        return "whole"
    layers = {layer for intervention in interventions for layer in intervention.edited_layers}
    if tokens <= {"last_prompt", "answer", "generated"}:
        return AtEnd(min(layers, default=0))
    if tokens != {"all"}:
        return "whole"
    return min(layers) if layers else ALL_LAYERS_AT_END


def finite_strength(strength: float) -> float:
    """The strength.

    Raises:
        UserError: If it is no finite number.
    """
    if not math.isfinite(strength):
        raise UserError(f"A strength is a finite number, not {strength}.")
    return strength


def attach_patches(model: nn.Module, patches: Sequence[Patch]) -> Handle:
    """Attach patches, in order: those of the same activation act on what earlier ones made of it.

    Meanwhile the model's ``save_pretrained`` says that it saves the weights without them.

    Raises:
        UserError: If the model does not have one of the parts; nothing is attached then.
    """
    anatomy = Anatomy(model)
    for patch in patches:
        anatomy.module(patch.part, patch.layer)
    trackers = dict.fromkeys(patch.tracker for patch in patches if patch.tracker is not None)
    hooks: list[Removable] = [tracker.attach(model) for tracker in trackers]
    hooks += [hooked(anatomy, patch) for patch in patches]
    if patches:
        hooks.append(Replaced(anatomy.model, SAVING))
    return Handle(hooks)


def hooked(anatomy: Anatomy, patch: Patch) -> Removable:
    """Let a patch change what passes by at its place.

    Raises:
        UserError: If the model does not have the part.
    """
    if patch.part == "output_projection":
        return anatomy.module(patch.part, patch.layer).register_forward_pre_hook(_of_input(patch.change))
    return anatomy.on_output(patch.part, patch.layer, patch.change)


@contextmanager
def applied(model: nn.Module, *interventions: Attachable) -> Iterator[None]:
    """Apply interventions, in the order given, for the length of a ``with`` block.

    The model is restored when the block ends, also after an exception. Later interventions act on what earlier
    ones made of the activations.

    Raises:
        UserError: If one of them does not fit the model; none of them stays attached then.
    """
    with ExitStack() as stack:
        for intervention in interventions:
            stack.enter_context(intervention.attach(model))
        yield


def _save_pretrained(_: nn.Module, save_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        Caution(
            "The saved weights do not hold the edit that is applied to the model; fold it in with: "
            "conflictscope export MODEL CONFIG OUT --bake"
        ),
        stacklevel=2,
    )
    return save_pretrained(*args, **kwargs)


SAVING: Mapping[str, Callable[..., Any]] = {"save_pretrained": _save_pretrained}


def _of_input(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    return hook


def _forget_compiled() -> None:
    """Make compiled models compile anew: compiled code does not look whether hooks are still the same."""
    # Where nothing was compiled yet this saves the second that importing the compiler takes.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
