import copy
import re
from collections import Counter
from string import Formatter

import pytest

from interp.answers import contains_answer
from interp.conflicts import SPLITS, split_of
from interp.errors import UserError
from interp.facts import Fact, build_conflicts, load_facts, relation_named, relations, usable_facts
from interp.families import (
    AROUND,
    FAMILIES,
    LEARNED_FAMILIES,
    UNSEEN_FAMILIES,
    VARIANTS,
    Family,
    can_be_asked,
    variant_of,
    worded_conflicts,
)
from interp.files import assets_directory, read_json

ALL_RELATIONS = sorted(relations())
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDINGS = read_json(assets_directory() / "facts" / "wordings.json")
SEED = 1


@pytest.fixture(scope="module")
def plain(tiny_plain):
    """A tokenizer without a chat template."""
    return tiny_plain("llama").tokenizer


@pytest.fixture(scope="module")
def chatty(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def everything(chatty):
    """Many facts in every variant, in two learned families and in every unseen one."""
    facts = {name: usable_facts(name)[:40] for name in ALL_RELATIONS}
    learned = worded_conflicts(facts, chatty, each=2, seed=SEED)
    return [*learned, *worded_conflicts(facts, chatty, families=UNSEEN_FAMILIES, seed=SEED)]


def two_facts(relation: str) -> list[Fact]:
    """Two facts of one split that contradict each other."""
    first, *others = [fact for fact in usable_facts(relation) if split_of(fact.subject, 0) == "train"]
    return [first, next(fact for fact in others if not {*fact.answers} & {*first.answers})]


def of_variant(examples, *variants):
    return [example for example in examples if variant_of(example) in variants]


# The parts


@pytest.mark.parametrize("name", ALL_RELATIONS)
def test_every_family_can_be_written_for_every_relation(name, chatty):
    families = tuple(FAMILIES.values())
    made = worded_conflicts({name: two_facts(name)}, chatty, families=families, variants=("conflict",))
    assert made.counts()["by_template"] == dict.fromkeys(FAMILIES, 2)
    for example in made:
        assert example.subject in example.prompt
        assert example.context_answers[0].lower() in example.prompt.lower()
        assert not {*"{}"} & {*example.prompt}


def test_unseen_families_share_no_layout_telling_or_question_with_learned_ones():
    assert len(UNSEEN_FAMILIES) + len(LEARNED_FAMILIES) == len(FAMILIES)
    for part in ("layout", "telling", "asked"):
        learned, unseen = ({getattr(f, part) for f in some} for some in (LEARNED_FAMILIES, UNSEEN_FAMILIES))
        assert min(len(learned), len(unseen)) > 0
        assert not learned & unseen


@pytest.mark.parametrize("name", ALL_RELATIONS)
def test_unseen_families_are_worded_as_no_learned_one(name, plain):
    """Not by name alone: the texts that are asked and told differ."""
    facts = {name: two_facts(name)}

    def texts(families):
        made = worded_conflicts(facts, plain, families=families, variants=("conflict",), splits=("train",))
        return {e.question for e in made}, {e.context for e in made}

    learned = texts([family for family in LEARNED_FAMILIES if family.around == "alone"])
    unseen = texts([Family(f.layout, f.telling, f.asked, "alone") for f in UNSEEN_FAMILIES])
    assert not learned[0] & unseen[0]
    assert not learned[1] & unseen[1]


def test_learned_families_are_every_combination_of_their_parts():
    parts = [{getattr(f, part) for f in LEARNED_FAMILIES} for part in ("layout", "telling", "asked", "around")]
    assert parts[3] == {*AROUND}
    expected = 1
    for part in parts:
        expected *= len(part)
    assert len({*LEARNED_FAMILIES}) == len(LEARNED_FAMILIES) == expected


@pytest.mark.parametrize("name", ALL_RELATIONS)
def test_wordings_name_subject_and_answer(name):
    def fields(text):
        return Counter(field for _, field, *_ in Formatter().parse(text) if field is not None)

    assert [*WORDINGS] == [*relations()]
    assert {part: len(some) for part, some in WORDINGS[name].items()} == {"asked": 3, "implied": 4}
    for question, stem in WORDINGS[name]["asked"]:
        assert fields(question) == fields(stem) == {"subject": 1}
        assert question.endswith("?")
        assert not stem.endswith((" ", "."))
    for implied in WORDINGS[name]["implied"]:
        assert fields(implied) == {"subject": 1, "answer": 1}
        assert implied.endswith(".")
    relation = relation_named(name)
    questions = [relation.question, *(question for question, _ in WORDINGS[name]["asked"])]
    stems = [relation.stem, *(stem for _, stem in WORDINGS[name]["asked"])]
    assert len({*questions}) == len({*stems}) == len({*WORDINGS[name]["implied"]}) == 4


# What contexts tell


def test_a_context_tells_its_answer_once(everything):
    told = of_variant(everything, "conflict", "aligned")
    assert len(told) > 2000
    for example in told:
        assert contains_answer(example.context, [example.subject])
        answer = rf"(?<!\w){re.escape(example.context_answers[0])}(?!\w)"
        times = len(re.findall(answer, example.context, re.IGNORECASE))
        # One sentence of a document names it twice.
        assert times == (2 if "-document-" in example.template else 1), example.context


def test_a_sentence_about_other_things_names_neither_subject_nor_answer(chatty):
    facts = {name: usable_facts(name)[:20] for name in ALL_RELATIONS}
    variants = ("conflict", "aligned")

    def contexts(around):
        families = [Family("plain", "implied_1", 0, around)]
        return worded_conflicts(facts, chatty, families=families, variants=variants, seed=SEED)

    for alone, surrounded, far in zip(*(contexts(around) for around in ("alone", "between", "far")), strict=True):
        sentence = alone.context
        for context, is_first in ((surrounded.context, False), (far.context, True)):
            assert context.count(sentence) == 1
            before, after = context.split(sentence)
            assert (before != "", after != "") == (not is_first, True)
            answers = [*alone.context_answers, *alone.memory_answers]
            assert not contains_answer(f"{before} / {after}", [alone.subject, *answers])


def test_only_aligned_contexts_name_the_memory_answer(everything):
    others = [e for e in everything if variant_of(e) != "aligned"]
    assert [e.id for e in others if contains_answer(e.context, e.memory_answers)] == []


def test_an_irrelevant_context_names_the_subject_only_where_it_is_about_it(everything):
    about = of_variant(everything, "irrelevant_same_subject")
    assert [e.id for e in about if not contains_answer(e.context, [e.subject])] == []
    others = of_variant(everything, "irrelevant_same_relation", "irrelevant_other")
    assert [e.id for e in others if contains_answer(e.context, [e.subject])] == []
    assert {e.context_answers for e in [*about, *others]} == {()}


def test_a_fact_whose_answer_is_a_word_of_other_sentences_is_told_apart(chatty):
    """Sports are "won", which is the currency of Korea."""
    korean = [fact for fact in load_facts("currency") if "won" in fact.answers]
    assert len(korean) == 2
    facts = [*korean, *usable_facts("currency")[:10]]
    for seed in range(3):
        made = worded_conflicts({"currency": facts}, chatty, each=100, seed=seed)
        asked = [e for e in made if "won" in e.memory_answers and variant_of(e) != "aligned"]
        assert [e.context for e in asked if contains_answer(e.context, ["won"])] == []


def test_an_answer_that_no_sentence_leaves_out_is_an_error(chatty):
    facts = [fact for fact in usable_facts("capital") if split_of(fact.subject, 0) == "train"][:1]
    facts.append(
        Fact(next(f.subject for f in usable_facts("sport") if split_of(f.subject, 0) == "train"), ("according to",))
    )
    families = [Family("plain", "authority", 0, "alone")]
    with pytest.raises(UserError, match=r"No context leaves out .*; leave this fact out"):
        worded_conflicts({"painter": facts}, chatty, families=families, variants=("irrelevant_other",))


def test_conflicting_answers_are_a_permutation(everything):
    for family in (f.name for f in UNSEEN_FAMILIES):
        for name in ALL_RELATIONS:
            for split in SPLITS:
                part = [e for e in everything if (e.template, e.relation, e.split) == (family, name, split)]
                wrong, right = (
                    Counter(e.context_answers for e in of_variant(part, v)) for v in ("conflict", "aligned")
                )
                assert wrong == right


def test_a_context_is_about_subjects_of_the_prompts_split(everything):
    of_subject = {}
    subjects = {fact.subject: split_of(fact.subject, SEED) for name in ALL_RELATIONS for fact in load_facts(name)}
    for example in everything:
        assert of_subject.setdefault(example.subject, example.split) == example.split
        assert example.split == subjects[example.subject]
    stems = {
        f"{relation_named(name).stem.format(subject=fact.subject)} {fact.answers[0]}.".lower(): fact.subject
        for name in ALL_RELATIONS
        for fact in load_facts(name)
    }
    stated = {f.name for f in LEARNED_FAMILIES if f.telling == "stem" and f.around == "alone"}
    irrelevant = [e for e in everything if e.kind == "irrelevant" and e.template in stated]
    told = [(subjects[stems[e.context.lower()]], e.split) for e in irrelevant if e.context.lower() in stems]
    assert len(told) > 5
    assert all(one == other for one, other in told)


# Prompts


def test_a_bare_prompt_is_the_prompt_without_context(everything):
    alone = {(e.relation, e.subject, e.template): e.prompt for e in of_variant(everything, "none")}
    unseen = [e for e in everything if e.template in {f.name for f in UNSEEN_FAMILIES}]
    assert all(e.bare_prompt == alone[e.relation, e.subject, e.template] for e in unseen)
    for example in everything:
        assert example.contexts == ((example.context,) if example.kind != "none" else ())
        assert (example.prompt == example.bare_prompt) == (example.kind == "none")
        assert example.context in example.prompt
        assert example.kind == "none" or example.context not in example.bare_prompt


def test_chats_are_left_out_without_a_template(plain, chatty):
    assert can_be_asked(LEARNED_FAMILIES, chatty) == LEARNED_FAMILIES
    completions = can_be_asked(LEARNED_FAMILIES, plain)
    assert {f.layout for f in LEARNED_FAMILIES} - {f.layout for f in completions} == {
        *("chat", "chat_tagged", "chat_system", "chat_earlier", "chat_after", "chat_open")
    }
    chats = [family for family in LEARNED_FAMILIES if family.is_chat]
    with pytest.raises(UserError, match="chats need a tokenizer with a chat template; give families of completions"):
        worded_conflicts({"capital": usable_facts("capital")}, plain, families=chats)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("chat", "<user>Context:\n{c}\n\nQuestion: {q}\nAnswer in a few words.</user><assistant>{s}"),
        ("chat_tagged", "<user><document>\n{c}\n</document>\n\n{q}\nAnswer in a few words.</user><assistant>{s}"),
        (
            "chat_system",
            "<system>You have these notes:\n- {c}</system><user>{q}\nAnswer in a few words.</user><assistant>{s}",
        ),
        (
            "chat_earlier",
            "<user>{c}</user><assistant>Thank you, I have read it.</assistant>"
            "<user>{q}\nAnswer in a few words.</user><assistant>{s}",
        ),
        ("chat_after", "<user>{q}\nAnswer in a few words.\n\nPassage:\n{c}</user><assistant>{s}"),
        ("chat_open", "<user>I found this: {c}\n\nNow tell me: {q}\nAnswer in a few words.</user><assistant>"),
    ],
)
def test_chats_are_written_through_the_template(layout, expected, chatty):
    families = [Family(layout, "inverse", 1, "alone")]
    made = worded_conflicts({"capital": two_facts("capital")}, chatty, families=families, variants=("conflict",))
    for example in made:
        context = f"{example.context_answers[0]} is the capital of {example.subject}."
        question = f"Which city is the seat of government of {example.subject}?"
        stem = f"The seat of government of {example.subject} is"
        prompt = expected.format(c=context, q=question, s=stem)
        assert example.prompt == prompt


