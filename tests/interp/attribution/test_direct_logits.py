import torch

from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.examples import scorable
from interp.conflicts import ConflictSet
from interp.inputs import encode
from tests.tiny import tiny_conflicts


def logit_difference(bridge, conflicts):
    """Context minus memory, straight from the model's own forward pass; soft-capping undone."""
    examples, ids = scorable(bridge, conflicts)
    with torch.inference_mode():
        logits = bridge.original_model(**encode(bridge, [e.prompt for e in examples])).logits[:, -1]
    cap = getattr(bridge.original_model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.atanh(logits.double() / cap)
    answers = logits.gather(1, ids)
    return (answers[:, 0] - answers[:, 1]).float()


def assert_sums_to_logit_difference(bridge, conflicts):
    expected = logit_difference(bridge, conflicts)
    parts = direct_logit_attribution(bridge, conflicts, name="model")
    assert ((parts.total - expected).norm() / expected.norm()).item() < 1e-4


def test_parts_sum_to_the_logit_difference_in_every_architecture(tiny_bridge):
    assert_sums_to_logit_difference(tiny_bridge, tiny_conflicts())


def test_parts_sum_to_the_logit_difference_on_the_real_model(smollm2, capital_conflicts):
    conflicts = ConflictSet("twelve", capital_conflicts.select(kind="conflict").examples[:12])
    assert_sums_to_logit_difference(smollm2, conflicts)
