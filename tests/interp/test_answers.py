import random
import re
import string
import unicodedata

import pytest

from interp.answers import (
    USAGES,
    contains_answer,
    exact_match,
    first_sentence,
    is_complete,
    normalise,
    overlap,
    token_f1,
    usage_of,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("Washington, D.C.", "washington dc"),
        ("A", "a"),
        ("the", "the"),
        ("Lima-based", "limabased"),
        ("Lima\u2019s", "limas"),
        ("It is 3.5.", "it is 3.5"),
        ("1,000 or 3,5", "1000 or 3,5"),
        ("-5 of (-.5)", "-5 of -0.5"),
        ("\u22125", "-5"),
        ("1990-1995, 1990\u20131995", "1990 1995 1990 1995"),
        ("C++ and C#.", "c++ and c#"),
        ("U.S.A.-based", "usabased"),
        ("10\u00b2 and 3\u00bd", "10 2 and 3 1 2"),
        ("H\u2082O", "h2o"),
        ("\u0663", "3"),
        ("東京です", "東 京 で す"),
        ("Ünïcödé Łódź Straße Αθήνα", "unicode lodz strasse αθηνα"),
        ("Acme\N{TRADE MARK SIGN} Inc.", "acme inc"),
        ("?!", ""),
    ],
)
def test_a_text_is_its_words(text, normal):
    assert normalise(text) == normal


def test_accents_of_other_scripts_are_part_of_their_letters():
    assert normalise("йод") != normalise("иод")
    assert normalise("दिल्ली") == "दिल्ली"
    assert normalise("서울") == normalise(unicodedata.normalize("NFD", "서울"))


