from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import encode
from interp.sae import ARCHITECTURES, load_sae
from interventions.base import applied
from interventions.features import ALPHA_FORMS, EditedFeatures, FeatureEdit
from tests.interp.test_sae import D_SAE, decode, random_sae
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges
WIDTH = 32
CONTEXT = [7, 0, 31, 12, 22, 18, 5, 36]
MEMORY = [39, 3, 25, 14, 9, 28]
NORMALISATIONS = ["none", "layer_norm", "constant_norm_rescale"]


@dataclass
class Case:
    """A selection of features of an autoencoder of sae_lens, and the edit that is made of it."""

    sae: Any
    removed: list[int]
    added: list[int]
    targets: Tensor
    edit: EditedFeatures

    def by_hand(self, h: Tensor, alpha: float, form: str) -> Tensor:
        """The formula of the paper, written out with what sae_lens encodes and decodes."""
        with torch.no_grad():
            z = self.sae.encode(h)
        t = alpha * self.targets if form == "targets" else self.targets
        z_minus, z_plus = torch.zeros_like(z), torch.zeros_like(z)
        for i in self.removed:
            z_minus[..., i] = torch.minimum(z[..., i], t[i])
        for i in self.added:
            z_plus[..., i] = torch.maximum(t[i] - z[..., i], torch.tensor(0.0))
        removal, addition = self.decoded(h, z_minus), self.decoded(h, z_plus)
        if form == "targets":
            return h - removal + addition
        return h + alpha * (-removal + addition)

    def decoded(self, h: Tensor, z: Tensor) -> Tensor:
        """dec(z), without bias."""
        return decode(self.sae, h, z) - decode(self.sae, h, torch.zeros_like(z))


def case(
    folder: Path, architecture: str, layer: int, *, towards: str = "context", seed: int = 0, **options: Any
) -> Case:
    sae = random_sae(architecture, d_in=WIDTH, hook_name=f"blocks.{layer}.hook_out", seed=seed, **options)
    sae.save_model(folder / f"{layer}")
    removed, added = (MEMORY, CONTEXT) if towards == "context" else (CONTEXT, MEMORY)
    targets = torch.rand(D_SAE, generator=torch.Generator().manual_seed(seed)) * 2
    edit = EditedFeatures.of(load_sae(folder / f"{layer}"), removed, targets[removed], added, targets[added])
    return Case(sae, removed, added, targets, edit)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    network: Any = transformers_model(model)
    with torch.inference_mode():
        return network(**inputs).logits


def see_last_residual(model: Any, layer: int, seen: list[Tensor]) -> Any:
    """A hook that notes the last token's residual stream after a block, as earlier hooks left it."""

    def see(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    return Anatomy(model).module("block", layer).register_forward_hook(see)


def edit_last_residual(model: Any, layer: int, change: Any) -> Any:
    """A hook that puts the last token's residual stream after a block through ``change``."""

    def edit(_: Any, __: Any, output: Any) -> Any:
        residual = (output[0] if isinstance(output, tuple) else output).clone()
        residual[:, -1] = change(residual[:, -1])
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    return Anatomy(model).module("block", layer).register_forward_hook(edit)


@pytest.fixture(scope="module")
def inputs(tiny_llama):
    return encode(tiny_llama, [e.prompt for e in tiny_conflicts()])


# The formula


@pytest.mark.parametrize("towards", ["context", "memory"])
@pytest.mark.parametrize("form", ALPHA_FORMS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_residual_stream_is_edited_as_the_paper_says(architecture, normalisation, form, towards, tmp_path):
    c = case(tmp_path, architecture, 1, towards=towards, normalize_activations=normalisation)
    h = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9)) + 0.3
    for alpha in (1.0, 2.5):
        expected = c.by_hand(h, alpha, form)
        torch.testing.assert_close(h + c.edit.change(h, alpha, form), expected, rtol=1e-5, atol=1e-5)
        assert (expected - h).abs().max() > 0.1


