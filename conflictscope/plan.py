"""Say what each command takes on a model of some shapes, and what fits where.

Counted are the batches that commands run by themselves, each filled with prompts of one length, and answers that take
all the tokens that they may. Beside that, ``record`` answers each prompt as it does conflict prompts, and ``ask`` finds
both answers itself to a sentence that the model completes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from interp.errors import UserError
from interp.generation import BATCH_SIZE, MAX_NEW_TOKENS
from interp.inputs import BATCH_TOKENS
from interp.plan import Shapes, weight_bytes

GENERATE_TOKENS = 24
"""Longest answer of ``generate``, in tokens."""

_FLOAT32 = 4
# Rows of logits in float32 that choosing a token takes.
_CHOOSING = 3
# What a question without its context is taken to be long; running averages of a dial's training.
_BARE_TOKENS, _AVERAGES = 16, 6


@dataclass(frozen=True)
class Setting:
    """What is asked of a model.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        itemsize: Bytes of a number of the model: 4 in float32, 2 in bfloat16 and float16.
        new_tokens: Tokens of each answer; ``None`` is as many as each command takes at most.
        batch_size: Prompts per batch at most, where that can be set; ``None`` is each command's own.
        batch_tokens: Tokens per batch at most; a longer prompt runs alone.
        prompts: How many there are.
        eager: Whether attention weights are written out even where transformers has another way.
    """

    prompt_tokens: int
    itemsize: int = 4
    new_tokens: int | None = None
    batch_size: int | None = None
    batch_tokens: int = BATCH_TOKENS
    prompts: int = 256
    eager: bool = False

    @property
    def batch(self) -> int:
        """Prompts that run together."""
        return min(self.batch_size or BATCH_SIZE, self.at_once(self.batch_tokens), self.prompts)

    def at_once(self, most_tokens: int) -> int:
        """Prompts that a bound of tokens allows, one at least."""
        return max(1, most_tokens // self.prompt_tokens)

    def writes_attention(self, shapes: Shapes) -> bool:
        """Whether a model's attention weights are written out."""
        return self.eager or not shapes.fused

    def check(self, shapes: Shapes) -> None:
        """Refuse numbers below 1, and more tokens than the model reads.

        Raises:
            UserError: For one of them.
        """
        for name, value in vars(self).items():
            if name != "eager" and value is not None and value < 1:
                raise UserError(f"{name.replace('_', ' ').capitalize()} must be 1 or more, not {value}; give another.")
        new = self.new_tokens or GENERATE_TOKENS
        if shapes.positions is not None and self.prompt_tokens + new > shapes.positions:
            raise UserError(
                f"{self.prompt_tokens} tokens of a prompt and {new} of its answer do not fit into the "
                f"{shapes.positions} positions of this {shapes.architecture}; give fewer."
            )


@dataclass(frozen=True)
class Need:
    """What a command takes beside the weights.

    Attributes:
        command: The command, and what of it.
        batch: Prompts per batch.
        flops: Of one prompt; of ``dial fit`` of one step of learning.
        prompt_bytes: What each prompt of a batch takes.
        layer_bytes: What it takes in all layers together, each on its own device.
        other_bytes: What the command takes at another time than a batch.
        kept_bytes: What it takes all the time.
        disk_bytes: What it writes for all prompts.
    """

    command: str
    batch: int
    flops: int
    prompt_bytes: int
    layer_bytes: int = 0
    other_bytes: int = 0
    kept_bytes: int = 0
    disk_bytes: int = 0


def needs(shapes: Shapes, setting: Setting) -> list[Need]:
    """Say what each command takes.

    Args:
        shapes: The model.
        setting: What is asked of it.

    Raises:
        UserError: If a number is below 1, or the model does not read so many tokens.
    """
    setting.check(shapes)
    return [*_asking(shapes, setting), *_looking(shapes, setting), _dial_step(shapes, setting)]


def _asking(shapes: Shapes, setting: Setting) -> Iterator[Need]:
    from conflictscope.explore.looks import MAX_NEW_TOKENS as ASK_TOKENS

    flops, size, cache = _answer(shapes, setting, MAX_NEW_TOKENS)
    yield Need("evaluate", setting.batch, flops, size, cache)
    yield Need("two streams", setting.batch, 2 * flops, 2 * size, 2 * cache)
    flops, size, cache = _answer(shapes, setting, ASK_TOKENS)
    # Both prompts twice, padded to one length, and the longer one token by token; the lens, and the heads.
    looks = 2 * shapes.pass_flops(setting.prompt_tokens) + shapes.n_layers * shapes.unembedding_flops
    yield Need("ask", min(2, setting.at_once(setting.batch_tokens)), 5 * flops + looks, size, cache)
    # Prompt by prompt, with and without the edit.
    flops, size, cache = _answer(shapes, setting, GENERATE_TOKENS, alone=True)
    yield Need("generate", 1, 2 * flops, size, cache)


