import itertools
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp.activations import record, sites_of
from interp.attribution.attribution_patching import attribution_patching
from interp.attribution.direct_logits import direct_logit_attribution
from interp.attribution.path_patching import path_patching
from interp.attribution.states import last_token_states
from interp.conflicts import ConflictExample, ConflictSet
from interp.corpus import sampled_texts
from interp.errors import Caution, UserError
from interp.evaluation import answer_starts, answer_token_ids, measure_usage, neutral_kl
from interp.facts import load_facts
from interp.generation import continue_greedily, greedy_texts
from interp.inputs import (
    BATCH_TOKENS,
    batch_tokens_of,
    continuation_ids,
    encode,
    first_token_id,
    joined,
    joins_at_once,
    padding_id,
    prompt_batches,
    together,
    token_ids,
    token_spans,
)
from interp.lens import logit_lens
from interp.models import load_model
from interp.teacher_forcing import continued, text_tokens
from tests.tiny import tiny_conflicts, tiny_tokenizer

BOS, EOS = "<s>", "</s>"


def special_tokenizer(*, template: str, metaspace: bool = False, **special: str) -> Any:
    """A tokenizer with special tokens, which puts them around a text as ``template`` says."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{e.prompt} {e.memory_answers[0]}.\n{e.memory_answers[0]}" for e in tiny_conflicts()]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(BOS, 0), (EOS, 1)] if template != "$A" else []
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def beginning() -> Any:
    """Puts BOS before a text, as those of Llama and Gemma do."""
    return special_tokenizer(template=f"{BOS} $A", bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="session")
def ending() -> Any:
    """Appends EOS."""
    return special_tokenizer(template=f"$A {EOS}", bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="session")
def bare() -> Any:
    """Has no special token at all."""
    return special_tokenizer(template="$A")


def with_tokenizer(model: Any, tokenizer: Any) -> Any:
    """A tiny model that reads what another tokenizer makes."""
    return SimpleNamespace(original_model=model.original_model, tokenizer=tokenizer)


def small_model(tokenizer: Any, *, positions: int = 64) -> Any:
    """A plain tiny Llama that has exactly the tokenizer's vocabulary, with the tokenizer as an attribute."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    network: Any = LlamaForCausalLM(config).eval()
    network.tokenizer = tokenizer
    return network


# --- how an answer joins its prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "Answer:\n",
        "Answer: ",
        "Answer:\t",
        'She said "',
        'The "capital" is "',
        '{"answer": "',
        '{"answer":"',
        "It is called '",
        "It is (",
        "It is [",
        "It is \N{LEFT DOUBLE QUOTATION MARK}",
        "C'est \N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}",
        "Sie sagt \N{DOUBLE LOW-9 QUOTATION MARK}",
        "**Answer:** **",
        "`",
        "Answer: *",
        "<answer>",
        "\N{INVERTED QUESTION MARK}",
        "La capitale de l'",
        "The Austro-",
        "http://",
        "It costs $",
        "日本の首都は",
        "日本の首都は\N{LEFT CORNER BRACKET}",
        "首都是\N{FULLWIDTH COLON}",
        "首都是:",
        "เมืองหลวงคือ",
        "",
    ],
)
def test_an_answer_joins_at_once(prompt):
    assert joins_at_once(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "The capital of Peru is",
        "Answer:",
        'The capital of "Peru" is',
        'So says "Peru"',
        "It is called 'Peru'",
        "The players'",
        "It is (Peru)",
        "It is \N{LEFT DOUBLE QUOTATION MARK}Peru\N{RIGHT DOUBLE QUOTATION MARK}",
        "It is \N{DOUBLE LOW-9 QUOTATION MARK}Peru\N{LEFT DOUBLE QUOTATION MARK}",
        "**Answer:**",
        "</document>",
        "*Answer*",
        "It is Peru's",
        "Peru -",
        "It costs 5 €",
        "페루의 수도는",
        "東京 (Tokyo)",
        "[/INST]",
    ],
)
def test_an_answer_joins_after_a_space(prompt):
    assert not joins_at_once(prompt)


@pytest.mark.parametrize("prompt", ["The capital of Peru is", "Answer:\n", 'Peru: "', "Peru ("])
def test_the_tokens_of_an_answer_are_those_of_the_whole_text(smollm2, prompt):
    text = joined(smollm2.tokenizer, prompt, "Lima")
    before, after = continuation_ids(smollm2, prompt, "Lima")
    assert before + after == smollm2.tokenizer(text)["input_ids"]
    assert smollm2.tokenizer.decode(after) == text[len(prompt) :]


