"""The list of deliberate faults fits the code; running them takes minutes: ``python -m tests.faults``."""

import ast

import pytest

from tests.faults import FAULTS, ROOT, with_fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_put_into_the_code_and_has_tests(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    ast.parse(with_fault(text, fault))
    assert (ROOT / fault.tests).is_file()