def squad(text: str) -> str:
    """``normalize_answer`` of SQuAD's evaluation script, version 1.1."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def ordinary_texts(seed: int, vocabulary: str, *, end: str = "city") -> list[str]:
    """English-looking texts: words with punctuation after some of them, articles only before words."""
    rng = random.Random(seed)

    def word() -> str:
        said = rng.choice(vocabulary.split())
        return (
            said if said in {"a", "an", "the", "The"} else said + rng.choice(["", "", "", ",", ".", "!", ";", '"', ")"])
        )

    return [" ".join([*(word() for _ in range(rng.randrange(8))), end]) for _ in range(300)]


def test_normalisation_of_ordinary_english_is_that_of_squad():
    for text in ordinary_texts(0, "the The a an Paris rome Of (York U.S. D.C. new and another THEME banana"):
        assert normalise(text) == squad(text)


def test_an_answer_is_found_where_its_words_follow_each_other():
    # No article and nothing that may be one word or two: plain lists of words, compared one by one.
    texts = ordinary_texts(1, "new York york city of Light", end="york")
    answers = ordinary_texts(2, "new york of", end="york")
    for text, answer in zip(texts, answers, strict=True):
        words, wanted = squad(text).split(), squad(answer).split()
        found = any(words[i : i + len(wanted)] == wanted for i in range(len(words)))
        assert contains_answer(text, [answer]) is found


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("東京です", "東京"),
        ("กรุงเทพมหานคร", "กรุงเทพ"),
        ("São Paulo", "Sao Paulo"),
        ("Sao Paulo", "São Paulo"),
        (unicodedata.normalize("NFD", "São Paulo"), "São Paulo"),
        (unicodedata.normalize("NFD", "Émile"), unicodedata.normalize("NFC", "Émile")),
        ("\uff30\uff41\uff52\uff49\uff53", "Paris"),
        ("Lima-based", "Lima"),
        ("Lima\u2010based", "Lima"),
        ("Paris/Lyon", "Lyon"),
        ("Lima's", "Lima"),
        ("Lima\u2019s", "Lima"),
        ("Paris\u2026", "Paris"),
        ("Paris\u3002", "Paris"),
        ("\u00abParis\u00bb", "Paris"),
        ("\u200bParis\u200b", "Paris"),
        ("Pa\u00adris", "Paris"),
        ("Paris\u2014the capital", "Paris"),
        ("Paris.It is", "Paris"),
        ("Al-Khwarizmi's book", "Alkhwarizmi"),
        ("Alkhwarizmi", "Al-Khwarizmi"),
        ("Al Khwarizmi", "Al-Khwarizmi"),
        ("St Johns", "St. John's"),
        ("St. John\u2019s", "St Johns"),
        ("the Hawai\u02bbi islands", "Hawai'i"),
        ("a U.S.-based one", "US"),
        ("COVID-19", "COVID 19"),
        ("1,000 men", "1000"),
        ("once upon A Time", "Once Upon a Time"),
        ("some vitamin a daily", "Vitamin A"),
    ],
)
def test_writing_hides_no_answer(prediction, answer):
    assert usage_of(prediction, [answer], ["リマ"]) == "memory"
    assert usage_of(prediction, ["リマ"], [answer]) == "context"


@pytest.mark.parametrize(
    ("prediction", "memory", "context", "usage"),
    [
        ("It is 3.5", ["3.5"], ["35"], "memory"),
        ("It is 35", ["3.5"], ["35"], "context"),
        ("version 1.2", ["12"], ["13"], "other"),
        ("-5 degrees", ["5"], ["-5"], "context"),
        ("5 degrees", ["5"], ["-5"], "memory"),
        ("from 1990-1995", ["1995"], ["-1995"], "memory"),
        ("0.5", ["5"], [".5"], "context"),
        ("10\u00b2", ["102"], ["10"], "context"),
        ("C++", ["C"], ["C++"], "context"),
        ("C", ["C"], ["C++"], "memory"),
        ("C#, of course", ["C"], ["C#"], "context"),
    ],
)
def test_numbers_and_names_keep_what_tells_them_apart(prediction, memory, context, usage):
    assert usage_of(prediction, memory, context) == usage


@pytest.mark.parametrize(
    ("prediction", "usage"),
    [
        ("The answer is A", "memory"),
        ("The answer is B", "context"),
        ("A", "memory"),
        ("A.", "memory"),
        ("(A) tar", "memory"),
        ("A, not C", "memory"),
        ("A is right", "memory"),
        ("Option A because of tar", "memory"),
        ("It is a kind of stone", "other"),
        ("A kind of stone", "other"),
        ("Sure. A kind of stone", "other"),
        ("I'd say B", "context"),
    ],
)
def test_a_letter_is_a_choice_and_an_article_is_none(prediction, usage):
    assert usage_of(prediction, ["A", "D"], ["B", "coal."]) == usage


@pytest.mark.parametrize("prediction", ["Vitamin A", "It is Vitamin A, of course", "vitamin a"])
def test_a_letter_at_the_end_of_a_name_is_no_article(prediction):
    assert usage_of(prediction, ["Vitamin A"], ["Vitamin C"]) == "memory"
    assert not contains_answer("Vitamin C", ["Vitamin A"])


@pytest.mark.parametrize(
    ("continuation", "sentence"),
    [
        (" Paris. It lies on the Seine.", "Paris"),
        (" Washington, D.C. is", "Washington, D.C. is"),
        (" Washington, D.C. It is", "Washington, D.C"),
        (" St. John's. And", "St. John's"),
        ("\n\nRome\nLondon", "Rome"),
        ("Rome\u2028London", "Rome"),
        (" Paris", "Paris"),
        (" Dr. Seuss. He", "Dr. Seuss"),
        (" Dr. He Jiankui. So", "Dr. He Jiankui"),
        (" Sgt. Pepper. It", "Sgt. Pepper"),
        (" Ft. Worth, Texas. It", "Ft. Worth, Texas"),
        (" Martin Luther King Jr. said so. Then", "Martin Luther King Jr. said so"),
        (" a fruit, e.g. an apple. Or", "a fruit, e.g. an apple"),
        (" Apple Inc. in California. Yes", "Apple Inc. in California"),
        (" Apple Inc. The firm", "Apple Inc"),
        (" a Ph.D. student. She", "a Ph.D. student"),
        (" J. K. Rowling. She", "J. K. Rowling"),
        (" vitamin C. It is", "vitamin C"),
        ("1. Paris\n2. Rome", "1. Paris"),
        (" 1984. Then", "1984"),
        (" in 1984. Then", "in 1984"),
        (" No. 5. It", "No. 5"),
        (" No. The capital", "No"),
        (" there is no. 5. It", "there is no"),
        (" 3.5 km. Far", "3.5 km"),
        (" \u201cParis.\u201d It is", "\u201cParis"),
        (' "Paris!" he said', '"Paris'),
        (" (in Paris.) It is", "(in Paris"),
        ("東京。それは", "東京"),
        ("東京\uff01それは", "東京"),
        (" दिल्ली। यह", "दिल्ली"),
        (". Paris", ""),
    ],
)
def test_the_answer_is_the_first_sentence(continuation, sentence):
    assert first_sentence(continuation) == sentence


@pytest.mark.parametrize(
    ("continuation", "complete"),
    [
        (" Paris. It", True),
        (" Paris.", False),
        (" Paris.\u201d", False),
        (" Paris.\u201d ", True),
        (" St. ", False),
        (" D.C. It", False),
        (" D.C. It ", True),
        (" No. ", False),
        (" No. T", True),
        ("東京。", True),
        ("\n", False),
    ],
)
def test_an_answer_is_complete_at_its_first_sentence_end(continuation, complete):
    assert is_complete(continuation) is complete


def test_more_text_does_not_change_a_complete_answer():
    rng = random.Random(0)
    parts = [
        "Paris",
        "D",
        ".",
        ".",
        " ",
        " ",
        "\n",
        "No",
        "5",
        "It",
        "Dr",
        " Jr",
        "\u201d",
        ")",
        "\u3002",
        "e.g",
        "!",
        "Fact",
        ":",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        begun = text[: rng.randrange(len(text) + 1)]
        assert not is_complete(begun) or first_sentence(begun) == first_sentence(text), (begun, text)


@pytest.mark.parametrize(
    ("prediction", "usage"),
    [
        ("the city of Paris", "memory"),
        ("Rome, the eternal city", "context"),
        ("Rome, not Paris", "both"),
        ("Romeo", "other"),
        ("", "empty"),
        (" \u2026!", "empty"),
        ("the City of Light", "memory"),
    ],
)
def test_usage_matches_whole_words_of_any_alias(prediction, usage):
    assert usage in USAGES
    assert usage_of(prediction, ["Paris", "City of Light"], ["Rome"]) == usage


@pytest.mark.parametrize(
    ("prediction", "usage"),
    [
        ("New York", "memory"),
        ("in New York City", "memory"),
        ("York", "context"),
        ("York, not New York", "both"),
        ("newyork", "other"),
    ],
)
def test_an_answer_within_a_longer_one_of_the_other_source_does_not_count(prediction, usage):
    swapped = {"memory": "context", "context": "memory"}
    assert usage_of(prediction, ["New York"], ["York"]) == usage
    assert usage_of(prediction, ["York"], ["New York"]) == swapped.get(usage, usage)


def test_an_article_makes_no_answer_longer():
    assert usage_of("It is The Hague", ["The Hague"], ["Hague"]) == "both"


def test_a_contraction_is_no_answer():
    assert usage_of("I don't know", ["Don"], ["T"]) == "other"


def test_accents_count_where_answers_differ_by_them_alone():
    assert usage_of("Jose", ["José"], ["Jose"]) == "context"
    assert usage_of(unicodedata.normalize("NFD", "JOSÉ"), ["José"], ["Jose"]) == "memory"
    assert usage_of("Jose", ["José", "Jose"], ["Jose"]) == "both"
    assert usage_of("Jose", ["José"], ["Josef"]) == "memory"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (["Paris"], ["Rome"], None),
        (["Rome"], ["Romeo"], None),
        (["The Hague", "Den Haag"], ["hague"], "same"),
        (["St. John's"], ["St Johns"], "same"),
        (["New York"], ["York", "Jorvik"], "contained"),
        (["Lima"], ["Lima-Callao"], "contained"),
        (["東京"], ["東京都"], "contained"),
        (["São Paulo"], ["Sao Paulo"], None),
        (["São Paulo", "Sao Paulo"], ["Sao Paulo"], "same"),
        (["5"], ["-5"], None),
        (["C"], ["C++"], None),
        (["Vitamin A"], ["Vitamin C"], None),
        (["?"], ["!"], None),
        ([], ["Paris"], None),
    ],
)
def test_overlapping_answers_are_told(one, other, expected):
    assert overlap(one, other) == expected
    assert overlap(other, one) == expected


def test_exact_match_ignores_articles_case_and_punctuation():
    assert exact_match("The Hague.", ["hague"])
    assert not exact_match("The Hague is", ["hague"])


def test_no_answers_match_nothing():
    assert not contains_answer("Paris", [])
    assert not contains_answer("Paris", ["", "?"])
    assert token_f1("Paris", []) == 0


def test_f1_is_the_harmonic_mean_of_word_overlap():
    # 2 of 3 predicted words are right and 2 of 2 expected words are found: 2 * (2/3) * 1 / (2/3 + 1) = 0.8
    assert token_f1("New York City", ["New York"]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("said", "memory", "context", "usage"),
    [
        ("Apple Inc. Microsoft makes Windows.", "Apple", "Microsoft", "memory"),
        ("It was in Dec. Paris is", "December", "Paris", "other"),
        ("On Dec. 25 in Paris", "December", "Paris", "context"),
        ("**Lima.** Rome is in Italy.", "Lima", "Rome", "memory"),
        ("`Lima.` Rome is in Italy.", "Lima", "Rome", "memory"),
        ("<b>Lima.</b> Rome is in Italy.", "Lima", "Rome", "memory"),
        ("Lima.[1] Rome is in Italy.", "Lima", "Rome", "memory"),
        ("**-5**", "-5", "5", "memory"),
        ("temperature:-5", "-5", "5", "memory"),
        ("x=-5", "-5", "5", "memory"),
        ("from 5-10", "-10", "10", "context"),
        ("A (tar)", "A", "B", "memory"),
        ("B (tar)", "A", "B", "context"),
        ("A - tar", "A", "B", "memory"),
        ("A\ntar", "A", "B", "memory"),
        ("A city", "A", "B", "other"),
        ("서울입니다", "서울", "부산", "memory"),
        (
            "\u0627\u0644\u0642\u064e\u0627\u0647\u0650\u0631\u064e\u0629",
            "\u0627\u0644\u0642\u0627\u0647\u0631\u0629",
            "x",
            "memory",
        ),
    ],
)
def test_the_first_sentence_tells_the_source(said, memory, context, usage):
    assert usage_of(first_sentence(said), [memory], [context]) == usage
