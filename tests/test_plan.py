"""The page about planning has the numbers that the code gives now."""

from docs import plan
from interp.plan import Shapes


def test_the_tables_of_the_page_are_those_that_are_computed():
    page = plan.PAGE.read_text(encoding="utf-8")
    found = page
    for name, config in plan.CONFIGS.items():
        found = plan.filled(found, name, list(plan.rows(Shapes.of(config))))
    assert found == page


def test_a_table_is_written_between_its_marks():
    page = "Before.\n<!-- plan of one -->\nold\n<!-- end of one -->\nAfter.\n"
    table = plan.filled(page, "one", [["1"] * 9])
    assert table.startswith("Before.\n<!-- plan of one -->\n\n| tokens | command |")
    assert table.endswith("| 1 |\n\n<!-- end of one -->\nAfter.\n")
    assert "old" not in table
