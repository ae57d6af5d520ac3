from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conflictscope.methods.cad import ContextAware, ContextAwareDecoding
from conflictscope.study.condition import Condition, Decoding
from interp.answers import Direction
from interp.evaluation import measure_usage
from interp.generation import continue_greedily
from tests.conflictscope.methods.labs import tiny_lab
from tests.interp.two_streams import two_passes_a_token
from tests.tiny import tiny_conflicts

PUBLISHED = Path(__file__).parents[3].parent / "shared" / "data" / "decoding" / "golden.safetensors"
EXAMPLES = tiny_conflicts().examples


def answered(model, alpha: float) -> list[str]:
    prompts, bare = [e.prompt for e in EXAMPLES], [str(e.bare_prompt) for e in EXAMPLES]
    return continue_greedily(model, prompts, without=bare, combined=ContextAware(alpha).combined).answers


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.5, 1.0])
def test_answers_are_those_of_two_forward_passes_a_token(tiny_llama, tiny_plain, alpha):
    def rule(with_context, without):
        return with_context + alpha * (with_context - without)

    expected = [two_passes_a_token(tiny_plain("llama"), e.prompt, str(e.bare_prompt), rule) for e in EXAMPLES]
    assert answered(tiny_llama, alpha) == expected


def test_alpha_0_is_greedy_and_alpha_minus_1_answers_as_without_the_context(tiny_llama):
    assert answered(tiny_llama, 0.0) == continue_greedily(tiny_llama, [e.prompt for e in EXAMPLES]).answers
    assert answered(tiny_llama, -1.0) == continue_greedily(tiny_llama, [str(e.bare_prompt) for e in EXAMPLES]).answers


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the values of the released code are not here")
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_scores_are_those_of_the_released_code(alpha):
    golden = load_file(PUBLISHED)
    scores = ContextAware(alpha).combined(golden["logits_with_context"], golden["logits_without_context"])
    torch.testing.assert_close(scores.log_softmax(-1), golden[f"cad_log_probs_alpha_{alpha}"])


def test_prompts_without_a_context_are_answered_as_unedited(tiny_llama, tmp_path):
    bare = tiny_lab(tiny_llama, tmp_path).prompts.test.select(kind="none")
    reports = [measure_usage(tiny_llama, bare, combined=rule).frame for rule in (None, ContextAware(1.0).combined)]
    assert reports[0].equals(reports[1])


def test_the_candidates_lean_to_the_source_and_can_be_written_down(tiny_llama, tmp_path):
    lab = tiny_lab(tiny_llama, tmp_path)
    wanted: dict[Direction, list[float]] = {"context": [0.5, 1.0], "memory": [-0.5, -1.0]}
    for source, alphas in wanted.items():
        candidates = ContextAwareDecoding().candidates(lab, source)
        assert [c.decoding for c in candidates] == [ContextAware(alpha) for alpha in alphas]
        assert all(Decoding.from_record(c.decoding.to_record()) == c.decoding for c in candidates)
        assert len({c.digest for c in candidates}) == 2
        assert lab.chosen(ContextAwareDecoding(), source).best.condition.method == "cad"


def test_half_as_far_is_half_the_alpha():
    condition = Condition("cad", "context", {"alpha": 1.0}, decoding=ContextAware(1.0))
    assert condition.scaled(0.5).digest == Condition("cad", decoding=ContextAware(0.5)).digest
