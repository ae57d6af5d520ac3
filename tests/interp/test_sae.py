import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.fingerprints import fingerprint
from interp.sae import ARCHITECTURES, SparseAutoencoder, load_sae, load_saes

D_IN, D_SAE, K = 16, 40, 5
FEATURES = [7, 0, 31, 12, 39, 3]

# What sae_lens registers and does not read one residual stream alone.
OTHERS = {
    "transcoder": {"d_out": D_IN, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": D_IN, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": D_IN, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D_IN, "apply_b_dec_to_input": False},
    "temporal": {"n_heads": 2, "bottleneck_factor": 10},
}
COMMON_OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
]
OWN_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "topk": [
        {"rescale_acts_by_decoder_norm": True},
        {"rescale_acts_by_decoder_norm": True, "normalize_activations": "constant_norm_rescale"},
        {"k": D_SAE},
    ],
    "abstopk": [{"rescale_acts_by_decoder_norm": True}],
    "matching_pursuit": [
        {"residual_threshold": 0.0},
        {"residual_threshold": 3.0, "stop_on_duplicate_support": False},
        {"max_iterations": 3, "stop_on_duplicate_support": False},
        {"max_iterations": 60, "stop_on_duplicate_support": False, "residual_threshold": 0.0},
    ],
}
VARIANTS = [
    pytest.param(architecture, options, id="-".join([architecture, *map(str, options.values())]))
    for architecture in ARCHITECTURES
    for options in [*COMMON_OPTIONS, *OWN_OPTIONS.get(architecture, [])]
]


def randomise(sae: Any, seed: int) -> None:
    """Random weights with which features and reconstructions are of order 1, decoder rows of different norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(sae.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if name == "W_dec":
            # Matching pursuit diverges where a row is longer than the square root of 2.
            lengths = 0.7 + 0.5 * torch.rand(len(values), 1, generator=generator)
            values = values / values.norm(dim=-1, keepdim=True) * lengths
        elif name == "threshold":
            values = values.abs()
        elif values.ndim == 1:
            values = values * 0.5
        else:
            values = values / values.shape[0] ** 0.5
        parameter.data = values.to(parameter.dtype)


def random_sae(
    architecture: str, *, d_in: int = D_IN, hook_name: str = "blocks.3.hook_out", seed: int = 0, **options: Any
) -> Any:
    """An autoencoder of sae_lens with random weights."""
    build, config = get_sae_class(architecture)
    chosen: dict[str, Any] = ({"k": K} if architecture in ("topk", "abstopk") else {}) | options
    metadata = SAEMetadata(hook_name=hook_name, model_name="tiny")
    sae = build(config(d_in=d_in, d_sae=D_SAE, metadata=metadata, **chosen))
    randomise(sae, seed)
    return sae


def decode(sae: Any, x: Tensor, z: Tensor) -> Tensor:
    """What sae_lens decodes ``z`` to, scaled as an encoding of ``x``."""
    with torch.no_grad():
        # sae_lens keeps the scale of the last encoding for one decoding.
        sae.encode(x)
        return sae.decode(z)


def saved(sae: Any, folder: Path) -> SparseAutoencoder:
    sae.save_model(folder)
    return load_sae(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def x() -> Tensor:
    """Residual streams with a mean that is not zero and norms that differ."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 2, 7)[:, None]
    return (torch.randn(4, 7, D_IN, generator=generator) + 0.5) * scale


# The formats


