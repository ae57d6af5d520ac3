"""Which tokens an edit acts on, also while text is generated.

``generate`` reads the whole prompt once and then, with a KV cache, one token a step; without a cache it reads prompt
and text again at every step. An edit that is meant for the prompt's last token has to know which call it is in, so
that both give the same text.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interventions.replaced import Replaced

Tokens = Literal["last_prompt", "answer", "generated", "prompt", "all"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)


class TokenTracker:
    """Follows a model's forward passes and tells, inside each of them, which of its tokens are meant.

    - ``last_prompt``: the last token of the prompt, once
    - ``answer``: that token and every generated one: those from which answers are predicted
    - ``generated``: generated tokens only
    - ``prompt``: the prompt's tokens
    - ``all``: all tokens

    A forward pass reads a new prompt unless it goes on from the last one: with the same cache, by one token after as
    many as were read so far; without one, when it begins with the same prompt and is longer by one token than the pass
    before. Padding is never meant. Each thread is followed by itself.

    Args:
        tokens: Which tokens are meant.
    """

    def __init__(self, tokens: Tokens) -> None:
        if tokens not in TOKENS:
            raise UserError(f"There is no choice of tokens {tokens!r}; choose among {', '.join(TOKENS)}.")
        self.tokens: Tokens = tokens
        self._thread = threading.local()

    def __deepcopy__(self, _: Any) -> TokenTracker:
        # With the hooks of a model that is copied: those that ask share the tracker with the one that sees the passes.
        return self

    def attach(self, model: nn.Module) -> Following:
        """Follow the passes of ``model``, a transformers model or a ``TransformerBridge``."""
        return Following(self, transformers_model(model))

    def mask(self, device: torch.device) -> Tensor | None:
        """Which tokens of the pass that is under way are meant: boolean, ``(n_rows, n_tokens)``; ``None`` is none.

        Raises:
            UserError: If no pass is under way: then what the tokens are a part of is not known.
        """
        if not hasattr(self._thread, "mask"):
            raise UserError(
                "An edit that is meant for certain tokens, or gated, was reached without a pass through the whole "
                "model; call the model, not a part of it or a part's forward method."
            )
        mask: Tensor | None = self._thread.mask
        return None if mask is None else mask.to(device)

    def see(self, names: Sequence[str], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of a pass that begins; ``names`` are those of the arguments given by position."""
        if len(args) > len(names):
            raise UserError(
                "An edit that is meant for certain tokens, or gated, cannot tell what the model is given by position; "
                "give its arguments by name."
            )
        arguments = dict(zip(names, args, strict=False)) | kwargs
        given = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if given is None else given
        rows, new = tokens.shape[:2]
        cache = arguments.get("past_key_values")
        if cache is None:
            # Its name from transformers 5.24 on.
            cache = arguments.get("cache")
        before = 0 if cache is None else cache.get_seq_length()
        state = self._thread
        seen: int | None = getattr(state, "seen", None)
        if before:
            # Where the prompt's pass was given no cache, the model made one, which comes with the next pass.
            goes_on = new == 1 and before == seen and (state.cache is None or state.cache() is cache)
        else:
            goes_on = cache is None and seen is not None and new == seen + 1 and self._again(given)
        real = _real_tokens(arguments.get("attention_mask"), rows, before, new, tokens.device)
        if not goes_on:
            state.prompt = given
            state.length = before + new
            # Counted in the whole sequence. Padding on the right puts it before the last column.
            columns = torch.arange(before, before + new, device=tokens.device)
            state.last = torch.where(real, columns, -1).amax(-1, keepdim=True)
        state.cache = None if cache is None else weakref.ref(cache)
        state.seen = before + new
        if goes_on and before and self.tokens in ("last_prompt", "prompt"):
            # Known without a look at the device, so that a decoding step costs nothing.
            state.mask = None
            return
        columns = torch.arange(before, before + new, device=tokens.device)
        last = columns == state.last.to(tokens.device)
        generated = (columns >= state.length).expand(rows, new)
        state.mask = {
            "last_prompt": last,
            "answer": last | generated,
            "generated": generated,
            "prompt": real & ~generated,
            "all": real,
        }[self.tokens]

    def leave(self, *_: Any) -> None:
        """Note that a pass has ended."""
        vars(self._thread).pop("mask", None)

    def tell(self, real: Tensor, *, new_prompts: bool, kept: Tensor | None = None) -> None:
        """Say what this thread's next passes are, in place of following them, until ``leave``.

        Args:
            real: Which tokens are no padding, boolean ``(n_rows, n_tokens)``; padding is on the left.
            new_prompts: Whether the tokens are new prompts; else they are the one that each row goes on with.
            kept: Nothing that a row was told before matters here.
        """
        last = torch.zeros_like(real)
        last[:, -1] = True
        at_prompts = {"last_prompt": last, "answer": last, "generated": None, "prompt": real, "all": real}
        at_steps = {"last_prompt": None, "answer": real, "generated": real, "prompt": None, "all": real}
        self._thread.mask = (at_prompts if new_prompts else at_steps)[self.tokens]

    def keep(self) -> None:
        """Keep nothing: which of a row's tokens are meant does not depend on its earlier ones."""

    def _again(self, given: Tensor | None) -> bool:
        prompt: Tensor | None = self._thread.prompt
        if prompt is None or given is None or len(prompt) != len(given):
            return False
        return torch.equal(given[:, : prompt.shape[1]], prompt)


