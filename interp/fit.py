"""Compare what follows from a blueprint with a model's own forward pass.

Twice. A small random copy of the model, in float64, says whether the blueprint is right: there a wrong factor or a
forgotten term is a large number, and rounding is none. The loaded model itself, in its own dtype, says whether that
holds for its weights and its size: rounding allows no more there than to see that nothing is missing.

Of every layer: the stream that enters, what attention and the MLP add and the stream that leaves; what each head adds,
and that all heads together are what attention gives; that norms are of the kind that is said; that what is changed of
what attention and the MLP write arrives in the stream. Of the small copy also that heads are heads: a change of a
value at one token moves the outputs of the heads that share it by their attention weights, and no other head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy, Blueprint, Part
from interp.inputs import padded
from interp.small import LENGTH, Misfit, random_ids, small_copy

Role = Literal["query", "key", "value"]
_CHANGED_AT = 2
# How far apart, relative to their size, what is computed in two ways may lie.
_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Norms and attention weights are computed in float32 in many models of higher precision.
_LOWEST_OF_NORMS = 1e-5

_SAID = {
    "blocks": "what block {} reads is not the stream that the one before left",
    "stream": "the stream after block {} is not what was there, and what attention and MLP add",
    "step": "the stream after block {} is not what follows from what enters it and from what attention adds",
    "edits": "a change of what attention or MLP writes in block {} does not arrive in its stream",
    "attention": "what attention of block {} adds is not what follows from its heads",
    "heads": "the heads of block {} do not add up to what attention gives",
    "mlp": "what the MLP of block {} adds is not what follows from the stream",
    "mlp output": "the last linear map of the MLP of block {} does not give what the MLP gives",
    "reading": "attention of block {} does not read the stream through the norm that it should",
    "norms": "a norm of block {} computes something else than its kind says",
    "final norm": "the norm after block {} computes something else than its kind says",
    "logits": "the logits are not what follows from the stream after block {}",
    "body": "the model without its unembedding gives another stream after block {}",
    "padding": "a prompt that is padded gets other logits than alone",
    "cache": "a prompt that goes on from the keys and values of its beginning gets other logits than in one pass",
}


@dataclass
class Fit:
    """How far a model's own numbers lie from what follows from a blueprint.

    Attributes:
        small: The largest relative error of each comparison, of the small copy in float64.
        own: The median over tokens of each, in the worst layer, of the model itself in its own dtype.
        n_heads: How many heads of the small copy were seen to be heads.
    """

    small: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    n_heads: int = 0


def checked(network: Any, blueprint: Blueprint) -> Fit:
    """Compare what follows from a blueprint with a model's own forward passes.

    Args:
        network: A transformers causal language model.
        blueprint: What it is said to look like.

    Returns:
        The errors, all within what rounding explains.

    Raises:
        Misfit: If anything is not as the blueprint says; the message is a part of a sentence that says what.
        UserError: If the blueprint refuses such a model.
    """
    fit, small = Fit(), small_copy(network)
    anatomy = Anatomy(small, blueprint)
    _check_paths(anatomy)
    prompts = [random_ids(small, seed, length)[0].tolist() for seed, length in ((2, LENGTH), (3, LENGTH - 3))]
    for prompt in prompts:
        for noise in (0.0, 0.5):
            _keep_worst(fit.small, _errors(anatomy, [prompt], noise))
    fit.n_heads = _check_heads(anatomy)
    _check_padding(small.float(), blueprint, prompts)
    whole = Anatomy(network, blueprint)
    for seed, length in ((4, 12), (5, 8)):
        prompt = random_ids(network, seed, length)[0].tolist()
        _keep_worst(fit.own, _errors(whole, [prompt], 0.0, of_tokens="median"))
    return fit


def equal(found: Tensor, expected: Tensor, limit: float = 1e-9) -> bool:
    """Whether two tensors are of one shape and the same but for rounding."""
    if found.shape != expected.shape:
        return False
    return bool((found.double() - expected.double()).norm() <= limit * expected.double().norm())


def _check_paths(anatomy: Anatomy) -> None:
    """See that all that a blueprint names is there."""
    blueprint, layers = anatomy.blueprint, range(anatomy.n_layers)
    paths = [blueprint.embedding, blueprint.final_norm, blueprint.unembedding]
    paths += [anatomy.path(part, layer) for layer in layers for part in anatomy.parts]
    paths += [f"{anatomy.path('block', layer)}.{step}" for layer in layers for step in blueprint.mlp_steps]
    for path in paths:
        try:
            anatomy.model.get_submodule(path)
        except AttributeError as error:
            raise Misfit(f"it has no {path}") from error


class _Pass:
    """What a forward pass keeps: by part and layer, ``(n, n_tokens, width)``."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Tensor], noise: float) -> None:
        self.anatomy, self.given, self.gave = anatomy, {}, {}
        self.wrote: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as hooks, torch.inference_mode():
            for key, module in self._modules().items():
                hooks.callback(module.register_forward_pre_hook(self._keep_given(key), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._keep_gave(key)).remove)
            for layer in range(anatomy.n_layers):
                for part in ("attention", "mlp"):
                    see = self._keep_written(part, layer, noise)
                    hooks.callback(anatomy.on_output(anatomy.writing_part(part), layer, see).remove)
            self.logits: Tensor = anatomy.model(**inputs, use_cache=False).logits

    def _modules(self) -> dict[tuple[str, int], nn.Module]:
        anatomy = self.anatomy
        parts: list[Part] = [part for part in anatomy.parts if part != "key"]
        found = {(part, layer): anatomy.module(part, layer) for layer in range(anatomy.n_layers) for part in parts}
        for layer in range(anatomy.n_layers):
            if (path := anatomy.mlp_output_path(layer)) is not None:
                found["mlp_output", layer] = anatomy.model.get_submodule(path)
        found["final_norm", 0] = anatomy.final_norm
        return cast("dict[tuple[str, int], nn.Module]", found)

    def _keep_given(self, key: tuple[str, int]) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not given and "hidden_states" not in named:
                raise Misfit(f"{key[0]} of block {key[1]} is given nothing that is called hidden_states")
            self.given[key] = (given[0] if given else named["hidden_states"]).clone()

        return hook

    def _keep_gave(self, key: tuple[str, int]) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.gave[key] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def _keep_written(self, part: str, layer: int, noise: float) -> Callable[[Tensor], Tensor | None]:
        def see(values: Tensor) -> Tensor | None:
            generator = torch.Generator().manual_seed(layer)
            # Where nothing is to be changed nothing is put back.
            moved = noise * torch.randn(values.shape, generator=generator, dtype=values.dtype) if noise else None
            # Not copied: what is written over later is wrong then, if the blueprint does not say so.
            self.wrote[part, layer] = values if moved is None else values + moved
            return None if moved is None else self.wrote[part, layer].clone()

        return see


