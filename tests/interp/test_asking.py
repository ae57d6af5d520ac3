"""The same questions in another form, and prompts up to the answer itself."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interp.answers import abstains, first_sentence, is_complete
from interp.asking import Asking, at_answers, is_instructed
from interp.conflicts import ConflictExample, ConflictSet
from interp.errors import UserError
from interp.facts import PHRASINGS, build_conflicts, usable_facts
from interp.generation import continue_greedily
from interp.inputs import continuation_ids, first_token_id, token_ids
from interp.models import load_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def made(**fields: Any) -> ConflictExample:
    return ConflictExample(**fields)


@pytest.fixture
def chatty(tiny_plain):
    """What carries a tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tiny_plain("llama").tokenizer)
    tokenizer.chat_template = TEMPLATE
    return SimpleNamespace(tokenizer=tokenizer)


def example(conflicts, kind, subject="France", template="statement"):
    return next(e for e in conflicts if (e.kind, e.subject, e.template) == (kind, subject, template))


def test_a_chat_has_the_documents_and_the_question(chatty, capital_conflicts):
    asked = Asking("chat", system="Be brief.", prefix="It is").asked(chatty, "tiny", capital_conflicts)
    found = example(asked, "aligned")
    assert found.prompt == (
        "<system>Be brief.</system><user>Context:\nFact: The capital of France is Paris.\n\n"
        "Question: What is the capital of France?\nAnswer in a few words.</user><assistant>It is"
    )
    assert found.bare_prompt == (
        "<system>Be brief.</system><user>Question: What is the capital of France?\n"
        "Answer in a few words.</user><assistant>It is"
    )
    assert found.bare_prompt == example(asked, "none").prompt
    assert [e.id for e in asked] == [e.id for e in capital_conflicts]


CHATS = {
    "statement": (
        "<user>Context:\nFact: The capital of France is Paris.\n\n"
        "Question: What is the capital of France?\nAnswer in a few words.</user>"
    ),
    "question": (
        "<user>The capital of France is Paris.\n\nWhat is the capital of France?\nAnswer in a few words.</user>"
    ),
    "note": (
        "<system>Be brief.\n\nYou have these notes:\n- Paris is the capital of France.</system>"
        "<user>What is the capital of France?\nAnswer in a few words.</user>"
    ),
    "dialogue": (
        "<user>I read that Paris is the capital of France.</user>"
        "<assistant>Thank you, I have read it.</assistant>"
        "<user>What is the capital of France?\nAnswer in a few words.</user>"
    ),
}


@pytest.mark.parametrize("template", CHATS)
def test_every_phrasing_of_facts_has_a_layout_of_its_own(template, chatty):
    facts = build_conflicts({"capital": usable_facts("capital")}, phrasings=[template], kinds=["aligned"])
    asked = Asking("chat", system="Be brief.").asked(chatty, "tiny", facts)
    head = "" if template == "note" else "<system>Be brief.</system>"
    assert example(asked, "aligned", template=template).prompt == f"{head}{CHATS[template]}<assistant>"


def test_layouts_tell_documents_from_questions():
    layouts = {name: phrasing.chat for name, phrasing in PHRASINGS.items()}
    assert len(set(layouts.values())) == len(layouts)
    for layout in layouts.values():
        said = [message["content"] for message in layout.messages("Who?", ["Ida."])]
        assert sum(text.count("Ida.") for text in said) == sum(text.count("Who?") for text in said) == 1
        assert said != layout.messages("Who?", [])
        assert layout.messages("Who?", ["One.", "Two."])[0]["content"].startswith("Documents:\n[1] One.\n\n[2] Two.")


