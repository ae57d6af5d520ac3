"""Layers are ranked by how much more of them is active without the context, and scaled."""

from __future__ import annotations

import pytest
import torch

from conflictscope.methods.feed_forward_suppression import FeedForwardSuppression, shifts
from interp.answers import Direction
from interp.attribution.active_neurons import active_shares
from interp.conflicts import evenly
from interp.teacher_forcing import continued
from interventions.feedforward import FeedForwardScaling
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def test_layers_are_ranked_by_what_is_active_without_the_context_alone(lab):
    train = evenly(lab.prompts.train.select(kind="conflict"), 96, lab.seed)
    differences = []
    for example in train:
        bare = continued(lab.model, example.bare_prompt, example.memory_answers[0])
        whole = continued(lab.model, example.prompt, example.context_answers[0])
        differences.append(active_shares(lab.model, [bare])[0] - active_shares(lab.model, [whole])[0])
    expected = torch.stack(differences).mean(0)
    torch.testing.assert_close(shifts(lab), expected, atol=1e-5, rtol=0)
    order = expected.argsort(descending=True).tolist()
    method = FeedForwardSuppression(counts=(1, 2, 50), down=(0.0,), up=(2.0,))
    scales: dict[Direction, float] = {"context": 0.0, "memory": 2.0}
    for towards, scale in scales.items():
        scaled = [c.edits[0] for c in method.candidates(lab, towards)]
        assert [set(edit.edited_layers) for edit in scaled] == [set(order[:n]) for n in (1, 2, lab.anatomy.n_layers)]
        for edit in scaled:
            assert isinstance(edit, FeedForwardScaling)
            assert {factor for _, factor in edit.scales} == {scale}


def test_the_control_scales_as_many_other_layers_alike(lab):
    chosen = FeedForwardSuppression(counts=(1,), down=(0.25,)).candidates(lab, "context")[0]
    (layer,) = chosen.edits[0].edited_layers
    for control in FeedForwardSuppression().controls(lab, chosen):
        (edit,) = control.edits
        assert isinstance(edit, FeedForwardScaling)
        ((other, scale),) = edit.scales
        assert other != layer
        assert scale == 0.25
