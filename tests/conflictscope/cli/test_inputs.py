import pytest

from conflictscope.cli.inputs import Prompt, read_prompts
from interp.errors import UserError


def test_prompts_come_in_batches_in_their_order():
    lines = ["\ufeffa\n", "\n", '{"prompt": "b"}\n', '  {"prompt": "c", "id": 7}\n', " d \n", "e"]
    found = list(read_prompts(lines, 2))
    assert found == [[Prompt("1", "a"), Prompt("3", "b")], [Prompt("7", "c"), Prompt("5", " d ")], [Prompt("6", "e")]]
    assert list(read_prompts([], 2)) == []


def test_prompts_are_read_no_further_than_asked_for():
    def lines():
        yield "a"
        yield "b"
        raise AssertionError("read too far")

    assert next(read_prompts(lines(), 2)) == [Prompt("1", "a"), Prompt("2", "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 is not valid JSON"),
        ('{"text": "a"}', "Line 2 has no text in a field named prompt; add one"),
        ('{"prompt": 3}', "Line 2 has no text in a field named prompt"),
        ('{"prompt": ""}', "Line 2 has no text in a field named prompt"),
    ],
)
def test_a_wrong_line_is_named(line, message):
    with pytest.raises(UserError, match=message):
        list(read_prompts(["fine\n", line], 8))
