"""Sparse autoencoders (SAEs): a residual stream as a sum of few out of many features.

    x'   = x, or x normalised                              ("centred", "layer_norm", "constant_norm_rescale")
    pre  = (x' - b_dec) W_enc + b_enc                      without "- b_dec" where the SAE was trained so
    z    = activation(pre)                                 (..., d_sae), mostly zeros
    x    ~ z W_dec + b_dec, scaled back

This is a runtime of its own, which reads the formats of sae_lens and of EleutherAI's sparsify: an intervention that
edits features must run where sae_lens is not installed. Training is done by sae_lens (``probes.sae_training``).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.files import assets_directory, read_json

if TYPE_CHECKING:
    from torch import nn

Architecture = Literal["standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit"]
Normalization = Literal["none", "centred", "layer_norm", "constant_norm_rescale"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

_CONFIG = "cfg.json"
_SAE_LENS_WEIGHTS = "sae_weights.safetensors"
_SPARSIFY_WEIGHTS = "sae.safetensors"
_CARD = "card.json"

# Weights beside W_dec (d_sae, d_in) and b_dec (d_in,).
WEIGHT_NAMES: dict[Architecture, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "topk": ("W_enc", "b_enc"),
    "abstopk": ("W_enc", "b_enc"),
    # The dictionary that is pursued, W_dec transposed: it stays whole where W_dec holds some features only.
    "matching_pursuit": ("W_enc",),
}
# Whether each feature can be computed without the others.
SEPARATE: frozenset[Architecture] = frozenset({"standard", "gated", "jumprelu"})


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder of the residual stream after a block.

    Attributes:
        architecture: How features are activated.
        weights: ``W_enc`` ``(d_in, d_sae)``, ``W_dec`` ``(d_sae, d_in)``, ``b_dec`` ``(d_in,)``, and what else the
            architecture has: ``b_enc``, ``threshold``, ``b_gate``, ``b_mag``, ``r_mag``, each ``(d_sae,)``.
        layer: The block whose output it reads.
        k: Features that are active at once (``topk``, ``abstopk``).
        normalization: What is done to an input first, and undone to the reconstruction.
        subtracts_b_dec: Whether ``b_dec`` is taken off the input.
        residual_threshold: Where matching pursuit stops, as a norm.
        max_iterations: How many features matching pursuit takes at most; ``None`` is ``d_in``.
        stop_on_duplicate_support: Whether matching pursuit stops when an iteration brings no new feature.
        kept: The features that ``encode`` returns and ``W_dec`` has, if these are not all.
        name: What it was loaded from.
        card: What is known about its training and quality.

    Raises:
        UserError: If weights are missing, do not fit each other, or are not finite.
    """

    architecture: Architecture
    weights: Mapping[str, Tensor]
    layer: int
    k: int | None = None
    normalization: Normalization = "none"
    subtracts_b_dec: bool = True
    residual_threshold: float = 0.0
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True
    kept: tuple[int, ...] | None = None
    name: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = ("W_dec", "b_dec", *WEIGHT_NAMES[self.architecture])
        if missing := [name for name in wanted if name not in self.weights]:
            raise UserError(f"The {self.architecture} SAE {self.name} has no weights {missing[0]}; export it again.")
        for name in ("W_dec", "W_enc"):
            if (dimensions := self.weights[name].ndim) != 2:
                raise UserError(f"{name} of the SAE {self.name} has {dimensions} dimensions, not 2; export it again.")
        width = self.weights["W_dec"].shape[1]
        d_sae = self.weights["W_enc"].shape[-1]
        features = len(self.kept) if self.kept is not None else d_sae
        shapes = {"W_dec": (features, width), "W_enc": (width, d_sae), "b_dec": (width,)}
        for name in wanted:
            values, shape = self.weights[name], shapes.get(name, (d_sae,))
            if tuple(values.shape) != shape:
                raise UserError(
                    f"{name} of the SAE {self.name} has shape {tuple(values.shape)}, not {shape}; export it again."
                )
            if not values.isfinite().all():
                raise UserError(f"{name} of the SAE {self.name} holds NaN or infinity; train or export it again.")
        if self.architecture in ("topk", "abstopk") and not (self.k and 0 < self.k <= d_sae):
            raise UserError(f"The {self.architecture} SAE {self.name} needs k between 1 and {d_sae}, not {self.k}.")

    @property
    def d_in(self) -> int:
        """Width of the residual stream it reads."""
        return self.weights["W_dec"].shape[1]

    @property
    def d_sae(self) -> int:
        """How many features ``encode`` returns."""
        return len(self.weights["W_dec"])

    @property
    def site(self) -> str:
        """The transformer_lens site it reads."""
        return f"blocks.{self.layer}.hook_out"

    @property
    def digest(self) -> str:
        """A hash of all that decides what ``encode`` and ``decoded_change`` compute."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weights", "name", "card")}
        digest = hashlib.sha256(repr(sorted(about.items())).encode())
        for name, values in sorted(self.weights.items()):
            digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SparseAutoencoder:
        """The same autoencoder on another device, or with its weights in another dtype."""
        return replace(self, weights={name: values.to(device, dtype) for name, values in self.weights.items()})

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations of residual streams: ``(..., d_in)`` -> ``(..., d_sae)``, in the weights' dtype."""
        w = self.weights
        scaled, _ = self._scaled(x.to(w["W_dec"].dtype))
        if self.subtracts_b_dec:
            scaled = scaled - w["b_dec"]
        z = self._activations(scaled)
        # Where features compete all are needed to know which are active.
        return z[..., list(self.kept)] if self.kept is not None and self.architecture not in SEPARATE else z

    def decoded_change(self, change: Tensor, x: Tensor) -> Tensor:
        """What a change of feature activations changes in the residual stream: the decoder without its bias.

        Args:
            change: Differences of activations, ``(..., d_sae)``.
            x: The residual stream that was encoded, ``(..., d_in)``: where it was normalised the change is scaled back.

        Returns:
            ``(..., d_in)``.
        """
        _, scale = self._scaled(x.to(change.dtype))
        written = change @ self.weights["W_dec"]
        return written if scale is None else written * scale

    def reconstruct(self, x: Tensor) -> Tensor:
        """The residual stream as the features tell it: ``(..., d_in)`` -> ``(..., d_in)``."""
        given = x.to(self.weights["W_dec"].dtype)
        written = self.encode(x) @ self.weights["W_dec"]
        if self.architecture != "matching_pursuit" or self.subtracts_b_dec:
            written = written + self.weights["b_dec"]
        _, scale = self._scaled(given)
        if scale is not None:
            written = written * scale
        return written + given.mean(-1, keepdim=True) if self.normalization in ("centred", "layer_norm") else written

    def restricted(self, features: Sequence[int]) -> SparseAutoencoder:
        """The same autoencoder with some of its features only, in the given order; all else it does not need is gone.

        Where features compete for activation (top-k, matching pursuit), the whole encoder stays, to know
        which of them are active.

        Raises:
            UserError: If there is no such feature.
        """
        if outside := [i for i in features if not 0 <= i < self.d_sae]:
            raise UserError(f"The SAE {self.name} has no feature {outside[0]}; its features are 0 to {self.d_sae - 1}.")
        index = torch.tensor(list(features), dtype=torch.long, device=self.weights["W_dec"].device)
        chosen = dict(self.weights)
        chosen["W_dec"] = self.weights["W_dec"][index]
        if self.architecture in SEPARATE:
            for name in WEIGHT_NAMES[self.architecture]:
                chosen[name] = self.weights[name][..., index]
        kept = tuple(features if self.kept is None else (self.kept[i] for i in features))
        return replace(self, weights=chosen, kept=kept, card={})

    def check(self, model: nn.Module, name: str = "the model") -> None:
        """See that the autoencoder reads a site that ``model`` has, and, if it says so, that it was trained on it.

        Raises:
            UserError: If the layer does not exist, the width differs, or the weights it was trained on were others.
        """
        anatomy = Anatomy(model)
        if not 0 <= self.layer < anatomy.n_layers:
            raise UserError(
                f"The SAE {self.name} reads layer {self.layer}, but {name} has layers 0 to {anatomy.n_layers - 1}; "
                "give an SAE of this model."
            )
        if self.d_in != anatomy.d_model:
            raise UserError(
                f"The SAE {self.name} reads {self.d_in} numbers, but the residual stream of {name} has "
                f"{anatomy.d_model}; give an SAE of this model."
            )
        trained = self.card.get("model", {})
        dtype = str(anatomy.dtype).removeprefix("torch.")
        # In another dtype the same model has other bits; then width and layer are all that can be compared.
        if trained.get("dtype") != dtype:
            return
        from interp.fingerprints import fingerprint

        if trained.get("fingerprint") != fingerprint(model):
            raise UserError(
                f"The SAE {self.name} was trained on {trained.get('name')} with other weights than {name}; "
                "give an SAE of this model, or train one with `conflictscope sae train`."
            )

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input as the encoder wants it, and what a reconstruction is multiplied with."""
        if self.normalization == "centred":
            return x - x.mean(-1, keepdim=True), None
        if self.normalization == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / math.sqrt(self.d_in)
            return x / scale, scale
        if self.normalization == "layer_norm":
            centred = x - x.mean(-1, keepdim=True)
            scale = centred.std(-1, keepdim=True)
            return centred / (scale + 1e-5), scale
        return x, None

    def _activations(self, x: Tensor) -> Tensor:
        w = self.weights
        if self.architecture == "matching_pursuit":
            return self._pursued(x)
        pre = x @ w["W_enc"]
        if self.architecture == "gated":
            return (pre + w["b_gate"] > 0) * (pre * w["r_mag"].exp() + w["b_mag"]).relu()
        pre = pre + w["b_enc"]
        if self.architecture == "jumprelu":
            return pre.relu() * (pre > w["threshold"])
        if self.architecture == "standard":
            return pre.relu()
        assert self.k is not None
        ranked = pre.abs() if self.architecture == "abstopk" else pre
        best = ranked.topk(self.k, dim=-1).indices
        values = pre.gather(-1, best)
        return torch.zeros_like(pre).scatter(-1, best, values if self.architecture == "abstopk" else values.relu())

    def _pursued(self, x: Tensor) -> Tensor:
        """Matching pursuit: take the feature that explains most of what is left, and take it off, until little is."""
        decoder = self.weights["W_enc"].T
        left = x.reshape(-1, self.d_in)
        z = left.new_zeros(len(left), len(decoder))
        done = torch.zeros(len(left), 1, dtype=torch.bool, device=x.device)
        for _ in range(self.max_iterations or self.d_in):
            explained, best = (left @ decoder.T).relu().max(-1, keepdim=True)
            explained = explained.masked_fill(done, 0)
            before = z != 0
            z = z.scatter_add(-1, best, explained)
            left = left - explained * decoder[best[:, 0]]
            if self.stop_on_duplicate_support:
                done |= ((z != 0) == before).all(-1, keepdim=True)
            if self.residual_threshold > 0:
                done |= left.norm(dim=-1, keepdim=True) < self.residual_threshold
            if done.all():
                break
        return z.reshape(*x.shape[:-1], len(decoder))


def load_saes(source: str | Path, *, dtype: torch.dtype = torch.float32) -> list[SparseAutoencoder]:
    """Load every autoencoder of a source, by ascending layer.

    Args:
        source: The name of a model for which the package ships autoencoders; a folder that holds one, in the format
            of sae_lens or of sparsify, or one of whose subfolders do; or ``release:id`` as sae_lens names them.
        dtype: The dtype of the weights.

    Raises:
        UserError: If nothing is there, it cannot be read, or it is not an autoencoder of a residual stream.
    """
    shipped = {place.name: place for place in sorted((assets_directory() / "saes").glob("*")) if place.is_dir()}
    folder = shipped.get(str(source), Path(source))
    if not folder.exists():
        release, colon, sae_id = str(source).partition(":")
        if colon:
            return [_from_release(release, sae_id, dtype)]
        raise UserError(
            f"There are no SAEs in {source}: give a folder with {_CONFIG}, an id of sae_lens like "
            f"gpt2-small-res-jb:blocks.8.hook_resid_pre, or one of {', '.join(shipped) or '(none shipped)'}."
        )
    folders = [folder] if (folder / _CONFIG).is_file() else sorted(p.parent for p in folder.glob(f"*/{_CONFIG}"))
    if not folders:
        raise UserError(f"{source} holds no SAE: neither it nor a folder in it has a {_CONFIG}; check the path.")
    return sorted((load_sae(place, dtype=dtype) for place in folders), key=lambda sae: sae.layer)


def load_sae(source: str | Path, *, dtype: torch.dtype = torch.float32) -> SparseAutoencoder:
    """The one autoencoder of a source; see ``load_saes``.

    Raises:
        UserError: As ``load_saes``, or if the source holds several.
    """
    folder = Path(source)
    if not (folder / _CONFIG).is_file():
        found = load_saes(source, dtype=dtype)
        if len(found) != 1:
            raise UserError(f"{source} holds {len(found)} SAEs; give the folder of one of them.")
        return found[0]
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / _CONFIG} is not the configuration of an SAE; export it again.")
    card = read_json(folder / _CARD) if (folder / _CARD).is_file() else {}
    if not isinstance(card, dict):
        raise UserError(f"{folder / _CARD} is not the card of an SAE; train it again or take the file away.")
    if (folder / _SAE_LENS_WEIGHTS).is_file():
        return _from_sae_lens(config, _weights(folder / _SAE_LENS_WEIGHTS, dtype), str(source), card)
    if (folder / _SPARSIFY_WEIGHTS).is_file():
        return _from_sparsify(folder, config, _weights(folder / _SPARSIFY_WEIGHTS, dtype))
    raise UserError(
        f"{source} has no weights: neither {_SAE_LENS_WEIGHTS} (sae_lens) nor {_SPARSIFY_WEIGHTS} (sparsify) is there."
    )


def _weights(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        return {name: values.to(dtype) for name, values in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"Could not read the weights {path}: {error}; get or export them again.") from error


def _from_release(release: str, sae_id: str, dtype: torch.dtype) -> SparseAutoencoder:
    """One of the public autoencoders that sae_lens knows how to get and to convert."""
    try:
        from sae_lens import SAE
    except ModuleNotFoundError as error:
        raise UserError(
            f"Getting {release}:{sae_id} needs sae_lens; install it with: pip install 'conflictscope[sae]'"
        ) from error
    try:
        loaded: Any = SAE.from_pretrained(release, sae_id)
    # Whatever sae_lens or the hub raise, they say what is wrong; a name that does not exist is the usual reason.
    except Exception as error:
        raise UserError(
            f"Could not get the SAE {release}:{sae_id} ({error}); check release and id in the list of sae_lens, and "
            "the connection."
        ) from error
    weights = {name: values.to(dtype) for name, values in loaded.state_dict().items()}
    return _from_sae_lens(loaded.cfg.to_dict(), weights, f"{release}:{sae_id}", {})


def _from_sae_lens(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], name: str, card: Mapping[str, Any]
) -> SparseAutoencoder:
    """Of the configuration and state that ``SAE.save_model`` writes, since version 4 of sae_lens."""
    metadata = config.get("metadata") or {}
    about = {**config, **metadata}
    architecture = config.get("architecture", "standard")
    if about.get("activation_fn", about.get("activation_fn_str")) == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"The SAE {name} is of the architecture {architecture}, which does not split one residual stream into "
            f"features by itself; known are {', '.join(ARCHITECTURES)}."
        )
    if about.get("reshape_activations", "none") != "none":
        raise UserError(f"The SAE {name} reads attention heads, not the residual stream; give one that does.")
    normalization = config.get("normalize_activations") or "none"
    if normalization == "expected_average_only_in":
        raise UserError(
            f"The SAE {name} wants its input scaled by a factor that its files do not hold; fold it into the weights "
            "with sae_lens (fold_activation_norm_scaling_factor) and save it again."
        )
    if (about.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        # Such an SAE was trained on a model whose every write to the residual stream has mean zero.
        if normalization != "none":
            raise UserError(
                f"The SAE {name} wants a centred residual stream and {normalization}; both is not known here."
            )
        normalization = "centred"
    if normalization not in get_args(Normalization):
        raise UserError(f"The SAE {name} normalises its input by {normalization!r}, which is not known here.")
    state = {key: values for key, values in weights.items() if key in ("W_dec", "b_dec", *WEIGHT_NAMES[architecture])}
    competing = architecture in ("topk", "abstopk")
    if config.get("rescale_acts_by_decoder_norm") and competing and {"W_dec", "W_enc", "b_enc"} <= state.keys():
        norms = state["W_dec"].norm(dim=-1)
        state |= {
            "W_enc": state["W_enc"] * norms,
            "b_enc": state["b_enc"] * norms,
            "W_dec": state["W_dec"] / norms[:, None],
        }
    if architecture == "matching_pursuit" and "W_dec" in state:
        state["W_enc"] = state["W_dec"].T.contiguous()
    k = config.get("k") or (about.get("activation_fn_kwargs") or {}).get("k")
    return SparseAutoencoder(
        architecture=architecture,
        weights=state,
        layer=_layer_of(about.get("hook_name"), name),
        k=int(k) if competing and isinstance(k, int | float) else None,
        normalization=normalization,
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        residual_threshold=float(config.get("residual_threshold") or 0.0),
        max_iterations=config.get("max_iterations"),
        stop_on_duplicate_support=bool(config.get("stop_on_duplicate_support", True)),
        name=name,
        card=card,
    )


def _layer_of(hook_name: Any, name: str) -> int:
    """The block whose output a hook name stands for."""
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_out|hook_resid_post|hook_resid_pre)", str(hook_name))
    layer = -1 if match is None else int(match[1]) - (match[2] == "hook_resid_pre")
    if layer < 0:
        raise UserError(
            f"The SAE {name} reads {hook_name}; features are edited in the residual stream after a block, "
            "blocks.N.hook_out (hook_resid_post in older files)."
        )
    return layer


def _from_sparsify(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SparseAutoencoder:
    """Of the files that EleutherAI's sparsify writes: ``layers.N/cfg.json`` and ``sae.safetensors``."""
    match = re.search(r"layers[._](\d+)$", folder.name)
    if match is None:
        raise UserError(
            f"{folder} does not tell which layer's output its SAE reads, as layers.N does; give one that does."
        )
    unknown = [key for key in ("transcode", "skip_connection", "signed") if config.get(key)]
    if unknown or config.get("activation", "topk") != "topk":
        what = unknown[0] if unknown else f"activation {config['activation']}"
        raise UserError(f"The SAE {folder} was made with {what}; only plain top-k autoencoders of sparsify are read.")
    try:
        state = {name: weights[name] for name in ("W_dec", "b_dec")} | {"b_enc": weights["encoder.bias"]}
        state["W_enc"] = weights["encoder.weight"].T.contiguous()
        k = int(config["k"])
    except KeyError as error:
        raise UserError(f"The SAE {folder} lacks {error}; get it again.") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG} says k is {config['k']!r}, which is no number; get it again.") from error
    return SparseAutoencoder("topk", state, int(match[1]), k=k, name=str(folder))