def _errors(
    anatomy: Anatomy, prompts: Sequence[Sequence[int]], noise: float, *, of_tokens: Literal["max", "median"] = "max"
) -> dict[str, float]:
    """Relative errors of every comparison in one pass, the worst of all layers.

    Args:
        anatomy: The model with the blueprint.
        prompts: Token ids; they are padded to one length.
        noise: How much is added to what attention and MLPs write.
        of_tokens: Whether the worst token counts, or the median one: with rounding, an expert more or less is no
            fault of the blueprint.

    Raises:
        Misfit: If one is larger than rounding explains.
    """
    inputs = padded(anatomy.model, prompts)
    seen, real = _Pass(anatomy, inputs, noise), inputs["attention_mask"].bool()
    found: dict[str, float] = {}
    dtype = seen.given["block", 0].dtype
    limit = _LIMITS[torch.bfloat16] if anatomy.is_quantised else _LIMITS.get(dtype, _LIMITS[torch.bfloat16])

    def compare(name: str, layer: int, one: Tensor, other: Tensor, scale: Tensor | None = None) -> None:
        expected = other.reshape(*real.shape, -1)[real.to(other.device)].double()
        difference = one.to(other.device).reshape(*real.shape, -1)[real.to(other.device)].double() - expected
        size = expected.norm(dim=-1)
        if scale is not None:
            # Rounding of a large stream is not rounding of the little that is added to it.
            rounding = 8 * torch.finfo(dtype).eps / limit
            size = scale.reshape(*real.shape, -1)[real.to(other.device)].double().norm(dim=-1) + rounding * size
        errors = difference.norm(dim=-1) / size.clamp(min=1e-30)
        error = float(errors.max() if of_tokens == "max" else errors.median())
        found[name] = max(found.get(name, 0.0), error)
        if not error <= (max(limit, _LOWEST_OF_NORMS) if "norm" in name else limit):
            raise Misfit(f"{_SAID[name].format(layer)} (off by {error:.2g} of it)")

    with torch.inference_mode():
        for layer in range(anatomy.n_layers):
            if noise:
                _compare_sum(anatomy, seen, layer, compare, "edits")
            else:
                _compare_block(anatomy, seen, layer, compare)
        if not noise:
            _compare_ends(anatomy, seen, inputs, compare)
    return found


