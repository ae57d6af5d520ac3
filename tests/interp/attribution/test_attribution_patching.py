import torch

from interp.anatomy import Anatomy
from interp.attribution.attribution_patching import attribution_patching
from interp.attribution.examples import corrupted_partners, scorable
from interp.attribution.states import last_token_states
from interp.inputs import encode
from tests.tiny import tiny_conflicts


def test_score_is_the_derivative_of_patching(tiny_bridge):
    """Moving one head's END output a small step towards its corrupted value changes the logits by step * score."""
    conflicts = tiny_conflicts()
    examples, ids = scorable(tiny_bridge, conflicts)
    prompts = [e.prompt for e in examples]
    z = last_token_states(tiny_bridge, prompts).z
    change = z[corrupted_partners(examples, 0)] - z
    layer, head, step = 1, 2, 1e-2
    anatomy = Anatomy(tiny_bridge)
    columns = slice(head * anatomy.d_head, (head + 1) * anatomy.d_head)

    def difference(factor):
        def move(_, inputs):
            moved = inputs[0].clone()
            moved[:, -1, columns] += factor * change[:, layer, head]
            return (moved, *inputs[1:])

        handle = anatomy.module("output_projection", layer).register_forward_pre_hook(move)
        with torch.no_grad():
            answers = anatomy.model(**encode(tiny_bridge, prompts)).logits[:, -1].gather(1, ids)
        handle.remove()
        return answers[:, 0] - answers[:, 1]

    expected = -(difference(step) - difference(-step)) / (2 * step)
    found = attribution_patching(tiny_bridge, conflicts, name="tiny").values[:, layer, head]
    assert ((found - expected).norm() / expected.norm()).item() < 2e-2
