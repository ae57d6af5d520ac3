import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp.anatomy import Anatomy, transformers_model
from interp.bridges import load_bridge
from interp.errors import UserError
from interp.inputs import encode
from interventions.bake import fold, write_folded
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.features import FeatureEdit
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.tiny import CONFIGS, tiny_conflicts

GATES = (
    DialScale(0, 1, memory=0.5, context=2.0),
    DialScale(2, 3, memory=3.0, context=-1.0),
    DialScale(0, None, memory=1.5, context=0.4),
    DialScale(1, None, memory=0.0, context=1.8),
)
DIAL = TrustDial(GATES, calibration=(DialPoint(0.0, 0.3, 0.5), DialPoint(1.0, 0.125, 0.875)))
MEAN = tuple(0.3 * i - 1 for i in range(8))
WITH_BIAS = ["gpt2", "gpt-neox", "gpt-neox-sequential"]


@pytest.fixture
def inputs(tiny_llama):
    """All tiny models share a tokenizer."""
    return encode(tiny_llama, [e.prompt for e in tiny_conflicts()])


def plain(folder, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model, inputs):
    """Of all tokens but the padding, at which attention may do what it likes."""
    with torch.inference_mode():
        return transformers_model(model)(**inputs).logits[inputs["attention_mask"].bool()]