def _compare_sum(anatomy: Anatomy, seen: _Pass, layer: int, compare: Callable[..., None], name: str) -> None:
    """What a block adds is what attention and MLP were seen to write, also where that was changed."""
    before, after = seen.given["block", layer], seen.gave["block", layer]
    added = anatomy.residual_multiplier * (seen.wrote["attention", layer] + seen.wrote["mlp", layer])
    compare(name, layer, before.to(added.device) + added, after, added)


def _compare_block(anatomy: Anatomy, seen: _Pass, layer: int, compare: Callable[..., None]) -> None:
    """What enters a block, what its parts read and write, and what leaves it."""
    z = seen.given["output_projection", layer].unflatten(-1, (anatomy.n_heads, anatomy.d_head))
    before = seen.given["block", layer].to(z.device)
    if layer:
        compare("blocks", layer, seen.gave["block", layer - 1], before)
    heads, bias = anatomy.head_outputs(layer, z), anatomy.output_bias(layer)
    gave = heads.sum(-2) if bias is None else heads.sum(-2) + bias
    compare("heads", layer, gave, seen.gave["attention", layer])
    _compare_sum(anatomy, seen, layer, compare, "stream")
    write, factor = anatomy.attention_write(layer, z), anatomy.residual_multiplier
    compare("attention", layer, write, factor * seen.wrote["attention", layer])
    parts, bias_write = anatomy.head_writes(layer, z)
    compare("norms", layer, parts.sum(-2) + bias_write, write)
    stream = before if anatomy.parallel else before + write
    compare("mlp", layer, anatomy.mlp_write(layer, stream), factor * seen.wrote["mlp", layer])
    compare("step", layer, anatomy.step(layer, before, write), seen.gave["block", layer], write)
    _check_widths(anatomy, seen, layer)
    if ("mlp_output", layer) in seen.gave:
        compare("mlp output", layer, seen.gave["mlp_output", layer], seen.gave["mlp", layer])
    for part in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"):
        if part in anatomy.parts:
            _compare_norm(anatomy, anatomy.module(part, layer), seen, (part, layer), compare)
    has_norm = "attention_norm" in anatomy.parts
    compare("reading", layer, seen.given["attention_norm", layer] if has_norm else before, before)
    read = seen.gave["attention_norm", layer] if has_norm else before
    compare("reading", layer, read, seen.given["query", layer])


def _check_widths(anatomy: Anatomy, seen: _Pass, layer: int) -> None:
    """See that the numbers of key-value heads and of neurons are those of the configuration that are named."""
    of_heads = {anatomy.n_kv_heads, anatomy.n_kv_heads + anatomy.n_heads, 2 * anatomy.n_kv_heads + anatomy.n_heads}
    width, d_mlp = seen.gave["value", layer].shape[-1], seen.given.get(("mlp_output", layer))
    if width not in {anatomy.d_head * count for count in (*of_heads, 2 * anatomy.n_kv_heads)}:
        raise Misfit(
            f"values of block {layer} are among {width} numbers, not of {anatomy.n_kv_heads} heads of {anatomy.d_head}"
        )
    if d_mlp is not None and d_mlp.shape[-1] != anatomy.d_mlp:
        raise Misfit(f"the MLP of block {layer} has {d_mlp.shape[-1]} neurons, not {anatomy.d_mlp}")


