import math
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import polars as pl
import pytest
import torch
from scipy.stats import binomtest

from interp.conflicts import ConflictSet
from interp.errors import Caution, UserError
from interp.evaluation import (
    _SCORE_COLUMNS,
    UsageReport,
    answer_starts,
    answer_token_ids,
    divergence,
    measure_usage,
    neutral_kl,
    neutral_texts,
    room_for_answers,
)


@pytest.fixture(scope="module")
def report(smollm2, capital_conflicts):
    return measure_usage(smollm2, capital_conflicts.select(templates=["question"]))


def test_famous_capitals_are_known_closed_book(report):
    assert report.select(kind="none").accuracy().value >= 0.8


def test_agreeing_contexts_are_answered_right(report):
    assert report.select(kind="aligned").accuracy().value >= 0.8


def test_usage_follows_from_the_answer_text(report, capital_conflicts):
    by_id = {example.id: example for example in capital_conflicts}
    for row in report.select(kind="conflict").frame.iter_rows(named=True):
        example = by_id[row["id"]]
        memory, context = (answers[0] in row["answer"] for answers in (example.memory_answers, example.context_answers))
        assert row["usage"] == {(True, False): "memory", (False, True): "context", (True, True): "both"}.get(
            (memory, context), "other"
        )


def test_the_logit_difference_is_that_of_one_unpadded_forward(smollm2, report, capital_conflicts):
    row = report.select(kind="conflict").frame.row(0, named=True)
    example = next(e for e in capital_conflicts if e.id == row["id"])
    context, memory = answer_token_ids(smollm2, example) or pytest.fail("the answers start alike")
    with torch.inference_mode():
        logits = smollm2.original_model(**smollm2.tokenizer(example.prompt, return_tensors="pt")).logits[0, -1]
    assert row["logit_difference"] == pytest.approx((logits[context] - logits[memory]).item(), abs=1e-3)


