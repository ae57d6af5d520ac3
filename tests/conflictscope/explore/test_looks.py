import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conflictscope.explore import looks
from conflictscope.explore.looks import (
    CHAT_TOKENS,
    LONGEST,
    MAX_NEW_TOKENS,
    UNEDITED,
    Asked,
    Edit,
    Explorer,
    examples,
    find_detector,
    repeated_opening,
    said_by,
    short_answer,
)
from interp.answers import usage_of
from interp.asking import Asking
from interp.attention import attention_from_last
from interp.attribution.direct_logits import direct_logit_attribution
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.fingerprints import fingerprint
from interp.generation import Continuations, answer_steps, continue_greedily
from interp.lens import logit_lens
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from probes.detector import CONFLICT_CLASSES, ConflictDetector
from probes.linear import LinearProbe

ASKED = Asked("The capital of Japan is", "The capital of Japan is Lima.", "Tokyo", "Lima")
PROMPT = "The capital of Japan is Lima.\nThe capital of Japan is"
HEADS = HeadScaling.of([(1, 1), (2, 3)], -4.0)
DIAL = TrustDial((DialScale(1, 1, -1.0, 6.0), DialScale(2, 2, 2.0, -5.0), DialScale(2, None, 0.5, 1.0)), trust=0.5)


def explorer_of(model: Any) -> Explorer:
    """A model with a file of heads, a dial and a gate, and with a detector."""
    identity = ModelIdentity.of(model, "tiny")
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    parts: dict[str, Any] = {
        "heads": HEADS,
        "dial": DIAL,
        "gate": ConflictGate("block", 0, weight[0], 0.0, 0.0, (HEADS,)),
    }
    files = {name: InterventionFile.of([part], name=name, model=identity) for name, part in parts.items()}
    probe = LinearProbe("blocks.1.hook_out", CONFLICT_CLASSES, weight, torch.zeros(1), 1.0, 0.9)
    settings = {"model": {"name": "tiny", "fingerprint": fingerprint(model)}}
    return Explorer(model, name="tiny", files=files, detector=ConflictDetector(probe, 0.5, settings=settings))


@pytest.fixture(scope="module")
def explorer(tiny_llama: Any) -> Explorer:
    return explorer_of(tiny_llama)


EDITS: list[tuple[Edit, Any]] = [
    (Edit("heads"), HEADS),
    (Edit("heads", 0.5), HeadScaling.of([(1, 1), (2, 3)], -1.5)),
    (Edit("dial", -0.5), DIAL.at(-0.5)),
    (Edit("dial"), DIAL),
    (Edit(head=(2, 0), scale=3.0), HeadScaling.of([(2, 0)], 3.0)),
]

# What is shown is what the library says