def test_after_a_space_an_answer_brings_no_second_one(smollm2):
    """The space is a token of its own in the prompt, and part of the word's token in the whole text."""
    before, after = continuation_ids(smollm2, "The capital of Peru is ", "Lima")
    assert before == smollm2.tokenizer("The capital of Peru is ")["input_ids"]
    assert smollm2.tokenizer.decode(after) == "Lima"


def test_a_tokenizer_that_begins_texts_with_a_space_does_not_put_one_into_them():
    tokenizer = special_tokenizer(template=f"{BOS} $A", metaspace=True, bos_token=BOS, eos_token=EOS)
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Rome", add_special_tokens=False)["input_ids"])[0][0] == "▁"
    for prompt, starts in (("The capital of Italy is", "▁"), ("Answer:\n", "R"), ("The capital of Italy is ", "R")):
        first = tokenizer.convert_ids_to_tokens(first_token_id(model, prompt, "Rome"))
        assert first[0] == starts


def chat_prompt(tokenizer: Any, text: str) -> str:
    """A question in the chat format, after two that were answered with a name alone."""
    turns = [("Germany", "Berlin"), ("Russia", "Moscow")]
    messages = [
        {"role": role, "content": content}
        for land, city in turns
        for role, content in (("user", f"What is the capital of {land}?"), ("assistant", city))
    ]
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def chat_conflicts(tokenizer: Any) -> ConflictSet:
    """Conflicts in the model's own chat format."""
    lands = {"Japan", "Peru", "France", "Iran"}
    facts = [fact for fact in load_facts("capital") if fact.subject in lands]
    examples = []
    for fact, other in zip(facts, facts[1:] + facts[:1], strict=True):
        asked = f"The capital of {fact.subject} is {other.answers[0]}. What is the capital of {fact.subject}?"
        examples.append(
            ConflictExample(
                fact.subject,
                fact.subject,
                "capital",
                asked,
                (f"The capital of {fact.subject} is {other.answers[0]}.",),
                fact.answers,
                other.answers,
                "conflict",
                "chat",
                "test",
                chat_prompt(tokenizer, asked),
                chat_prompt(tokenizer, f"What is the capital of {fact.subject}?"),
                "test",
            )
        )
    return ConflictSet("chat", tuple(examples))