def test_an_answer_that_takes_more_tokens_than_the_model_may_say_is_told_and_found_where_there_is_room(
    smollm2, capital_conflicts
):
    name = "United Kingdom of Great Britain and Northern Ireland"
    asked = replace(
        next(iter(capital_conflicts.select(kind="conflict"))),
        prompt=f"The country's full name is the {name}. Question: What is that? Answer: The country's full name is the",
        context_answers=(name, f"the {name}"),
        memory_answers=("France", "Republic of France"),
    )
    conflicts = ConflictSet("names", (asked,))
    needed = len(smollm2.tokenizer(f" {name}", add_special_tokens=False)["input_ids"])
    assert room_for_answers(smollm2, conflicts, 3) == needed > 4
    assert room_for_answers(smollm2, conflicts, needed + 1) == needed + 1
    assert room_for_answers(smollm2, conflicts, 3, 4) == 4
    with pytest.warns(Caution, match=rf"1 of 1 prompts have an answer of more than 3 tokens.* say {needed} "):
        report = measure_usage(smollm2, conflicts, max_new_tokens=3)
    assert report.frame["usage"].to_list() == ["other"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = measure_usage(smollm2, conflicts, max_new_tokens=needed)
    assert report.frame["usage"].to_list() == ["context"]
    # The shortest of the aliases decides.
    assert room_for_answers(smollm2, ConflictSet("short", (replace(asked, context_answers=(name, "UK")),)), 3) == 3


def test_the_first_token_tells_most_usages(smollm2, report, capital_conflicts):
    conflict = capital_conflicts.select(kind="conflict", templates=["question"])
    starts = answer_starts(smollm2, conflict).frame["usage"].to_list()
    answers = report.select(kind="conflict").frame["usage"].to_list()
    assert sum(a == b for a, b in zip(starts, answers, strict=True)) >= 0.8 * len(answers)


def made_up(usages, subjects):
    return UsageReport(pl.DataFrame({"usage": usages, "subject": subjects}))


def test_rates_are_shares_of_all_prompts_and_the_ratio_is_not():
    report = made_up(["memory", "context", "context", "other"], list("abcd"))
    assert (report.rate("memory").value, report.rate("context").value) == (0.25, 0.5)
    assert report.memorisation_ratio().value == pytest.approx(1 / 3)


def test_a_rate_has_the_interval_of_wilson_with_an_effective_number():
    alone = made_up(["memory", "context", "other"] * 3, list("abcdefghi")).rate("memory")
    expected = binomtest(3, 9).proportion_ci(method="wilson")
    assert (alone.low, alone.high) == pytest.approx((expected.low, expected.high))
    never = made_up(["context"] * 8, list("aabbccdd")).rate("memory")
    expected = binomtest(0, 4).proportion_ci(method="wilson")
    assert (never.low, never.high) == pytest.approx((expected.low, expected.high))


def test_the_ratio_is_undefined_where_neither_source_is_used():
    ratio = made_up(["other", "both", "other"], list("abc")).memorisation_ratio()
    assert ratio.to_record() == {"value": None, "low": None, "high": None, "n": 0}
    assert str(ratio) == "undefined"


def test_a_ratio_of_1_is_as_sure_as_the_answers_that_it_is_of():
    ratio = made_up(["memory", "memory", *["other"] * 30], range(32)).memorisation_ratio()
    expected = binomtest(2, 2).proportion_ci(method="wilson")
    assert (ratio.value, ratio.n) == (1, 2)
    assert (ratio.low, ratio.high) == pytest.approx((expected.low, expected.high))


def test_the_summary_holds_null_for_what_is_undefined():
    scores = {column: [None, None] for column in _SCORE_COLUMNS} | {"memory_span_match": [0.0, 1.0]}
    frame = pl.DataFrame({"usage": ["other", "memory"], "subject": ["a", "b"], **scores})
    summary = UsageReport(frame).summary(by=["subject"])
    ratios = summary.filter(measure="memorisation_ratio")
    assert ratios["value"].to_list() == [None, 1]
    (right,) = summary.filter(measure="memory_span_match", subject="b").iter_rows(named=True)
    expected = binomtest(1, 1).proportion_ci(method="wilson")
    assert (right["low"], right["high"]) == pytest.approx((expected.low, expected.high))


def test_a_change_is_paired_by_prompt_whatever_the_order():
    before = UsageReport(pl.DataFrame({"id": list("abcd"), "subject": list("wxyz"), "usage": ["memory"] * 4}))
    usages = ["memory", "context", "memory", "memory"] * 2
    after = UsageReport(pl.DataFrame({"id": list("dcba") * 2, "subject": list("zyxw") * 2, "usage": usages}))
    change = after.rate_change(before, "memory")
    assert (change.value, change.n) == (-0.25, 8)
    assert change.p == 1.0  # one subject alone changed, and either sign is as likely
    with pytest.raises(UserError, match="'d' was not asked before the edit"):
        after.rate_change(UsageReport(before.frame.head(3)), "memory")


def test_an_empty_selection_is_an_error(report):
    with pytest.raises(UserError, match="There is no prompt to measure"):
        report.select(kind="nothing").rate("memory")


def test_nothing_to_ask_is_an_error(smollm2):
    with pytest.raises(UserError, match="There is no prompt to measure"):
        measure_usage(smollm2, ConflictSet("empty", ()))


def test_kl_of_no_edit_is_zero(smollm2):
    assert neutral_kl(smollm2, nullcontext, texts=neutral_texts()[:3]).tolist() == [0.0, 0.0, 0.0]


def test_what_is_left_out_costs_what_it_was_worth():
    """By hand: of 1/2, 1/4, 1/4 the first is left out; the others stay as they are, or become 1/5 and 4/5."""
    unedited = torch.tensor([0.5, 0.25, 0.25]).log()
    kept = torch.tensor([-torch.inf, 0.0, 0.0])
    moved = torch.tensor([-torch.inf, *torch.tensor([0.2, 0.8]).log()])
    lost = math.log(2)
    further = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    nothing = torch.full((3,), -torch.inf)
    found = divergence(unedited.expand(4, 3), torch.stack([unedited, kept, moved, nothing]))
    assert found.tolist() == pytest.approx([0, lost, lost + further, math.inf])


def test_kl_is_that_of_torch_without_padding(smollm2):
    texts = neutral_texts()[:3]
    layer = smollm2.original_model.model.layers[20].mlp

    @contextmanager
    def halved():
        handle = layer.register_forward_hook(lambda _, __, output: output / 2)
        yield
        handle.remove()

    def log_probabilities(text):
        with torch.inference_mode():
            return smollm2.original_model(**smollm2.tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1)

    expected = []
    for text in texts:
        clean = log_probabilities(text)
        with halved():
            edited = log_probabilities(text)
        expected.append(torch.nn.functional.kl_div(edited, clean, log_target=True, reduction="batchmean").item())
    assert neutral_kl(smollm2, halved, texts=texts) == pytest.approx(expected, rel=1e-3)
