import pytest

from interp.answers import contains_answer, exact_match, first_sentence, is_complete, normalise, token_f1, usage_of


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("Washington, D.C.", "washington dc"),
        ("A", "a"),
    ],
)
def test_normalisation_is_that_of_squad(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("continuation", "sentence"),
    [
        (" Paris. It lies on the Seine.", "Paris"),
        (" Washington, D.C. is", "Washington, D.C. is"),
        (" St. John's. And", "St. John's"),
        ("\n\nRome\nLondon", "Rome"),
        (" Paris", "Paris"),
        (" Dr. Seuss. He", "Dr. Seuss"),
    ],
)
def test_the_answer_is_the_first_sentence(continuation, sentence):
    assert first_sentence(continuation) == sentence


@pytest.mark.parametrize(
    ("continuation", "complete"),
    [(" Paris. It", True), (" Paris.", False), (" St. ", False), ("\n", False)],
)
def test_an_answer_is_complete_at_its_first_sentence_end(continuation, complete):
    assert is_complete(continuation) is complete


@pytest.mark.parametrize(
    ("prediction", "usage"),
    [
        ("the city of Paris", "memory"),
        ("Rome, the eternal city", "context"),
        ("Rome, not Paris", "both"),
        ("Romeo", "other"),
        ("", "empty"),
        ("the City of Light", "memory"),
    ],
)
def test_usage_matches_whole_words_of_any_alias(prediction, usage):
    assert usage_of(prediction, ["Paris", "City of Light"], ["Rome"]) == usage


def test_exact_match_ignores_articles_case_and_punctuation():
    assert exact_match("The Hague.", ["hague"])
    assert not exact_match("The Hague is", ["hague"])


def test_no_answers_match_nothing():
    assert not contains_answer("Paris", [])
    assert token_f1("Paris", []) == 0


def test_f1_is_the_harmonic_mean_of_word_overlap():
    # 2 of 3 predicted words are right and 2 of 2 expected words are found: 2 * (2/3) * 1 / (2/3 + 1) = 0.8
    assert token_f1("New York City", ["New York"]) == pytest.approx(0.8)