def _compare_norm(
    anatomy: Anatomy, norm: nn.Module, seen: _Pass, key: tuple[str, int], compare: Callable[..., None]
) -> None:
    """A norm is its gain times what it scales, plus its bias."""
    given, bias = seen.given[key], getattr(norm, "bias", None)
    values = anatomy._centred(given).to(given.dtype) * anatomy._norm_gain(norm, given)
    name, layer = ("final norm", anatomy.n_layers - 1) if key[0] == "final_norm" else ("norms", key[1])
    compare(name, layer, values if bias is None else values + bias, seen.gave[key])


def _compare_ends(anatomy: Anatomy, seen: _Pass, inputs: Mapping[str, Tensor], compare: Callable[..., None]) -> None:
    """What is after the blocks: final norm, logits, and the pass of the body alone."""
    last, final = anatomy.n_layers - 1, seen.given["final_norm", 0]
    compare("blocks", last + 1, seen.gave["block", last], final)
    _compare_norm(anatomy, anatomy.final_norm, seen, ("final_norm", 0), compare)
    compare("logits", last, anatomy.logits(final), seen.logits)
    kept: list[Tensor] = []
    handle = anatomy.final_norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        anatomy.body(**inputs, use_cache=False)
    finally:
        handle.remove()
    compare("body", last, kept[0], final)