class Following:
    """A tracker at work on a model, which meanwhile refuses to generate in ways that its passes do not tell apart.

    The tracker watches the model inside, which the language model calls in every pass, however it is called itself.

    Args:
        tracker: The tracker.
        network: The transformers model.
    """

    def __init__(self, tracker: TokenTracker, network: Any) -> None:
        body = Anatomy(network).body
        inside = getattr(body, "_orig_mod", body)
        names = argument_names(inside)
        self._parts = [
            inside.register_forward_pre_hook(partial(tracker.see, names), with_kwargs=True),
            inside.register_forward_hook(tracker.leave, always_call=True),
        ]
        # Where all tokens are meant it does not matter which is which.
        if tracker.tokens != "all":
            self._parts.append(Replaced(network, _REFUSING))

    def remove(self) -> None:
        """Follow no more."""
        while self._parts:
            self._parts.pop().remove()


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments that a module takes by position, in order."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]


def _generate(network: Any, generate: Any, *args: Any, **kwargs: Any) -> Any:
    # The second argument of generate.
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or network.generation_config
    for option, what in _UNFOLLOWED.items():
        if kwargs.get(option, getattr(config, option, None)) is not None:
            raise UserError(
                f"An edit that is meant for certain tokens, or gated, cannot tell them apart in {what}; generate "
                f"without {option}, or take an edit of all tokens."
            )
    return generate(*args, **kwargs)


def _init_continuous_batching(network: Any, *_: Any, **__: Any) -> Any:
    raise UserError(
        "An edit that is meant for certain tokens, or gated, cannot tell them apart in continuous batching, which "
        f"packs several texts into one row; call {type(network).__name__}.generate, or take an edit of all tokens."
    )


_REFUSING = {"generate": _generate, "init_continuous_batching": _init_continuous_batching}
_UNFOLLOWED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_early_exit": "early exit decoding",
    "prefill_chunk_size": "a prompt that is read in chunks",
}


def _real_tokens(attention_mask: Any, rows: int, before: int, new: int, device: torch.device) -> Tensor:
    """Which of the pass's tokens are no padding, ``(rows, new)``.

    ``generate`` with a static cache prepares masks ``(rows, 1, new, n_all)`` itself, where it must by kind of layer. In
    these a token is real if it may look at itself.
    """
    mask = next(iter(attention_mask.values()), None) if isinstance(attention_mask, dict) else attention_mask
    # Behind a sliding window columns are no longer tokens; by then there is no padding among the new ones.
    if not isinstance(mask, Tensor) or mask.shape[-1] < before + new:
        return torch.ones(rows, new, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, before : before + new].bool().to(device)
    itself = mask[:, 0, :, before : before + new].diagonal(dim1=-2, dim2=-1)
    return (itself if mask.dtype == torch.bool else itself == 0).expand(rows, new).to(device)
