from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.anatomy import Anatomy
from interp.attribution.representations import angle, representation_gap
from interp.attribution.scores import HeadScores, LayerScores
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.inputs import encode
from tests.tiny import tiny_conflicts


@pytest.fixture(scope="module")
def conflicts() -> ConflictSet:
    """Each conflict prompt, and the same with a context that agrees."""
    examples = []
    for e in tiny_conflicts():
        (memory,), (context,) = e.memory_answers, e.context_answers
        agrees = e.contexts[0].replace(context, memory)
        prompt = e.prompt.replace(e.contexts[0], agrees)
        aligned = replace(
            e, id=f"{e.id}/aligned", kind="aligned", contexts=(agrees,), context_answers=(memory,), prompt=prompt
        )
        examples += [e, aligned]
    return ConflictSet("both kinds", tuple(examples))


def outputs(model, prompt):
    """The last token's residual stream after each layer, from transformers itself."""
    with torch.no_grad():
        given = Anatomy(model).model(**encode(model, [prompt]), output_hidden_states=True)
    return np.stack([state[0, -1].double().numpy() for state in given.hidden_states[1:]])


def degrees(one, other):
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    return np.degrees(np.arccos(cosine))


def test_the_gap_is_the_difference_of_two_angles(tiny_plain, conflicts):
    """With three subjects in one phrasing, in either order of the two that agree; the last layer's norm comes later."""
    model = tiny_plain("llama")
    chosen = [e for e in conflicts if e.template == "short"]
    by_id = {e.id: e for e in chosen}
    conflict = next(e for e in chosen if e.kind == "conflict")
    answers = {*conflict.memory_answers, *conflict.context_answers}
    others = [e for e in chosen if e.kind == "aligned" and answers.isdisjoint(e.memory_answers)][:2]
    scores = representation_gap(model, ConflictSet("three", (conflict, *others)), name="tiny")
    (a, b), c = (outputs(model, by_id[e.id].prompt) for e in others), outputs(model, conflict.prompt)
    found = scores.values[0, :-1].numpy()
    expected = [(degrees(x, c) - degrees(x, y))[:-1] for x, y in ((a, b), (b, a))]
    assert min(np.abs(found - one).max() for one in expected) < 1e-2


def test_angles_of_known_vectors():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    others = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(angle(rows, others), torch.tensor([0.0, 90.0, 180.0, 45.0]))


def test_scores_are_of_layers_and_come_back_from_a_file(tiny_llama, conflicts, tmp_path):
    scores = representation_gap(tiny_llama, conflicts, name="tiny")
    scores.save(tmp_path / "gap.parquet")
    again = LayerScores.load(tmp_path / "gap.parquet")
    torch.testing.assert_close(again.values, scores.values)
    assert again == replace(scores, values=again.values)
    assert scores.to_frame().columns == ["example_id", "subject", "layer", "score"]
    assert next(layer.layer for layer in scores.ranked("context")) == scores.mean().argmax().item()
    with pytest.raises(UserError, match="are not head scores"):
        HeadScores.load(tmp_path / "gap.parquet")


def test_growth_adds_up_to_the_gap(tiny_llama, conflicts):
    scores = representation_gap(tiny_llama, conflicts, name="tiny")
    torch.testing.assert_close(scores.growth().values.cumsum(1), scores.values)
    assert scores.growth().metric == "growth of gap"


def test_without_prompts_that_agree_there_is_nothing_to_compare(tiny_llama):
    with pytest.raises(UserError, match="comes with two prompts"):
        representation_gap(tiny_llama, tiny_conflicts(), name="tiny")
