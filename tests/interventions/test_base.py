"""What every kind says of itself; what kinds do to a model is in the tests of each."""

import json

import pytest
import torch

from interp.errors import UserError
from interventions.base import Intervention, Patch
from interventions.config import InterventionFile, effect_digest
from interventions.dial import DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interventions.test_config import feature_edit

HEADS = HeadScaling((ScaledHead(2, 1, 0.5), ScaledHead(1, 3, -1.0), ScaledHead(1, 0, 1.0)))
LAYERS = FeedForwardScaling(((1, 0.25), (2, 1.0)))
DIAL = TrustDial((DialScale(1, 2, memory=3.0, context=0.0), DialScale(2, 0, memory=0.5), DialScale(2, None, 0.0)), 0.5)
STEERING = Steering(1, torch.ones(32), 2.0, "all")


def gate(*edits: Intervention) -> ConflictGate:
    return ConflictGate("block", 0, torch.ones(32), 0.0, 0.5, edits)


class Plain(Intervention):
    """A kind that defines what it must."""

    @property
    def edited_layers(self) -> set[int]:
        return {1}

    def patches(self, _) -> list[Patch]:
        return []


@pytest.mark.parametrize(
    ("edit", "heads", "n_moved"),
    [
        (HEADS, ((1, 3), (2, 1)), 2),
        (LAYERS, (), 1),
        (DIAL, ((1, 2),), 1),
        (DIAL.at(-1.0), ((1, 2), (2, 0)), 3),
        (DIAL.at(0.0), (), 0),
        (STEERING, (), 1),
        (STEERING.scaled(0.0), (), 0),
        (gate(DIAL, HEADS, STEERING), ((1, 2), (1, 3), (2, 1)), 4),
        (Plain(), (), 1),
    ],
)
def test_what_moves_is_what_is_not_as_it_was(edit, heads, n_moved):
    assert (edit.edited_heads, edit.n_moved) == (heads, n_moved)


def test_features_count_as_many_as_are_removed_and_added(tmp_path):
    edit = feature_edit(tmp_path, "standard")
    assert edit.n_moved == edit.scaled(0.5).n_moved == 12
    assert edit.scaled(0.0).n_moved == 0


def test_strength_multiplies_how_far_an_edit_goes():
    assert HEADS.scaled(2.0) == HeadScaling((ScaledHead(2, 1, 0.0), ScaledHead(1, 3, -3.0), ScaledHead(1, 0, 1.0)))
    assert LAYERS.scaled(-1.0) == FeedForwardScaling(((1, 1.75), (2, 1.0)))
    assert STEERING.scaled(-0.5).strength == -1.0
    (inner,) = gate(LAYERS).scaled(-1.0).edits
    assert inner == LAYERS.scaled(-1.0)


@pytest.mark.parametrize("edit", [HEADS, LAYERS, STEERING])
def test_a_strength_of_zero_does_nothing(edit):
    assert edit.scaled(0.0).settled() == ()


@pytest.mark.parametrize("edit", [HEADS, LAYERS, STEERING, gate(HEADS)])
@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(edit, strength):
    with pytest.raises(UserError, match="A strength is a finite number"):
        edit.scaled(strength)


def test_what_a_kind_cannot_do_it_refuses_in_a_sentence():
    with pytest.raises(UserError, match="A dial has no strength; set its trust"):
        gate(DIAL).scaled(0.5)
    with pytest.raises(UserError, match="Plain has no strength"):
        Plain().scaled(0.5)
    with pytest.raises(UserError, match="Plain cannot be written to an intervention file"):
        effect_digest([Plain()])
    with pytest.raises(UserError, match="This Plain cannot be folded into weights"):
        Plain().folded()
    with pytest.raises(UserError, match="A gate lets edits through, not another gate"):
        gate(gate(HEADS))


def test_an_edit_settles_to_what_it_does():
    moved = HeadScaling((ScaledHead(1, 2, 0.5),))
    assert DIAL.settled() == (moved,)
    assert DIAL.at(-1.0).settled() == (
        HeadScaling((ScaledHead(1, 2, 3.0), ScaledHead(2, 0, 0.5))),
        FeedForwardScaling(((2, 0.0),)),
    )
    assert HEADS.settled() == (HeadScaling(HEADS.heads[:2]),)
    assert gate(DIAL.at(0.0)).settled() == ()
    (settled,) = gate(DIAL, LAYERS.scaled(0.0)).settled()
    assert settled.edits == (moved,)