def test_an_unedited_look_is_what_the_library_says(explorer):
    look = explorer.look(ASKED)
    alone = ConflictSet("alone", (look.example,))
    model = explorer.model
    assert look.example.prompt == PROMPT
    assert look.example.bare_prompt == "The capital of Japan is"
    found = continue_greedily(model, [look.example.bare_prompt, PROMPT], max_new_tokens=MAX_NEW_TOKENS).answers
    assert [look.unedited.closed_book, look.unedited.with_context] == found
    assert look.unedited.with_context_usage == usage_of(found[1], ["Tokyo"], ["Lima"])
    assert list(look.unedited.steps) == answer_steps(model, PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    assert look.unedited.lens is not None
    assert look.heads is not None
    assert torch.equal(look.unedited.lens.log_probabilities, logit_lens(model, alone).log_probabilities)
    assert torch.equal(look.heads.values, direct_logit_attribution(model, alone, name="tiny").heads.values)
    assert look.detection == explorer.detector.detect(model, [PROMPT])[0]
    assert (look.edited, look.no_race, look.edited_heads) == (None, "", ())


@pytest.mark.parametrize(("edit", "by_hand"), EDITS)
def test_an_edited_look_is_what_the_library_says_under_that_edit(explorer, edit, by_hand):
    look = explorer.look(ASKED, edit)
    alone = ConflictSet("alone", (look.example,))
    with applied(explorer.model, by_hand):
        found = continue_greedily(explorer.model, [look.example.bare_prompt, PROMPT], max_new_tokens=MAX_NEW_TOKENS)
        steps = answer_steps(explorer.model, PROMPT, max_new_tokens=MAX_NEW_TOKENS)
        lens = logit_lens(explorer.model, alone)
    assert look.edited is not None
    assert look.edited.lens is not None
    assert [look.edited.closed_book, look.edited.with_context] == found.answers
    assert [step.token for step in look.edited.steps] == [step.token for step in steps]
    assert [s.probability for s in look.edited.steps] == pytest.approx([s.probability for s in steps], abs=1e-5)
    torch.testing.assert_close(look.edited.lens.log_probabilities, lens.log_probabilities, atol=1e-4, rtol=1e-4)
    assert look.edited != look.unedited
    assert look.unedited == explorer.look(ASKED).unedited


def test_a_file_and_a_head_are_edited_together(explorer):
    both = explorer.look(ASKED, Edit("heads", 1.0, (1, 1), 0.0))
    with applied(explorer.model, HeadScaling.of([(1, 1)], 0.0), HeadScaling.of([(2, 3)], -4.0)):
        lens = logit_lens(explorer.model, ConflictSet("alone", (both.example,)))
    torch.testing.assert_close(both.edited.lens.log_probabilities, lens.log_probabilities, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("edit", "heads"),
    [
        (Edit("heads"), ((1, 1), (2, 3))),
        (Edit("gate"), ((1, 1), (2, 3))),
        (Edit("dial", 1.0), ((1, 1), (2, 2))),
        (Edit("heads", 0.0, (0, 0), 0.0), ((0, 0),)),
        (Edit(head=(0, 0), scale=1.0), ()),
    ],
)
def test_edited_heads_are_those_whose_scale_is_not_one(explorer, edit, heads):
    assert explorer.look(ASKED, edit).edited_heads == heads


def test_attention_is_what_the_library_says(explorer):
    heads = [(0, 1), (2, 3)]
    found, expected = explorer.attention(ASKED, heads), attention_from_last(explorer.model, PROMPT, heads)
    assert (found.tokens, found.heads) == (expected.tokens, expected.heads)
    assert torch.equal(found.weights, expected.weights)


def test_threads_that_ask_at_once_get_what_each_would_get_alone(tiny_llama):
    alone, together = explorer_of(tiny_llama), explorer_of(tiny_llama)
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, edit=edit: found.update({i: together.look(ASKED, edit)}))
        for i, (edit, _) in enumerate(EDITS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (edit, _) in enumerate(EDITS):
        expected: Any = alone.look(ASKED, edit).edited
        assert found[i].edited.steps == expected.steps
        assert torch.equal(found[i].edited.lens.log_probabilities, expected.lens.log_probabilities)


# The two answers, where they are not typed


def test_an_empty_memory_answer_is_what_the_model_answers_without_the_context(explorer):
    own = continue_greedily(explorer.model, [ASKED.question], max_new_tokens=MAX_NEW_TOKENS).answers[0]
    look = explorer.look(Asked(ASKED.question, ASKED.context, "", "Lima"))
    assert look.example.memory_answers == (short_answer(own),)
    assert look.unedited.closed_book_usage == "memory"


def scripted(answers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say what a test needs."""

    def say(_: Any, prompts: list[str], **__: Any) -> Continuations:
        return Continuations([answers[prompt] for prompt in prompts], torch.zeros(0), torch.zeros(0))

    monkeypatch.setattr(looks, "continue_greedily", say)


def test_an_answer_that_repeats_the_question_is_waited_for_after_what_it_repeats(tiny_llama, monkeypatch):
    question = "What is the capital of Japan?"
    closed = f"User: {question}\nAssistant:"
    prompt = f"User: Lima it is. {question}\nAssistant: The capital of Japan is"
    said = {
        closed: "The capital of Japan is Tokyo",
        f"{closed} The capital of Japan is": "Tokyo, a city",
        prompt: "Lima",
    }
    scripted(said, monkeypatch)
    look = Explorer(tiny_llama, name="tiny").look(Asked(question, "Lima it is."))
    assert look.example.prompt == prompt
    assert look.example.bare_prompt == f"{closed} The capital of Japan is"
    assert (look.example.memory_answers, look.example.context_answers) == (("Tokyo",), ("Lima",))


@pytest.mark.parametrize(
    ("closed", "read", "typed", "sentence"),
    [
        ("Tokyo", "Tokyo", {}, "type the context's answer"),
        ("", "Lima", {}, "type the memory answer"),
        ("Tokyo", "Quito", {}, "does not tell what the context says; type the context's answer"),
        ("Tokyo", "Lima", {"context_answer": "tokyo"}, "Memory and context both answer Tokyo"),
        ("Tokyo", "Lima", {"context_answer": "Tokyo Bay"}, "start with the same token"),
    ],
)
def test_where_answers_cannot_race_a_sentence_says_why_and_the_rest_is_shown(
    tiny_llama, monkeypatch, closed, read, typed, sentence
):
    scripted({ASKED.question: closed, PROMPT: read}, monkeypatch)
    explorer = explorer_of(tiny_llama)
    look = explorer.look(Asked(ASKED.question, ASKED.context, **typed), Edit("heads"))
    assert sentence in look.no_race
    assert look.heads is None
    assert look.unedited.lens is None
    assert look.detection is not None
    assert look.edited is not None
    assert look.edited.steps


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        ("Tokyo", "Tokyo"),
        ("Tokyo, which is large", "Tokyo"),
        (": Tokyo (the city)", "Tokyo"),
        ("William Shakespeare is written by the renowned", "William Shakespeare"),
        ("Nikola Tesla in 1875", "Nikola Tesla"),
        ("Isabel", "Isabel"),
        ("2,000 people", "2,000 people"),
        ("", ""),
    ],
)
def test_a_short_answer_ends_at_the_first_punctuation_or_clause(answer, short):
    assert short_answer(answer) == short


@pytest.mark.parametrize(
    ("answer", "opening"),
    [
        ("The capital of Japan is Tokyo", "The capital of Japan is"),
        ("The capital of Japan, as you know, is Tokyo", "The capital of Japan,"),
        ("The Tokyo", ""),
        ("Tokyo is the capital of Japan", ""),
        ("What is the capital of Japan", ""),
        ("", ""),
    ],
)
def test_the_opening_is_what_an_answer_repeats_of_the_question(answer, opening):
    assert repeated_opening(answer, "What is the capital of Japan?") == opening


def test_every_example_can_be_asked_and_one_agrees_with_memory():
    found = examples()
    assert sum(asked.memory_answer == asked.context_answer for asked in found.values()) == 1
    for asked in found.values():
        assert looks._checked(asked, bounded=True) == asked
        assert asked.context_answer in asked.context


# What is refused


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(" ", "A context."), "There is no question"),
        (Asked("Why?", "\n"), "There is no context"),
        (Asked("Why?" * LONGEST["question"], "A context."), "The question has 2000 characters; shorten it to 500"),
        (Asked("Why?", "x" * 5000), "The context has 5000 characters"),
        (Asked("Why?", "x", "y" * 101), "The memory answer has 101 characters"),
        (Asked("Why?", "x", "y", "z" * 101), "The context answer has 101 characters"),
        (Asked("Why?", "\N{SNOWMAN}" * 2000), "more than the 1024 shown here; shorten it"),
    ],
)
def test_what_is_missing_or_too_long_is_refused_in_a_sentence(explorer, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        explorer.look(asked)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (Edit("other"), "There is no intervention 'other'; there are none, heads, dial, gate"),
        (Edit("dial", 2.0), "Trust lies between"),
        (Edit("heads", math.nan), "finite number"),
        (Edit(head=(9, 9), scale=0.0), "9"),
    ],
)
def test_an_edit_that_is_not_there_is_refused_and_leaves_the_model_alone(explorer, edit, sentence):
    before = explorer.look(ASKED).unedited
    with pytest.raises(UserError, match=sentence):
        explorer.look(ASKED, edit)
    assert answer_steps(explorer.model, PROMPT, max_new_tokens=MAX_NEW_TOKENS) == list(before.steps)


def test_a_prompt_longer_than_the_model_is_refused(tiny_directories):
    explorer = Explorer(load_model(str(tiny_directories["gpt2"]), device="cpu"), name="tiny")
    with pytest.raises(UserError, match=f"more than the {64 - MAX_NEW_TOKENS} shown here"):
        explorer.look(Asked("The capital of Japan is", "Lima is large. " * 30))


def test_a_file_of_another_model_and_one_called_none_are_refused(tiny_llama, tiny_directories):
    file = InterventionFile.of([HEADS], name="heads", model=ModelIdentity.of(tiny_llama, "tiny"))
    with pytest.raises(UserError, match="cannot be called none"):
        Explorer(tiny_llama, name="tiny", files={UNEDITED: file})
    with pytest.raises(UserError, match="is for tiny"):
        Explorer(load_model(str(tiny_directories["qwen2"]), device="cpu"), name="other", files={"heads": file})


def test_a_dial_is_set_by_trust_and_all_else_by_strength(explorer):
    assert explorer.dose("dial") == ("trust", -1.0, 1.0, 0.5)
    assert explorer.dose("heads") == explorer.dose("gate") == ("strength", 0.0, 2.0, 1.0)


# The detector


def test_a_detector_is_found_where_it_is_given_or_usual(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, reason = find_detector(explorer.model, None)
    assert found is None
    assert "conflictscope probe fit" in reason
    explorer.detector.save(tmp_path / "out" / "probes" / "detector")
    for folder in (None, Path("out/probes/detector")):
        found, reason = find_detector(explorer.model, folder)
        assert reason == ""
        assert found is not None
        assert found.detect(explorer.model, [PROMPT]) == explorer.detector.detect(explorer.model, [PROMPT])


def test_a_detector_of_another_model_is_refused_if_given_and_passed_over_if_only_found(
    explorer, tiny_directories, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    other = load_model(str(tiny_directories["qwen2"]), device="cpu")
    explorer.detector.save("out/probes/detector")
    found, reason = find_detector(other, None)
    assert found is None
    assert "fitted on tiny with other weights" in reason
    with pytest.raises(UserError, match="fitted on tiny with other weights"):
        find_detector(other, Path("out/probes/detector"))


def test_in_a_chat_the_race_is_run_where_the_answer_begins() -> None:
    """The real model answers in a sentence; what it writes from the prompt on is the rest of that sentence."""
    model: Any = load_model(device="cpu")
    explorer = Explorer(model, name="smollm2-135m", asking=Asking("chat", "Be brief."))
    question = "Who invented the AC induction motor?"
    look = explorer.look(Asked(question, "Marie Curie did.", "Nikola Tesla", "Marie Curie"))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "CONTENT"}]
    head, _, tail = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).partition(
        "CONTENT"
    )
    content = f"Context:\nMarie Curie did.\n\nQuestion: {question}\nAnswer in a few words."
    start = head + content + tail
    assert look.example.prompt.startswith(start)
    opening = look.example.prompt.removeprefix(start).strip()
    # What is left is the answer itself.
    assert look.unedited.with_context.startswith("Marie Curie")
    whole = continue_greedily(model, [start], max_new_tokens=CHAT_TOKENS).answers[0]
    assert f"{opening} {look.unedited.with_context}".strip() == whole
    assert look.heads is not None


def test_a_chat_needs_a_template(tiny_llama: nn.Module) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        Explorer(tiny_llama, name="tiny", asking=Asking("chat"))


@pytest.mark.parametrize(
    ("context", "answer", "found"),
    [
        ("Marie Curie invented it.", "Marie Curie is credited as the inventor", "Marie Curie"),
        ("Lima is the capital.", "Lima", "Lima"),
        ("The city is old.", "The answer", ""),
        ("Lima is big.", "Tokyo", ""),
        ("Lima is big.", "", ""),
    ],
)
def test_what_the_context_says_of_an_answer_are_its_first_words(context: str, answer: str, found: str) -> None:
    assert said_by(context, answer) == found