def test_answers_are_tokenised_as_what_continues_the_prompt_of_a_real_model(smollm2):
    """The real template ends with a line break, after which the stem starts."""
    families = [Family("chat", "stem", 0, "alone")]
    made = worded_conflicts({"capital": two_facts("capital")}, smollm2.tokenizer, families=families)
    for example in made:
        ending = f"<|im_start|>assistant\nThe capital of {example.subject} is"
        assert example.prompt.endswith(ending)


# What is drawn


def test_the_same_seed_gives_the_same_set(chatty):
    facts = {"capital": usable_facts("capital"), "sport": usable_facts("sport")}
    first, again, other = (worded_conflicts(facts, chatty, each=1, seed=seed) for seed in (4, 4, 5))
    assert first.digest == again.digest != other.digest


def test_a_prompt_does_not_depend_on_which_others_are_made(chatty):
    facts = {"capital": usable_facts("capital")}
    some = worded_conflicts(facts, chatty, each=3, seed=SEED)
    fewer = worded_conflicts(facts, chatty, each=3, variants=("conflict",), splits=("dev",), seed=SEED)
    expected = [e for e in some if e.kind == "conflict" and e.split == "dev"]
    assert [*fewer] == expected != []


def test_each_draws_so_many_families_for_each_fact_and_variant(chatty):
    made = worded_conflicts({"author": usable_facts("author")}, chatty, each=5, seed=SEED)
    drawn = Counter((e.subject, variant_of(e)) for e in made)
    assert {*drawn.values()} == {5}
    assert {variant for _, variant in drawn} == {*VARIANTS}
    assert len({e.id for e in made}) == len(made)
    # A fact's families are the same in every variant, so that none tells what its prompts are.
    of_variant = {v: {(e.subject, e.template) for e in made if variant_of(e) == v} for v in VARIANTS}
    assert all(asked == of_variant["none"] for asked in of_variant.values())
    # Some facts share theirs: eight draws of five.
    assert 35 <= len(made.counts()["by_template"]) <= 40


def test_other_prompts_have_no_variant():
    for example in build_conflicts({"capital": usable_facts("capital")[:20]}, phrasings=("note",)):
        with pytest.raises(UserError, match="is of no phrasing family that is made from parts"):
            variant_of(example)


def test_too_few_facts_for_a_conflict_are_an_error(chatty):
    with pytest.raises(UserError, match="too few different answers"):
        worded_conflicts({"capital": usable_facts("capital")[:1]}, chatty)
    with pytest.raises(UserError, match="'capitol' is not known; known are author"):
        worded_conflicts({"capitol": usable_facts("capital")}, chatty)