@pytest.mark.parametrize("form", ALPHA_FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_tokens_residual_stream_becomes_what_the_formula_says(
    architecture, form, tiny_llama, inputs, tmp_path
):
    c = case(tmp_path, architecture, 1)
    before: list[Tensor] = []
    after: list[Tensor] = []
    handle = see_last_residual(tiny_llama, 1, before)
    logits(tiny_llama, inputs)
    handle.remove()
    with applied(tiny_llama, FeatureEdit((c.edit,), 1.5, form)):
        handle = see_last_residual(tiny_llama, 1, after)
        logits(tiny_llama, inputs)
        handle.remove()
    torch.testing.assert_close(after[0], c.by_hand(before[0], 1.5, form), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("towards", ["context", "memory"])
@pytest.mark.parametrize("form", ALPHA_FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_layers_are_edited_in_one_pass_each_on_what_the_edit_below_made_of_it(
    architecture, form, towards, tiny_llama, inputs, tmp_path
):
    lower = case(tmp_path, architecture, 0, towards=towards, seed=1)
    upper = case(tmp_path, architecture, 2, towards=towards, seed=2)
    hooks = [
        edit_last_residual(tiny_llama, layer, lambda h, part=part: part.by_hand(h, 1.5, form))
        for layer, part in ((0, lower), (2, upper))
    ]
    expected = logits(tiny_llama, inputs)
    for hook in hooks:
        hook.remove()
    assert (expected - logits(tiny_llama, inputs))[:, -1].abs().max() > 0.1
    # The order in which the layers are given does not matter.
    for layers in ((lower.edit, upper.edit), (upper.edit, lower.edit)):
        with applied(tiny_llama, FeatureEdit(layers, 1.5, form)):
            torch.testing.assert_close(logits(tiny_llama, inputs), expected, rtol=1e-4, atol=1e-4)


def test_every_architecture_of_model_is_edited(tiny_bridge, tmp_path):
    c = case(tmp_path, "jumprelu", 1)
    batch = encode(tiny_bridge, [e.prompt for e in tiny_conflicts()][:3])
    hook = edit_last_residual(tiny_bridge, 1, lambda h: c.by_hand(h, 1.5, "targets"))
    expected = logits(tiny_bridge, batch)
    hook.remove()
    with applied(tiny_bridge, FeatureEdit((c.edit,), 1.5)):
        torch.testing.assert_close(logits(tiny_bridge, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ALPHA_FORMS)
def test_an_edit_moves_along_what_its_features_write_only_so_the_rest_stays(form, tmp_path):
    c = case(tmp_path, "standard", 1)
    h = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(9))
    change = c.edit.change(h, 2.0, form)
    written = c.sae.W_dec[CONTEXT + MEMORY].detach()
    within = change @ torch.linalg.pinv(written) @ written
    with torch.no_grad():
        error = h - c.sae(h)
    # Most of the error is outside of what these features write, and the edit does not touch it.
    outside = error - error @ torch.linalg.pinv(written) @ written
    assert outside.abs().max() > 0.5
    torch.testing.assert_close(within, change, rtol=1e-4, atol=1e-4)


# What changes nothing


@pytest.mark.parametrize("form", ALPHA_FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_selected_features_no_bit_changes(architecture, form, tiny_llama, inputs, tmp_path):
    sae = case(tmp_path, architecture, 1).edit.sae
    nothing = EditedFeatures.of(sae, [], torch.zeros(0), [], torch.zeros(0))
    edit = FeatureEdit((nothing,), 3.0, form)
    assert edit.n_moved == 0
    before = logits(tiny_llama, inputs)
    with applied(tiny_llama, edit):
        assert torch.equal(logits(tiny_llama, inputs), before)


@pytest.mark.parametrize("form", ALPHA_FORMS)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "abstopk"])
def test_alpha_zero_changes_nothing_where_features_are_never_negative(architecture, form, tiny_llama, inputs, tmp_path):
    before = logits(tiny_llama, inputs)
    with applied(tiny_llama, FeatureEdit((case(tmp_path, architecture, 1).edit,), 0.0, form)):
        assert torch.equal(logits(tiny_llama, inputs), before)


def test_the_model_is_restored_bit_for_bit(tiny_llama, inputs, tmp_path):
    before = logits(tiny_llama, inputs)
    with applied(tiny_llama, FeatureEdit((case(tmp_path, "topk", 1).edit,), 2.0)):
        assert not torch.equal(logits(tiny_llama, inputs), before)
    assert torch.equal(logits(tiny_llama, inputs), before)


# Errors


def test_an_autoencoder_of_another_width_is_refused_before_anything_runs(tiny_llama, inputs, tmp_path):
    good = case(tmp_path, "standard", 0)
    sae = random_sae("standard", d_in=WIDTH // 2, hook_name="blocks.1.hook_out")
    sae.save_model(tmp_path / "narrow")
    narrow = EditedFeatures.of(load_sae(tmp_path / "narrow"), [1], torch.ones(1), [], torch.zeros(0))
    before = logits(tiny_llama, inputs)
    with pytest.raises(UserError, match="reads 16 numbers, but the residual stream of the model has 32"):
        FeatureEdit((good.edit, narrow)).attach(tiny_llama)
    assert torch.equal(logits(tiny_llama, inputs), before)


def test_an_autoencoder_of_a_layer_that_does_not_exist_is_refused_before_anything_runs(tiny_llama, inputs, tmp_path):
    good, high = case(tmp_path, "standard", 0), case(tmp_path, "standard", 3)
    before = logits(tiny_llama, inputs)
    with pytest.raises(UserError, match="reads layer 3, but the model has layers 0 to 2"):
        FeatureEdit((good.edit, high.edit)).attach(tiny_llama)
    assert torch.equal(logits(tiny_llama, inputs), before)


@pytest.mark.parametrize(("removed", "added"), [([1, 1], []), ([], [4, 4]), ([1, 2], [3, 2])])
def test_a_feature_given_twice_is_refused(removed, added, tmp_path):
    random_sae("standard").save_model(tmp_path)
    with pytest.raises(UserError, match="A feature is given twice"):
        EditedFeatures.of(load_sae(tmp_path), removed, torch.ones(len(removed)), added, torch.ones(len(added)))


def test_a_feature_that_does_not_exist_is_refused(tmp_path):
    random_sae("standard").save_model(tmp_path)
    with pytest.raises(UserError, match=f"has no feature {D_SAE}"):
        EditedFeatures.of(load_sae(tmp_path), [0], torch.ones(1), [D_SAE], torch.ones(1))


@pytest.mark.parametrize("targets", [1, 3])
def test_targets_and_features_must_go_together(targets, tmp_path):
    random_sae("standard").save_model(tmp_path)
    with pytest.raises(UserError, match=rf"has 2 features, targets of shape \({targets},\)"):
        EditedFeatures.of(load_sae(tmp_path), [1, 2], torch.ones(targets), [], torch.ones(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_targets_that_are_no_numbers_are_refused(value, tmp_path):
    random_sae("standard").save_model(tmp_path)
    with pytest.raises(UserError, match="targets of layer 3 hold NaN or infinity"):
        EditedFeatures.of(load_sae(tmp_path), [1], torch.tensor([value]), [], torch.ones(0))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_given_twice_is_refused(layer, tmp_path):
    edit = case(tmp_path, "standard", layer).edit
    with pytest.raises(UserError, match=f"Layer {layer} is edited twice"):
        FeatureEdit((edit, edit))


def test_choices_that_do_not_exist_are_refused(tmp_path):
    edit = FeatureEdit((case(tmp_path, "standard", 1).edit,))
    unknown: Any = "first"
    with pytest.raises(UserError, match="no form of alpha 'first'; choose among targets, change"):
        replace(edit, alpha_form=unknown)
    with pytest.raises(UserError, match="no choice of tokens 'first'; choose among last_prompt"):
        replace(edit, tokens=unknown)
