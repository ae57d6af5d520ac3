"""Generating with and without the context side by side gives what full passes over one prompt at a time would."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from interp.errors import UserError
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.decoding import CAD, COIECD, AdaCAD, CKPlug, DecodingRule
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.runtime import apply
from interventions.two_streams import generate
from tests.tiny import CONFIGS, tiny_conflicts

# Of many lengths, in an order that mixes them; the last one's prompt without the context is the longer one.
PAIRS = [
    *[(e.prompt, e.bare_prompt) for e in tiny_conflicts()][::3],
    ("Rome is in", "Say only what you know: Rome is in"),
]
RULES: list[DecodingRule] = [
    *(CAD(1.0), CAD(-0.5), AdaCAD(), AdaCAD(0.3, -1.0), COIECD(1.0), COIECD(-0.5, 0.5)),
    *(CKPlug(alpha, gate) for alpha in (0.2, 0.8, None) for gate in ("paper", "released")),
]
HEADS = HeadScaling.of([(1, 1), (2, 3)], -2.0)
LONGEST = 7
ENDS = list(range(0, 1096, 5))
"""Tokens that end a text: so many that pairs end at different steps."""


@pytest.fixture(scope="module")
def llama(tiny_directories) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_directories["llama"]).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_directories) -> Any:
    return AutoTokenizer.from_pretrained(tiny_directories["llama"])


@pytest.fixture(scope="module")
def pairs(tokenizer) -> dict[str, Any]:
    return tokens(tokenizer, PAIRS)


def tokens(tokenizer, pairs, side: str = "left") -> dict[str, Any]:
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": side}
    prompts, bare = (tokenizer([pair[i] for pair in pairs], **options) for i in (0, 1))
    return {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"], "without": bare}


def one_by_one(model, tokenizer, pairs, choose, edits_of=lambda _: ()) -> list[list[int]]:
    """The new tokens of each pair: two whole passes for every token, without caches, batches and padding.

    ``edits_of`` gives what is applied while a prompt is read.
    """

    def logits(prompt: str, new: list[int]) -> torch.Tensor:
        with torch.inference_mode(), applied(model, *edits_of(prompt)):
            return model(torch.tensor([tokenizer(prompt)["input_ids"] + new])).logits[:, -1].float()

    found = []
    for pair in pairs:
        new: list[int] = []
        while len(new) < LONGEST and (not new or new[-1] not in ENDS):
            new.append(int(choose(*(logits(prompt, new) for prompt in pair)).argmax()))
        found.append(new)
    return found


def generated(model, rule, pairs, **options: Any) -> list[list[int]]:
    """The new tokens of each pair, up to the first that ends a text."""
    output = generate(
        model, rule, **pairs, max_new_tokens=LONGEST, do_sample=False, eos_token_id=ENDS, pad_token_id=0, **options
    )
    width = pairs["input_ids"].shape[1]
    assert torch.equal(output[:, :width], pairs["input_ids"])
    rows = output[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row))] for row in rows]


# Tokens


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_gives_the_tokens_of_full_passes_over_one_prompt_at_a_time(llama, tokenizer, pairs, rule):
    expected = one_by_one(llama, tokenizer, PAIRS, rule.scores)
    assert len({len(new) for new in expected}) > 1
    assert generated(llama, rule, pairs) == expected


@pytest.mark.parametrize("architecture", CONFIGS)
def test_in_every_architecture(tiny_directories, tokenizer, pairs, architecture):
    model = AutoModelForCausalLM.from_pretrained(tiny_directories[architecture]).eval()
    for rule in (CAD(1.0), CKPlug(0.2, "released")):
        assert generated(model, rule, pairs) == one_by_one(model, tokenizer, PAIRS, rule.scores)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_with_any_cache(llama, pairs, options):
    assert generated(llama, CAD(1.0), pairs, **options) == generated(llama, CAD(1.0), pairs)


def test_padding_on_the_right_and_a_batch_of_one_make_no_difference(llama, tokenizer, pairs):
    expected = generated(llama, CAD(1.0), pairs)
    assert generated(llama, CAD(1.0), tokens(tokenizer, PAIRS, "right")) == expected
    alone = [generated(llama, CAD(1.0), tokens(tokenizer, [pair]))[0] for pair in PAIRS]
    assert alone == expected


def test_a_bridge_generates_like_the_model_in_it(tiny_llama, llama, pairs):
    assert generated(tiny_llama, CAD(1.0), pairs) == generated(llama, CAD(1.0), pairs)


def test_an_alpha_of_0_generates_what_the_model_does(llama, pairs):
    prompts = {name: pairs[name] for name in ("input_ids", "attention_mask")}
    plain = llama.generate(**prompts, max_new_tokens=LONGEST, do_sample=False)
    assert torch.equal(generate(llama, CAD(0.0), **pairs, max_new_tokens=LONGEST, do_sample=False), plain)


# What else generate does


def test_samples_have_the_rule_s_distribution_at_each_step(llama, tokenizer):
    """After temperature and top-k, which see the rule's scores; the second token follows from the first."""
    draws, top, temperature, rule = 4000, 3, 1.5, CAD(0.5)
    torch.manual_seed(0)
    output = generate(
        llama,
        rule,
        **tokens(tokenizer, PAIRS[:1]),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=True,
        temperature=temperature,
        top_k=top,
        num_return_sequences=draws,
        eos_token_id=None,
        pad_token_id=0,
    )
    streams = [tokenizer(text)["input_ids"] for text in PAIRS[0]]
    assert output.shape == (draws, len(streams[0]) + 2)

    def distribution(new: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            first, second = (llama(torch.tensor([ids + new])).logits[:, -1] for ids in streams)
        best = rule.scores(first, second)[0].topk(top)
        return dict(zip(best.indices.tolist(), (best.values / temperature).softmax(-1).tolist(), strict=True))

    drawn = [tuple(row) for row in output[:, -2:].tolist()]
    expected = {(one, other): p * q for one, p in distribution([]).items() for other, q in distribution([one]).items()}
    assert set(drawn) <= set(expected)
    for pair, probability in expected.items():
        error = (probability * (1 - probability) / draws) ** 0.5
        assert drawn.count(pair) / draws == pytest.approx(probability, abs=4.5 * error)


def test_a_record_has_the_rows_of_the_prompts_and_the_rule_s_scores(llama, pairs):
    options: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_scores": True}
    for sampled in (False, True):
        output = generate(
            *(llama, CAD(1.0)),
            **pairs,
            **options,
            do_sample=sampled,
            top_k=0,
            output_logits=True,
            output_hidden_states=True,
        )
        assert output.sequences.shape == (len(PAIRS), pairs["input_ids"].shape[1] + 2)
        assert [len(part) for part in (*output.scores, *output.logits)] == [len(PAIRS)] * 4
        assert {len(layer) for step in output.hidden_states for layer in step} == {len(PAIRS)}
        assert output.past_key_values is None
        alone = generate(llama, CAD(0.0), **pairs, **options, do_sample=False)
        torch.testing.assert_close(output.logits[0], alone.scores[0])
        assert not torch.allclose(output.scores[0], output.logits[0])
        assert output.scores[0].isfinite().all()


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_told_of_the_prompt_and_each_token(llama, tokenizer):
    pair, streamer = tokens(tokenizer, PAIRS[:1]), Kept()
    output = generate(llama, CAD(1.0), **pair, streamer=streamer, max_new_tokens=4, do_sample=True)
    assert torch.equal(torch.cat([part.reshape(1, -1) for part in streamer.given], 1), output)
    assert streamer.ended


class LongerThan(StoppingCriteria):
    """Ends a text of more tokens than it is given: the prompts with a context end first."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return (input_ids != 0).sum(-1) > self.longest


def test_a_pair_ends_with_its_prompt_s_text(llama, tokenizer):
    """Else the prompt without the context would go on with padding."""
    pair = tokens(tokenizer, PAIRS[:1])
    longest = pair["input_ids"].shape[1] + 3
    output = generate(llama, CAD(1.0), **pair, stopping_criteria=[LongerThan(longest)], max_new_tokens=9)
    assert output.shape[1] == longest + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not by beam search"),
        ({"prompt_lookup_num_tokens": 2}, "not by assisted generation"),
        ({"assistant_model": object()}, "not with an assistant model"),
        ({"max_length": 20}, "cannot take max_length; give max_new_tokens"),
        ({"past_key_values": object()}, "cannot take past_key_values; give whole prompts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_with_two_prompts_is_refused(llama, pairs, options, message):
    with pytest.raises(UserError, match=message):
        generate(llama, CAD(1.0), **pairs, **options)


def test_prompts_without_a_context_are_refused(llama, tokenizer):
    with pytest.raises(UserError, match="Prompt 1 is the same with and without a context"):
        generate(llama, CAD(1.0), **tokens(tokenizer, [PAIRS[0], ("Rome is in", "Rome is in")]))
    with pytest.raises(UserError, match="There are 2 prompts, but 1 without a context"):
        generate(
            llama, CAD(1.0), **(tokens(tokenizer, PAIRS[:2]) | {"without": tokenizer("Rome", return_tensors="pt")})
        )


# Files, edits and gates


def test_a_file_with_a_rule_and_edits_does_both_and_each_prompt_is_edited(llama, tokenizer, pairs, tmp_path):
    rule = CKPlug(0.2, "released")
    model = ModelIdentity.of(llama, "tiny", tokenizer)
    InterventionFile.of([HEADS, rule], name="both", model=model).save(tmp_path / "both.json")
    expected = one_by_one(llama, tokenizer, PAIRS, rule.scores, lambda _: [HEADS])
    with applied(llama, HEADS):
        assert generated(llama, rule, pairs) == expected
    assert generated(llama, tmp_path / "both.json", pairs) == expected
    assert expected != one_by_one(llama, tokenizer, PAIRS, rule.scores)
    assert InterventionFile.load(tmp_path / "both.json").build() == [HEADS, rule]


def test_a_file_for_another_model_is_refused(tiny_directories, llama, pairs):
    other = AutoModelForCausalLM.from_pretrained(tiny_directories["mistral"])
    file = InterventionFile.of([CAD(1.0)], name="rule", model=ModelIdentity.of(other, "other"))
    with pytest.raises(UserError, match="is for other"):
        generate(llama, file, **pairs)


def test_without_a_rule_or_with_two_nothing_is_generated(llama, pairs):
    with pytest.raises(UserError, match="no rule for the next token; apply it with"):
        generate(llama, HEADS, **pairs)
    file = InterventionFile.of([CAD(1.0), COIECD()], name="two", model=ModelIdentity.of(llama, "tiny"))
    with pytest.raises(UserError, match="chosen by one rule, not by 2"):
        generate(llama, file, **pairs)


@pytest.mark.parametrize("rule", [CAD(1.0), CKPlug(0.2, "released")], ids=str)
def test_behind_a_gate_a_rule_leaves_prompts_that_do_not_open_it_alone(llama, tokenizer, pairs, rule, tmp_path):
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))

    @cache
    def score(prompt: str) -> float:
        with torch.inference_mode():
            states = llama(torch.tensor([tokenizer(prompt)["input_ids"]]), output_hidden_states=True).hidden_states
        return float(states[1][0, -1] @ weight)

    threshold = sum(sorted(score(prompt) for prompt, _ in PAIRS)[2:4]) / 2
    gate = ConflictGate("block", 0, weight, 0.0, threshold, (rule, HEADS))

    def edits_of(prompt: str) -> list[HeadScaling]:
        return [HEADS] if score(prompt) > threshold else []

    on, off = (one_by_one(llama, tokenizer, PAIRS, f, edits_of) for f in (rule.scores, lambda first, _: first))
    expected = [new if score(pair[0]) > threshold else old for pair, new, old in zip(PAIRS, on, off, strict=True)]
    assert expected not in (on, off)
    InterventionFile.of([gate], name="gated", model=ModelIdentity.of(llama, "tiny")).save(tmp_path / "gated.json")
    for given in (gate, tmp_path / "gated.json"):
        assert generated(llama, given, pairs) == expected


@pytest.mark.parametrize("parts", [[CAD(1.0)], [ConflictGate("block", 0, torch.ones(32), 0.0, 0.0, (CAD(1.0),))]])
def test_a_file_with_a_rule_cannot_be_applied_and_folded(llama, parts):
    file = InterventionFile.of(parts, name="rule", model=ModelIdentity.of(llama, "tiny"))
    with pytest.raises(UserError, match=r"call interventions\.two_streams\.generate with both"):
        apply(llama, file)
    with pytest.raises(UserError, match="cannot be folded"):
        file.build()[0].folded()