def test_one_question_and_a_text_of_ones_own(chatty):
    chat = Asking("chat", prefix="It is").settled(chatty, "tiny")
    assert chat.said(chatty, "Hello") == "<user>Hello</user><assistant>It is"
    assert chat.prompt(chatty, "Ida plays") == (
        "<user>Complete the sentence in a few words: Ida plays</user><assistant>It is"
    )
    plain = Asking().settled(chatty, "tiny")
    assert plain.said(chatty, "Hello") == "Hello"
    assert plain.prompt(chatty, "Who?", ["Ida did."]) == "User: Ida did. Who?\nAssistant:"
    assert plain.prompt(chatty, "Ida plays", ["Ida sings."]) == "Ida sings.\nIda plays"


def test_several_documents_are_numbered_and_stems_are_completed(chatty):
    fields: dict[str, Any] = {
        "subject": "s",
        "relation": "r",
        "memory_answers": ("m",),
        "context_answers": ("c",),
        "template": "t",
    }
    fields |= {"source": "x", "split": "test", "kind": "conflict", "prompt": "p", "id": "1"}
    several = made(**fields, question="Who?", contexts=("One.", "Two."), bare_prompt="Question: Who?")
    stem = made(**fields | {"id": "2"}, question="Ida plays", contexts=("Ida sings.",), bare_prompt="Ida plays")
    first, second = Asking("chat").asked(chatty, "tiny", ConflictSet("x", (several, stem)))
    assert "Documents:\n[1] One.\n\n[2] Two.\n\nQuestion: Who?" in first.prompt
    assert "Context:\nIda sings.\n\nComplete the sentence in a few words: Ida plays<" in second.prompt


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_examples_are_of_train_about_others_and_have_a_context_where_the_prompt_has(form, chatty, capital_conflicts):
    asked = Asking(form, shots=2).asked(chatty, "tiny", capital_conflicts)
    train = {e.subject for e in capital_conflicts if e.split == "train"}
    original = {e.id: e for e in capital_conflicts}
    for one in asked:
        # What is beside the point names other subjects itself.
        if one.kind == "irrelevant":
            continue
        before = one.prompt[: one.prompt.rindex(original[one.id].question)] if form == "chat" else one.prompt
        shown = [subject for subject in train - {one.subject} if subject in before]
        assert len(shown) == 2, one.prompt
        if form == "completion":
            assert one.prompt.endswith(original[one.id].prompt)
            answers = [e.memory_answers[0] for e in capital_conflicts if e.subject in shown]
            assert all(answer in one.prompt for answer in answers)
        else:
            if one.template == "statement":
                assert one.prompt.count("Context:") == (3 if one.contexts else 0)
            assert one.prompt.count("Answer in a few words.") == 3


def test_too_few_examples_are_told(chatty, capital_conflicts):
    with pytest.raises(UserError, match=r"other subjects .* to show, not 40; give fewer --shots"):
        Asking(shots=40).asked(chatty, "tiny", capital_conflicts)


def test_auto_takes_the_template_of_a_model_that_follows_instructions(chatty, tiny_plain, capital_conflicts):
    plain = tiny_plain("llama")
    assert Asking("auto").settled(chatty, "Tiny-Instruct").form == "chat"
    assert Asking("auto").settled(chatty, "tiny-base").form == "completion"
    assert Asking("auto").settled(plain, "Tiny-Instruct").form == "completion"
    assert Asking("auto").asked(plain, "Tiny-Instruct", capital_conflicts) is capital_conflicts
    with pytest.raises(UserError, match="has no chat template; ask with --format completion"):
        Asking("chat").settled(plain, "tiny")
    with pytest.raises(UserError, match="A system message belongs to a chat"):
        Asking(system="Be brief.").settled(chatty, "tiny")


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "Qwen/Qwen3-4B-Instruct-2507", "google/gemma-3-1b-it", "x-chat", "a_sft"]
)
def test_instructed_models_are_told_by_name(name):
    assert is_instructed(name)


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m", "italian-gpt", "meta-llama/Llama-3.2-1B"])
def test_others_are_not(name):
    assert not is_instructed(name)


