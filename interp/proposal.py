"""Propose the blueprint of an architecture that is not known, from what its modules are seen to do.

Names of modules say little; a forward pass says all. A small random copy of the model (see ``interp.small``) runs in
float64, and everything that every module reads and gives is kept. In float64 equal means equal, so:

1. The blocks are the list of modules of which each reads what the one before gave.
2. The output projection is the first linear map of a block that reads something of other tokens. Query, key and value
   are the linear maps before it, told apart by what a change of them does to attention weights and to heads.
3. What the MLP writes is whatever the block adds besides what attention writes, both after a norm or not, both times
   one factor.
4. What attention and MLP read is the residual stream or a norm of it; the kind of norm is the formula that gives
   its output.

Nothing here is taken on trust: ``interp.fit`` compares what follows from the blueprint with the model's own pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp.anatomy import BLUEPRINTS, UNSUPPORTED, Blueprint, NormKind, unknown_architecture
from interp.errors import Caution, UserError
from interp.fit import Fit, checked, equal, head_roles
from interp.small import Misfit, random_ids, small_copy

_PROPOSED: dict[str, Blueprint] = {}
_NORMS: dict[NormKind, tuple[bool, int]] = {"layer": (True, 0), "rms": (False, 0), "rms_plus_one": (False, 1)}
"""Whether each kind of norm centres, and what it adds to its weight."""
# Words in names of factors on logits.
_OF_LOGITS = ("logit", "lm_head")
# Layers may have a dense MLP or experts.
_OF_DENSE_OR_EXPERTS = ("mlp_output", "mlp_activation", "mlp_experts", "d_mlp")


def adopt(network: Any) -> Fit | None:
    """Make the architecture of a model known for this process, if it is not: by a proposal that fits the model.

    A proposal is made from one configuration, so that it is compared with every later model of the architecture again.

    Args:
        network: A transformers causal language model.

    Returns:
        How well the proposal fits, or ``None`` if the architecture was known without one.

    Raises:
        UserError: If no blueprint can be proposed, or the proposed one does not fit; the message says what did not.
    """
    name = type(network).__name__
    if name in UNSUPPORTED:
        raise UserError(unknown_architecture(name))
    if name in BLUEPRINTS and not is_proposed(name):
        return None
    try:
        blueprint = BLUEPRINTS.get(name) or proposed(network)
        fit = checked(network, blueprint)
    except UserError:
        raise
    # Whatever an unknown model stumbles over when it is looked into.
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"The model is not as another {name} that was loaded before it: {reason}; load it in a process of its own."
            if is_proposed(name)
            else f"The architecture {name} is not known, and no blueprint that is proposed from its modules fits it: "
            f"{reason}; give one with --blueprint, or choose another model."
        ) from error
    if not is_proposed(name):
        BLUEPRINTS[name] = _PROPOSED[name] = blueprint
        warnings.warn(
            Caution(
                f"The architecture {name} is not known here; a blueprint that is proposed from its modules reproduces "
                "its forward pass, and is used: see it with `conflictscope doctor MODEL`."
            ),
            stacklevel=4,
        )
    return fit


def is_proposed(architecture: str) -> bool:
    """Whether what is known of an architecture was proposed in this process."""
    return architecture in _PROPOSED and BLUEPRINTS.get(architecture) is _PROPOSED[architecture]


def written(architecture: str, blueprint: Blueprint) -> dict[str, Any]:
    """Write a blueprint down as ``interp.blueprints`` reads it: its fields, without those that are as usual."""
    usual = {field.name: field.default for field in fields(Blueprint) if field.default is not MISSING}
    given = {name: value for name, value in asdict(blueprint).items() if name not in usual or value != usual[name]}
    return {"architecture": architecture, "fields": given}


def proposed(network: Any) -> Blueprint:
    """Propose a blueprint for the architecture of a model.

    Args:
        network: A transformers causal language model. Only its class, its configuration and its module tree are
            looked at, not its weights.

    Returns:
        A blueprint without variants, for this configuration.

    Raises:
        Misfit: If its modules do something that a blueprint cannot say.
    """
    return _Proposal(small_copy(network)).blueprint()


class _Call(NamedTuple):
    """One call of a module: what it read and gave, ``(n_tokens, width)`` both.

    Attributes:
        path: Module path in the model.
        module: The module.
        given: Its first input, copied.
        output: Its first output, copied.
        weights: Its second output, where that is attention weights.
        later: Its first output as it was when the pass ended.
    """

    path: str
    module: nn.Module
    given: Tensor
    output: Tensor
    weights: Tensor | None
    later: Tensor


def _calls(network: Any, ids: Tensor) -> list[_Call]:
    """All calls of modules in a pass, in the order in which they end; calls without tensors are left out."""
    calls: list[_Call] = []
    handles = []
    for path, module in network.named_modules():
        given: list[Tensor | None] = []

        def note(_: nn.Module, args: Any, named: Any, given: list[Tensor | None] = given) -> None:
            first = args[0] if args else named.get("hidden_states")
            given.append(first.detach().clone() if isinstance(first, Tensor) else None)

        def keep(module: nn.Module, _: Any, output: Any, path: str = path, given: Any = given) -> None:
            read, first = given.pop(), output[0] if isinstance(output, tuple) else output
            second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            is_weights = isinstance(second, Tensor) and second.ndim == 4
            if isinstance(read, Tensor) and isinstance(first, Tensor) and first.is_floating_point():
                copied = first.detach().clone()
                calls.append(_Call(path, module, read, copied, second if is_weights else None, first))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        handles.append(module.register_forward_hook(keep))
    try:
        with torch.inference_mode():
            network(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, with its weight as ``(d_out, d_in)`` or, as GPT-2 has it, ``(d_in, d_out)``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _is(found: Tensor, expected: Tensor) -> bool:
    return equal(_rows(found), _rows(expected))


def _norm_kind(call: _Call) -> NormKind | None:
    """The kind of norm that a module is, or ``None``."""
    weight, x = getattr(call.module, "weight", None), _rows(call.given)
    epsilon = next((v for n in ("eps", "variance_epsilon") if (v := getattr(call.module, n, None)) is not None), None)
    bias = getattr(call.module, "bias", None)
    if not isinstance(weight, Tensor) or epsilon is None or weight.shape != x.shape[-1:]:
        return None
    for kind, (centres, offset) in _NORMS.items():
        values = x - x.mean(-1, keepdim=True) if centres else x
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * (weight + offset)
        # Many compute norms in float32, whatever the model's dtype.
        if equal(normed if bias is None else normed + bias, _rows(call.output), 1e-5):
            return kind
    return None


class _Wrote(NamedTuple):
    """What one block adds to the residual stream, and from where.

    Attributes:
        attention_post_norm: The norm after attention, if any.
        mlp: What gives what the MLP writes, before any post norm.
        mlp_post_norm: The norm after the MLP, if any.
        factor: What both are multiplied with.
        after_attention: The stream with what attention adds.
    """

    attention_post_norm: _Call | None
    mlp: _Call
    mlp_post_norm: _Call | None
    factor: float
    after_attention: Tensor


class _Proposal:
    """One forward pass of a small copy, and what it says of the blocks.

    Raises:
        Misfit: If the pass has no such blocks, or they do what a blueprint cannot say.
    """

    def __init__(self, network: Any) -> None:
        self.network, self.config = network, network.config
        self.calls = _calls(network, random_ids(network, 0))
        self.blocks, self.of_blocks = self._found_blocks()
        self.norm_kinds: set[NormKind] = set()

    def blueprint(self) -> Blueprint:
        """The blueprint of the pass."""
        attention = self._attention()
        per_layer = [self._block(layer, attention) for layer in range(len(self.of_blocks))]
        first = {**per_layer[0]}
        for layer, found in enumerate(per_layer):
            for name, value in found.items():
                if name in ("overwritten", "flat"):
                    first[name] = tuple(dict.fromkeys([*first[name], *value]))
                elif first[name] is None and name in _OF_DENSE_OR_EXPERTS:
                    first[name] = value
                elif value != first[name] and not (value is None and name in _OF_DENSE_OR_EXPERTS):
                    raise Misfit(f"its blocks differ: {name} is {first[name]} in one, {value} in block {layer}")
        if first["d_mlp"] is None:
            del first["d_mlp"]
        whole = self._outside()
        if len(self.norm_kinds) > 1:
            raise Misfit(f"it has norms of {len(self.norm_kinds)} kinds, {' and '.join(sorted(self.norm_kinds))}")
        factor = self._name_of(first.pop("factor"), "what attention and MLP add", ("resid",))
        found = {**attention, **first, **whole, "blocks": self.blocks, "residual_multiplier": factor}
        return Blueprint(**found, norm=next(iter(self.norm_kinds)))

    def _found_blocks(self) -> tuple[str, list[_Call]]:
        by_path: dict[str, list[_Call]] = {}
        for call in self.calls:
            by_path.setdefault(call.path, []).append(call)
        for path, module in self.network.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) != self.config.num_hidden_layers:
                continue
            found = [by_path.get(f"{path}.{layer}", []) for layer in range(len(module))]
            if any(len(calls) > 1 for calls in found):
                raise Misfit("it runs its blocks more than once")
            if not all(found):
                continue
            blocks = [calls[0] for calls in found]
            for layer, (one, other) in enumerate(pairwise(blocks)):
                if not _is(one.output, other.given):
                    raise Misfit(f"block {layer + 1} reads something else than the stream after block {layer}")
            return path, blocks
        raise Misfit(f"no list of {self.config.num_hidden_layers} blocks, each of which reads a residual stream, runs")

    def _inside(self, layer: int) -> Iterator[_Call]:
        """The calls inside a block, with paths relative to it."""
        start = f"{self.blocks}.{layer}."
        for call in self.calls:
            if call.path.startswith(start):
                yield call._replace(path=call.path.removeprefix(start))

    # Attention

    def _attention(self) -> dict[str, Any]:
        """The fields about attention, by the first block; the others are compared later."""
        inside = list(self._inside(0))
        projection = self._output_projection(inside)
        holders = [c for c in inside if projection.path.startswith(f"{c.path}.")]
        same = [c for c in holders if _is(c.output, projection.output)]
        attention = min([*same, projection], key=lambda call: call.path.count("."))
        with_weights = [c for c in holders if c.weights is not None]
        if not with_weights:
            raise Misfit("it has no attention that gives its heads' weights")
        weights = min(with_weights, key=lambda call: call.path.count("."))
        roles = self._roles(inside, projection, weights)
        query, key, value = (roles[role][0] for role in ("query", "key", "value"))
        kv = len(roles["value"][1])
        return {
            "attention": attention.path,
            "attention_weights": None if weights.path == attention.path else weights.path,
            "query": query,
            "key": key,
            "value": value,
            "output_projection": projection.path,
            "n_kv_heads": self._kv_heads(kv),
        }

    def _output_projection(self, inside: list[_Call]) -> _Call:
        """The first linear map that reads of other tokens: at the last token its input changes with those before."""
        other = random_ids(self.network, 1)
        other[:, -1] = random_ids(self.network, 0)[:, -1]
        start = f"{self.blocks}.0."
        again = {call.path.removeprefix(start): call for call in reversed(_calls(self.network, other))}
        entered = again[f"{self.blocks}.0"].given
        if not equal(_rows(entered)[-1], _rows(self.of_blocks[0].given)[-1]):
            raise Misfit("its first block is given something of other tokens already")
        for call in inside:
            moved = call.path in again and not equal(_rows(again[call.path].given)[-1], _rows(call.given)[-1])
            if moved and is_linear(call.module):
                heads, width = self.config.num_attention_heads, call.given.shape[-1]
                d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
                if width != heads * d_head or call.output.shape[-1] != self.config.hidden_size:
                    raise Misfit(
                        f"{call.path}, the first map of block 0 that reads of other tokens, maps {width} numbers to "
                        f"{call.output.shape[-1]}, not {heads} heads of {d_head} to {self.config.hidden_size}"
                    )
                return call
        raise Misfit("no linear map of its first block reads of other tokens")

    def _roles(
        self, inside: list[_Call], projection: _Call, weights: _Call
    ) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
        """Which module gives queries, keys and values, and the heads that each part of it acts on."""
        found: dict[str, tuple[str, list[tuple[int, ...]]]] = {}
        start = f"{self.blocks}.0."
        before = inside[: next(i for i, call in enumerate(inside) if call.path == projection.path)]
        for call in before:
            if not is_linear(call.module):
                continue
            for role, heads in head_roles(
                self.network, call.module, projection.module, weights.module, self.config.num_attention_heads
            ).items():
                if role in found:
                    raise Misfit(f"{start}{found[role][0]} and {start}{call.path} both make its {role}")
                found[role] = (call.path, heads)
        if missing := [role for role in ("query", "key", "value") if role not in found]:
            raise Misfit(
                f"no linear map of its first block makes the {missing[0]} of heads, on which attention weights or the "
                "outputs of heads depend as they do in attention"
            )
        return found

    def _kv_heads(self, count: int) -> str | int:
        usual = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return "num_key_value_heads" if usual == count else self._field(count, ("kv", "key_value")) or count

    # What a block adds

    def _block(self, layer: int, attention: dict[str, Any]) -> dict[str, Any]:
        """The fields about one block's norms and MLP."""
        block, inside = self.of_blocks[layer], list(self._inside(layer))
        own = next((call for call in inside if call.path == attention["attention"]), None)
        reader = next((call for call in inside if call.path == attention["query"]), None)
        if own is None or reader is None:
            raise Misfit(f"block {layer} has no {attention['attention']} with {attention['query']}, as block 0 has")
        # Around what attention is made of, also where that gives something else than what it adds.
        holder = min(attention["attention_weights"] or own.path, own.path, key=lambda path: path.count("."))
        outside = [call for call in inside if call.path != holder and not call.path.startswith(f"{holder}.")]
        wrote = self._wrote(layer, block, own, outside)
        before = _rows(block.given)
        streams = {False: wrote.after_attention, True: before}
        attention_read = self._read_by(reader.given, inside, {True: before})
        if attention_read is None:
            raise Misfit(f"the attention of block {layer} reads neither the residual stream nor a norm of it")
        steps = [wrote.mlp]
        while (found := self._read_by(steps[0].given, outside, streams)) is None:
            earlier = [call for call in outside if _is(call.output, steps[0].given) and call.path != steps[0].path]
            if not earlier:
                raise Misfit(f"the MLP of block {layer} reads neither the residual stream nor a norm of it")
            steps.insert(0, min(earlier, key=lambda call: call.path.count(".")))
        mlp_norm, parallel = found
        parts = {
            "attention_norm": attention_read[0],
            "attention_post_norm": None if wrote.attention_post_norm is None else wrote.attention_post_norm.path,
            "mlp_norm": mlp_norm,
            "mlp": wrote.mlp.path,
            "mlp_post_norm": None if wrote.mlp_post_norm is None else wrote.mlp_post_norm.path,
            "mlp_steps": tuple(call.path for call in steps) if len(steps) > 1 else (),
        }
        seen = {"attention": own, "mlp": wrote.mlp, "attention_post_norm": wrote.attention_post_norm}
        seen["mlp_post_norm"] = wrote.mlp_post_norm
        self.norm_kinds |= {
            kind for part, call in seen.items() if "norm" in part and call and (kind := _norm_kind(call))
        }
        there = [(part, call) for part, call in seen.items() if call is not None]
        return {
            **parts,
            **self._inside_mlp(steps, inside),
            "parallel": parallel,
            "factor": round(wrote.factor, 9),
            "overwritten": tuple(part for part, call in there if not _is(call.later, call.output)),
            "flat": tuple(part for part, call in there if call.output.ndim == 2),
        }

    def _wrote(self, layer: int, block: _Call, own: _Call, outside: list[_Call]) -> _Wrote:
        """What the block adds: of attention and one other module, after norms or not, times one factor."""
        added, width = _rows(block.output) - _rows(block.given), block.given.shape[-1]
        from_attention = [(own, None)] + [(c, c) for c in outside if _is(c.given, own.output) and self._kind(c)]
        others = sorted(
            (c for c in outside if c.output.shape[-1] == width and not _is(c.output, c.given)),
            key=lambda call: call.path.count("."),
        )
        nearest = 1.0
        for one, post_norm in from_attention:
            for other in others:
                if one.output.shape[-1] != width or _rows(other.output).shape != added.shape:
                    continue
                both = _rows(one.output) + _rows(other.output)
                factor = ((both * added).sum() / both.square().sum()).item()
                off = ((added - factor * both).norm() / added.norm()).item()
                nearest = min(nearest, ((added - both).norm() / added.norm()).item())
                if off > 1e-9 or other.path == one.path:
                    continue
                after = _rows(block.given) + factor * _rows(one.output)
                makers = [c for c in outside if c.path != other.path and _is(c.output, other.given)]
                if makers and self._kind(other):
                    inner = min(makers, key=lambda call: call.path.count("."))
                    return _Wrote(post_norm, inner, other, factor, after)
                return _Wrote(post_norm, other, None, factor, after)
        raise Misfit(
            f"the stream after block {layer} is not what was there, and what attention and MLP add (off by "
            f"{nearest:.2g} of it)"
        )

    def _kind(self, call: _Call) -> bool:
        return _norm_kind(call) is not None

    def _read_by(self, read: Tensor, calls: list[_Call], streams: dict[bool, Tensor]) -> tuple[str | None, bool] | None:
        """The norm through which one of the streams is read, or ``None``, and which it is; ``None`` is none of them."""
        for which, stream in streams.items():
            if _is(read, stream):
                return None, which
        for call in calls:
            for which, stream in streams.items():
                if call.given.shape[-1] == stream.shape[-1] and _is(call.given, stream) and _is(call.output, read):
                    if (kind := _norm_kind(call)) is not None:
                        self.norm_kinds.add(kind)
                        return call.path, which
                    if not is_linear(call.module):
                        raise Misfit(f"{call.path} reads the stream and is no norm with a weight of a known kind")
        return None

    def _inside_mlp(self, steps: list[_Call], inside: list[_Call]) -> dict[str, Any]:
        """The last linear map of an MLP, its activation, its width and its experts."""
        mlp = steps[-1]
        own = [c for c in inside if any(c.path == s.path or c.path.startswith(f"{s.path}.") for s in steps)]
        last = next((c for c in own if is_linear(c.module) and _is(c.output, mlp.output)), None)
        width = None if last is None else last.given.shape[-1]
        neurons = [
            c.path
            for c in own
            if not is_linear(c.module) and not list(c.module.children()) and c.output.shape[-1] == width
            if not _is(c.output, c.given) and not self._kind(c)
        ]
        experts = [name for name, p in mlp.module.named_parameters() if p.ndim == 3]
        return {
            "mlp_output": None if last is None else last.path,
            "mlp_activation": neurons[0] if neurons else None,
            "mlp_experts": f"{mlp.path}.{experts[-1]}" if experts else None,
            "d_mlp": None if width is None else self._width_name(width),
        }

    def _width_name(self, width: int) -> str:
        usual = getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size
        name = "intermediate_size" if usual == width else self._field(width, ("inner", "ff", "intermediate", "mlp"))
        if name is None and 4 * self.config.hidden_size == width:
            return "n_inner"
        if name is None:
            raise Misfit(f"no setting of its configuration is the width of its MLP, {width}")
        return name

    # Outside the blocks

    def _outside(self) -> dict[str, Any]:
        """The fields about embedding, final norm, unembedding and logits."""
        paths = {module: path for path, module in self.network.named_modules()}
        embedding, unembedding = self.network.get_input_embeddings(), self.network.get_output_embeddings()
        if embedding not in paths or unembedding not in paths:
            raise Misfit("it has no embedding and unembedding that it names")
        logits = next(call for call in self.calls if call.path == paths[unembedding])
        final = _rows(self.of_blocks[-1].output)
        around = [c for c in self.calls if not c.path.startswith(f"{self.blocks}.") and list(c.module.children()) == []]
        norm = next((c for c in around if c.given.shape[-1] == final.shape[-1] and _is(c.given, final)), None)
        kind = None if norm is None else _norm_kind(norm)
        if norm is None or kind is None:
            raise Misfit("no norm between its last block and its unembedding reads the stream, or of a kind not known")
        self.norm_kinds.add(kind)
        return {
            "embedding": paths[embedding],
            "final_norm": norm.path,
            "unembedding": paths[unembedding],
            **self._logit_factor(norm, logits),
        }

    def _logit_factor(self, norm: _Call, unembedding: _Call) -> dict[str, Any]:
        module: Any = unembedding.module
        own = nn.functional.linear(_rows(norm.output), module.weight, module.bias)
        with torch.inference_mode():
            found = _rows(self.network(input_ids=random_ids(self.network, 0), use_cache=False).logits)
        cap = getattr(self.config, "final_logit_softcapping", None)
        found = found if cap is None else cap * torch.atanh(found / cap)
        factor = round(((own * found).sum() / own.square().sum()).item(), 9)
        if not equal(factor * own, found, 1e-6):
            raise Misfit("its logits are not its unembedding of its final norm, times a factor")
        if factor == 1:
            return {}
        if (name := self._field(factor, _OF_LOGITS)) is not None:
            return {"logit_multiplier": name}
        return {"logit_divisor": self._name_of(1 / factor, "the stream that logits are read from", _OF_LOGITS)}

    # Settings

    def _field(self, value: float, hints: tuple[str, ...]) -> str | None:
        """The name of the setting of this value whose name says what it is about."""
        settings = {**self.config.to_dict(), **{name: getattr(self.config, name) for name in self.config.attribute_map}}
        return next(
            (
                name
                for name, setting in settings.items()
                if isinstance(setting, float | int) and any(hint in name for hint in hints)
                if abs(setting - value) <= 1e-6 * abs(value)
            ),
            None,
        )

    def _name_of(self, factor: float, what: str, hints: tuple[str, ...]) -> str | None:
        if factor == 1:
            return None
        if (name := self._field(factor, hints)) is None:
            raise Misfit(f"{what} is times {factor:.4g}, or divided by it, which no setting of its configuration says")
        return name