def _check_padding(small: Any, blueprint: Blueprint, prompts: Sequence[Sequence[int]]) -> None:
    """Prompts of two lengths together are what each is alone; in float32, as float64 has no numbers at padding.

    At once, and in two passes of which the second goes on from keys and values that the first one kept.
    """
    anatomy, inputs = Anatomy(small, blueprint), padded(small, prompts)
    _errors(anatomy, prompts, 0.0)
    before = {name: values[:, :-1] for name, values in inputs.items()}
    last = {name: values if name == "attention_mask" else values[:, -1:] for name, values in inputs.items()}
    with torch.inference_mode():
        together = small(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        cache = anatomy.body(**before, use_cache=True).past_key_values
        continued = small(**last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        alone = torch.cat([small(**padded(small, [prompt]), use_cache=False).logits[:, -1] for prompt in prompts])
    for name, found in (("padding", together), ("cache", continued)):
        if not equal(found, alone, 1e-3):
            raise Misfit(_SAID[name])


def _keep_worst(found: dict[str, float], more: Mapping[str, float]) -> None:
    for name, error in more.items():
        found[name] = max(found.get(name, 0.0), error)


# Heads


def _check_heads(anatomy: Anatomy) -> int:
    """See that queries, keys and values are those of the heads whose outputs the output projection reads.

    Returns:
        How many heads there are in all layers.
    """
    for layer in range(anatomy.n_layers):
        modules = {role: anatomy.module(role, layer) for role in get_args(Role)}
        ends = anatomy.module("output_projection", layer), anatomy.attention_module(layer)
        found: dict[Role, list[tuple[int, ...]]] = {}
        for module in dict.fromkeys(modules.values()):
            roles = head_roles(anatomy.model, module, *ends, anatomy.n_heads)
            found |= {role: heads for role, heads in roles.items() if modules[role] is module}
        if missing := modules.keys() - found.keys():
            role = min(missing)
            raise Misfit(f"{anatomy.path(role, layer)} does not make the {role} of heads")
        if len(found["value"]) != anatomy.n_kv_heads:
            raise Misfit(f"block {layer} has {len(found['value'])} key-value heads, not {anatomy.n_kv_heads}")
    return len(anatomy.heads)


def head_roles(
    network: Any, module: nn.Module, projection: nn.Module, attention: nn.Module, n_heads: int
) -> dict[Role, list[tuple[int, ...]]]:
    """Say what a linear map makes of heads: queries, keys, values, all of them, or nothing.

    Each part of its output that is as wide as a head is changed at one token, in a row of a batch. A query changes
    attention weights at that token alone, a key also at later ones, a value none, but outputs of heads.

    Args:
        network: A small model in float64.
        module: The linear map.
        projection: The output projection after it, whose input is the heads' outputs side by side.
        attention: The module whose second output are attention weights.
        n_heads: Number of heads.

    Returns:
        By role, for each of its parts in order, the heads that it acts on.

    Raises:
        Misfit: If outputs of heads are not values weighted by attention, or heads are in another order.
    """
    z, weights, width = _heads_seen(network, module, projection, attention, None)
    d_head = z.shape[-1] // n_heads
    if width % d_head or weights is None:
        return {}
    change = 3 * torch.randn(width // d_head, d_head, generator=torch.Generator().manual_seed(6), dtype=z.dtype)
    z, weights, _ = _heads_seen(network, module, projection, attention, change)
    z = z.unflatten(-1, (n_heads, d_head))
    if weights.shape[1] != n_heads:
        raise Misfit(f"it has attention weights of {weights.shape[1]} heads, not {n_heads}")
    moved_z, moved = z[1:] - z[0], weights[1:] - weights[0]
    found: dict[Role, list[tuple[int, ...]]] = {}
    for part in range(len(change)):
        by_head = {"z": moved_z[part].abs().amax((0, 2)), "weights": moved[part].abs().amax((1, 2))}
        acted = {name: tuple(torch.nonzero(size > 1e-6)[:, 0].tolist()) for name, size in by_head.items()}
        later = moved[part][:, _CHANGED_AT + 1 :].abs().max() > 1e-6
        if acted["weights"]:
            found.setdefault("key" if later else "query", []).append(acted["weights"])
        elif moved_z[part][_CHANGED_AT + 1 :].abs().max() > 1e-6:
            heads = list(acted["z"])
            expected = weights[0, heads, :, _CHANGED_AT].T[..., None] * change[part]
            if not equal(moved_z[part][:, heads], expected, 1e-6):
                raise Misfit("outputs of its heads are not values of tokens, weighted by the attention of these heads")
            found.setdefault("value", []).append(acted["z"])
    for role, heads in found.items():
        _check_order(role, heads, n_heads)
    return found


def _check_order(role: Role, heads: list[tuple[int, ...]], n_heads: int) -> None:
    shared = n_heads // len(heads)
    if shared * len(heads) != n_heads:
        raise Misfit(f"{len(heads)} parts of its linear maps act as the {role} of heads, which {n_heads} cannot share")
    for number, acted in enumerate(heads):
        own = tuple(range(number * shared, (number + 1) * shared))
        # A norm over all heads makes every query and key depend on all of them.
        if acted != own and (role == "value" or acted != tuple(range(n_heads))):
            raise Misfit(
                f"{role} {number} acts on heads {list(acted)}, not {list(own)}: heads are in another order, or not "
                "apart, where its output projection reads them"
            )


def _heads_seen(
    network: Any, module: nn.Module, projection: nn.Module, attention: nn.Module, change: Tensor | None
) -> tuple[Tensor, Any, int]:
    """Heads' outputs, attention weights and the width of ``module``, of a row as it is and one for each change."""
    kept: dict[str, Any] = {}
    rows = 1 if change is None else 1 + len(change)

    def changed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept["width"] = output.shape[-1]
        if change is None:
            return output
        values = output.clone().reshape(rows, LENGTH, *change.shape)
        for part, added in enumerate(change):
            values[part + 1, _CHANGED_AT, part] += added
        return values.reshape(output.shape)

    handles = [
        module.register_forward_hook(changed),
        projection.register_forward_pre_hook(lambda _, given: kept.update(z=given[0].reshape(rows, LENGTH, -1))),
        attention.register_forward_hook(lambda _, __, output: kept.update(weights=output[1])),
    ]
    try:
        with torch.inference_mode():
            network(input_ids=random_ids(network, 0).expand(rows, -1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept["z"], kept["weights"], kept["width"]
