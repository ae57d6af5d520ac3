import pytest

from conflictscope.methods._heads import DRAWS, random_heads, scaling
from conflictscope.study.condition import Condition
from interventions.feedforward import FeedForwardScaling
from interventions.heads import HeadScaling
from tests.conflictscope.methods.labs import tiny_lab

SCALES = {(0, 1): 0.0, (1, 3): -1.0, (2, 0): 1.5}


@pytest.fixture(scope="module")
def lab(tiny_llama, tmp_path_factory):
    return tiny_lab(tiny_llama, tmp_path_factory.mktemp("lab"))


def test_random_heads_have_the_same_scales_in_other_places(lab):
    chosen = Condition("pruning", "context", edits=(scaling(SCALES),))
    draws = random_heads(lab, chosen)
    assert len(draws) == DRAWS
    assert len({draw.digest for draw in draws}) == DRAWS
    for draw in draws:
        (edit,) = draw.edits
        assert sorted(edit.head_scales.values()) == sorted(SCALES.values())
        assert not edit.head_scales.keys() & SCALES.keys()
        assert (draw.method, draw.towards, draw.control_of) == ("random_heads", "context", "pruning")


def test_the_seed_decides_the_draw(lab, tiny_llama, tmp_path):
    chosen = Condition("pruning", "context", edits=(scaling(SCALES),))
    digests = [[draw.digest for draw in random_heads(one, chosen)] for one in (lab, lab.on(lab.prompts))]
    assert digests[0] == digests[1]
    other = tiny_lab(tiny_llama, tmp_path, seed=1)
    assert [draw.digest for draw in random_heads(other, chosen)] != digests[0]


def test_feed_forward_layers_are_drawn_as_layers(lab):
    layers = FeedForwardScaling(((1, 0.3),))
    for draw in random_heads(lab, Condition("learned_scales", "context", edits=(scaling(SCALES), layers))):
        heads, drawn = draw.edits
        assert len(heads.edited_heads) == len(SCALES)
        assert isinstance(drawn, FeedForwardScaling)
        ((layer, scale),) = drawn.scales
        assert layer != 1
        assert scale == 0.3


def test_where_too_few_heads_are_left_some_are_the_chosen_ones(lab):
    many = dict.fromkeys(lab.anatomy.heads[:10], 0.0)
    for draw in random_heads(lab, Condition("pruning", "context", edits=(scaling(many),))):
        assert len(draw.edits[0].edited_heads) == 10


def test_heads_that_are_held_at_a_mean_are_held_at_their_own(lab):
    chosen = Condition("mean_ablation", "context", edits=(scaling(SCALES, lab.mean_outputs),))
    for draw in random_heads(lab, chosen):
        (edit,) = draw.edits
        assert isinstance(edit, HeadScaling)
        for head in edit.heads:
            assert head.mean == pytest.approx(lab.mean_outputs[head.layer, head.head].tolist())
