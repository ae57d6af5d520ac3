import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_model
from interp.sae import ARCHITECTURES, load_sae
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.features import EditedFeatures, FeatureEdit
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interp.test_sae import random_sae, save_sparsify

SCALING = HeadScaling((ScaledHead(0, 1, 0.0), ScaledHead(2, 3, -1.5, tuple(0.1 * i for i in range(8)))))


@pytest.fixture
def file(tiny_llama):
    return InterventionFile.of(
        [SCALING],
        name="test",
        towards="context",
        model=ModelIdentity.of(tiny_llama, "tiny"),
        measured={"context_rate": 0.5},
    )


def test_a_saved_file_loads_as_it_was(file, tmp_path):
    file.save(tmp_path / "edit.json")
    again = InterventionFile.load(tmp_path / "edit.json")
    assert again == file
    assert again.build() == [SCALING]


def test_a_loaded_file_does_what_the_intervention_did(file, tiny_llama, tmp_path):
    file.save(tmp_path / "edit.json")
    batch = encode(tiny_llama, ["The capital of France is"])
    with torch.inference_mode():
        with applied(tiny_llama, SCALING):
            expected = tiny_llama.original_model(**batch).logits
        with applied(tiny_llama, InterventionFile.load(tmp_path / "edit.json")):
            assert torch.equal(tiny_llama.original_model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", ["mistral", "gpt2"])
def test_a_file_for_another_model_is_refused(file, tiny_directories, architecture):
    other = load_model(str(tiny_directories[architecture]), device="cpu")
    with pytest.raises(UserError, match=r"is for tiny \(architecture LlamaForCausalLM\)"):
        file.attach(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="something"), 'its "format" must be'),
        (lambda r: r.update(version=4), "has version 4, this conflictscope reads versions 1 to 3"),
        (lambda r: r.update(version=True), "has version True"),
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r.pop("model"), "model"),
        (lambda r: r.update(interventions=[]), "interventions"),
        (lambda r: r["interventions"][0].update(kind="lobotomy"), "kind"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale="0"), "scale"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale=float("nan")), "NaN is no number"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale=float("inf")), "Infinity is no number"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale=1e5), "scale"),
        (lambda r: r["interventions"][0]["heads"][0].update(layer=3), "layer 3 does not exist: the model has 3"),
        (lambda r: r["interventions"][0]["heads"][0].update(head=4), r"head 0\.4 does not exist: the model has 4"),
        (lambda r: r["interventions"][0]["heads"][1]["mean"].pop(), "has 7 numbers, but heads have 8"),
        (lambda r: r["sites"].pop(), "sites that test names are not those"),
        (lambda r: r["sites"][0].update(module="model.layers.1.mlp"), "sites that test names are not those"),
        (lambda r: r.pop("sites"), "sites"),
        (lambda r: r["model"].update(architecture="MambaForCausalLM"), "MambaForCausalLM has recurrent blocks"),
        (lambda r: r["model"].update(weights="AAAA"), "sample of weights of tiny is damaged"),
        (lambda r: r["model"].update(n_layers=2), "it should hold 52 numbers"),
        (lambda r: r["provenance"].update(seed=2**64), r"provenance\.seed"),
        (lambda r: r["measured"].update(rate=[[float("nan")]]), "NaN is no number"),
        (lambda r: r["interventions"][0]["heads"][0].update(layer=-1), "layer"),
        (lambda r: r["interventions"][0]["heads"][0].update(layer=True), "layer"),
        (
            lambda r: r["interventions"][0]["heads"].append(r["interventions"][0]["heads"][0]),
            r"Head 0\.1 is listed twice",
        ),
        (lambda r: r["model"].update(n_layers=0), "n_layers"),
    ],
)
def test_a_file_that_says_anything_else_is_refused(file, tmp_path, change, message):
    record = json.loads(file.model_dump_json())
    change(record)
    (tmp_path / "edit.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        InterventionFile.load(tmp_path / "edit.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_file_that_is_not_a_record_is_refused(tmp_path, content):
    (tmp_path / "edit.json").write_bytes(content)
    with pytest.raises(UserError):
        InterventionFile.load(tmp_path / "edit.json")


def test_a_file_of_which_one_entry_does_not_fit_leaves_nothing_attached(file, tiny_llama):
    misfit = HeadScaling.of([(9, 0)], 0.0).entry("1", {})
    two = file.model_copy(update={"interventions": [*file.interventions, misfit]})
    batch = encode(tiny_llama, ["The capital of France is"])
    with torch.inference_mode():
        before = tiny_llama.original_model(**batch).logits
        with pytest.raises(UserError, match="layer 9 does not exist"):
            two.attach(tiny_llama)
        assert torch.equal(tiny_llama.original_model(**batch).logits, before)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="Could not read the intervention file"):
        InterventionFile.load(tmp_path / "none.json")


