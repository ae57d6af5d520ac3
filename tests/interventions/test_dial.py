import pytest
import torch

from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling, ScaledHead
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges
SCALES = (
    DialScale(0, 1, memory=0.5, context=2.0),
    DialScale(2, 3, memory=3.0, context=-1.0),
    DialScale(1, None, 0.0, 1.0),
)
CALIBRATION = (
    DialPoint(-1.0, 0.9, 0.0),
    DialPoint(-0.5, 0.5, 0.3),
    DialPoint(0.0, 0.3, 0.5),
    DialPoint(0.5, 0.2, 0.7),
    DialPoint(1.0, 0.1, 0.9),
)


@pytest.fixture(scope="module")
def inputs(tiny_bridge):
    return encode(tiny_bridge, [e.prompt for e in tiny_conflicts()])


def logits(model, inputs):
    with torch.inference_mode():
        return model.original_model(**inputs).logits


@pytest.mark.parametrize(
    ("trust", "heads", "layers"),
    [
        (1.0, [(0, 1, 2.0), (2, 3, -1.0)], []),
        (0.5, [(0, 1, 1.5), (2, 3, 0.0)], []),
        (-1.0, [(0, 1, 0.5), (2, 3, 3.0)], [(1, 0.0)]),
        (-0.25, [(0, 1, 0.875), (2, 3, 1.5)], [(1, 0.75)]),
    ],
)
def test_the_dial_scales_along_straight_lines_through_the_unchanged_model(tiny_bridge, inputs, trust, heads, layers):
    parts = [HeadScaling(tuple(ScaledHead(*head) for head in heads)), FeedForwardScaling(tuple(layers))]
    with applied(tiny_bridge, *parts):
        expected = logits(tiny_bridge, inputs)
    with applied(tiny_bridge, TrustDial(SCALES, trust)):
        assert torch.equal(logits(tiny_bridge, inputs), expected)


def test_trust_0_changes_no_bit(tiny_bridge, inputs):
    before = logits(tiny_bridge, inputs)
    with applied(tiny_bridge, TrustDial(SCALES, 0.0)):
        assert torch.equal(logits(tiny_bridge, inputs), before)
    with applied(tiny_bridge, TrustDial(SCALES, 0.01)):
        assert not torch.equal(logits(tiny_bridge, inputs), before)


@pytest.mark.parametrize(
    ("towards", "rate", "trust"),
    [
        ("context", 0.9, 1.0),
        ("context", 0.6, 0.25),
        ("context", 0.8, 0.75),
        ("context", 0.2, 0.0),
        ("memory", 0.4, -0.25),
        ("memory", 0.9, -1.0),
    ],
)
def test_a_wanted_rate_gives_the_setting_on_the_calibration_curve(towards, rate, trust):
    assert TrustDial(SCALES, calibration=CALIBRATION).trust_for(towards, rate) == pytest.approx(trust)


def test_where_the_curve_falls_back_the_first_setting_that_reached_the_rate_is_taken():
    wavy = tuple(DialPoint(t, 0.0, rate) for t, rate in [(0.0, 0.2), (0.25, 0.6), (0.5, 0.5), (1.0, 0.8)])
    assert TrustDial(SCALES, calibration=wavy).trust_for("context", 0.6) == pytest.approx(0.25)
    assert TrustDial(SCALES, calibration=wavy).trust_for("context", 0.7) == pytest.approx(0.5 + 0.5 * 0.2 / 0.3)


def test_wrong_dials_and_settings_are_refused(tiny_llama):
    dial = TrustDial(SCALES, calibration=CALIBRATION)
    with pytest.raises(UserError, match=r"reached a context rate of 0\.90 at most"):
        dial.trust_for("context", 0.95)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            dial.trust_for("memory", rate)
    with pytest.raises(UserError, match="was not calibrated"):
        TrustDial(SCALES).trust_for("context", 0.5)
    for trust in (1.1, float("nan")):
        with pytest.raises(UserError, match=r"between -1"):
            dial.at(trust)
    with pytest.raises(UserError, match=r"head 0\.1 has two scales on the dial"):
        TrustDial((DialScale(0, 1), DialScale(0, 1, 2.0)))
    with pytest.raises(UserError, match="feed-forward layer 1 has two scales on the dial"):
        TrustDial((DialScale(1, None), DialScale(1, None)))
    with pytest.raises(UserError, match="ordered by trust"):
        TrustDial(SCALES, calibration=CALIBRATION[::-1])
    for gate, message in ((DialScale(0, 4), "Head 0.4 does not exist"), (DialScale(3, None), "Layer 3 does not exist")):
        with pytest.raises(UserError, match=message):
            TrustDial((gate,)).attach(tiny_llama)
