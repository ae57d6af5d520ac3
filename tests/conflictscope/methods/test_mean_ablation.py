from dataclasses import replace

import pytest
import torch

from conflictscope.methods.mean_ablation import MeanAblation
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interventions.heads import HeadScaling
from tests.conflictscope.methods.labs import tiny_lab


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(("towards", "sign"), [("context", 1), ("memory", -1)])
def test_obstacles_are_held_alone_or_with_the_supporter_strengthened(lab, towards, sign):
    """Heads from the scores themselves: positive pushes towards the context."""
    by_probability = lab.head_scores[f"{towards}_probability"].values.mean(0) * sign
    order = [divmod(int(i), 4) for i in by_probability.flatten().argsort(stable=True)]
    supporter = divmod(int((lab.head_scores["logit_diff"].values.mean(0) * sign).argmax()), 4)
    expected = []
    for count in (4, 8):
        held = dict.fromkeys(order[:count], 0.0)
        expected += [held] if supporter in held else [held, {**held, supporter: 1.5}]
    found = [condition.edits[0].head_scales for condition in MeanAblation().candidates(lab, towards)]
    assert sorted(sorted(scales.items()) for scales in found) == sorted(sorted(scales.items()) for scales in expected)


def test_heads_are_scaled_around_their_means_at_the_end_of_closed_book_prompts(lab):
    (edit,) = MeanAblation().candidates(lab, "context")[0].edits
    assert isinstance(edit, HeadScaling)
    for head in edit.heads:
        assert torch.tensor(head.mean).equal(lab.mean_outputs[head.layer, head.head])


def test_data_without_closed_book_prompts_is_one_sentence(lab):
    train = ConflictSet("few", tuple(e for e in lab.prompts.train if e.kind != "none"))
    with pytest.raises(UserError, match="needs prompts without a context"):
        MeanAblation().candidates(lab.on(replace(lab.prompts, train=train)), "context")