# Files with tensors


def feature_edit(folder: Path, architecture: str, **options: Any) -> FeatureEdit:
    """An edit of two layers, with random targets."""
    parts = []
    for layer in (0, 2):
        sae = random_sae(architecture, d_in=32, hook_name=f"blocks.{layer}.hook_out", seed=layer, **options)
        sae.save_model(folder / f"sae{layer}")
        targets = torch.rand(6, generator=torch.Generator().manual_seed(layer)) * 2
        parts.append(
            EditedFeatures.of(load_sae(folder / f"sae{layer}"), [5, 30, 1], targets[:3], [8, 2, 39], targets[3:])
        )
    return FeatureEdit(tuple(parts), 1.5, "change", "answer")


def sparsify_edit(folder: Path) -> FeatureEdit:
    save_sparsify(folder / "layers.1", d_in=32)
    sae = load_sae(folder / "layers.1")
    return FeatureEdit((EditedFeatures.of(sae, [5, 30], torch.ones(2), [8], torch.ones(1)),))


def assert_does_the_same(interventions: list[Any], model: Any, path: Path) -> InterventionFile:
    """Save, load, and compare the logits of both, bit for bit."""
    InterventionFile.of(interventions, name="test", model=ModelIdentity.of(model, "tiny")).save(path)
    loaded = InterventionFile.load(path)
    batch = encode(model, ["The capital of France is", "The capital of Italy is Rome. The capital of Italy is"])
    with torch.inference_mode():
        before = model.original_model(**batch).logits
        with applied(model, *interventions):
            expected = model.original_model(**batch).logits
        with applied(model, loaded):
            found = model.original_model(**batch).logits
    assert not torch.equal(expected, before)
    assert torch.equal(found, expected)
    return loaded


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_loaded_steering_does_what_it_did(tiny_llama, tmp_path, mode):
    steering = Steering(1, torch.randn(32, generator=torch.Generator().manual_seed(0)), 0.7, "prompt", mode)
    loaded = assert_does_the_same([steering], tiny_llama, tmp_path / "edit.json")
    (again,) = loaded.build()
    assert isinstance(again, Steering)
    assert (again.layer, again.strength, again.tokens, again.mode) == (1, 0.7, "prompt", mode)
    assert torch.equal(again.vector, steering.vector)


def test_a_steering_by_a_view_of_a_larger_tensor_is_saved_alone(tiny_llama, tmp_path):
    directions = torch.randn(32, 1000, generator=torch.Generator().manual_seed(0))
    assert_does_the_same([Steering(1, directions[:, 3])], tiny_llama, tmp_path / "edit.json")
    assert (tmp_path / "edit.tensors.safetensors").stat().st_size < 2000


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_activations": "layer_norm"}, {"apply_b_dec_to_input": False}],
    ids=["plain", "layer_norm", "b_dec kept"],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_feature_edit_does_what_it_did(tiny_llama, tmp_path, architecture, options):
    edit = feature_edit(tmp_path, architecture, **options)
    loaded = assert_does_the_same([edit], tiny_llama, tmp_path / "edit.json")
    (again,) = loaded.build()
    assert isinstance(again, FeatureEdit)
    assert (again.alpha, again.alpha_form, again.tokens) == (1.5, "change", "answer")
    for found, given in zip(again.layers, edit.layers, strict=True):
        assert found.sae.kept == given.sae.kept
        assert torch.equal(found.targets, given.targets)
        assert torch.equal(found.added, given.added)


def test_a_loaded_edit_of_a_sparsify_autoencoder_does_what_it_did(tiny_llama, tmp_path):
    assert_does_the_same([sparsify_edit(tmp_path)], tiny_llama, tmp_path / "edit.json")


@pytest.mark.parametrize(
    "options", [{"max_iterations": 3}, {"stop_on_duplicate_support": False}, {"residual_threshold": 2.0}]
)
def test_how_far_matching_pursuit_goes_is_saved(tiny_llama, tmp_path, options):
    edit = feature_edit(tmp_path, "matching_pursuit", **options)
    (again,) = assert_does_the_same([edit], tiny_llama, tmp_path / "edit.json").build()
    assert isinstance(again, FeatureEdit)
    for part in again.layers:
        assert {name: getattr(part.sae, name) for name in options} == options