def test_edits_that_do_the_same_have_one_digest():
    assert effect_digest([DIAL]) == effect_digest([HeadScaling((ScaledHead(1, 2, 0.5),))])
    assert effect_digest([gate(DIAL)]) == effect_digest([gate(*DIAL.settled())]) != effect_digest([DIAL])
    assert effect_digest([gate(DIAL.at(0.0)), HEADS.scaled(0.0)]) is None


def test_only_dials_turn_also_behind_a_gate():
    assert HEADS.turned(-1.0) is HEADS
    assert DIAL.turned(-1.0) == DIAL.at(-1.0)
    assert gate(HEADS, DIAL).turned(-1.0).edits == (HEADS, DIAL.at(-1.0))


def test_edits_are_described_in_words(tmp_path):
    assert list(gate(HEADS, LAYERS, DIAL, STEERING).described()) == [
        "behind a gate that reads the block of layer 0, above 0.500",
        "3 heads: 2.1 x 0.5, 1.3 x -1, 1.0 x 1",
        "feed-forward layers: 1 x 0.25, 2 x 1",
        "a dial of 3 scales, at +0.5",
        "direction after layer 1 (add, strength 2, all tokens)",
    ]
    assert list(feature_edit(tmp_path, "standard").described()) == [
        "12 features of layers 0, 2 (alpha 1.5, answer tokens)"
    ]


OLD_DIAL = {
    "kind": "trust_dial",
    "trust": 0.25,
    "gates": [
        {"layer": 1, "head": 2, "memory": 0.5, "context": 2.0},
        {"layer": 2, "head": None, "memory": 1.0, "context": 0.0},
    ],
    "calibration": [{"trust": 0.0, "memory_rate": 0.5, "context_rate": 0.25}],
}
SAME_DIAL = TrustDial((DialScale(1, 2, 0.5, 2.0), DialScale(2, None, 1.0, 0.0)), 0.25)


def old(model, tmp_path, version, interventions):
    """Load a document of an old version, with the tensor ``0.probe`` where a gate needs it."""
    InterventionFile.of(
        [gate(SAME_DIAL)] if interventions[0]["kind"] == "conflict_gate" else [SAME_DIAL],
        name="old",
        model=ModelIdentity.of(model, "tiny"),
    ).save(tmp_path / "old.json")
    record = json.loads((tmp_path / "old.json").read_text())
    document = {
        "format": "conflictscope-intervention",
        "version": version,
        "name": "old",
        "towards": "context",
        "model": record["model"],
        "sites": record["sites"],
        "interventions": interventions,
        "tensors": record["tensors"],
        "provenance": {"method": "learned", "seed": 0},
        "measured": {},
    }
    if version == 1:
        del document["sites"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    return InterventionFile.load(tmp_path / "old.json")


@pytest.mark.parametrize("version", [1, 2])
def test_a_dial_of_an_old_version_is_read_and_saved_anew(tiny_llama, tmp_path, version):
    loaded = old(tiny_llama, tmp_path, version, [OLD_DIAL])
    assert (loaded.dial.scales, loaded.dial.trust) == (SAME_DIAL.scales, 0.25)
    loaded.save(tmp_path / "new.json")
    saved = json.loads((tmp_path / "new.json").read_text())
    assert saved["version"] == 3
    assert saved["interventions"][0]["scales"] == OLD_DIAL["gates"]
    assert "gates" not in saved["interventions"][0]


@pytest.mark.parametrize("version", [1, 2])
def test_a_dial_behind_a_gate_of_an_old_version_is_read(tiny_llama, tmp_path, version):
    gated = {
        "kind": "conflict_gate",
        "part": "block",
        "layer": 0,
        "weight": "0.probe",
        "bias": 0.0,
        "threshold": 0.5,
        "interventions": [OLD_DIAL],
    }
    assert old(tiny_llama, tmp_path, version, [gated]).dial.scales == SAME_DIAL.scales


@pytest.mark.parametrize("version", [1, 2])
def test_versions_are_not_mixed(tiny_llama, tmp_path, version):
    mixed = {**OLD_DIAL, "scales": OLD_DIAL["gates"]}
    with pytest.raises(UserError, match="a trust_dial of versions 1 and 2 has gates, not scales"):
        old(tiny_llama, tmp_path, version, [mixed])
    with pytest.raises(UserError, match=r"interventions\.0\.trust_dial"):
        old(tiny_llama, tmp_path, 3, [OLD_DIAL])