def greedy(model, inputs):
    network: Any = transformers_model(model)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        return network.generate(**prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def weights(model):
    return {name: values.clone() for name, values in model.state_dict().items()}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Folding


@pytest.mark.parametrize("trust", [-1.0, 0.5])
def test_a_folded_dial_does_what_the_dial_does(tiny_bridge, inputs, trust):
    dial = DIAL.at(trust)
    with applied(tiny_bridge, dial):
        expected, tokens = logits(tiny_bridge, inputs), greedy(tiny_bridge, inputs)
    assert not torch.allclose(logits(tiny_bridge, inputs), expected, atol=1e-2)
    model = plain(tiny_bridge.original_model.config._name_or_path)
    fold(model, [dial])
    assert_close(logits(model, inputs), expected)
    assert torch.equal(greedy(model, inputs), tokens)


def test_a_bridge_is_folded_like_a_plain_model(tiny_bridge, inputs):
    folder = tiny_bridge.original_model.config._name_or_path
    model, bridge = plain(folder), load_bridge(folder, device="cpu")
    for each in (model, bridge):
        fold(each, [DIAL.at(1.0)])
    assert_close(logits(bridge, inputs), logits(model, inputs))


@pytest.mark.parametrize("architecture", WITH_BIAS)
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_mean_goes_into_the_bias(tiny_directories, inputs, architecture, scale):
    edit = HeadScaling((ScaledHead(1, 2, scale, MEAN), ScaledHead(1, 3, 2.0), ScaledHead(2, 0, scale, MEAN)))
    model = plain(tiny_directories[architecture])
    with applied(model, edit):
        expected = logits(model, inputs)
    fold(model, [edit])
    assert_close(logits(model, inputs), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_several_edits_of_one_place_are_folded_one_after_the_other(tiny_directories, inputs, architecture):
    mean = MEAN if architecture == "gpt2" else None
    edits = [
        HeadScaling((ScaledHead(0, 1, 0.5, mean),)),
        FeedForwardScaling(((0, 2.0), (1, 3.0))),
        DIAL.at(1.0),
        HeadScaling((ScaledHead(0, 1, 3.0, mean and mean[::-1]),)),
    ]
    model = plain(tiny_directories[architecture])
    with applied(model, *edits):
        expected = logits(model, inputs)
    fold(model, edits)
    assert_close(logits(model, inputs), expected)


@pytest.mark.parametrize("architecture", WITH_BIAS)
def test_a_direction_at_all_tokens_goes_into_the_bias(tiny_directories, inputs, architecture):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edits = [
        Steering(1, vector, 2.0, "all"),
        FeedForwardScaling(((1, 0.5), (2, -1.0))),
        Steering(1, -0.25 * vector.roll(1), 3.0, "all"),
        Steering(2, vector, -1.0, "all"),
    ]
    model = plain(tiny_directories[architecture])
    before = logits(model, inputs)
    with applied(model, *edits):
        expected = logits(model, inputs)
    assert not torch.allclose(before, expected, atol=1e-2)
    fold(model, edits)
    assert_close(logits(model, inputs), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_direction_is_refused_where_the_mlp_has_no_bias(tiny_directories, architecture):
    model = plain(tiny_directories[architecture])
    before = weights(model)
    with pytest.raises(UserError, match="A direction is added after layer 1, which needs a bias"):
        fold(model, [HeadScaling.of([(0, 0)], 0.0), Steering(1, torch.ones(32), 1.0, "all")])
    assert_same_weights(weights(model), before)


@pytest.mark.parametrize(
    "edit",
    [
        Steering(1, torch.ones(32), 1.0, "answer"),
        Steering(1, torch.ones(32), 1.0, "all", "replace"),
        ConflictGate("block", 0, torch.ones(32), 0.0, 0.0, (HeadScaling.of([(1, 0)], 0.0),)),
    ],
)
def test_what_depends_on_token_or_activation_is_refused(tiny_directories, edit):
    with pytest.raises(UserError, match="cannot be folded into weights"):
        fold(plain(tiny_directories["gpt2"]), [edit])


def test_half_precision_weights_are_rounded_once(tiny_directories):
    exact, rounded = (plain(tiny_directories["gemma2"], dtype=torch.bfloat16) for _ in "12")
    exact.float()
    for model in (exact, rounded):
        fold(model, [DIAL.at(0.3)])
    assert_same_weights(weights(rounded), weights(exact.to(torch.bfloat16)))


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_what_changes_nothing_changes_no_bit(tiny_directories, architecture):
    model = plain(tiny_directories[architecture])
    before = weights(model)
    ones = [HeadScaling((ScaledHead(0, 1, 1.0, (0.1,) * Anatomy(model).d_head),)), FeedForwardScaling(((1, 1.0),))]
    fold(model, [DIAL.at(0.0), *ones])
    assert_same_weights(weights(model), before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Steering(1, torch.ones(32)), "Steering cannot be folded into weights"),
        (FeatureEdit(()), "FeatureEdit cannot be folded into weights"),
        (HeadScaling((ScaledHead(1, 2, 0.0, MEAN),)), r"Head 1\.2 is scaled around a mean"),
        (HeadScaling((ScaledHead(1, 2, 0.0, MEAN[1:]),)), r"mean of head 1\.2 has 7 numbers"),
        (HeadScaling.of([(1, 4)], 0.0), r"Head 1\.4 does not exist"),
        (FeedForwardScaling(((3, 0.0),)), "Layer 3 does not exist"),
        (TrustDial((DialScale(3, None),)), "Layer 3 does not exist"),
    ],
)
def test_a_refused_edit_changes_no_bit(tiny_directories, edit, message):
    model = plain(tiny_directories["llama"])
    before = weights(model)
    with pytest.raises(UserError, match=message):
        fold(model, [DIAL.at(1.0), edit])
    assert_same_weights(weights(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_quantised_weights_are_refused(tiny_directories):
    model = plain(tiny_directories["llama"])
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(
        torch.zeros(32, 48, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UserError, match="quantised"):
        fold(model, [DIAL.at(1.0)])


# The folder


def dial_file(model):
    measured = {"unedited": {"context_rate": 0.5}, "trust +1": {"context_rate": 0.875}}
    return InterventionFile.of(
        [DIAL], name="tiny: trust dial", model=ModelIdentity.of(model, "tiny"), measured=measured
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_a_written_folder_loads_anywhere_and_says_what_the_dial_says(tiny_directories, inputs, tmp_path, architecture):
    source = str(tiny_directories[architecture])
    bridge = load_bridge(source, device="cpu")
    write_folded(source, dial_file(bridge), tmp_path / "out", trust=0.5)
    with applied(bridge, DIAL.at(0.5)):
        expected, tokens = logits(bridge, inputs), greedy(bridge, inputs)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = tokenizer([e.prompt for e in tiny_conflicts()], return_tensors="pt", padding=True, padding_side="left")
    assert torch.equal(encoded["input_ids"], inputs["input_ids"])
    model = plain(tmp_path / "out")
    assert_close(logits(model, inputs), expected)
    assert torch.equal(greedy(model, inputs), tokens)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_the_card_says_what_was_done_and_measured(tiny_directories, tiny_llama, tmp_path):
    source, file = str(tiny_directories["llama"]), dial_file(tiny_llama)
    write_folded(source, file, tmp_path / "out", trust=0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "# tiny: trust dial",
        f"| made from | `{source}` |",
        "| strengthens | context |",
        "| kinds of change | `trust_dial` |",
        "| trust, from -1 (memory) to 1 (context) | +0.5 |",
        "| attention heads changed | 2 |",
        "| feed-forward layers changed | 2 |",
        "| +1 | 0.125 | 0.875 |",
    ):
        assert line in card.splitlines()
    assert json.loads(card.partition("```json\n")[2].partition("```")[0]) == file.measured


def test_the_folder_keeps_the_checkpoint_s_dtype(tiny_directories, tiny_llama, tmp_path):
    half = plain(tiny_directories["llama"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_directories["llama"]).save_pretrained(tmp_path / "half")
    write_folded(str(tmp_path / "half"), dial_file(tiny_llama), tmp_path / "out", trust=1.0)
    fold(half, [DIAL.at(1.0)])
    assert_same_weights(weights(plain(tmp_path / "out")), weights(half))


def test_a_folder_that_is_not_empty_is_refused_and_kept(tiny_directories, tiny_llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_folded(str(tiny_directories["llama"]), dial_file(tiny_llama), tmp_path, trust=1.0)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize(
    ("architecture", "edit", "trust", "message"),
    [
        ("mistral", DIAL, 1.0, "is for tiny"),
        ("llama", HeadScaling((ScaledHead(1, 2, 0.0, MEAN),)), None, "around a mean"),
        ("llama", Steering(1, torch.ones(32)), None, "cannot be folded"),
        ("llama", HeadScaling.of([(1, 2)], 0.0), 1.0, "no trust dial"),
        ("llama", DIAL, 2.0, "between -1"),
        ("nowhere", DIAL, 1.0, "There is no model directory"),
    ],
)
def test_a_refused_file_leaves_nothing_behind(
    tiny_directories, tiny_llama, tmp_path, architecture, edit, trust, message
):
    file = InterventionFile.of([edit], name="test", model=ModelIdentity.of(tiny_llama, "tiny"))
    with pytest.raises(UserError, match=message):
        write_folded(str(tiny_directories.get(architecture, "./nowhere")), file, tmp_path / "out", trust=trust)
    assert list(tmp_path.iterdir()) == []