def test_every_architecture_of_sae_lens_is_either_read_or_refused():
    assert set(SAE_CLASS_REGISTRY) == {*ARCHITECTURES, *OTHERS}


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_features_are_those_of_sae_lens(architecture, options, x, tmp_path):
    sae = random_sae(architecture, **options)
    with torch.no_grad():
        expected = sae.encode(x)
    assert (expected != 0).any(-1).all()
    assert (expected == 0).any() or options.get("k") == D_SAE
    loaded = saved(sae, tmp_path)
    assert (loaded.architecture, loaded.layer, loaded.d_in, loaded.d_sae) == (architecture, 3, D_IN, D_SAE)
    if options.get("rescale_acts_by_decoder_norm"):
        # sae_lens decodes these with rows of unit norm, as they are stored here.
        torch.testing.assert_close(loaded.weights["W_dec"].norm(dim=-1), torch.ones(D_SAE))
    close(loaded.encode(x), expected)


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_reconstructions_are_those_of_sae_lens(architecture, options, x, tmp_path):
    sae = random_sae(architecture, **options)
    with torch.no_grad():
        expected = sae(x)
    close(saved(sae, tmp_path).reconstruct(x), expected)


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_a_change_of_features_changes_what_sae_lens_decodes_by_as_much(architecture, options, x, tmp_path):
    sae = random_sae(architecture, **options)
    change = torch.randn(4, 7, D_SAE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = sae.encode(x)
    expected = decode(sae, x, z + change) - decode(sae, x, z)
    close(saved(sae, tmp_path).decoded_change(change, x), expected)


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_a_restricted_autoencoder_gives_some_features_of_the_whole(architecture, options, x, tmp_path):
    sae = random_sae(architecture, **options)
    part = saved(sae, tmp_path).restricted(FEATURES)
    with torch.no_grad():
        z = sae.encode(x)
    assert part.kept == tuple(FEATURES)
    assert part.d_sae == len(FEATURES)
    close(part.encode(x), z[..., FEATURES])
    again = part.restricted([4, 1])
    assert again.kept == (FEATURES[4], FEATURES[1])
    close(again.encode(x), z[..., [FEATURES[4], FEATURES[1]]])


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_a_restricted_autoencoder_writes_what_those_features_write(architecture, options, x, tmp_path):
    sae = random_sae(architecture, **options)
    part = saved(sae, tmp_path).restricted(FEATURES)
    change = torch.randn(4, 7, len(FEATURES), generator=torch.Generator().manual_seed(2))
    whole = torch.zeros(4, 7, D_SAE)
    whole[..., FEATURES] = change
    expected = decode(sae, x, whole) - decode(sae, x, torch.zeros_like(whole))
    close(part.decoded_change(change, x), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_autoencoder_restricted_to_no_feature_says_nothing(architecture, x, tmp_path):
    part = saved(random_sae(architecture), tmp_path).restricted([])
    assert part.encode(x).shape == (4, 7, 0)
    assert torch.equal(part.decoded_change(part.encode(x), x), torch.zeros_like(x))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_where_features_do_not_compete_a_restricted_autoencoder_holds_no_others(architecture, tmp_path):
    part = saved(random_sae(architecture), tmp_path).restricted(FEATURES)
    assert {values.shape for name, values in part.weights.items() if name != "b_dec"} == {
        torch.Size([D_IN, len(FEATURES)]),
        torch.Size([len(FEATURES), D_IN]),
        torch.Size([len(FEATURES)]),
    }


@pytest.mark.parametrize("feature", [-1, D_SAE])
def test_a_feature_that_does_not_exist_is_refused(feature, tmp_path):
    with pytest.raises(UserError, match=f"has no feature {feature}; its features are 0 to {D_SAE - 1}"):
        saved(random_sae("standard"), tmp_path).restricted([0, feature])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    ("build", "config", "options"),
    [
        (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
        (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"matryoshka_widths": [10, 20, D_SAE]},
        ),
    ],
    ids=["batchtopk", "matryoshka_batchtopk"],
)
def test_what_a_training_saves_for_inference_is_read(build, config, options, rescale, x, tmp_path):
    metadata = SAEMetadata(hook_name="blocks.3.hook_out")
    options = options | {"rescale_acts_by_decoder_norm": rescale, "metadata": metadata}
    sae = build(config(d_in=D_IN, d_sae=D_SAE, k=K, **options))
    randomise(sae, 0)
    sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(tmp_path)
    reference: Any = SAE.load_from_disk(tmp_path)
    loaded = load_sae(tmp_path)
    with torch.no_grad():
        expected, reconstruction = reference.encode(x), reference(x)
    assert (expected != 0).any()
    assert ((expected == 0) | (expected > 0.8)).all()
    close(loaded.encode(x), expected)
    close(loaded.reconstruct(x), reconstruction)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_that_was_not_saved_for_inference_is_refused(architecture, tmp_path):
    saved(random_sae("topk"), tmp_path)
    edit_config(tmp_path, architecture=architecture)
    with pytest.raises(UserError, match=f"is of the architecture {architecture}"):
        load_sae(tmp_path)


@pytest.mark.parametrize("architecture", sorted(OTHERS))
def test_what_does_not_split_one_residual_stream_is_refused(architecture, tmp_path):
    random_sae(architecture, **OTHERS[architecture]).save_model(tmp_path)
    with pytest.raises(UserError, match=f"is of the architecture {architecture}, .*known are standard, gated"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("legacy", "architecture"),
    [
        ({"activation_fn_str": "relu"}, "standard"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"}, "topk"),
        ({"architecture": "gated", "normalize_activations": False}, "gated"),
        ({"architecture": "jumprelu", "normalize_activations": None}, "jumprelu"),
    ],
)
def test_configurations_from_before_version_6_are_read_as_sae_lens_reads_them(legacy, architecture, x, tmp_path):
    random_sae(architecture).save_model(tmp_path)
    flat = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "hook_name": "blocks.3.hook_resid_post"}
    (tmp_path / "cfg.json").write_text(json.dumps(flat | legacy))
    reference: Any = SAE.load_from_disk(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.architecture == architecture
    assert loaded.layer == 3
    with torch.no_grad():
        close(loaded.encode(x), reference.encode(x))
        close(loaded.reconstruct(x), reference(x))


def test_weights_in_half_precision_are_read_as_asked_for(x, tmp_path):
    sae = random_sae("standard")
    sae.to(torch.bfloat16).save_model(tmp_path)
    with torch.no_grad():
        expected = sae.to(torch.float32).encode(x)
    close(load_sae(tmp_path).encode(x), expected)
    assert load_sae(tmp_path, dtype=torch.bfloat16).encode(x).dtype == torch.bfloat16


# sparsify


def save_sparsify(folder: Path, d_in: int = D_IN, **changes: Any) -> dict[str, Tensor]:
    """A random autoencoder as sparsify writes it."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        "encoder.weight": torch.randn(D_SAE, d_in, generator=generator) / d_in**0.5,
        "encoder.bias": torch.randn(D_SAE, generator=generator) * 0.5,
        "W_dec": torch.randn(D_SAE, d_in, generator=generator) / d_in**0.5,
        "b_dec": torch.randn(d_in, generator=generator) * 0.5,
    }
    config = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "activation": "topk",
        "d_in": d_in,
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae.safetensors")
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    (folder / "cfg.json").write_text(json.dumps(config))
    return weights


def test_the_format_of_sparsify_is_read(x, tmp_path):
    w = save_sparsify(tmp_path / "layers.3")
    pre = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    z = torch.zeros_like(pre)
    for row in range(4):
        for token in range(7):
            for feature in pre[row, token].argsort(descending=True)[:K]:
                z[row, token, feature] = pre[row, token, feature]
    loaded = load_sae(tmp_path / "layers.3")
    assert (loaded.architecture, loaded.layer, loaded.k) == ("topk", 3, K)
    close(loaded.encode(x), z)
    close(loaded.reconstruct(x), z @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "made with transcode; only plain top-k"),
        ({"skip_connection": True}, "made with skip_connection; only plain top-k"),
        ({"signed": True}, "made with signed; only plain top-k"),
        ({"activation": "groupmax"}, "made with activation groupmax; only plain top-k"),
        ({"k": ...}, "lacks 'k'"),
        ({"k": 0}, "needs k between 1 and 40, not 0"),
        ({"k": D_SAE + 1}, "needs k between 1 and 40, not 41"),
    ],
)
def test_another_kind_of_sparsify_is_refused(changes, message, tmp_path):
    save_sparsify(tmp_path / "layers.3", **changes)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path / "layers.3")


def test_a_sparsify_folder_that_does_not_tell_its_layer_is_refused(tmp_path):
    save_sparsify(tmp_path / "mine")
    with pytest.raises(UserError, match=r"does not tell which layer's output its SAE reads"):
        load_sae(tmp_path / "mine")


@pytest.mark.parametrize("name", ["encoder.weight", "encoder.bias", "W_dec", "b_dec"])
def test_a_sparsify_autoencoder_without_a_weight_is_refused(name, tmp_path):
    weights = save_sparsify(tmp_path / "layers.3")
    del weights[name]
    save_file(weights, tmp_path / "layers.3" / "sae.safetensors")
    with pytest.raises(UserError, match=f"lacks '{name}'"):
        load_sae(tmp_path / "layers.3")


# Where they are found


def test_every_autoencoder_of_a_folder_is_loaded_by_ascending_layer(tmp_path):
    for layer in (10, 2, 5):
        random_sae("standard", hook_name=f"blocks.{layer}.hook_out").save_model(tmp_path / str(layer))
    assert [sae.layer for sae in load_saes(tmp_path)] == [2, 5, 10]


def test_a_folder_with_several_is_not_one(tmp_path):
    for layer in (1, 2):
        random_sae("standard", hook_name=f"blocks.{layer}.hook_out").save_model(tmp_path / str(layer))
    with pytest.raises(UserError, match="holds 2 SAEs; give the folder of one of them"):
        load_sae(tmp_path)


def test_a_folder_around_one_autoencoder_stands_for_it(tmp_path):
    random_sae("standard").save_model(tmp_path / "only")
    assert load_sae(tmp_path).layer == 3


def test_the_working_directory_is_a_folder_as_any_other(tmp_path, monkeypatch):
    random_sae("standard", hook_name="blocks.1.hook_out").save_model(tmp_path / "assets" / "saes" / "shipped")
    random_sae("standard", hook_name="blocks.2.hook_out").save_model(tmp_path / "work" / "mine")
    monkeypatch.setattr("interp.sae.assets_directory", lambda: tmp_path / "assets")
    monkeypatch.chdir(tmp_path / "work")
    assert [sae.layer for sae in load_saes(".")] == [2]


def test_the_name_of_a_shipped_model_stands_for_its_autoencoders(tmp_path, monkeypatch):
    random_sae("standard").save_model(tmp_path / "saes" / "tiny" / "3")
    monkeypatch.setattr("interp.sae.assets_directory", lambda: tmp_path)
    assert [sae.layer for sae in load_saes("tiny")] == [3]


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [("blocks.3.hook_out", 3), ("blocks.3.hook_resid_post", 3), ("blocks.3.hook_resid_pre", 2)],
)
def test_the_layer_is_the_block_whose_output_is_read(hook_name, layer, tmp_path):
    loaded = saved(random_sae("standard", hook_name=hook_name), tmp_path)
    assert loaded.layer == layer
    assert loaded.site == f"blocks.{layer}.hook_out"


# Errors


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.0.hook_resid_pre",
        "blocks.3.hook_mlp_out",
        "blocks.3.attn.hook_z",
        "blocks.3.hook_resid_mid",
        "blocks.x.hook_out",
        "ln_final.hook_out",
        "",
    ],
)
def test_another_site_is_refused(hook_name, tmp_path):
    with pytest.raises(UserError, match=r"features are edited in the residual stream after a block"):
        saved(random_sae("standard", hook_name=hook_name), tmp_path)


def test_an_autoencoder_of_heads_is_refused(tmp_path):
    with pytest.raises(UserError, match="reads attention heads, not the residual stream"):
        saved(random_sae("standard", hook_name="blocks.3.attn.hook_z", reshape_activations="hook_z"), tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There are no SAEs in .*none"):
        load_sae(tmp_path / "none")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no SAE: neither it nor a folder in it has a cfg\.json"):
        load_sae(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    random_sae("standard").save_model(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_sae(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "3", "null", ""])
def test_a_configuration_that_is_none_is_refused(content, tmp_path):
    random_sae("standard").save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(content)
    with pytest.raises(UserError):
        load_sae(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_are_refused(length, tmp_path):
    random_sae("standard").save_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="Could not read the weights"):
        load_sae(tmp_path)


def weight_names() -> list[Any]:
    found = []
    for architecture in ARCHITECTURES:
        names = sorted(random_sae(architecture).state_dict())
        found += [pytest.param(architecture, name, id=f"{architecture}-{name}") for name in names]
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("architecture", "name"), weight_names())
def test_a_weight_that_is_no_number_is_refused(architecture, name, value, tmp_path):
    random_sae(architecture).save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        load_sae(tmp_path)


@pytest.mark.parametrize(("architecture", "name"), weight_names())
def test_a_weight_of_another_shape_is_refused(architecture, name, tmp_path):
    random_sae(architecture).save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    for wrong in (weights[name].new_zeros(3, 5), weights[name].new_zeros(2), weights[name].new_tensor(1.0)):
        # Matching pursuit has one matrix, which fits itself; its bias then does not.
        save_file(weights | {name: wrong}, tmp_path / "sae_weights.safetensors")
        with pytest.raises(UserError, match=r"shape|dimensions"):
            load_sae(tmp_path)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("architecture", "name"), weight_names())
def test_a_missing_weight_is_refused(architecture, name, rescale, tmp_path):
    random_sae(architecture).save_model(tmp_path)
    edit_config(tmp_path, rescale_acts_by_decoder_norm=rescale and architecture in ("topk", "abstopk"))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match=f"has no weights {name}"):
        load_sae(tmp_path)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@pytest.mark.parametrize("k", [None, 0, -1, D_SAE + 1])
def test_without_a_k_that_fits_there_is_no_top_k(architecture, k, tmp_path):
    random_sae(architecture).save_model(tmp_path)
    edit_config(tmp_path, k=k)
    with pytest.raises(UserError, match=f"needs k between 1 and {D_SAE}, not"):
        load_sae(tmp_path)


def test_a_scale_that_the_files_do_not_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="fold it into the weights with sae_lens"):
        saved(random_sae("standard", normalize_activations="expected_average_only_in"), tmp_path)


def test_a_normalisation_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="normalises its input by 'covariance_whitening'"):
        saved(random_sae("standard", normalize_activations="covariance_whitening"), tmp_path)


@pytest.mark.parametrize(
    "source",
    ["no-such-release:blocks.3.hook_resid_post", "gpt2-small-res-jb:no-such-id"],
)
def test_a_release_that_does_not_exist_is_refused_in_one_sentence(source):
    with pytest.raises(UserError, match=f"Could not get the SAE {source} .*check release and id") as caught:
        load_sae(source)
    assert "\n" not in str(caught.value)


def test_a_release_that_cannot_be_reached_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Could not get the SAE gpt2-small-res-jb:.*and the connection") as caught:
        load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")
    assert "\n" not in str(caught.value)


def test_a_release_without_sae_lens_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"sae_lens|sae-lens"):
        load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")


# Whether it fits a model


def fitting(model: Any, folder: Path, **changes: Any) -> SparseAutoencoder:
    """An autoencoder of layer 1 of ``model``, with a card that says so."""
    anatomy = Anatomy(model)
    random_sae("standard", d_in=anatomy.d_model, hook_name="blocks.1.hook_out").save_model(folder)
    about = {"name": "tiny", "fingerprint": fingerprint(model), "dtype": "float32"} | changes
    (folder / "card.json").write_text(json.dumps({"model": about}))
    return load_sae(folder)


def test_an_autoencoder_fits_the_model_it_was_trained_on(tiny_llama, tmp_path):
    fitting(tiny_llama, tmp_path).check(tiny_llama)


def test_other_weights_than_those_it_was_trained_on_are_refused(tiny_llama, tmp_path):
    sae = fitting(tiny_llama, tmp_path, fingerprint="0" * 64)
    with pytest.raises(UserError, match="was trained on tiny with other weights than mine"):
        sae.check(tiny_llama, "mine")


def test_in_another_dtype_only_shapes_are_compared(tiny_llama, tmp_path):
    fitting(tiny_llama, tmp_path, fingerprint="0" * 64, dtype="bfloat16").check(tiny_llama)


def test_without_a_card_only_shapes_are_compared(tiny_llama, tmp_path):
    saved(random_sae("standard", d_in=32, hook_name="blocks.2.hook_out"), tmp_path).check(tiny_llama)


def test_a_model_of_another_width_is_refused(tiny_llama, tmp_path):
    sae = saved(random_sae("standard", hook_name="blocks.1.hook_out"), tmp_path)
    with pytest.raises(UserError, match="reads 16 numbers, but the residual stream of the model has 32"):
        sae.check(tiny_llama)


def test_a_model_without_the_layer_is_refused(tiny_llama, tmp_path):
    sae = saved(random_sae("standard", d_in=32, hook_name="blocks.3.hook_out"), tmp_path)
    with pytest.raises(UserError, match="reads layer 3, but the model has layers 0 to 2"):
        sae.check(tiny_llama)
