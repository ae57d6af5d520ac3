"""What a context adds to each token, against passes of their own."""

from typing import Any

import pytest
import torch

from figures.reliance import reliance_map
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.generation import continue_greedily, next_logits
from interp.inputs import token_ids
from interp.reliance import forced_reliance, token_reliance
from tests.tiny import tiny_conflicts


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_each_token_is_compared_with_itself_without_the_context(architecture, tiny_plain):
    model = tiny_plain(architecture)
    conflicts = ConflictSet("some", tuple(e for e in tiny_conflicts() if e.bare_prompt != e.prompt)[:5])
    frame = token_reliance(model, conflicts, max_new_tokens=4)
    answers = continue_greedily(model, [e.prompt for e in conflicts], max_new_tokens=4).answers
    for example, answer in zip(conflicts, answers, strict=True):
        rows = frame.filter(id=example.id).sort("position").to_dicts()
        assert "".join(row["token"] for row in rows).strip() == answer
        said = ""
        for row in rows:
            # A prompt that ends where a token ends is tokenised alike.
            ids = [token_ids(model.tokenizer, [prompt + said])[0] for prompt in (example.prompt, example.bare_prompt)]
            p, q = (
                next(next_logits(model, [prompt + said]))[1][0].float().log_softmax(-1)
                for prompt in (example.prompt, example.bare_prompt)
            )
            said += row["token"]
            after = token_ids(model.tokenizer, [example.prompt + said])[0]
            if after[: len(ids[0])] != ids[0] or len(after) != len(ids[0]) + 1:
                break
            assert row["log_p"] == pytest.approx(p[after[-1]].item(), abs=1e-3)
            assert row["log_p_without"] == pytest.approx(q[after[-1]].item(), abs=1e-3)
            assert row["gain"] == pytest.approx(row["log_p"] - row["log_p_without"], abs=1e-6)
            assert row["divergence"] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-3)


def test_the_figure_shows_answers_token_by_token(tiny_plain):
    frame = token_reliance(tiny_plain("llama"), tiny_conflicts(), max_new_tokens=4)
    heat: Any = reliance_map(frame, count=3).data[0]
    first = frame["id"].unique(maintain_order=True).to_list()[0]
    shown = frame.filter(id=first)["gain"].to_list()
    assert list(heat.z[0])[: len(shown)] == shown
    assert len(heat.z) == 3
    with pytest.raises(UserError, match="There is no answer to draw"):
        reliance_map(frame.clear())


def test_what_cannot_be_measured_is_told(tiny_plain):
    with pytest.raises(UserError, match="has no prompt with a context that can be asked without it"):
        token_reliance(tiny_plain("llama"), ConflictSet("none", ()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_given_answer_is_measured_as_plain_passes_over_it_say(architecture, tiny_plain):
    model = tiny_plain(architecture)
    prompt, bare, answer = (
        "Tarn is in Kelland.\n\nQuestion: Where is Tarn?\nAnswer:",
        "Question: Where?\nAnswer:",
        "Kelland",
    )
    frame = forced_reliance(model, [bare, prompt], [bare, bare], [answer, answer]).filter(answer=1)
    passes = []
    for text in (prompt, bare):
        before, whole = token_ids(model.tokenizer, [text, f"{text} {answer}"])
        assert whole[: len(before)] == before
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
        passes.append(logits[len(before) - 1 : -1])
        told = whole[len(before) :]
    own, other = ([row[token].item() for row, token in zip(rows, told, strict=True)] for rows in passes)
    assert frame["log_p"].to_list() == pytest.approx(own, abs=1e-3)
    assert frame["log_p_without"].to_list() == pytest.approx(other, abs=1e-3)
    assert frame["gain"].to_list() == pytest.approx([p - q for p, q in zip(own, other, strict=True)], abs=1e-3)
    divergence = (passes[0].exp() * (passes[0] - passes[1])).sum(-1).tolist()
    assert frame["divergence"].to_list() == pytest.approx(divergence, abs=1e-3)


@pytest.mark.parametrize("answer", ["Lima, in the north", " Lima - 1911", "S\u00e3o Tom\u00e9 \u6771\u4eac"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_offsets_spell_the_words_of_the_answer(architecture, answer, tiny_plain):
    frame = forced_reliance(tiny_plain(architecture), ["The capital is Lima. It is"], ["It is"], [answer])
    places = dict.fromkeys(frame["start", "end"].rows())
    spelled = "".join(answer[start:end] for start, end in places)
    assert spelled.replace(" ", "") == answer.replace(" ", "")
    assert frame["start"].is_sorted()


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [(["a", "b"], ["c"], "2 prompts, 1 bare prompts and 1 answers"), (["a"], [" "], "Answer 0 is empty")],
)
def test_answers_that_cannot_be_forced_are_told(prompts, answers, message, tiny_plain):
    with pytest.raises(UserError, match=message):
        forced_reliance(tiny_plain("llama"), prompts, ["a"], answers)