def test_several_interventions_in_one_file_do_what_they_did(tiny_llama, tmp_path):
    first = Steering(0, torch.ones(32), 0.5, "all")
    second = Steering(0, torch.linspace(-1, 1, 32), 2.0)
    interventions = [first, SCALING, feature_edit(tmp_path, "jumprelu"), second]
    loaded = assert_does_the_same(interventions, tiny_llama, tmp_path / "edit.json")
    assert [type(found) for found in loaded.build()] == [Steering, HeadScaling, FeatureEdit, Steering]


def test_a_file_that_is_saved_again_is_the_same(tiny_llama, tmp_path):
    loaded = assert_does_the_same([feature_edit(tmp_path, "gated")], tiny_llama, tmp_path / "edit.json")
    loaded.save(tmp_path / "again" / "edit.json")
    for name in ("edit.json", "edit.tensors.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_feature_edit_without_features_is_saved_and_loaded(tiny_llama, tmp_path):
    random_sae("standard", d_in=32, hook_name="blocks.1.hook_out").save_model(tmp_path / "sae")
    nothing = EditedFeatures.of(load_sae(tmp_path / "sae"), [], torch.zeros(0), [], torch.zeros(0))
    InterventionFile.of([FeatureEdit((nothing,))], name="test", model=ModelIdentity.of(tiny_llama, "tiny")).save(
        tmp_path / "edit.json"
    )
    (again,) = InterventionFile.load(tmp_path / "edit.json").build()
    assert isinstance(again, FeatureEdit)
    assert again.n_moved == 0


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """The path of a file with tensors."""
    interventions = [Steering(1, torch.ones(32)), feature_edit(tmp_path, "topk")]
    InterventionFile.of(interventions, name="test", model=ModelIdentity.of(tiny_llama, "tiny")).save(
        tmp_path / "edit.json"
    )
    InterventionFile.load(tmp_path / "edit.json")
    return tmp_path / "edit.json"


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a saved file, and its record of their hash with them."""
    place = path.with_suffix(".tensors.safetensors")
    tensors = load_file(place)
    change(tensors)
    save_file(tensors, place)
    set_hash(path)


def set_hash(path: Path) -> None:
    record = json.loads(path.read_text())
    content = path.with_suffix(".tensors.safetensors").read_bytes()
    record["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(record))


def test_tensors_that_are_missing_are_an_error(saved):
    saved.with_suffix(".tensors.safetensors").unlink()
    with pytest.raises(UserError, match=r"Could not read the intervention's tensors .*edit\.tensors\.safetensors"):
        InterventionFile.load(saved)


@pytest.mark.parametrize("length", [0, 7, 500, -1])
def test_truncated_tensors_are_refused(saved, length):
    place = saved.with_suffix(".tensors.safetensors")
    place.write_bytes(place.read_bytes()[:length])
    with pytest.raises(UserError, match="is not the file that the intervention was saved with"):
        InterventionFile.load(saved)
    set_hash(saved)
    with pytest.raises(UserError, match="is not a safetensors file"):
        InterventionFile.load(saved)


def test_tensors_with_another_hash_are_refused(saved):
    place = saved.with_suffix(".tensors.safetensors")
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(UserError, match="is not the file that the intervention was saved with"):
        InterventionFile.load(saved)


@pytest.mark.parametrize(
    "name",
    [
        "../edit.safetensors",
        "/absolute/edit.safetensors",
        "sub/edit.safetensors",
        "..\\edit.safetensors",
        "edit.bin",
        ".safetensors/../edit",
        "edit.safetensors\n",
        "",
    ],
)
def test_tensors_in_another_folder_are_refused(saved, name):
    (saved.parent.parent / "edit.safetensors").write_bytes(saved.with_suffix(".tensors.safetensors").read_bytes())
    record = json.loads(saved.read_text())
    record["tensors"]["file"] = name
    saved.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"tensors\.file"):
        InterventionFile.load(saved)


def test_a_file_that_does_not_say_where_its_tensors_are_is_refused(saved):
    record = json.loads(saved.read_text())
    record["tensors"] = None
    saved.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"lacks '0\.vector'"):
        InterventionFile.load(saved)


TENSORS = [
    "0.vector",
    *(f"1.{layer}.{name}" for layer in (0, 2) for name in ("W_dec", "W_enc", "b_dec", "b_enc", "targets")),
]


def test_the_tensors_are_those_that_are_tested(saved):
    assert set(load_file(saved.with_suffix(".tensors.safetensors"))) == set(TENSORS)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_missing_is_an_error(saved, name):
    change_tensors(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"lacks '{name}'"):
        InterventionFile.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_holds_no_number_is_refused(saved, name, value):
    change_tensors(saved, lambda tensors: tensors[name].view(-1)[1].fill_(value))
    with pytest.raises(UserError, match=r"NaN or infinity|finite numbers"):
        InterventionFile.load(saved)


@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (6, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "0.vector"])
def test_a_tensor_of_another_shape_is_refused(saved, name, shape):
    change_tensors(saved, lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(UserError):
        InterventionFile.load(saved)


def test_a_weight_that_the_record_does_not_name_is_an_error(saved):
    record = json.loads(saved.read_text())
    del record["interventions"][1]["layers"][0]["weights"]["W_enc"]
    saved.write_text(json.dumps(record))
    with pytest.raises(UserError, match="has no weights W_enc"):
        InterventionFile.load(saved)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_that_is_edited_twice_is_refused(saved, layer):
    record = json.loads(saved.read_text())
    layers = record["interventions"][1]["layers"]
    layers.append(next(part for part in layers if part["layer"] == layer))
    saved.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"Layer {layer} is edited twice"):
        InterventionFile.load(saved)


def test_a_steering_for_another_width_is_refused(saved):
    change_tensors(saved, lambda tensors: tensors.update({"0.vector": torch.ones(31)}))
    with pytest.raises(UserError, match=r"the steering vector has shape \(31,\), but the model needs 32"):
        InterventionFile.load(saved)


def test_a_tensor_that_nothing_needs_is_refused(saved):
    change_tensors(saved, lambda tensors: tensors.update({"extra": torch.ones(1)}))
    with pytest.raises(UserError, match="has the tensor 'extra', which nothing needs"):
        InterventionFile.load(saved)


DIAL = TrustDial(
    (DialScale(0, 1, 0.5, 2.0), DialScale(2, None, 1.0, 0.25)),
    0.5,
    (DialPoint(-1.0, 0.75, 0.0), DialPoint(0.0, 0.5, 0.5), DialPoint(1.0, 0.0, 0.75)),
)


def dial_file(model, **about):
    parts = [DIAL, FeedForwardScaling(((1, 0.5),))]
    return InterventionFile.of(parts, name="dial", model=ModelIdentity.of(model, "tiny"), **about)


def test_a_dial_and_a_feed_forward_scaling_load_as_they_were_saved(tiny_llama, tmp_path):
    dial_file(tiny_llama).save(tmp_path / "dial.json")
    loaded = InterventionFile.load(tmp_path / "dial.json")
    assert loaded.build() == [DIAL, FeedForwardScaling(((1, 0.5),))]
    assert loaded.dial == DIAL


def test_a_dialed_file_has_the_dial_at_the_wanted_setting_and_forgets_what_was_measured(tiny_llama):
    file = dial_file(tiny_llama, towards="context", measured={"context_rate": 0.5}).dialed(-0.75)
    assert file.build() == [DIAL.at(-0.75), FeedForwardScaling(((1, 0.5),))]
    assert (file.towards, file.measured) == ("memory", {})


def test_files_without_a_dial_cannot_be_dialed_and_dials_cannot_be_scaled(file, tiny_llama):
    with pytest.raises(UserError, match="test holds no trust dial"):
        file.dialed(0.5)
    two = InterventionFile.of([DIAL, DIAL], name="two", model=ModelIdentity.of(tiny_llama, "tiny"))
    with pytest.raises(UserError, match="two holds 2 trust dials"):
        two.dialed(0.5)
    with pytest.raises(UserError, match="A dial has no strength; set its trust"):
        dial_file(tiny_llama).scaled(0.5)
    with pytest.raises(UserError, match="between -1"):
        dial_file(tiny_llama).dialed(2.0)


@pytest.mark.parametrize(("factor", "towards"), [(2.0, "context"), (0.0, None), (-1.0, "memory")])
def test_a_strength_below_zero_strengthens_the_other_source(file, factor, towards):
    assert file.scaled(factor).towards == towards


def test_features_have_no_opposite(tiny_llama, tmp_path):
    edit = feature_edit(tmp_path, "standard")
    saved = InterventionFile.of([edit], name="features", model=ModelIdentity.of(tiny_llama, "tiny"))
    with pytest.raises(UserError, match="An edit of features has no opposite"):
        saved.scaled(-1.0)


def test_provenance_keeps_what_has_no_field_of_its_own(file):
    given = {"method": "x", "seed": 3, "data": {"name": "not a hash"}, "relations": ["capital"]}
    about = InterventionFile.of([SCALING], name="a", model=file.model, provenance=given).provenance
    assert (about.method, about.seed, about.data) == ("x", 3, None)
    assert about.details == {"data": {"name": "not a hash"}, "relations": ["capital"]}
