import pytest

from interp.scripts import is_unspaced


@pytest.mark.parametrize("character", [*"東のカｶ。\N{FULLWIDTH COLON}กລខမབ々"])
def test_scripts_without_spaces(character):
    assert is_unspaced(character)


@pytest.mark.parametrize("character", ["a", "é", "ж", "수", "ש", "ع", "ह", "1", " ", "\n", ":", "🙂"])
def test_scripts_with_spaces(character):
    assert not is_unspaced(character)