def _looking(shapes: Shapes, setting: Setting) -> Iterator[Need]:
    tokens, itemsize = setting.prompt_tokens, setting.itemsize
    forward = shapes.pass_flops(tokens)
    forward_bytes = shapes.pass_bytes(tokens, itemsize, eager=setting.writes_attention(shapes))
    flops, size, cache = _answer(shapes, setting, MAX_NEW_TOKENS)
    # The embedding, and after it three sites of each layer.
    recorded = (3 * shapes.n_layers + 1) * shapes.d_model * _FLOAT32
    yield Need(
        "record",
        setting.batch,
        forward + flops,
        forward_bytes + recorded,
        # Answers have batches of their own.
        other_bytes=setting.batch * (size + cache),
        disk_bytes=setting.prompts * recorded,
    )
    states = shapes.n_layers * shapes.n_heads * shapes.d_head + 2 * shapes.d_model
    yield Need(
        "attribute",
        min(BATCH_SIZE, setting.at_once(setting.batch_tokens), setting.prompts),
        forward + shapes.sweep_flops() + shapes.unembedding_flops,
        forward_bytes,
        other_bytes=shapes.sweep_bytes(setting.prompts, itemsize),
        # Those of each prompt, and those that are put in their place.
        kept_bytes=2 * setting.prompts * states * itemsize,
    )


def _dial_step(shapes: Shapes, setting: Setting) -> Need:
    from interp.teacher_forcing import TOKENS_AT_ONCE
    from interventions.fitting.scale_data import LONGEST_TEXT, guard_count
    from interventions.fitting.scale_training import ScaleTraining

    training, tokens = ScaleTraining(), setting.prompt_tokens
    flops = training.conflicts * shapes.training_flops(tokens, 1, 1, guarded=False)
    with_context = guard_count("aligned", training.guards) + guard_count("irrelevant", training.guards)
    for count, longest, predicted in (
        (with_context, tokens, 1),
        (guard_count("none", training.guards), _BARE_TOKENS, 1),
        (guard_count("neutral", training.guards), LONGEST_TEXT, LONGEST_TEXT - 1),
    ):
        flops += count * shapes.training_flops(longest, predicted, 3, guarded=True)
    return Need(
        "dial fit, step",
        min(training.conflicts, setting.at_once(TOKENS_AT_ONCE)),
        flops,
        shapes.pass_bytes(tokens, setting.itemsize, eager=setting.writes_attention(shapes)),
        shapes.training_bytes(tokens, setting.itemsize, eager=setting.writes_attention(shapes)),
        disk_bytes=_AVERAGES * (shapes.n_layers * shapes.n_heads) ** 2 * _FLOAT32,
    )


def _answer(shapes: Shapes, setting: Setting, longest: int, *, alone: bool = False) -> tuple[int, int, int]:
    """FLOPs, bytes, and bytes of keys and values, of an answer.

    Prompts that are answered alone are not padded, and scores of their steps are not kept.
    """
    tokens, new = setting.prompt_tokens, setting.new_tokens or longest
    scores = shapes.d_vocab * _FLOAT32 * (_CHOOSING + (0 if alone else new))
    read = shapes.pass_bytes(tokens, setting.itemsize, eager=setting.writes_attention(shapes), padded=not alone)
    return shapes.answer_flops(tokens, new), read + scores, shapes.cache_bytes(tokens + new, setting.itemsize)


def device_bytes(shapes: Shapes, need: Need, itemsize: int, devices: int = 1) -> int:
    """Count what a command takes on one of some devices, weights included.

    Blocks are spread evenly over devices and none is split, so that each holds the largest tensors of a whole batch.

    Args:
        shapes: The model.
        need: What the command takes.
        itemsize: Bytes of a number of the model.
        devices: How many there are.
    """
    batch = need.batch * _prompt_bytes(shapes, need, devices)
    return weight_bytes(shapes, itemsize, devices) + need.kept_bytes + max(need.other_bytes, batch)


def devices_needed(shapes: Shapes, need: Need, itemsize: int, memory: int) -> int | None:
    """Count the devices that a command needs; ``None`` where its batch does not fit beside a single block.

    Args:
        shapes: The model.
        need: What the command takes.
        itemsize: Bytes of a number of the model.
        memory: Bytes of one device.
    """
    counts = range(1, shapes.n_layers + 1)
    return next((n for n in counts if device_bytes(shapes, need, itemsize, n) <= memory), None)


def largest_batch(shapes: Shapes, need: Need, itemsize: int, memory: int, devices: int = 1) -> int:
    """Count the prompts of a command that fit into one batch at most; 0 if none does.

    Args:
        shapes: The model.
        need: What the command takes.
        itemsize: Bytes of a number of the model.
        memory: Bytes of one device.
        devices: How many there are.
    """
    free = memory - need.kept_bytes - weight_bytes(shapes, itemsize, devices)
    return max(0, free // _prompt_bytes(shapes, need, devices)) if need.other_bytes <= free else 0


def _prompt_bytes(shapes: Shapes, need: Need, devices: int) -> int:
    """What a prompt of a batch takes on the fullest of some devices."""
    blocks = -(-shapes.n_layers // devices)
    return need.prompt_bytes + need.layer_bytes * blocks // shapes.n_layers