def test_a_real_chat_is_tokenised_once_and_right(capital_conflicts):
    model: Any = load_model(device="cpu")
    one = example(Asking("chat").asked(model, "smollm2-135m", capital_conflicts), "conflict")
    content = one.prompt.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    expected = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert token_ids(model.tokenizer, [one.prompt])[0] == expected


def test_prompts_go_on_to_where_the_answers_part(capital_conflicts):
    """The model, left alone, writes the same text from the moved prompt on; there an answer of either source begins."""
    model = load_model(device="cpu")
    some = capital_conflicts.select(kind="conflict", templates=["statement"])
    chat = Asking("chat").asked(model, "smollm2-135m", ConflictSet("some", some.examples[:8]))
    whole = dict(
        zip(
            (e.id for e in chat),
            continue_greedily(model, [e.prompt for e in chat], max_new_tokens=24).answers,
            strict=True,
        )
    )
    moved = at_answers(model, chat)
    assert 4 <= len(moved.conflicts) == len(chat) - moved.left_out
    original = {e.id: e for e in chat}
    said = continue_greedily(model, [e.prompt for e in moved.conflicts], max_new_tokens=24)
    for one, answer, first in zip(moved.conflicts, said.answers, said.first_tokens.tolist(), strict=True):
        before = one.prompt.removeprefix(original[one.id].prompt).strip()
        assert f"{before} {answer}".strip() == whole[one.id]
        pair = [first_token_id(model, one.prompt, a[0]) for a in (one.context_answers, one.memory_answers)]
        assert pair[0] != pair[1]
        assert first in pair


def test_what_both_answers_begin_with_is_part_of_the_prompt(tiny_plain, monkeypatch):
    from interp import asking

    model = tiny_plain("llama")
    word = model.tokenizer.decode([7]).strip()
    fields: dict[str, Any] = {
        "subject": "s",
        "relation": "r",
        "template": "t",
        "source": "x",
        "split": "test",
        "kind": "conflict",
    }
    fields |= {
        "question": "Who?",
        "contexts": ("c",),
        "prompt": "The capital of Italy is",
        "bare_prompt": "b",
        "id": "1",
    }
    one = made(**fields, memory_answers=("Rome and Paris",), context_answers=("Rome and Lima",))
    other = made(**fields | {"id": "2"}, memory_answers=("Rome",), context_answers=("Lima",))
    texts = ["Rome and Paris are", f"{word} is all"]
    found = type("Found", (), {"answers": texts, "first_tokens": torch.zeros(2)})
    monkeypatch.setattr(asking, "continue_greedily", lambda *_, **__: found)
    moved = at_answers(model, ConflictSet("x", (one, other)))
    assert moved.left_out == 1
    (got,) = moved.conflicts
    assert got.prompt == "The capital of Italy is Rome and"
    assert (got.memory_answers[0], got.context_answers[0]) == ("Paris", "Lima")
    rest, whole = (
        continuation_ids(model, got.prompt, "Paris")[1],
        continuation_ids(model, one.prompt, "Rome and Paris")[1],
    )
    assert whole[-len(rest) :] == rest


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "I\u2019m not sure",
        "I can't find it",
        "The answer is not mentioned in the context",
        "It is unknown",
        "Not specified",
        "There is no information about this in the passage",
        "The document does not say",
        "The text doesn't mention it",
        "This cannot be determined",
        "unanswerable",
        "I am unable to answer",
        "Insufficient information",
    ],
)
def test_abstentions_are_told_in_many_wordings(answer):
    assert abstains(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Paris",
        "I know: Rome",
        "Not Paris but Rome",
        "He was not the author",
        "The Notebook",
        "It was not until 1911",
        "",
    ],
)
def test_answers_are_no_abstentions(answer):
    assert not abstains(answer)


def test_what_was_thought_is_no_answer():
    assert first_sentence("<think>Paris? No. Rome.</think>\n\nIt is Lima. Yes.") == "It is Lima"
    assert not is_complete("<think>Paris. Rome.")
    assert first_sentence("<think>Paris. Rome.") == ""