def test_in_the_real_models_chat_format_answers_start_with_the_watched_tokens(smollm2):
    conflicts = chat_conflicts(smollm2.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_text = measure_usage(smollm2, conflicts, max_new_tokens=4)
        by_token = answer_starts(smollm2, conflicts)
    begun = 0
    rows = zip(conflicts, by_text.frame["answer"], by_token.frame["usage"], strict=True)
    for example, text, usage in rows:
        for source, answers in (("context", example.context_answers), ("memory", example.memory_answers)):
            if text.startswith(answers[0]):
                begun += 1
                assert usage == source
    assert begun >= 2


def test_where_answers_start_otherwise_it_is_said(tiny_llama):
    """A random model: how many of its answers start as watched is counted by hand."""
    conflicts = tiny_conflicts()
    started = 0
    for example in conflicts:
        ids = tiny_llama.tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        watched = [f" {answers[0]}" for answers in (example.context_answers, example.memory_answers)]
        greedy = tiny_llama.original_model(ids).logits[0, -1].argmax().item()
        started += greedy in [tiny_llama.tokenizer(answer)["input_ids"][0] for answer in watched]
    assert started < 2
    for ask in (
        lambda: measure_usage(tiny_llama, conflicts, max_new_tokens=2),
        lambda: answer_starts(tiny_llama, conflicts),
        lambda: direct_logit_attribution(tiny_llama, conflicts, name="tiny"),
        lambda: path_patching(tiny_llama, conflicts, name="tiny"),
        lambda: attribution_patching(tiny_llama, conflicts, name="tiny"),
        lambda: logit_lens(tiny_llama, conflicts),
    ):
        with pytest.warns(Caution, match=f"Only {started} of 16 answers start with the first token"):
            ask()


def test_after_the_header_of_a_chat_that_ends_in_a_control_token_an_answer_joins_at_once():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|assistant|>"], special_tokens=False)
    assert joined(tokenizer, "Peru?<|assistant|>", "Lima") == "Peru?<|assistant|>Lima"
    assert joined(tokenizer, "Peru?", "Lima") == "Peru? Lima"
    tokenizer.add_tokens(["Peru"], special_tokens=False)
    assert joined(tokenizer, "The capital of Peru", "Lima") == "The capital of Peru Lima"


# --- special tokens


def test_a_text_begins_with_bos_once(beginning):
    assert beginning("Rome")["input_ids"][0] == beginning.bos_token_id
    plain = beginning("Rome", add_special_tokens=False)["input_ids"]
    assert token_ids(beginning, ["Rome", f"{BOS}Rome"]) == [[0, *plain], [0, *plain]]
    assert beginning(f"{BOS}Rome")["input_ids"] == [0, 0, *plain]


def test_nothing_follows_a_text_in_a_tokenizer_that_appends_eos(ending):
    plain = ending("Rome", add_special_tokens=False)["input_ids"]
    assert ending("Rome")["input_ids"] == [*plain, 1]
    assert token_ids(ending, ["Rome"]) == [plain]
    model: Any = SimpleNamespace(tokenizer=ending)
    assert (
        continuation_ids(model, "The capital of Italy is", "Rome")[1]
        == ending(" Rome", add_special_tokens=False)["input_ids"]
    )


def test_spans_are_those_of_the_text_without_what_is_put_before(beginning):
    for text, shift in (("Rome and Lima", 0), (f"{BOS}Rome and Lima", len(BOS))):
        ids, spans = token_spans(beginning, text)
        assert [ids] == token_ids(beginning, [text])
        assert "".join(text[start:stop] for start, stop in spans).endswith("Rome and Lima")
        assert max(stop for _, stop in spans) == len("Rome and Lima") + shift


@pytest.mark.parametrize("kind", ["beginning", "ending"])
def test_everything_is_measured_at_the_last_token_of_the_prompt(kind, tiny_llama, request):
    """With the ids written by hand, whatever a tokenizer adds and whether or not the text holds BOS already."""
    tokenizer = request.getfixturevalue(kind)
    model = with_tokenizer(tiny_llama, tokenizer)
    start = [tokenizer.bos_token_id] if kind == "beginning" else []
    text = "The capital of Italy is"
    ids = torch.tensor([[*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        expected = model.original_model(ids, output_hidden_states=True)
    for prompt in (text, BOS + text) if start else (text,):
        states = last_token_states(model, [prompt])
        torch.testing.assert_close(states.embedding[0], expected.hidden_states[0][0, -1])
        recorded = record(model, [prompt], sites_of(model, ["residual"], [0]), "all")
        torch.testing.assert_close(recorded["blocks.0.hook_out"], expected.hidden_states[1][0], rtol=1e-4, atol=1e-4)
        assert continue_greedily(model, [prompt], max_new_tokens=1).first_tokens.tolist() == [
            expected.logits[0, -1].argmax().item()
        ]
        (item,) = [continued(model, prompt, "Rome")]
        assert list(item.tokens[: ids.shape[1]]) == ids[0].tolist()
        assert text_tokens(model, prompt, 99).tokens == tuple(ids[0].tolist())


def test_sampled_texts_that_start_with_bos_are_read_with_one(beginning, tmp_path):
    model = small_model(beginning)
    texts = sampled_texts(model, 8, tmp_path, split="train", seed=0, new_tokens=3)
    assert {text.startswith(BOS) for text in texts} == {True, False}
    for ids in token_ids(beginning, texts):
        assert ids[:1] == [0]
        assert ids[1] != 0


# --- padding


def test_a_tokenizer_without_padding_and_end_pads_with_a_token_that_is_masked(bare):
    model = small_model(bare)
    prompts = ["The capital of Italy is", "Rome", "Italy and Peru"]
    assert padding_id(model) == 0
    alone = [continue_greedily(model, [prompt], max_new_tokens=3).answers[0] for prompt in prompts]
    assert continue_greedily(model, prompts, max_new_tokens=3).answers == alone
    inputs = encode(model, prompts)
    assert inputs["attention_mask"].sum(-1).tolist() == [len(ids) for ids in token_ids(bare, prompts)]


def test_a_padding_token_that_the_model_does_not_embed_is_not_used(beginning):
    tokenizer = special_tokenizer(template=f"{BOS} $A", bos_token=BOS, eos_token=EOS)
    model = small_model(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    assert padding_id(model) == tokenizer.eos_token_id
    assert len(continue_greedily(model, ["Rome", "Rome and Lima"], max_new_tokens=2).answers) == 2


def test_a_model_whose_tokenizer_has_neither_padding_nor_end_loads_and_answers(bare, tmp_path):
    small_model(bare).save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    prompts = [example.prompt for example in tiny_conflicts()][:3]
    assert len(measure_usage(model, ConflictSet("some", tiny_conflicts().examples[:3])).frame) == 3
    assert len(greedy_texts(model, model.tokenizer, prompts, max_new_tokens=2)) == 3


# --- length


def test_prompts_that_do_not_fit_are_refused_with_both_counts_before_anything_runs(bare):
    model = small_model(bare, positions=8)
    short, long = "Rome", "Rome Lima " * 6
    count = len(token_ids(bare, [long])[0])
    assert count > 8
    too_long = rf"Prompt 1 has {count} tokens, but the model has 8 positions"
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UserError, match=too_long):
        prompt_batches(model, [short, long], 2)
    with pytest.raises(UserError, match=too_long):
        record(model, [short, long], sites_of(model, ["residual"]))
    with pytest.raises(UserError, match=too_long):
        last_token_states(model, [short, long])
    with pytest.raises(UserError, match=too_long):
        neutral_kl(model, warnings.catch_warnings, texts=[short, long])
    fits = len(token_ids(bare, [short])[0])
    with pytest.raises(UserError, match=f"Prompt 0 has {fits} tokens and 8 are to follow, but the model has 8 pos"):
        continue_greedily(model, [short], max_new_tokens=8)
    with pytest.raises(UserError, match="8 are to follow"):
        greedy_texts(model, bare, [short], max_new_tokens=8)
    with pytest.raises(UserError, match=r"tokens and \d+ are to follow"):
        continued(model, short, long)
    assert not ran
    handle.remove()


def test_empty_prompts_are_refused_by_number(bare):
    with pytest.raises(UserError, match="Prompt 1 has no tokens"):
        prompt_batches(small_model(bare), ["Rome", ""], 2)


def test_a_batch_keeps_the_numbers_of_its_prompts(bare):
    prompts = ["Rome", "Rome and Lima and Rome", "Rome and Lima"]
    batches = prompt_batches(small_model(bare), prompts, 2)
    assert [batch.numbers for batch in batches] == [[1, 2], [0]]
    assert [batch.tokens for batch in batches] == [token_ids(bare, [prompts[1], prompts[2]]), token_ids(bare, ["Rome"])]


def test_answers_of_every_attribution_start_where_the_text_goes_on(smollm2):
    example = chat_conflicts(smollm2.tokenizer).examples[0]
    ids = answer_token_ids(smollm2, example)
    assert ids is not None
    for token, answers in zip(ids, (example.context_answers, example.memory_answers), strict=True):
        text = smollm2.tokenizer.decode([token])
        assert text
        assert answers[0].startswith(text)


def test_rows_run_together_as_far_as_bounds_and_padding_allow():
    lengths = {0: 10, 1: 4000, 2: 30, 3: 4100, 4: 20, 5: 9000, 6: 3000}
    assert together(lengths, 32, 8192, 1500) == [[5], [3], [1, 6], [2, 4, 0]]
    assert together(lengths, 2, 8192, 100) == [[5], [3], [1], [6], [2, 4], [0]]
    assert together(lengths, 32, 8192, 0) == [[5], [3], [1], [6], [2], [4], [0]]
    assert together({0: 0, 1: 3}, 32, 1, 100) == [[1], [0]]
    assert together({}, 32, 8192, 100) == []


@pytest.mark.parametrize(("most_rows", "most_tokens"), [(8, 10_000), (3, 10_000), (8, 60)])
def test_no_other_batches_of_neighbours_take_less_time(most_rows, most_tokens):
    rng = random.Random(f"{most_rows}/{most_tokens}")
    for a_pass in (0, 5, 40, 500):
        lengths = {i: rng.randint(1, 40) for i in range(8)}
        order = sorted(lengths.values(), reverse=True)
        times = []
        for cuts in itertools.product((False, True), repeat=7):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut]
            batches = [order[start:end] for start, end in itertools.pairwise((0, *ends, 8))]
            if all(len(b) == 1 or (len(b) <= most_rows and len(b) * b[0] <= most_tokens) for b in batches):
                times.append(sum(a_pass + len(b) * b[0] for b in batches))
        found = together(lengths, most_rows, most_tokens, a_pass)
        assert sorted(i for batch in found for i in batch) == list(range(8))
        assert sum(a_pass + len(batch) * max(lengths[i] for i in batch) for batch in found) == min(times)


def test_a_model_bounds_its_batches(tiny_plain):
    model = tiny_plain("llama")
    assert batch_tokens_of(model) == BATCH_TOKENS
    prompts = ["Rome " * 5, "Paris", "Rome " * 6]
    whole = [batch.numbers for batch in prompt_batches(model, prompts, 3)]
    assert whole == [[2, 0, 1]]
    assert [b.numbers for b in prompt_batches(model, prompts, 3, most_tokens=1)] == [[2], [0], [1]]
